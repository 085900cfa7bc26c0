"""Tests of the GPU path on a machine without one: every kernel scheduled and rendered for Metal and CUDA
(gpu_dry_run.py), compiled by NVIDIA's own compiler where that is installed, and the products emulated thread
by thread.
"""
import ctypes
import functools
import glob
import importlib.util
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # vlm.py, wherever this is started from
import gpu_dry_run

# Two layers have all the kernels that 18 or 26 have, one all those of a training step. 448 pixels are more than a CHUNK of queries.
INFERENCE = [("3b",), ("3b", "--bits", "int8", "--batch", "8"), ("2-3b", "--bits", "int4"),
             ("2-3b", "--side", "448")]
EVERY = [*INFERENCE, ("2-3b", "--shard", "2"), ("train",)]


@pytest.fixture(scope="module", autouse=True)
def two_at_a_time(request):
  """What the tests of a whole run want."""
  if len(request.session.items) > 20:
    with ThreadPoolExecutor(2) as pool:
      jobs = [("METAL:Apple7", *what) for what in EVERY[::-1]] + [("CUDA:sm_80", *what) for what in INFERENCE]
      list(pool.map(lambda job: kernels(*job), jobs))


@functools.cache
def kernels(target, *what):
  layers = "1" if what[0] == "train" else "2"
  command = [sys.executable, ROOT / "examples" / "gpu_dry_run.py", target, *what, "--layers", layers]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  *found, last = map(json.loads, done.stdout.splitlines())
  assert len(found) > 30 and last["bytes"] > (1e8 if what[0] != "train" else -1)
  return found


@pytest.mark.long
@pytest.mark.parametrize("what", EVERY, ids=" ".join)
def test_metal(what):
  """On the oldest of Apple's own GPUs, the M1, which has no bfloat16 and, as all of them, no double."""
  for kernel in kernels("METAL:Apple7", *what):
    source, name = kernel["source"], kernel["name"]
    assert "using namespace metal" in source
    assert not re.search(r"\b(double|bfloat)", source), name
    local = kernel["local"] + [1]
    threads = functools.reduce(int.__mul__, local)
    assert threads <= 1024, f"{name}: a threadgroup of {local}"
    shared = sum(4 * int(size) for size in re.findall(r"threadgroup [^;]*?\w+\[(\d+)\];", source))
    assert shared <= 32768, f"{name}: {shared} bytes of threadgroup memory"
    assert len(re.findall(r"\bdevice [\w ]+\* ?data", source)) <= 31, f"{name}: more buffers than Metal takes"


@pytest.mark.long
@pytest.mark.parametrize("target, matrix", [("METAL:Apple7", "simdgroup_multiply_accumulate"),
                                            ("CUDA:sm_80", "f32.bf16.bf16.f32")])
@pytest.mark.parametrize("what", INFERENCE, ids=" ".join)
def test_prefill_is_for_matrix_units_and_decode_for_the_memory(target, matrix, what):
  found = kernels(target, *what)
  # vision: q, k, v and out are one shape, fc1, fc2, projector; Gemma: q, k and v, o, gate and up, down
  assert sum(matrix in k["source"] for k in found) >= 7
  rows = [k for k in found if k["name"].startswith("few_rows")]
  assert len(rows) >= 5  # k and v, q, o, gate and up, down, the head
  for kernel in rows:
    loads = re.findall(r"\(\((?:device )?float4\*\)\(\(data2", kernel["source"])
    side_by_side = loads and kernel["local"][0] >= 8
    assert side_by_side, f"{kernel['name']}: threads do not read side by side, 16 bytes each"


@pytest.mark.long
def test_a_token_is_looked_up_and_chosen_on_the_gpu():
  for kernel in kernels("CUDA:sm_80", "3b"):
    loops = [int(n) for n in re.findall(r"for \(int \w+ = 0; \w+ < (\d+);", kernel["source"])]
    assert functools.reduce(int.__mul__, loops, 1) < 70000, f"{kernel['name']}: loops of one thread: {loops}"


@pytest.mark.long
@pytest.mark.parametrize("size, name", [("3b", "PaliGemma 3B"), ("2-3b", "PaliGemma 2 3B"),
                                        ("2-10b", "PaliGemma 2 10B")])
def test_rows_of_the_table_of_memory(size, name):
  assert gpu_dry_run.memory_row(size, None, 5.9e9) == f"| {name} | bfloat16 | 5.9 | 16 GB |"
  assert gpu_dry_run.memory_row(size, "int4", 1.9e9) == f"| {name} | int4 | 1.9 | 8 GB |"
  assert gpu_dry_run.memory_row(size, "int8", 19e9) == f"| {name} | int8 | 19.0 | more |"


