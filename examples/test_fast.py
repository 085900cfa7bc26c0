"""Tests of fast.py and fast.c: every kernel beside the plain body of its operation in vlm.py and beside
numpy, and the programs kept on disk.
"""
import functools
import hashlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Device, Tensor, TinyJit, dtypes
from tinygrad.helpers import DEV
from tinygrad.nn import optim
from tinygrad.nn.state import get_state_dict

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # vlm.py, wherever this is started from
import golden
import vlm

fast = vlm.kernels
in_c = pytest.mark.skipif(not fast.runs_c(vlm.open_device("CPU")), reason="no C compiler")
KINDS = ["float32", "float16", "bfloat16", "int8", "int4"]
# DEV=CPU::x86_64,haswell compiles for a processor without AVX-512
INTEGER = fast.runs_c("CPU") and "avx512_vnni" in str(fast.processor()) and not DEV.arch
BFLOAT16 = fast.runs_c("CPU") and "avx512_bf16" in str(fast.processor()) and not DEV.arch
SHAPES = [  # rows, outputs, inputs: multiples of a vector, a tile, a panel, and numbers that are none
  (1, 1, 1), (1, 16, 32), (1, 33, 7), (1, 97, 4304), (1, 1000, 2050), (2, 17, 7), (3, 64, 4304), (4, 5, 1151),
  (5, 33, 64), (8, 40, 33), (9, 40, 33), (12, 37, 100), (13, 1, 100), (25, 31, 40), (30, 70, 1151),
  (40, 100, 4304), (261, 31, 257), (264, 200, 96), (300, 7, 31), (300, 129, 1100), (300, 150, 95)]


def normal(*shape, seed=0):
  return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def tensor(array):
  return Tensor(array, device="CPU").realize()


def encode(w, kind):
  """-> w as the kernel's argument, and the numbers that it stands for, worked out without the code under
  test."""
  if kind == "float32":
    return tensor(w), w
  if kind == "float16":
    return tensor(w.astype(np.float16)), w.astype(np.float16).astype(np.float32)
  if kind == "bfloat16":
    bits = (w.view(np.uint32) + 0x8000 >> 16).astype(np.uint16)
    return tensor(bits), (bits.astype(np.uint32) << 16).view(np.float32)
  if kind == "int8":
    scale = np.abs(w).max(1) / 127
    data = np.rint(w / scale[:, None]).astype(np.int8)
    return fast.Packed(tensor(data), tensor(scale), w.shape), data * scale[:, None]
  groups = np.pad(w, ((0, 0), (0, -w.shape[1] % 32))).reshape(len(w), -1, 32)
  scale = np.abs(groups).max(2) / 7
  numbers = np.rint(groups / scale[..., None])
  stored = (numbers + 8).astype(np.uint8).reshape(len(w), -1)
  packed = fast.Packed(tensor(stored[:, ::2] | stored[:, 1::2] << 4), tensor(scale), w.shape)
  return packed, (numbers * scale[..., None]).reshape(len(w), -1)[:, :w.shape[1]]


def error(out, x, w):
  """Largest error, in standard deviations of the result: of normal x and w, sqrt(inputs)."""
  return np.abs(out.numpy() - x.astype(np.float64) @ w.T.astype(np.float64)).max() / x.shape[-1] ** 0.5


def limit(kind):
  """Rounding x to bfloat16 is up to 2^-9 an element; all else is float32's own rounding."""
  return 5e-6 if kind in ("float32", "float16") or fast.PORTABLE else 0.02


def as_bfloat16(a):
  bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
  return (bits + 0x7fff + (bits >> 16 & 1) & 0xffff0000).astype(np.uint32).view(np.float32)


