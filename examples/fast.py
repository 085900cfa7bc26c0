"""Kernels for vlm.py, which takes from here what is named like one of its operations and has its arguments: C
on a CPU (fast.c: shapes, types and switches go to it as #defines, so that each shape is compiled for itself;
threads.c: on all cores), products with weights of 16 bits or fewer on a GPU, weights used where their file is
mapped, quantised weights, and programs kept on disk, so that the next process starts without scheduler and
compiler (PaliGemma-3B: 8 seconds). An operation returns None where vlm.py's own body is to do it. Imports
nothing of vlm.

tinygrad's private interfaces are used in this file only, those of 0.13 and of 0.14: memory of a buffer,
Tensor.from_blob, UOps of a program given as C (Ops.PROGRAM), Opt lists of a kernel, ClangRenderer and friends
to know what a device compiles, the pickling of a TinyJit and what it does to capture (jit_lower, capturing,
do_to_program, the disk cache), GraphRunner, the CPU device's queue, DEV and LLVM's context.
"""
import atexit
import contextlib
import copy
import ctypes.util
import functools
import glob
import hashlib
import importlib.metadata
import io
import math
import mmap
import os
import pickle
import platform
import queue
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import types
from concurrent import futures
from pathlib import Path

import numpy as np

os.environ.setdefault("PATH", os.defpath)  # or tinygrad could not be imported
from tinygrad import Device, Tensor, TinyJit, UOp, dtypes, helpers
from tinygrad.codegen import do_to_program
from tinygrad.codegen.opt import Opt, OptOps
from tinygrad.device import Buffer, Compiler
from tinygrad.dtype import AddrSpace, DType
from tinygrad.engine.jit import CapturedJit, GraphRunner, _prepare_jit_inputs, jit_lower
from tinygrad.engine.realize import capturing, get_runtime
from tinygrad.helpers import (BEAM, CACHEDB, CACHELEVEL, DEV, NULL_ALLOW_COPYOUT, disable_gc, diskcache_get,
                              diskcache_put)
from tinygrad.nn.optim import LAMB
from tinygrad.nn.state import get_parameters
from tinygrad.renderer import Estimates
from tinygrad.renderer.cstyle import ClangRenderer, MetalRenderer
from tinygrad.renderer.llvmir import LLVMRenderer
from tinygrad.runtime.autogen import llvm
from tinygrad.uop import ops
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, ProgramInfo

from tokenizer import Fault

PORTABLE = False  # True, in tests: without AVX512-BF16 instructions, as on other CPUs
FORMATS = {dtypes.float32: 32, dtypes.float16: 16, dtypes.uint16: 16, dtypes.int8: 8, dtypes.uint8: 4}  # bits
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "vlm"
WRAPPER = "zig-clang"  # in CACHE
KEPT = 300  # files; the one unused for longest goes first. 0: none is read or written
ROOM = 100_000_000  # bytes of them together; one has 0.3 to 3 million
CHUNK = 512  # queries at a time, or memory would grow with the square of the picture: gigabytes at 896 pixels
SHARED = 1 << 18  # multiply-adds: a kernel of fewer has one thread
GROUP = Path("/sys/fs/cgroup")  # what a container may use
GPUS = "/dev/nvidia*", "/dev/kfd", "/dev/dri", "/dev/kgsl*", "/dev/dxg"  # what Linux calls them


# ---- 0. What differs between tinygrad 0.13 and 0.14 ----
NEW = hasattr(helpers, "NUM_CPU_THREADS")
if NEW:
  from tinygrad.runtime.ops_cpu import CPUDevice, CPUProgram
  from tinygrad.runtime.support.hcq2 import HCQAllocator as Allocator
else:
  from tinygrad.runtime.ops_cpu import CPUWorker
  from tinygrad.runtime.support.hcq import HCQAllocatorBase as Allocator
CORES = helpers.NUM_CPU_THREADS if NEW else helpers.CPU_COUNT  # that tinygrad's own kernels are made for


def copy_in(buffer, array):
  """Into a new buffer of a device, at once."""
  data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
  buffer.ensure_allocated().allocator._copyin(buffer._buf, data)


@contextlib.contextmanager
def train(on=True):
  """What is computed in this has gradients; 0.14 has no such switch any more."""
  before, Tensor.training = training(), on
  try:
    yield
  finally:
    Tensor.training = before


def training():
  """Whether something is being differentiated."""
  return getattr(Tensor, "training", False)


if NEW:
  helpers.TRAINING.value = 1  # which its optimizers want


def as_floats(t, n):
  """-> the memory of a tensor as n numbers of float32."""
  base = t.uop.base
  return Tensor(base.bitcast(dtypes.float) if NEW else UOp(Ops.BUFFER_VIEW, dtypes.float, (base,), (n, 0)))


def custom_kernel(out, *others, **functions):
  """-> `out` after a kernel, which reads all of them as they lie in memory."""
  def as_it_lies(t):  # which 0.13 saw to by itself
    return t if t.uop.op is Ops.AFTER or t.uop.base.op is Ops.BITCAST else t.contiguous()
  return out.custom_kernel(*map(as_it_lies, others), **functions)[0]


def submit(device, function, argument):
  """Call function(None, argument) when a CPU device has done what it is to do before."""
  if NEW:
    return worker(device).tasks.put((function, argument))
  queue_of_device = device.hw_compute_queue_t().cmd(function, argument)
  queue_of_device.signal(device.timeline_signal, device.next_timeline()).submit(device)


if NEW:
  class CPUWorker(threading.Thread):
    """Does what a CPU device is to do while Python goes on, as 0.13's does; 0.14 itself would wait for it."""
    def __init__(self):
      super().__init__(daemon=True)
      self.tasks = queue.Queue()
      self.start()

    def run(self):
      while True:
        function, argument = self.tasks.get()
        function(None, argument)
        self.tasks.task_done()
        del function, argument

  @functools.cache
  def worker(device):
    return CPUWorker()

  def after_others(plain):
    """A method that waits until the worker of its device has nothing to do."""
    @functools.wraps(plain)
    def call(self, *args, **options):
      worker(getattr(self, "dev", self)).tasks.join()
      return plain(self, *args, **options)
    return call
  CPUDevice.synchronize, CPUProgram.__call__ = map(after_others, (CPUDevice.synchronize, CPUProgram.__call__))
UNFREED, free = [], Allocator._free


def free_by_others(allocator, *what):
  """To free memory, tinygrad waits until the device has nothing to do: where Python's garbage collector runs
  on the thread that does it, it would wait for itself, for ever. Then the next thread that frees something
  does it."""
  UNFREED.append((allocator, *what))
  while UNFREED and not isinstance(threading.current_thread(), CPUWorker):
    with contextlib.suppress(IndexError):  # another thread was first
      free(*UNFREED.pop())


Allocator._free = free_by_others


