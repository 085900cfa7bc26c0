"""LoRA (arxiv.org/abs/2106.09685): two small matrices beside each large one, which stays as it is, mapped or
quantised. In the files of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

    x W'  becomes  x W' + scale (x A') B'
    A (r, in), B (out, r), scale alpha / r, or with rsLoRA alpha / sqrt(r)

An AdaptedLinear stands where a Linear stood, and the model does not know of it. Imports nothing of vlm."""
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from safetensors import SafetensorError, safe_open

from tokenizer import Fault, regular

from . import fast

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GEMMA = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
SIGLIP = "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"
PROJECTOR = "multi_modal_projector.linear"
PREFIX = "base_model.model.model."  # of PEFT's names on transformers' PaliGemmaForConditionalGeneration
# What changes the arithmetic and is not computed here, if it is anything but off.
UNSUPPORTED = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "layer_replication",
               "target_parameters", "trainable_token_indices", "rank_pattern", "alpha_pattern",
               "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config")
TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class AdaptedLinear:
  """A layer, called with x (.., in) -> (.., out), plus scale (x A') B'. a (r, in), b (out, r), scale (1,):
  float32. scale is None where b has it already; a number would be part of a compiled program, which other
  adapters may use."""
  def __init__(self, base_layer, a, b, scale=None):
    self.base_layer, self.scale = base_layer, scale
    self.lora_A, self.lora_B = SimpleNamespace(weight=a), SimpleNamespace(weight=b)

  def __call__(self, x):
    low = matmul(x, self.lora_A.weight)
    return self.base_layer(x) + matmul(low if self.scale is None else low * self.scale, self.lora_B.weight)


def matmul(x, w):
  out = fast.matmul(x, w)
  return x @ w.transpose(0, 1) if out is None else out


def pattern(vision):
  """A regular expression for the paths of what is adapted: the products of Gemma's layers, and SigLIP's."""
  gemma = rf"language_model\.layers\.\d+\.\w+\.({'|'.join(GEMMA)})"
  siglip = rf"vision_tower\.(vision_model\.)?encoder\.layers\.\d+\.\w+\.({'|'.join(SIGLIP)})"
  return f"({gemma}|{siglip})" if vision else f"({gemma})"


def find(net, path):
  """The layer at a path in the model, and what holds it; None twice where there is none."""
  owner, layer = None, net
  for name in path.split("."):
    owner = layer
    if isinstance(owner, list):
      layer = owner[int(name)] if name.isdigit() and int(name) < len(owner) else None
    else:
      layer = getattr(owner, name, None)
  return (layer, owner) if callable(layer) and hasattr(layer, "weight") else (None, None)


def create(net, names, rank, alpha, place):
  """Adapters for the layers of those paths, as PEFT begins: A random and B zero, so that nothing changes.
  place: an array -> a tensor on the model's device."""
  for i, name in enumerate(names):
    layer, owner = find(net, name)
    outputs, inputs = layer.weight.shape
    a = np.random.default_rng((0, i)).uniform(-1, 1, (rank, inputs)) * inputs ** -0.5
    arrays = a, np.zeros((outputs, rank)), np.full(1, alpha / rank)
    tensors = (place(array.astype(np.float32)) for array in arrays)
    setattr(owner, name.split(".")[-1], AdaptedLinear(layer, *tensors))


def config(rank, alpha, vision, base):
  """-> the content of an adapter_config.json, which PEFT reads, too. base: the name of what was adapted."""
  return {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": rank, "lora_alpha": alpha,
          "target_modules": rf".*\.{pattern(vision)}", "lora_dropout": 0.0, "bias": "none",
          "use_rslora": False, "fan_in_fan_out": False, "modules_to_save": None, "inference_mode": True,
          "task_type": None}


def read_config(folder):
  """-> the dict in the adapter_config.json of a folder; what it asks for is checked. Raises Fault."""
  path = Path(folder) / CONFIG
  try:
    found = json.loads(regular(path).read_text())
    if found["peft_type"] != "LORA":
      raise Fault(f"{path}: {str(found['peft_type'])[:50]} is not supported, LORA is")
    if not (type(found["r"]) is int and 1 <= found["r"] <= 10_000 and 0 < found["lora_alpha"] < 10 ** 9):
      raise Fault(f"{path}: r and lora_alpha must be numbers above 0")
  except OSError as e:
    raise Fault(f"{path}: {e.strerror}; an adapter is a folder with {CONFIG} and {WEIGHTS}") from None
  except (ValueError, KeyError, TypeError, RecursionError):
    raise Fault(f"{path}: not the file of an adapter that PEFT or train.py writes") from None
  for key in (*UNSUPPORTED, "bias"):
    if found.get(key) and (key, found[key]) != ("bias", "none"):
      raise Fault(f"{path}: {key} {str(found[key])[:50]} is not supported; merge the adapter with PEFT, and "
                  "use what it writes")
  return found