def rounded(x, w, exact):
  """What the product with an integer weight computes of x and w where it multiplies in 8 bits."""
  x, exact, tables = x.copy(), exact.copy(), w.scale.numpy()
  width = 512 if w.dtype == dtypes.int8 else 256
  for k in range(0, x.shape[1], width):
    part, those = x[:, k:k + width], exact[:, k:k + width]
    top = np.abs(part).max(1, keepdims=True)
    numbers = part * np.where(top, np.float32(127) / np.where(top, top, 1), 0).astype(np.float32)
    part[:] = np.trunc(numbers + np.copysign(np.float32(0.5), numbers)) * (top / 127)
    if w.dtype == dtypes.uint8 and len(x) > 8:  # of which a row has one scale, too
      scale = np.repeat(tables[:, k // 32:k // 32 + 8], 32, 1)[:, :those.shape[1]]
      most = np.abs(scale).max(1, keepdims=True) * np.float32(8 / 127)
      fours = np.rint(those / np.where(scale, scale, 1)).astype(np.float64)  # multiplied and added, rounded once
      ratio = np.where(most, scale / np.where(most, most, 1), np.float32(0))
      those[:] = (np.trunc((fours * ratio + 128.5).astype(np.float32)) - 128) * most
  return x, exact


def is_right(out, x, w, exact, kind):
  """Whether out is x times w, which stands for `exact`, but for the rounding of its kind."""
  if "int" in kind and INTEGER and not fast.PORTABLE:
    return error(out, *rounded(x, w, exact)) < 1e-5
  return error(out, x, exact) < limit(kind)


# ---- Kernels beside the plain bodies ----
# (operation, arguments): a shape stands for a tensor of normal numbers, (kind, shape) for a weight.
MASK = np.random.default_rng(0).random((2, 1, 1, 1, 70)) < 0.5
EVERYTHING = np.ones((3, 1, 1, 1, 33), bool)
TRIANGLE = np.tril(np.ones((2, 1, 1, 19, 70), bool), 51)
IDS = np.array([[3, 49, 0], [3, 7, 11]], np.int32)
CASES = [
  *[("matmul", (M, K), (kind, (N, K))) for kind in KINDS for M, N, K in (
    (1, 33, 7), (1, 97, 430), (5, 31, 100), (9, 1, 33), (40, 21, 261))],
  *[("matmul", (2, 3, 70), (kind, (33, 70))) for kind in KINDS],  # more rows of one product
  ("matmul", (7, 40), ("float32", (40, 21)), False),
  ("matmul", (3, 7, 20), ("float32", (3, 35, 20))), ("matmul", (2, 3, 7, 20), ("float32", (2, 3, 35, 20))),
  ("matmul", (3, 7, 20), ("float32", (3, 20, 35)), False),
  ("matmul", (2, 3, 7, 20), ("float32", (2, 3, 20, 35)), False),
  *[("rows", (kind, (50, 70)), IDS) for kind in KINDS],
  *[("attention", (2, 8, 1, 32), (2, heads, 70, 32), (2, heads, 70, 32), 32 ** -0.5, MASK, cap)
    for heads in (1, 4, 8) for cap in (0.0, 5.0)],
  ("attention", (3, 6, 1, 7), (3, 2, 33, 7), (3, 2, 33, 7), 0.5, EVERYTHING),
  *[("attention", (2, 8, 19, 32), (2, heads, 70, 32), (2, heads, 70, 32), 32 ** -0.5, *more)
    for heads in (1, 4, 8) for more in ((), (MASK, 5.0), (TRIANGLE,))],
  ("attention", (3, 6, 2, 7), (3, 2, 33, 7), (3, 2, 33, 7), 0.5, EVERYTHING),
  *[("layer_norm", (2, 3, width), (kind, (width,)), (kind, (width,)), 1e-6)
    for kind in KINDS[:3] for width in (7, 33, 1152)],
  *[("rms_norm", (2, 3, width), (kind, (width,)), 1e-3) for kind in KINDS[:3] for width in (1, 33, 1152)],
  *[("soft_cap", shape, *more) for shape in ((1, 1), (3, 70)) for more in ((30.0,), (5.0, 20.0))],
  *[("gelu", *[shape] * n) for shape in ((1, 1), (2, 3, 16), (5, 33)) for n in (1, 2)],
  *[("likeliest", shape) for shape in ((1, 1), (3, 4097), (2, 1536))],
  ("likeliest", np.float32([[3, 1, math.nan], [-math.inf, -math.inf, -9], [2, 7, 7]]))]
# The rest of what fast.py has: how tensors, devices and programs are made, see below.
OTHERS = {"upload", "open_device", "capture", "through"}


def argument(what, seed):
  if isinstance(what, np.ndarray):
    return tensor(what)
  if isinstance(what, tuple) and isinstance(what[0], str):
    return encode(normal(*what[1], seed=seed), what[0])[0]
  return tensor(normal(*what, seed=seed)) if isinstance(what, tuple) else what


def name_of(case):
  return "-".join(str(part) for part in case if not isinstance(part, np.ndarray)).replace(" ", "")


@in_c
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_kernel_is_the_plain_body(case, monkeypatch):
  name, *arguments = case
  arguments = [argument(what, seed) for seed, what in enumerate(arguments)]
  with monkeypatch.context() as plainly:
    plainly.setattr(fast, "runs_c", lambda device: False)
    assert name == "likeliest" or getattr(fast, name)(*arguments) is None
    want = getattr(vlm, name).__wrapped__(*arguments).numpy()
  most = 0.05 if "int" in str(case) else 0.03  # x in 8 bits, or in bfloat16
  rounds = any(kind in str(case) for kind in KINDS[2:]) and name == "matmul"
  exact = 0.01 if name == "rows" and "int" in str(case) else 1e-5  # such rows pass through bfloat16
  for portable in (True, False):
    monkeypatch.setattr(fast, "PORTABLE", portable)
    out = getattr(fast, name)(*arguments)
    assert out is not None and out.shape == want.shape and out.dtype == Tensor(want).dtype
    assert np.abs(out.numpy() - want).max() / max(1, want.std()) < (exact if portable or not rounds else most)


def test_threads_compile(tmp_path):
  """what no thread has before, each by itself and with the cache of compiled kernels"""
  code = f"""
import sys
sys.path[:0] = {str(ROOT)!r}, {str(ROOT / "examples")!r}
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
import numpy as np
import vlm
vlm.open_device("CPU")
def compile(n):
  return int((vlm.upload(np.arange(n, dtype=np.float32), "CPU") * n + 1).numpy().sum())
print(compile(3))
def work():
  with ThreadPoolExecutor(1) as pool:
    print(*pool.map(compile, (4, 5)))
thread = Thread(target=work)
thread.start()
thread.join()
print(compile(6))
"""
  for _ in range(2):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)})
    assert done.stdout.split() == ["12", "28", "55", "96"], done.stderr
  assert next(tmp_path.rglob("*.db")).stat().st_size > 0


