"""Google's own checkpoints: an .npz of big_vision (Kaggle: pt_224.npz, paligemma2-3b-pt-224.b16.npz, ...) in place of a
folder, `python vlm.py --weights pt_224.npz`.

What a config.json would say is read off the shapes: both widths, layers, heads, head sizes and MLPs, the patch, the
picture's side, the rows of the embedding (257152, where hub files have 64 more that mean nothing), and whether it is
Gemma 2, which alone has norms after attention and MLP. Not in the shapes are
  - Gemma 2's query scale: by SCALARS, on the width, for the published sizes; for others it has to be given;
  - what no published file changes: epsilons, RoPE's theta, Gemma 2's soft-caps, its window of 4096 in every other
    layer, the context of 8192, the end token. They are read_config's defaults, unless given.
What is given stands in a file beside pt_224.npz, pt_224.json, in the form of a config.json, of which it is any part.
The tokenizer is not in the .npz either: tokenizer.model or paligemma_tokenizer.model is taken from the same folder.

    python examples/original.py FOLDER OUT.npz      writes a folder in this layout, with what belongs beside it
"""
import json
import math
import mmap
import os
import struct
import sys
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))
import vlm
from vlm import Fault

SCALARS = {2304: 256, 3584: 256, 4608: 144}  # Gemma 2's width (2b, 9b, 27b): query_pre_attn_scalar
TYPES = {"V2": np.uint16, "float32": np.float32, "float16": np.float16}  # numpy knows no bfloat16: two bytes of void
TOKENIZERS = "tokenizer.model", "paligemma_tokenizer.model"
BLOCK = 16  # rows at a time: a transposed copy that jumps through the whole matrix takes seven times as long


def transposed(a):
  """(in, out) -> (out, in), as a Linear has it."""
  out = np.empty(a.shape[::-1], a.dtype)
  for i in range(0, len(a), BLOCK):
    out[:, i:i + BLOCK] = a[i:i + BLOCK].T
  return out


def as_it_is(a):
  return a


def joined(a):
  """(H, d) -> (H * d)"""
  return a.reshape(-1)


def to_heads(a):
  """(D, H, d) -> (H * d, D)"""
  return transposed(a.reshape(len(a), -1))


def from_heads(a):
  """(H, d, D) -> (D, H * d)"""
  return transposed(a.reshape(-1, a.shape[-1]))


def by_head(a):
  """(H, D, d) -> (H * d, D)"""
  return np.concatenate([transposed(head) for head in a])


def convolution(a):
  """(p, p, 3, D) -> (D, 3, p, p)"""
  return a.transpose(3, 2, 0, 1)

# Name here, its shape, names in PaliGemma, how one becomes the other. Letters as in vlm.py, with v for SigLIP's, and
# L layers, F the MLP's width, p a patch's side. What begins with L or Lv is stacked, and converted layer by layer; what
# has two names holds two weights, one after the other.
V, B, M, A = ("vision_tower.", "img/Transformer/encoderblock/", "img/Transformer/encoderblock/MlpBlock_0/",
              "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/")
