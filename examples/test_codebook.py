"""Tests of examples/codebook.py: the encoder is worked out again here in numpy, with loops, on random
weights."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import codebook
import shapes
import vlm
from test_draw import TOY, Masks, convolution, random_weights

draw = vlm.beside("draw")
ROOT = Path(__file__).resolve().parents[1]

def test_encoder_and_decoder_of_the_toy():
  """Masks of unseen shapes survive it, and it is small enough to ship."""
  w, found, overlaps = draw.read(TOY / "vae-oid.npz", "encoder"), Masks(TOY), []
  for image in codebook.examples(shapes.TEST_SEED, 1, 60):
    codes = codebook.encode(w, image)
    assert len(codes) == 16 and all(0 <= code < 128 for code in codes)
    overlaps.append(shapes.overlap(found.logits(codes) > 0, image > .5))
  assert np.mean(overlaps) > .96 and min(overlaps) > .9
  assert (TOY / "vae-oid.npz").stat().st_size < 1_500_000

@pytest.mark.parametrize("off,on", [(0, 1), (-1, 1)])
def test_the_encoder_is_the_one_worked_out_by_hand(off, on):
  w = random_weights(draw.encoder_shapes(5, (6, 7, 8, 9), (4, 3)) | {"_vq_vae._embedding": (128, 5)})
  w |= {draw.RANGE: np.float32([off, on])}
  image = np.random.default_rng(0).random((64, 64), np.float32)
  x, layer = off + (on - off) * image[None], lambda name: (w[f"encoder.{name}.weight"], w[f"encoder.{name}.bias"])
  for name in ("0", "2", "4", "6"):  # a stride of two: every second pixel of the whole convolution
    x = np.maximum(convolution(x, *layer(name), pad=1)[:, ::2, ::2], 0)
  for block in ("8", "9"):
    h = np.maximum(convolution(x, *layer(f"{block}.net.0"), pad=1), 0)
    h = np.maximum(convolution(h, *layer(f"{block}.net.2"), pad=1), 0)
    x = x + convolution(h, *layer(f"{block}.net.4"))
  z = convolution(x, *layer("10"))
  nearest = [int(np.argmin([((z[:, i, j] - row) ** 2).sum() for row in w["_vq_vae._embedding"]]))
             for i in range(4) for j in range(4)]
  assert codebook.encode(w, image) == nearest and len(set(nearest)) > 3

def test_a_file_says_what_its_encoder_was_trained_on(tmp_path):
  toy = ROOT / "weights" / "toy" / draw.NAME
  assert draw.read(toy, "encoder")[draw.RANGE].tolist() == [0, 1]
  with np.load(toy) as file:
    np.savez(tmp_path / draw.NAME, **{name: file[name] for name in file.files if name != draw.RANGE})
  assert draw.read(tmp_path / draw.NAME, "encoder")[draw.RANGE].tolist() == [-1, 1]  # big_vision's 2 * (m - .5)

def start(folder, *arguments):
  command = [sys.executable, ROOT / "examples/codebook.py", *map(str, arguments)]
  return subprocess.run(command, capture_output=True, text=True, cwd=folder)

@pytest.mark.parametrize("words,arguments", [
  ("another name", ("--train", "mine.npz")), ("cannot be written", ("--train", "no/where.npz")),
  ("--steps: at least 1", ("--train", "a.npz", "--steps", 0)), ("no such file", ("--eval", "none.npz")),
  ("--batch: at least 1", ("--train", "a.npz", "--batch", -1)), ("npz", ("--eval", "mine.npz")),
  ("--steps goes with --train", ("--eval", "mine.npz", "--steps", 9)), ("required", ()),
  ("--batch goes with --train", ("--eval", "mine.npz", "--batch", 32)),
  ("not allowed", ("--train", "a.npz", "--eval", "a.npz")),
  ("unrecognized", ("--eval", "mine.npz", "--lr", 1))])
def test_it_refuses_before_the_work(words, arguments, tmp_path):
  (tmp_path / "mine.npz").write_text("mine")
  done = start(tmp_path, *arguments)
  assert done.returncode == 2 and done.stdout == "" and words in done.stderr
  assert done.stderr.startswith("codebook: ") and done.stderr.count("\n") == 1, done.stderr
  assert (tmp_path / "mine.npz").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1

def test_clusters_are_where_the_points_are():
  """Training itself takes a minute: README's test runs it."""
  rng, centers = np.random.default_rng(0), 10 * np.arange(12.0).reshape(4, 3)
  points = np.concatenate([center + rng.uniform(-1, 1, (50, 3)) for center in centers])
  found = codebook.clusters(points, 4, seed=2)
  nearest = codebook.nearest_rows(points, found)
  assert len(set(nearest)) == 4 and all(len(set(nearest[i:i + 50])) == 1 for i in range(0, 200, 50))
  assert all(np.abs(row - points[nearest == i].mean(0)).max() < 1e-9 for i, row in enumerate(found))

def test_the_toys_file_is_measured(capsys):
  assert not codebook.main(["--eval", str(TOY / "vae-oid.npz")])
  assert capsys.readouterr().out == "200 masks: mean IoU 0.983, worst 0.952, 127 of 128 codes used\n"
