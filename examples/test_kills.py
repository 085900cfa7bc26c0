"""Programs that are killed at random moments while they write, each time started again on what that has left: no
half file under its final name, a run that goes on or starts anew, at last what a run that nobody killed makes, and
the user's own files as they were. The seed is printed; VLM_SEED=N repeats it, VLM_KILLS=N makes the number of kills
of each program another, of which the full form has 30. An x is a kill, a dot a run that had ended before.

    VLM_KILLS=30 python -m pytest -q -s -m "" examples/test_kills.py
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import vlm
from tokenizer import Tokenizer

KILLS, SEED = int(os.environ.get("VLM_KILLS") or 3), int(os.environ.get("VLM_SEED") or time.time())
TINY = ROOT / "weights" / "tiny1"
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
# Runs first in the program's process: from the moment that it touches its output a clock ticks.
CLOCK = """
import atexit, os, signal, sys, threading, time
out, begun = os.environ["KILL_AT"], []
def tick():
  time.sleep(float(os.environ["KILL_AFTER"]))
  os.kill(os.getpid(), signal.SIGKILL)
def hook(event, words):
  if event in ("open", "os.mkdir") and not begun and str(words[0]).startswith(out):
    begun.append(time.monotonic())
    threading.Thread(target=tick, daemon=True).start()
def end():
  print(time.monotonic() - begun[0], file=open(os.environ["KILL_LOG"], "w"))
sys.addaudithook(hook)
atexit.register(end)
"""


class Killed:
  """A program whose output is a file or folder `out`: runs of it that end, and such that are killed."""
  def __init__(self, folder, *words):
    (folder / "sitecustomize.py").write_text(CLOCK)
    self.folder, self.words = folder, [sys.executable, *map(str, words)]
    self.random, self.seconds = random.Random(SEED), 0
    print(f"\nseed {SEED}, {KILLS} kills", flush=True)

  def run(self, out, *more, after=1e6):
    """-> exit code, which is no traceback's"""
    env = {"PYTHONPATH": str(self.folder), "KILL_LOG": str(self.folder / "log"), "KILL_AT": str(out)}
    done = subprocess.run([*self.words, *map(str, more)], env=os.environ | env | {"KILL_AFTER": str(after)},
                          capture_output=True, text=True, cwd=self.folder)
    good = done.returncode in (0, -signal.SIGKILL) and "Traceback" not in done.stderr
    assert good, f"seed {SEED}: {done.stderr}"
    return done.returncode

  def whole(self, out, *more):
    """A run that nobody kills; then it is known how long one takes."""
    assert self.run(out, *more) == 0
    self.seconds = float((self.folder / "log").read_text())

  def kill(self, out, *more):
    """A run that is killed at a random moment of its writing -> whether it was, and had not ended before."""
    killed = self.run(out, *more, after=self.random.uniform(0, self.seconds)) != 0
    print("x" if killed else ".", end="", flush=True)
    return killed


def files(folder, parts=False):
  """{name: bytes} of a folder, without what is being written."""
  return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if parts or path.suffix != ".part"}


def new_folder(job, make, tmp_path, owned=("notes.txt",)):
  """A program that makes a folder of a checkpoint, or what is in one. make(out): its further words."""
  job.whole(tmp_path / "whole", *make(tmp_path / "whole"))
  whole, out = files(tmp_path / "whole"), tmp_path / "out"
  out.mkdir()
  for name in owned:
    (out / name).write_text("the user's")
  for _ in range(KILLS):
    killed = job.kill(out, *make(out))
    found = files(out)
    assert all(found.pop(name) == b"the user's" for name in owned)
    assert found.items() <= whole.items() and (killed or found == whole)
    if found == whole:  # which is no longer written over
      for name in whole:
        (out / name).unlink()
  assert job.run(out, *make(out)) == 0
  assert files(out, parts=True) == whole | dict.fromkeys(owned, b"the user's")


def with_masks(tmp_path):
  """A folder of weights with a decoder of masks"""
  shutil.copytree(TINY, tmp_path / "tiny")
  shutil.copy(ROOT / "weights" / "toy" / "vae-oid.npz", tmp_path / "tiny")
  return tmp_path / "tiny"


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.long)])
def test_quantising(bits, tmp_path):
  job = Killed(tmp_path, ROOT / "examples" / "quantize.py", with_masks(tmp_path), "--bits", bits)
  new_folder(job, lambda out: [out], tmp_path)


