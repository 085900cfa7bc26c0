"""A checkpoint in 8 or 4 bits, made once and then loaded like any other: half or a third of the memory.

    python examples/quantize.py weights/paligemma-3b-mix-224 weights/paligemma-3b-int4 --bits 4
    python vlm.py examples/shapes.png "caption en" --weights weights/paligemma-3b-int4

8 bits have a scale for each row, 4 one for each 32 numbers of a row, the last of which are padding where a
row is no multiple of 32 (SigLIP's 4304). The embedding, which is also the head, keeps 8 bits under 4: it is a
fifth of what a token reads, and what decides between two likely tokens is the difference of two of its rows.
Norms, biases, position and patch embedding stay as they are: together they are less than 1 % of the weights.
"""
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import vlm  # first, because it says what is not installed
import numpy as np
import checkpoint

ROOT = Path(vlm.__file__).resolve().parent
CHOSEN = r"(proj|fc1|fc2|linear|embed_tokens)\.weight$"
BLOCK = 1 << 17  # numbers that a thread has in float32 at a time: what its cache does not hold takes four times as long


def quantize(w, bits):
  """w (N, K) of any floating type, bfloat16 as uint16 -> numbers and scales, as in fast.Packed."""
  if w.dtype == np.uint16:
    w = (w.astype(np.uint32) << 16).view(np.float32)
  w = w.astype(np.float32, copy=False)
  if bits == 8:
    scale = np.maximum(np.abs(w).max(1), 1e-30) / 127
    return np.rint(w / scale[:, None]).astype(np.int8), scale
  groups = np.pad(w, ((0, 0), (0, -w.shape[1] % 32))).reshape(len(w), -1, 32)
  # The number farthest from zero becomes -8: all 16 values are used, where a scale of max / 7 leaves one out.
  farthest = np.take_along_axis(groups, np.abs(groups).argmax(2)[..., None], 2)[..., 0]
  scale = np.where(farthest == 0, 1, farthest / -8)
  numbers = (np.rint(groups / scale[..., None]).clip(-8, 7) + 8).astype(np.uint8).reshape(len(w), -1)
  return numbers[:, ::2] | numbers[:, 1::2] << 4, scale


def quantize_by_blocks(w, bits, pool):
  """quantize(w, bits) by the threads of a pool, a block of rows each: float32 copies of a whole embedding
  take gigabytes."""
  rows = max(1, BLOCK // w.shape[1])
  whole = [np.empty((len(w), *part.shape[1:]), part.dtype) for part in quantize(w[:1], bits)]

  def fill(i):
    for part, block in zip(whole, quantize(w[i:i + rows], bits)):
      part[i:i + rows] = block
  list(pool.map(fill, range(0, len(w), rows)))  # waits for all
  return whole


def packed(array, bits, pool):
  """A weight (N, K) -> its numbers and its scales, each a checkpoint.Later: quantised when the numbers are
  written, which the scales follow."""
  (N, K), scales = array.shape, []
  groups = -(-K // 32)

  def numbers():
    numbers, scale = quantize_by_blocks(array, bits, pool)
    scales.append(scale)
    return numbers
  if bits == 8:
    return checkpoint.Later((N, K), np.int8, numbers), checkpoint.Later((N,), np.float32, scales.pop)
  data = checkpoint.Later((N, groups * 16), np.uint8, numbers)
  return data, checkpoint.Later((N, groups), np.float32, scales.pop)


def save(source, folder, bits):
  """The folder `source` in 8 or 4 bits -> a new folder that vlm.load takes. Raises Fault."""
  vlm.read_config(source / "config.json")
  vlm.Tokenizer(source / "tokenizer.model")
  arrays = vlm.read_weights(source)
  if any(array.itemsize == 1 for array in arrays.values()):
    raise vlm.Fault(f"{source} is quantised already; give the weights it was made of")
  config = json.loads((source / "config.json").read_text())
  # by this transformers refuses it
  config["quantization_config"] = {"quant_method": "vlm.py", "weights": f"int{bits}"}
  tensors = {}
  with ThreadPoolExecutor() as pool:  # numpy computes outside Python's lock
    for name, array in arrays.items():
      if array.ndim == 2 and re.search(CHOSEN, name):
        tensors[name], tensors[name + "_scale"] = packed(array, 8 if "embed_tokens" in name else bits, pool)
      else:
        tensors[name] = checkpoint.Later.of(array)
    checkpoint.write(folder, config, source / "tokenizer.model", tensors)


@vlm.program
def main(argv):
  p = vlm.terminal.ArgumentParser(prog="quantize.py", description="A PaliGemma folder in 8 or 4 bits.", allow_abbrev=False)
  p.add_argument("source", metavar="DIR", help="PaliGemma's folder or name")
  p.add_argument("folder", metavar="OUT", type=Path, help="the new folder")
  p.add_argument("--bits", type=int, choices=(8, 4), required=True, help="of a weight")
  p.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
  args = p.parse_args(argv)
  save(vlm.terminal.find_weights(args.source, ROOT), args.folder, args.bits)
  size = sum(file.stat().st_size for file in args.folder.glob("*.safetensors"))
  vlm.log.info(f"{args.folder}: {size / 1e9:.3g} GB in {args.bits} bits")


if __name__ == "__main__":
  sys.exit(main())
