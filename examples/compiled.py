"""Underneath the kernels of vlm.py: a C compiler for tinygrad's CPU device, C as a kernel of tinygrad's, and programs
kept on disk, so that the next process starts without scheduler and compiler (PaliGemma-3B: 8 seconds).

A captured TinyJit is a list of kernels, already machine code, and the buffers that they read and write. The kernels are
stored. Buffers that the model owns (weights, KV cache) are stored by name and are those of the new process; all others
are scratch memory, stored as their size.
"""
import contextlib
import ctypes.util
import functools
import glob
import hashlib
import importlib.metadata
import os
import pickle
import platform
import shutil
import sys
from pathlib import Path

from tinygrad import Device, UOp, dtypes
from tinygrad.device import Buffer
from tinygrad.helpers import CPU_COUNT, DEV
from tinygrad.renderer import Estimates
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.renderer.llvmir import LLVMRenderer
from tinygrad.runtime.autogen import llvm
from tinygrad.uop.ops import KernelInfo, Ops, ProgramInfo

from vlm import Fault

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm"
GPUS = "/dev/nvidia*", "/dev/kfd", "/dev/dri", "/dev/kgsl*", "/dev/dxg"  # what Linux calls them
KEPT = 100  # files, of half a megabyte at most; the one unused for longest goes first. 0: none is read or written


def find_compiler():
  """tinygrad's CPU device calls clang. Without one: zig's (from PyPI), then libLLVM, then its own, slow, assembler."""
  if "CC" in os.environ or DEV.renderer or shutil.which("clang"):
    return
  try:
    import ziglang
    wrapper = CACHE / "zig-clang"
    text = f"#!/bin/sh\nexec '{Path(ziglang.__file__).parent / 'zig'}' clang \"$@\"\n"
    if not wrapper.exists() or wrapper.read_text() != text:
      wrapper.parent.mkdir(parents=True, exist_ok=True)
      wrapper.write_text(text)
      wrapper.chmod(0o755)
    os.environ["CC"] = str(wrapper)
  except (ImportError, OSError):
    found = any(ctypes.util.find_library(f"LLVM{v}") for v in ("", *(f"-{n}" for n in range(15, 22))))
    DEV.value = "CPU:LLVM" if found else "CPU:X86"
    print("no C compiler, so answers come slowly; `pip install ziglang`, or install clang", file=sys.stderr)


def open_device(name=None, count=1):
  """A tinygrad device name, None for the best there is -> its full name, ready for use; a tuple of them if there are to
  be several. Raises Fault."""
  if count < 1:
    raise Fault(f"--shard {count}: at least 1")
  try:
    if name is None and not DEV.device and sys.platform == "linux" and not any(map(glob.glob, GPUS)):
      DEV.value = "CPU"  # tinygrad would come to this too, after it has imported all its drivers, which takes 0.4 s
    name = Device.canonicalize(name)
    if name.startswith("CPU"):
      find_compiler()
    if isinstance(Device[name].renderer, LLVMRenderer) and hasattr(llvm.dll, "LLVMContextSetOpaquePointers"):
      llvm.dll.LLVMContextSetOpaquePointers(Device[name].compiler.context, 1)  # LLVM 15 must be told; newer ones know
    if count > 1:
      name = tuple(Device.canonicalize(f"{name}:{i}") for i in range(count))
      for part in name:
        Device[part]
    return name
  except Exception as e:  # whatever a driver that is not there raises
    raise Fault(f"device {name or DEV.device} cannot be used here ({e}); leave out --device and DEV") from None


@functools.cache
def c_source():
  """The text of kernels.c; "" where the CPU device compiles no C: DEV=CPU:LLVM, DEV=CPU:X86, or no compiler."""
  c = isinstance(Device["CPU"].renderer, ClangRenderer) and shutil.which(os.environ.get("CC", "clang"))
  return Path(__file__).with_name("kernels.c").read_text() if c else ""


def in_c(device):
  return isinstance(device, str) and device.startswith("CPU") and c_source() != ""