VL, TL = "vision_tower.encoder.layers.{}.", "language_model.layers.{}."
TENSORS = [
  ("img/embedding/kernel", "p p 3 Dv", [V + "embeddings.patch_embedding.weight"],
   convolution),
  ("img/embedding/bias", "Dv", [V + "embeddings.patch_embedding.bias"], as_it_is),
  ("img/pos_embedding", "1 P Dv", [V + "embeddings.position_embedding.weight"], as_it_is),
  (B + "LayerNorm_0/scale", "Lv Dv", [VL + "layer_norm1.weight"], as_it_is),
  (B + "LayerNorm_0/bias", "Lv Dv", [VL + "layer_norm1.bias"], as_it_is),
  (B + "LayerNorm_1/scale", "Lv Dv", [VL + "layer_norm2.weight"], as_it_is),
  (B + "LayerNorm_1/bias", "Lv Dv", [VL + "layer_norm2.bias"], as_it_is),
  (M + "Dense_0/kernel", "Lv Dv Fv", [VL + "mlp.fc1.weight"], transposed),
  (M + "Dense_0/bias", "Lv Fv", [VL + "mlp.fc1.bias"], as_it_is),
  (M + "Dense_1/kernel", "Lv Fv Dv", [VL + "mlp.fc2.weight"], transposed),
  (M + "Dense_1/bias", "Lv Dv", [VL + "mlp.fc2.bias"], as_it_is),
  (A + "query/kernel", "Lv Dv Hv dv", [VL + "self_attn.q_proj.weight"], to_heads),
  (A + "query/bias", "Lv Hv dv", [VL + "self_attn.q_proj.bias"], joined),
  (A + "key/kernel", "Lv Dv Hv dv", [VL + "self_attn.k_proj.weight"], to_heads),
  (A + "key/bias", "Lv Hv dv", [VL + "self_attn.k_proj.bias"], joined),
  (A + "value/kernel", "Lv Dv Hv dv", [VL + "self_attn.v_proj.weight"], to_heads),
  (A + "value/bias", "Lv Hv dv", [VL + "self_attn.v_proj.bias"], joined),
  (A + "out/kernel", "Lv Hv dv Dv", [VL + "self_attn.out_proj.weight"], from_heads),
  (A + "out/bias", "Lv Dv", [VL + "self_attn.out_proj.bias"], as_it_is),
  ("img/Transformer/encoder_norm/scale", "Dv", [V + "post_layernorm.weight"], as_it_is),
  ("img/Transformer/encoder_norm/bias", "Dv", [V + "post_layernorm.bias"], as_it_is),
  ("img/head/kernel", "Dv D", ["multi_modal_projector.linear.weight"], transposed),
  ("img/head/bias", "D", ["multi_modal_projector.linear.bias"], as_it_is),
  ("llm/embedder/input_embedding", "V D", ["language_model.embed_tokens.weight"], as_it_is),
  ("llm/layers/attn/q_einsum/w", "L H D d", [TL + "self_attn.q_proj.weight"], by_head),
  ("llm/layers/attn/kv_einsum/w", "L 2 K D d", [TL + "self_attn.k_proj.weight", TL + "self_attn.v_proj.weight"],
   by_head),
  ("llm/layers/attn/attn_vec_einsum/w", "L H d D", [TL + "self_attn.o_proj.weight"], from_heads),
  ("llm/layers/mlp/gating_einsum", "L 2 D F", [TL + "mlp.gate_proj.weight", TL + "mlp.up_proj.weight"], transposed),
  ("llm/layers/mlp/linear", "L F D", [TL + "mlp.down_proj.weight"], transposed),
  ("llm/layers/pre_attention_norm/scale", "L D", [TL + "input_layernorm.weight"], as_it_is),
  ("llm/final_norm/scale", "D", ["language_model.norm.weight"], as_it_is),
]
EMBEDDING, FFW = "llm/embedder/input_embedding", "llm/layers/pre_ffw_norm/scale"
GEMMA = [(FFW, "L D", [TL + "post_attention_layernorm.weight"], as_it_is)]
GEMMA2 = [
  ("llm/layers/post_attention_norm/scale", "L D", [TL + "post_attention_layernorm.weight"], as_it_is),
  (FFW, "L D", [TL + "pre_feedforward_layernorm.weight"], as_it_is),
  ("llm/layers/post_ffw_norm/scale", "L D", [TL + "post_feedforward_layernorm.weight"], as_it_is),
]

Member = namedtuple("Member", "shape dtype order entry start")  # start: of its data, in the zip's entry


def fits(path):
  """Whether what --weights names is such a file, and not a folder."""
  return Path(path).suffix == ".npz" and not Path(path).is_dir()


def config_path(folder):
  """What read_config reads: of a folder its config.json, of an .npz the .npz."""
  return Path(folder) if fits(folder) else Path(folder) / "config.json"


