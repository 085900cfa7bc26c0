"""Tests of shard.py: several CPU devices stand for several GPUs, the code is the same."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tinygrad.nn.state import get_state_dict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import golden
import quantize
import shard
import vlm

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["caption en", "detect red circle ; yellow star"]


def answers(model):
  rng, side = np.random.default_rng(0), model.config.vision.image_size
  images = [rng.uniform(-1, 1, (3, side, side)).astype(np.float32) for _ in PROMPTS]
  logits = golden.next_logits(model, images[0], PROMPTS[0])
  return logits, [answer.tokens for answer in model.generate(images, PROMPTS, max_tokens=6)]


@pytest.mark.parametrize("name, bits, count", [
  ("tiny1", 8, 2), *(pytest.param(*case, marks=pytest.mark.long)
                     for case in (("tiny1", 0, 4), ("tiny2", 0, 2), ("tiny2", 4, 2)))])
def test_same_tokens_as_one_device(name, bits, count, tmp_path, monkeypatch):
  # without instructions that round to bfloat16 only the order of sums is different
  monkeypatch.setattr(vlm.kernels, "PORTABLE", True)
  monkeypatch.setattr(vlm.kernels, "KEPT", 0)
  folder = ROOT / "weights" / name
  if bits:
    quantize.save(folder, tmp_path / "quantised", bits)
    folder = tmp_path / "quantised"
  logits, tokens = answers(vlm.load(folder, "CPU"))
  split = shard.load(folder, "CPU", count)
  assert len(split.device) == count
  split_logits, split_tokens = answers(split)
  assert np.abs(split_logits - logits).max() < 1e-3 * logits.std() + 1e-4
  assert split_tokens == tokens


def test_what_divides_is_split():
  """tiny2 has 4 heads and 2 key/value heads."""
  models = {count: shard.load(ROOT / "weights" / "tiny2", "CPU", count) for count in (2, 4)}
  weights = {count: get_state_dict(model.net) for count, model in models.items()}
  layer = "language_model.layers.0."
  split = {name: {count: t[name].uop.axis for count, t in weights.items()} for name in weights[2]}
  assert split[layer + "mlp.gate_proj.weight"] == {2: 0, 4: 0}
  assert split[layer + "mlp.down_proj.weight"] == {2: 1, 4: 1}
  assert split[layer + "self_attn.q_proj.weight"] == {2: 0, 4: None}
  assert split[layer + "self_attn.k_proj.weight"] == {2: 0, 4: None}
  assert split[layer + "self_attn.o_proj.weight"] == {2: 1, 4: None}
  assert split["language_model.embed_tokens.weight"] == {2: 1, 4: 1}
  assert split[layer + "input_layernorm.weight"] == {2: None, 4: None}
  whole = sum(t.nbytes() for t in weights[2].values())
  assert whole / 2 < shard.memory(models[2]) < 0.6 * whole


@pytest.mark.parametrize("name, axis", [("tiny2", 1), ("tiny1", None)])  # tiny1 has one key/value head
def test_cache_is_split_by_heads(name, axis):
  model = shard.load(ROOT / "weights" / name, "CPU", 2)
  cache = vlm.Cache(model.config.text, 1, 64, model.device, model.place)
  assert {t.uop.axis for t in cache.k + cache.v} == {axis}


def start(program, *argv, cwd):
  command = [sys.executable, ROOT / program, ROOT / "examples/shapes.png", *argv, "--device", "CPU"]
  return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.mark.long
def test_command_line(tmp_path):
  options = "detect red circle", "--weights", "toy"
  one = start("vlm.py", *options, cwd=tmp_path)
  two = start("examples/shard.py", *options, "--json", cwd=tmp_path)
  assert one.returncode == two.returncode == 0 and one.stdout
  assert json.loads(two.stdout)["text"] == one.stdout.strip() and (tmp_path / "shapes.boxes.png").exists()
  assert "GB of weights on each of 2 devices\n" in two.stderr


@pytest.mark.parametrize("words, argv", [
  ("--devices 1", ["--devices", "1"]), ("invalid int value", ["--devices", "x"]), ("--train", ["--train"]),
  ("picture format", ["--out", "x.txt"]), ("--temperature", ["--top-k", "3"]),
  ("device NONE cannot be used", ["--device", "NONE"]), ("no such folder", ["--weights", "none"])])
def test_faults(words, argv, capsys):
  assert shard.main([str(ROOT / "examples" / "shapes.png"), "caption en", *argv]) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.startswith("shard: ") and err.count("\n") == 1 and words in err
