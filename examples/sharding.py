"""`--shard N`: a model too large for one device, its weights split over N by tinygrad's own sharding.

Columns of what a layer computes first (q, k, v, gate, up, fc1) and rows of what comes after (o, out, down, fc2), so
that each device has whole heads and whole hidden units, and the devices add their parts once in each half of a layer.
What N does not divide stays whole on every device: Gemma 1 has a single key/value head. The embedding is split by its
width: of a token each device looks up a part, which all then share, and as the head it adds up parts of each logit.
"""
import math

import numpy as np
from tinygrad import Tensor

COLUMNS = "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1"
ROWS = "o_proj", "out_proj", "down_proj", "fc2"


def axis(name, array, config, device):
  """The axis along which a weight of that name (its path in PaliGemma), stored as that array, is split over the
  devices, or None. "cache" is a KV cache (B, K, C, d)."""
  count, shape = len(device) if isinstance(device, tuple) else 1, array.shape
  *_, layer, kind = ("", *name.split("."))
  # the query heads of a key/value head stay together, but where there is only one of these: it is whole everywhere
  one = config.kv_heads == 1 and layer not in ("k_proj", "v_proj")
  heads = config.vision_heads if "vision_tower" in name else config.heads if one else config.kv_heads
  split = None
  if name == "cache":
    split, units = 1, config.kv_heads
  elif layer in COLUMNS:
    split, units = 0, heads if layer in ("q_proj", "k_proj", "v_proj") else shape[0]
  elif layer in ROWS and len(shape) == 2:  # a bias, or a scale for each row, is for the sum
    inputs = {"fc2": config.vision_mlp, "down_proj": config.mlp, "out_proj": config.vision_width,
              "o_proj": config.heads * config.head_dim}[layer]
    if array.dtype == np.uint8 or kind == "weight_scale":  # int4: whole groups of 32, and no padding
      inputs = inputs // 32 if inputs % 32 == 0 else 1
    split, units = 1, math.gcd(inputs, heads) if layer in ("o_proj", "out_proj") else inputs
  elif layer == "embed_tokens" and len(shape) == 2:
    split, units = 1, shape[1]
  return None if split is None or count == 1 or units % count or shape[split] % count else split


def whole(t):
  """A tensor that is split -> whole on every device; any other as it is."""
  return t if t.uop.axis is None else Tensor(t.uop.copy_to_device(t.device))


def memory(tensors):
  """{name: Tensor} -> bytes of them on each of their devices."""
  return sum(t.nbytes() // (len(t.device) if isinstance(t.device, tuple) and t.uop.axis is not None else 1)
             for t in tensors.values())