def test_a_model_may_be_freed_on_a_thread_of_tinygrads():
  """where the garbage collector may run at any moment, and finds models that hold themselves"""
  code = f"""
import gc, sys
sys.path[:0] = {str(ROOT)!r}, {str(ROOT / "examples")!r}
import golden, vlm
picture, = golden.pixels(56, 1)
gc.disable()
for _ in range(4):
  m = vlm.load({str(TINY)!r}, "CPU")
  m.itself = m
  gc.set_threshold(1, 1, 1)
  gc.enable()
  print(m.generate([picture], ["caption en"], max_tokens=6)[0].tokens)
  gc.disable()
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  answers = done.stdout.splitlines()
  assert done.returncode == 0 and len(answers) == 4 and len(set(answers)) == 1, done.stderr


@in_c
@pytest.mark.parametrize("device", ["in C", "elsewhere"])
def test_adamw_is_tinygrads(device, monkeypatch):
  """Captured at its first step, of which the second reads the moments that the first wrote."""
  if device == "elsewhere":
    monkeypatch.setattr(fast, "runs_c", lambda device: False)
  shapes, settings = ((7,), (33, 5), (1, 1), (130, 70)), dict(lr=.01, b1=.8, b2=.95, weight_decay=.1)
  weights = [[tensor(normal(*shape, seed=1)).is_param_() for shape in shapes] for _ in range(2)]
  ours, theirs = fast.AdamW(weights[0], **settings), optim.AdamW(weights[1], **settings)
  def step(*gradients):
    for weight, gradient in zip(weights[0], gradients):
      weight.grad = gradient * 2
    return Tensor.realize(*ours.schedule_step())
  step = TinyJit(step)
  step.cnt = 1
  with vlm.kernels.train():
    for i in range(4):
      gradients = [normal(*shape, seed=10 + i) for shape in shapes]
      step(*map(tensor, gradients))
      for weight, gradient in zip(weights[1], gradients):
        weight.grad = tensor(gradient * 2)
      theirs.step()
  for a, b in zip(weights[0] + ours.m + ours.v, weights[1] + theirs.m + theirs.v):
    assert np.abs(a.numpy() - b.numpy()).max() < 1e-6


def test_every_operation_has_its_case():
  operations = {name for name, f in vars(vlm).items() if getattr(f, "__code__", None) is vlm.matmul.__code__}
  assert operations == {case[0] for case in CASES} | OTHERS
  assert all(callable(getattr(fast, name)) for name in operations), "none is decorated in vain"


@pytest.mark.parametrize("kind", ["float32", "float16", "uint16", "int8", "uint8", "int32", "bool"])
def test_tensors_are_made_as_plainly(kind):
  array = normal(3, 7).astype(kind)
  for t in (vlm.upload.__wrapped__(array, "CPU"), fast.upload(array, "CPU"),
            fast.upload(array, "CPU", "a.bias"),
            fast.upload(array, ("CPU", "CPU:1"))):
    assert t.dtype == Tensor(array).dtype and np.array_equal(t.numpy(), array)


def test_what_is_used_where_it_lies(monkeypatch):
  memory = np.zeros(4096, np.uint8)
  start = -memory.ctypes.data % 64
  aligned, odd = (memory[start + by:][:480].view(np.uint16).reshape(8, 30) for by in (0, 2))

  def mapped(array, name="a.weight"):
    t = fast.upload(array, "CPU", name)
    memory[:] ^= 1
    return np.array_equal(t.numpy(), array)  # a copy is what the memory was
  assert mapped(aligned) and mapped(odd) == fast.runs_c("CPU")
  assert not mapped(odd, "position_embedding.weight") and not mapped(odd[0], "a.bias"), "tinygrad reads these"
  assert not mapped(aligned, None), "what has no name is not the model's to keep"
  monkeypatch.setattr(fast, "runs_c", lambda device: False)
  assert mapped(aligned) and not mapped(odd)


def test_quantised_weights_find_their_scales():
  shapes = dict.fromkeys("ab", (5, 40))
  int8, int4 = np.zeros((5, 40), np.int8), np.zeros((5, 32), np.uint8)
  row, groups = np.ones(5, np.float32), np.ones((5, 2), np.float32)
  joined = fast.join_scales({"a": int8, "a_scale": row, "b": int4, "b_scale": groups, "c": row}, shapes)
  assert {name: type(array) for name, array in joined.items()} == {
    "a": fast.Packed, "b": fast.Packed, "c": np.ndarray}
  assert joined["a"].shape == joined["b"].shape == joined["b"].flatten(1).shape == (5, 40)
  assert fast.upload(joined["b"], "CPU", "b").float().numpy().shape == (5, 40)
  for scale in ({}, {"a_scale": groups}, {"a_scale": row.astype(np.float64)}, {"a_scale": row[1:]}):
    with pytest.raises(vlm.Fault, match="a is quantised"):
      fast.join_scales({"a": int8} | scale, shapes)


def test_devices_and_programs_are_as_plainly():
  assert fast.open_device("CPU") is None and vlm.open_device("CPU") == vlm.open_device.__wrapped__("CPU") == "CPU"
  w = tensor(normal(3, 4))
  for capture in vlm.capture, vlm.capture.__wrapped__:
    program = capture(lambda x: (x * w).realize(), "CPU")
    for seed in range(3):
      x = normal(3, 4, seed=seed)
      assert np.allclose(program(tensor(x)).numpy(), x * w.numpy())


# ---- NEON, emulated ----
# A kernel becomes a program for Apple's M1 that reads all its arguments from one file and writes them to another.
PROGRAM = """
static long system(long number, long a, long b, long c) {
  register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
  __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
  return x0;
}
static char memory[SIZE] __attribute__((aligned(64)));
void _start(void) {
  static const long at[] = {PLACES};
  void *p[sizeof(at) / 8];
  for (int i = 0; i < sizeof(at) / 8; i++) p[i] = memory + at[i];
  for (long n = 0, got; n < SIZE && (got = system(63, 0, (long)memory + n, SIZE - n)) > 0; ) n += got;
  for (int core = CORES; core--; ) run(p, core);
  for (long n = 0; n < SIZE; ) n += system(64, 1, (long)memory + n, SIZE - n);
  system(93, 0, 0, 0);
}
"""


def by_qemu(folder, out, *others, fxn, **options):
  """In the place of fast.custom_kernel: also that nothing is written but the results."""
  name, source, _, outs = fxn.args
  tensors = [out, *others[:-1]]  # the last are the threads
  arrays = [np.zeros(t.shape, np.dtype(t.dtype.fmt)) if i < outs else t.numpy() for i, t in enumerate(tensors)]
  places, end = [], 64
  for i, array in enumerate(arrays):
    places.append(end + i)  # one is aligned, the others are not
    end += -(-array.nbytes // 64) * 64 + 64
  memory = np.full(end, 255, np.uint8)  # NaN, or the largest number
  for place, array in zip(places, arrays):
    memory[place:place + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  before, program, built = memory.tobytes(), folder / "kernel", folder / "kernel.o"
  known = f"#define SIZE {end}L\n#define PLACES {', '.join(map(str, places))}\n"
  compiler = type(Device["CPU"].renderer.compiler)(["arm64", "apple-m1"])
  compile = getattr(compiler, "compile_to_obj", compiler.compile)  # the first in tinygrad 0.13
  built.write_bytes(compile(known + source + PROGRAM))
  import ziglang
  zig = Path(ziglang.__file__).with_name("zig")
  subprocess.run([zig, "ld.lld", built, "-o", program], check=True)
  after = subprocess.run(["qemu-aarch64", program], input=before, stdout=subprocess.PIPE, check=True, timeout=60).stdout
  kept, results = bytearray(before), []
  for place, array in zip(places, arrays[:outs]):
    results.append(np.frombuffer(after, array.dtype, array.size, place).reshape(array.shape).copy())
    kept[place:place + array.nbytes] = after[place:place + array.nbytes]
  assert kept == after, f"{name} writes where it should not"
  return tensor(results[0])


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("qemu-aarch64"), reason="no qemu-aarch64, of Debian's package qemu-user")
def test_kernels_for_neon(tmp_path, monkeypatch):
  """All in one test, which takes half a minute."""
  monkeypatch.setattr(fast, "custom_kernel", functools.partial(by_qemu, tmp_path))
  monkeypatch.setattr(fast, "SHARED", 0)  # so that the work is shared
  monkeypatch.setattr(fast, "THREADS", 3)
  for name, *shapes in CASES:
    if name == "likeliest":  # is no kernel in C
      continue
    arguments = [argument(what, seed) for seed, what in enumerate(shapes)]
    want = getattr(vlm, name).__wrapped__(*arguments).numpy()
    got = getattr(fast, name)(*arguments).numpy()
    assert np.abs(got - want).max() / max(1, want.std()) < 1e-5, (name, *shapes)
  for M, N, K in (7, 21, 40), (30, 261, 99):  # the products of gradients
    x = normal(M, N)
    for kind in KINDS[2:]:
      w, exact = encode(normal(N, K), kind)
      assert error(fast.c_matmul(tensor(x), w, "nn", False), x, exact.T) < 5e-6, kind
    y = normal(M, K, seed=1)
    assert error(fast.c_matmul(tensor(x), tensor(y), "tn", False), x.T, y.T) < 5e-6


# ---- Kernels beside numpy ----


@in_c
@pytest.mark.parametrize("kind, portable", [*[(kind, False) for kind in KINDS],
                                            *[(kind, True) for kind in KINDS[2:]]])
def test_odd_shapes_equal_numpy(kind, portable, monkeypatch):
  monkeypatch.setattr(fast, "PORTABLE", portable)
  for M, N, K in SHAPES:
    x = normal(M, K)
    w, exact = encode(normal(N, K, seed=1), kind)
    assert is_right(vlm.matmul(tensor(x), w), x, w, exact, kind), (M, N, K)


@in_c
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [2, 20])
def test_large_and_broken_numbers_in_8_bits(kind, rows):
  """A large number costs the precision of its neighbours alone, and what is no number is not hidden."""
  x = normal(rows, 2048)
  x[1, 700], x[0] = 1e4, 0
  w, exact = encode(normal(40, 2048, seed=1), kind)
  want = x.astype(np.float64) @ exact.T
  got = vlm.matmul(tensor(x), w).numpy()
  assert (got[0] == 0).all() and np.abs(got[1] - want[1]).max() < 0.01 * np.abs(want[1]).max()
  x[1, 700] = 0
  few = x.copy()
  few[1, :512] = 0  # a part of zeros
  assert error(vlm.matmul(tensor(few), w), few, exact) < 0.1
  for broken in (math.nan, math.inf):
    x[1, 700] = broken
    got = vlm.matmul(tensor(x), w).numpy()
    assert not np.isfinite(got[1]).any() and np.isfinite(got[np.arange(rows) != 1]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_to_float32_is_what_the_numbers_stand_for(kind):
  w, exact = encode(normal(33, 70), kind)
  assert np.abs(vlm.to_float32(w).numpy() - exact).max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_numpy(kind):
  w, exact = encode(normal(50, 70), kind)
  most = 0.01 if kind in ("int8", "int4") else 1e-6  # such rows pass through bfloat16
  assert np.abs(vlm.rows(w, tensor(IDS)).numpy() - exact[IDS]).max() <= most


@in_c
@pytest.mark.parametrize("kind", KINDS)
def test_weights_at_odd_addresses(kind):
  """Views of one buffer, as of a mapped file; the bytes around them are 255: NaN, or the largest number."""
  for M in (1, 20):
    x = normal(M, 100)
    w, exact = encode(normal(37, 100, seed=1), kind)
    views, file = [], np.full(1 << 17, 255, np.uint8)
    at = 64 - file.ctypes.data % 64
    for source in fast.sources(w).values():
      array = source.numpy()
      at += array.itemsize
      file[at:at + array.nbytes] = array.reshape(-1).view(np.uint8)
      views.append(Tensor.from_blob(file.ctypes.data + at, array.shape, dtype=source.dtype, device="CPU"))
      at += -(-array.nbytes // 64) * 64
    w = fast.Packed(*views, w.shape) if isinstance(w, fast.Packed) else views[0]
    assert is_right(vlm.matmul(tensor(x), w), x, w, exact, kind)


def test_nothing_is_written_outside():
  """The results lie side by side in one buffer: a store too many would change the neighbour."""
  for M, N in ((1, 1), (3, 17), (13, 33), (25, 31)):
    x, w = normal(2, M, 40), normal(2, N, 40, seed=1)
    out = vlm.matmul(tensor(x), tensor(w))
    assert max(error(out[i], x[i], w[i]) for i in range(2)) < 5e-6


def test_expressions_slices_and_transposes_as_input():
  x, w = normal(9, 40), normal(40, 21, seed=1)
  assert error(vlm.matmul(tensor(x)[2:7] * 2, tensor(w).T), 2 * x[2:7], w.T) < 5e-6


@pytest.mark.parametrize("kind", KINDS)
def test_replays_of_a_captured_program(kind):
  w, exact = encode(normal(48, 64), kind)
  jit = TinyJit(lambda x: (vlm.matmul(x, w) * 2).realize())
  for step in range(5):
    x = normal(5, 64, seed=step)
    assert is_right(jit(tensor(x)) / 2, x, w, exact, kind), step


@in_c
@pytest.mark.parametrize("kind", ["nt", "nn", "tn"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_three_kinds_batches_and_their_gradients(kind, lead):
  batched = bool(lead)
  lead = lead or (4,)  # more rows of one product
  a = normal(*lead, *((20, 50) if kind[0] == "n" else (50, 20)))
  b = normal(*(lead if batched or kind == "tn" else ()), *((50, 35) if kind[1] == "n" else (35, 50)), seed=1)
  if kind == "tn" and not batched:  # rows of both are summed over
    want = a.reshape(-1, 20).T @ b.reshape(-1, 35)
  else:
    want = (a if kind[0] == "n" else a.swapaxes(-1, -2)) @ (b if kind[1] == "n" else b.swapaxes(-1, -2))
  ta, tb, m = tensor(a), tensor(b), tensor(normal(*want.shape, seed=2))
  out = fast.c_matmul(ta, tb, kind, batched)
  assert np.abs(out.numpy() - want).max() < 1e-4
  if kind == "tn" and not batched:
    plain = ta.reshape(-1, 20).T @ tb.reshape(-1, 35)
  else:
    plain = ta if kind[0] == "n" else ta.transpose(-1, -2)
    plain = plain @ (tb if kind[1] == "n" else tb.transpose(-1, -2))
  out = fast.c_matmul(ta, tb, kind, batched)  # again: numpy() has made the other one a constant
  for got, expected in zip((out * m).sum().gradient(ta, tb), (plain * m).sum().gradient(ta, tb)):
    assert np.abs(got.numpy() - expected.numpy()).max() < 1e-4


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_a_frozen_weight_passes_the_gradient_on(kind, portable, monkeypatch):
  """as it is; where the processor multiplies bfloat16, both are rounded to it"""
  monkeypatch.setattr(fast, "PORTABLE", portable)
  for rows, inputs, outputs in (7, 40, 21), (30, 99, 261), (13, 33, 1):
    x, m = (tensor(normal(*s)) for s in ((rows, inputs), (rows, outputs)))
    w, exact = encode(normal(outputs, inputs, seed=1), kind)
    [gradient] = (vlm.matmul(x, w) * m).sum().gradient(x)
    times = m.numpy()
    if BFLOAT16 and not portable:
      times, exact = as_bfloat16(times), as_bfloat16(exact)
    assert error(gradient, times, exact.T) < 1e-5, (rows, inputs, outputs)


@in_c
def test_profile_knows_operations_and_bytes():
  w, _ = encode(normal(48, 64), "bfloat16")
  call = vlm.matmul(tensor(normal(3, 64)), w).schedule_linear().src[-1].src[0]
  estimates = call.src[0].arg.estimates
  assert estimates.ops == 2 * 3 * 48 * 64 and 4 * 3 * (48 + 64) + 2 * 48 * 64 <= estimates.mem < 30000


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 16), (5, 33), (4, 1000)])
def test_gelu_equals_numpy(shape):
  x, times = normal(*shape) * 4, normal(*shape, seed=1)
  x.flat[0] = -200
  double = x.astype(np.float64)
  want = double / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (double + 0.044715 * double ** 3)))
  assert np.abs(vlm.gelu(tensor(x)).numpy() - want).max() < 2e-6
  assert np.abs(vlm.gelu(tensor(x), tensor(times)).numpy() - want * times).max() < 1e-5
  x.flat[-1] = np.nan
  assert np.isnan(vlm.gelu(tensor(x)).numpy().flat[-1])


def test_soft_cap_equals_numpy():
  x = normal(3, 70) * 40
  for cap, scale in ((50.0, 0.0625), (30.0, 1.0)):
    want = cap * np.tanh(x.astype(np.float64) * scale / cap)
    assert np.abs(vlm.soft_cap(tensor(x), cap, scale).numpy() - want).max() < 2e-5
  x[1, 69] = np.nan
  assert np.isnan(vlm.soft_cap(tensor(x), 30.0).numpy()[1, 69])


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("width", [1, 7, 16, 33, 1152])
def test_norms_equal_numpy(width, kind):
  x = normal(2, 3, width) * 3 + 5
  (weight, w), (bias, b) = (encode(normal(width, seed=seed), kind) for seed in (1, 2))
  rms, layer = vlm.RMSNorm(width, 1e-6), vlm.LayerNorm(width, 1e-6)
  rms.weight = layer.weight = weight
  layer.bias = bias
  double = x.astype(np.float64)
  away = double - double.mean(-1, keepdims=True)
  for norm, want in ((rms, double / np.sqrt((double ** 2).mean(-1, keepdims=True) + 1e-6) * (1 + w)),
                     (layer, away / np.sqrt((away ** 2).mean(-1, keepdims=True) + 1e-6) * w + b)):
    assert np.abs(norm(tensor(x)).numpy() - want).max() < 1e-4


def attended(q, k, v, seen, cap):
  """Attention in float64; seen (B, T or 1, C)."""
  (B, H, T, d), (K, C) = q.shape, k.shape[1:3]
  logits = np.einsum("bkgtd,bkcd->bkgtc", q.reshape(B, K, H // K, T, d), k.astype(np.float64)) * d ** -0.5
  logits = cap * np.tanh(logits / cap) if cap else logits
  logits = np.where(seen[:, None, None], logits, -np.inf)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  out = np.einsum("bkgtc,bkcd->btkgd", weights / weights.sum(-1, keepdims=True), v)
  return out.reshape(B, T, H * d)


@pytest.mark.parametrize("B, heads, kv_heads, C, d", [(1, 8, 1, 512, 256), (2, 8, 4, 70, 32), (3, 3, 3, 1, 7),
                                                      (2, 6, 2, 33, 80), (1, 5, 1, 100, 64)])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_attention_of_one_token_equals_numpy(B, heads, kv_heads, C, d, cap):
  q, k, v = normal(B, heads, 1, d) * 2, normal(B, kv_heads, C, d, seed=1), normal(B, kv_heads, C, d, seed=2)
  seen = np.random.default_rng(0).random((B, C)) < 0.5
  seen[:, -1], seen[0, :C // 2] = True, False  # whole blocks that nobody sees
  k[~seen[:, None].repeat(kv_heads, 1)] *= 1e6  # what would be noticed, if it were looked at
  out = vlm.attention(*map(tensor, (q, k, v)), d ** -0.5, tensor(seen).reshape(B, 1, 1, 1, C), cap)
  assert np.abs(out.numpy() - attended(q, k, v, seen[:, None], cap)).max() < 1e-5


def by_bfloat16(x):
  """A tensor that comes from weights of 16 bits."""
  return tensor(x) + vlm.to_float32(tensor(np.zeros(1, np.uint16)))


@in_c
@pytest.mark.parametrize("B, heads, kv_heads, T, C, d", [
  (1, 4, 4, 256, 256, 72), (2, 8, 1, 13, 40, 256), (3, 3, 3, 2, 7, 7), (2, 6, 2, 530, 530, 80)])
@pytest.mark.parametrize("see, cap", [("everything", 0.0), ("the same", 5.0), ("each its own", 0.0)])
def test_attention_equals_numpy(B, heads, kv_heads, T, C, d, see, cap, monkeypatch):
  q, k, v = normal(B, heads, T, d) * 2, normal(B, kv_heads, C, d, seed=1), normal(B, kv_heads, C, d, seed=2)
  seen = np.random.default_rng(0).random((B, T if see == "each its own" else 1, C)) < 0.5
  seen |= see == "everything"
  seen[..., -1], seen[0, ..., :C // 2] = True, see == "everything"
  want, mask = attended(q, k, v, seen, cap), None if see == "everything" else tensor(seen[:, None, None])
  for make, portable in (tensor, False), (by_bfloat16, True), (by_bfloat16, False):
    monkeypatch.setattr(fast, "PORTABLE", portable)
    out = vlm.attention(make(q), tensor(k), tensor(v), d ** -0.5, mask, cap).numpy()
    rounds = make is by_bfloat16 and not portable and BFLOAT16
    assert 1e-4 * rounds <= np.abs(out - want).max() < (0.06 if rounds else 2e-5)


@pytest.mark.parametrize("make", [tensor, by_bfloat16])
def test_attention_to_what_is_broken(make):
  """a NaN that is hidden would be taken for an answer"""
  q, k, v = normal(1, 2, 20, 16), normal(1, 2, 300, 16, seed=1), normal(1, 2, 300, 16, seed=2)
  q[0, 0, 3, 5] = k[0, 1, 200, 0] = np.nan
  broken = np.isnan(vlm.attention(make(q), tensor(k), tensor(v), 0.25).numpy()).reshape(20, 2, 16)
  assert broken[3].all() and broken[:, 1].all() and broken.sum() == 16 + 20 * 16
  k[0, 1, 200, 0], q[0, 0, 3, 5], v[0, 0, 299, 7] = 0, 0, np.nan
  broken = np.isnan(vlm.attention(make(q), tensor(k), tensor(v), 0.25).numpy()).reshape(20, 2, 16)
  assert broken[:, 0, 7].all() and broken.sum() == 20


@pytest.mark.parametrize("device", ["CPU:X86", "CPU:LLVM"])
def test_without_a_compiler(device, tmp_path):
  """Ordinary tinygrad operations instead, with the same results."""
  code = """
