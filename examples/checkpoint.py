"""Writing checkpoints: files as hub repositories have them, each of them whole or not at all (train.py), and whole new
folders (quantize.py, big_vision.py)."""
import contextlib
import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tinygrad import dtypes

import vlm
from tokenizer import regular

MASKS = vlm.beside("draw").NAME


def hub_name(name):
  """The reverse of vlm.canonical: the name that hub files use."""
  name = re.sub(r"^language_model\.", "language_model.model.", name)
  return re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)


def safetensors(tensors, metadata=None):
  """{name: (Tensor, type to store)}, uint16 meaning bfloat16 -> the pieces of a safetensors file."""
  kinds = {dtypes.float32: "F32", dtypes.float16: "F16", dtypes.uint16: "BF16", dtypes.int8: "I8",
           dtypes.uint8: "U8"}
  header, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
  for name, (t, dtype) in tensors.items():
    place = [end, end := end + t.numel() * dtype.itemsize]
    header[name] = {"dtype": kinds[dtype], "shape": t.shape, "data_offsets": place}
  text = json.dumps(header).encode()
  text += b" " * (-(8 + len(text)) % 64)  # aligned for vectors: the CPU uses tensors where the file is mapped
  yield len(text).to_bytes(8, "little") + text
  for t, dtype in tensors.values():
    array = t.numpy()
    if dtype == dtypes.uint16 and array.dtype != np.uint16:  # bfloat16 again, rounded to the nearest
      bits = array.view(np.uint32)
      array = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    yield np.ascontiguousarray(array.astype(np.float16) if dtype == dtypes.float16 else array).data


def ahead(pieces):
  """The same pieces, of which the next one is made while one is written."""
  pieces = iter(pieces)
  with ThreadPoolExecutor(1) as thread:
    coming = thread.submit(next, pieces, None)
    while (piece := coming.result()) is not None:
      coming = thread.submit(next, pieces, None)
      yield piece


def write_file(path, pieces):
  """Pieces of bytes -> a file, whole or not at all."""
  part = path.with_name(path.name + ".part")
  try:
    with open(part, "wb") as file:
      for piece in pieces:
        file.write(piece)
      file.flush()
      os.fsync(file.fileno())
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)


def beside(source):
  """{name: bytes} of what goes where the checkpoint of that folder goes: its decoder of masks, if there is one.
  Raises Fault."""
  path = Path(source) / MASKS
  try:
    return {MASKS: regular(path).read_bytes()} if path.exists() else {}
  except OSError as e:
    raise vlm.Fault(f"{path}: {e.strerror}; get it again, or remove it") from None


class Later:
  """An array of that shape and numpy type that `make()` makes when it is written, so that few are in memory.
  It has what `safetensors` needs of a Tensor."""
  def __init__(self, shape, dtype, make):
    self.shape, self.dtype, self.numpy = tuple(shape), getattr(dtypes, np.dtype(dtype).name), make

  @classmethod
  def of(cls, array):
    """One that is there already, such as a view of a mapped file."""
    return cls(array.shape, array.dtype, lambda: array)

  def __len__(self):
    return self.shape[0]

  def numel(self):
    return math.prod(self.shape)

  def nbytes(self):
    return self.numel() * self.dtype.itemsize


def refuse_to_overwrite(small, large):
  """small: {path: bytes}, written first; large: paths. A run that was killed has left some of the small ones, and
  they may be there with these bytes. Raises Fault if anything else is."""
  other = [path for path, data in small.items() if not (path.is_file() and path.read_bytes() == data)]
  if there := [path for path in (*large, *other) if os.path.lexists(path)]:
    raise vlm.Fault(f"{there[0]} is there already and would be lost; choose another place")


def check_space(folder, size):
  """Raises Fault if that many bytes do not fit."""
  if size > (free := shutil.disk_usage(folder).free):
    sizes = f"{size / 1e9:.1f} GB where {free / 1e9:.1f} are free"
    raise vlm.Fault(f"{folder}: the disk is too full, {sizes}; choose another place", code=1)


def write(folder, config, tokenizer, tensors):
  """config: content of the config.json; tokenizer: the path of one, beside which there may be a decoder of
  masks; tensors: {path in PaliGemma: Later}, made in this order. Raises Fault."""
  folder, existed = Path(folder), Path(folder).exists()
  small = {"tokenizer.model": tokenizer.read_bytes(), "config.json": json.dumps(config, indent=1).encode()}
  small = {folder / name: data for name, data in (small | beside(tokenizer.parent)).items()}
  model = folder / "model.safetensors"
  found = [file for file in folder.glob("*.safetensors*") if file.suffix != ".part"]  # which a kill has left
  refuse_to_overwrite({folder / MASKS: None} | small, [model, *found])
  new = [path for path in (*small, model) if not path.exists()]

  def pieces():
    named = {hub_name(name): (later, later.dtype) for name, later in tensors.items()}
    for done, piece in enumerate(ahead(safetensors(named))):
      vlm.terminal.bar(done, len(tensors), f"writing {folder}")
      yield piece
    vlm.log.debug("")
  try:
    folder.mkdir(parents=True, exist_ok=True)
    check_space(folder, sum(later.nbytes() for later in tensors.values()))
    for path, data in small.items():
      write_file(path, [data])
    write_file(model, pieces())  # last: without it the folder is no checkpoint
  except BaseException as e:  # Ctrl-C too
    for path in new:
      with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    if not existed:
      with contextlib.suppress(OSError):
        folder.rmdir()
    if isinstance(e, OSError):
      raise vlm.Fault(f"{folder}: {e.strerror or e}; choose another folder", code=1) from None
    raise
