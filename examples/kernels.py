"""What vlm.py (section 10) computes in a way of its own. On a CPU: kernels.c as functions of tensors. Shapes, types and
switches go to the C as #defines, so that each shape is compiled for itself. On GPUs: products with weights of 16 bits or
fewer, which tinygrad's own rules for a matrix and a vector, or for tensor cores, do not recognise."""
import math

from tinygrad import Device, Tensor, UOp, dtypes
from tinygrad.codegen.opt import Opt, OptOps
from tinygrad.helpers import CPU_COUNT
from tinygrad.uop.ops import AxisType, KernelInfo, Ops

import compiled
import vlm
from quantize import Packed

PORTABLE = False  # True, in tests: without AVX512-BF16 instructions, as on other CPUs
FORMATS = {dtypes.float32: 32, dtypes.float16: 16, dtypes.uint16: 16, dtypes.int8: 8, dtypes.uint8: 4}  # bits


def empty(like, *shape, dtype=dtypes.float32):
  return Tensor.invalids(*shape, dtype=dtype, device=like.device)


def parts(w):
  """A weight as sources of a kernel."""
  return {"b": w.data, "scale": w.scale} if isinstance(w, Packed) else {"b": w}


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
      weight = vlm.widen(Packed(b, *scale, K) if scale else b)
      return *[None] * len(outs), matmul(d, weight, "nn", False).uop, *[None] * (1 + len(scale))
    ways = {"nt": ((d, b, "nn"), (d, a, "tn")), "nn": ((d, b, "nt"), (a, d, "tn")), "tn": ((b, d, "nt"), (a, d, "nn"))}
    return None, *(matmul(*way, batched).uop for way in ways[kind])
  name = f"matmul_{kind}_{b.dtype.name}_{Z}_{I}_{J}_{K}"
  return compiled.c_kernel(name, defines, outs, {"x": a} | parts(b), Z * I * J * K, backward)


def rows(w, ids):
  I, K = ids.numel(), w.shape[1]
  defines = {"ROWS": 1, "I": I, "J": 1, "K": K, "BITS": FORMATS[w.dtype], "FLOAT16": int(w.dtype == dtypes.float16),
             "BATCH": 1, "A_T": 0, "B_T": 1}
  return compiled.c_kernel(f"rows_{w.dtype.name}_{I}_{K}", defines, {"out": empty(ids, *ids.shape, K)},
                           {"ids": ids} | parts(w), I * K)


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


def on_gpu(x, w):
  """x (.., K) @ w (N, K).T -> (.., N) float32, without gradient; None where the ordinary way is left alone."""
  renderer = Device[x.device if isinstance(x.device, str) else x.device[0]].renderer
  I, (N, K) = x.numel() // x.shape[-1], w.shape
  if Tensor.training or FORMATS[w.dtype] == 32 or not renderer.has_local:
    return None
  if I <= 8:
    fits = isinstance(x.device, str) and (w.dtype != dtypes.uint8 or K % 32 == 0)
    return few_rows(x.reshape(I, K), w).reshape(*x.shape[:-1], N) if fits else None
  cores = [t for t in renderer.tensor_cores if (t.dtype_in, t.dtype_out) == (dtypes.bfloat16, dtypes.float)]
  if w.dtype == dtypes.float16 or not cores or renderer.target.device == "METAL":
    return None  # Metal's simdgroup matrices take float32; on the M1 they take no bfloat16
  # w first: then the tokens are a multiple of 8 and not of 16. A row's scale is for afterwards: int8 is exact in bfloat16.
  scale = w.scale if w.dtype == dtypes.int8 else None
  w = w.data.cast(dtypes.bfloat16) if scale is not None else (
    w.bitcast(dtypes.bfloat16) if w.dtype == dtypes.uint16 else vlm.widen(w).cast(dtypes.bfloat16))
  out = w.dot(x.reshape(I, K).cast(dtypes.bfloat16).contiguous().T, dtype=dtypes.float).T
  return (out if scale is None else out * scale).contiguous().reshape(*x.shape[:-1], N)


def few_rows(x, w):
  """x (I, K) @ w (N, K).T -> (I, N) where memory is the limit. Threads side by side read w side by side, several of its
  numbers each, and every number once for all rows of x."""
  (I, K), N, bits = x.shape, w.shape[0], FORMATS[w.dtype]
  

  def kernel(out, x, w, scale=None):
    i, n = UOp.range(I, 0), UOp.range(N, 1)
    if bits == 4:  # a thread loads all 16 pairs of numbers under one scale
      group, pair = UOp.range(K // 32, 2, AxisType.REDUCE), UOp.range(16, 3, AxisType.REDUCE)
      low, high = ((part - 8).cast(dtypes.float) for both in [w[n, group * 16 + pair].cast(dtypes.int)]
                   for part in (both & 15, both >> 4))
      k = group * 32 + pair * 2
      total = ((x[i, k] * low + x[i, k + 1] * high) * scale[n, group]).reduce(group, pair, arg=Ops.ADD)
      opts = [Opt(OptOps.UNROLL, -1, 16), Opt(OptOps.GROUP, 0, math.gcd(K // 32, 32))]
    else:
      k = UOp.range(K, 2, AxisType.REDUCE)
      number = (w[n, k].cast(dtypes.uint32) << 16).bitcast(dtypes.float) if w.dtype.base == dtypes.uint16 else (
        w[n, k].cast(dtypes.float))
      total = (x[i, k] * number).reduce(k, arg=Ops.ADD) * (scale[n] if scale is not None else 1)
      opts = [Opt(OptOps.UNROLL, 0, math.gcd(K, 4)), Opt(OptOps.GROUP, 0, math.gcd(K // math.gcd(K, 4), 32))]
    # a group of threads sums one row of w; a block is several groups
    opts += [Opt(OptOps.LOCAL, 1 if I > 1 else 0, math.gcd(N, 4)), Opt(OptOps.UPCAST, 0, I)]
    info = KernelInfo(name=f"few_rows_{bits}_{I}_{N}_{K}", opts_to_apply=tuple(o for o in opts if o.arg > 1))
    return out[i, n].store(total).end(i, n).sink(arg=info)
  return empty(x, I, N).custom_kernel(x, *parts(w).values(), fxn=kernel)[0]
