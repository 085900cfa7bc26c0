"""Tests of original.py: the tiny checkpoints of weights/, written as big_vision writes its own, answer the same."""
import argparse
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tinygrad.nn.state import get_state_dict

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "examples")]
import compiled
import golden
import original
import train
import vlm
from test_vlm import packed

WEIGHTS, PROMPT = ROOT / "weights", "detect cat ; dog"
IMG, BLOCK = "img/", "img/Transformer/encoderblock/"
BLOCKS = {"LayerNorm_0": "layer_norm1", "LayerNorm_1": "layer_norm2", "MlpBlock_0/Dense_0": "mlp.fc1",
          "MlpBlock_0/Dense_1": "mlp.fc2"}
HEADS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
  monkeypatch.setattr(compiled, "KEPT", 0)


def tensors(kind, rows=None):
  """A tiny folder as big_vision names, stacks and turns it: {name: array}. Einsums where original.py has copies."""
  c, w = vlm.read_config(WEIGHTS / kind / "config.json"), vlm.read_weights(WEIGHTS / kind)
  tower, text = "vision_tower.", "language_model."
  layer = lambda name: np.stack([w[f"{tower}encoder.layers.{i}.{name}"] for i in range(c.vision_layers)])
  block = lambda name: np.stack([w[f"{text}layers.{i}.{name}.weight"] for i in range(c.layers)])
  Hv, dv = c.vision_heads, c.vision_width // c.vision_heads
  out = {IMG + "embedding/kernel": np.einsum("dcyx->yxcd", w[tower + "embeddings.patch_embedding.weight"]),
         IMG + "embedding/bias": w[tower + "embeddings.patch_embedding.bias"],
         IMG + "pos_embedding": w[tower + "embeddings.position_embedding.weight"][None],
         IMG + "Transformer/encoder_norm/scale": w[tower + "post_layernorm.weight"],
         IMG + "Transformer/encoder_norm/bias": w[tower + "post_layernorm.bias"],
         IMG + "head/kernel": w["multi_modal_projector.linear.weight"].T,
         IMG + "head/bias": w["multi_modal_projector.linear.bias"]}
  for theirs, ours in BLOCKS.items():
    weight = layer(ours + ".weight")
    out[f"{BLOCK}{theirs}/bias"] = layer(ours + ".bias")
    if weight.ndim == 2:
      out[f"{BLOCK}{theirs}/scale"] = weight
    else:
      out[f"{BLOCK}{theirs}/kernel"] = np.einsum("loi->lio", weight)
  for theirs, ours in HEADS.items():
    place, weight, bias = f"{BLOCK}MultiHeadDotProductAttention_0/{theirs}/", *(
      layer(f"self_attn.{ours}.{part}") for part in ("weight", "bias"))
    if theirs == "out":
      out[place + "kernel"] = np.einsum("lohd->lhdo", weight.reshape(len(weight), -1, Hv, dv))
      out[place + "bias"] = bias
    else:
      out[place + "kernel"] = np.einsum("lhdi->lihd", weight.reshape(len(weight), Hv, dv, -1))
      out[place + "bias"] = bias.reshape(-1, Hv, dv)
  by_head = lambda name, heads: np.einsum("lhdi->lhid", block(name).reshape(c.layers, heads, c.head_dim, c.width))
  out |= {
    "llm/embedder/input_embedding": w[text + "embed_tokens.weight"][:rows],
    "llm/layers/attn/q_einsum/w": by_head("self_attn.q_proj", c.heads),
    "llm/layers/attn/kv_einsum/w": np.stack([by_head(f"self_attn.{n}_proj", c.kv_heads) for n in "kv"], 1),
    "llm/layers/attn/attn_vec_einsum/w": np.einsum(
      "lohd->lhdo", block("self_attn.o_proj").reshape(c.layers, c.width, c.heads, c.head_dim)),
    "llm/layers/mlp/gating_einsum": np.stack([np.einsum("loi->lio", block(f"mlp.{n}_proj")) for n in ("gate", "up")],
                                             1),
    "llm/layers/mlp/linear": np.einsum("loi->lio", block("mlp.down_proj")),
    "llm/layers/pre_attention_norm/scale": block("input_layernorm"),
    "llm/final_norm/scale": w[text + "norm.weight"]}
  if c.gemma2:
    names = {"post_attention_norm": "post_attention_layernorm", "pre_ffw_norm": "pre_feedforward_layernorm",
             "post_ffw_norm": "post_feedforward_layernorm"}
  else:
    names = {"pre_ffw_norm": "post_attention_layernorm"}
  return out | {f"llm/layers/{theirs}/scale": block(ours) for theirs, ours in names.items()}

