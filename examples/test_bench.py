"""Tests of bench.py: every measurement, on the smallest model there is. What they measure is not looked
at."""
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # vlm.py, wherever this is started from
import bench
import vlm

TINY = str(ROOT / "weights" / "tiny1")


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  sizes = {"FLOATS": 1 << 16, "STEPS": 1000, "OUTPUTS": 33, "INPUTS": 64, "MANY": 40, "TRAINED": 3,
           "QUESTIONS": 4}
  for name, size in sizes.items():
    monkeypatch.setattr(bench, name, size)


@pytest.fixture
def measure(capsys):
  def call(*argv):
    """-> the cells of the table that is printed, without its header."""
    assert bench.main([*argv]) in (0, None)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1, "a row of another length"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
  return call


@pytest.mark.long
def test_speed_beside_another_checkout(measure):
  rows = measure(TINY, "--repeat", "1", "--beside", str(ROOT))
  assert [row[0] for row in rows] == list(bench.ROWS.values())
  for _, ours, theirs, ratio, _ in rows:
    assert abs(float(ours) / max(float(theirs), 1e-3) - float(ratio)) < 2  # three digits of a millisecond


@pytest.mark.long
def test_speed_beside_any_program(measure, capsys):
  figures = json.dumps({"vision": 2, "prefill": 1.5, "decode": 0.5, "first": 4})
  peer = shlex.join([sys.executable, "-c", f"print('hello'); print({figures!r})"])
  rows = measure(TINY, "--repeat", "1", "--peer", peer)
  peers = {row[0]: row[2] for row in rows}
  assert peers[bench.ROWS["both"]] == "3.500" and peers[bench.ROWS["decode"]] == "0.500"
  assert peers[bench.ROWS["memory"]] == "-" and all(len(row) == 5 for row in rows)


@pytest.mark.parametrize("code, word", [
  ("print('hello')", "no JSON"), ("", "no JSON"), ("print('{}')", "none of"), ("print(3)", "none of"),
  ("""print('{"decode": "fast"}')""", "none of"), ("raise SystemExit(3)", "exit code 3"), (None, "No such file")])
def test_a_peer_that_prints_no_figures(code, word):
  command = [sys.executable, "-c", code] if code is not None else ["no/such/program"]
  with pytest.raises(vlm.Fault, match=word) as fault:
    bench.run_peer(command)
  assert "\n" not in str(fault.value) and shlex.join(command) in str(fault.value)


@pytest.mark.long
def test_speed_alone_of_a_checkpoint_by_its_name(measure):
  rows = measure("tiny1", "--repeat", "2")
  assert len(rows) == 8 and all(len(row) == 3 for row in rows)
  assert re.fullmatch(r"\d+ of \d+ GFLOPS", rows[1][2]) and re.fullmatch(r"[\d.]+ of [\d.]+ GB/s", rows[4][2])


@pytest.mark.long
def test_quantised(measure):
  rows = measure(TINY, "--quantized", "--repeat", "1")
  assert [row[0] for row in rows] == ["as they are", "int8", "int4"]
  same = [int(row[-1]) for row in rows]
  assert same[0] == 16 and same[1] > 8, "int8 hardly ever chooses another token"


@pytest.mark.long
def test_how_cost_grows(capsys):
  """with pictures, texts and batches, in one run"""
  assert not bench.main([TINY, "--sides", "56", "84", "--texts", "1", "200", "--batches", "1", "3"])
  tables = [[row.strip("| ").split(" | ") for row in part.splitlines()[2:]] for part in capsys.readouterr().out.strip().split("\n\n")]
  sides, texts, batches = tables
  assert [row[:2] for row in sides] == [["56", "16"], ["84", "36"]]
  assert [row[0] for row in texts] == ["1", "200"] and all(float(number) > 0 for row in texts for number in (row[1], row[4]))
  assert float(texts[1][1]) > float(texts[0][1]), "200 tokens in less time than one"
  assert [row[0] for row in batches] == ["1", "3"]
  for size, *seconds, rate, growth, share in batches:
    assert abs(int(size) / sum(map(float, seconds)) / float(rate) - 1) < .1 and re.fullmatch(r"\d+%", share)
    assert abs(float(rate) / float(batches[0][4]) - float(growth)) < .1
  assert sides[0][4] == texts[0][2] == "1.0"


@pytest.mark.long
def test_products(measure):
  assert len(measure("--products")) == 7 and vlm.kernels.PORTABLE is False


@pytest.mark.long
def test_the_training_step(capsys):
  assert bench.main(["--train"]) == 0
  assert re.search(r"^4 questions a step, .* matmul [1-9]\d*%, reductions \d+%", capsys.readouterr().out)


def test_the_protocol_of_workers(capsys):
  """What --beside hands to another checkout's bench.py, and what it takes from there."""
  assert bench.main([TINY, "--worker", json.dumps([0, 1, None, None, 3])]) == 0
  result = json.loads(capsys.readouterr().out)
  assert set(bench.ROWS) - {"both"} <= set(result) and len(result["choices"]) == 3


@pytest.mark.parametrize("argv, word", [
  ([], "which checkpoint"), ([TINY, "--vs", "transformers"], "--python"),
  ([TINY, "--python", "python3"], "--vs"), ([TINY, "--check"], "--python"),
  ([TINY, "--products"], "leave out"), (["--train", "--repeat", "2"], "--repeat"),
  ([TINY, "--sides", "56", "--check", "--python", "python3"], "--sides"), ([TINY, "--texts", "5", "--repeat", "2"], "--repeat"),
  ([TINY, "--check", "--peer", "x"], "--peer"), ([TINY, "--peer", "'x"], "--peer"),
  ([TINY, "--beside", "nowhere"], "nowhere"), ([TINY, "--vs", "quanto", "--python", "python3"], "--quantized"),
  ([TINY, "--repeat", "0"], "at least 1"), ([TINY, "--check", "--quantized"], "not allowed"),
  ([TINY, "--quick"], "--quick"), (["nowhere"], "nowhere")])
def test_faults(argv, word, capsys):
  assert bench.main(argv) == 2
  captured = capsys.readouterr()
  assert not captured.out and captured.err.startswith("bench: ") and captured.err.count("\n") == 1
  assert word in captured.err


@pytest.mark.long
def test_live_the_same_choices_as_transformers(measure, capsys):
  pytest.importorskip("transformers")
  rows = measure(TINY, "--repeat", "1", "--vs", "transformers", "--python", sys.executable)
  assert all(len(row) == 5 for row in rows)
  assert bench.main([TINY, "--check", "--python", sys.executable]) == 0


@pytest.mark.long
def test_live_8_bits_of_quanto(measure, capsys):
  pytest.importorskip("optimum.quanto")
  assert bench.main([TINY, "--quantized", "--repeat", "1", "--vs", "quanto", "--python", sys.executable]) == 0
  # of a tiny model prefill, which is what is left of both without vision, may come out below zero
  found = re.search(r"^transformers, int8: vision [\d.]+ s, prefill -?[\d.]+ s, decode ([\d.]+) s", capsys.readouterr().out, re.M)
  assert float(found[1]) > 0
