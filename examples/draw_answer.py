"""An answer that is there already, drawn: the boxes and masks of a detect or segment answer on its picture.

    python examples/draw_answer.py IMAGE "<loc0527><loc0488><loc0855><loc0735> red circle" OUT

Masks are drawn with the vae-oid.npz of the checkpoint that --weights names, or else with that of weights/.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import vlm

ROOT = Path(vlm.__file__).resolve().parent


@vlm.program
def main(argv):
  p = vlm.terminal.ArgumentParser(prog="draw_answer.py", allow_abbrev=False,
                                  description="Draw an answer's boxes and masks.")
  p.add_argument("image", metavar="IMAGE", help="the picture that was asked about")
  p.add_argument("answer", metavar="ANSWER", help="what PaliGemma said, <loc> and <seg> tokens as text")
  p.add_argument("out", metavar="OUT", help="the picture to be written")
  p.add_argument("--weights", metavar="DIR", help="whose vae-oid.npz draws masks (default: that of weights/)")
  p.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
  args = p.parse_args(argv)
  vlm.beside("draw").check_output(args.out, [args.image])
  folder = vlm.terminal.find_weights(args.weights, ROOT) if args.weights else ROOT / "weights"
  vlm.terminal.check_picture(args.image)
  picture = vlm.open_image(args.image)
  answer = vlm.Answer(args.answer, [], vlm.parse_boxes(args.answer, *picture.size))
  device = vlm.open_device(None) if any(box.codes for box in answer.boxes) else None
  vlm.terminal.Drawing(picture, answer, folder, device).save(args, [args.image])


if __name__ == "__main__":
  sys.exit(main())
