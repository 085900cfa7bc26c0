"""Every kernel of a model, for a GPU that is not there: tinygrad's null device schedules and renders as a real one does,
and runs nothing. The kernels go to stdout as JSON lines {"name", "local", "source"}, for the tests; a last line has the
bytes of all buffers.

    python examples/rendered.py METAL:Apple7 3b              vision, prefill and decode of PaliGemma-3B on an M1
    python examples/rendered.py CUDA:sm_90 2-3b --bits int8
    python examples/rendered.py METAL:Apple7 train           the toy's training step
    python examples/rendered.py memory                       what fits a Mac of 8, 16 or 24 GB
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
VISION = dict(hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304, patch_size=14)
TEXT = {  # of the published checkpoints
  "3b": dict(hidden_size=2048, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1, intermediate_size=16384),
  "2-3b": dict(hidden_size=2304, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4,
               intermediate_size=9216),
  "2-10b": dict(hidden_size=3584, num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8,
                intermediate_size=14336)}
MACS = 8, 16, 24  # GB of memory, of which macOS lends a GPU two thirds


def stand_in(target):
  """Make tinygrad's null device render for target, "METAL:Apple7", without the libraries that a real one would load."""
  os.environ |= {"DEV": f"NULL:{target}", "NULL_ALLOW_COPYOUT": "1", "JIT": "2", "CACHELEVEL": "0"}
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


def model(size, side, bits):
  """A VLM of a published size with no numbers in its weights."""
  import vlm
  from tinygrad import Tensor, dtypes
  from tinygrad.nn.state import get_state_dict
  gemma2 = size.startswith("2-")
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({
      "model_type": "paligemma", "vision_config": VISION | {"image_size": side},
      "text_config": TEXT[size] | {"model_type": "gemma2" if gemma2 else "gemma"}}))
    config = vlm.read_config(path)
  net = vlm.PaliGemma(config)
  for name, t in get_state_dict(net).items():
    kind = dtypes.uint16
    if bits and vlm.quantize.chosen(name, t.ndim):
      N, K = t.shape
      four = vlm.quantize.bits_of(name, bits) == 4
      data = Tensor.empty(N, -(-K // 32) * 16 if four else K, dtype=dtypes.uint8 if four else dtypes.int8).realize()
      vlm.put(net, name, vlm.Packed(data, Tensor.empty(N, *[-(-K // 32)] * four).realize(), K))
    else:
      t.replace(Tensor.empty(*t.shape, dtype=kind).realize())
  return vlm.VLM(net, config, None, vlm.compiled.open_device())
