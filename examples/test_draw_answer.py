"""Tests of draw_answer.py, started as a program; what it draws with is tested with draw.py."""
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import vlm

ROOT = Path(__file__).resolve().parents[1]
TOY, GREY = ROOT / "weights" / "toy", (90, 120, 130)
BOX, CODES = "<loc0000><loc0000><loc1023><loc1023>", "".join(f"<seg{i:03d}>" for i in range(0, 128, 8))


@pytest.fixture
def start(tmp_path):
  """start(*argv) -> draw_answer.py, done, in a folder with a picture a.png."""
  Image.new("RGB", (180, 120), GREY).save(tmp_path / "a.png")
  def run(*argv):
    command = [sys.executable, ROOT / "examples/draw_answer.py", *argv]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
  return run


def test_a_mask_of_the_named_folder(start, tmp_path):
  done = start("a.png", f"{BOX}{CODES} cat", "b.png", "--weights", TOY)
  assert done.stderr == "cat  (0, 0) to (180, 120)\n1 box drawn: b.png\n"
  assert (done.returncode, done.stdout) == (0, "")
  [box] = vlm.parse_boxes(f"{BOX}{CODES} cat", 180, 120)
  mask = vlm.beside("draw").Masks(TOY, vlm.open_device(None))(box, 180, 120)
  changed = (np.asarray(Image.open(tmp_path / "b.png")) != GREY).any(2)
  assert changed[mask].all() and mask.any()


def test_boxes_need_no_folder(start, tmp_path):
  done = start("a.png", f"{BOX} cat ; {BOX} dog", "b.png", "--quiet")
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
  drawn = np.asarray(Image.open(tmp_path / "b.png"))
  assert (drawn[60, 0] != GREY).any() and (drawn[60, 80] == GREY).all()  # a frame
  done = start("a.png", "a cat", "c.png")
  assert done.returncode == 0 and "c.png not written" in done.stderr and not (tmp_path / "c.png").exists()


def test_the_readmes_box_fits_the_circle():
  """to a pixel or two of where examples/shapes.png has it"""
  [codes] = re.findall(r'draw_answer.py \S+ "(.*?)"', (ROOT / "examples" / "README.md").read_text())
  picture = vlm.open_image(ROOT / "examples" / "shapes.png")
  [box] = vlm.parse_boxes(codes, *picture.size)
  red, green, _ = np.moveaxis(np.asarray(picture).astype(int), -1, 0)
  y, x = ((red > 180) & (green < 80)).nonzero()
  assert np.abs(np.subtract(box.box, (x.min(), y.min(), x.max(), y.max()))).max() < 4
  assert codes in (ROOT / "examples" / "draw_answer.py").read_text()


def test_faults(start, tmp_path):
  (tmp_path / "wrong").mkdir()
  np.savez(tmp_path / "wrong" / "vae-oid.npz", x=np.zeros(3))
  for words, *argv in (("OUT", "a.png", BOX), ("unrecognized", "a.png", BOX, "b.png", "c"),
                       ("no such image", "x.png", BOX, "b.png"), ("picture format", "a.png", BOX, "b.txt"),
                       ("is the input picture", "a.png", BOX, "a.png"),
                       ("no such folder", "a.png", BOX, "b.png", "--weights", "none"),
                       ("vae-oid.npz", "a.png", BOX + CODES, "b.png", "--weights", "wrong", "--quiet")):
    done = start(*argv)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("draw_answer: ")
    assert words in done.stderr, done.stderr
