"""Boxes and masks drawn on a picture, and the picture saved: what `python vlm.py` does with the answer to a detect or
segment prompt.

    python examples/draw.py IMAGE ANSWER OUT [DIR]      the same for an answer that is there already

Masks are drawn with the vae-oid.npz of the checkpoint DIR, or else with that of weights/.
"""
import io
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

sys.path.append(str(Path(__file__).resolve().parents[1]))
import vlm

COLORS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075"]

def draw_boxes(image, boxes):
  """PIL image -> a copy with the boxes and their labels on it. A box with a mask is drawn as that."""
  labels, unit = sorted({box.label for box in boxes}), max(2, min(image.size) // 150)
  colors = [COLORS[labels.index(box.label) % len(COLORS)] for box in boxes]
  shown = [box.mask is not None and box.mask.any() for box in boxes]
  image = draw_masks(image, [(box.mask, color) for box, color, mask in zip(boxes, colors, shown) if mask], unit)
  draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=max(10, 6 * unit))
  for box, color, mask in zip(boxes, colors, shown):
    x1, x2 = sorted(box.box[::2])
    y1, y2 = sorted(box.box[1::2])
    if not mask:
      draw.rectangle((x1, y1, x2, y2), outline=color, width=unit)
    left, top, right, bottom = draw.textbbox((x1, y1), box.label, font=font, anchor="lb" if y1 > 8 * unit else "lt")
    draw.rectangle((left - unit, top - unit, right + unit, bottom + unit), fill=color)
    draw.text((left, top), box.label, font=font, fill="white", anchor="lt")
  return image

def draw_masks(image, masks, unit):
  """PIL image, list of (bool (H, W), color), width of an outline -> a copy with the masks, through which it is seen."""
  pixels = np.array(image)  # (H, W, 3)
  for mask, color in masks:  # first all areas, then all outlines, which stay whole where masks overlap
    pixels[mask] = (pixels[mask] * .55 + np.array(ImageColor.getrgb(color)) * .45).astype(np.uint8)
  for mask, color in masks:
    pixels[mask & ~shrink(mask, unit)] = ImageColor.getrgb(color)
  return Image.fromarray(pixels)

def shrink(mask, steps):
  """bool (H, W) without its border, `steps` pixels wide. What touches the picture's edge has a border there too."""
  for _ in range(2):  # along columns; then, as it comes out turned, along rows, which turns it back
    inside = np.cumsum(np.pad(mask, ((steps + 1, steps), (0, 0))), 0, dtype=np.int32)
    mask = (inside[2 * steps + 1:] - inside[:-2 * steps - 1] == 2 * steps + 1).T
  return mask

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
    source, answer, out, folder = [*sys.argv[1:], None] if len(sys.argv) == 4 else sys.argv[1:]
    picture = vlm.open_image(source)
    boxes = vlm.parse_boxes(answer, *picture.size, vlm.masks.Masks(folder))
    boxes, trouble = vlm.masks.drawable(boxes)
    save_picture(draw_boxes(picture, boxes), out, [source])
    if isinstance(trouble, vlm.masks.Missing):
      print(f"draw: {trouble}", file=sys.stderr)
    elif trouble:
      raise trouble
  except ValueError:
    sys.exit("usage: python examples/draw.py IMAGE ANSWER OUT [DIR]")
  except vlm.Fault as e:
    sys.exit(f"draw: {e}")
