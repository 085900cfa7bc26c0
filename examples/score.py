"""How good a model's answers are to questions whose answers are known, for train.py: exact match, and where
answers have boxes the mean IoU and the share of boxes found."""
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import shapes
import vlm
from tokenizer import parse_boxes

draw = vlm.beside("draw")
WORST = 10
HIT = 0.5  # IoU from which on a box is right
# overlaps: an IoU for each true box
Result = namedtuple("Result", "image prefix truth answer exact overlaps boxes")


def ask(model, examples, max_tokens):
  """[(picture, prefix, suffix)] -> Results, one after another."""
  for image, prefix, truth in examples:
    picture = vlm.open_image(image)
    [answer] = model.generate([picture], [prefix], max_tokens=max_tokens)
    yield result(picture, image, prefix, truth, answer)


def result(picture, image, prefix, truth, answer):
  true = [(box.label, box.box) for box in parse_boxes(truth, *picture.size)]
  found = [(box.label, box.box) for box in answer.boxes]
  overlaps = shapes.match(true, found)
  overlaps += [0.0] * (len(true) - len(overlaps))  # what was not found
  exact = answer.text.strip() == truth.strip()
  return Result(image, prefix, truth, answer.text, exact, overlaps, answer.boxes)


def summary(results):
  """-> the numbers of Results in words."""
  text = f"exact {np.mean([r.exact for r in results]):.3f} of {len(results)}"
  overlaps = [o for r in results for o in r.overlaps]
  if overlaps:
    right = np.mean([o >= HIT for o in overlaps])
    text += f", boxes right {right:.3f} of {len(overlaps)}, mean IoU {np.mean(overlaps):.3f}"
  return text


def goodness(r):
  """The worse the answer, the smaller."""
  return r.exact, float(np.mean(r.overlaps)) if r.overlaps else 0.0


def worst(results):
  """The ten worst answers as one picture: each with its boxes, the question, the truth and the answer."""
  rows = sorted(results, key=goodness)[:WORST]
  side, gap, width = 180, 10, 900
  page = Image.new("RGB", (width, gap + len(rows) * (side + gap)), "white")
  pen = ImageDraw.Draw(page)
  for i, r in enumerate(rows):
    picture = draw.draw_boxes(vlm.open_image(r.image), r.boxes)
    picture.thumbnail((side, side))
    top = gap + i * (side + gap)
    page.paste(picture, (gap, top))
    lines = [("black", f"{Path(str(r.image)).name}: {r.prefix}"), ("#2a7a2a", f"right: {r.truth}"),
             ("#a02020" if not r.exact else "black", f"model: {r.answer}")]
    y = top
    for color, line in lines:
      for part in wrapped(pen, line, width - side - 3 * gap)[:4]:
        pen.text((side + 2 * gap, y), part, fill=color, font_size=14)
        y += 18
      y += 6
  return page


def wrapped(pen, line, width):
  """A text in lines of at most so many pixels."""
  lines, rest = [], line.replace("\n", " ")
  while rest:
    n = len(rest)
    while n > 1 and pen.textlength(rest[:n], font_size=14) > width:
      n -= 1
    lines.append(rest[:n])
    rest = rest[n:]
  return lines