@pytest.mark.parametrize("argv, word", [
  (["METAL:Apple7"], "of what"), (["METAL:Apple7", "5b"], "invalid choice"), (["memory", "3b"], "leave out"),
  (["memory", "--bits", "int8"], "--bits"), (["METAL:Apple7", "train", "--side", "448"], "--side"),
  (["FOO:x", "3b"], "no such device"), (["METAL:Apple7", "3b", "--quick"], "--quick")])
def test_faults(argv, word, tmp_path):
  command = [sys.executable, ROOT / "examples" / "gpu_dry_run.py", *argv]
  done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.startswith("gpu_dry_run: ") and done.stderr.count("\n") == 1 and word in done.stderr


EMULATED = """
import sys
from pathlib import Path
import numpy as np
from tinygrad import Device, TinyJit
from tinygrad.runtime.ops_python import PythonAllocator
import quantize, vlm
rng, device, fast = np.random.default_rng(0), Device.DEFAULT, vlm.kernels
def encode(w, kind):
  if kind == "float16":
    return vlm.upload(w.astype(np.float16), device), w.astype(np.float16).astype(np.float32)
  if kind == "bfloat16":
    bits = (w.view(np.uint32) + 0x8000 >> 16).astype(np.uint16)
    return vlm.upload(bits, device), (bits.astype(np.uint32) << 16).view(np.float32)
  data, scale = quantize.quantize(w, int(kind[3:]))
  # loaded as floats: a GPU moves all bits, but Python's floats change those of some NaNs
  words = data.view(np.uint32)
  words[words & 0x7f800000 == 0x7f800000] &= 0xffffff
  w = fast.Packed(vlm.upload(data, device), vlm.upload(scale.astype(np.float32), device), w.shape)
  return w, w.float().numpy()
def product(kind, I, N, K):
  x = rng.standard_normal((I, K)).astype(np.float32)
  w, exact = encode(rng.standard_normal((N, K)).astype(np.float32), kind)
  return vlm.upload(x, device), w, x @ exact.T
x, w, want = product("bfloat16", 1, 8, 128)
print(1, np.abs(vlm.matmul(x, w).numpy() - want).max() / 128 ** 0.5)  # as CL and WebGPU: no views of a buffer
PythonAllocator._offset = lambda self, buf, size, offset: buf[offset:offset + size]
program = TinyJit(lambda x: vlm.matmul(x, w).realize())
program.cnt = 1
program(x)
path = fast.CACHE / "a.program"
fast.write(path, program, fast.buffers({"w": w}))
x, w, want = product("bfloat16", 1, 8, 128)
again = fast.read(path, fast.buffers({"w": w}))
assert again is not None, "a view of a weight is kept, too"
print(1, np.abs(again(x).numpy() - want).max() / 128 ** 0.5)  # with the weight of its reader
for kind in ("float16", "bfloat16", "int8", "int4"):
  for I, N, K in ((1, 8, 128), (1, 5, 36), (3, 8, 64), (8, 4, 64), (16, 16, 32), (24, 32, 64)):
    x, w, want = product(kind, I, N, K)
    print(I, np.abs(vlm.matmul(x, w).numpy() - want).max() / K ** 0.5)
"""


def emulate(arch, code, folder, *words):
  """-> what code prints on tinygrad's Python device, which plays a GPU: local memory, barriers and tensor cores."""
  path = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
  env = os.environ | {"DEV": f"PYTHON::{arch}", "PYTHONPATH": path, "XDG_CACHE_HOME": str(folder)}
  done = subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True, cwd=folder)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.long
@pytest.mark.parametrize("arch", ["sm_80", "METAL"])
def test_products_emulated(arch, tmp_path):
  errors = [line.split() for line in emulate(arch, EMULATED, tmp_path).splitlines()]
  assert len(errors) == 26
  for rows, error in errors:  # tensor cores take rows of x rounded to bfloat16
    assert float(error) < (1e-6 if int(rows) <= 8 else 0.02)


