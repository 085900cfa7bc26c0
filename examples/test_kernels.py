"""Tests of the CPU kernels (vlm.py section 10, kernels.py, kernels.c) against numpy and against plain tinygrad."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor, TinyJit, dtypes

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import compiled
import quantize
import vlm

pytestmark = pytest.mark.skipif(not (compiled.open_device("CPU") and compiled.in_c("CPU")), reason="no C compiler")
KINDS = ["float32", "float16", "bfloat16", "int8", "int4"]
SHAPES = [  # rows, outputs, inputs: multiples of a vector, a tile, a panel, and numbers that are none
  (1, 1, 1), (1, 16, 32), (1, 33, 7), (1, 97, 4304), (1, 1000, 2050), (2, 17, 7), (3, 64, 4304), (4, 5, 1151),
  (5, 33, 64), (8, 40, 33), (9, 40, 33), (12, 37, 100), (13, 1, 100), (25, 31, 40), (30, 70, 1151), (40, 100, 4304),
  (261, 31, 257), (264, 200, 96), (300, 7, 31), (300, 129, 1100), (300, 150, 95)]


def normal(*shape, seed=0):
  return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def encode(w, kind):
  """-> w as the kernel's argument, and the numbers that it stands for, worked out without the code under test."""
  if kind == "float32":
    return Tensor(w).realize(), w
  if kind == "float16":
    return Tensor(w.astype(np.float16)).realize(), w.astype(np.float16).astype(np.float32)
  if kind == "bfloat16":
    bits = (w.view(np.uint32) + 0x8000 >> 16).astype(np.uint16)
    return Tensor(bits).realize(), (bits.astype(np.uint32) << 16).view(np.float32)
  data, scale = quantize.quantize(w, quantize.BITS[kind])
  packed = quantize.Packed(Tensor(data).realize(), Tensor(scale).realize(), w.shape[1])
  if kind == "int8":
    return packed, data * scale[:, None]
  numbers = np.empty((len(w), scale.shape[1] * 32), np.float32)
  numbers[:, ::2], numbers[:, 1::2] = data % 16, data // 16
  return packed, ((numbers - 8).reshape(*scale.shape, 32) * scale[..., None]).reshape(len(w), -1)[:, :w.shape[1]]


def error(out, x, w):
  """Largest error, in standard deviations of the result: of normal x and w, sqrt(inputs)."""
  return np.abs(out.numpy() - x.astype(np.float64) @ w.T.astype(np.float64)).max() / x.shape[-1] ** 0.5


def limit(kind):
  """Rounding x to bfloat16 is up to 2^-9 an element; all else is float32's own rounding."""
  return 5e-6 if kind in ("float32", "float16") or vlm.kernels.PORTABLE else 0.02


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_shapes_equal_numpy(kind, portable, monkeypatch):
  monkeypatch.setattr(vlm.kernels, "PORTABLE", portable)
  for M, N, K in SHAPES:
    x = normal(M, K)
    w, exact = encode(normal(N, K, seed=1), kind)
    assert error(vlm.matmul(Tensor(x).realize(), w), x, exact) < limit(kind), (M, N, K)


