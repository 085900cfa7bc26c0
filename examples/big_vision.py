"""Google's own checkpoints: an .npz of big_vision (Kaggle: pt_224.npz, paligemma2-3b-pt-224.b16.npz, ...)
made a folder that vlm.py, transformers and others take; and the way back.

    python examples/big_vision.py pt_224.npz weights/pt-224
    python examples/big_vision.py weights/toy big_vision/toy.npz

What a config.json would say is read off the shapes: both widths, layers, heads, head sizes and MLPs, the
patch, the picture's side, the rows of the embedding (257152, where hub files have 64 more that mean nothing),
and whether it is Gemma 2, which alone has norms after attention and MLP. Not in the shapes are
  - Gemma 2's query scale: by SCALARS, on the width, for the published sizes; else it must be written down;
  - what no published file changes: epsilons, RoPE's theta, Gemma 2's soft-caps, its window of 4096 in every
    other layer, the context of 8192, the end token. They are vlm.read_config's defaults, unless written down.
It is written down beside pt_224.npz, in pt_224.json, in the form of a config.json, of which it is any part.
The tokenizer is not in the .npz either: tokenizer.model or paligemma_tokenizer.model is taken from its
folder.
"""
import contextlib
import functools
import json
import math
import os
import sys
import tempfile
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import vlm  # first, because it says what is not installed
import numpy as np
import checkpoint
from tokenizer import regular
from vlm import Fault

ROOT = Path(vlm.__file__).resolve().parent
PARTS = "text_config", "vision_config"
SCALARS = {2304: 256, 3584: 256, 4608: 144}  # Gemma 2's width (2b, 9b, 27b): query_pre_attn_scalar
TYPES = {"V2": np.uint16, "float32": np.float32, "float16": np.float16}  # V2, two bytes of void: bfloat16
TOKENIZERS = "tokenizer.model", "paligemma_tokenizer.model"
BLOCK = 16  # rows at a time: a transposed copy that jumps through the whole matrix takes seven times as long


# ---- 1. Names and shapes ----


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


# Name in the .npz, its shape there, names in PaliGemma, how one becomes the other. Letters as in vlm.py, with
# v for SigLIP's, and L layers, F the MLP's width, p a patch's side. What begins with L or Lv is stacked, and
# converted layer by layer; what has two names holds two weights, one after the other.
V, B, M, A = ("vision_tower.", "img/Transformer/encoderblock/", "img/Transformer/encoderblock/MlpBlock_0/",
              "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/")
