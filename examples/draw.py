"""Boxes drawn on a picture, and the picture saved: what `python vlm.py` does with the answer to a detect prompt.

    python examples/draw.py IMAGE ANSWER OUT      the same for an answer that is there already
"""
import io
import os
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.append(str(Path(__file__).resolve().parents[1]))
import vlm

COLORS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075"]

def draw_boxes(image, boxes):
  """PIL image -> a copy with the boxes and their labels on it."""
  image, labels = image.copy(), sorted({box.label for box in boxes})
  draw, unit = ImageDraw.Draw(image), max(2, min(image.size) // 150)
  font = ImageFont.load_default(size=max(10, 6 * unit))
  for box in boxes:
    color = COLORS[labels.index(box.label) % len(COLORS)]
    x1, x2 = sorted(box.box[::2])
    y1, y2 = sorted(box.box[1::2])
    draw.rectangle((x1, y1, x2, y2), outline=color, width=unit)
    left, top, right, bottom = draw.textbbox((x1, y1), box.label, font=font, anchor="lb" if y1 > 8 * unit else "lt")
    draw.rectangle((left - unit, top - unit, right + unit, bottom + unit), fill=color)
    draw.text((left, top), box.label, font=font, fill="white", anchor="lt")
  return image

def check_output(path, inputs):
  """A picture is only written where it can be, and never over an input: known before the work, not after."""
  path = Path(path)
  if path.suffix.lower() not in Image.registered_extensions():
    raise vlm.Fault(f"--out {path}: the name must end in a picture format, such as .png")
  if any(Path(name).exists() and path.exists() and path.samefile(name) for name in inputs):
    raise vlm.Fault(f"--out {path} is the input picture; choose another name")
  if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
    raise vlm.Fault(f"--out {path}: cannot be written; choose another place")

def save_picture(image, path, inputs):
  """The whole picture or none: encoded first, then written. Raises Fault."""
  check_output(path, inputs)
  data = io.BytesIO()
  image.save(data, Image.registered_extensions()[Path(path).suffix.lower()])
  try:
    Path(path).write_bytes(data.getvalue())
  except OSError as e:
    raise vlm.Fault(f"{path}: {e.strerror}", code=1) from None

if __name__ == "__main__":
  try:
    source, answer, out = sys.argv[1:]
    picture = vlm.open_image(source)
    save_picture(draw_boxes(picture, vlm.parse_boxes(answer, *picture.size)), out, [source])
  except ValueError:
    sys.exit("usage: python examples/draw.py IMAGE ANSWER OUT")
  except vlm.Fault as e:
    sys.exit(f"draw: {e}")