@pytest.mark.parametrize("kind", KINDS)
def test_widen_is_what_the_numbers_stand_for(kind):
  w, exact = encode(normal(33, 70), kind)
  assert np.abs(vlm.widen(w).numpy() - exact).max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_numpy(kind):
  w, exact = encode(normal(50, 70), kind)
  ids = np.array([[3, 49, 0], [3, 7, 11]], np.int32)
  limit = 0.01 if kind in ("int8", "int4") else 0  # such rows pass through bfloat16
  assert np.abs(vlm.rows(w, Tensor(ids).realize()).numpy() - exact[ids]).max() <= max(limit, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_at_odd_addresses(kind):
  """Views of one buffer, as of a mapped file; the bytes around them are 255: NaN, or the largest number."""
  for M in (1, 20):
    x = normal(M, 100)
    w, exact = encode(normal(37, 100, seed=1), kind)
    parts = [w.data, w.scale] if isinstance(w, quantize.Packed) else [w]
    views, file = [], np.full(1 << 17, 255, np.uint8)
    at = 64 - file.ctypes.data % 64
    for part in parts:
      array = part.numpy()
      at += array.itemsize
      file[at:at + array.nbytes] = array.reshape(-1).view(np.uint8)
      views.append(Tensor.from_blob(file.ctypes.data + at, array.shape, dtype=part.dtype, device="CPU"))
      at += -(-array.nbytes // 64) * 64
    w = quantize.Packed(*views, 100) if isinstance(w, quantize.Packed) else views[0]
    assert error(vlm.matmul(Tensor(x).realize(), w), x, exact) < limit(kind)


def test_nothing_is_written_outside():
  """The results lie side by side in one buffer: a store too many would change the neighbour."""
  for M, N in ((1, 1), (3, 17), (13, 33), (25, 31)):
    x, w = normal(2, M, 40), normal(2, N, 40, seed=1)
    out = vlm.matmul(Tensor(x).realize(), Tensor(w).realize(), batched=True)
    assert max(error(out[i], x[i], w[i]) for i in range(2)) < 5e-6


def test_expressions_slices_and_transposes_as_input():
  x, w = normal(9, 40), normal(40, 21, seed=1)
  assert error(vlm.matmul(Tensor(x).realize()[2:7] * 2, Tensor(w).realize().T), 2 * x[2:7], w.T) < 5e-6


@pytest.mark.parametrize("kind", KINDS)
def test_replays_of_a_captured_program(kind):
  w, exact = encode(normal(48, 64), kind)
  jit = TinyJit(lambda x: (vlm.matmul(x, w) * 2).realize())
  for step in range(5):
    x = normal(5, 64, seed=step)
    assert error(jit(Tensor(x).realize()) / 2, x, exact) < limit(kind), step


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
  ta, tb, m = Tensor(a).realize(), Tensor(b).realize(), Tensor(normal(*want.shape, seed=2)).realize()
  out = vlm.matmul(ta, tb, kind, batched)
  assert np.abs(out.numpy() - want).max() < 1e-4
  if kind == "tn" and not batched:
    plain = ta.reshape(-1, 20).T @ tb.reshape(-1, 35)
  else:
    plain = (ta if kind[0] == "n" else ta.transpose(-1, -2)) @ (tb if kind[1] == "n" else tb.transpose(-1, -2))
  out = vlm.matmul(ta, tb, kind, batched)  # again: numpy() has made the other one a constant
  for ours, theirs in zip((out * m).sum().gradient(ta, tb), (plain * m).sum().gradient(ta, tb)):
    assert np.abs(ours.numpy() - theirs.numpy()).max() < 1e-4


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_a_frozen_weight_passes_the_gradient_on(kind):
  x, m = (Tensor(normal(*s)).realize() for s in ((7, 40), (7, 21)))
  w, exact = encode(normal(21, 40, seed=1), kind)
  [gradient] = (vlm.matmul(x, w) * m).sum().gradient(x)
  assert np.abs(gradient.numpy() - m.numpy() @ exact).max() < 1e-4


def test_profile_knows_operations_and_bytes():
  w, _ = encode(normal(48, 64), "bfloat16")
  call = vlm.matmul(Tensor(normal(3, 64)).realize(), w).schedule_linear().src[-1].src[0]
  estimates = call.src[0].arg.estimates
  assert estimates.ops == 2 * 3 * 48 * 64 and 4 * 3 * (48 + 64) + 2 * 48 * 64 <= estimates.mem < 30000


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 16), (5, 33), (1, 2112, 264), (4, 1000)])
def test_softmax_equals_numpy(shape):
  for size, scale in ((1, 1.0), (20, 0.0625), (300, 1.0)):  # flat, as in the models, nearly one-hot
    x = normal(*shape) * size
    weights, total = vlm.softmax(Tensor(x).realize(), scale)
    want = np.exp((x - x.max(-1, keepdims=True)).astype(np.float64) * scale)
    want /= want.sum(-1, keepdims=True)
    assert np.abs((weights / total).numpy() - want).max() < 1e-6


def test_softmax_of_masked_and_of_broken_rows():
  x = normal(3, 40)
  x[0, 5:], x[1, 7] = -np.inf, np.nan
  weights = vlm.softmax(Tensor(x).realize(), 1.0)[0].numpy()
  assert (weights[0, 5:] < 1e-30).all() and abs(weights[0, :5].sum() - 1) < 1e-6
  assert np.isnan(weights[1]).all(), "a NaN that is hidden would be taken for an answer"
  assert np.isfinite(weights[2]).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 16), (5, 33), (4, 1000)])