def tokenizer_path(folder):
  """The tokenizer of a folder, or beside an .npz. Raises Fault."""
  folder = Path(folder)
  if not fits(folder):
    return folder / "tokenizer.model"
  for name in TOKENIZERS:
    if (folder.parent / name).exists():
      return folder.parent / name
  raise Fault(f"{folder} needs {' or '.join(TOKENIZERS)} beside it: the first from any PaliGemma repository of the "
              "hub, the second from big_vision (gs://big_vision/paligemma_tokenizer.model)")


def damaged(path, why):
  why = str(why).partition("\n")[0][:150]  # numpy goes on with advice that does not help, zipfile with the data
  return Fault(f"{path}: not a complete .npz file ({why}); download it again")


def members(path):
  """An .npz -> {name: Member}, without the prefix params/; no data is read. Raises Fault."""
  found = {}
  try:
    with zipfile.ZipFile(path) as archive:
      for entry in archive.infolist():
        name = entry.filename.removesuffix(".npy").removeprefix("params/")
        with archive.open(entry) as file:
          version = np.lib.format.read_magic(file)
          header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
          shape, fortran, dtype = header(file)
          start = file.tell()
        kind = dtype.str[1:] if dtype.kind == "V" else dtype.name
        if kind not in TYPES or dtype.str[0] == ">":
          raise Fault(f"{path}: {name} is {dtype.name}; weights must be float32, float16 or bfloat16")
        if math.prod(shape) * dtype.itemsize != entry.file_size - start or min(shape, default=1) < 1:
          raise damaged(path, f"{name} does not hold {shape} values")
        if name in found:
          raise Fault(f"{path}: {name} is there twice")
        found[name] = Member(shape, TYPES[kind], "F" if fortran else "C", entry, start)
  except Fault:
    raise
  except FileNotFoundError:
    raise Fault(f"{path}: no such file") from None
  except Exception as e:  # whatever zipfile, zlib, and numpy's reader of headers, which is Python's parser, raise
    raise damaged(path, e) from None
  return found


def layout(path):
  """-> members, the rows of TENSORS that they are, and {letter: size} of those. Raises Fault."""
  found, sizes = members(path), {}
  table = TENSORS + (GEMMA2 if any(name in found for name, *_ in GEMMA2 if name != FFW) else GEMMA)
  names, question = [name for name, *_ in table], "is it a PaliGemma checkpoint of big_vision?"
  for what, wrong in (("missing", [n for n in names if n not in found]),
                      ("not part of the model", [n for n in found if n not in names])):
    if wrong:
      more = f" and {len(wrong) - 3} more" * (len(wrong) > 3)
      raise Fault(f"{path}: {what}: {', '.join(wrong[:3])}{more}; {question}")
  for name, letters, *_ in table:
    shape, letters = found[name].shape, letters.split()
    for letter, size in zip(letters, shape):
      sizes.setdefault(letter, int(letter) if letter.isdigit() else size)
    if shape != tuple(sizes.get(letter) for letter in letters):
      wanted = ", ".join(f"{letter} = {sizes[letter]}" if letter in sizes else letter for letter in letters)
      raise Fault(f"{path}: {name} is {shape}, not ({wanted}); {question}")
  if math.isqrt(sizes["P"]) ** 2 != sizes["P"] or sizes["Hv"] * sizes["dv"] != sizes["Dv"]:
    raise Fault(f"{path}: {sizes['P']} patches, {sizes['Hv']} heads of {sizes['dv']} in {sizes['Dv']}; {question}")
  return found, table, sizes


def given(path):
  """What is not in the shapes: the content of pt_224.json beside pt_224.npz, {} without one. Raises Fault."""
  path = path.with_suffix(".json")
  try:
    top = json.loads(path.read_text()) if path.exists() else {}
    if all(isinstance(part, dict) for part in (top, top.get("text_config", {}), top.get("vision_config", {}))):
      return top
  except (OSError, ValueError, AttributeError):
    pass
  raise Fault(f"{path} is no part of a config.json; correct it, or remove it if it has nothing to do with the .npz")


