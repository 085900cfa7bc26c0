"""Masks as tokens, and training of what makes them so: a small VQ-VAE (arxiv.org/abs/1711.00937) for the toy.

    python examples/codebook.py --train weights/toy-2/vae-oid.npz   # a codebook, an encoder and a decoder
    python examples/codebook.py --eval weights/toy/vae-oid.npz      # what becomes of masks it has never seen

Its encoder makes a mask of 64 x 64 into a grid of 4 x 4 vectors, each of which becomes the nearest row of the
codebook; the number of that row is a <seg> token. draw.py has the decoder and reads the file.
"""
import functools
import io
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import vlm  # first, because it says what is not installed
import numpy as np
from PIL import Image
from tinygrad import Tensor
import checkpoint
import shapes
from tokenizer import SEG

draw = vlm.beside("draw")
# Fewer than big_vision's: numbers in a row of the codebook; channels of decoder.0 and of draw.UP, and of
# draw.DOWN.
WIDTH, DECODER, ENCODER = 8, (32, 32, 16, 8, 8), (8, 16, 16, 24)


# ---- 1. Pixels to codes ----


def crop(coverage, box):
  """A picture "L" of an object and its box in pixels -> float32 (64, 64) in 0..1, what the encoder sees."""
  image = coverage.resize((draw.SIDE, draw.SIDE), Image.Resampling.BILINEAR, box=box)
  return np.asarray(image, np.float32) / 255


@functools.cache
def encoder(path):
  return draw.read(path, "encoder")


def tokens(path, coverage, box):
  """-> "<seg000>..." of an object, by the codebook and encoder in the file."""
  return "".join(f"<seg{code:03d}>" for code in encode(encoder(path), crop(coverage, box)))


def encode(w, image):
  """float32 (64, 64) -> 16 codes, in numpy: questions are made on another thread than tinygrad computes
  on."""
  def conv(x, name, stride=1, pad=0):  # x (c, s, s)
    weight = w[f"{name}.weight"]
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    x = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (1, 2))[:, ::stride, ::stride]
    # (c, s', s', k, k) with (c', c, k, k) -> (c', s', s')
    return np.tensordot(weight, x, ((1, 2, 3), (0, 3, 4))) + w[f"{name}.bias"][:, None, None]
  off, on = w[draw.RANGE]
  x = image[None] * (on - off) + off
  for name in draw.DOWN:
    x = conv(x, name, 2, 1).clip(0)
  for n in (8, 9):
    h = conv(x, f"encoder.{n}.net.0", 1, 1).clip(0)
    x = x + conv(conv(h, f"encoder.{n}.net.2", 1, 1).clip(0), f"encoder.{n}.net.4")
  book = w[draw.EMBEDDING]
  z = conv(x, "encoder.10").reshape(len(book[0]), -1).T  # (16, E)
  return np.square(z[:, None] - book).sum(2).argmin(1).tolist()


# ---- 2. Training ----


def examples(seed, i, count):
  """Masks of random shapes of the toy world -> float32 (count, 64, 64)."""
  rng, out = np.random.default_rng((seed, i, 3)), []
  for _ in range(count):
    shape, size = str(rng.choice(list(shapes.CORNERS))), rng.integers(100, 300, 2).tolist()
    obj = shapes.place(rng, "red", shape, *size, .25, .9)
    out.append(crop(obj.coverage, obj.box))
  return np.stack(out)


def start_weights(seed=0):
  """{name: array}, random, such that each layer keeps the variance."""
  rng, arrays = np.random.default_rng(seed), {}
  decoder = draw.decoder_shapes(WIDTH, DECODER, DECODER[:1] * 2)
  for name, shape in (decoder | draw.encoder_shapes(WIDTH, ENCODER, ENCODER[-1:] * 2)).items():
    inputs = shape[0] * 4 if name.removesuffix(".weight") in draw.UP else np.prod(shape[1:])
    scale = (2 / inputs) ** .5
    scale *= .3 if name.endswith("net.4.weight") else 1  # a block starts as nearly nothing
    arrays[name] = (rng.standard_normal(shape) * scale if shape[1:] else np.zeros(shape)).astype(np.float32)
  return arrays


def clusters(points, count, seed=0, rounds=20):
  """k-means: points (N, E) -> (count, E)."""
  rng = np.random.default_rng(seed)
  centers = points[rng.choice(len(points), count, replace=False)]
  for _ in range(rounds):
    nearest = nearest_rows(points, centers)
    for n in range(count):
      members = points[nearest == n]
      centers[n] = members.mean(0) if len(members) else points[rng.integers(len(points))]
  return centers


def nearest_rows(points, rows):
  return (np.square(rows).sum(1) - 2 * points @ rows.T).argmin(1)


def encoded(w, masks):
  """The encoder as tensors. w: {name: Tensor}, masks (B, 64, 64) -> (B, E, 4, 4)."""
  x = masks.unsqueeze(1)
  for name in draw.DOWN:
    x = x.conv2d(w[f"{name}.weight"], w[f"{name}.bias"], stride=2, padding=1).relu().contiguous()
  for n in (8, 9):
    x = draw.residual(w, x, f"encoder.{n}.net")
  return x.conv2d(w["encoder.10.weight"], w["encoder.10.bias"]).contiguous()


