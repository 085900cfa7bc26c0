"""What a person at a terminal meets beyond the answer itself: what is being done, boxes and masks on the picture, one
question after another, where a model is found, and what to type instead. Imports nothing of vlm, which hands over the
model's folder and the answer."""
import os
import sys
from pathlib import Path

from PIL import Image

from tokenizer import Fault

quiet = True  # a program that has a person in front of it says otherwise
MOVED = {"--train": "train", "--init": "train", "--resume": "train", "--batch": "batch", "--batch-size": "batch",
         "--show": "show", "--layer": "show", "--quantize": "quantize", "--save": "quantize", "--shard": "shard"}


# ---- 1. What is being done ----


def stage(text):
  """A line of progress on a terminal's stderr, each over the last; "" clears it."""
  if sys.stderr.isatty() and not quiet:
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def bar(done, total, text):
  """The one progress bar of all programs."""
  stage(f"[{'#' * (20 * done // total):20}] {done}/{total}  {text}")


def say(text):
  """A line on stderr, unless --quiet."""
  stage("")
  if not quiet:
    print(text, file=sys.stderr)


def some(names, most=3):
  """A list of names as text; of a long one its beginning."""
  return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


# ---- 2. What was typed ----


def moved(program, message):
  """What argparse says -> the same, or which program has the option now that vlm.py once had."""
  word = message.split(": ")[-1].partition(" ")[0].partition("=")[0]
  known = program == "vlm.py" and word in MOVED
  return f"{word} is a program of its own: python examples/{MOVED[word]}.py" if known else message


SHIPPED = "toy", "tiny1", "tiny2", "tiny2-28b"


def default_weights(root):
  """The largest checkpoint under root/weights; what was downloaded or trained comes before what ships. Raises Fault."""
  found = []
  for config in root.glob("weights/*/config.json"):
    size = sum(file.stat().st_size for file in config.parent.glob("*.safetensors"))
    if size:
      found.append((config.parent.name not in SHIPPED, size, config.parent))
  if not found:
    raise Fault("no checkpoint under weights/; name one with --weights, or get one (README.md, A real photograph)")
  return max(found)[-1]


def find_weights(name, root):
  """A folder, or a repository of the hub, looked for under root/weights and in Hugging Face's cache: what transformers
  has downloaded need not be downloaded again -> folder. None: see default_weights. Raises Fault."""
  if name is None:
    return default_weights(root)
  name, folder = str(name), Path(name)
  if name.endswith(".npz"):
    raise Fault(f"{name}: convert it once, python examples/big_vision.py {name} DIR, and name that folder")
  home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
  hub = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser() / f"models--{name.replace('/', '--')}"
  main = hub / "refs" / "main"
  cached = hub / "snapshots" / (main.read_text().strip() if main.is_file() else "none")
  for place in (folder, root / "weights" / folder, root / "weights" / folder.name, cached):
    if name and place.exists():
      return place
  get = (f"; accept its licence at huggingface.co/{name}, then: hf download {name} --local-dir weights/{folder.name}"
         if name.count("/") == 1 else "")
  raise Fault(f"{name}: no such folder, here, under weights/ or in Hugging Face's cache{get}")


def add_arguments(parser):
  parser.add_argument("--out", metavar="FILE", help="where boxes are drawn (default: IMAGE.boxes.png here)")


def check(args, images, prompt):
  """What can be wrong with a command line, before the slow part. Raises Fault."""
  absent = [name for name in images if not os.path.exists(name)]
  if absent and len(images) > 1:
    raise Fault(f"{absent[0]}: no such image; pictures come first, then a prompt, with quotes around several words")
  if prompt and " " not in prompt and Path(prompt).suffix.lower() in Image.registered_extensions():
    raise Fault(f"{prompt}: no such image")  # a mistyped name is no question
  if args.out is not None:
    from . import draw
    draw.check_output(args.out, images)


# ---- 3. The answer ----


class Drawing:
  """The boxes of an answer on its picture. folder, device: of the model, for the decoder of masks."""
  def __init__(self, picture, boxes, folder, device):
    self.picture, self.boxes, self.entries = picture, boxes, []
    self.masks, self.trouble = [None] * len(boxes), None
    if boxes:
      from . import draw
      try:
        masks = draw.Masks(folder, device)
        self.masks = [masks(box, *picture.size) for box in boxes]
      except Fault as e:
        self.trouble = e
      self.entries = [draw.entry(*pair) for pair in zip(boxes, self.masks)]

  def save(self, args, images):
    """Where args.out says, or beside the name of the first of images. Raises Fault."""
    if self.boxes:
      from . import draw
      out = args.out or f"{Path(images[0]).stem}.boxes.png"
      draw.save_picture(draw.draw_boxes(self.picture, self.boxes, self.masks), out, images)
      say(f"{len(self.boxes)} {'box' if len(self.boxes) == 1 else 'boxes'} drawn: {out}")
    elif args.out:
      say(f"no boxes in the answer: {args.out} not written")
    if self.trouble and self.trouble.code:
      raise self.trouble
    if self.trouble:
      say(str(self.trouble))


def loop(question, images, open_image):
  """Question after question, until an empty line or the end of the input -> exit code."""
  say("ask about the picture; :image FILE changes it; an empty line leaves")
  while True:
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline().strip()
    if not line:
      return 0
    try:
      if line.startswith(":image"):
        name = line.removeprefix(":image").strip()
        open_image(name)
        images = [name]
      else:
        question(images, line)
    except Fault as e:
      print(f"vlm: {e}", file=sys.stderr)