import test_fast as t, vlm
try:
  vlm.open_device("CPU")
except Exception as e:
  raise SystemExit(f"skip: {e}")
assert not t.fast.runs_c("CPU")
for kind in t.KINDS:
  x = t.normal(3, 40)
  w, exact = t.encode(t.normal(5, 40, seed=1), kind)
  assert t.error(vlm.matmul(t.tensor(x), w), x, exact) < 1e-5, kind
"""
  env = os.environ | {"DEV": device, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
  done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
  if "skip: " in done.stderr:
    pytest.skip(f"{device} is not to be had here")
  assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.parametrize("device", ["CPU:LLVM", "CPU:X86"])
def test_other_compilers_answer_the_same(device, tmp_path):
  runs = [ask(tmp_path, DEV=name) for name in ("CPU", device)]
  (want, _), (got, message) = (run.communicate() for run in runs)
  if "cannot be used here" in message:
    pytest.skip(f"{device} is not to be had here")
  assert json.loads(got)["tokens"] == json.loads(want)["tokens"]


# ---- Programs ----


@pytest.fixture
def scheduled(monkeypatch):
  """The numbers of kernels of the layers that are scheduled, not replayed; no program is read."""
  counts, init = [], fast.Scheduled.__init__

  def count(self, places, linear, out):
    counts.append(len(linear.src))
    init(self, places, linear, out)
  monkeypatch.setattr(fast, "KEPT", 0)
  monkeypatch.setattr(fast.Scheduled, "__init__", count)
  return counts


@pytest.mark.parametrize("folder", ["tiny1", "tiny2"])
def test_a_layer_is_scheduled_once(folder, scheduled, monkeypatch):
  """With the results of scheduling each: of tiny2 every other layer sees a window only."""
  once = answer(vlm.load(ROOT / "weights" / folder, "CPU"))
  assert len(scheduled) == 3 and min(scheduled) > 10, "vision, prefill, decode"
  monkeypatch.setattr(fast, "graph_of", lambda out: (object(), []))
  tokens, logits = answer(vlm.load(ROOT / "weights" / folder, "CPU"))
  assert len(scheduled) > 10 and (tokens, logits.tolist()) == (once[0], once[1].tolist())


def test_layers_that_are_not_alike(scheduled):
  """Layers 0 and 1 are alike; 2 has weights of another type, 3 another factor, and 4 is as 3 but for the type
  of what is added, which no kernel of fast.c reads."""
  weights = [tensor(normal(40, 40, seed=i)) for i in range(5)]
  weights[2] = weights[2].half().realize()
  added = [tensor(np.arange(40).astype(kind)) for kind in ["float16"] * 4 + ["int16"]]

  def layer(i):
    return lambda x: vlm.matmul(x, weights[i]) * (0.1 if i < 3 else 0.2) + added[i].float()
  program = vlm.capture(lambda x: vlm.through([*map(layer, range(5))], x).realize(), "CPU")
  for seed in range(3):
    want = x = normal(3, 40, seed=seed)
    for i, w in enumerate(weights):
      want = want @ w.numpy().astype(np.float32).T * (0.1 if i < 3 else 0.2) + np.arange(40)
    assert np.abs(program(tensor(x)).numpy() - want).max() < 1e-5 * want.std()
  assert len(scheduled) == 4


def test_results_of_layers_do_not_share_memory(scheduled):
  """Or these would read what they have just written."""
  weights = [tensor(normal(200, seed=i)) for i in range(4)]
  layers = [functools.partial(lambda w, x: x.flip(0) + w, w) for w in weights]
  program = vlm.capture(lambda x: vlm.through(layers, x).realize(), "CPU")
  x = normal(200, seed=9)
  want = functools.reduce(lambda x, w: x[::-1] + w.numpy(), weights, x)
  assert np.allclose(program(tensor(x)).numpy(), want) and len(scheduled) == 1


def test_a_state_that_layers_write(scheduled):
  """Each layer reads what its own cache held, and a layer that came up before is none of this program's."""
  caches, weights = ([tensor(normal(4, 4, seed=s)) for s in range(n, n + 3)] for n in (0, 3))

  def layer(i):
    def call(x, step):
      cache = Tensor(caches[i].uop.after(caches[i].uop.store((caches[i] * step).contiguous().uop)))
      return vlm.matmul(x, weights[i]) + cache
    return call
  program = vlm.capture(lambda x, step: vlm.through([*map(layer, range(3))], x, step).realize(), "CPU")
  state = [t.numpy() for t in caches]
  for seed in range(4):
    want = x = normal(2, 4, seed=seed)[:1].repeat(4, 0)
    for i in range(3):
      state[i] = state[i] * np.float32(2)
      want = want @ weights[i].numpy().T + state[i]
    assert np.allclose(program(tensor(x), tensor(np.float32([2]))).numpy(), want, rtol=1e-4)
  assert len(scheduled) == 1 and all(np.array_equal(t.numpy(), s) for t, s in zip(caches, state))


