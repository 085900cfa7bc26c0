"""An answer's boxes and masks drawn on the picture. Imports nothing of vlm: terminal.py draws with it, and
every program.

The 16 <seg> tokens of a `segment` answer are the codes of a small VQ-VAE, a grid of 4 x 4, row by row. Its
decoder draws them as a map of 64 x 64, above 0 inside of the object, which is stretched to the box. It comes
from a `vae-oid.npz`: big_vision's for Google's checkpoints (all of them share it), this project's own for the
toy (see codebook.py). Sizes are read from the file.
"""
import base64
import functools
import io
import itertools
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, PngImagePlugin
from tinygrad import Tensor, TinyJit

from tokenizer import SEG, Fault, regular

# Okabe's and Ito's, which everybody can tell apart, and a light and a dark one more.
COLORS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#ffffff", "#332288"]
CURVES = "#4363d8", "#e6194b"
SMALL, ENLARGED = 128, 256  # longer sides: a picture below the one is drawn as large as the other
NAME, GRID, SIDE = "vae-oid.npz", 4, 64         # file, codes and pixels a side
OURS = "vlm.py, boxes"                          # a text in the PNG files that save_picture writes
RANGE, BIG_VISION = "encoder_range", (-1, 1)    # an array of 2: what a mask's off and on are to the encoder; without it
EMBEDDING = "_vq_vae._embedding"                # the codebook (128, E)
UP = [f"decoder.{n}" for n in (4, 6, 8, 10)]    # transposed convolutions, each twice as large: 4 -> 64
DOWN = [f"encoder.{n}" for n in (0, 2, 4, 6)]   # convolutions, each half as large: 64 -> 4


# ---- 1. The picture ----