WHOLE = """
import dataclasses
import re
import sys
import numpy as np
from tinygrad import Device
from tinygrad.runtime.ops_python import PythonAllocator
import golden, quantize, vlm
PythonAllocator._offset = lambda self, buf, size, offset: buf[offset:offset + size]
vlm.kernels.PORTABLE = True
read_config, read_weights = vlm.read_config, vlm.read_weights
def config(path):
  # one layer of each tower, whose kernels are those of all: each is played in half a minute
  c = read_config(path)
  return dataclasses.replace(c, **{tower: dataclasses.replace(getattr(c, tower), num_hidden_layers=1)
                                   for tower in ("vision", "text")})
def weights(folder):
  # some in bfloat16, some in int8, some in int4
  arrays = {}
  for name, w in read_weights(folder).items():
    if re.search(r"layers\\.[1-9]", name):
      continue
    bits = 8 if re.search("fc1|up_proj|q_proj|linear", name) else 4 if re.search("fc2|down_proj|o_proj|k_proj", name) else 16
    if bits == 16 or not re.search(quantize.CHOSEN, name):
      arrays[name] = (w.view(np.uint32) + 0x8000 >> 16).astype(np.uint16)
    else:
      arrays[name], scale = quantize.quantize(w, bits)
      arrays[name + "_scale"] = scale.astype(np.float32)
      words = arrays[name].view(np.uint32)  # see EMULATED
      words[words & 0x7f800000 == 0x7f800000] &= 0xffffff
  return arrays
vlm.read_config, vlm.read_weights = config, weights
picture, _ = golden.pixels(56, 2)
seen = {}
for device in Device.DEFAULT, "CPU":
  m = vlm.load(sys.argv[1], device)
  token, logits, positions, slot = m.prefix([picture], [golden.PROMPTS[0]], 2)
  second, next_logits = m.decode(token, slot, positions)
  seen[device] = [int(token[0]), int(second.numpy()[0])], np.concatenate([logits.numpy(), next_logits.numpy()])
(ours, logits), (right, exact) = seen.values()
print(*ours, *right, np.abs(logits - exact).max() / exact.std())
"""


@pytest.mark.long
@pytest.mark.parametrize("arch", ["sm_80", "METAL"])
def test_a_whole_model_emulated(arch, tmp_path):
  """Vision, prefill and a step of decoding: the tokens of the CPU, which test_vlm.py compares with transformers."""
  *tokens, error = emulate(arch, WHOLE, tmp_path, ROOT / "weights" / "tiny1").split()
  assert tokens[:2] == tokens[2:] and float(error) < 0.1


COMPILED = set()  # (GPU, source)


def nvrtc():
  """-> the folder of NVIDIA's packages from PyPI, nvidia-cuda-nvrtc-cu12 and nvidia-cuda-runtime-cu12, or
  None."""
  spec = importlib.util.find_spec("nvidia")
  for folder in spec.submodule_search_locations if spec else ():
    if glob.glob(f"{folder}/cuda_nvrtc/lib/libnvrtc.so*") and Path(folder, "cuda_runtime").is_dir():
      return folder


# For the newer GPU the smallest: its kernels are the same text.
@pytest.mark.long
@pytest.mark.parametrize("what, arch", [*((what, "sm_80") for what in EVERY), (EVERY[0], "sm_90")], ids=str)
def test_live_compiles_for_cuda(what, arch, monkeypatch):
  folder = nvrtc()
  if not folder and not os.environ.get("VLM_LIVE"):
    pytest.skip("needs nvidia-cuda-nvrtc-cu12 and nvidia-cuda-runtime-cu12: see .ci/run")
  [library] = [f for f in glob.glob(f"{folder}/cuda_nvrtc/lib/libnvrtc.so*") if "alt" not in f]
  [builtins] = [f for f in glob.glob(f"{folder}/cuda_nvrtc/lib/libnvrtc-builtins.so*") if "alt" not in f]
  monkeypatch.setenv("NVRTC_PATH", library)
  monkeypatch.setenv("CUDA_PATH", f"{folder}/cuda_runtime")
  ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)  # else looked for in the system's folders
  from tinygrad.runtime.support import compiler_cuda
  monkeypatch.setattr(compiler_cuda, "CUDA_PATH", f"{folder}/cuda_runtime")
  compiler = compiler_cuda.NVRTCCompiler(arch, ptx=False)
  for kernel in kernels("CUDA:sm_80", *what):  # those of 9.0 differ in 8-bit floats, which are not used
    if (arch, kernel["source"]) not in COMPILED:
      binary = compiler.compile(kernel["source"])  # raises what the compiler says
      assert binary[:4] == b"\x7fELF", kernel["name"]
      COMPILED.add((arch, kernel["source"]))
