"""Masks of `segment` answers: 16 <seg> tokens are the codes of a small VQ-VAE, whose decoder draws them as a 64 x 64
map, which is stretched to the box. The decoder comes from a `vae-oid.npz`: big_vision's for Google's checkpoints (all
of them share it), this project's own for the toy. Sizes are read from the file.

    python examples/masks.py --train vae-oid.npz [--steps 1300]   make the toy's codebook, encoder and decoder
    python examples/masks.py --eval weights/toy/vae-oid.npz       how well the codes keep masks that it has never seen

The codes are a grid of 4 x 4, row by row. Logits are above 0 inside of the object.
"""
import argparse
import base64
import functools
import io
import os
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from tinygrad import Tensor, TinyJit, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
import vlm
from tokenizer import SEG
from vlm import Fault

NAME, GRID, SIDE = "vae-oid.npz", 4, 64  # file, codes and pixels a side
EMBEDDING = "_vq_vae._embedding"         # the codebook (128, E)
UP = [f"decoder.{n}" for n in (4, 6, 8, 10)]    # transposed convolutions, each twice as large: 4 -> 64
DOWN = [f"encoder.{n}" for n in (0, 2, 4, 6)]   # convolutions, each half as large: 64 -> 4


# ---- 1. The file ----


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
    shapes |= {f"{name}.weight": (before, after, 4, 4), f"{name}.bias": (after,)}  # transposed: (in, out, 4, 4)
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
    with np.load(path) as file:
      arrays = {name: file[name] for name in file.files if name == EMBEDDING or name.startswith(part)}
    size = lambda name, axis=0: arrays[f"{name}.weight"].shape[axis]
    inner = [size(f"{part}.{n}.net.0") for n in ((2, 3) if part == "decoder" else (8, 9))]
    E = arrays[EMBEDDING].shape[1]
    if part == "decoder":
      expected = decoder_shapes(E, [size("decoder.0"), *(size(name, 1) for name in UP)], inner)
    else:
      expected = encoder_shapes(E, [size(name) for name in DOWN], inner) | {EMBEDDING: (SEG, E)}
    arrays = {name: array for name, array in arrays.items() if name in expected}  # big_vision passes over others too
    vlm.check_names(expected, {name: array.shape for name, array in arrays.items()})
    if wrong := [name for name, array in arrays.items() if array.dtype.kind != "f" or not np.isfinite(array).all()]:
      raise Fault(f"{wrong[0]} is not all numbers")
    return {name: array.astype(np.float32) for name, array in arrays.items()}
  except FileNotFoundError:
    raise
  except KeyError as e:
    problem = f"{e} is missing"
  except (IndexError, TypeError, AttributeError):  # a shape too short; an npy file, which has no names
    problem = "its tensors have too few dimensions, or no names"
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError, NotImplementedError) as e:
    problem = f"not a complete npz file: {e}"
  except Fault as e:
    problem = str(e).replace("the weights do not fit config.json; ", "")
  raise Fault(f"{path}: {problem}; this is not the VQ-VAE of PaliGemma's masks; get {NAME} again")


# ---- 2. Codes to pixels ----


def decode(w, x):
  """The decoder. w: {name: Tensor}, x: rows of the codebook (B, E, 4, 4) -> logits (B, 64, 64)."""
  conv = lambda x, name, pad=0: x.conv2d(w[f"{name}.weight"], w[f"{name}.bias"], padding=pad)
  x = conv(x, "decoder.0").relu().contiguous()  # contiguous: what is fused into a convolution is computed many times
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
  """Logits (64, 64) -> bool (height, width) of the picture: stretched to the box, in pixels, and true above 0."""
  x1, y1, x2, y2 = (int(v) for v in box)
  mask = np.zeros((height, width), bool)
  if x2 > x1 and y2 > y1:  # a mask has as many pixels as its box, so it is of no size or of a turned-over box empty
    image = Image.fromarray(np.asarray(logits, np.float32)).resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)
    mask[y1:y2, x1:x2] = np.asarray(image) > 0
  return mask