def read_arrays(path):
  """-> {name: float32 array} of a safetensors file. Raises Fault."""
  try:
    with safe_open(regular(path), "numpy"):  # checks the header
      data = np.fromfile(path, np.uint8)
  except (SafetensorError, OSError, ValueError) as e:
    raise Fault(f"{path}: not a complete safetensors file ({str(e)[:300]})") from None
  start, arrays = 8 + data[:8].view(np.uint64).item(), {}
  for name, t in json.loads(data[8:start].tobytes()).items():
    if name == "__metadata__":
      continue
    if t["dtype"] not in TYPES:
      raise Fault(f"{path}: {name} is {t['dtype']}; weights must be float32, float16 or bfloat16")
    array = data[start:][slice(*t["data_offsets"])].view(TYPES[t["dtype"]]).reshape(t["shape"])
    if array.dtype == np.uint16:
      array = (array.astype(np.uint32) << 16).view(np.float32)
    arrays[name] = array.astype(np.float32)
  return arrays


def read(folder):
  """A folder as PEFT or train.py writes it -> {path of a layer: (A, B)}, the scale of their product, and
  {path of a weight: array}, those that are replaced, which only the projector's can be. Raises Fault."""
  found, path = read_config(folder), Path(folder) / WEIGHTS
  rank, pairs, replaced = found["r"], {}, {}
  for name, array in read_arrays(path).items():
    place = re.sub(r"^((base_model|model)\.)+", "", name)
    place = re.sub(r"^(language_model|vision_tower)\.(model|vision_model)\.", r"\1.", place)
    layer, _, kind = place.partition(".lora_")
    if kind in ("A.weight", "B.weight"):
      pairs.setdefault(layer, {})[kind[0]] = array
    elif place in (f"{PROJECTOR}.weight", f"{PROJECTOR}.bias"):
      replaced[place] = array
    else:
      raise Fault(f"{path}: {name} is not supported; LoRA's A and B are, and modules_to_save of "
                  "multi_modal_projector")
  for layer, pair in pairs.items():
    a, b = pair.get("A"), pair.get("B")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != rank or b.shape[1] != rank:
      raise Fault(f"{path}: {layer} has no A and B of rank {rank}")
  if not pairs and not replaced:
    raise Fault(f"{path} holds no adapter")
  scale = found["lora_alpha"] / (rank ** 0.5 if found.get("use_rslora") else rank)
  return {layer: (pair["A"], pair["B"]) for layer, pair in pairs.items()}, scale, replaced


def check_shapes(folder, pairs, replaced, shapes):
  """Raises Fault where the model, {path of a weight: shape}, has no such weight."""
  wanted = {f"{layer}.weight": (len(b), a.shape[1]) for layer, (a, b) in pairs.items()}
  wanted |= {name: array.shape for name, array in replaced.items()}
  for name, shape in wanted.items():
    if tuple(shapes.get(name, ())) != shape:
      there = f"is {tuple(shapes[name])}" if name in shapes else "is missing"
      raise Fault(f"{folder}: {name} is {shape}, and in this model {there}; the adapter is another model's")


def attach(net, folder, place, device):
  """The adapter in a folder onto a model, whose Linears it names become AdaptedLinears. place: as vlm.upload.
  Raises Fault."""
  pairs, scale, replaced = read(folder)
  layers = {path: find(net, path) for path in [*pairs, PROJECTOR]}
  check_shapes(folder, pairs, replaced, {
    f"{path}.{kind}": getattr(layer, kind).shape for path, (layer, _) in layers.items() if layer
    for kind in ("weight", "bias") if getattr(layer, kind, None) is not None})
  # the scale is in B: one kernel less for each layer and token
  pairs = {path: (a, b * np.float32(scale)) for path, (a, b) in pairs.items()}
  net.adapter = pairs, replaced  # a tensor over borrowed memory does not keep it alive
  for path, pair in pairs.items():
    layer, owner = layers[path]
    adapted = AdaptedLinear(layer, *(place(array, device, "adapter") for array in pair))
    setattr(owner, path.split(".")[-1], adapted)
  for name, array in replaced.items():
    setattr(layers[PROJECTOR][0], name.split(".")[-1], place(array, device, "adapter"))
