"""Tests of ray_batch.py. `-k live` starts a cluster of two workers on this machine, which needs Ray:
requirements-ray.txt."""
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # vlm.py, wherever this is started from
import batch
import ray_batch

ROWS, OPTIONS = 40, ["--weights", str(ROOT / "weights" / "tiny1"), "--max-tokens", "5", "--batch-size", "2"]


@pytest.fixture(autouse=True)
def questions(tmp_path, monkeypatch):
  """A list of 40 questions, some of them bad, in the folder that commands run in"""
  monkeypatch.chdir(tmp_path)
  for i in range(3):
    Image.new("RGB", (40 + i, 30), (80 * i, 0, 99)).save(f"{i}.png")
  rows = [{"image": f"{i % 4}.png", "prompt": f"caption {'x' * (i % 5)}"} for i in range(ROWS)]  # 3.png is not there
  Path("list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_mistakes_on_the_command_line(capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "ray", None)
  for argv, words in (("list.jsonl", "--out"), ("none.jsonl --out o", "none.jsonl"), ("--out o", "SOURCE"),
                      (". --out o", "--prompt"), ("list.jsonl --out o --actors 0", "--actors"),
                      ("list.jsonl --out o --part 1/2", "--part"), ("list.jsonl --out o --max-tokens 0", "--max"),
                      ("list.jsonl --out o", "pip install -r examples/requirements-ray.txt")):
    assert ray_batch.main(argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"ray_batch: .*\n", err) and words in err, err
    assert not Path("o").exists()


def start(out):
  command = [sys.executable, ROOT / "examples/ray_batch.py", "list.jsonl", "--out", out, "--actors", "2", *OPTIONS]
  with open("said.txt", "w") as said:  # a pipe would be full before anybody reads it
    return subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)


def read(out):
  rows = importlib.import_module("pyarrow.parquet").read_table(out).to_pylist()
  return [{name: row[name] for name in batch.COLUMNS} for row in sorted(rows, key=lambda row: row["row"])]


def done():
  """How many blocks of rows Ray has noted as written; what it calls pending is about to be."""
  return sum(".pending." not in file.name for file in Path("answers/_done").glob("*.parquet"))


def wait_for(blocks, run):
  while run.poll() is None and done() < blocks:
    time.sleep(.01)
  assert run.poll() is None, Path("said.txt").read_text()


def test_live_equal_to_batch_after_kills():
  """One run whose driver is killed, and one that goes on, of which a worker is killed: every row once, as batch.py
  has it"""
  if os.environ.get("VLM_LIVE"):  # CI, which must not skip
    importlib.import_module("ray")
  pytest.importorskip("ray", reason="needs Ray: see examples/requirements-ray.txt")
  assert batch.main(["list.jsonl", "--out", "right.jsonl", "--quiet", *OPTIONS]) == 0
  nothing = dict.fromkeys(batch.COLUMNS)
  right = [nothing | row for row in batch.table_rows(Path("right.jsonl").read_bytes().splitlines())]
  assert len(right) == ROWS and sum(row["error"] is not None for row in right) == ROWS // 4
  with start("answers") as run:
    wait_for(1, run)
    run.send_signal(signal.SIGKILL)
  with start("answers") as run:
    wait_for(done() + 1, run)
    workers = subprocess.run(["pgrep", "-f", "ray::MapWorker"], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[0]), signal.SIGKILL)
    assert run.wait(timeout=300) == 0, Path("said.txt").read_text()
  assert read("answers") == right and f"{ROWS // 4} of them bad" in Path("said.txt").read_text()
  Path("list.jsonl").write_text(Path("list.jsonl").read_text().replace("caption", "detect"))
  with start("answers") as run:  # other questions
    assert run.wait(timeout=100) == 2 and "choose another folder" in Path("said.txt").read_text()
  assert read("answers") == right