class Masks:
  """What tokenizer.parse_boxes gives its boxes to draw themselves with. The file is looked for when the first mask is
  wanted: in the model's folder, then in weights/."""

  def __init__(self, folder=None, device=None):
    self.places = [Path(folder) / NAME] if folder else []
    self.places.append(ROOT / "weights" / NAME)
    self.device = device[0] if isinstance(device, tuple) else device  # of several the first is enough
    self.weights = self.program = None

  def __call__(self, codes, box, width, height):
    return paste(self.logits(codes), box, width, height)

  def logits(self, codes):
    """16 codes -> np.float32 (64, 64). Raises Fault: Missing if there is no file, another if it is not one."""
    if self.program is None:
      self.load()
    rows = self.weights[EMBEDDING][list(codes)]  # (16, E)
    x = np.ascontiguousarray(rows.T.reshape(1, -1, GRID, GRID))
    return self.program(vlm.upload(x, self.device)).numpy()[0]

  @property
  def path(self):
    """The file, None if there is none."""
    return next((place for place in self.places if place.exists()), None)

  def load(self):
    if self.path is None:
      raise Missing(f"no {NAME} in {' or '.join(str(place.parent) for place in self.places)}, so masks stay tokens; it "
                    f"is the decoder that big_vision publishes with PaliGemma (gs://big_vision/paligemma/{NAME})")
    self.weights, self.device = read(self.path), vlm.compiled.open_device(self.device)
    tensors = {name: vlm.upload(array, self.device) for name, array in self.weights.items()}
    self.program = TinyJit(functools.partial(lambda w, x: decode(w, x).contiguous(), tensors))
    self.program.cnt = 1  # capture on the first call


def keep(source, folder):
  """A checkpoint's file goes where the checkpoint goes."""
  import train
  if (source / NAME).exists():
    train.write_file(folder / NAME, [(source / NAME).read_bytes()])


class Missing(Fault):
  """There is no vae-oid.npz: the user's choice, not an error."""


def drawable(boxes):
  """-> the boxes, without codes where their masks cannot be had, and the Fault that says why, or None."""
  try:
    for box in boxes:
      box.mask  # drawn once, then kept
    return boxes, None
  except Fault as e:
    return [type(box)(box.label, box.box) for box in boxes], e


def report(trouble, args):
  """What the command line does about the second thing that `drawable` gives."""
  if isinstance(trouble, Missing):
    vlm.say(args, str(trouble))
  elif trouble:
    raise trouble


def entry(box):
  """A box as --json has it. The mask is a PNG in base64: pillow is there already, browsers and OpenCV read it too, and
  it takes a few hundred bytes, where COCO's run lengths need a package to read."""
  found = {"label": box.label, "box": [round(v, 1) for v in box.box]}
  if box.mask is not None:
    data = io.BytesIO()
    Image.fromarray(box.mask).save(data, "PNG", optimize=True)
    found["mask"] = base64.b64encode(data.getvalue()).decode()
  return found


# ---- 3. Pixels to codes: for training ----


def crop(coverage, box):
  """A picture "L" of an object and its box in pixels -> float32 (64, 64) in 0..1, what the encoder sees."""
  image = coverage.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)
  return np.asarray(image, np.float32) / 255


@functools.cache
def encoder(path):
  return read(path, "encoder")


def tokens(path, coverage, box):
  """-> "<seg000>..." of an object, by the codebook and encoder in the file."""
  return "".join(f"<seg{code:03d}>" for code in encode(encoder(path), crop(coverage, box)))


