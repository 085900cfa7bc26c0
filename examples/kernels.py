"""kernels.c as functions of tensors: what vlm.py (section 10) computes on a CPU. Shapes, types and switches go to the C
as #defines, so that each shape is compiled for itself."""
import math

from tinygrad import Tensor, dtypes
from tinygrad.helpers import CPU_COUNT

import compiled
import vlm

PORTABLE = False  # True, in tests: without AVX512-BF16 instructions, as on other CPUs
FORMATS = {dtypes.float32: 32, dtypes.float16: 16, dtypes.uint16: 16, dtypes.int8: 8, dtypes.uint8: 4}  # bits


def empty(like, *shape, dtype=dtypes.float32):
  return Tensor.invalids(*shape, dtype=dtype, device=like.device)


def matmul(a, b, kind, batched):
  """As in vlm.py. Differentiable where b is float32; a frozen b of fewer bits passes the gradient on."""
  lead, bits = a.shape[:-2] if batched else (), FORMATS[b.dtype]
  Z, rows, cols = math.prod(lead), math.prod(a.shape[len(lead):-1]), a.shape[-1]
  (I, K), J = (cols, rows) if kind == "tn" else (rows, cols), b.shape[-2 if kind == "nt" else -1]
  outs = {"out": empty(a, *((*lead, I, J) if kind == "tn" else (*a.shape[:-1], J)))}
  rounded = b.dtype in (dtypes.uint16, dtypes.int8, dtypes.uint8) and not PORTABLE
  if rounded:  # a in bfloat16, once for each core
    outs["scratch"] = empty(a, CPU_COUNT.value, I, -(-K // 32) * 16 + 16, dtype=dtypes.int32)
  defines = {"MATMUL": 1, "BATCH": Z, "I": I, "J": J, "K": K, "A_T": int(kind == "tn"), "B_T": int(kind == "nt"),
             "BITS": bits, "FLOAT16": int(b.dtype == dtypes.float16), "ROUNDED": int(rounded),
             "FEW": 8 * (kind == "nt" and Z <= 1)}

  def backward(grad, call):
    d, a, b, *scale = Tensor(grad), *map(Tensor, call.src[1 + len(outs):])
    if bits < 32:
      weight = vlm.widen(vlm.Packed(b, *scale, K) if scale else b)
      return *[None] * len(outs), matmul(d, weight, "nn", False).uop, *[None] * (1 + len(scale))
    ways = {"nt": ((d, b, "nn"), (d, a, "tn")), "nn": ((d, b, "nt"), (a, d, "tn")), "tn": ((b, d, "nt"), (a, d, "nn"))}
    return None, *(matmul(*way, batched).uop for way in ways[kind])
  name = f"matmul_{kind}_{b.dtype.name}_{Z}_{I}_{J}_{K}"
  return compiled.c_kernel(name, defines, outs, {"x": a, "b": b}, Z * I * J * K, backward)


def rows(w, ids):
  I, K = ids.numel(), w.shape[1]
  defines = {"ROWS": 1, "I": I, "J": 1, "K": K, "BITS": FORMATS[w.dtype], "FLOAT16": int(w.dtype == dtypes.float16),
             "BATCH": 1, "A_T": 0, "B_T": 1}
  return compiled.c_kernel(f"rows_{w.dtype.name}_{I}_{K}", defines, {"out": empty(ids, *ids.shape, K)},
                           {"ids": ids, "b": w}, I * K)


def by_row(name, srcs, **defines):
  """softmax, soft_cap, gelu or norm (weights b, with a bias a LayerNorm) of each row of x (.., K). No gradient."""
  x, K = srcs["x"], srcs["x"].shape[-1]
  I = x.numel() // K
  kind = srcs.get("b", x).dtype
  defines = {name.upper(): len(srcs), "I": I, "K": K, "BITS": FORMATS[kind], "FLOAT16": int(kind == dtypes.float16)} | defines
  return compiled.c_kernel(f"{name}_{I}_{K}", defines, {"out": empty(x, *x.shape)}, srcs, 16 * I * K)


def attend(q, k, v, scale, mask, softcap):
  """attention() of vlm.py for one query a row, T = 1: the caches are read once, as they are, and only where seen."""
  B, H, _, d = q.shape
  K, C = k.shape[1:3]
  defines = {"ATTEND": 1, "I": B * H, "K": d, "BITS": 32, "SLOTS": C, "HEADS": K, "QUERIES": H // K, "SCALE": scale,
             "CAP": softcap}
  srcs = {"x": q, "b": k, "values": v, "seen": mask.reshape(B, C)}
  return compiled.c_kernel(f"attend_{B}_{K}_{H // K}_{C}_{d}", defines, {"out": empty(q, B, 1, H * d)}, srcs,
                           2 * B * H * C * d)
