"""What vlm.py (section 10) computes in a way of its own. On a CPU: kernels.c as functions of tensors. Shapes, types and
switches go to the C as #defines, so that each shape is compiled for itself. On GPUs: products with weights of 16 bits
or fewer, which tinygrad's own rules for a matrix and a vector, or for tensor cores, do not recognise."""
import math

from tinygrad import Device, Tensor, UOp, dtypes
from tinygrad.codegen.opt import Opt, OptOps
from tinygrad.helpers import CPU_COUNT
from tinygrad.renderer.cstyle import MetalRenderer
from tinygrad.uop.ops import AxisType, KernelInfo, Ops

import compiled
import quantize
import vlm

PORTABLE = False  # True, in tests: without AVX512-BF16 instructions, as on other CPUs
FORMATS = {dtypes.float32: 32, dtypes.float16: 16, dtypes.uint16: 16, dtypes.int8: 8, dtypes.uint8: 4}  # bits


def empty(like, *shape, dtype=dtypes.float32):
  return Tensor.invalids(*shape, dtype=dtype, device=like.device)


def parts(w):
  """A weight as sources of a kernel."""
  return {"b": w.data, "scale": w.scale} if isinstance(w, quantize.Packed) else {"b": w}


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
      weight = vlm.widen(quantize.Packed(b, *scale, K) if scale else b)
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
  defines |= {name.upper(): len(srcs), "I": I, "K": K, "BITS": FORMATS[kind], "FLOAT16": int(kind == dtypes.float16)}
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
  device = Device[x.device if isinstance(x.device, str) else x.device[0]]
  renderer, views = device.renderer, hasattr(device.allocator, "_offset")  # CL and WebGPU have no views of a buffer
  I, (N, K) = x.numel() // x.shape[-1], w.shape
  if Tensor.training or FORMATS[w.dtype] == 32 or not renderer.has_local:
    return None
  if I <= 8:
    fits = views and isinstance(x.device, str) and K % (32 if w.dtype == dtypes.uint8 else 4) == 0
    return few_rows(x.reshape(I, K), w).reshape(*x.shape[:-1], N) if fits else None
  pairs = {t.dtype_in for t in renderer.tensor_cores if t.dtype_out == dtypes.float}
  # Metal multiplies float32 too, and on the M1 no bfloat16.
  kind = dtypes.bfloat16 if dtypes.bfloat16 in pairs and not isinstance(renderer, MetalRenderer) else dtypes.float
  if kind not in pairs or w.dtype == dtypes.float16 and kind == dtypes.bfloat16:
    return None
  scale = w.scale if w.dtype == dtypes.int8 else 1  # for afterwards: the numbers themselves are exact in bfloat16
  if w.dtype == dtypes.int8:
    w = w.data.cast(kind)
  elif w.dtype == dtypes.uint16 and kind == dtypes.bfloat16:
    w = w.bitcast(kind)
  else:
    alone = w.dtype == dtypes.uint8 and K % 32 == 0 and isinstance(x.device, str)
    w = unpacked(w, x, kind) if alone else vlm.widen(w).cast(kind)
  # w first: then the tokens need to be a multiple of 8 and not of 16; contiguous: else two products are one kernel
  out = w.dot(x.reshape(I, K).cast(kind).contiguous().T, dtype=dtypes.float).T.contiguous()
  return (out * scale).reshape(*x.shape[:-1], N)


def unpacked(w, x, kind):
  """int4 -> kind (N, K) in a buffer of its own, since tensor cores take no such indices. x is not read, but waited for:
  without it all weights of a model would be unpacked first, and be in memory together."""
  def kernel(out, data, scale, x):
    n, group, pair = UOp.range(w.shape[0], 0), UOp.range(w.shape[1] // 32, 1), UOp.range(16, 2)
    half = UOp.range(2, 3)
    number = (data[n, group * 16 + pair] >> (half * 4).cast(dtypes.uint8) & 15).cast(dtypes.float) - 8
    store = out[n, group * 32 + pair * 2 + half].store((number * scale[n, group]).cast(kind))
    return store.end(n, group, pair, half).sink(arg=KernelInfo(name=f"unpacked_{w.shape[0]}_{w.shape[1]}"))
  return empty(x, *w.shape, dtype=kind).custom_kernel(w.data, w.scale, x, fxn=kernel)[0]


def few_rows(x, w):
  """x (I, K) @ w (N, K).T -> (I, N) where memory is the limit. Threads side by side read w side by side, 16 bytes each
  (as float32: tinygrad loads no other type of 32 bits four at a time), and every number once for all rows of x."""
  (I, K), N, bits = x.shape, w.shape[0], FORMATS[w.dtype]
  data, *scales = parts(w).values()
  each = 32 // bits  # numbers in a word
  words = Tensor(UOp(Ops.BUFFER_VIEW, dtypes.float, (data.uop.base,), (N * K // each, 0))).reshape(N, K // each)

  def number(word, j):
    word, shift = word.bitcast(dtypes.uint32), (j * bits).cast(dtypes.uint32)
    if w.dtype == dtypes.uint16:
      return (word >> shift << 16).bitcast(dtypes.float)
    if bits == 16:
      return (word >> shift).cast(dtypes.uint16).bitcast(dtypes.half).cast(dtypes.float)
    if bits == 8:
      return ((word << (24 - shift)).bitcast(dtypes.int) >> 24).cast(dtypes.float)
    return ((word >> shift & 15).cast(dtypes.int) - 8).cast(dtypes.float)

  def kernel(out, x, w, scale=None):
    i, n, j = UOp.range(I, 0), UOp.range(N, 1), UOp.range(each, 4, AxisType.REDUCE)
    if bits == 4:  # four words have a scale
      ranges = UOp.range(K // 32, 2, AxisType.REDUCE), UOp.range(4, 3, AxisType.REDUCE)
      word, factor = ranges[0] * 4 + ranges[1], scale[n, ranges[0]]
    else:
      ranges = [UOp.range(K // each, 2, AxisType.REDUCE)]
      word, factor = ranges[0], 1
    product = x[i, word * each + j] * number(w[n, word], j) * factor
    total = product.reduce(*ranges, j, arg=Ops.ADD) * (scale[n] if bits == 8 else 1)
    # a group of threads sums one row of w; a block is several groups
    opts = [Opt(OptOps.UNROLL, len(ranges), each), Opt(OptOps.UNROLL, len(ranges) - 1, math.gcd(K // each, 4)),
            Opt(OptOps.GROUP, 0, math.gcd(K // each // math.gcd(K // each, 4), 32)),
            Opt(OptOps.LOCAL, 1 if I > 1 else 0, math.gcd(N, 4)), Opt(OptOps.UPCAST, 0, I)]
    info = KernelInfo(name=f"few_rows_{bits}_{I}_{N}_{K}", opts_to_apply=tuple(o for o in opts if o.arg > 1))
    return out[i, n].store(total).end(i, n).sink(arg=info)
  return empty(x, I, N).custom_kernel(x, words, *scales, fxn=kernel)[0]