def test_converting_to_a_folder(tmp_path):
  tiny = with_masks(tmp_path)
  (tmp_path / "source").mkdir()
  shutil.copy(tiny / "vae-oid.npz", tmp_path / "source")
  convert = [sys.executable, ROOT / "examples" / "big_vision.py"]
  subprocess.run([*convert, tiny, tmp_path / "source" / "a.npz"], check=True, capture_output=True)
  new_folder(Killed(tmp_path, convert[1], tmp_path / "source" / "a.npz"), lambda out: [out], tmp_path)


def test_converting_to_an_npz(tmp_path):
  job = Killed(tmp_path, ROOT / "examples" / "big_vision.py", with_masks(tmp_path))
  new_folder(job, lambda out: [out / "a.npz"], tmp_path)


@pytest.mark.long
def test_batches(tmp_path):
  shutil.copy(ROOT / "examples" / "shapes.png", tmp_path)
  rows = [{"image": "shapes.png", "prompt": f"caption {'x' * (i % 3)}"} for i in range(60)]
  (tmp_path / "list").write_text("\n".join(map(json.dumps, rows)))
  job = Killed(tmp_path, ROOT / "examples" / "batch.py", "list", "--weights", TINY, "--batch-size", 2,
               "--max-tokens", 12)
  job.whole(tmp_path / "whole", "--out", tmp_path / "whole")  # that one compiles
  (tmp_path / "whole").unlink()
  job.whole(tmp_path / "whole", "--out", tmp_path / "whole")
  whole, out = (tmp_path / "whole").read_bytes(), tmp_path / "out"
  for _ in range(KILLS):
    out.touch()  # it may be killed before it opens that
    job.kill(out, "--out", out)
    found = out.read_bytes()
    assert whole.startswith(found) and found.endswith(b"\n") or not found
    if found.count(b"\n") > 50:
      out.unlink()
  assert job.run(out, "--out", out) == 0 and out.read_bytes() == whole


@pytest.mark.long
def test_training(tmp_path):
  job = Killed(tmp_path, ROOT / "examples" / "train.py", "--init", TINY, "--steps", 12, "--batch", 4,
               "--part", "projector", "--lr", 1e-4)
  job.whole(tmp_path / "whole", "--save", tmp_path / "whole")
  whole, out = files(tmp_path / "whole"), tmp_path / "out"
  for _ in range(KILLS):
    state = out / "training.state"
    resume = ["--resume"] if state.exists() else []
    killed = job.kill(out, "--save", out, *resume)
    if (out / "model.safetensors").exists():
      vlm.load(out)
    assert not resume or state.exists()
    if not killed:
      assert files(out) == whole
      shutil.rmtree(out)
  assert job.run(out, "--save", out, *(["--resume"] if (out / "training.state").exists() else [])) == 0
  found = files(out, parts=True)
  assert [name for name in found | whole if found.get(name) != whole.get(name)] == []


@pytest.mark.long
def test_training_from_nothing(tmp_path):
  """has nothing to go on from: another run is refused, with a line, until another folder is named"""
  job = Killed(tmp_path, ROOT / "vlm.py", "--train", "--steps", 3)
  job.whole(tmp_path / "whole", "--save", tmp_path / "whole")
  whole, out = files(tmp_path / "whole"), tmp_path / "out"
  for _ in range(KILLS):
    out.mkdir()  # it may be killed before it makes that
    killed = job.kill(out, "--save", out)
    left = files(out)
    assert left.keys() <= whole.keys() and (killed or left.keys() == whole.keys())
    if "tokenizer.model" in left:
      Tokenizer(out / "tokenizer.model")
    if "model.safetensors" in left:
      vlm.read_weights(out)
    if "config.json" in left:
      vlm.load(out)
    if any(out.iterdir()):
      again = subprocess.run([*job.words, "--save", out], capture_output=True, text=True)
      assert again.returncode == 2 and again.stderr.endswith("is not empty; choose another --save\n")
      assert files(out) == left
    shutil.rmtree(out)