@in_c
def test_kernels_are_compiled_together(monkeypatch):
  """Each once, several at a time where there are cores; what the compiler does not take is an error."""
  compiler, sources = fast.Device["CPU"].renderer.compiler, []
  barrier, compile_one = threading.Barrier(2), type(compiler).compile
  monkeypatch.setattr(fast, "THREADS", 2)
  monkeypatch.setattr(fast, "diskcache_get", lambda *key: None)
  monkeypatch.setattr(fast.Ahead, "done", {})

  def compile_both(source):
    sources.append(source)
    if len(sources) <= 2:
      barrier.wait(timeout=20)  # for the other that is being compiled
    return compile_one(compiler, source)
  monkeypatch.setattr(compiler, "compile", compile_both)
  w = tensor(normal(8, 8))
  program = vlm.capture(lambda x: vlm.gelu(vlm.soft_cap(vlm.gelu(x) * 3, 5.0) @ w).realize(), "CPU")
  x = normal(4, 8)
  program(tensor(x))
  assert len(set(sources)) == len(sources) >= 2

  def refuse(source):
    raise subprocess.CalledProcessError(1, "clang")
  monkeypatch.setattr(compiler, "compile", refuse)
  with pytest.raises(subprocess.CalledProcessError):
    vlm.capture(lambda x: (vlm.gelu(x) * 7).realize(), "CPU")(tensor(normal(3, 11)))


