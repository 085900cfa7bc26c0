"""A model too large for one device: its weights split over several of a kind, by tinygrad's own sharding.

    python examples/shard.py examples/shapes.png "caption en" --device CPU --devices 2

Columns of what a layer computes first (q, k, v, gate, up, fc1) and rows of what comes after (o, out, down,
fc2), so that each device has whole heads and whole hidden units, and the devices add their parts once in each
half of a layer. What they cannot divide evenly stays whole on every device: Gemma 1 has a single key/value
head. The embedding is split by its width: of a token each device looks up a part, which all then share, and
as the head it adds up parts of each logit.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import vlm  # first, because it says what is not installed
import numpy as np
from tinygrad import Device, Tensor
from tinygrad.nn.state import get_state_dict

ROOT = Path(vlm.__file__).resolve().parent  # where weights/ is
COLUMNS = "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1"
ROWS = "o_proj", "out_proj", "down_proj", "fc2"


def split_axis(name, array, config, count):
  """The axis along which a weight of that name (its path in PaliGemma), stored as that array, is split over
  so many devices, or None. "cache" is a KV cache (B, K, C, d)."""
  text, vision, shape = config.text, config.vision, array.shape
  *_, layer, kind = ("", *name.split("."))
  # The query heads of a key/value head stay together, but if there is only one of these: it is everywhere.
  single = text.num_key_value_heads == 1 and layer not in ("k_proj", "v_proj")
  heads = text.num_attention_heads if single else text.num_key_value_heads
  heads = vision.num_attention_heads if "vision_tower" in name else heads
  axis = None
  if name == "cache":
    axis, units = 1, text.num_key_value_heads
  elif layer in COLUMNS:
    axis, units = 0, heads if layer in ("q_proj", "k_proj", "v_proj") else shape[0]
  elif layer in ROWS and len(shape) == 2:  # a bias, or a scale for each row, is for the sum
    inputs = {"fc2": vision.intermediate_size, "down_proj": text.intermediate_size,
              "out_proj": vision.hidden_size, "o_proj": text.num_attention_heads * text.head_dim}[layer]
    if array.dtype == np.uint8 or kind == "weight_scale":  # int4: whole groups of 32, and no padding
      inputs = inputs // 32 if inputs % 32 == 0 else 1
    axis, units = 1, math.gcd(inputs, heads) if layer in ("o_proj", "out_proj") else inputs
  elif layer == "embed_tokens" and len(shape) == 2:
    axis, units = 1, shape[1]
  return None if axis is None or units % count or shape[axis] % count else axis


def placing(folder, devices):
  """-> what stands for vlm.upload when the model of that folder is split: each device gets a part of an
  array, or all of it. Raises Fault."""
  config = vlm.read_config(Path(folder) / "config.json")
  def place(array, device, name="cache"):
    if isinstance(array, vlm.kernels.Packed):
      return array.placed(place, device, name)
    axis = split_axis(name, array, config, len(devices))
    return vlm.upload(array, devices[0]).shard(devices, axis).realize()
  return place


def gather(t):
  """A tensor that is split -> whole on every device; any other as it is."""
  return t if t.uop.axis is None else Tensor(t.uop.copy_to_device(t.device))


class SplitEmbedding(vlm.Embedding):
  """An Embedding split by its width: each device looks up its part of a row, and they share them."""
  def __init__(self, weight):
    self.weight = weight
  def __call__(self, ids):
    return gather(super().__call__(ids))


def spread(model, devices):
  """A model whose weights `placing` has split -> the model, with inputs that go to all devices."""
  model.device = devices
  model.net.language_model.embed_tokens = SplitEmbedding(model.net.language_model.embed_tokens.weight)
  return model


def open_devices(name, count):
  """A name of tinygrad's, None for the best there is -> the full names of the first so many devices of its
  kind, ready for use. Raises Fault."""
  if count < 2:
    raise vlm.Fault(f"--devices {count}: at least 2; for one there is vlm.py")
  if count > 64:
    raise vlm.Fault(f"--devices {count}: at most 64")
  kind = vlm.open_device(name).split(":")[0]
  try:
    devices = tuple(Device.canonicalize(f"{kind}:{i}") for i in range(count))
    for device in devices:
      Device[device]
    return devices
  except Exception as e:  # whatever a driver that is not there raises
    raise vlm.Fault(f"{count} devices of the kind {kind} cannot be used here ({e})") from None


def load(folder, device=None, count=2):
  """vlm.load for a folder whose weights `count` devices of a kind share. Raises Fault."""
  devices = open_devices(device, count)
  return spread(vlm.load(folder, devices[0], placing(folder, devices)), devices)


def memory(model):
  """Bytes of its weights on each of a model's devices."""
  weights = get_state_dict(model.net).values()
  return sum(t.nbytes() // (1 if t.uop.axis is None else len(t.device)) for t in weights)


@vlm.program
def main(argv):
  p = vlm.terminal.ArgumentParser(prog="shard.py", allow_abbrev=False,
                 description="Ask a PaliGemma whose weights several devices share.")
  p.add_argument("images", nargs="+", metavar="IMAGE", help="pictures that are asked about")
  p.add_argument("prompt", metavar="PROMPT", help="what to ask")
  p.add_argument("--devices", type=int, default=2, metavar="N", help="how many (default %(default)s)")
  p.add_argument("--out", metavar="FILE", help="where boxes are drawn (default: IMAGE.boxes.png here)")
  p.add_argument("--json", action="store_true", help="one JSON object instead of text")
  vlm.add_arguments(p)
  args = p.parse_args(argv)
  vlm.sampling(args)  # all that can be wrong, before the slow part
  vlm.terminal.check(args, args.images, args.prompt)
  for name in args.images:
    vlm.open_image(name)
  devices = open_devices(args.device, args.devices)
  args.weights = vlm.terminal.find_weights(args.weights, ROOT)
  model = spread(vlm.open_model(args, placing(args.weights, devices)), devices)
  vlm.log.info(f"{memory(model) / 1e9:.3g} GB of weights on each of {len(devices)} devices")
  return vlm.ask(model, args, args.images, vlm.terminal.asked(args.prompt))


if __name__ == "__main__":
  sys.exit(main())