GIVEN = {"tiny1": {}, "tiny2": {"text_config": {"sliding_window": 8, "query_pre_attn_scalar": 16}},
         "tiny2-28b": {"text_config": {"sliding_window": 8, "query_pre_attn_scalar": 12}}}


@pytest.fixture
def npz(tmp_path):
  """npz(kind, ...) -> the path of a tiny checkpoint in that layout, its tokenizer and what is given beside it."""
  def make(kind="tiny1", arrays=None, prefix="params/", save=np.savez, given=None, tokenizer="tokenizer.model"):
    place = tmp_path / f"n{len(list(tmp_path.glob('n*')))}"
    place.mkdir()
    save(place / "pt_224.npz", **{prefix + n: a for n, a in (arrays or tensors(kind)).items()})
    if given := given or GIVEN[kind]:
      (place / "pt_224.json").write_text(json.dumps(given))
    if tokenizer:
      shutil.copy(WEIGHTS / kind / "tokenizer.model", place / tokenizer)
    return place / "pt_224.npz"
  return make


def answers(model):
  """Logits after the prefix and eight tokens: long enough for tiny2's window to matter."""
  picture = golden.pixels(56, 1)[0]
  return model.logits(picture, PROMPT), model.generate([picture], [PROMPT], max_tokens=12)[0].tokens


def same(a, b):
  return np.array_equal(a[0], b[0]) and a[1] == b[1]


@pytest.mark.parametrize("kind", GIVEN)
def test_answers_as_the_folder_does(kind, npz):
  right = answers(vlm.load(WEIGHTS / kind))
  assert len(right[1]) == 12
  path = npz(kind)
  assert same(answers(vlm.load(path)), right)
  wanted = vlm.read_weights(WEIGHTS / kind)
  for options in ({"prefix": ""}, {"save": np.savez_compressed, "tokenizer": "paligemma_tokenizer.model"}):
    other = npz(kind, **options)
    got = vlm.load(str(other))
    assert vars(got.config) == vars(vlm.read_config(path)) and got.arrays.keys() == wanted.keys()
    assert all(np.array_equal(a, wanted[n]) and a.dtype == wanted[n].dtype for n, a in got.arrays.items())


def test_what_the_layout_holds_is_what_the_test_thinks():
  """by the shapes that big_vision's files have, at this size: heads and widths of tiny2 are all different"""
  shapes = {n: a.shape for n, a in tensors("tiny2").items()}
  assert shapes[BLOCK + "MultiHeadDotProductAttention_0/query/kernel"] == (3, 64, 4, 16)
  assert shapes[BLOCK + "MultiHeadDotProductAttention_0/out/kernel"] == (3, 4, 16, 64)
  assert shapes["llm/layers/attn/q_einsum/w"] == (4, 4, 48, 16)
  assert shapes["llm/layers/attn/kv_einsum/w"] == (4, 2, 2, 48, 16)
  assert shapes["llm/layers/attn/attn_vec_einsum/w"] == (4, 4, 16, 48)
  assert shapes["llm/layers/mlp/gating_einsum"] == (4, 2, 48, 160) and shapes["llm/layers/mlp/linear"] == (4, 160, 48)
  assert shapes["img/embedding/kernel"] == (14, 14, 3, 64) and shapes["img/pos_embedding"] == (1, 16, 64)


@pytest.mark.parametrize("order", "CF")
def test_bfloat16_is_two_bytes_of_void(order, npz, tmp_path):
  def bits(a):
    return (np.ascontiguousarray(a).view(np.uint32) >> 16).astype(np.uint16)
  right = {n: bits(a) for n, a in vlm.read_weights(WEIGHTS / "tiny1").items()}
  path = npz(arrays={n: np.asarray(bits(a).view("V2"), order=order) for n, a in tensors("tiny1").items()})
  with np.load(path) as file:
    assert {a.dtype.str for a in file.values()} == {"|V2"}
  got = original.read_weights(path)
  assert got.keys() == right.keys()
  assert all(a.dtype == np.uint16 and np.array_equal(a, right[n]) for n, a in got.items())
  assert all(a.flags.c_contiguous for a in got.values()), "kernels read rows, one after the other"
  folder = tmp_path / "folder"
  shutil.copytree(WEIGHTS / "tiny1", folder)
  (folder / "model.safetensors").write_bytes(packed({n: a for n, a in right.items()}))
  assert same(answers(vlm.load(path)), answers(vlm.load(folder)))
  assert original.config(path)["dtype"] == "bfloat16"