def test_a_program_is_prepared_and_not_run(scheduled):
  total, made = tensor(np.zeros(3, np.float32)), []

  def work(x):
    made.append(x.shape)
    return Tensor(total.uop.after(total.uop.store((total + x).uop))).contiguous().realize()
  program = vlm.capture(work, "CPU")
  fast.prepare(program, tensor(np.ones(3, np.float32)))
  assert made == [(3,)] and (total.numpy() == 0).all()
  for i in range(1, 4):
    assert (program(tensor(np.ones(3, np.float32))).numpy() == i).all()
  assert made == [(3,)] and (total.numpy() == 3).all()


def test_decode_is_compiled_before_the_first_token(scheduled):
  model = vlm.load(TINY, "CPU")
  list(model.tokens([picture(model)], [PROMPT], max_tokens=1))
  assert len(scheduled) == 2, "an answer of one token needs none"
  steps = model.tokens([picture(model)], [PROMPT], max_tokens=3)
  next(steps)
  assert len(scheduled) == 3
  assert len(list(steps)) == 2 and len(scheduled) == 3


# ---- Programs on disk ----

TINY, PROMPT = ROOT / "weights" / "tiny1", "caption en"


@pytest.fixture
def kept(tmp_path, monkeypatch):
  """A folder of programs of its own."""
  monkeypatch.setattr(fast, "CACHE", tmp_path / "programs")
  monkeypatch.setattr(fast, "KEPT", 100)
  return tmp_path / "programs"