def losses(w, masks, quantised):
  """masks (B, 64, 64), quantised: 1 if the decoder is to see codes, 0 if it sees what the encoder says ->
  mean cross-entropy of the pixels, how far the encoder is from its codes, what it says (B * 16, E)."""
  z, book = encoded(w, masks), w[draw.EMBEDDING]
  points = z.permute(0, 2, 3, 1).reshape(-1, WIDTH)
  distance = (book.square().sum(1) - 2 * points.matmul(book.transpose())).detach()
  chosen = (distance == distance.min(1, keepdim=True)).float().contiguous().matmul(book)  # (B * 16, E)
  apart = (chosen - points.detach()).square().mean() + .25 * (chosen.detach() - points).square().mean()
  code = chosen.detach().reshape(-1, draw.GRID, draw.GRID, WIDTH).permute(0, 3, 1, 2)
  # The decoder sees the code, its gradient goes past it to the encoder: rounding has none of its own.
  logits = draw.decode(w, (z + ((code - z).detach() * quantised)).contiguous())
  value = (logits.relu() - logits * masks + (1 + (-logits.abs()).exp()).log()).mean()
  return value, apart, points


def train(path, steps, count):
  """A third of the steps without codes, then those are the clusters of what the encoder says, and learn with
  it. count: masks a step. Raises Fault."""
  path = Path(path)
  if path.exists() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
    trouble = "is there already" if path.exists() else "cannot be written"
    raise vlm.Fault(f"{path} {trouble}; choose another name")
  device = vlm.open_device(None)
  w = {name: vlm.upload(array, device).is_param_(True) for name, array in start_weights().items()}
  weights, book = list(w.values()), w[draw.EMBEDDING]
  optimizer = vlm.kernels.AdamW(weights, lr=0.0, b2=.99, weight_decay=0.0)

  def update(masks, quantised):
    quantised = quantised.reshape(())
    value, apart, points = losses(w, masks, quantised)
    for t, g in zip(weights, (value + apart * quantised).gradient(*weights)):
      t.grad = g
    return value.realize(points, *optimizer.schedule_step()), points

  step, start, recent = vlm.capture(update, device), steps // 3, []
  with vlm.kernels.train():
    for i in range(steps):
      rate = 3e-3 * min((i + 1) / 50, .5 + .5 * np.cos(np.pi * i / steps))
      optimizer.lr.assign(Tensor([float(rate)], device=device)).realize()
      inputs = examples(shapes.TRAIN_SEED, i, count), np.full(1, i >= start, np.float32)
      value, points = step(*(vlm.upload(array, device) for array in inputs))
      recent = recent[-31:] + [points.numpy()]
      if i == start - 1:
        book.assign(Tensor(clusters(np.concatenate(recent), SEG), device=device)).realize()
      if start <= i < steps * 3 // 4 and i % 50 == 49:  # codes near nothing start again where something is
        points, rows = np.concatenate(recent), book.numpy().copy()
        idle = np.bincount(nearest_rows(points, rows), minlength=SEG) == 0
        rows[idle] = np.random.default_rng(i).choice(points, idle.sum())
        book.assign(Tensor(rows, device=device)).realize()
      vlm.terminal.bar(i + 1, steps, f"steps  loss {value.item():.4f}")
      if i % 250 == 249:
        vlm.log.debug("")
        print(f"step {i + 1}: cross-entropy {value.item():.4f}", flush=True)
  vlm.log.debug("")
  data = io.BytesIO()
  np.savez(data, **{name: t.numpy() for name, t in w.items()}, **{draw.RANGE: np.float32([0, 1])})
  try:
    checkpoint.write_file(path, [data.getvalue()])
  except OSError as e:
    raise vlm.Fault(f"{path}: {e.strerror}", code=1) from None


def evaluate(path):
  """Print what becomes of masks of unseen shapes that are encoded and decoded. Raises Fault."""
  path, results, used = Path(path), [], set()
  w, decoder = draw.read(path, "encoder"), draw.Masks(path.parent, vlm.open_device(None))
  decoder.places = [path]
  for image in examples(shapes.TEST_SEED, 0, 200):
    codes, truth = encode(w, image), image > .5
    used |= set(codes)
    results.append(shapes.overlap(truth, decoder.logits(codes) > 0))
  print(f"{len(results)} masks: mean IoU {np.mean(results):.3f}, worst {min(results):.3f}, "
        f"{len(used)} of {SEG} codes used")


# ---- 3. Command line ----


@vlm.program
def main(argv):
  p = vlm.terminal.ArgumentParser(prog="codebook.py", allow_abbrev=False,
                 description="The codes of masks: train them for the toy world, measure them.")
  action = p.add_mutually_exclusive_group(required=True)
  action.add_argument("--train", metavar="FILE", help="make codebook, encoder and decoder")
  action.add_argument("--eval", metavar="FILE", help="encode and decode 200 masks of unseen shapes")
  p.add_argument("--steps", type=int, metavar="N", help="of --train (default 1300)")
  p.add_argument("--batch", type=int, metavar="N", help="masks a step (default 32)")
  args = p.parse_args(argv)
  for option, value, default in (("steps", args.steps, 1300), ("batch", args.batch, 32)):
    if value is None:
      setattr(args, option, default)
    elif args.eval is not None:
      raise vlm.Fault(f"--{option} goes with --train")
    elif not 1 <= value <= 100_000:
      raise vlm.Fault(f"--{option}: at least 1, at most 100000")
  if args.train is not None:
    train(args.train, args.steps, args.batch)
  evaluate(args.eval if args.train is None else args.train)


if __name__ == "__main__":
  sys.exit(main())