def test_gelu_equals_numpy(shape):
  x, times = normal(*shape) * 4, normal(*shape, seed=1)
  x.flat[0] = -200
  double = x.astype(np.float64)
  want = double / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (double + 0.044715 * double ** 3)))
  assert np.abs(vlm.gelu(Tensor(x).realize()).numpy() - want).max() < 2e-6
  assert np.abs(vlm.gelu(Tensor(x).realize(), Tensor(times).realize()).numpy() - want * times).max() < 1e-5
  x.flat[-1] = np.nan
  assert np.isnan(vlm.gelu(Tensor(x).realize()).numpy().flat[-1])


def test_soft_cap_equals_numpy():
  x = normal(3, 70) * 40
  for cap, scale in ((50.0, 0.0625), (30.0, 1.0)):
    want = cap * np.tanh(x.astype(np.float64) * scale / cap)
    assert np.abs(vlm.soft_cap(Tensor(x).realize(), cap, scale).numpy() - want).max() < 2e-5
  x[1, 69] = np.nan
  assert np.isnan(vlm.soft_cap(Tensor(x).realize(), 30.0).numpy()[1, 69])


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
    assert np.abs(norm(Tensor(x).realize()).numpy() - want).max() < 1e-4


@pytest.mark.parametrize("B, heads, kv_heads, C, d", [(1, 8, 1, 512, 256), (2, 8, 4, 70, 32), (3, 3, 3, 1, 7),
                                                      (2, 6, 2, 33, 80), (1, 5, 1, 100, 64)])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_attention_of_one_token_equals_numpy(B, heads, kv_heads, C, d, cap):
  q, k, v = normal(B, heads, 1, d) * 2, normal(B, kv_heads, C, d, seed=1), normal(B, kv_heads, C, d, seed=2)
  seen = np.random.default_rng(0).random((B, C)) < 0.5
  seen[:, -1], seen[0, :C // 2] = True, False  # whole blocks that nobody sees
  k[~seen[:, None].repeat(kv_heads, 1)] *= 1e6  # what would be noticed, if it were looked at
  logits = np.einsum("bkqd,bkcd->bkqc", q.reshape(B, kv_heads, -1, d), k.astype(np.float64)) * d ** -0.5
  logits = cap * np.tanh(logits / cap) if cap else logits
  weights = np.exp(np.where(seen[:, None, None], logits, -np.inf))
  want = (weights / weights.sum(-1, keepdims=True) @ v).reshape(B, 1, heads * d)
  mask = Tensor(seen).reshape(B, 1, 1, 1, C)
  out = vlm.attention(*(Tensor(t).realize() for t in (q, k, v)), d ** -0.5, mask, cap)
  assert np.abs(out.numpy() - want).max() < 1e-5


@pytest.mark.parametrize("device", ["CPU:X86", "CPU:LLVM"])
def test_without_a_compiler(device):
  """Ordinary tinygrad operations instead, with the same results."""
  code = """
import compiled, test_kernels as t, vlm
try:
  compiled.open_device("CPU")
except vlm.Fault as e:
  raise SystemExit(f"skip: {e}")
assert not compiled.in_c("CPU")
for kind in t.KINDS:
  x = t.normal(3, 40)
  w, exact = t.encode(t.normal(5, 40, seed=1), kind)
  assert t.error(vlm.matmul(t.Tensor(x), w), x, exact) < 1e-5, kind
"""
  env = os.environ | {"DEV": device, "PYTHONPATH": str(ROOT / "examples")}
  done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)
  if "skip: " in done.stderr:
    pytest.skip(f"{device} is not to be had here")
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bits, worst", [(8, 1 / 127 / 2), (4, 1 / 8)])
def test_quantising_loses_at_most_half_a_step(bits, worst):
  """int4: half a step, or one for what lies as far out as the farthest, on the other side of zero."""
  w = normal(64, 100)
  w[3], w[5, 40:] = 0, 0
  _, stood_for = encode(w, f"int{bits}")
  largest = np.abs(w).max(1, keepdims=True) if bits == 8 else np.repeat(
    np.abs(np.pad(w, ((0, 0), (0, 28))).reshape(64, 4, 32)).max(2), 32, 1)[:, :100]
  assert (np.abs(stood_for - w) <= largest * worst + 1e-7).all()
  assert np.abs(stood_for - w).max() > 0 and not stood_for[3].any() and not stood_for[5, 40:].any()