def programs(folder):
  return sorted(folder.glob("*.program"))


def picture(model):
  return golden.pixels(model.config.vision.image_size, 1)[0]


def answer(model):
  [a] = model.generate([picture(model)], [PROMPT], max_tokens=6)
  return a.tokens, golden.next_logits(model, picture(model), PROMPT)


def ask(cache, **env):
  command = [sys.executable, ROOT / "vlm.py", ROOT / "examples/shapes.png", PROMPT, "--weights", TINY,
             "--max-tokens", "6", "--json"]
  return subprocess.Popen(command, cwd=cache, env=os.environ | {"XDG_CACHE_HOME": str(cache)} | env,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_another_process_captures_nothing(kept, tmp_path):
  """It answers as the first one did, although its TinyJit cannot be called to capture."""
  code = """
import json, sys
sys.path[:0] = sys.argv[2:]
import golden, vlm
if sys.argv[1] == "again":
  def refuse(function):
    raise SystemExit("captured again")
  vlm.TinyJit = vlm.kernels.TinyJit = refuse
m = vlm.load(sys.argv[2] + "/weights/tiny1", "CPU")
picture, = golden.pixels(m.config.vision.image_size, 1)
[a] = m.generate([picture], ["caption en"], max_tokens=6)
print(json.dumps([a.tokens, m.prefix([picture], ["caption en"], 1)[1].numpy()[0].tolist()]))
"""
  command = [sys.executable, "-c", code, "first", ROOT, ROOT / "examples"]
  env = os.environ | {"XDG_CACHE_HOME": str(kept)}
  answers = []
  for command[3] in ("first", "again"):
    done = subprocess.run(command, env=env, cwd=tmp_path, check=True, capture_output=True, text=True)
    answers.append(json.loads(done.stdout))
  assert answers[0] == answers[1] and len(answers[0][0]) == 6
  sizes = [file.stat().st_size for file in programs(kept / "vlm")]
  assert len(sizes) >= 3 and max(sizes) < 600_000, "no weights, no scratch memory"


def test_programs_work_on_the_weights_of_their_reader(kept, monkeypatch):
  first = vlm.load(TINY, "CPU")
  before = answer(first)
  other = vlm.load(TINY, "CPU")
  for name, t in get_state_dict(other.net).items():
    if "mlp" in name and t.ndim == 2:
      t.replace((vlm.to_float32(t) * 1.5).contiguous().realize())
  files = programs(kept)
  tokens, logits = answer(other)
  assert programs(kept) == files, "nothing new was captured"
  monkeypatch.setattr(fast, "KEPT", 0)
  fresh = vlm.load(TINY, "CPU")
  for name, t in get_state_dict(fresh.net).items():
    t.replace(get_state_dict(other.net)[name])
  assert np.array_equal(answer(fresh)[1], logits) and answer(fresh)[0] == tokens
  assert not np.allclose(before[1], logits), "the other weights count"
  assert np.array_equal(answer(first)[1], before[1]), "and the first model's are its own"


def test_reading_shares_no_buffer_with_others(kept):
  """Numbers of buffers are counted anew in each process: what a file says must not meet a live buffer's."""
  answer(vlm.load(TINY, "CPU"))
  alive = [tensor(np.full(n, 7, np.float32)) for n in range(1, 400)]
  answer(vlm.load(TINY, "CPU"))
  assert all((t.numpy() == 7).all() for t in alive)


def test_a_damaged_file_is_replaced(kept):
  want = answer(vlm.load(TINY, "CPU"))
  for i, file in enumerate(programs(kept)):
    data = bytearray(file.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    file.write_bytes([data, data[:len(data) // 2], b"garbage", b""][i % 4])
  tokens, logits = answer(vlm.load(TINY, "CPU"))
  assert tokens == want[0] and np.array_equal(logits, want[1])
  for file in programs(kept):
    data = file.read_bytes()
    assert data[:32] == hashlib.sha256(data[32:]).digest()


def test_a_program_that_cannot_be_run_is_replaced(kept, monkeypatch):
  """Such as one of a driver that has changed."""
  want = answer(vlm.load(TINY, "CPU"))

  class Broken:
    fxn = None  # as of a program that was read

    def __call__(self, *inputs):
      raise OSError("another driver")
  monkeypatch.setattr(fast, "read", lambda path, owned: Broken())
  tokens, logits = answer(vlm.load(TINY, "CPU"))
  assert tokens == want[0] and np.array_equal(logits, want[1])


def test_no_folder_for_programs(kept):
  kept.write_text("a file is in the way")
  tokens, _ = answer(vlm.load(TINY, "CPU"))
  assert len(tokens) == 6 and kept.read_text() == "a file is in the way"


def test_no_home_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(fast, "CACHE", Path("~/.cache/vlm"))
  monkeypatch.setattr(fast, "KEPT", 100)
  assert len(answer(vlm.load(TINY, "CPU"))[0]) == 6 and not list(tmp_path.iterdir())


def test_a_folder_that_can_only_be_read(kept, monkeypatch):
  answer(vlm.load(TINY, "CPU"))

  def refuse(*args, **options):
    raise PermissionError("read-only")
  for name in ("utime", "replace", "unlink", "mkdir"):
    monkeypatch.setattr(fast.os, name, refuse)
  monkeypatch.setattr(fast, "TinyJit", refuse)
  assert len(answer(vlm.load(TINY, "CPU"))[0]) == 6


# ---- Programs on disk: which one ----


def test_whatever_shapes_a_program_is_in_its_name(monkeypatch):
  def work(x):
    return x + 1
  weights = {"a": Tensor.empty(3, 4), "b": Tensor.empty(2)}

  def name(*shaped_by, tensors=weights, function=work):
    return fast.kept_file(function, ("CPU", *shaped_by), tensors).name
  monkeypatch.setattr(fast, "KEPT", 100)
  names = {name("x", 1), name("x", 2), name("y", 1), name("x", 1, function=lambda x: x + 2),
           name("x", 1, tensors={"a": Tensor.empty(4, 3), "b": Tensor.empty(2)}),
           name("x", 1, tensors={"a": Tensor.empty(3, 4).half(), "b": Tensor.empty(2)}),
           name("x", 1, tensors={"c": Tensor.empty(3, 4), "b": Tensor.empty(2)})}
  assert name("x", 1) in names and len(names) == 7
  monkeypatch.setattr(fast, "PORTABLE", not fast.PORTABLE)
  assert name("x", 1) not in names
  assert fast.kept_file(work, (("CPU", "CPU:1"), "x"), weights) is None


def test_settings_and_classes_of_what_a_function_holds_are_in_the_name_of_its_program(monkeypatch):
  monkeypatch.setattr(fast, "KEPT", 100)

  class Layer:
    nothing = ()

    def __init__(self, eps):
      self.eps, self.weight = eps, Tensor.empty(3)

    def __call__(self, x):
      return x * self.weight + self.eps

  class Other(Layer):
    def __call__(self, x):
      return x * self.weight - self.eps

  def step(layers, name):
    def update(x):
      return layers[0](x)

    def run(x):
      return update(x)
    return {"nested": run, "partial": functools.partial(lambda layers, x: layers[0](x), layers)}[name]

  def name(layer, kind):
    function = step([layer], kind)
    held = fast.held_by(function)
    assert [t for t in held.values() if isinstance(t, Tensor)] == [layer.weight]
    return fast.kept_file(function, ("CPU",), held).name
  for kind in ("nested", "partial"):
    names = [name(layer, kind) for layer in (Layer(1e-6), Layer(1e-6), Layer(1e-5), Other(1e-6))]
    assert names[0] == names[1] and len(set(names)) == 3


@pytest.mark.parametrize("old, new, same", [
  ("@fast\ndef gelu", "# A remark that nothing depends on.\n\n@fast\ndef gelu", True),
  ("p /= p.sum()", "p = p / p.sum()", True),  # of Sampling
  ("x.gelu() * times", "times * x.gelu()", False), ("where(logits, -math.inf)", "where(logits, -1e9)", False),
  ("softcap=0.0", "softcap=9.0", False)])
def test_a_program_depends_on_the_code_that_made_it(old, new, same, monkeypatch):
  monkeypatch.setattr(fast, "KEPT", 100)

  def files(source):
    """What vlm.py with that source would keep: the files of vision, prefill and decode."""
    copy, found = types.ModuleType("copy_of_vlm"), []
    copy.__file__ = vlm.__file__
    monkeypatch.setitem(sys.modules, copy.__name__, copy)
    exec(compile(source, "copy_of_vlm.py", "exec"), copy.__dict__)

    def capture(function, *shaped_by):
      found.append(fast.kept_file(function, shaped_by, fast.held_by(function)).name)
      return lambda *inputs: inputs
    copy.capture, model = capture, copy.load(TINY, "CPU")
    c, P = model.config, model.config.vision.patches
    model.vision(np.zeros((3, c.vision.image_size, c.vision.image_size), np.float32))
    positions = copy.layout([8], P, 8, 256)
    model.prefill(tensor(np.zeros((1, P, c.text.hidden_size), np.float32)), np.zeros((1, 8), int), positions)
    model.decode([0], P + 8, tensor(positions))
    return found
  source = Path(vlm.__file__).read_text()
  assert old in source
  before, after = files(source), files(source.replace(old, new))
  assert len(set(before)) == 3 and [a == b for a, b in zip(before, after)] == [same] * 3


# ---- Programs on disk: nobody else's, not too many ----


def test_nobody_else_can_write_what_is_read(kept):
  mask = os.umask(0)
  try:
    answer(vlm.load(TINY, "CPU"))
  finally:
    os.umask(mask)
  assert kept.stat().st_mode & 0o777 == 0o700
  assert {file.stat().st_mode & 0o777 for file in kept.iterdir()} <= {0o600, 0o700}
  file, target = programs(kept)[0], kept / "target"
  assert fast.read_file(file)
  file.chmod(0o666)
  target.touch(0o600)
  (kept / "link").symlink_to(target)
  os.mkfifo(kept / "pipe")
  for path in (file, kept / "link", kept / "pipe", kept, kept / "none"):
    with pytest.raises(OSError):
      fast.read_file(path)
  kept.chmod(0o777)
  for left in programs(kept):
    left.unlink()
  assert len(answer(vlm.load(TINY, "CPU"))[0]) == 6
  assert not programs(kept), "a folder that is anybody's is not used"


def test_links_are_not_followed(kept, tmp_path, monkeypatch):
  """Neither by programs nor by the script that calls zig."""
  target = tmp_path / "precious"
  target.write_text("mine")
  kept.mkdir(0o700)
  fast.write_file(kept / "a.program", b"data")
  (kept / "a.program").replace(kept / "b.program")
  (kept / "a.program").symlink_to(target)
  fast.write_file(kept / "a.program", b"data")
  assert target.read_text() == "mine" and not (kept / "a.program").is_symlink()
  pytest.importorskip("ziglang")
  (kept / "zig-clang").symlink_to(target)
  monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != "CC"})
  monkeypatch.setattr(fast.shutil, "which", lambda name: None)
  if fast.DEV.renderer:
    pytest.skip("no C on this device")
  fast.find_compiler()
  assert target.read_text() == "mine" and "clang" in (kept / "zig-clang").read_text()
  assert os.environ["CC"] == str(kept / "zig-clang") and os.access(kept / "zig-clang", os.X_OK)


@pytest.mark.parametrize("function", [os.mkdir, eval, exec, subprocess.call, Tensor.from_blob])
def test_only_programs_are_unpickled(function, kept):
  class Call:
    def __reduce__(self):
      return function, (str(kept / "made"),)
  data = pickle.dumps(Call())
  fast.write_file(kept / "a.program", hashlib.sha256(data).digest() + data)
  assert fast.read(kept / "a.program", {}) is None and not (kept / "made").exists()


def test_only_the_newest_files_stay(kept, monkeypatch):
  monkeypatch.setattr(fast, "KEPT", 2)
  kept.mkdir(0o700)
  for i in range(4):
    (kept / f"{i}.program").touch()
    os.utime(kept / f"{i}.program", (i, i))
  (kept / "killed.part").touch()
  os.utime(kept / "killed.part", (0, 0))
  (kept / "alive.part").touch()
  answer(vlm.load(TINY, "CPU"))
  assert len(programs(kept)) == 2 and not list(kept.glob("[0-3].program"))
  assert [file.name for file in kept.iterdir() if file.suffix != ".program"] == ["alive.part"]
  [one, two] = (file.stat().st_size for file in programs(kept))
  monkeypatch.setattr(fast, "ROOM", one + two - 1)
  fast.tidy()
  assert len(programs(kept)) == 1


@pytest.mark.long
def test_two_processes_at_once(tmp_path):
  """Both compile, both write, neither reads half a file."""
  runs = [ask(tmp_path) for _ in range(2)]
  answers = [json.loads(run.communicate()[0])["tokens"] for run in runs]
  assert answers[0] == answers[1] and all(run.returncode == 0 for run in runs)
  assert {file.suffix for file in (tmp_path / "vlm").iterdir()} <= {".program", ""}
