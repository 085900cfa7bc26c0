"""Tests of draw_answer.py, started as a program; what it draws with is tested with draw.py."""
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
  Image.new("RGB", (90, 60), GREY).save(tmp_path / "a.png")
  def run(*argv):
    command = [sys.executable, ROOT / "examples/draw_answer.py", *argv]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
  return run


def test_a_mask_of_the_named_folder(start, tmp_path):
  done = start("a.png", f"{BOX}{CODES} cat", "b.png", "--weights", TOY)
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "1 box drawn: b.png\n")
  [box] = vlm.parse_boxes(f"{BOX}{CODES} cat", 90, 60)
  mask = vlm.beside("draw").Masks(TOY, vlm.open_device(None))(box, 90, 60)
  changed = (np.asarray(Image.open(tmp_path / "b.png")) != GREY).any(2)
  assert changed[mask].all() and mask.any()


def test_boxes_need_no_folder(start, tmp_path):
  done = start("a.png", f"{BOX} cat ; {BOX} dog", "b.png", "--quiet")
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
  drawn = np.asarray(Image.open(tmp_path / "b.png"))
  assert (drawn[30, 0] != GREY).any() and (drawn[30, 40] == GREY).all()  # a frame
  done = start("a.png", "a cat", "c.png")
  assert done.returncode == 0 and "c.png not written" in done.stderr and not (tmp_path / "c.png").exists()


def test_faults(start, tmp_path):
  (tmp_path / "wrong").mkdir()
  np.savez(tmp_path / "wrong" / "vae-oid.npz", x=np.zeros(3))
  for words, *argv in (("OUT", "a.png", BOX), ("unrecognized", "a.png", BOX, "b.png", "c"),
                       ("No such file", "x.png", BOX, "b.png"), ("picture format", "a.png", BOX, "b.txt"),
                       ("is the input picture", "a.png", BOX, "a.png"),
                       ("no such folder", "a.png", BOX, "b.png", "--weights", "none"),
                       ("vae-oid.npz", "a.png", BOX + CODES, "b.png", "--weights", "wrong", "--quiet")):
    done = start(*argv)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("draw_answer: ")
    assert words in done.stderr, done.stderr