def encode(w, image):
  """float32 (64, 64) -> 16 codes, in numpy: questions are made on another thread than tinygrad computes on."""
  def conv(x, name, stride=1, pad=0):  # x (c, s, s)
    weight = w[f"{name}.weight"]
    x = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (pad, pad), (pad, pad))), weight.shape[2:], (1, 2))
    x = x[:, ::stride, ::stride]  # (c, s', s', k, k)
    return np.tensordot(weight, x, ((1, 2, 3), (0, 3, 4))) + w[f"{name}.bias"][:, None, None]
  x = image[None]
  for name in DOWN:
    x = conv(x, name, 2, 1).clip(0)
  for n in (8, 9):
    h = conv(x, f"encoder.{n}.net.0", 1, 1).clip(0)
    x = x + conv(conv(h, f"encoder.{n}.net.2", 1, 1).clip(0), f"encoder.{n}.net.4")
  z = conv(x, "encoder.10").reshape(len(w[EMBEDDING][0]), -1).T  # (16, E)
  return np.square(z[:, None] - w[EMBEDDING]).sum(2).argmin(1).tolist()


# ---- 4. Training the toy's file ----

E, UPWARD, DOWNWARD = 8, (32, 32, 16, 8, 8), (8, 16, 16, 24)  # fewer channels than big_vision's


def examples(seed, i, count):
  """Masks of random shapes of the toy world -> float32 (count, 64, 64)."""
  import shapes
  rng, out = np.random.default_rng((seed, i, 3)), []
  for _ in range(count):
    obj = shapes.place(rng, "red", str(rng.choice(list(shapes.CORNERS))), *rng.integers(100, 300, 2).tolist(), .25, .9)
    out.append(crop(obj.coverage, obj.box))
  return np.stack(out)


def start_weights(seed=0):
  """{name: array}, random, such that each layer keeps the variance."""
  rng, arrays = np.random.default_rng(seed), {}
  shapes = decoder_shapes(E, UPWARD, UPWARD[:1] * 2) | encoder_shapes(E, DOWNWARD, DOWNWARD[-1:] * 2)
  for name, shape in shapes.items():
    fan = shape[0] * 4 if name.removesuffix(".weight") in UP else np.prod(shape[1:])
    scale = (2 / fan) ** .5 * (.3 if name.endswith("net.4.weight") else 1)  # .3: a block starts as nearly nothing
    arrays[name] = (rng.standard_normal(shape) * scale if shape[1:] else np.zeros(shape)).astype(np.float32)
  return arrays


def clusters(points, count, seed=0, rounds=20):
  """k-means: points (N, E) -> (count, E)."""
  rng = np.random.default_rng(seed)
  centers = points[rng.choice(len(points), count, replace=False)]
  for _ in range(rounds):
    nearest = nearest_rows(points, centers)
    for n in range(count):
      mine = points[nearest == n]
      centers[n] = mine.mean(0) if len(mine) else points[rng.integers(len(points))]
  return centers


def nearest_rows(points, rows):
  return (np.square(rows).sum(1) - 2 * points @ rows.T).argmin(1)