def draw_boxes(image, boxes, masks=None):
  """PIL image, boxes of tokenizer.Box, for each a mask (bool (H, W)) or None -> a copy with the boxes and
  their labels on it, of a tiny picture a larger one. What has a mask is drawn as that."""
  masks = [mask if mask is not None and mask.any() else None for mask in masks or [None] * len(boxes)]
  times = -(-ENLARGED // max(image.size)) if max(image.size) < SMALL else 1
  image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
  masks = [mask if mask is None else mask.repeat(times, 0).repeat(times, 1) for mask in masks]
  corners = [np.multiply(box.box, times).reshape(2, 2) for box in boxes]
  places = [(*corner.min(0).tolist(), *corner.max(0).tolist()) for corner in corners]  # x1, y1, x2, y2
  unit = max(2, min(image.size) // 150)
  rim = max(1, unit // 2)  # of black or white along a line, so that it shows where its colour does not
  colors = choose_colors(image, [box.label for box in boxes], places, masks)
  image = draw_masks(image, [(mask, color) for mask, color in zip(masks, colors) if mask is not None], unit)
  draw = ImageDraw.Draw(image)
  framed = [(place, color) for place, color, mask in zip(places, colors, masks) if mask is None]
  for (x1, y1, x2, y2), color in framed:
    draw.rectangle((x1 - rim, y1 - rim, x2 + rim, y2 + rim), outline=opposite(color), width=unit + 2 * rim)
  for place, color in framed:  # after all rims, so that lines stay whole where boxes overlap
    draw.rectangle(place, outline=color, width=unit)
  font = ImageFont.load_default(size=max(10, (6 if len(boxes) < 12 else 4) * unit))
  place_labels(draw, [box.label for box in boxes], places, colors, font, unit)
  return image


def opposite(color):
  """Black on a light colour, white on a dark one."""
  return "black" if np.dot(ImageColor.getrgb(color), (.299, .587, .114)) > 128 else "white"


def seen(rgb):
  """(.., 3) of 0 to 255 -> the same as it is seen: what red and green are together and what blue is, which
  nearly everybody sees (Vienot, Brettel and Mollon 1999, in linear light); and red against green, which one
  man in twelve does not, so that it counts little."""
  r, g, b = np.moveaxis(np.asarray(rgb, np.float32), -1, 0)
  both = (.2 * r ** 2.2 + .8 * g ** 2.2) ** (1 / 2.2)
  return np.stack([1.4 * both, .7 * b, .25 * (r - g)], -1)


def choose_colors(image, labels, places, masks):
  """-> a colour for each box, the same for the same label: far from the pixels that it is drawn on, and from
  the colours of other labels."""
  pixels, chosen = np.asarray(image), {}
  candidates = {color: seen(ImageColor.getrgb(color)) for color in COLORS}
  for label in dict.fromkeys(labels):
    own = [i for i, other in enumerate(labels) if other == label]
    ground = seen(np.concatenate([on_ground(pixels, places[i], masks[i]) for i in own]))
    used = [*chosen.values()]
    fewest = min(used.count(color) for color in COLORS)  # with more labels than colours they come again
    free = [color for color in COLORS if used.count(color) == fewest]
    def stands_out(color):
      far = np.linalg.norm(ground - candidates[color], axis=-1)
      apart = [np.linalg.norm(candidates[color] - candidates[other]) for other in used[-3:]]
      return min([np.quantile(far, .1), *apart]) if len(far) else 0
    chosen[label] = max(free, key=stands_out)
  return [chosen[label] for label in labels]


def on_ground(pixels, place, mask):
  """A sample (N, 3) of the pixels (H, W, 3) that a mask lies on, or the frame of a box and what is in it."""
  x1, y1, x2, y2 = (round(v) for v in place)
  H, W = pixels.shape[:2]
  if mask is not None:
    found = pixels[mask]
  else:
    across, down = np.linspace(x1, x2, 30).astype(int), np.linspace(y1, y2, 30).astype(int)
    near = max(2, min(H, W) // 100)
    rows = [(y, across) for y in (y1 - near, y1, y1 + near, y2 - near, y2, y2 + near)]
    columns = [(down, x) for x in (x1 - near, x1, x1 + near, x2 - near, x2, x2 + near)]
    inside = [(y, across) for y in down[2:-2:2]]
    lines = [pixels[np.clip(y, 0, H - 1), np.clip(x, 0, W - 1)] for y, x in rows + columns + inside]
    found = np.concatenate(lines)
  return found[::max(1, len(found) // 1000)]


def place_labels(draw, labels, places, colors, font, unit):
  """Each label where it covers least: other labels first of all, then other boxes, then its own. None is
  drawn that is wider than the picture."""
  width, height = draw.im.size
  taken = []
  for i, (label, (x1, y1, x2, y2)) in enumerate(zip(labels, places)):
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font, anchor="lt")
    w, h = right - left + 2 * unit, bottom - top + 2 * unit
    if not label or w > width or h > height:
      continue
    spots = [(x, y) for y in (y1 - h, y2 + 1, y1 + 1, y2 - h) for x in (x1, x2 - w, (x1 + x2 - w) / 2)]
    spots += [(x, y) for x in (x2 + 1, x1 - w) for y in (y1, y2 - h)]  # beside it
    spots = [(min(max(x, 0), width - w), min(max(y, 0), height - h)) for x, y in spots]
    def covers(spot):
      area = (*spot, spot[0] + w, spot[1] + h)
      others = sum(shared(area, place) for k, place in enumerate(places) if k != i)
      return 20 * sum(shared(area, other) for other in taken) + 2 * others + shared(area, places[i])
    x, y = min(spots, key=covers)  # of equals the first, which is above on the left
    taken.append((x, y, x + w, y + h))
    draw.rectangle((x, y, x + w - 1, y + h - 1), fill=colors[i], outline=opposite(colors[i]))
    draw.text((x + unit, y + unit), label, font=font, fill=opposite(colors[i]), anchor="lt")


def shared(a, b):
  """The area that two boxes share."""
  return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def curve(curves, width=720, height=420):
  """{name: [(step, loss)]} -> a picture of them, the losses on a logarithmic scale."""
  image = Image.new("RGB", (width, height), "white")
  draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
  left, right, top, bottom = 70, width - 20, 30, height - 50
  points = [(step, max(loss, 1e-6)) for rows in curves.values() for step, loss in rows]
  last, losses = max(step for step, _ in points), [loss for _, loss in points]
  low, high = np.log10(min(losses)) - .05, np.log10(max(losses)) + .05

  def at(step, loss):
    across, up = step / last, (np.log10(max(loss, 1e-6)) - low) / (high - low)
    return left + across * (right - left), bottom - up * (bottom - top)
  for tick in round_ticks(last):
    x = at(tick, 1)[0]
    draw.line((x, top, x, bottom), fill="#e0e0e0")
    draw.text((x, bottom + 5), f"{tick:g}", fill="black", font=font, anchor="mt")
  for exponent in range(-6, 3):
    for digit in (1, 2, 5):
      tick = digit * 10. ** exponent
      if low <= np.log10(tick) <= high:
        y = at(0, tick)[1]
        draw.line((left, y, right, y), fill="#e0e0e0")
        draw.text((left - 6, y), f"{tick:g}", fill="black", font=font, anchor="rm")
  draw.line((left, top, left, bottom, right, bottom), fill="black")
  draw.text(((left + right) / 2, height - 8), "step", fill="black", font=font, anchor="mb")
  draw.text((8, 8), "loss", fill="black", font=font, anchor="lt")
  for i, ((name, rows), color) in enumerate(zip(curves.items(), CURVES)):
    places = [at(*row) for row in rows]
    draw.line(places, fill=color, width=2)
    for x, y in places if len(places) < 60 else ():  # a single one would not show
      draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
    draw.text((right - 5, top + 5 + 18 * i), name, fill=color, font=font, anchor="rt")
  return image


def round_ticks(last):
  """Up to six round numbers from 0 to last."""
  size = next(digit * 10 ** n for n in range(9) for digit in (1, 2, 5) if last <= 5 * digit * 10 ** n)
  return range(0, last + 1, size)


def draw_masks(image, masks, unit):
  """PIL image, list of (bool (H, W), color), width of an outline -> a copy with the masks, through which it
  is seen."""
  pixels = np.array(image)  # (H, W, 3)
  for mask, color in masks:  # first all areas, then all outlines, which stay whole where masks overlap
    pixels[mask] = (pixels[mask] * .55 + np.array(ImageColor.getrgb(color)) * .45).astype(np.uint8)
  for mask, color in masks:
    pixels[mask & ~shrink(mask, unit + max(1, unit // 2))] = ImageColor.getrgb(opposite(color))
  for mask, color in masks:
    pixels[mask & ~shrink(mask, unit)] = ImageColor.getrgb(color)
  return Image.fromarray(pixels)


def shrink(mask, steps):
  """bool (H, W) without its border, `steps` pixels wide, which is at the picture's edge too."""
  for _ in range(2):  # along columns; then, as it comes out turned, along rows, which turns it back
    inside = np.cumsum(np.pad(mask, ((steps + 1, steps), (0, 0))), 0, dtype=np.int32)
    mask = (inside[2 * steps + 1:] - inside[:-2 * steps - 1] == 2 * steps + 1).T
  return mask


def check_output(path, inputs):
  """A picture is only written where it can be, and never over an input: known before the work, not after."""
  path = Path(path)
  if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:  # some are only read
    raise Fault(f"{path}: the name must end in a picture format that can be written, such as .png")
  try:
    os.stat(path)
  except FileNotFoundError:
    pass
  except OSError as e:  # a name too long, say
    raise Fault(f"{path}: {e.strerror}; choose another name") from None
  if any(Path(name).exists() and path.exists() and path.samefile(name) for name in inputs):
    raise Fault(f"{path} is the input picture; choose another name")
  if path.exists() and not path.is_file() or not os.access(path if path.exists() else path.parent, os.W_OK):
    raise Fault(f"{path}: cannot be written; choose another place")


def save_picture(image, path, inputs):
  """The whole picture or none: encoded first, written beside its place, then put there. Raises Fault."""
  check_output(path, inputs)
  name, path, data, info = path, Path(path).resolve(), io.BytesIO(), PngImagePlugin.PngInfo()  # a link stays one
  info.add_text("Software", OURS)
  kind, part = Image.registered_extensions()[path.suffix.lower()], None
  try:
    image.save(data, kind, **({"pnginfo": info} if kind == "PNG" else {}))
  except Exception as e:  # too large for the format, or of a mode that it does not know
    raise Fault(f"{name}: a {kind} of this picture cannot be written ({e}); take .png") from None
  try:
    number, part = tempfile.mkstemp(".part", dir=path.parent)
    with open(number, "wb") as file:
      file.write(data.getvalue())
    mode = path.stat().st_mode if path.exists() else 0o666 & ~umask()
    os.chmod(part, mode & 0o777)
    os.replace(part, path)
  except OSError as e:
    raise Fault(f"{name}: {e.strerror}", code=1) from None
  finally:
    if part and os.path.exists(part):
      os.unlink(part)


def umask():
  """What this process takes from the rights of new files; it can only be asked by setting it."""
  os.umask(mask := os.umask(0))
  return mask


def own_name(picture):
  """-> where the boxes of a picture go if nobody says: NAME.boxes.png here, with a number where a file of that name is
  none that save_picture wrote."""
  stem = os.fsencode(Path(picture).stem)[:200]  # a name has 255 bytes at most
  stem = os.fsdecode(stem if len(stem) < 200 else stem.decode(errors="ignore").encode())
  for number in itertools.count(1):
    path = Path(f"{stem}.boxes{'' if number == 1 else f'-{number}'}.png")
    if not os.path.lexists(path) or is_ours(path):
      return path


def is_ours(path):
  try:
    with Image.open(regular(path)) as image:
      return image.info.get("Software") == OURS
  except Exception:  # whatever Pillow stumbles over: no picture of ours
    return False


def entry(box, mask=None):
  """A box as JSON has it. The mask is a PNG in base64: pillow is there already, browsers and OpenCV read it
  too, and it takes a few hundred bytes, where COCO's run lengths need a package to read."""
  found = {"label": box.label, "box": [round(v, 1) for v in box.box]}
  if mask is not None:
    data = io.BytesIO()
    Image.fromarray(mask).save(data, "PNG", optimize=True)
    found["mask"] = base64.b64encode(data.getvalue()).decode()
  return found


# ---- 2. The file of the VQ-VAE ----


def block_shapes(name, width, inner):
  """Of a residual block: two 3x3 convolutions and one 1x1."""
  return {f"{name}.0.weight": (inner, width, 3, 3), f"{name}.0.bias": (inner,),
          f"{name}.2.weight": (inner, inner, 3, 3), f"{name}.2.bias": (inner,),
          f"{name}.4.weight": (width, inner, 1, 1), f"{name}.4.bias": (width,)}


def decoder_shapes(E, widths, inner):
  """{name: shape}. widths: channels of decoder.0, .4, .6, .8 and .10. inner: of the two residual blocks."""
  shapes = {EMBEDDING: (SEG, E), "decoder.0.weight": (widths[0], E, 1, 1), "decoder.0.bias": (widths[0],)}
  for n, width in zip((2, 3), inner):
    shapes |= block_shapes(f"decoder.{n}.net", widths[0], width)
  for name, before, after in zip(UP, widths, widths[1:]):
    shapes |= {f"{name}.weight": (before, after, 4, 4), f"{name}.bias": (after,)}  # (in, out, 4, 4)
  return shapes | {"decoder.12.weight": (1, widths[-1], 1, 1), "decoder.12.bias": (1,)}


def encoder_shapes(E, widths, inner):
  """widths: channels of encoder.0, .2, .4 and .6."""
  shapes = {}
  for name, before, after in zip(DOWN, (1, *widths), widths):
    shapes |= {f"{name}.weight": (after, before, 4, 4), f"{name}.bias": (after,)}
  for n, width in zip((8, 9), inner):
    shapes |= block_shapes(f"encoder.{n}.net", widths[-1], width)
  return shapes | {"encoder.10.weight": (E, widths[-1], 1, 1), "encoder.10.bias": (E,)}


def read(path, part="decoder"):
  """The arrays that `part`, decoder or encoder, needs, as float32. Raises Fault."""
  try:
    with np.load(regular(path)) as file:
      arrays = {name: file[name] for name in file.files if name == EMBEDDING or name.startswith(part)}
    size = lambda name, axis=0: arrays[f"{name}.weight"].shape[axis]
    inner = [size(f"{part}.{n}.net.0") for n in ((2, 3) if part == "decoder" else (8, 9))]
    E = arrays[EMBEDDING].shape[1]
    if part == "decoder":
      expected = decoder_shapes(E, [size("decoder.0"), *(size(name, 1) for name in UP)], inner)
    else:
      arrays.setdefault(RANGE, np.array(BIG_VISION, np.float32))
      expected = encoder_shapes(E, [size(name) for name in DOWN], inner) | {EMBEDDING: (SEG, E), RANGE: (2,)}
    arrays = {name: arrays[name].astype(np.float32, casting="same_kind") for name in expected}  # no others
    wrong = [name for name, shape in expected.items()
             if arrays[name].shape != shape or not np.isfinite(arrays[name]).all()]
    if not wrong:
      return arrays
    problem = f"{wrong[0]} has another shape, {arrays[wrong[0]].shape}, or is not all numbers"
  except FileNotFoundError:
    raise Fault(f"{path}: no such file") from None
  except KeyError as e:
    problem = f"{e} is missing"
  except (IndexError, TypeError, AttributeError):  # a shape too short, no numbers, or an npy file: no names
    problem = "its tensors have too few dimensions, no numbers, or no names"
  except Exception as e:  # numpy's reader raises whatever it stumbles over
    problem = f"not a complete npz file: {str(e)[:300]}"
  raise Fault(f"{path}: {problem}; this is not the VQ-VAE of PaliGemma's masks; get {NAME} again")


# ---- 3. Codes to pixels ----


def decode(w, x):
  """The decoder. w: {name: Tensor}, x: rows of the codebook (B, E, 4, 4) -> logits (B, 64, 64)."""
  conv = lambda x, name, pad=0: x.conv2d(w[f"{name}.weight"], w[f"{name}.bias"], padding=pad)
  # contiguous: what is fused into a convolution is computed many times
  x = conv(x, "decoder.0").relu().contiguous()
  for n in (2, 3):
    x = residual(w, x, f"decoder.{n}.net")
  for name in UP:  # (B, c, s, s) -> (B, c', 2 s, 2 s)
    x = x.conv_transpose2d(w[f"{name}.weight"], w[f"{name}.bias"], stride=2, padding=1).relu().contiguous()
  return conv(x, "decoder.12").squeeze(1)


def residual(w, x, name):
  h = x.conv2d(w[f"{name}.0.weight"], w[f"{name}.0.bias"], padding=1).relu().contiguous()
  h = h.conv2d(w[f"{name}.2.weight"], w[f"{name}.2.bias"], padding=1).relu().contiguous()
  return (x + h.conv2d(w[f"{name}.4.weight"], w[f"{name}.4.bias"])).contiguous()


def paste(logits, box, width, height):
  """Logits (64, 64) -> bool (height, width) of the picture: stretched to the box, and true above 0."""
  x1, y1, x2, y2 = (int(v) for v in box)
  mask = np.zeros((height, width), bool)
  if x2 > x1 and y2 > y1:  # else the box has no pixels, and neither has its mask
    image = Image.fromarray(np.asarray(logits, np.float32))
    mask[y1:y2, x1:x2] = np.asarray(image.resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)) > 0
  return mask


class Missing(Fault):
  """There is no vae-oid.npz: the user's choice, not an error, so its code is 0."""


class Masks:
  """Draws the masks of boxes. Its file is looked for when the first is wanted, in the model's folder and
  beside it. device: a full name of tinygrad's; of several the first is enough."""
  def __init__(self, folder, device):
    folder = Path(folder).resolve()
    root = Path(__file__).resolve().parents[1]
    self.places = [folder / NAME, folder.parent / NAME, root / "weights" / NAME]
    self.device = device[0] if isinstance(device, tuple) else device
    self.weights = self.program = None

  def __call__(self, box, width, height):
    """tokenizer.Box -> bool (height, width) of its picture, True on the object; None for a box without codes.
    Raises Fault: Missing if there is no file, another if it is not one."""
    return paste(self.logits(box.codes), box.box, width, height) if box.codes else None

  def logits(self, codes):
    """16 codes -> np.float32 (64, 64)."""
    if self.program is None:
      self.load()
    rows = self.weights[EMBEDDING][list(codes)]  # (16, E)
    x = np.ascontiguousarray(rows.T.reshape(1, -1, GRID, GRID))
    return self.program(Tensor(x, device=self.device).realize()).numpy()[0]

  @property
  def path(self):
    """The file, None if there is none."""
    return next((place for place in self.places if place.exists()), None)

  def load(self):
    if self.path is None:
      where = " or ".join(dict.fromkeys(str(place.parent) for place in self.places))
      raise Missing(f"no {NAME} in {where}, so masks stay tokens; it is the "
                    f"decoder that big_vision publishes with PaliGemma (gs://big_vision/paligemma/{NAME})",
                    code=0)
    self.weights = read(self.path)
    tensors = {name: Tensor(array, device=self.device).realize() for name, array in self.weights.items()}
    self.program = TinyJit(functools.partial(lambda w, x: decode(w, x).contiguous(), tensors))
    self.program.cnt = 1  # capture on the first call
