"""Weights in 8 or 4 bits: `python vlm.py --quantize int8|int4 [--save DIR]`.

int8 has a scale for each row, int4 one for each 32 numbers of a row, the last of which are padding where a row is no
multiple of 32 (SigLIP's 4304). The embedding, which is also the head, keeps 8 bits under int4: it is a fifth of what a
token reads, and what decides between two likely tokens is the difference of two of its rows. Norms, biases, position
and patch embedding stay as they are: together they are less than 1 % of the weights.
"""
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tinygrad import dtypes
from tinygrad.nn.state import get_state_dict

import masks
import original
import train
import vlm
from vlm import Fault

BITS = {"int8": 8, "int4": 4}
CHOSEN = r"(proj|fc1|fc2|linear|embed_tokens)\.weight$"
ROWS = 4096  # at a time: float32 copies of the whole embedding would take 4 GB


class Packed:
  """A weight (N, K) in few bits: int8 numbers (N, K) and a scale (N,) for each row, or uint8 (N, G * 16), two numbers
  of 4 bits in each, the first in the lower half and all of them plus 8, and a scale (N, G) for each 32 of a row."""
  def __init__(self, data, scale, K):
    self.data, self.scale, self.shape, self.dtype = data, scale, (*data.shape[:-1], K), data.dtype

  def __getitem__(self, ids):
    return Packed(self.data[ids], self.scale[ids], self.shape[-1])

  def widen(self):
    """-> float32 (N, K)."""
    if self.dtype == dtypes.int8:
      return self.data.float() * self.scale.unsqueeze(-1)
    numbers = (self.data & 15).stack(self.data >> 4, dim=-1).reshape(*self.scale.shape, 32).float() - 8
    return (numbers * self.scale.unsqueeze(-1)).flatten(-2)[..., :self.shape[-1]]


def quantize(w, bits):
  """w (N, K) of any floating type, bfloat16 as uint16 -> numbers and scales, as in Packed."""
  if w.dtype == np.uint16:
    w = (w.astype(np.uint32) << 16).view(np.float32)
  w = w.astype(np.float32, copy=False)
  if bits == 8:
    scale = np.maximum(np.abs(w).max(1), 1e-30) / 127
    return np.rint(w / scale[:, None]).astype(np.int8), scale
  groups = np.pad(w, ((0, 0), (0, -w.shape[1] % 32))).reshape(len(w), -1, 32)
  # The number farthest from zero becomes -8: all 16 values are used, where a scale of max / 7 would leave one out.
  farthest = np.take_along_axis(groups, np.abs(groups).argmax(2)[..., None], 2)[..., 0]
  scale = np.where(farthest == 0, 1, farthest / -8)
  numbers = (np.rint(groups / scale[..., None]).clip(-8, 7) + 8).astype(np.uint8).reshape(len(w), -1)
  return numbers[:, ::2] | numbers[:, 1::2] << 4, scale


def pack(arrays, name):
  """Quantise the chosen weights of {name: array} in place. name: "int8" or "int4", or None to do nothing."""
  if name is None:
    return
  chosen = [n for n, a in arrays.items() if re.search(CHOSEN, n) and a.ndim == 2 and a.itemsize > 1]
  if not chosen:
    raise Fault("these weights are quantised already; leave out --quantize")
  jobs = []
  with ThreadPoolExecutor() as pool:  # numpy computes outside Python's lock
    for n in chosen:
      bits = 8 if "embed_tokens" in n else BITS[name]
      jobs.append([pool.submit(quantize, arrays[n][i:i + ROWS], bits) for i in range(0, len(arrays[n]), ROWS)])
    for i, (n, parts) in enumerate(zip(chosen, jobs)):
      vlm.status(f"quantising: {i} of {len(chosen)} weights")
      arrays[n], arrays[n + "_scale"] = map(np.concatenate, zip(*[part.result() for part in parts]))
  vlm.status("")


def stored_shapes(shapes, arrays):
  """{name: shape} of a model's weights -> that of the tensors that hold them, with their scales."""
  stored = dict(shapes)
  for name, (N, *K) in shapes.items():
    kind = arrays[name].dtype if name in arrays else None
    if kind == np.int8:
      stored[name + "_scale"] = (N,)
    elif kind == np.uint8:
      stored[name], stored[name + "_scale"] = (N, -(-K[0] // 32) * 16), (N, -(-K[0] // 32))
  return stored


def save(model, source, folder, name):
  """Write a quantised model as a folder that vlm.load takes. source: the folder that it came from. Raises Fault."""
  source, folder = Path(source), Path(folder)
  if any(folder.glob("*.safetensors*")):
    raise Fault(f"{folder} holds a checkpoint, which would be lost; choose another --save")
  tensors = {}
  for path, t in get_state_dict(model.net).items():
    path = train.hub_name(path).replace(".weight.data", ".weight").replace(".weight.scale", ".weight_scale")
    tensors[path] = t, t.dtype
  config = original.config(original.config_path(source))
  config["quantization_config"] = {"quant_method": "vlm.py", "weights": name}  # transformers refuses it by this
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < sum(t.nbytes() for t, _ in tensors.values()):
      raise Fault(f"{folder}: the disk is too full for the quantised weights; free some", 1)
    train.write_file(folder / "config.json", [json.dumps(config, indent=1).encode()])
    train.write_file(folder / "tokenizer.model", [original.tokenizer_path(source).read_bytes()])
    masks.keep(original.tokenizer_path(source).parent, folder)
    train.write_file(folder / "model.safetensors", train.safetensors(tensors, model.config.patch_size))
  except OSError as e:
    raise Fault(f"{folder}: {e.strerror or e}; choose another --save", code=1) from None
