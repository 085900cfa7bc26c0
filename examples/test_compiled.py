"""Tests of compiled.py (programs kept on disk) and quantize.py (weights in 8 and 4 bits), on the tiny checkpoints."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import compiled
import golden
import quantize
import vlm

TINY = ROOT / "weights" / "tiny1"
PROMPT = "caption en"


@pytest.fixture
def kept(tmp_path, monkeypatch):
  """A folder of programs of its own."""
  monkeypatch.setattr(compiled, "CACHE", tmp_path / "programs")
  monkeypatch.setattr(compiled, "KEPT", 100)
  return tmp_path / "programs"


def picture(model):
  return golden.pixels(model.config.image_size, 1)[0]


def answer(model):
  [a] = model.generate([picture(model)], [PROMPT], max_tokens=6)
  return a.tokens, model.logits(picture(model), PROMPT)




# ---- Programs on disk ----


def test_another_process_captures_nothing(kept):
  """It answers as the first one did, although its TinyJit cannot be called to capture."""
  code = """
import json, sys
sys.path[:0] = ["examples"]
import compiled, golden, vlm
if sys.argv[1] == "again":
  def refuse(function):
    raise SystemExit("captured again")
  vlm.TinyJit = refuse
m = vlm.load("weights/tiny1")
[a] = m.generate([golden.pixels(m.config.image_size, 1)[0]], ["caption en"], max_tokens=6)
print(json.dumps([a.tokens, m.logits(golden.pixels(m.config.image_size, 1)[0], "caption en").tolist()]))
"""
  env = os.environ | {"XDG_CACHE_HOME": str(kept)}
  first, second = (json.loads(subprocess.run([sys.executable, "-c", code, which], env=env, cwd=ROOT, check=True,
                                             capture_output=True, text=True).stdout) for which in ("first", "again"))
  assert first == second and len(first[0]) == 6
  files = list(kept.glob("vlm/*.program"))
  assert len(files) >= 3
  assert max(f.stat().st_size for f in files) < 600_000, "no weights, no scratch memory"


def test_programs_work_on_the_weights_of_their_reader(kept):
  first = vlm.load(TINY)
  before = answer(first)
  other = vlm.load(TINY)
  for name, t in get_state_dict(other.net).items():
    if "mlp" in name and t.ndim == 2:
      t.replace((vlm.widen(t) * 1.5).contiguous().realize())
  programs = len(list(kept.glob("*.program")))
  tokens, logits = answer(other)
  assert len(list(kept.glob("*.program"))) == programs, "nothing new was captured"
  compiled.KEPT = 0
  fresh = vlm.load(TINY)
  for name, t in get_state_dict(fresh.net).items():
    t.replace(get_state_dict(other.net)[name])
  assert np.array_equal(answer(fresh)[1], logits) and answer(fresh)[0] == tokens
  assert not np.allclose(before[1], logits), "the other weights count"
  assert np.array_equal(answer(first)[1], before[1]), "and the first model's are its own"


def test_reading_shares_no_buffer_with_others(kept):
  """Numbers of buffers are counted anew in each process: what a file says must not meet a live buffer's."""
  answer(vlm.load(TINY))
  alive = [Tensor.full((n,), 7.0).contiguous().realize() for n in range(1, 400)]
  answer(vlm.load(TINY))
  assert all((t.numpy() == 7).all() for t in alive)


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_file_is_replaced(kept, damage):
  want = answer(vlm.load(TINY))
  files = {f: f.read_bytes() for f in kept.glob("*.program")}
  for f, data in files.items():
    f.write_bytes(data[:len(data) // 2] if damage is None else damage)
  tokens, logits = answer(vlm.load(TINY))
  assert tokens == want[0] and np.array_equal(logits, want[1])
  assert all(f.stat().st_size > len(data) / 2 for f, data in files.items())


def test_no_folder_for_programs(kept):
  kept.write_text("a file is in the way")
  tokens, _ = answer(vlm.load(TINY))
  assert len(tokens) == 6 and kept.read_text() == "a file is in the way"


def test_whatever_shapes_a_program_is_in_its_name():
  weights = {"a": Tensor.empty(3, 4), "b": Tensor.empty(2)}
  name = lambda *parts, tensors=weights: compiled.place("CPU", *parts, tensors).name
  others = [name("x", 2), name("y", 1), name("x", 1, tensors={"a": Tensor.empty(4, 3), "b": Tensor.empty(2)}),
            name("x", 1, tensors={"a": Tensor.empty(3, 4).half(), "b": Tensor.empty(2)}),
            name("x", 1, tensors={"c": Tensor.empty(3, 4), "b": Tensor.empty(2)})]
  assert len({name("x", 1), *others}) == 6 and name("x", 1) == name("x", 1)


def test_only_the_newest_files_stay(kept, monkeypatch):
  monkeypatch.setattr(compiled, "KEPT", 2)
  kept.mkdir()
  for i in range(4):
    (kept / f"{i}.program").touch()
    os.utime(kept / f"{i}.program", (i, i))
  answer(vlm.load(TINY))
  assert len(list(kept.glob("*.program"))) == 2 and not list(kept.glob("[0-3].program"))
  assert [f for f in kept.iterdir() if f.suffix != ".program"] == []


def test_two_processes_at_once(tmp_path):
  """Both compile, both write, neither reads half a file."""
  command = [sys.executable, "vlm.py", "examples/shapes.png", PROMPT, "--weights", "weights/tiny1", "--max-tokens", "6",
             "--json"]
  env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
  runs = [subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
  answers = [json.loads(run.communicate()[0])["tokens"] for run in runs]
  assert answers[0] == answers[1] and all(run.returncode == 0 for run in runs)
  assert {f.suffix for f in (tmp_path / "vlm").iterdir()} <= {".program", ""}


@pytest.mark.parametrize("device", ["CPU:LLVM", "CPU:X86"])
def test_other_compilers_answer_the_same(device, tmp_path):
  command = [sys.executable, "vlm.py", "examples/shapes.png", PROMPT, "--weights", "weights/tiny1", "--max-tokens", "6",
             "--json", "--quiet"]
  runs = {dev: subprocess.run(command, cwd=ROOT, env=os.environ | {"DEV": dev, "XDG_CACHE_HOME": str(tmp_path)},
                              capture_output=True, text=True) for dev in ("CPU", device)}
  if "cannot be used here" in runs[device].stderr:
    pytest.skip(f"{device} is not to be had here")
  assert len({json.dumps(json.loads(run.stdout)["tokens"]) for run in runs.values()}) == 1


# ---- Quantised weights ----

# Root mean square error of the logits, in their standard deviations. Of a normal weight, int8 rounds off about 0.006
# and int4 0.08 deviations; some thirty matrices follow one another in a tiny model, none of them trained: times 5.5.
WORST = {"int8": 0.006 * 5.5 * 1.5, "int4": 0.08 * 5.5}


@pytest.mark.parametrize("kind", ["tiny1", "tiny2"])
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_logits_of_quantised_weights(kind, bits, monkeypatch):
  """Exactly those of float weights with the values that the numbers stand for; near those of the checkpoint."""
  monkeypatch.setattr(vlm.kernels, "PORTABLE", True)
  folder = ROOT / "weights" / kind
  packed, plain, same = vlm.load(folder, bits=bits), vlm.load(folder), vlm.load(folder)
  for path, weight in get_state_dict(same.net).items():
    owner = packed.net
    for part in path.split("."):
      owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
    if isinstance(owner, vlm.quantize.Packed):
      weight.replace(vlm.widen(owner).contiguous().realize())
  got, want, far = (m.logits(picture(m), PROMPT) for m in (packed, same, plain))
  # The scale of the text's embedding is rounded to the type of the weights, which is float32 for both of these.
  assert np.abs(got - want).max() < 1e-4 * want.std()
  assert 0 < np.sqrt(np.mean((got - far) ** 2)) / far.std() < WORST[bits]


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_quantised_folder_is_loaded_as_it_was_saved(bits, tmp_path, capsys):
  assert vlm.main(["--weights", str(TINY), "--quantize", bits, "--save", str(tmp_path / "q"), "--max-tokens", "4",
                   "--json", str(ROOT / "examples" / "shapes.png"), PROMPT]) == 0
  first = json.loads(capsys.readouterr().out)
  assert vlm.main(["--weights", str(tmp_path / "q"), "--max-tokens", "4", "--json",
                   str(ROOT / "examples" / "shapes.png"), PROMPT]) == 0
  assert json.loads(capsys.readouterr().out)["tokens"] == first["tokens"]
  a, b = vlm.load(TINY, bits=bits), vlm.load(tmp_path / "q")
  assert np.array_equal(a.logits(picture(a), PROMPT), b.logits(picture(b), PROMPT))
  quantised, original = (f / "model.safetensors" for f in (tmp_path / "q", TINY))
  with safe_open(quantised, "numpy") as saved, safe_open(original, "numpy") as hub:
    scales = {n for n in saved.keys() if n.endswith("_scale")}
    assert {vlm.canonical(n) for n in set(saved.keys()) - scales} == {vlm.canonical(n) for n in hub.keys()}
    chosen = {n.removesuffix("_scale") for n in scales}
    assert not any("norm" in n or "bias" in n or "position" in n or "patch_embedding" in n for n in chosen)
    assert len(chosen) == sum(n.endswith(("proj.weight", "fc1.weight", "fc2.weight", "linear.weight",
                                           "embed_tokens.weight")) for n in hub.keys())
    kinds = {n: saved.get_tensor(n).dtype for n in chosen}
    assert all(kind == (np.int8 if bits == "int8" or "embed_tokens" in n else np.uint8) for n, kind in kinds.items())


def test_other_devices_widen_quantised_weights(monkeypatch):
  want = vlm.load(TINY, bits="int4")
  want = want.logits(picture(want), PROMPT)
  monkeypatch.setattr(compiled, "in_c", lambda device: False)
  got = vlm.load(TINY, bits="int4")
  assert np.abs(got.logits(picture(got), PROMPT) - want).max() < 0.05 * want.std()  # without bfloat16 rounding


def quantised(folder):
  assert vlm.main(["--weights", str(TINY), "--quantize", "int8", "--save", str(folder), "--quiet",
                   "--max-tokens", "1", str(ROOT / "examples" / "shapes.png"), PROMPT]) == 0


def fault(capsys, *argv):
  code, message = vlm.main(list(argv)), capsys.readouterr().err.strip()
  assert code != 0 and message.startswith("vlm: ") and "\n" not in message
  return message


def test_faults_of_quantising(tmp_path, capsys):
  picture = str(ROOT / "examples" / "shapes.png")
  assert "--save goes with" in fault(capsys, picture, PROMPT, "--save", str(tmp_path / "q"))
  assert "--quantize" in fault(capsys, picture, PROMPT, "--quantize", "int3")
  assert "leave out --train" in fault(capsys, "--train", "--quantize", "int8")
  quantised(tmp_path / "q")
  capsys.readouterr()
  before = {f: f.read_bytes() for f in (tmp_path / "q").iterdir()}
  assert "would be lost" in fault(capsys, "--weights", str(TINY), "--quantize", "int4", "--save", str(tmp_path / "q"),
                                  picture, PROMPT, "--quiet")
  assert "quantised already" in fault(capsys, "--weights", str(tmp_path / "q"), "--quantize", "int8", picture, PROMPT)
  assert "is quantised" in fault(capsys, "--train", "--init", str(tmp_path / "q"), "--save", str(tmp_path / "t"))
  assert before == {f: f.read_bytes() for f in (tmp_path / "q").iterdir()} and not (tmp_path / "t").exists()


def test_a_scale_that_is_missing_or_of_another_shape(tmp_path, capsys):
  from safetensors.numpy import load_file, save_file
  quantised(tmp_path / "q")
  capsys.readouterr()
  tensors = load_file(tmp_path / "q" / "model.safetensors")
  scale = next(n for n in tensors if n.endswith("_scale"))
  for damaged in (None, tensors[scale][:-1]):
    changed = {n: t for n, t in tensors.items() if n != scale} | ({} if damaged is None else {scale: damaged})
    save_file(changed, tmp_path / "q" / "model.safetensors")
    assert "_scale" in fault(capsys, "--weights", str(tmp_path / "q"), str(ROOT / "examples" / "shapes.png"), PROMPT)
