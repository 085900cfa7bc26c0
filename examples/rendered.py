"""Every kernel of a model, for a GPU that is not there: tinygrad's null device schedules and renders as a real one
does, and runs nothing. The kernels go to stdout as JSON lines {"name", "local", "source"}, for the tests; a last line has the
bytes of all buffers.

    python examples/rendered.py METAL:Apple7 3b              vision, prefill and decode of PaliGemma-3B on an M1
    python examples/rendered.py CUDA:sm_90 2-3b --bits int8
    python examples/rendered.py METAL:Apple7 train           the toy's training step
    python examples/rendered.py memory                       what fits a Mac of 8, 16 or 24 GB
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
VISION = dict(hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304, patch_size=14)
TEXT = {  # of the published checkpoints
  "3b": dict(hidden_size=2048, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1,
             intermediate_size=16384),
  "2-3b": dict(hidden_size=2304, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4,
               intermediate_size=9216),
  "2-10b": dict(hidden_size=3584, num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8,
                intermediate_size=14336)}
MACS = 8, 16, 24  # GB of memory, of which macOS lends a GPU two thirds


def stand_in(target):
  """Make tinygrad's null device render for target, "METAL:Apple7", without the libraries that a real one would load."""
  os.environ |= {"DEV": f"NULL:{target}", "NULL_ALLOW_COPYOUT": "1", "JIT": "2", "CACHELEVEL": "0"}
  if target.startswith("METAL"):
    os.environ["MAX_KERNEL_BUFFERS"] = "31"  # as tinygrad has it for METAL itself
  from tinygrad.device import Compiler
  from tinygrad.runtime import ops_null

  class Source(Compiler):
    def __init__(self, *args, **kwargs):
      super().__init__(None)

    def compile(self, src):
      return src.encode()
  metal = types.ModuleType("tinygrad.runtime.ops_metal")
  metal.MetalCompiler = Source
  sys.modules[metal.__name__] = metal
  from tinygrad.runtime.support import compiler_cuda
  compiler_cuda.NVRTCCompiler = Source
  seen, run = set(), ops_null.NullProgram.__call__

  def load(self, device, name, lib, *args, **kwargs):
    self.device, self.name, self.lib = device, name, lib

  def call(self, *bufs, local_size=(1, 1, 1), **kwargs):
    if self.lib not in seen:
      seen.add(self.lib)
      print(json.dumps({"name": self.name, "local": list(local_size or ()), "source": self.lib.decode()}))
    return run(self, *bufs, **kwargs)
  ops_null.NullProgram.__init__, ops_null.NullProgram.__call__ = load, call


def model(size, side=224, bits=None, layers=None, shard=1):
  """A VLM of a published size, or of a few of its layers, with no numbers in its weights."""
  import vlm
  from tinygrad.nn.state import get_state_dict
  kind = "gemma2" if size.startswith("2-") else "gemma"
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "config.json"
    some = {"num_hidden_layers": layers} if layers else {}
    path.write_text(json.dumps({"model_type": "paligemma", "vision_config": VISION | {"image_size": side} | some,
                                "text_config": TEXT[size] | {"model_type": kind} | some}))
    config = vlm.read_config(path)
  arrays = {}

  def put(name, kind, *shape):
    arrays[name] = np.broadcast_to(np.zeros((), kind), shape)  # takes no memory
  for name, t in get_state_dict(vlm.PaliGemma(config)).items():
    if not bits or not re.search(vlm.quantize.CHOSEN, name):
      put(name, np.uint16, *((t.shape[0], 3, 14, 14) if "patch_embedding.weight" in name else t.shape))
    elif bits == "int8" or "embed_tokens" in name:
      put(name, np.int8, *t.shape)
      put(name + "_scale", np.float32, t.shape[0])
    else:
      groups = -(-t.shape[1] // 32)
      put(name, np.uint8, t.shape[0], groups * 16)
      put(name + "_scale", np.float32, t.shape[0], groups)
  device = vlm.compiled.open_device(None, shard)
  return vlm.VLM(vlm.assemble(config, arrays, device), config, None, device)


def answer(vlm_model, batch=1, length=8):
  """Vision, prefill and three decode steps."""
  import vlm
  config = vlm_model.config
  P, C = config.patches, 256 * -(-(config.patches + length + 256) // 256)
  features = vlm_model.vision(np.zeros((1, 3, config.image_size, config.image_size), np.float32))[1]
  where = vlm.layout([5] * batch, P, length, C)
  image = features.expand(batch, *features.shape[1:]).contiguous().realize() if batch > 1 else features
  vlm_model.prefill(image, np.zeros((batch, length), np.int32), where)
  slots = vlm.upload(where, vlm_model.device)
  for step in range(3):
    vlm_model.decode(np.zeros(batch, np.int32), P + length + step, slots)


def training():
  import train
  parser = argparse.ArgumentParser()
  train.add_arguments(parser)
  with tempfile.TemporaryDirectory() as folder:
    args = parser.parse_args(["--train", "--steps", "2", "--batch", "4", "--save", folder])
    args.quiet = True
    run = train.Run(args)
    run.trainer.step(run.trainer.batch(*run.data.batch(0), run.data.text), 1e-3)


def memory():
  """What each size takes of a Mac's memory, counted from the buffers of a run on the null device."""
  print("| checkpoint | weights | GB for the GPU | fits a Mac of |\n|---|---|---|---|")
  for size in TEXT:
    for bits in (None, "int8", "int4"):
      command = [sys.executable, __file__, "METAL:Apple7", size, *(["--bits", bits] if bits else [])]
      output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
      used = json.loads(output.splitlines()[-1])["bytes"] / 1e9
      fits = [f"{gb} GB" for gb in MACS if used < gb * 1.0737 * 2 / 3]  # macOS counts in 2^30
      print(f"| PaliGemma {'2 ' if size[0] == '2' else ''}{size[-2:].lstrip('-').upper()} | {bits or 'bfloat16'} | "
            f"{used:.1f} | {fits[0] if fits else 'more'} |", flush=True)


def main():
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("target", help="METAL:Apple7, CUDA:sm_90, ...; or memory")
  p.add_argument("what", nargs="?", choices=[*TEXT, "train"])
  p.add_argument("--bits", choices=["int8", "int4"])
  p.add_argument("--batch", type=int, default=1)
  p.add_argument("--side", type=int, default=224)
  p.add_argument("--shard", type=int, default=1)
  p.add_argument("--layers", type=int, help="of each tower, instead of all: they have the same kernels")
  args = p.parse_args()
  if args.target == "memory":
    memory()
    return
  stand_in(args.target)
  sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
  from tinygrad.helpers import GlobalCounters
  import vlm
  vlm.compiled.KEPT = 0  # nothing of this is for a real device
  if args.what == "train":
    training()
  else:
    answer(m := model(args.what, args.side, args.bits, args.layers, args.shard), args.batch)
  print(json.dumps({"bytes": GlobalCounters.mem_used}))


if __name__ == "__main__":
  main()
