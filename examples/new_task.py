"""A task that the toy does not know, for train.py to teach it: "answer en is there a red star?", and colours in
Spanish. A data folder of pictures with two such questions each and, so that nothing is forgotten, six of those that
the toy does know.

    python examples/new_task.py lessons --count 1500            # to learn from
    python examples/new_task.py exam --count 200 --known 0      # other pictures, the new task alone
"""
import argparse
import functools
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import vlm  # first, because it says what is not installed
import numpy as np
import codebook
import shapes

SPANISH = {"red": "rojo", "green": "verde", "blue": "azul", "yellow": "amarillo", "purple": "morado",
           "orange": "naranja"}
MASKS = Path(vlm.__file__).resolve().parent / "weights" / "toy" / vlm.beside("draw").NAME
ASKED = 2  # new questions about a picture


def questions(scene, rng):
  """All new (prefix, suffix) about a scene. Half of what is not there has a colour or a shape of what is."""
  there = [obj.name for obj in scene.objects]
  absent = [name for name in shapes.NAMES if name not in there]
  words = {word for name in there for word in name.split()}
  near = [name for name in absent if words & set(name.split())]
  asked = [(f"answer en is there a {rng.choice(there)}?", "yes"),
           (f"answer en is there a {rng.choice(near if rng.random() < .5 else absent)}?", "no")]
  return asked + [(f"answer es what color is the {obj.shape}?", SPANISH[obj.color]) for obj in shapes.singles(scene)]


def make(folder, count, known):
  """known: old questions about a picture. Without them the pictures are others: those of an exam."""
  seed, codes = 91 if known else 92, functools.partial(codebook.tokens, MASKS)
  folder.mkdir(parents=True, exist_ok=True)
  if os.listdir(folder):
    raise vlm.Fault(f"{folder} is not empty; choose another folder")
  lines = []
  for i in range(count):
    scene, rng, name = shapes.scene(seed, i), np.random.default_rng((seed, i, 7)), f"{i:06d}.png"
    scene.image.save(folder / name)
    new = questions(scene, rng)
    asked = [new[k] for k in rng.permutation(len(new))[:ASKED]]
    if known:
      old = shapes.tasks(scene, rng) + [shapes.segment(scene, obj.name, codes) for obj in scene.objects]
      caption, *old = [(prefix, suffix) for prefix, suffix in old if suffix]  # train.py takes no empty answers
      asked += [caption] + [old[k] for k in rng.permutation(len(old))[:known - 1]]  # or one of twenty were captions
    lines += [json.dumps({"image": name, "prefix": prefix, "suffix": suffix}) for prefix, suffix in asked]
  (folder / "data.jsonl").write_text("\n".join(lines) + "\n")


@vlm.program
def main(argv):
  p = vlm.terminal.ArgumentParser(prog="new_task.py", allow_abbrev=False, description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("folder", metavar="DIR", type=Path, help="a new one")
  p.add_argument("--count", type=int, default=1500, metavar="N", help="pictures")
  p.add_argument("--known", type=int, default=6, metavar="K", help="old questions about each of them, at most")
  args = p.parse_args(argv)
  if args.count < 1 or args.known < 0:
    raise vlm.Fault("--count: at least 1; --known: at least 0")
  try:
    make(args.folder, args.count, args.known)
  except OSError as e:
    raise vlm.Fault(f"{args.folder}: {e.strerror}; choose another folder", code=1) from None


if __name__ == "__main__":
  sys.exit(main())
