"""Tests of --shard: several CPU devices stand for several GPUs, the code is the same."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tinygrad.nn.state import get_state_dict

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import sharding
import vlm

PROMPTS = ["caption en", "detect red circle ; yellow star"]


def answers(model):
  rng = np.random.default_rng(0)
  images = [rng.uniform(-1, 1, (3, *[model.config.image_size] * 2)).astype(np.float32) for _ in PROMPTS]
  return model.logits(images[0], PROMPTS[0]), [a.tokens for a in model.generate(images, PROMPTS, max_tokens=6)]


@pytest.mark.parametrize("name, bits, count", [
  ("tiny1", None, 4), ("tiny2", None, 2), ("tiny1", "int8", 2), ("tiny2", "int4", 2)])
def test_same_tokens_as_one_device(name, bits, count, monkeypatch):
  # without instructions that round to bfloat16, and without the kernels that use them: the order of sums is left
  monkeypatch.setattr(vlm.kernels, "PORTABLE", True)
  monkeypatch.setattr(vlm.compiled, "KEPT", 0)
  folder = ROOT / "weights" / name
  logits, tokens = answers(vlm.load(folder, "CPU", bits=bits))
  split = vlm.load(folder, "CPU", bits=bits, shard=count)
  assert len(split.device) == count
  split_logits, split_tokens = answers(split)
  assert np.abs(split_logits - logits).max() < 1e-3 * logits.std() + 1e-4
  assert split_tokens == tokens


def test_what_divides_is_split():
  """tiny2 has 4 heads and 2 key/value heads."""
  weights = {count: get_state_dict(vlm.load(ROOT / "weights" / "tiny2", "CPU", shard=count).net) for count in (2, 4)}
  layer = "language_model.layers.0."
  split = {name: {count: t[name].uop.axis for count, t in weights.items()} for name in weights[2]}
  assert split[layer + "mlp.gate_proj.weight"] == {2: 0, 4: 0} and split[layer + "mlp.down_proj.weight"] == {2: 1, 4: 1}
  assert split[layer + "self_attn.q_proj.weight"] == split[layer + "self_attn.k_proj.weight"] == {2: 0, 4: None}
  assert split[layer + "self_attn.o_proj.weight"] == {2: 1, 4: None}
  assert split["language_model.embed_tokens.weight"] == {2: 1, 4: 1}
  assert split[layer + "input_layernorm.weight"] == {2: None, 4: None}
  whole = sum(t.nbytes() for t in weights[2].values())
  assert whole / 2 < sharding.memory(weights[2]) < 0.6 * whole


def test_cache_is_split_by_heads():
  model = vlm.load(ROOT / "weights" / "tiny2", "CPU", shard=2)
  cache = vlm.Cache(model.config, 1, 64, model.device)
  assert cache.layers[0][0].uop.axis == 1
  model = vlm.load(ROOT / "weights" / "tiny1", "CPU", shard=2)  # one key/value head
  assert vlm.Cache(model.config, 1, 64, model.device).layers[0][0].uop.axis is None


def test_command_line():
  command = [sys.executable, "vlm.py", "examples/shapes.png", "caption en", "--weights", "weights/toy"]
  command += ["--device", "CPU"]
  one, two = (subprocess.run([*command, "--shard", n], cwd=ROOT, capture_output=True, text=True) for n in ("1", "2"))
  assert two.returncode == 0 and two.stdout == one.stdout and one.stdout
  assert "on each of 2 devices" in two.stderr
  none = subprocess.run([*command, "--shard", "0"], cwd=ROOT, capture_output=True, text=True)
  assert none.returncode == 2 and none.stderr.count("\n") == 1 and "--shard 0" in none.stderr