def c_kernel(name, defines, outs, srcs, work, backward=None, code=None):
  """Run `kernel` of kernels.c, or of other C, as a kernel of tinygrad's: scheduled, compiled once, captured and
  threaded like its own. {parameter: tensor} outs and srcs, work multiply-adds -> the first of outs, `out` in C."""
  cores = CPU_COUNT.value if work > 1 << 20 else 1  # a second core costs 20 us a kernel: Python's queues
  types = {"x": "const float", "ids": "const int", "b": "const char", "scale": "const float", "scratch": "int",
           "values": "const float", "seen": "const char", "bias": "const char"}
  args = "".join(f"{types[arg]} *restrict {arg}, " for arg in [*list(outs)[1:], *srcs])
  defines = {"ARGS": args, "CORES": cores, "ROUNDED": 0, "FLOAT16": 0, "FEW": 8} | defines
  source = "".join(f"#define {k} {v}\n" for k, v in defines.items()) + (code or c_source())

  def program(*bufs):
    core_id = UOp.variable("core_id", 0, cores - 1, dtypes.int)  # one call for each value, in parallel
    size = sum(t.nbytes() for t in [*outs.values(), *srcs.values()])
    sink = UOp.sink(*bufs, core_id, arg=KernelInfo(name=name, estimates=Estimates(2 * work, size, size)))
    ids = tuple(range(len(bufs)))
    info = ProgramInfo(name, (cores, 1, 1), None, (core_id,), ids, ids[:len(outs)], ids[len(outs):])
    parts = UOp(Ops.DEVICE, arg="CPU"), UOp(Ops.LINEAR, src=(*sink.src, sink)), UOp(Ops.SOURCE, arg=source)
    return UOp(Ops.PROGRAM, src=(sink, *parts), arg=info)
  first, *rest = outs.values()
  return first.custom_kernel(*rest, *srcs.values(), fxn=program, grad_fxn=backward)[0]


def place(device, *shaped_by):
  """-> the file of a program that is shaped by these things, by the sources, the compiler and the processor. The last
  of them are tensors, {name: Tensor}, which count by their shape and type. None for several devices: their buffers are
  not stored."""
  if isinstance(device, tuple):
    return None
  root, renderer, known = Path(__file__).resolve().parents[1], Device[device].renderer, hashlib.sha256()
  tensors = [(name, t.shape, t.dtype) for name, t in shaped_by[-1].items()]
  machine = str(renderer.target), CPU_COUNT.value, os.environ.get("CC"), platform.platform(), processor()
  for part in (*shaped_by[:-1], tensors, type(renderer), machine, importlib.metadata.version("tinygrad")):
    known.update(repr(part).encode())
  for source in ("vlm.py", *(f"examples/{name}" for name in ("kernels.c", "kernels.py", "compiled.py"))):
    known.update((root / source).read_bytes())
  return CACHE / f"{known.hexdigest()[:32]}.program"


def processor():
  """What the first processor can do: machine code may be read by another machine with the same home folder."""
  with contextlib.suppress(OSError):
    return [line for line in open("/proc/cpuinfo") if line.startswith(("flags", "Features", "model name"))][:2]
  return platform.processor()


class Writer(pickle.Pickler):
  """names: {UOp of a buffer that the model owns: its name}."""
  def __init__(self, file, names):
    super().__init__(file, pickle.HIGHEST_PROTOCOL)
    self.names = names

  def persistent_id(self, thing):
    if thing.__class__ is not UOp:
      return None
    # UNIQUE tells buffers of a size apart; the process that reads this may have given the same number to another.
    return thing.arg if thing.op is Ops.UNIQUE else self.names.get(thing)

  def reducer_override(self, thing):
    if thing.__class__ is not Buffer:
      return NotImplemented
    return Buffer, (thing.device, thing.size, thing.dtype, None, thing.options, None, int(thing._base is None),
                    thing._base, thing.offset)


class Reader(pickle.Unpickler):
  """buffers: {name: UOp}, those of this process."""
  def __init__(self, file, buffers):
    super().__init__(file)
    self.buffers, self.unique = buffers, {}

  def persistent_load(self, key):
    if isinstance(key, str):
      return self.buffers[key]
    if key not in self.unique:
      self.unique[key] = UOp.unique()
    return self.unique[key]


def owned(tensors):
  """{name: Tensor} -> {name: UOp of its buffer}."""
  return {name: t.uop.base for name, t in tensors.items()}


def read(path, tensors, inputs):
  """-> a captured TinyJit and what it returns for these inputs; None twice if there is no such file or it is no use."""
  with contextlib.suppress(Exception):  # not there, damaged, of a driver that has changed: whatever it is, capture anew
    if KEPT:
      with open(path, "rb") as file:
        jit = Reader(file, owned(tensors)).load()
      result = jit(*inputs)
      os.utime(path)
      return jit, result
  return None, None


def write(path, jit, tensors):
  """Keep a captured TinyJit, if the folder allows."""
  if not KEPT or not path:
    return
  part = path.with_suffix(f".{os.getpid()}")
  try:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(part, "wb") as file:
      Writer(file, {uop: name for name, uop in owned(tensors).items()}).dump(jit)
    os.replace(part, path)
    for old in sorted(CACHE.glob("*.program"), key=lambda f: f.stat().st_mtime)[:-KEPT]:
      old.unlink()
  except OSError:  # read-only or full: the next process compiles again
    with contextlib.suppress(OSError):
      part.unlink(missing_ok=True)