def usable_cores():
  """-> how many this process may use, in a container too."""
  with contextlib.suppress(OSError, ValueError):  # no limit
    quota, period = (GROUP / "cpu.max").read_text().split()  # microseconds of so many
    return min(CORES.value, -(-int(quota) // int(period)))
  return CORES.value


def free_memory():
  """-> how many bytes this process can still have, in a container too; None where the system does not say."""
  try:
    free = int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
  except (OSError, TypeError):
    try:
      return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
      return None
  with contextlib.suppress(OSError, ValueError, TypeError):  # no limit
    most, used = (int((GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    files = int(re.search(r"^inactive_file (\d+)", (GROUP / "memory.stat").read_text(), re.M)[1])
    return max(0, min(free, most - used + files))
  return free


asked = os.environ.get("VLM_THREADS") or str(usable_cores())
THREADS = int(asked) if asked.isdecimal() else 0  # which open_device refuses
PREPARING, CAPTURE = threading.local(), threading.RLock()
FORKED = []  # not empty in a process that was forked off one with a device: tinygrad's threads are not in it
if hasattr(os, "register_at_fork"):
  os.register_at_fork(after_in_child=lambda: FORKED.extend(Device._opened_devices))


# ---- 1. What vlm.py calls ----


def matmul(a, b, transposed=True):
  if runs_c(a.device):
    return c_matmul(a, b, "nt" if transposed else "nn", len(b.shape) > 2)
  return gpu_matmul(a, b) if transposed and len(b.shape) == 2 else None


def rows(weight, ids):
  if training() and weight.is_param and len(weight) < 10000:
    # A product with one-hot rows, because its gradient is a product too: that of a look-up took a third of
    # the step.
    return matmul(ids.one_hot(len(weight)).float(), weight, transposed=False)
  if training() and weight.is_param:
    return None
  return c_rows(weight, ids) if runs_c(ids.device) else None


def attention(q, k, v, scale, mask=None, softcap=0.0):
  if forward_in_c(q):
    of_one = q.shape[2] == 1 and mask is not None
    return (c_attention_of_one if of_one else c_attention)(q, k, v, scale, mask, softcap)
  if q.shape[2] > CHUNK:
    parts = []
    for i in range(0, q.shape[2], CHUNK):
      seen = mask if mask is None or mask.shape[-2] == 1 else mask[..., i:i + CHUNK, :]
      parts.append(attention.plain(q[:, :, i:i + CHUNK], k, v, scale, seen, softcap))
    return Tensor.cat(*parts, dim=1)


def layer_norm(x, weight, bias, eps):
  return c_by_row("norm", {"x": x, "b": weight, "bias": bias}, EPS=eps) if forward_in_c(x) else None


def rms_norm(x, weight, eps):
  return c_by_row("norm", {"x": x, "b": weight}, EPS=eps) if forward_in_c(x) else None


def soft_cap(x, cap, scale=1.0):
  return c_by_row("soft_cap", {"x": x}, SCALE=scale, CAP=cap) if forward_in_c(x) else None


def gelu(x, times=None):
  return c_by_row("gelu", {"x": x} if times is None else {"x": x, "b": times}) if forward_in_c(x) else None


def upload(array, device, name=None):
  """A weight is a view of its mapped file on a CPU, neither read nor copied before it is used: where
  tinygrad's own kernels find it aligned, and those of this file at any address. All else is copied at once:
  Tensor(array).realize() takes 2 ms, 130 the first time, since it schedules a copy."""
  if FORKED:
    raise Fault("this process is a fork of one that has used a model, and would wait forever; start it with the "
                "multiprocessing method spawn, or load the model after the fork only", code=1)
  if isinstance(device, tuple):  # whole on each
    return upload(array, device[0]).shard(device).realize()
  if isinstance(array, Packed):
    return array.placed(upload, device, name)
  read_by_c = array.ndim == 2 and name and "position_embedding" not in name and runs_c(device)
  kind = getattr(dtypes, array.dtype.name)
  if name and (read_by_c or device.startswith("CPU") and array.ctypes.data % 64 == 0):
    return Tensor.from_blob(array.ctypes.data, array.shape, dtype=kind, device=device)
  t = Tensor.empty(*array.shape, dtype=kind, device=device)
  copy_in(t.uop.base.buffer, array)
  return t


def join_scales(arrays, shapes):
  scales = {name: arrays[name + "_scale"] for name in shapes if name + "_scale" in arrays}
  packed = {name: Packed(arrays[name], scale, shapes[name]) for name, scale in scales.items()
            if name in arrays and Packed.fits(arrays[name], scale, shapes[name])}
  alone = [name for name in shapes if name in arrays and arrays[name].itemsize == 1 and name not in packed]
  if alone:
    raise Fault(f"{alone[0]} is quantised, and its scales are missing or of another shape; quantise it again")
  rest = {name: array for name, array in arrays.items() if name.removesuffix("_scale") not in packed}
  return rest | packed


def open_device(name):
  """What has to be so before vlm.open_device opens it. Raises Fault."""
  if not 1 <= THREADS <= 1024:
    raise Fault(f"VLM_THREADS={os.environ.get('VLM_THREADS')}: at least 1, at most 1024")
  CORES.value = THREADS  # of tinygrad's own kernels
  if not compiler_cache():
    CACHELEVEL.value = 0
  if name is not None and not (isinstance(name, str) and re.fullmatch(r"\w+(:\d+)?", name)):
    raise Fault(f"device {name!r}: its name is to be a text, such as CPU or CUDA:1")
  cpu = (name or "CPU").startswith("CPU") and sys.platform == "linux"
  if cpu and not DEV.device and not any(map(glob.glob, GPUS)):
    # tinygrad would come to this too, after it has imported all its drivers, 0.4 s, or to an OpenCL device of this
    # very processor, which it names in the environment of all programs that are started from then on
    DEV.value = "CPU"
  kind = Device.canonicalize(name).partition(":")[0]
  if kind in ("NULL", "DISK", "NPY") and not NULL_ALLOW_COPYOUT:  # gpu_dry_run.py wants that
    raise Fault(f"device {kind} computes nothing; omit --device, DEV")
  if kind == "CPU" or NEW:  # of which other devices may have queues on the CPU
    find_compiler(needed=kind == "CPU")
  with contextlib.suppress(Exception):  # of a device that is not there: that is said when it is opened
    if kind == "CPU" and c_source():
      start_threads()
      Device[name].graph = Kernels
    if isinstance(Device[name].renderer, LLVMRenderer) and hasattr(llvm.dll, "LLVMContextSetOpaquePointers"):
      llvm.dll.LLVMContextSetOpaquePointers(Device[name].compiler.context, 1)  # newer than LLVM 15 know
      if NEW:
        helpers.PARALLEL.value = 0  # its processes would have contexts of their own


def likeliest(logits):
  # padded, so that tinygrad can split the row into parts: 257216 = 64 * 4019 would keep 64 threads of a GPU
  # busy
  logits = logits.pad((0, -logits.shape[-1] % 4096), value=-math.inf)
  return logits.isnan().any(-1).where(-1, logits.argmax(-1)).cast(dtypes.int32)


def capture(function, *shaped_by):
  device, program, names, path = shaped_by[0], None, None, None

  def call(*inputs):
    nonlocal program, names, path
    new, preparing = not program, getattr(PREPARING, "on", False)
    if names is None:
      held = held_by(function) | ({"threads": threads(device)} if runs_c(device) else {})
      names = buffers(held)
      path = kept_file(function, (*shaped_by, *((t.shape, t.dtype) for t in inputs)), held)
    if preparing and path and os.path.exists(path):
      return None  # to read it later takes less than it would take from what is being computed now
    program = program or read(path, names) or captured(function, inputs, device)
    result = None if preparing else run(*inputs)
    if new and program.fxn:
      write(path, program, names)  # last, while the device is busy
    return result

  def run(*inputs):
    nonlocal program
    try:
      return program(*inputs)
    except Exception:  # of a program that was read: whatever it is, such as a driver that has changed
      if program.fxn:
        raise
    program = captured(function, inputs, device)
    return program(*inputs)
  return call


def prepare(function, *args):
  """Call it, and only compile the program that it would run, unless that is kept on disk."""
  PREPARING.on = True
  try:
    function(*args)
  finally:
    PREPARING.on = False


def through(layers, x, *inputs):
  """In a program that `capture` makes, layers that are equal but for their weights and caches are scheduled
  once. The graph of each is built; where it is a known one, its kernels are taken and their buffers
  exchanged."""
  if not capturing or not hasattr(capturing[0], "latest") or not isinstance(x.device, str) or training():
    return None  # gradients are wanted of one graph
  known, x = {}, x.contiguous()
  Tensor.realize(x, *get_parameters(inputs))  # else each layer would compute them again
  for layer in layers:
    out = layer(x, *inputs).contiguous()
    shape, places = graph_of(out)
    if shape in known:
      x = known[shape].replay(places)
    else:
      x = out.realize()
      known[shape] = Scheduled(places, capturing[0].latest, x)
  return x


class AdamW(LAMB):
  """tinygrad's AdamW of float32 weights, on a CPU by one kernel for each of them: its own three took a third of
  the toy's steps, and half of the time until the first."""
  def __init__(self, weights, lr=0.001, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01):
    super().__init__(weights, lr, b1, b2, eps, weight_decay, adam=True)
    for t in [*self.m, *self.v, self.b1_t, self.b2_t]:  # or each captured step would make them anew
      t.replace(t.contiguous().realize())

  def schedule_step(self):
    if not runs_c(self.device):
      return super().schedule_step()
    self.b1_t *= self.b1
    self.b2_t *= self.b2
    rates, done = Tensor.cat(self.lr, self.b1_t, self.b2_t).contiguous(), [self.b1_t, self.b2_t]
    for weight, first, second in zip(self.params, self.m, self.v):
      I, outs = weight.numel(), {"out": weight, "first": first, "second": second}
      defines = {"ADAMW": 1, "I": I, "K": 1, "BITS": 32, "B1": self.b1, "B2": self.b2, "EPS": self.eps,
                 "DECAY": self.wd}
      done.append(c_kernel(f"adamw_{I}", defines, outs, {"x": weight.grad, "rates": rates}, 16 * I))
    return done


class Packed:
  """A weight (N, K) in few bits, as quantize.py writes it: int8 numbers (N, K) and a scale (N,) for each row,
  or uint8 (N, G * 16), two numbers of 4 bits in each, the first in the lower half and all of them plus 8, and
  a scale (N, G) for each 32 of a row. data, scale: arrays of a file, or tensors."""
  def __init__(self, data, scale, shape):
    self.data, self.scale, self.shape, self.dtype = data, scale, (*data.shape[:-1], shape[-1]), data.dtype

  @staticmethod
  def fits(data, scale, shape):
    """Whether the arrays of a file are a weight of that shape."""
    N, groups = shape[0], -(-shape[-1] // 32)
    known = {np.dtype(np.int8): (shape, (N,)), np.dtype(np.uint8): ((N, groups * 16), (N, groups))}
    return scale.dtype == np.float32 and known.get(data.dtype) == (data.shape, scale.shape)

  def flatten(self, start):
    return self

  def placed(self, place, device, name):
    """Of arrays: the same of tensors. place: as vlm.upload."""
    return Packed(place(self.data, device, name), place(self.scale, device, name + "_scale"), self.shape)

  def __getitem__(self, ids):
    return Packed(self.data[ids], self.scale[ids], self.shape)

  def float(self):
    if self.dtype == dtypes.int8:
      return self.data.float() * self.scale.unsqueeze(-1)
    numbers = (self.data & 15).stack(self.data >> 4, dim=-1).reshape(*self.scale.shape, 32).float() - 8
    return (numbers * self.scale.unsqueeze(-1)).flatten(-2)[..., :self.shape[-1]]


def forward_in_c(x):
  """Whether x is for the kernels in C that have no gradient: not where something is differentiated."""
  return runs_c(x.device) and not training()


def compiler_cache():
  """Whether tinygrad's own cache, a database of compiled kernels, can be used; what cannot would raise in the middle."""
  try:
    if not CACHE.is_absolute() or os.environ.get("XDG_CACHE_HOME") == "":
      return False  # it would be where this is started
    Path(CACHEDB).parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(Path(CACHEDB).parent).free < ROOM:
      return False
    with contextlib.closing(sqlite3.connect(CACHEDB, timeout=60)) as base:
      base.execute("PRAGMA user_version=0")  # writes
      base.execute("SELECT name FROM sqlite_master").fetchall()
    return True
  except (OSError, ValueError, sqlite3.Error):
    return False


def connection():
  """tinygrad's own cache, for each thread by itself: tinygrad opens it once, and SQLite refuses all threads but the
  one that opened it."""
  if not hasattr(CONNECTIONS, "own"):
    CONNECTIONS.own = sqlite3.connect(CACHEDB, timeout=60, isolation_level="IMMEDIATE")
    with contextlib.suppress(sqlite3.OperationalError):  # another process does it
      CONNECTIONS.own.execute("PRAGMA journal_mode=WAL").fetchone()
    CONNECTIONS.own.execute("PRAGMA synchronous=NORMAL")
  return CONNECTIONS.own


CONNECTIONS, helpers.db_connection = threading.local(), connection


# ---- 2. C on a CPU ----


def find_compiler(needed=True):
  """tinygrad's CPU device calls clang, in 0.14 even as CPU:LLVM. Without one: zig's (from PyPI), libLLVM, or
  tinygrad's slow assembler. needed: whether the model is to run there. Raises Fault."""
  named = os.environ.get("CC")
  if needed and DEV.renderer and not NEW or named and (named == str(CACHE / WRAPPER) or is_clang(named)):
    return
  if named:
    print(f"CC={named} is not used: it compiles nothing, or is no clang, which tinygrad needs", file=sys.stderr)
  os.environ.pop("CC", None)
  if shutil.which("clang"):
    return
  try:
    import ziglang
    text = f"#!/bin/sh\nexec '{Path(ziglang.__file__).with_name('zig')}' clang \"$@\"\n".encode()
    os.environ["CC"] = str(kept_wrapper(text))
  except (ImportError, OSError):
    if not needed:
      return
    if NEW:
      raise Fault("no C compiler, which tinygrad 0.14 needs: `pip install ziglang`, or install clang", 1) from None
    found = any(ctypes.util.find_library(f"LLVM{v}") for v in ("", *(f"-{n}" for n in range(15, 22))))
    DEV.value = "CPU:LLVM" if found else "CPU:X86"
    print("no C compiler, so answers come slowly; `pip install ziglang`, or install clang", file=sys.stderr)


def is_clang(name):
  """Whether that compiler takes what tinygrad says to it."""
  target = f"--target={platform.machine()}-none-unknown-elf"
  command = [name, "-c", "-x", "c", target, "-march=native", "-", "-o", "-"]
  with contextlib.suppress(OSError, subprocess.SubprocessError):
    return subprocess.run(command, input=b"", capture_output=True, timeout=60).returncode == 0
  return False


def kept_wrapper(text):
  """-> the path of a program of that text, in CACHE, or in a folder of this process where CACHE cannot be written or
  holds nothing that can be run. Raises OSError."""
  with contextlib.suppress(OSError):
    path, known = cache_folder() / WRAPPER, None
    with contextlib.suppress(OSError):
      known = read_file(path)
    if known != text:
      write_file(path, text, 0o700)
    if os.access(path, os.X_OK):
      return path
  folder = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  os.environ["ZIG_GLOBAL_CACHE_DIR"] = folder
  path = Path(folder) / WRAPPER
  path.write_bytes(text)
  path.chmod(0o700)
  return path


@functools.cache
def c_source(name="fast.c"):
  """The text of that file; "" where the CPU device compiles no C: CPU:LLVM, CPU:X86, or no compiler."""
  c = isinstance(Device["CPU"].renderer, ClangRenderer) and shutil.which(os.environ.get("CC", "clang"))
  return Path(__file__).with_name(name).read_text() if c else ""


def runs_c(device):
  """Whether that device runs fast.c."""
  return isinstance(device, str) and device.startswith("CPU") and c_source() != ""


def c_kernel(name, defines, outs, srcs, work, backward=None, code=None):
  """Run `kernel` of fast.c, or of other C, as a kernel of tinygrad's: scheduled, compiled once, captured and
  threaded like its own. {parameter: tensor} outs and srcs, work multiply-adds -> the first of outs, C's
  `out`."""
  cores = THREADS if work > SHARED else 1
  kinds = {"x": "const float", "ids": "const int", "b": "const char", "bias": "const char",
           "seen": "const char", "scale": "const float", "values": "const float", "scratch": "int",
           "rates": "const float", "first": "float", "second": "float"}
  names = [*list(outs)[1:], *srcs]
  args = "".join(f"{kinds[arg]} *restrict {arg}, " for arg in names)
  given = "".join(f"p[{i}], " for i in range(len(names) + 1))
  pointers = ", ".join(f"(void *){arg}" for arg in ("out", *names))
  defines = {"ARGS": args, "GIVEN": given, "POINTERS_TO": pointers, "CORES": cores,
             "ROUNDED": 0, "INTEGER": 0, "FLOAT16": 0, "FEW": 8} | defines
  source = c_program(defines, code or c_source())
  size = sum(t.nbytes() for t in [*outs.values(), *srcs.values()])
  work = Estimates(2 * work, size, size)
  first, *rest = outs.values()
  return custom_kernel(first, *rest, *srcs.values(), threads(first.device), grad_fxn=backward,
                       fxn=functools.partial(program_of, name, source, work, len(outs)))


def c_program(defines, code):
  """-> C text, with what shares its work among threads."""
  return "".join(f"#define {k} {v}\n" for k, v in defines.items()) + code + c_source("threads.c")


def program_of(name, source, work, outs, *bufs):
  """A kernel in C as a program of tinygrad's; the first of its buffers are its outputs."""
  sink, ids = UOp.sink(*bufs, arg=KernelInfo(name=name, estimates=work)), tuple(range(len(bufs)))
  info = ProgramInfo(name, (1, 1, 1), (1, 1, 1), (), ids, ids[:outs], ids[outs:])
  steps = [UOp(Ops.LINEAR, src=(*sink.src, sink)), UOp(Ops.SOURCE, arg=source)]
  return UOp(Ops.PROGRAM, src=(sink, *([] if NEW else [UOp(Ops.DEVICE, arg="CPU")]), *steps), arg=info)


MEMORY = mmap.mmap(-1, mmap.PAGESIZE)
ctypes.pythonapi.Py_IncRef(ctypes.py_object(MEMORY))  # never freed: threads outlive everything in a process
POOL = np.frombuffer(MEMORY, np.uint64)[:64]  # see threads.c


@functools.cache
def start_threads():
  """Once a process."""
  libc, place = ctypes.CDLL(None), POOL.ctypes.data
  if sys.platform == "darwin":  # where sem_init does nothing
    names = "dispatch_semaphore_wait", "dispatch_semaphore_signal"
    libc.dispatch_semaphore_create.restype = ctypes.c_void_p
    semaphore = libc.dispatch_semaphore_create(ctypes.c_long(0))
  else:
    names, semaphore = ("sem_wait", "sem_post"), place + 8 * 32
    libc.sem_init(ctypes.c_void_p(semaphore), 0, 0)
  functions = [ctypes.cast(getattr(libc, name), ctypes.c_void_p).value for name in (*names, "sched_yield")]
  POOL[26:30] = *functions, semaphore
  for _ in range(THREADS - 1):
    threading.Thread(target=c_function("WORKER"), args=[ctypes.c_uint64(place)], daemon=True).start()


@functools.cache
def c_function(kind):
  """-> what threads.c makes of this #define, for ctypes."""
  source = c_program({kind: 1, "MOST": Kernels.MOST}, "")
  program = program_of(kind, source, Estimates(), 0, UOp.placeholder((64,), dtypes.uint64, 0))
  return get_runtime("CPU", do_to_program(program, Device["CPU"].renderer)).fxn


@functools.cache
def threads(device):
  """-> what kernels find the threads by, on that device."""
  return Tensor.from_blob(POOL.ctypes.data, POOL.shape, dtype=dtypes.uint64, device=device)


def to_float32(t):
  """As in vlm.py."""
  return (t.cast(dtypes.uint32) << 16).bitcast(dtypes.float32) if t.dtype == dtypes.uint16 else t.float()


def empty(like, *shape, dtype=dtypes.float32):
  return Tensor.invalids(*shape, dtype=dtype, device=like.device)


def sources(w):
  """A weight as sources of a kernel."""
  return {"b": w.data, "scale": w.scale} if isinstance(w, Packed) else {"b": w}


def c_matmul(a, b, kind, batched):
  """Differentiable where b is float32; a frozen b of fewer bits passes the gradient on."""
  lead, bits = a.shape[:-2] if batched else (), FORMATS[b.dtype]
  Z, rows, cols = math.prod(lead), math.prod(a.shape[len(lead):-1]), a.shape[-1]
  (I, K), J = (cols, rows) if kind == "tn" else (rows, cols), b.shape[-2 if kind == "nt" else -1]
  outs = {"out": empty(a, *((*lead, I, J) if kind == "tn" else (*a.shape[:-1], J)))}
  rounded = b.dtype in (dtypes.uint16, dtypes.int8, dtypes.uint8) and not PORTABLE
  integer = rounded and bits <= 8 and kind == "nt" and not training()
  if rounded:  # a in bfloat16, or 8 bits and their scales, once for each core
    outs["scratch"] = empty(a, THREADS, I, -(-K // 32) * 16 + 16 + -(-K // 2048) * 16, dtype=dtypes.int32)
  defines = {"MATMUL": 1, "BATCH": Z, "I": I, "J": J, "K": K, "BITS": bits, "ROUNDED": int(rounded),
             "INTEGER": int(integer), "A_T": int(kind == "tn"), "B_T": int(kind == "nt"),
             "FLOAT16": int(b.dtype == dtypes.float16), "FEW": 8 * (kind == "nt" and Z <= 1)}

  def backward(grad, call):
    d, a, b, *scale = Tensor(grad), *map(Tensor, call.src[1 + len(outs):-1])  # the last are the threads
    if bits < 32:
      weight = Packed(b, *scale, (J, K)) if scale else b  # as it is: in float32 an embedding has gigabytes
      return *[None] * len(outs), c_matmul(d, weight, "nn", False).uop, *[None] * (2 + len(scale))
    ways = {"nt": ((d, b, "nn"), (d, a, "tn")), "nn": ((d, b, "nt"), (a, d, "tn")),
            "tn": ((b, d, "nt"), (a, d, "nn"))}
    return None, *(c_matmul(*way, batched).uop for way in ways[kind]), None
  name = f"matmul_{kind}_{b.dtype.name}_{Z}_{I}_{J}_{K}"
  return c_kernel(name, defines, outs, {"x": a} | sources(b), Z * I * J * K, backward)


def c_rows(w, ids):
  I, K = ids.numel(), w.shape[1]
  defines = {"ROWS": 1, "I": I, "J": 1, "K": K, "BITS": FORMATS[w.dtype], "BATCH": 1, "A_T": 0, "B_T": 1,
             "FLOAT16": int(w.dtype == dtypes.float16)}
  out = {"out": empty(ids, *ids.shape, K)}
  return c_kernel(f"rows_{w.dtype.name}_{I}_{K}", defines, out, {"ids": ids} | sources(w), I * K)


def c_by_row(name, srcs, **defines):
  """soft_cap, gelu or norm (weights b, with a bias a LayerNorm) of each row of x. No gradient."""
  x, K = srcs["x"], srcs["x"].shape[-1]
  I = x.numel() // K
  kind = srcs.get("b", x).dtype
  defines |= {name.upper(): len(srcs), "I": I, "K": K, "BITS": FORMATS[kind],
              "FLOAT16": int(kind == dtypes.float16)}
  return c_kernel(f"{name}_{I}_{K}", defines, {"out": empty(x, *x.shape)}, srcs, 16 * I * K)


def c_attention(q, k, v, scale, mask, softcap):
  """vlm.py's attention, in bfloat16 where the queries come from weights of 16 bits or fewer."""
  B, H, T, d = q.shape
  K, C = k.shape[1:3]
  # which weights these are vlm.attention is not told: they are among what q is computed from
  rows, inputs = H // K * T, [node.dtype for node in q.uop.toposort() if node.op is Ops.BUFFER]
  short = not PORTABLE and any(kind in (dtypes.uint16, dtypes.int8, dtypes.uint8) for kind in inputs)
  blocks = -(-rows // 480)  # the logits of so many stay in the second-level cache
  blocks += -blocks % (THREADS // math.gcd(THREADS, B * K))  # as many for each thread
  srcs = {"x": q * scale, "b": k, "values": v}
  if mask is not None:
    srcs["seen"] = mask.reshape(B, mask.shape[-2], C)
  defines = {"ATTEND": 2, "I": B * H * T, "K": d, "BITS": 32, "A_T": 0, "FEW": 0, "SLOTS": C, "HEADS": K, "T": T,
             "QUERIES": rows, "BLOCKS": blocks, "SEEN": 0 if mask is None else mask.shape[-2], "CAP": softcap,
             "ROUNDED": int(short)}
  wide = -(-d // 32) * 32
  outs = {"out": empty(q, B, T, H * d),
          "scratch": empty(q, THREADS, (-(-rows // blocks) + 16) * (2 * wide + 320), dtype=dtypes.int32)}
  name = f"attention_{B}_{K}_{H // K}_{T}_{C}_{d}"
  return c_kernel(name, defines, outs, srcs, 2 * B * H * T * C * d)


def c_attention_of_one(q, k, v, scale, mask, softcap):
  """vlm.py's attention for one query a row, T = 1: caches are read once, as they are, and only where seen."""
  B, H, _, d = q.shape
  K, C = k.shape[1:3]
  defines = {"ATTEND": 1, "I": B * H, "K": d, "BITS": 32, "SLOTS": C, "HEADS": K, "QUERIES": H // K,
             "SCALE": scale, "CAP": softcap}
  srcs = {"x": q, "b": k, "values": v, "seen": mask.reshape(B, C)}
  name = f"attend_{B}_{K}_{H // K}_{C}_{d}"
  return c_kernel(name, defines, {"out": empty(q, B, 1, H * d)}, srcs, 2 * B * H * C * d)


# ---- 3. Products on a GPU ----
# tinygrad's own rules for a matrix and a vector, and for tensor cores, do not know weights of 16 bits or
# fewer.


def gpu_matmul(x, w):
  """x (.., K) @ w (N, K).T -> (.., N) float32, without gradient; None where vlm.py's own body is better."""
  single = isinstance(x.device, str)
  device = Device[x.device if single else x.device[0]]
  renderer, views = device.renderer, hasattr(device.allocator, "_offset")  # of a buffer: not CL and WebGPU
  I, (N, K) = x.numel() // x.shape[-1], w.shape
  if training() or FORMATS[w.dtype] == 32 or not renderer.has_local:
    return None
  if I <= 8:
    in_words = K % (32 if w.dtype == dtypes.uint8 else 4) == 0
    return few_rows(x.reshape(I, K), w).reshape(*x.shape[:-1], N) if single and views and in_words else None
  pairs = {t.dtype_in for t in renderer.tensor_cores if t.dtype_out == dtypes.float}
  # Metal multiplies float32 too, and on the M1 no bfloat16.
  short = dtypes.bfloat16 in pairs and not isinstance(renderer, MetalRenderer)
  kind = dtypes.bfloat16 if short else dtypes.float
  if kind not in pairs or w.dtype == dtypes.float16 and kind == dtypes.bfloat16:
    return None
  scale = w.scale if w.dtype == dtypes.int8 else 1  # for afterwards: the numbers are exact in bfloat16
  if w.dtype == dtypes.int8:
    w = w.data.cast(kind)
  elif w.dtype == dtypes.uint16 and kind == dtypes.bfloat16:
    w = w.bitcast(kind)
  else:
    whole_groups = w.dtype == dtypes.uint8 and K % 32 == 0
    w = unpacked(w, x, kind) if whole_groups and single else to_float32(w).cast(kind)
  # w first: then the tokens need to be a multiple of 8, not of 16; contiguous: or two products become one
  out = w.dot(x.reshape(I, K).cast(kind).contiguous().T, dtype=dtypes.float).T.contiguous()
  return (out * scale).reshape(*x.shape[:-1], N)


def unpacked(w, x, kind):
  """int4 -> kind (N, K) in a buffer of its own, since tensor cores take no such indices. x is not read, but
  waited for: without it all weights of a model would be unpacked first, and be in memory together."""
  def kernel(out, data, scale, x):
    n, group, pair = UOp.range(w.shape[0], 0), UOp.range(w.shape[1] // 32, 1), UOp.range(16, 2)
    half = UOp.range(2, 3)
    number = (data[n, group * 16 + pair] >> (half * 4).cast(dtypes.uint8) & 15).cast(dtypes.float) - 8
    store = out[n, group * 32 + pair * 2 + half].store((number * scale[n, group]).cast(kind))
    return store.end(n, group, pair, half).sink(arg=KernelInfo(name=f"unpacked_{w.shape[0]}_{w.shape[1]}"))
  return custom_kernel(empty(x, *w.shape, dtype=kind), w.data, w.scale, x, fxn=kernel)


def few_rows(x, w):
  """x (I, K) @ w (N, K).T -> (I, N) where memory is the limit. Threads side by side read w side by side, 16
  bytes each (as float32: tinygrad loads no other type of 32 bits four at a time), and each number once for
  all rows of x."""
  (I, K), N, bits = x.shape, w.shape[0], FORMATS[w.dtype]
  data, *scales = sources(w).values()
  each = 32 // bits  # numbers in a word
  words = as_floats(data, N * K // each).reshape(N, K // each)

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
    four = math.gcd(K // each, 4)
    opts = [Opt(OptOps.UNROLL, len(ranges), each), Opt(OptOps.UNROLL, len(ranges) - 1, four),
            Opt(OptOps.GROUP, 0, math.gcd(K // each // four, 32)),
            Opt(OptOps.LOCAL, 1 if I > 1 else 0, math.gcd(N, 4)), Opt(OptOps.UPCAST, 0, I)]
    info = KernelInfo(name=f"few_rows_{bits}_{I}_{N}_{K}", opts_to_apply=tuple(o for o in opts if o.arg > 1))
    return out[i, n].store(total).end(i, n).sink(arg=info)
  return custom_kernel(empty(x, I, N), x, words, *scales, fxn=kernel)


# ---- 4. Programs ----


def graph_of(out):
  """A graph of a tensor -> what graphs that differ in their buffers alone have in common, and its buffers."""
  leaves = Ops.BUFFER, Ops.PROGRAM  # an equal kernel is the same object
  number, shape, places = {}, [], []
  for node in out.uop.toposort(gate=lambda node: node.op not in leaves):
    for source in node.src:
      if source not in number:  # a leaf
        number[source] = len(number)
        is_buffer = source.op is Ops.BUFFER
        shape.append((source.dtype, source.shape, source.device) if is_buffer else source)
        places += [source] * is_buffer
    number[node] = len(number)
    # of a call the argument is a gradient, of UNIQUE a number that means nothing
    arg = None if node.op.name in ("CALL", "UNIQUE") else node.arg
    shape.append((node.op, node.dtype, arg, *[number[source] for source in node.src]))
  return tuple(shape), places


def exchanged(node, new):
  """A graph with the buffers of `new`, {old: new}, to which those are added that are a layer's own."""
  if node.op is Ops.BUFFER and node not in new:  # such as its result
    new[node] = UOp.new_buffer(node.device, node.shape[0], node.dtype)
  if node not in new:
    new[node] = node.replace(src=tuple(exchanged(source, new) for source in node.src))
  return new[node]


class Scheduled:
  """The kernels of a layer, scheduled for some buffers, `places`. out: its result."""
  def __init__(self, places, linear, out):
    self.places, self.linear, self.out = places, linear, out.uop

  def replay(self, places):
    """Add the same kernels to the program being captured, for other buffers -> the result."""
    new = dict(zip(self.places, places))
    calls = [call.replace(src=(call.src[0], *[exchanged(node, new) for node in call.src[1:]]))
             for call in self.linear.src]
    capturing[0].add_linear(self.linear.replace(src=tuple(calls)), {})
    return Tensor(exchanged(self.out, new))


class Ahead(Compiler):
  """Compiles the kernels of a program on all cores, while Python goes on with the rest of it."""
  done = {}  # {(kernel, renderer): compiled}, of all programs

  def __init__(self, renderer):
    super().__init__()
    self.known, self.compiler, self.renderer = renderer, renderer.compiler, copy.copy(renderer)
    self.renderer.compiler, self.begun = self, {}
    self.pool = futures.ThreadPoolExecutor(THREADS)

  def compile(self, source):
    """What tinygrad calls when it has rendered a kernel."""
    kept = self.compiler.cachekey and diskcache_get(self.compiler.cachekey, source)
    self.source, self.binary = source, kept or self.pool.submit(self.compiler.compile, source)
    return b""

  def begin(self, linear):
    """Compile the kernels of these calls that are new."""
    for kernel, out, *_ in (call.src for call in linear.src):
      new = kernel not in self.begun and (kernel, self.known) not in self.done
      if new and kernel.op in (Ops.SINK, Ops.PROGRAM) and runs_c(out.device):
        self.begun[kernel] = do_to_program(kernel, self.renderer), self.source, self.binary

  def finish(self, calls):
    """-> the same calls, of compiled kernels."""
    for kernel, (program, source, binary) in self.begun.items():
      if not isinstance(binary, bytes):
        binary = binary.result()
        if self.compiler.cachekey:  # None with CCACHE=0
          diskcache_put(self.compiler.cachekey, source, binary)
      self.done[kernel, self.known] = program.replace(src=(*program.src[:-1], UOp(Ops.BINARY, arg=binary)))

    def compiled(kernel, *buffers):
      return self.done.get((kernel, self.known), kernel) if runs_c(buffers[0].device) else kernel
    return [call.replace(src=(compiled(*call.src), *call.src[1:])) for call in calls]


@disable_gc()
def captured(function, inputs, device):
  """-> a TinyJit of a function, as its second call would make it, and not run yet."""
  with CAPTURE:
    jit, assembled = TinyJit(function), []
    buffers_in, _, names, kinds = _prepare_jit_inputs(inputs, {})
    ahead = Ahead(Device[device].renderer) if runs_c(device) and not BEAM else None

    def add_linear(linear, values):
      assembled.extend(linear.src)
      jit.latest = linear
      if ahead:
        ahead.begin(linear)
    jit.add_linear, jit.latest = add_linear, None
    capturing.append(jit)
    try:
      result = function(*inputs)
      Tensor.realize(*get_parameters(result))
      calls = ahead.finish(assembled) if ahead else assembled
    finally:
      capturing.clear()
      del jit.add_linear  # which holds the jit
      if ahead:
        ahead.pool.shutdown(wait=False, cancel_futures=True)
    held = {*ops.buffers, *(t.uop.buf_uop for t in get_parameters(result))}
    linear = jit_lower(UOp(Ops.LINEAR, src=tuple(calls)), held, buffers_in)
    jit.captured, jit.cnt = CapturedJit(result, linear, names, kinds), 2
    del jit.latest
    return jit


class Kernels(GraphRunner):
  """Kernels of a program, run one after the other by one call of threads.c: tinygrad's queue takes some 25 us
  of Python for each."""
  MOST = 32  # arguments of a kernel

  @staticmethod
  def supports_uop(devices, call):
    sizes = call.src[0].arg.global_size or () if call.src[0].op is Ops.PROGRAM else ("none",)
    return (len(call.src) <= Kernels.MOST and all(isinstance(size, int) for size in sizes)
            and GraphRunner.supports_uop(devices, call))

  def __init__(self, linear, input_uops=()):
    super().__init__(linear, input_uops)
    self.on, self.rows, self.inputs = self.calls[0][2][0].device, [], []
    for i, (_, program, bufs, fixed) in enumerate(self.calls):
      info, part = program.arg, program.arg.runtimevars.get("core_id", 0)
      values = [bufs[g]._buf.va_addr for g in info.globals] + [fixed.get(v.expr, 0) for v in info.vars]
      function = ctypes.cast(self.runtimes[i].fxn, ctypes.c_void_p).value
      row = [function, (info.global_size or (1,))[0], len(info.globals) + part, *values]
      self.rows.append(row + [0] * (3 + self.MOST - len(row)))
      self.inputs += [(i, 3 + info.globals.index(place), slot) for place, slot in self.uop_replace[i]]
    self.rows = np.array(self.rows, np.uint64)

  def __call__(self, input_uops, var_vals, wait=False):
    rows, start = self.rows.copy(), time.perf_counter()
    for i, place, slot in self.inputs:
      rows[i, place] = input_uops[slot].buffer.ensure_allocated()._buf.va_addr
    for i, place, value in self.updated_vars(var_vals):
      rows[i, 3 + len(self.calls[i][1].arg.globals) + place] = value
    device = Device[self.on]
    submit(device, functools.partial(self.run, c_function("ROWS_OF_KERNELS")), rows)
    if wait:
      device.synchronize()
    return time.perf_counter() - start if wait else None

  @staticmethod
  def run(function, thread, rows):
    function(*map(ctypes.c_uint64, (rows.ctypes.data, POOL.ctypes.data, len(rows))))


# ---- 5. Programs on disk ----
# A captured TinyJit is a list of kernels, already machine code, and the buffers that they read and write. The
# kernels are stored. Buffers that the model owns (weights, KV cache) are stored by name and are those of the
# new process; all others are scratch memory, stored as their size. Whoever writes such a file can run code as
# whoever reads it: so only files of this user's in a folder of this user's are read, and only whole ones.


def is_private(found):
  """Whether what os.stat found is this user's, and nobody else can write to it."""
  return not hasattr(os, "geteuid") or found.st_uid == os.geteuid() and not found.st_mode & 0o022


def cache_folder():
  """-> CACHE, made if need be, which nobody else can write to. Raises OSError."""
  if not CACHE.is_absolute():  # no home folder
    raise FileNotFoundError(f"{CACHE} is in no certain place")
  CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
  found = CACHE.lstat()
  if not stat.S_ISDIR(found.st_mode) or not is_private(found):
    raise PermissionError(f"{CACHE} is not a folder of this user's alone")
  return CACHE


def read_file(path):
  """-> the bytes of a file that nobody else can have written. Raises OSError."""
  flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe would be waited for
  with open(os.open(path, os.O_RDONLY | flags), "rb") as file:
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or not is_private(found):
      raise PermissionError(f"{path} is not a file of this user's alone")
    return file.read()


def write_file(path, data, mode=0o600):
  """Make a file of CACHE, whole or not at all. Raises OSError."""
  number, part = tempfile.mkstemp(".part", dir=cache_folder())
  try:
    with open(number, "wb") as file:
      file.write(data)
    os.chmod(part, mode)
    os.replace(part, path)
  except BaseException:
    os.unlink(part)
    raise


def tidy():
  """Remove what killed writers left behind, and the programs that are too many. Raises OSError."""
  for part in CACHE.glob("*.part"):
    if part.stat().st_mtime < time.time() - 600:  # a writer that lives takes milliseconds
      part.unlink()
  room = ROOM
  for i, program in enumerate(sorted(CACHE.glob("*.program"), key=lambda file: -file.stat().st_mtime)):
    room -= program.stat().st_size
    if i >= KEPT or room < 0:
      program.unlink()


def held_by(thing, path=""):
  """-> {path: what a function or an object holds}: tensors, such as weights and a KV cache, settings (numbers,
  words, types), and the classes of the objects."""
  if thing is None or isinstance(thing, (Tensor, DType, int, float, str, type)):
    return {path: thing}
  found = {}
  if isinstance(thing, types.FunctionType):
    parts = zip(thing.__code__.co_freevars, (cell.cell_contents for cell in thing.__closure__ or ()))
  elif isinstance(thing, functools.partial):
    parts = {"func": thing.func, "args": thing.args}.items()
  elif isinstance(thing, (list, tuple)):
    parts = enumerate(thing)
  elif isinstance(thing, dict):
    parts = thing.items()
  else:
    found[path], parts = type(thing), getattr(thing, "__dict__", {}).items()
  for name, part in parts:
    found |= held_by(part, f"{path}.{name}".lstrip("."))
  return found


def kept_file(function, shaped_by, held):
  """-> the file of a program, which depends on the function and all that it calls, on what else shaped it
  (the device first), on what it holds, of its tensors by their shape and type, on this file and lora.py, the
  compiler and the processor. None for several devices: their buffers are not stored."""
  device, *_ = shaped_by
  if not KEPT or isinstance(device, tuple):
    return None
  classes, renderer = [thing for thing in held.values() if isinstance(thing, type)], Device[device].renderer
  holds = [(path, (t.shape, t.dtype) if isinstance(t, Tensor) else t) for path, t in held.items()]
  machine = str(renderer.target), THREADS, os.environ.get("CC"), platform.platform(), processor()
  known = hashlib.sha256()
  for part in (code_of(function, *classes), shaped_by, PORTABLE, holds, type(renderer), machine):
    known.update(repr(part).encode())
  for source in ("fast.c", "threads.c", "fast.py", "lora.py"):
    known.update(Path(__file__).with_name(source).read_bytes())
  known.update(importlib.metadata.version("tinygrad").encode())
  return CACHE / f"{known.hexdigest()[:32]}.program"


def code_of(function, *classes):
  """-> the code of a function and of all functions, classes and constants of its module and of those beside this
  one that it can reach, as text. A comment, or another part of the file, is none of it: to change it leaves kept
  programs in use."""
  module, found = getattr(function, "func", function).__globals__, set()
  seen, waiting = {}, [function, *classes]

  here = os.path.dirname(__file__)

  def is_ours(names):  # this file is compared as a whole
    folder = os.path.dirname(names.get("__file__") or "")
    return names is module or names is not globals() and folder in (here, os.path.dirname(here))

  def constants(things):
    return [(n, t) for n, t in things if isinstance(t, (int, float, str, tuple)) and not n.startswith("__")]
  while waiting:
    thing = waiting.pop()
    for attribute in ("func", "__func__", "fget"):  # of a partial, a method, a property
      thing = getattr(thing, attribute, thing)
    if id(thing) in seen:
      continue
    seen[id(thing)] = thing
    if isinstance(thing, types.FunctionType) and is_ours(thing.__globals__):
      found.add(repr((thing.__qualname__, thing.__defaults__, thing.__kwdefaults__)))
      waiting += [(thing.__code__, thing.__globals__), *(cell.cell_contents for cell in thing.__closure__ or ())]
    elif isinstance(thing, tuple) and thing and isinstance(thing[0], types.CodeType):
      code, names = thing
      inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
      plain = [sorted(map(repr, c)) if isinstance(c, frozenset) else c for c in code.co_consts]
      plain = [c for c in plain if not isinstance(c, types.CodeType)]
      reached = [(name, names[name]) for name in code.co_names if name in names]
      ours = [vars(m) for _, m in reached if isinstance(m, types.ModuleType) and is_ours(vars(m))]
      reached += [(name, other[name]) for other in ours for name in code.co_names if name in other]
      found.add(repr((code.co_qualname, code.co_code, code.co_names, plain, constants(reached))))
      waiting += [*((c, names) for c in inner), *(value for _, value in reached)]
    elif isinstance(thing, type) and is_ours(vars(sys.modules.get(thing.__module__, types))):
      found.add(repr((thing.__qualname__, constants(vars(thing).items()))))
      waiting += [*thing.__bases__, *vars(thing).values()]
    elif not isinstance(thing, type):
      waiting.append(type(thing))
  return sorted(found)


def processor():
  """What the first processor can do: another machine with the same home folder may read machine code."""
  telling = "flags", "Features", "model name"
  with contextlib.suppress(OSError):
    return [line for line in open("/proc/cpuinfo") if line.startswith(telling)][:2]
  return platform.processor()


class Writer(pickle.Pickler):
  """names: {UOp of a buffer that the model owns: its name}."""
  def __init__(self, file, names):
    super().__init__(file, pickle.HIGHEST_PROTOCOL)
    self.names = names

  def persistent_id(self, thing):
    if thing.__class__ is not UOp:
      return None
    # A number tells buffers of a size apart; the process that reads this may have given it to another.
    if not NEW:
      return thing.arg if thing.op is Ops.UNIQUE else self.names.get(thing)
    if thing.op is Ops.BUFFER and thing.addrspace is AddrSpace.GLOBAL:  # of no registers, of no variable
      return self.names.get(thing) or (thing.arg.slot, thing.device, thing.max_numel(), thing.dtype)

  def reducer_override(self, thing):
    if thing.__class__ is not Buffer:
      return NotImplemented
    counted = int(thing._base is None)
    return Buffer, (thing.device, thing.size, thing.dtype, None, thing.options, None, counted, thing._base,
                    thing.offset)


# What a captured TinyJit is made of, all of it tinygrad's.
CLASSES = {"AddrSpace", "AxisType", "Buffer", "BufferSpec", "CallInfo", "CapturedJit", "ConstFloat", "DType",
           "Estimates", "ImageDType", "InvalidType", "KernelInfo", "Metadata", "Ops", "Opt", "OptOps",
           "ParamArg", "ProgramInfo", "PtrDType", "Target", "Tensor", "TinyJit", "UOp", "_TinyJit"}


class Reader(pickle.Unpickler):
  """buffers: {name: UOp}, those of this process."""
  def __init__(self, file, buffers):
    super().__init__(file)
    self.buffers, self.unique = buffers, {}

  def find_class(self, module, name):
    if not module.startswith("tinygrad.") or name not in CLASSES:
      raise pickle.UnpicklingError(f"{module}.{name} is no part of a program")
    return super().find_class(module, name)

  def persistent_load(self, key):
    if isinstance(key, str):
      return self.buffers[key]
    if key not in self.unique:
      self.unique[key] = UOp.new_buffer(*key[1:]) if NEW else UOp.unique()
    return self.unique[key]


def buffers(held):
  """What held_by found -> {name: UOp of its buffer} of each tensor."""
  return {name: t.uop.base for name, t in held.items() if isinstance(t, Tensor)}


def read(path, names):
  """-> a captured TinyJit; None if there is no such file of use."""
  with contextlib.suppress(Exception):  # whatever it is: capture anew
    if path and cache_folder():
      data = read_file(path)
      if data[:32] == hashlib.sha256(data[32:]).digest():  # damaged machine code would be run
        jit = Reader(io.BytesIO(data[32:]), names).load()
        with contextlib.suppress(OSError):  # where it can only be read
          os.utime(path)
        return jit
  return None


def write(path, jit, names):
  """Keep a captured TinyJit, if the folder allows."""
  with contextlib.suppress(Exception):  # read-only, full, of a driver that stores nothing: compiled anew
    if path:
      Writer(file := io.BytesIO(), {uop: name for name, uop in names.items()}).dump(jit)
      data = file.getvalue()
      write_file(path, hashlib.sha256(data).digest() + data)
      tidy()
