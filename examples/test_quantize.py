"""Tests of quantize.py: the arithmetic, and the folders that it writes from the tiny checkpoints."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tinygrad.nn.state import get_state_dict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import checkpoint
import golden
import quantize
import vlm

ROOT = Path(__file__).resolve().parents[1]
TINY, TOY, PROMPT = ROOT / "weights" / "tiny1", ROOT / "weights" / "toy", "caption en"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
  """packed(kind, bits) -> that checkpoint in so many bits, made once."""
  place = tmp_path_factory.mktemp("packed")
  def make(kind, bits):
    folder = place / f"{kind}-{bits}"
    if not folder.exists():
      quantize.save(ROOT / "weights" / kind, folder, bits)
    return folder
  return make


def logits(model):
  return golden.next_logits(model, golden.pixels(model.config.vision.image_size, 1)[0], PROMPT)


# ---- 1. The arithmetic ----


@pytest.mark.parametrize("bits, worst", [(8, 1 / 127 / 2), (4, 1 / 8)])
def test_quantising_loses_at_most_half_a_step(bits, worst):
  """int4: half a step, or one for what lies as far out as the farthest, on the other side of zero."""
  w = np.random.default_rng(0).standard_normal((64, 100)).astype(np.float32)
  w[3], w[5, 40:] = 0, 0
  data, scale = quantize.quantize(w, bits)
  if bits == 8:
    stood_for, largest = data * scale[:, None], np.abs(w).max(1, keepdims=True)
  else:
    numbers = np.stack([data % 16, data // 16], -1).reshape(64, 4, 32).astype(np.float32) - 8
    stood_for = (numbers * scale[..., None]).reshape(64, 128)[:, :100]
    largest = np.repeat(np.abs(np.pad(w, ((0, 0), (0, 28))).reshape(64, 4, 32)).max(2), 32, 1)[:, :100]
  assert (np.abs(stood_for - w) <= largest * worst + 1e-7).all()
  assert np.abs(stood_for - w).max() > 0 and not stood_for[3].any() and not stood_for[5, 40:].any()


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_are_the_whole(bits, monkeypatch):
  """bfloat16 as well; the last block is shorter, and a row may be longer than a block"""
  w = np.random.default_rng(0).integers(0, 0x3f80, (23, 70)).astype(np.uint16)
  whole = quantize.quantize(w, bits)
  for block in (1, 300):
    monkeypatch.setattr(quantize, "BLOCK", block)
    with quantize.ThreadPoolExecutor(2) as pool:
      assert all(map(np.array_equal, quantize.quantize_by_blocks(w, bits, pool), whole))


# Root mean square error of the logits, in their standard deviations. Of a normal weight, int8 rounds off
# about 0.006 and int4 0.08 deviations; thirty matrices follow one another in a tiny model, none trained:
# times 5.5.
WORST = {8: 0.006 * 5.5 * 1.5, 4: 0.08 * 5.5}


@pytest.mark.parametrize("kind", ["tiny1", "tiny2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_logits_of_quantised_weights(kind, bits, packed, monkeypatch):
  """Exactly those of float weights with the values the numbers stand for, near those of the checkpoint"""
  monkeypatch.setattr(vlm.kernels, "PORTABLE", True)
  source = ROOT / "weights" / kind
  few, plain, same = vlm.load(packed(kind, bits)), vlm.load(source), vlm.load(source)
  for path, weight in get_state_dict(same.net).items():
    owner = few.net
    for part in path.split("."):
      owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
    if isinstance(owner, vlm.kernels.Packed):
      weight.replace(owner.float().contiguous().realize())
  got, want, far = map(logits, (few, same, plain))
  # The scale of the text's embedding is rounded to the type of the weights, which is float32 for all of
  # these.
  assert np.abs(got - want).max() < 1e-4 * want.std()
  assert 0 < np.sqrt(np.mean((got - far) ** 2)) / far.std() < WORST[bits]


@pytest.mark.parametrize("kind", ["tiny1", "tiny2"])
@pytest.mark.parametrize("bits, most", [(8, 0.03), (4, 0.055)])
def test_activations_of_8_bits_move_the_logits_little(kind, bits, most, packed, monkeypatch):
  """In standard deviations, root mean square; without such instructions x is rounded to bfloat16."""
  got = logits(vlm.load(packed(kind, bits)))
  monkeypatch.setattr(vlm.kernels, "PORTABLE", True)
  want = logits(vlm.load(packed(kind, bits)))
  assert np.sqrt(np.mean((got - want) ** 2)) / want.std() < most


def test_other_devices_unpack_quantised_weights(packed, monkeypatch):
  monkeypatch.setattr(vlm.kernels, "PORTABLE", True)  # without rounding
  want = logits(vlm.load(packed("tiny1", 4)))
  monkeypatch.setattr(vlm.kernels, "runs_c", lambda device: False)
  got = logits(vlm.load(packed("tiny1", 4)))
  assert np.abs(got - want).max() < 1e-4 * want.std()


# ---- 2. The folders ----


@pytest.mark.parametrize("bits", [8, 4])
def test_what_a_quantised_folder_holds(bits, packed):
  folder, chosen = packed("tiny1", bits), r"(proj|fc1|fc2|linear|embed_tokens)\.weight"
  files = (f / "model.safetensors" for f in (folder, TINY))
  with safe_open(next(files), "numpy") as saved, safe_open(next(files), "numpy") as hub:
    scales = {name for name in saved.keys() if name.endswith("_scale")}
    assert set(map(vlm.canonical, set(saved.keys()) - scales)) == set(map(vlm.canonical, hub.keys()))
    weights = {name.removesuffix("_scale") for name in scales}
    assert not any(re.search("norm|bias|position|patch_embedding", name) for name in weights)
    assert len(weights) == sum(bool(re.search(chosen, name)) for name in hub.keys())
    kinds = {name: saved.get_tensor(name).dtype for name in weights}
  for name, kind in kinds.items():
    assert kind == (np.int8 if bits == 8 or "embed_tokens" in name else np.uint8)
  config = json.loads((folder / "config.json").read_text())
  assert config.pop("quantization_config") == {"quant_method": "vlm.py", "weights": f"int{bits}"}
  assert config == json.loads((TINY / "config.json").read_text())
  assert vlm.read_config(folder / "config.json") == vlm.read_config(TINY / "config.json")
  assert (folder / "tokenizer.model").read_bytes() == (TINY / "tokenizer.model").read_bytes()
  arrays, source = vlm.read_weights(folder), vlm.read_weights(TINY)
  for name, array in source.items():
    if name + "_scale" in arrays:
      right = quantize.quantize(array, 8 if "embed_tokens" in name else bits)
      assert np.array_equal(arrays[name], right[0]) and np.array_equal(arrays[name + "_scale"], right[1])
    else:
      assert np.array_equal(arrays[name], array) and arrays[name].dtype == array.dtype


def start(*argv, cwd):
  command = [sys.executable, ROOT / "examples/quantize.py", *map(str, argv)]
  return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_command_line(tmp_path):
  """by the name of a folder of weights/, from another folder; with the decoder of its masks"""
  done = start("toy", "q", "--bits", "8", cwd=tmp_path)
  assert (done.returncode, done.stdout) == (0, "") and re.fullmatch(r"q: 0.0\d+ GB in 8 bits\n", done.stderr)
  names = ["config.json", "model.safetensors", "tokenizer.model", "vae-oid.npz"]
  assert sorted(file.name for file in (tmp_path / "q").iterdir()) == names
  assert (tmp_path / "q" / "vae-oid.npz").read_bytes() == (TOY / "vae-oid.npz").read_bytes()
  [answer] = vlm.load(tmp_path / "q").generate([ROOT / "examples" / "shapes.png"], [PROMPT])
  assert answer.text == "a green triangle, a red circle and a yellow star"
  done = start(TINY, "quiet", "--bits", "4", "--quiet", cwd=tmp_path)
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def fault(capsys):
  """fault(*argv) -> the one line that quantize.py says about a mistake."""
  def run(*argv):
    code, (out, err) = quantize.main([*map(str, argv)]), capsys.readouterr()
    assert code in (1, 2) and out == "" and err.startswith("quantize: ") and err.count("\n") == 1
    return err
  return run


def test_faults(tmp_path, packed, fault):
  new, done = tmp_path / "new", tmp_path / "done"
  shutil.copytree(packed("tiny1", 8), done)
  before = {file: file.read_bytes() for file in done.iterdir()}
  assert "--bits" in fault(TINY, new) and "--bits" in fault(TINY, new, "--bits", 3)
  assert "--device" in fault(TINY, new, "--bits", 4, "--device", "CPU")
  assert "would be lost" in fault(TINY, done, "--bits", 4)
  assert "quantised already" in fault(done, new, "--bits", 8)
  assert "config.json" in fault(tmp_path, new, "--bits", 8)
  assert "no such folder" in fault(tmp_path / "none", new, "--bits", 8)
  (tmp_path / "file").write_text("mine")
  assert "file" in fault(TINY, tmp_path / "file", "--bits", 8)
  for name in ("config.json", "tokenizer.model", "vae-oid.npz", "model.safetensors.index.json"):
    mine = tmp_path / name.replace(".", "-")
    mine.mkdir()
    (mine / name).write_text("mine")
    assert name in fault(TINY, mine, "--bits", 8)
    assert [file.name for file in mine.iterdir()] == [name] and (mine / name).read_text() == "mine"
  assert before == {file: file.read_bytes() for file in done.iterdir()} and not new.exists()


def test_nothing_is_left_of_what_fails(tmp_path, fault, monkeypatch):
  new, there = tmp_path / "new", tmp_path / "there"
  there.mkdir()
  (there / "notes.txt").write_text("mine")
  usage = shutil.disk_usage(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    assert "too full" in fault(TINY, new, "--bits", 8)
  def full(path, pieces, write=checkpoint.write_file):
    if path.name == "config.json":
      raise OSError(28, "No space left on device")
    write(path, pieces)
  monkeypatch.setattr(checkpoint, "write_file", full)
  for folder in (new, there):
    assert "No space left" in fault(TOY, folder, "--bits", 8)
  assert not new.exists() and [file.name for file in there.iterdir()] == ["notes.txt"]


def test_a_scale_that_is_missing_or_of_another_shape(tmp_path, packed):
  tensors = load_file(packed("tiny1", 8) / "model.safetensors")
  scale = next(name for name in tensors if name.endswith("_scale"))
  for damaged in (None, tensors[scale][:-1]):
    shutil.copytree(packed("tiny1", 8), tmp_path / "q", dirs_exist_ok=True)
    changed = {name: t for name, t in (tensors | {scale: damaged}).items() if t is not None}
    save_file(changed, tmp_path / "q" / "model.safetensors")
    with pytest.raises(vlm.Fault, match="scale"):
      vlm.load(tmp_path / "q")