def config(path):
  """A config.json -> its content; an .npz -> what a config.json of these weights would hold. Raises Fault, but OSError
  and ValueError of a config.json."""
  path = Path(path)
  if not fits(path):
    return json.loads(path.read_text())
  found, table, size = layout(path)
  more, gemma2 = given(path), table[-1] is GEMMA2[-1]
  text = dict(model_type="gemma2" if gemma2 else "gemma", hidden_size=size["D"], num_hidden_layers=size["L"],
              num_attention_heads=size["H"], num_key_value_heads=size["K"], head_dim=size["d"],
              intermediate_size=size["F"], vocab_size=size["V"])
  if gemma2 and size["D"] in SCALARS:
    text["query_pre_attn_scalar"] = SCALARS[size["D"]]
  text |= more.get("text_config", {})
  if gemma2 and "query_pre_attn_scalar" not in text:
    raise Fault(f"{path}: no published Gemma 2 is {size['D']} wide, and query_pre_attn_scalar is not in the shapes; "
                f'write {{"text_config": {{"query_pre_attn_scalar": ...}}}} to {path.with_suffix(".json")}')
  vision = dict(model_type="siglip_vision_model", hidden_size=size["Dv"], intermediate_size=size["Fv"],
                num_hidden_layers=size["Lv"], num_attention_heads=size["Hv"], patch_size=size["p"],
                image_size=math.isqrt(size["P"]) * size["p"], vision_use_head=False)
  kind = {np.uint16: "bfloat16", np.float16: "float16"}.get(found[EMBEDDING].dtype, "float32")
  top = {"model_type": "paligemma", "architectures": ["PaliGemmaForConditionalGeneration"], "dtype": kind,
         "image_token_index": 257152, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
         "hidden_size": size["D"], "projection_dim": size["D"]}
  return top | more | {"text_config": text, "vision_config": vision | more.get("vision_config", {})}


def read_weights(path):
  """-> {path in PaliGemma: array}, as vlm.read_weights of a folder. The embedding, norms and biases are views of the
  mapped file where it is not compressed; matrices are copies, made a layer at a time. Raises Fault."""
  found, table, _ = layout(path)
  arrays = {}
  try:
    with open(path, "rb") as file, zipfile.ZipFile(path) as archive:
      mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
      data = np.frombuffer(mapped, np.uint8)
      for i, (name, letters, targets, convert) in enumerate(table):
        vlm.status(f"reading {path}: {i} of {len(table)} tensors")
        whole = stored(path, archive, data, name, found[name])
        for layer, part in enumerate(whole if letters[0] in "L1" else [whole]):
          for target, array in zip(targets, part if len(targets) > 1 else [part]):
            arrays[target.format(layer)] = np.ascontiguousarray(convert(array))  # a copy only if it has to be
        if hasattr(mmap, "MADV_DONTNEED"):  # what is copied need not stay in memory as well
          mapped.madvise(mmap.MADV_DONTNEED)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, struct.error) as e:
    raise damaged(path, e) from None
  return arrays


def stored(path, archive, data, name, member):
  """A member's values, a view of `data`, the mapped file, where they lie there as they are."""
  entry = member.entry
  if entry.compress_type != zipfile.ZIP_STORED:
    values = np.frombuffer(bytearray(archive.read(entry)), np.uint8)[member.start:]
  else:  # before the entry: 30 bytes, its name and an extra field, whose lengths are the last 4 of them
    lengths = struct.unpack("<HH", data[entry.header_offset + 26:entry.header_offset + 30].tobytes())
    start = entry.header_offset + 30 + sum(lengths)
    values = data[start + member.start:start + entry.file_size]
  if len(values) != entry.file_size - member.start:
    raise damaged(path, f"{name} is cut off")
  return values.view(member.dtype).reshape(member.shape, order=member.order)