def test_other_number_types(npz):
  half = {n: a.astype(np.float16) for n, a in tensors("tiny1").items()}
  assert all(a.dtype == np.float16 for a in original.read_weights(npz(arrays=half)).values())


def test_fewer_rows_than_hub_files(npz):
  """257152 where the hub has 257216: here all but <image>, which is no word of any prompt"""
  right, got = vlm.load(WEIGHTS / "tiny1"), vlm.load(npz(arrays=tensors("tiny1", rows=1535)))
  assert got.config.vocab == 1535 and right.config.vocab == 1536
  text = "describe <loc0012><loc1023><seg127> y"
  logits = got.logits(golden.pixels(56, 1)[0], text)
  wanted = right.logits(golden.pixels(56, 1)[0], text)
  assert logits.shape == (1535,) and np.abs(logits - wanted[:1535]).max() < 2e-5 * wanted.std()


def test_a_tokenizer_of_another_model(npz, refused):
  """its ids would be rows that the embedding does not have"""
  refused(["tokenizer", "1534"], npz(arrays=tensors("tiny1", rows=1534)))


def test_large_weights_are_not_in_memory_twice(npz):
  arrays = original.read_weights(npz())
  def mapped(a):
    while isinstance(a.base, np.ndarray):
      a = a.base
    return not isinstance(a.base, (bytes, type(None)))
  assert mapped(arrays["language_model.embed_tokens.weight"])
  assert not mapped(arrays["language_model.layers.0.mlp.gate_proj.weight"])

