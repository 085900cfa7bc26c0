"""Every kernel of a model, for a GPU that is not there: tinygrad's null device schedules and renders as a
real one does, and runs nothing. The kernels go to stdout as JSON lines {"name", "local", "source"}, for the
tests; a last line has the bytes of all buffers.

    python examples/gpu_dry_run.py METAL:Apple7 3b         vision, prefill and decode of PaliGemma-3B on an M1
    python examples/gpu_dry_run.py CUDA:sm_90 2-3b --bits int8
    python examples/gpu_dry_run.py METAL:Apple7 train      the toy's training step
    python examples/gpu_dry_run.py memory                  what fits a Mac of 8, 16 or 24 GB
"""
import json
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import vlm  # first, because it says what is not installed
import numpy as np
from tinygrad import helpers
from tinygrad.device import Compiler, Device
from tinygrad.helpers import CACHELEVEL, DEV, JIT, MAX_KERNEL_BUFFERS, NULL_ALLOW_COPYOUT, GlobalCounters
from tinygrad.nn.state import get_state_dict
import quantize
import shard

VISION = dict(hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304)
TEXT = {  # of the published checkpoints
  "3b": dict(hidden_size=2048, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1,
             intermediate_size=16384),
  "2-3b": dict(hidden_size=2304, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4,
               intermediate_size=9216),
  "2-10b": dict(hidden_size=3584, num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8,
                intermediate_size=14336)}
MACS = 8, 16, 24  # GB of memory, of which macOS lends a GPU two thirds


def stand_in(target):
  """Make tinygrad's null device render for target, "METAL:Apple7", without the libraries that a real one
  would load. Raises Fault."""
  from tinygrad.runtime import ops_null
  from tinygrad.runtime.support import compiler_cuda
  vlm.kernels.KEPT = 0  # nothing of this is for a real device
  JIT.value, CACHELEVEL.value, NULL_ALLOW_COPYOUT.value = 2, 0, 1
  if hasattr(helpers, "PARALLEL"):
    helpers.PARALLEL.value = 0  # other processes would know nothing of this
  if target.startswith("METAL"):
    MAX_KERNEL_BUFFERS.value = 31  # as tinygrad has it for METAL itself

  class Source(Compiler):
    def __init__(self, *args, **kwargs):
      super().__init__(None)

    def compile(self, src):
      return src.encode()
  metal = types.ModuleType("tinygrad.runtime.ops_metal")
  metal.MetalCompiler = Source
  sys.modules[metal.__name__] = metal
  compiler_cuda.NVRTCCompiler = Source
  seen, run = set(), ops_null.NullProgram.__call__

  def load(self, device, program, lib=None, *args, **kwargs):  # a name and a text in tinygrad 0.13
    self.device, self.name, self.lib = device, getattr(program, "name", program), getattr(program, "lib", lib)
    self.profile_key = None

  def call(self, *bufs, local_size=(1, 1, 1), **kwargs):
    if self.lib not in seen:
      seen.add(self.lib)
      print(json.dumps({"name": self.name, "local": list(local_size or ()), "source": self.lib.decode()}))
    return run(self, *bufs, **kwargs)
  ops_null.NullProgram.__init__, ops_null.NullProgram.__call__ = load, call
  try:
    DEV.value = f"NULL:{target}"
    Device[vlm.open_device(None)].renderer  # which is made when it is asked for
  except Exception as e:
    raise vlm.Fault(f"{target}: tinygrad renders for no such device ({e})") from None