VL, TL = "vision_tower.encoder.layers.{}.", "language_model.layers.{}."
TENSORS = [
  ("img/embedding/kernel", "p p 3 Dv", [V + "embeddings.patch_embedding.weight"], convolution),
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
  ("llm/layers/attn/kv_einsum/w", "L 2 K D d",
   [TL + "self_attn.k_proj.weight", TL + "self_attn.v_proj.weight"], by_head),
  ("llm/layers/attn/attn_vec_einsum/w", "L H d D", [TL + "self_attn.o_proj.weight"], from_heads),
  ("llm/layers/mlp/gating_einsum", "L 2 D F",
   [TL + "mlp.gate_proj.weight", TL + "mlp.up_proj.weight"], transposed),
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

SHAPELESS = {  # keys of a config.json that shapes say nothing of
  "text_config": {"query_pre_attn_scalar", "sliding_window", "layer_types", "attn_logit_softcapping",
                  "final_logit_softcapping", "rope_theta", "rope_parameters", "rms_norm_eps",
                  "max_position_embeddings"},
  "vision_config": {"layer_norm_eps"}, "": {"eos_token_id", "image_token_index", "note"}}


def table_of(gemma2):
  return TENSORS + (GEMMA2 if gemma2 else GEMMA)


def shape_of(letters, sizes):
  return tuple(int(letter) if letter.isdigit() else sizes[letter] for letter in letters.split())


def stacked(letters):
  """Whether the first axis of a tensor is not its layer's own: 1, or 0."""
  return int(letters[0] in "L1")


def hub_tensors(table, sizes):
  """Yields name in the .npz, name in PaliGemma, shape in a folder, as the table is ordered."""
  for name, letters, targets, convert in table:
    shape = shape_of(letters, sizes)
    one = shape[stacked(letters) + (len(targets) > 1):]
    after = convert(np.broadcast_to(np.uint8(0), one)).shape
    for layer in range(shape[0] if stacked(letters) else 1):
      for target in targets:
        yield name, target.format(layer), after


# ---- 2. From an .npz to a folder ----
Member = namedtuple("Member", "shape dtype order entry start")  # start: of its data, in the zip's entry


def damaged(path, why):
  why = str(why).partition("\n")[0][:150]  # numpy goes on with advice that is no help, zipfile with the data
  return Fault(f"{path}: not a complete .npz file ({why}); download it again")


def members(path):
  """An .npz -> {name: Member}, without the prefix params/; no data is read. Raises Fault."""
  found = {}
  try:
    with zipfile.ZipFile(regular(path)) as archive:
      for entry in archive.infolist():
        name = entry.filename.removesuffix(".npy").removeprefix("params/")
        with archive.open(entry) as file:
          version = np.lib.format.read_magic(file)
          read = "read_array_header_1_0" if version == (1, 0) else "read_array_header_2_0"
          shape, fortran, dtype = getattr(np.lib.format, read)(file)
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
  except Exception as e:  # whatever zipfile, zlib and numpy's reader of headers, Python's own parser, raise
    raise damaged(path, e) from None
  return found


def layout(path):
  """-> members, the rows of TENSORS that they are, and {letter: size} of those. Raises Fault."""
  found, sizes = members(path), {}
  table = table_of(any(name in found for name, *_ in GEMMA2 if name != FFW))
  names, question = [name for name, *_ in table], "is it a PaliGemma checkpoint of big_vision?"
  for what, wrong in (("missing", [n for n in names if n not in found]),
                      ("not part of the model", [n for n in found if n not in names])):
    if wrong:
      raise Fault(f"{path}: {what}: {vlm.terminal.some(wrong)}; {question}")
  for name, letters, *_ in table:
    shape, letters = found[name].shape, letters.split()
    for letter, size in zip(letters, shape):
      sizes.setdefault(letter, int(letter) if letter.isdigit() else size)
    if shape != tuple(sizes.get(letter) for letter in letters):
      wanted = ", ".join(f"{letter} = {sizes[letter]}" if letter in sizes else letter for letter in letters)
      raise Fault(f"{path}: {name} is {shape}, not ({wanted}); {question}")
  if math.isqrt(sizes["P"]) ** 2 != sizes["P"] or sizes["Hv"] * sizes["dv"] != sizes["Dv"]:
    heads = f"{sizes['Hv']} heads of {sizes['dv']} in {sizes['Dv']}"
    raise Fault(f"{path}: {sizes['P']} patches, {heads}; {question}")
  return found, table, sizes


def supplement(path):
  """What is not in the shapes: the content of pt_224.json beside pt_224.npz, {} without one. Raises Fault."""
  path = path.with_suffix(".json")
  try:
    top = json.loads(regular(path).read_text()) if path.exists() else {}
    if all(isinstance(part, dict) for part in (top, *(top.get(name, {}) for name in PARTS))):
      return top
  except (OSError, ValueError, AttributeError):
    pass
  raise Fault(f"{path} is no part of a config.json; correct it, or remove it if the .npz does not need it")


def make_config(path):
  """An .npz -> the content of a config.json for its weights, one that vlm.read_config takes. Raises Fault."""
  found, table, sizes = layout(path)
  more, note, gemma2 = supplement(path), path.with_suffix(".json"), table[-1] is GEMMA2[-1]
  text = dict(model_type="gemma2" if gemma2 else "gemma", vocab_size=sizes["V"], hidden_size=sizes["D"],
              intermediate_size=sizes["F"], num_hidden_layers=sizes["L"], num_attention_heads=sizes["H"],
              num_key_value_heads=sizes["K"], head_dim=sizes["d"])
  vision = dict(model_type="siglip_vision_model", hidden_size=sizes["Dv"], intermediate_size=sizes["Fv"],
                num_hidden_layers=sizes["Lv"], num_attention_heads=sizes["Hv"], patch_size=sizes["p"],
                image_size=math.isqrt(sizes["P"]) * sizes["p"], vision_use_head=False)
  for part, known in zip(PARTS, (text, vision)):
    for key, value in more.get(part, {}).items():
      if known.get(key, value) != value:
        raise Fault(f"{note}: {key} is {value!r}, but the tensors say {known[key]!r}; leave it out")
  if gemma2 and sizes["D"] in SCALARS:
    text["query_pre_attn_scalar"] = SCALARS[sizes["D"]]
  text |= more.get("text_config", {})
  if gemma2 and "query_pre_attn_scalar" not in text:
    raise Fault(f"{path}: no published Gemma 2 is {sizes['D']} wide, and query_pre_attn_scalar is not in the "
                f'shapes; write {{"text_config": {{"query_pre_attn_scalar": ...}}}} to {note}')
  kind = {np.uint16: "bfloat16", np.float16: "float16"}.get(found[EMBEDDING].dtype, "float32")
  top = {"model_type": "paligemma", "architectures": ["PaliGemmaForConditionalGeneration"], "dtype": kind,
         "image_token_index": 257152, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
         "hidden_size": sizes["D"], "projection_dim": sizes["D"]}
  config = top | more | {"text_config": text, "vision_config": vision | more.get("vision_config", {})}
  with tempfile.TemporaryDirectory() as folder:
    trial = Path(folder) / "config.json"
    trial.write_text(json.dumps(config))
    try:
      vlm.read_config(trial)
    except Fault as e:
      raise Fault(str(e).replace(str(trial), str(note if more else path))) from None
  return config


def find_tokenizer(path):
  """The tokenizer beside an .npz. Raises Fault."""
  for name in TOKENIZERS:
    if (path.parent / name).exists():
      vlm.Tokenizer(path.parent / name)
      return path.parent / name
  raise Fault(f"{path} needs {' or '.join(TOKENIZERS)} beside it: the first from any PaliGemma repository of "
              "the hub, the second from big_vision (gs://big_vision/paligemma_tokenizer.model)")


def values(archive, member, by_layer):
  """Yields the values of a tensor; `by_layer` one layer after the other, so that not all are in memory."""
  with archive.open(member.entry) as file:
    file.read(member.start)
    if by_layer and member.order == "C":
      for _ in range(member.shape[0]):
        data = file.read((member.entry.file_size - member.start) // member.shape[0])
        yield np.frombuffer(data, member.dtype).reshape(member.shape[1:])
    else:
      whole = np.frombuffer(file.read(), member.dtype).reshape(member.shape, order=member.order)
      yield from whole if by_layer else [whole]


def converted(path, found, table):
  """Yields the arrays of a folder, in the order of hub_tensors. Raises Fault."""
  try:
    with zipfile.ZipFile(path) as archive:
      for name, letters, targets, convert in table:
        for part in values(archive, found[name], stacked(letters)):
          for array in part if len(targets) > 1 else [part]:
            yield np.ascontiguousarray(convert(array))
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as e:
    raise damaged(path, e) from None


def to_folder(path, folder):
  """An .npz, and what lies beside it -> a new folder that vlm.load takes. Raises Fault."""
  found, table, sizes = layout(path)
  config, tokenizer = make_config(path), find_tokenizer(path)
  config["image_token_index"] = vlm.Tokenizer(tokenizer).image
  following = functools.partial(next, converted(path, found, table))
  tensors = {target: checkpoint.Later(shape, found[name].dtype, following)
             for name, target, shape in hub_tensors(table, sizes)}
  checkpoint.write(folder, config, tokenizer, tensors)


# ---- 3. From a folder to an .npz ----
def reverted(array, convert, shape):
  """An array that `convert` made -> one of that shape, as it was."""
  if convert is convolution:
    return array.transpose(2, 3, 1, 0)
  if convert is by_head:
    H, D, d = shape
    return array.reshape(H, d, D).transpose(0, 2, 1)
  return array.reshape(shape) if convert in (as_it_is, joined) else array.T.reshape(shape)


def to_npz(folder, path):
  """A PaliGemma folder -> an .npz, and beside it tokenizer.model and a .json of what the shapes do not say.
  Writes over nothing. Raises Fault."""
  c, weights = vlm.read_config(folder / "config.json"), vlm.read_weights(folder)
  vlm.Tokenizer(folder / "tokenizer.model", c.text.vocab_size, c.image)
  if any(array.itemsize == 1 for array in weights.values()):
    raise Fault(f"{folder} is quantised, and this layout is not; give the weights it was made of")
  v, t, table = c.vision, c.text, table_of(c.text.gemma2)
  Hv = v.num_attention_heads
  sizes = {"p": v.patch_size, "P": v.patches, "Dv": v.hidden_size, "Fv": v.intermediate_size,
           "Lv": v.num_hidden_layers, "Hv": Hv, "dv": v.hidden_size // Hv,
           "D": t.hidden_size, "F": t.intermediate_size, "L": t.num_hidden_layers, "H": t.num_attention_heads,
           "K": t.num_key_value_heads, "d": t.head_dim, "V": t.vocab_size}
  vlm.check_names({target: shape for _, target, shape in hub_tensors(table, sizes)},
                  {name: array.shape for name, array in weights.items()})
  top = json.loads((folder / "config.json").read_text())
  more = {key: value for key, value in top.items() if key in SHAPELESS[""]}
  for part in PARTS:
    more[part] = {key: value for key, value in top.get(part, {}).items() if key in SHAPELESS[part]}
  small = {path.parent / "tokenizer.model": (folder / "tokenizer.model").read_bytes(),
           path.with_suffix(".json"): json.dumps(more, indent=1).encode()}
  checkpoint.refuse_to_overwrite(small, [path])
  new = [file for file in small if not file.exists()]

  def write_tensor(archive, name, letters, targets, convert):
    shape = shape_of(letters, sizes)
    one = shape[stacked(letters) + (len(targets) > 1):]
    layers = range(shape[0] if stacked(letters) else 1)
    arrays = [weights[target.format(layer)] for layer in layers for target in targets]
    kind = "|V2" if arrays[0].dtype == np.uint16 else arrays[0].dtype.str
    with archive.open(f"params/{name}.npy", "w", force_zip64=True) as file:
      np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
      for array in arrays:
        file.write(np.ascontiguousarray(reverted(array, convert, one)).data)
  part = path.with_name(path.name + ".part")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.check_space(path.parent, sum(array.nbytes for array in weights.values()))
    for file, data in small.items():
      checkpoint.write_file(file, [data])
    with zipfile.ZipFile(part, "w") as archive:
      for done, row in enumerate(table):
        vlm.terminal.bar(done, len(table), f"writing {path}")
        write_tensor(archive, *row)
    vlm.log.debug("")
    os.replace(part, path)
  except BaseException as e:  # Ctrl-C too
    for file in (part, *new):
      with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)
    if isinstance(e, OSError):
      raise Fault(f"{path}: {e.strerror or e}; choose another place", code=1) from None
    raise


@vlm.program
def main(argv):
  p = vlm.terminal.ArgumentParser(prog="big_vision.py", allow_abbrev=False,
                 description="Convert a big_vision .npz to a PaliGemma folder, or back.")
  p.add_argument("source", metavar="SOURCE", help="an .npz, or a PaliGemma folder or name")
  p.add_argument("target", metavar="TARGET", help="the new folder, or the new .npz")
  p.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
  args = p.parse_args(argv)
  target = Path(args.target)
  forward = Path(args.source).suffix == ".npz" and not Path(args.source).is_dir()
  if forward == (target.suffix == ".npz"):
    raise Fault("give an .npz and the folder to be written, or a PaliGemma folder and the name of an .npz")
  if forward:
    to_folder(Path(args.source), target)
  else:
    to_npz(vlm.terminal.find_weights(args.source, ROOT), target)
  vlm.log.info(f"{target} is written")


if __name__ == "__main__":
  sys.exit(main())