# ---- the config of published sizes ----
SIGLIP = {"p": 14, "Dv": 1152, "Lv": 27, "Hv": 16, "dv": 72, "Fv": 4304, "V": 257152}
PUBLISHED = {  # letters of original.TENSORS; 1 / query scale, parameters with the hub's 64 rows more (test_vlm.py)
  "pt_224": (dict(P=256, D=2048, L=18, H=8, K=1, d=256, F=16384), False, 16, 2923466480),
  "pt_448": (dict(P=1024, D=2048, L=18, H=8, K=1, d=256, F=16384), False, 16, 2924351216),
  "pt_896": (dict(P=4096, D=2048, L=18, H=8, K=1, d=256, F=16384), False, 16, 2927890160),
  "paligemma2-3b-224": (dict(P=256, D=2304, L=26, H=8, K=4, d=256, F=9216), True, 16, 3032242416),
  "paligemma2-3b-896": (dict(P=4096, D=2304, L=26, H=8, K=4, d=256, F=9216), True, 16, 3036666096),
  "paligemma2-10b-448": (dict(P=1024, D=3584, L=42, H=16, K=8, d=256, F=14336), True, 16, 9663523568),
  "paligemma2-28b-224": (dict(P=256, D=4608, L=46, H=32, K=16, d=128, F=36864), True, 12, 27650487024),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_published_sizes(name, monkeypatch):
  sizes, gemma2, scale, parameters = PUBLISHED[name]
  sizes = SIGLIP | sizes
  found = {}
  for tensor, letters, *_ in original.TENSORS + (original.GEMMA2 if gemma2 else original.GEMMA):
    shape = tuple(int(letter) if letter.isdigit() else sizes[letter] for letter in letters.split())
    found[tensor] = original.Member(shape, np.uint16, "C", None, 0)
  monkeypatch.setattr(original, "members", lambda path: found)
  c = vlm.read_config(f"{name}.npz")
  assert (c.image_size, c.patches) == (14 * round(sizes["P"] ** 0.5), sizes["P"]) and c.image_size in (224, 448, 896)
  assert (c.width, c.layers, c.heads, c.kv_heads, c.head_dim) == tuple(sizes[k] for k in ("D", "L", "H", "K", "d"))
  assert c.vocab == 257152 and c.image_token == 257152 and c.eos == [1] and c.max_context == 8192
  assert c.gemma2 == gemma2 and c.query_scale == pytest.approx(1 / scale) and c.window == 4096
  assert (c.attn_softcap, c.final_softcap) == ((50, 30) if gemma2 else (0, 0)) and c.rope_theta == 10000
  assert c.sliding == [gemma2 and i % 2 == 0 for i in range(c.layers)] and c.eps == c.vision_eps == 1e-6
  weights = get_state_dict(vlm.PaliGemma(c))
  assert sum(t.numel() for t in weights.values()) == parameters - 64 * c.width

# ---- mistakes: one line ----
@pytest.fixture
def refused(capsys):
  """refused(words, path, ...): vlm.py says one line with these words, on stderr, and ends with 2."""
  def check(words, path, *argv):
    picture = ROOT / "examples" / "shapes.png"
    assert vlm.main([str(picture), PROMPT, "--weights", str(path), "--quiet", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"vlm: .{,600}\n", err), err
    for word in [words] if isinstance(words, str) else words:
      assert word in err, err
  return check


def test_missing_and_extra_tensors(npz, refused):
  whole = tensors("tiny1")
  name = "llm/layers/mlp/linear"
  refused(["missing", name], npz(arrays={n: a for n, a in whole.items() if n != name}))
  refused(["missing", "img/", "more"], npz(arrays={n: a for n, a in whole.items() if not n.startswith("img/")}))
  refused(["not part", "llm/fluff"], npz(arrays=whole | {"llm/fluff": whole[name]}))
  refused(["missing", "post_ffw_norm"], npz(arrays=whole | {"llm/layers/post_attention_norm/scale": np.zeros((3, 48))
                                                           .astype(np.float32)}))  # half a Gemma 2
  refused([name, "(3, 48, 160)"], npz(arrays=whole | {name: whole[name].transpose(0, 2, 1)}))
  refused(["patches"], npz(arrays=whole | {"img/pos_embedding": whole["img/pos_embedding"][:, :15]}))
  refused([name, "int64"], npz(arrays=whole | {name: whole[name].astype(np.int64)}))
  refused([name, "object"], npz(arrays=whole | {name: np.array([None, 3])}))


def test_files_that_are_no_npz(npz, refused, tmp_path):
  path = npz()
  whole = path.read_bytes()
  for size in (0, 10, 5000, len(whole) // 2, len(whole) - 1):
    path.write_bytes(whole[:size])
    refused([path.name, "download"], path)
  path.write_bytes(b"\x93NUMPY" + bytes(1000))
  refused([path.name, "download"], path)
  refused("no such file", tmp_path / "none.npz")
  folder = tmp_path / "folder.npz"
  folder.mkdir()
  refused("config.json", folder)


def test_damage_inside(npz, refused):
  path = npz()
  with zipfile.ZipFile(path) as archive:
    entry = archive.getinfo("params/llm/layers/mlp/linear.npy")
  whole = path.read_bytes()
  start = whole.index(b"\x93NUMPY", entry.header_offset)
  for at, data in ((start, b"NUMPY!"), (start + 6, b"\x09"), (start + 8, b"\xff\xff"), (start + 10, b"{" * 50),
                   (entry.header_offset, b"XX"), (entry.header_offset + 26, b"\xff\xff")):
    path.write_bytes(whole[:at] + data + whole[at + len(data):])
    refused([path.name, "download"], path)
  shape = whole.replace(b"(3, 160, 48)", b"(3, 160, 47)")
  assert shape != whole
  path.write_bytes(shape)
  refused(["linear", "download"], path)


def test_tokenizer_is_not_in_the_file(npz, refused):
  refused(["tokenizer.model", "paligemma_tokenizer.model", "big_vision"], npz(tokenizer=None))
  path = npz()
  (path.parent / "tokenizer.model").write_text("no")
  refused("tokenizer.model", path)


def test_what_shapes_do_not_say_has_to_be_given(npz, refused):
  path = npz("tiny2")
  note = path.with_suffix(".json")
  note.unlink()
  refused(["query_pre_attn_scalar", str(note)], path)
  for text in ("{", "[]", '{"text_config": 3}'):
    note.write_text(text)
    refused(str(note), path)
  note.write_text('{"text_config": {"query_pre_attn_scalar": 16, "num_hidden_layers": 3}}')
  refused("layers.3", path)
  note.write_text('{"note": "mine", "text_config": {"query_pre_attn_scalar": 9, "rope_theta": 5}}')
  c = vlm.read_config(path)
  assert (c.query_scale, c.rope_theta, c.note, c.window) == (pytest.approx(1 / 3), 5, "mine", 4096)

# ---- what else takes a folder ----
def test_quantised_and_kept_as_a_folder(npz, tmp_path, capsys):
  path = npz("tiny2")
  ask = lambda *argv: vlm.main([str(ROOT / "examples" / "shapes.png"), PROMPT, "--max-tokens", "6", *map(str, argv)])
  assert ask("--weights", path, "--quantize", "int8", "--save", tmp_path / "packed") == 0
  said = capsys.readouterr().out
  assert ask("--weights", tmp_path / "packed") == 0 and capsys.readouterr().out == said
  c = vlm.read_config(tmp_path / "packed" / "config.json")
  assert vars(c) == vars(vlm.read_config(path))


def test_training_starts_from_it(npz, tmp_path):
  path, data = npz("tiny1"), tmp_path / "data"
  data.mkdir()
  shutil.copy(ROOT / "examples" / "shapes.png", data)
  (data / "data.jsonl").write_text(json.dumps({"image": "shapes.png", "prefix": "caption en", "suffix": "cat"}) + "\n")
  parser = argparse.ArgumentParser()
  train.add_arguments(parser)
  parser.add_argument("--quiet", action="store_true")
  train.Run(parser.parse_args(["--train", str(data), "--init", str(path), "--steps", "1", "--batch", "1", "--save",
                               str(tmp_path / "run"), "--quiet"])).save()
  got, right = vlm.read_weights(tmp_path / "run"), vlm.read_weights(WEIGHTS / "tiny1")
  assert got.keys() == right.keys() and all(np.array_equal(got[n], right[n]) for n in got)
  assert vars(vlm.read_config(tmp_path / "run" / "config.json")) == vars(vlm.read_config(path))
  assert (tmp_path / "run" / "tokenizer.model").read_bytes() == (WEIGHTS / "tiny1" / "tokenizer.model").read_bytes()

# ---- the other way ----
@pytest.mark.parametrize("kind", [*GIVEN, "toy"])
def test_written_and_read_again(kind, tmp_path):
  path = tmp_path / "new" / "pt_224.npz"
  original.save(WEIGHTS / kind, path)
  assert sorted(f.name for f in path.parent.iterdir()) == ["pt_224.json", "pt_224.npz", "tokenizer.model"]
  assert vars(vlm.read_config(path)) == vars(vlm.read_config(WEIGHTS / kind / "config.json"))
  got, right = vlm.read_weights(path), vlm.read_weights(WEIGHTS / kind)
  assert got.keys() == right.keys() and all(np.array_equal(got[n], right[n]) for n in got)
  if kind != "toy":
    with np.load(path) as file:  # as this test would have written it
      wanted = tensors(kind)
      assert {n.removeprefix("params/") for n in file} == wanted.keys()
      assert all(np.array_equal(file["params/" + n], a) for n, a in wanted.items())


def test_writing_bfloat16(npz, tmp_path):
  arrays = {n: (np.ascontiguousarray(a).view(np.uint32) >> 16).astype(np.uint16) for n, a in tensors("tiny1").items()}
  path = npz(arrays={n: a.view("V2") for n, a in arrays.items()})
  folder = tmp_path / "folder"
  shutil.copytree(WEIGHTS / "tiny1", folder)
  (folder / "model.safetensors").write_bytes(packed(vlm.read_weights(path)))
  original.save(folder, tmp_path / "again.npz")
  with np.load(tmp_path / "again.npz") as a, np.load(path) as b:
    assert set(a) == set(b) and all(a[n].dtype.str == "|V2" and a[n].tobytes() == b[n].tobytes() for n in a)


def test_nothing_is_written_over(tmp_path, npz):
  for name in ("pt.npz", "pt.json", "tokenizer.model"):
    place = tmp_path / name.replace(".", "-")
    place.mkdir()
    (place / name).write_text("mine")
    with pytest.raises(vlm.Fault, match=name):
      original.save(WEIGHTS / "tiny1", place / "pt.npz")
    assert [f.name for f in place.iterdir()] == [name] and (place / name).read_text() == "mine"
  folders = [tmp_path / f"f{i}" for i in range(3)]
  for i, name in enumerate(("missing", "extra", "misshaped")):
    shutil.copytree(WEIGHTS / "tiny1", folders[i])
    arrays, key = dict(vlm.read_weights(WEIGHTS / "tiny1")), "language_model.norm.weight"
    changed = {"missing": {n: a for n, a in arrays.items() if n != key}, "extra": arrays | {"x": arrays[key]},
               "misshaped": arrays | {key: arrays[key][1:]}}[name]
    (folders[i] / "model.safetensors").write_bytes(packed(changed))
  with pytest.raises(vlm.Fault, match="name of an .npz"):
    original.save(WEIGHTS / "tiny1", tmp_path / "x.zip")
  for source, words in ((npz(), "give a PaliGemma folder"), (tmp_path, "config.json"), *((f, "fit") for f in folders)):
    with pytest.raises(vlm.Fault, match=words):
      original.save(source, tmp_path / "x.npz")
  assert not list(tmp_path.glob("x.*"))