def train(path, steps, count):
  """A third of the steps without codes, then those are the clusters of what the encoder says, and learn with it. count:
  masks a step. Raises Fault."""
  import shapes
  import train as training
  path = Path(path)
  if steps < 1 or count < 1:
    raise Fault("--steps and --batch: at least 1")
  if path.exists() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
    raise Fault(f"{path} {'is there already' if path.exists() else 'cannot be written'}; choose another name")
  device = vlm.compiled.open_device()
  w = {name: vlm.upload(array, device).is_param_(True) for name, array in start_weights().items()}
  weights = list(w.values())
  optimizer = nn.optim.AdamW(weights, lr=0.0, b2=.99, weight_decay=0.0)

  def encoded(x):
    for name in DOWN:
      x = x.conv2d(w[f"{name}.weight"], w[f"{name}.bias"], stride=2, padding=1).relu().contiguous()
    for n in (8, 9):
      x = residual(w, x, f"encoder.{n}.net")
    return x.conv2d(w["encoder.10.weight"], w["encoder.10.bias"]).contiguous()  # (B, E, 4, 4)

  def update(masks, quantised):
    z, book, quantised = encoded(masks.unsqueeze(1)), w[EMBEDDING], quantised.reshape(())
    flat = z.permute(0, 2, 3, 1).reshape(-1, E)
    near = (book.square().sum(1) - 2 * flat.matmul(book.transpose())).detach()
    chosen = (near == near.min(1, keepdim=True)).float().contiguous().matmul(book)  # (B * 16, E)
    apart = (chosen - flat.detach()).square().mean() + .25 * (chosen.detach() - flat).square().mean()
    code = chosen.detach().reshape(-1, GRID, GRID, E).permute(0, 3, 1, 2)
    # The decoder sees the code, its gradient goes past it to the encoder: rounding has none of its own.
    logits = decode(w, (z + ((code - z).detach() * quantised)).contiguous())
    value = (logits.relu() - logits * masks + (1 + (-logits.abs()).exp()).log()).mean()  # cross-entropy
    for t, g in zip(weights, (value + apart * quantised).gradient(*weights)):
      t.grad = g
    return value.realize(flat, *optimizer.schedule_step()), flat

  step, batch = TinyJit(update), lambda i: vlm.upload(examples(shapes.TRAIN_SEED, i, count), device)
  start, recent = steps // 3, []
  with Tensor.train():
    for i in range(steps):
      rate = 3e-3 * min((i + 1) / 50, .5 + .5 * np.cos(np.pi * i / steps))
      optimizer.lr.assign(Tensor([float(rate)], device=device)).realize()
      value, flat = step(batch(i), vlm.upload(np.full(1, i >= start, np.float32), device))
      recent = recent[-31:] + [flat.numpy()]
      points, book = np.concatenate(recent), w[EMBEDDING]
      if i == start - 1:
        book.assign(Tensor(clusters(points, SEG), device=device)).realize()
      if start <= i < steps * 3 // 4 and i % 50 == 49:  # codes that nothing is near start again where something is
        rows = book.numpy().copy()
        idle = np.bincount(nearest_rows(points, rows), minlength=SEG) == 0
        rows[idle] = np.random.default_rng(i).choice(points, idle.sum())
        book.assign(Tensor(rows, device=device)).realize()
      vlm.status(f"step {i + 1}/{steps}, loss {value.item():.4f}")
      if i % 250 == 249:
        print(f"step {i + 1}: cross-entropy {value.item():.4f}", flush=True)
  vlm.status("")
  data = io.BytesIO()
  np.savez(data, **{name: t.numpy() for name, t in w.items()})
  try:
    training.write_file(path, [data.getvalue()])
  except OSError as e:
    raise Fault(f"{path}: {e.strerror}", code=1) from None


def evaluate(path):
  """Print what becomes of masks of unseen shapes that are encoded and decoded."""
  import shapes
  w, decoder, results, used = read(path, "encoder"), Masks(), [], set()
  decoder.places = [Path(path)]
  for image in examples(shapes.TEST_SEED, 0, 200):
    codes, truth = encode(w, image), image > .5
    used |= set(codes)
    found = decoder.logits(codes) > 0
    results.append((truth & found).sum() / (truth | found).sum())
  print(f"200 masks: mean IoU {np.mean(results):.3f}, worst {min(results):.3f}, {len(used)} of {SEG} codes used")


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  action = parser.add_mutually_exclusive_group(required=True)
  action.add_argument("--train", metavar="FILE", help="make a codebook, an encoder and a decoder for the toy world")
  action.add_argument("--eval", metavar="FILE", help="encode and decode 200 masks of unseen shapes")
  parser.add_argument("--steps", type=int, default=1300, help="of --train (default %(default)s)")
  parser.add_argument("--batch", type=int, default=32, help="masks a step (default %(default)s)")
  args = parser.parse_args()
  try:
    if args.train:
      train(args.train, args.steps, args.batch)
    evaluate(args.train or args.eval)
  except FileNotFoundError as e:
    sys.exit(f"masks: {e.filename}: no such file")
  except Fault as e:
    sys.exit(f"masks: {e}")


if __name__ == "__main__":
  main()