# ---- the other way ----
UNSEEN = {  # keys of a config.json that shapes say nothing of
  "text_config": {"query_pre_attn_scalar", "sliding_window", "layer_types", "attn_logit_softcapping", "rope_theta",
                  "final_logit_softcapping", "rope_parameters", "rms_norm_eps", "max_position_embeddings"},
  "vision_config": {"layer_norm_eps"}, "": {"eos_token_id", "image_token_index", "note"}}


def reverted(array, convert, shape):
  """An array that `convert` made -> one of that shape, as it was."""
  if convert is convolution:
    return array.transpose(2, 3, 1, 0)
  if convert is by_head:
    H, D, d = shape
    return array.reshape(H, d, D).transpose(0, 2, 1)
  return array.reshape(shape) if convert in (as_it_is, joined) else array.T.reshape(shape)


def save(folder, path):
  """A PaliGemma folder -> an .npz, and beside it tokenizer.model and a .json of what the shapes do not say. Nothing
  that is there is written over. Raises Fault."""
  folder, path = Path(folder), Path(path)
  beside = path.with_suffix(".json"), path.parent / "tokenizer.model"
  if path.suffix != ".npz" or fits(folder):
    raise Fault("give a PaliGemma folder, and the name of an .npz to be written")
  if there := [file for file in (path, *beside) if file.exists()]:
    raise Fault(f"{there[0]} is there already; choose another place for the .npz")
  c, top, weights = vlm.read_config(config_path(folder)), config(config_path(folder)), vlm.read_weights(folder)
  if any(name.endswith("_scale") for name in weights):
    raise Fault(f"{folder} is quantised, and this layout is not; give the weights it was made of")
  size = {"p": c.patch_size, "P": c.patches, "Dv": c.vision_width, "Lv": c.vision_layers, "Hv": c.vision_heads,
          "dv": c.vision_width // c.vision_heads, "Fv": c.vision_mlp, "D": c.width, "L": c.layers, "H": c.heads,
          "K": c.kv_heads, "d": c.head_dim, "F": c.mlp, "V": c.vocab}
  more = {part: {k: v for k, v in top.get(part, {}).items() if k in UNSEEN[part]} for part in UNSEEN if part}
  more |= {k: v for k, v in top.items() if k in UNSEEN[""]}
  part = path.with_name(path.name + ".part")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(part, "w") as archive:
      for name, letters, targets, convert in TENSORS + (GEMMA2 if c.gemma2 else GEMMA):
        shape = tuple(int(letter) if letter.isdigit() else size[letter] for letter in letters.split())
        first = 1 if letters[0] in "L1" else 0  # where a layer's own shape begins
        one = shape[first + (len(targets) > 1):]
        arrays = [weights.pop(target.format(layer)) for layer in range(shape[0] if first else 1) for target in targets]
        kind = "|V2" if arrays[0].dtype == np.uint16 else arrays[0].dtype.str
        with archive.open(f"params/{name}.npy", "w", force_zip64=True) as file:
          np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
          for array in arrays:
            file.write(np.ascontiguousarray(reverted(array, convert, one)).tobytes())
    if weights:
      raise KeyError(next(iter(weights)))
    beside[1].write_bytes(tokenizer_path(folder).read_bytes())
    beside[0].write_text(json.dumps(more, indent=1))
    os.replace(part, path)
  except (KeyError, ValueError) as e:
    raise Fault(f"{folder}: the weights do not fit config.json ({e})") from None
  except OSError as e:
    raise Fault(f"{path}: {e.strerror or e}; choose another place", 1) from None
  finally:
    part.unlink(missing_ok=True)

if __name__ == "__main__":
  try:
    save(*sys.argv[1:])
  except TypeError:
    sys.exit("usage: python examples/original.py FOLDER OUT.npz")
  except vlm.Fault as e:
    sys.exit(f"original: {e}")