def make_model(size, side=224, bits=None, layers=None, devices=1):
  """A VLM of a published size, or of a few of its layers, with no numbers in its weights."""
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "config.json"
    few = {"num_hidden_layers": layers} if layers else {}
    kind = {"model_type": "gemma2" if size.startswith("2-") else "gemma"}
    vision, text = VISION | {"image_size": side} | few, TEXT[size] | kind | few
    path.write_text(json.dumps({"model_type": "paligemma", "vision_config": vision, "text_config": text}))
    config = vlm.read_config(path)
    names = shard.open_devices(None, devices) if devices > 1 else vlm.open_device(None)
    place = shard.placing(folder, names) if devices > 1 else vlm.upload
  arrays = {}

  def put(name, kind, *shape):
    arrays[name] = np.broadcast_to(np.zeros((), kind), shape)  # takes no memory
  for name, t in get_state_dict(vlm.PaliGemma(config)).items():
    if not bits or not re.search(quantize.CHOSEN, name):
      put(name, np.uint16, *t.shape)
    elif bits == "int8" or "embed_tokens" in name:
      put(name, np.int8, *t.shape)
      put(name + "_scale", np.float32, t.shape[0])
    else:
      groups = -(-t.shape[1] // 32)
      put(name, np.uint8, t.shape[0], groups * 16)
      put(name + "_scale", np.float32, t.shape[0], groups)
  model = vlm.VLM(vlm.assemble(config, arrays, names, place), config, None, names, place)
  return shard.spread(model, names) if devices > 1 else model


def answer(model, batch=1, length=8):
  """Vision, prefill and three decode steps."""
  P, side = model.config.vision.patches, model.config.vision.image_size
  C = 256 * -(-(P + length + 256) // 256)
  features = model.vision(np.zeros((3, side, side), np.float32))[1]
  positions = vlm.layout([5] * batch, P, length, C)
  image = vlm.upload(np.stack([features] * batch), model.device)
  model.prefill(image, np.zeros((batch, length), np.int32), positions)
  positions = vlm.upload(positions, model.device)
  for step in range(3):
    model.decode(np.zeros(batch, np.int32), P + length + step, positions)


def training(layers=None):
  """One step of the toy's training, or of a toy with fewer layers."""
  import train
  if layers:
    for tower in "vision_config", "text_config":
      train.TOY[tower]["num_hidden_layers"] = layers
  with tempfile.TemporaryDirectory() as folder:
    run = train.Run(train.arguments(["--steps", "2", "--batch", "4", "--save", folder, "--quiet"]))
    run.trainer.step(run.trainer.batch(*run.data.batch(0), run.data.text), 1e-3)


def memory_row(size, bits, used):
  """A row of the table: used bytes of a GPU."""
  name = f"PaliGemma {size.upper().replace('-', ' ')}"
  enough = [f"{gb} GB" for gb in MACS if used < gb * 2 ** 30 * 2 / 3]  # macOS counts in 2^30
  return f"| {name} | {bits or 'bfloat16'} | {used / 1e9:.1f} | {[*enough, 'more'][0]} |"


def memory():
  """What each size takes of a Mac's memory, counted from the buffers of a run on the null device."""
  print("| checkpoint | weights | GB for the GPU | fits a Mac of |\n|---|---|---|---|")
  for size in TEXT:
    for bits in (None, "int8", "int4"):
      command = [sys.executable, __file__, "METAL:Apple7", size, *(["--bits", bits] if bits else [])]
      output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
      print(memory_row(size, bits, json.loads(output.splitlines()[-1])["bytes"]), flush=True)


@vlm.program
def main(argv):
  p = vlm.terminal.ArgumentParser(prog="gpu_dry_run.py", allow_abbrev=False,
                 description="Print every kernel of a model, for a GPU that is not there.")
  p.add_argument("target", metavar="TARGET", help="METAL:Apple7, CUDA:sm_90, ...; memory: what fits a Mac")
  p.add_argument("what", nargs="?", choices=[*TEXT, "train"], help="a published size, or the toy's training")
  p.add_argument("--bits", choices=["int8", "int4"], help="of quantised weights")
  p.add_argument("--batch", type=int, default=1, metavar="N", help="questions at once")
  p.add_argument("--side", type=int, default=224, metavar="S", help="of the picture, in pixels")
  p.add_argument("--shard", type=int, default=1, metavar="N", help="devices that share the weights")
  p.add_argument("--layers", type=int, metavar="N", help="of each tower, not all: their kernels are the same")
  args = p.parse_args(argv)
  sizes = ["bits", "batch", "side", "shard", *(["layers"] if args.what != "train" else [])]
  chosen = [f"--{name}" for name in sizes if getattr(args, name) != p.get_default(name)]
  if chosen and args.what not in TEXT:
    raise vlm.Fault(f"{vlm.terminal.some(chosen)}: only of a published size")
  if args.target == "memory":
    if args.what:
      raise vlm.Fault("memory is of all sizes; leave out the rest")
    return memory()
  if not args.what:
    raise vlm.Fault(f"kernels of what? give one of {', '.join(TEXT)}, train")
  stand_in(args.target)
  if args.what == "train":
    training(args.layers)
  else:
    model = make_model(args.what, args.side, args.bits, args.layers, args.shard)  # counted below
    answer(model, args.batch)
  print(json.dumps({"bytes": GlobalCounters.mem_used}))


if __name__ == "__main__":
  sys.exit(main())
