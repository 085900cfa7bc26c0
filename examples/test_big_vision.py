"""Tests of big_vision.py: the tiny checkpoints, written as big_vision writes its own, answer the same."""
import json
import re
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tinygrad.nn.state import get_state_dict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import big_vision
import checkpoint
import golden
import quantize
import vlm

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS, PROMPT = ROOT / "weights", "detect cat ; dog"
IMG, BLOCK = "img/", "img/Transformer/encoderblock/"
BLOCKS = {"LayerNorm_0": "layer_norm1", "LayerNorm_1": "layer_norm2", "MlpBlock_0/Dense_0": "mlp.fc1",
          "MlpBlock_0/Dense_1": "mlp.fc2"}
HEADS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}


def tensors(kind, rows=None):
  """A tiny folder as big_vision names, stacks and turns it: {name: array}, by einsums."""
  c, w = vlm.read_config(WEIGHTS / kind / "config.json"), vlm.read_weights(WEIGHTS / kind)
  v, t = c.vision, c.text
  tower, text = "vision_tower.", "language_model."
  layer = lambda name: np.stack([w[f"{tower}encoder.layers.{i}.{name}"] for i in range(v.num_hidden_layers)])
  block = lambda name: np.stack([w[f"{text}layers.{i}.{name}.weight"] for i in range(t.num_hidden_layers)])
  Hv, dv = v.num_attention_heads, v.hidden_size // v.num_attention_heads
  H, K, d, D = t.num_attention_heads, t.num_key_value_heads, t.head_dim, t.hidden_size
  out = {IMG + "embedding/kernel": np.einsum("dcyx->yxcd", w[tower + "embeddings.patch_embedding.weight"]),
         IMG + "embedding/bias": w[tower + "embeddings.patch_embedding.bias"],
         IMG + "pos_embedding": w[tower + "embeddings.position_embedding.weight"][None],
         IMG + "Transformer/encoder_norm/scale": w[tower + "post_layernorm.weight"],
         IMG + "Transformer/encoder_norm/bias": w[tower + "post_layernorm.bias"],
         IMG + "head/kernel": w["multi_modal_projector.linear.weight"].T,
         IMG + "head/bias": w["multi_modal_projector.linear.bias"]}
  for published, path in BLOCKS.items():
    weight = layer(path + ".weight")
    out[f"{BLOCK}{published}/bias"] = layer(path + ".bias")
    if weight.ndim == 2:
      out[f"{BLOCK}{published}/scale"] = weight
    else:
      out[f"{BLOCK}{published}/kernel"] = np.einsum("loi->lio", weight)
  for published, path in HEADS.items():
    place, weight, bias = f"{BLOCK}MultiHeadDotProductAttention_0/{published}/", *(
      layer(f"self_attn.{path}.{part}") for part in ("weight", "bias"))
    if published == "out":
      out[place + "kernel"] = np.einsum("lohd->lhdo", weight.reshape(len(weight), -1, Hv, dv))
      out[place + "bias"] = bias
    else:
      out[place + "kernel"] = np.einsum("lhdi->lihd", weight.reshape(len(weight), Hv, dv, -1))
      out[place + "bias"] = bias.reshape(-1, Hv, dv)
  by_head = lambda name, heads: np.einsum("lhdi->lhid", block(name).reshape(-1, heads, d, D))
  out |= {
    "llm/embedder/input_embedding": w[text + "embed_tokens.weight"][:rows],
    "llm/layers/attn/q_einsum/w": by_head("self_attn.q_proj", H),
    "llm/layers/attn/kv_einsum/w": np.stack([by_head(f"self_attn.{n}_proj", K) for n in "kv"], 1),
    "llm/layers/attn/attn_vec_einsum/w": np.einsum(
      "lohd->lhdo", block("self_attn.o_proj").reshape(-1, D, H, d)),
    "llm/layers/mlp/gating_einsum": np.stack(
      [np.einsum("loi->lio", block(f"mlp.{n}_proj")) for n in ("gate", "up")], 1),
    "llm/layers/mlp/linear": np.einsum("loi->lio", block("mlp.down_proj")),
    "llm/layers/pre_attention_norm/scale": block("input_layernorm"),
    "llm/final_norm/scale": w[text + "norm.weight"]}
  if t.gemma2:
    names = {"post_attention_norm": "post_attention_layernorm", "pre_ffw_norm": "pre_feedforward_layernorm",
             "post_ffw_norm": "post_feedforward_layernorm"}
  else:
    names = {"pre_ffw_norm": "post_attention_layernorm"}
  return out | {f"llm/layers/{published}/scale": block(path) for published, path in names.items()}


NOTES = {"tiny1": {}, "tiny2": {"text_config": {"sliding_window": 8, "query_pre_attn_scalar": 16}},
         "tiny2-28b": {"text_config": {"sliding_window": 8, "query_pre_attn_scalar": 12}}}


@pytest.fixture
def npz(tmp_path):
  """npz(kind, ...) -> the path of a tiny checkpoint in that layout, its tokenizer and a note beside it."""
  def make(kind="tiny1", arrays=None, prefix="params/", save=np.savez, tokenizer="tokenizer.model"):
    place = tmp_path / f"n{len(list(tmp_path.glob('n*')))}"
    place.mkdir()
    save(place / "pt_224.npz", **{prefix + n: a for n, a in (arrays or tensors(kind)).items()})
    if NOTES[kind]:
      (place / "pt_224.json").write_text(json.dumps(NOTES[kind]))
    if tokenizer:
      shutil.copy(WEIGHTS / kind / "tokenizer.model", place / tokenizer)
    return place / "pt_224.npz"
  return make


@pytest.fixture
def convert(npz, tmp_path):
  """convert(kind, ...), as npz -> the folder that it becomes."""
  def make(*args, **options):
    path = npz(*args, **options)
    big_vision.to_folder(path, path.parent / "folder")
    return path.parent / "folder"
  return make


def folder_of(arrays, folder, kind="tiny1"):
  """A copy of a tiny folder with these arrays."""
  shutil.copytree(WEIGHTS / kind, folder)
  laters = {name: checkpoint.Later.of(array) for name, array in arrays.items()}
  pieces = checkpoint.safetensors({name: (later, later.dtype) for name, later in laters.items()})
  (folder / "model.safetensors").write_bytes(b"".join(map(bytes, pieces)))
  return folder


def bfloat16(a):
  return (np.ascontiguousarray(a).view(np.uint32) >> 16).astype(np.uint16)


def answers(model):
  """Logits after the prefix and twelve tokens: long enough for tiny2's window to matter."""
  picture = golden.pixels(56, 1)[0]
  return golden.next_logits(model, picture, PROMPT), model.generate([picture], [PROMPT], max_tokens=12)[0].tokens


def same(a, b):
  return np.array_equal(a[0], b[0]) and a[1] == b[1]


def same_arrays(got, right):
  return got.keys() == right.keys() and all(a.dtype == right[n].dtype and np.array_equal(a, right[n])
                                            for n, a in got.items())


# ---- 1. From an .npz to a folder ----


@pytest.mark.parametrize("kind", NOTES)
def test_answers_as_the_folder_does(kind, convert):
  right = answers(vlm.load(WEIGHTS / kind))
  assert len(right[1]) == 12
  folder = convert(kind)
  assert sorted(f.name for f in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.model"]
  assert (folder / "tokenizer.model").read_bytes() == (WEIGHTS / kind / "tokenizer.model").read_bytes()
  assert same(answers(vlm.load(folder)), right)
  for options in ({"prefix": ""}, {"save": np.savez_compressed, "tokenizer": "paligemma_tokenizer.model"}):
    other = convert(kind, **options)
    assert vlm.read_config(other / "config.json") == vlm.read_config(folder / "config.json")
    assert same_arrays(vlm.read_weights(other), vlm.read_weights(WEIGHTS / kind))
    assert (other / "tokenizer.model").exists()


def test_what_the_layout_holds_is_what_the_test_thinks():
  """by the shapes that big_vision's files have, at this size: heads and widths of tiny2 are all different"""
  shapes = {n: a.shape for n, a in tensors("tiny2").items()}
  assert shapes[BLOCK + "MultiHeadDotProductAttention_0/query/kernel"] == (3, 64, 4, 16)
  assert shapes[BLOCK + "MultiHeadDotProductAttention_0/out/kernel"] == (3, 4, 16, 64)
  assert shapes["llm/layers/attn/q_einsum/w"] == (4, 4, 48, 16)
  assert shapes["llm/layers/attn/kv_einsum/w"] == (4, 2, 2, 48, 16)
  assert shapes["llm/layers/attn/attn_vec_einsum/w"] == (4, 4, 16, 48)
  assert shapes["llm/layers/mlp/gating_einsum"] == (4, 2, 48, 160)
  assert shapes["llm/layers/mlp/linear"] == (4, 160, 48)
  assert shapes["img/embedding/kernel"] == (14, 14, 3, 64) and shapes["img/pos_embedding"] == (1, 16, 64)


@pytest.mark.parametrize("order", "CF")
def test_bfloat16_is_two_bytes_of_void(order, convert, npz, tmp_path):
  arrays = {n: np.asarray(bfloat16(a).view("V2"), order=order) for n, a in tensors("tiny1").items()}
  with np.load(npz(arrays=arrays)) as file:
    assert {a.dtype.str for a in file.values()} == {"|V2"}
  folder = convert(arrays=arrays)
  right = {n: bfloat16(a) for n, a in vlm.read_weights(WEIGHTS / "tiny1").items()}
  assert same_arrays(vlm.read_weights(folder), right)
  assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
  assert same(answers(vlm.load(folder)), answers(vlm.load(folder_of(right, tmp_path / "right"))))


def test_other_number_types(convert):
  half = {n: a.astype(np.float16) for n, a in tensors("tiny1").items()}
  assert all(a.dtype == np.float16 for a in vlm.read_weights(convert(arrays=half)).values())


def test_fewer_rows_than_hub_files(convert):
  """257152 where the hub has 257216: here all but <image>, which is no word of any prompt"""
  right, got = vlm.load(WEIGHTS / "tiny1"), vlm.load(convert(arrays=tensors("tiny1", rows=1535)))
  assert got.config.text.vocab_size == 1535 and right.config.text.vocab_size == 1536
  text = "describe <loc0012><loc1023><seg127> y"
  logits = golden.next_logits(got, golden.pixels(56, 1)[0], text)
  wanted = golden.next_logits(right, golden.pixels(56, 1)[0], text)
  assert logits.shape == (1535,) and np.abs(logits - wanted[:1535]).max() < 2e-5 * wanted.std()


def test_a_tokenizer_of_another_model(convert):
  """its ids would be rows that the embedding does not have"""
  with pytest.raises(vlm.Fault, match="of another model"):
    vlm.load(convert(arrays=tensors("tiny1", rows=1534)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_one_layer_is_in_memory_at_a_time(save, tmp_path):
  whole = np.random.default_rng(0).random((16, 256, 512), np.float32)  # 0.5 MB each
  save(tmp_path / "x.npz", x=whole)
  with zipfile.ZipFile(tmp_path / "x.npz") as archive:
    layers = big_vision.values(archive, big_vision.members(tmp_path / "x.npz")["x"], True)
    tracemalloc.start()
    assert all(np.array_equal(layer, right) for layer, right in zip(layers, whole, strict=True))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
  assert peak < 2.5e6


def test_what_lies_beside_the_npz_goes_along(npz):
  path = npz()
  (path.parent / "vae-oid.npz").write_text("a decoder")
  big_vision.to_folder(path, path.parent / "new" / "folder")
  assert (path.parent / "new" / "folder" / "vae-oid.npz").read_text() == "a decoder"


def test_it_quantises_as_the_folder_does(convert, tmp_path):
  for name, source in (("a", convert("tiny2")), ("b", WEIGHTS / "tiny2")):
    quantize.save(source, tmp_path / name, 8)
  assert same_arrays(vlm.read_weights(tmp_path / "a"), vlm.read_weights(tmp_path / "b"))
  a, b = (vlm.read_config(tmp_path / name / "config.json") for name in "ab")
  assert a.vision == b.vision and a.text == b.text


# ---- 2. The config of published sizes ----


SIGLIP = {"p": 14, "Dv": 1152, "Lv": 27, "Hv": 16, "dv": 72, "Fv": 4304, "V": 257152}
PUBLISHED = {  # letters of big_vision.TENSORS; whether Gemma 2; query scale; parameters with the hub's rows
  "pt_224": (dict(P=256, D=2048, L=18, H=8, K=1, d=256, F=16384), False, 256, 2923466480),
  "pt_448": (dict(P=1024, D=2048, L=18, H=8, K=1, d=256, F=16384), False, 256, 2924351216),
  "pt_896": (dict(P=4096, D=2048, L=18, H=8, K=1, d=256, F=16384), False, 256, 2927890160),
  "paligemma2-3b-224": (dict(P=256, D=2304, L=26, H=8, K=4, d=256, F=9216), True, 256, 3032242416),
  "paligemma2-3b-896": (dict(P=4096, D=2304, L=26, H=8, K=4, d=256, F=9216), True, 256, 3036666096),
  "paligemma2-10b-448": (dict(P=1024, D=3584, L=42, H=16, K=8, d=256, F=14336), True, 256, 9663523568),
  "paligemma2-28b-224": (dict(P=256, D=4608, L=46, H=32, K=16, d=128, F=36864), True, 144, 27650487024),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_published_sizes(name, tmp_path, monkeypatch):
  letters, gemma2, scale, parameters = PUBLISHED[name]
  letters = SIGLIP | letters
  found = {tensor: big_vision.Member(big_vision.shape_of(shape, letters), np.uint16, "C", None, 0)
           for tensor, shape, *_ in big_vision.table_of(gemma2)}
  monkeypatch.setattr(big_vision, "members", lambda path: found)
  path = tmp_path / "config.json"
  path.write_text(json.dumps(big_vision.make_config(tmp_path / f"{name}.npz")))
  c = vlm.read_config(path)
  v, t = c.vision, c.text
  assert (v.image_size, v.patches) == (14 * round(letters["P"] ** 0.5), letters["P"])
  assert v.image_size in (224, 448, 896) and v.layer_norm_eps == t.rms_norm_eps == 1e-6
  assert [t.hidden_size, t.num_hidden_layers, t.num_attention_heads, t.num_key_value_heads, t.head_dim] == [
    letters[k] for k in ("D", "L", "H", "K", "d")]
  assert t.vocab_size == 257152 and c.eos == (1,) and t.max_position_embeddings == 8192
  assert t.gemma2 == gemma2 and t.query_pre_attn_scalar == scale and t.rope_theta == 10000
  assert (t.attn_logit_softcapping, t.final_logit_softcapping) == ((50, 30) if gemma2 else (0, 0))
  assert t.sliding_window == (4096 if gemma2 else 10 ** 9)
  weights = get_state_dict(vlm.PaliGemma(c))
  assert sum(w.numel() for w in weights.values()) == parameters - 64 * t.hidden_size


# ---- 3. Mistakes: one line, and nothing written ----


@pytest.fixture
def refused(capsys, tmp_path):
  """refused(words, path): big_vision.py says one line with these words, ends with 2 and writes nothing."""
  def check(words, path):
    folder = tmp_path / "refused"
    assert big_vision.main([str(path), str(folder)]) == 2 and not folder.exists()
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"big_vision: .{,600}\n", err), err
    for word in [words] if isinstance(words, str) else words:
      assert word in err, err
  return check


def test_missing_and_extra_tensors(npz, refused):
  whole = tensors("tiny1")
  name = "llm/layers/mlp/linear"
  refused(["missing", name], npz(arrays={n: a for n, a in whole.items() if n != name}))
  text = {n: a for n, a in whole.items() if not n.startswith("img/")}
  refused(["missing", "img/", "more"], npz(arrays=text))
  refused(["not part", "llm/fluff"], npz(arrays=whole | {"llm/fluff": whole[name]}))
  half = {"llm/layers/post_attention_norm/scale": np.zeros((3, 48), np.float32)}  # of a Gemma 2
  refused(["missing", "post_ffw_norm"], npz(arrays=whole | half))
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
  refused("name of an .npz", folder)
  refused("name of an .npz", WEIGHTS / "tiny1")


def test_damage_inside(npz, refused):
  path = npz()
  with zipfile.ZipFile(path) as archive:
    entry = archive.getinfo("params/llm/layers/mlp/linear.npy")
  whole = path.read_bytes()
  start = whole.index(b"\x93NUMPY", entry.header_offset)
  for at, data in ((start, b"NUMPY!"), (start + 6, b"\x09"), (start + 8, b"\xff\xff"),
                   (start + 10, b"{" * 50), (entry.header_offset, b"XX"),
                   (entry.header_offset + 26, b"\xff\xff"),
                   (start + 5000, bytes([whole[start + 5000] ^ 1]))):  # the last is one bit of a weight
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


def test_what_shapes_do_not_say_has_to_be_written_down(npz, refused):
  path = npz("tiny2")
  note = path.with_suffix(".json")
  note.unlink()
  refused(["query_pre_attn_scalar", str(note)], path)
  for text in ("{", "[]", '{"text_config": 3}'):
    note.write_text(text)
    refused(str(note), path)
  note.write_text('{"text_config": {"query_pre_attn_scalar": 16, "num_hidden_layers": 3}}')
  refused([str(note), "num_hidden_layers is 3", "say 4"], path)
  note.write_text('{"text_config": {"query_pre_attn_scalar": 16, "rope_theta": "large"}}')
  refused([str(note), "rope_theta 'large'"], path)
  note.write_text('{"note": "mine", "text_config": {"query_pre_attn_scalar": 9, "rope_theta": 5}}')
  big_vision.to_folder(path, path.parent / "folder")
  c = vlm.read_config(path.parent / "folder" / "config.json")
  assert (c.text.query_pre_attn_scalar, c.text.rope_theta, c.text.sliding_window) == (9, 5, 4096)


def test_a_folder_that_holds_something(npz, capsys):
  path = npz()
  for name in ("model.safetensors", "x.safetensors", "config.json", "tokenizer.model", "vae-oid.npz"):
    mine = path.parent / name.replace(".", "-")
    mine.mkdir()
    (mine / name).write_text("mine")
    assert big_vision.main([str(path), str(mine)]) == 2 and name in capsys.readouterr().err
    assert [f.name for f in mine.iterdir()] == [name] and (mine / name).read_text() == "mine"


# ---- 4. The way back ----


@pytest.mark.parametrize("kind", [*NOTES, "toy"])
def test_written_and_read_again(kind, tmp_path):
  path, again = tmp_path / "new" / "pt_224.npz", tmp_path / "again"
  big_vision.to_npz(WEIGHTS / kind, path)
  assert sorted(f.name for f in path.parent.iterdir()) == ["pt_224.json", "pt_224.npz", "tokenizer.model"]
  big_vision.to_folder(path, again)
  assert vlm.read_config(again / "config.json") == vlm.read_config(WEIGHTS / kind / "config.json")
  assert same_arrays(vlm.read_weights(again), vlm.read_weights(WEIGHTS / kind))
  if kind != "toy":
    with np.load(path) as file:  # as this test would have written it
      wanted = tensors(kind)
      assert {n.removeprefix("params/") for n in file} == wanted.keys()
      assert all(np.array_equal(file["params/" + n], a) for n, a in wanted.items())


def test_writing_bfloat16(npz, convert, tmp_path):
  path = npz(arrays={n: bfloat16(a).view("V2") for n, a in tensors("tiny1").items()})
  big_vision.to_folder(path, tmp_path / "folder")
  big_vision.to_npz(tmp_path / "folder", tmp_path / "again.npz")
  with np.load(tmp_path / "again.npz") as a, np.load(path) as b:
    assert set(a) == set(b) and all(a[n].dtype.str == "|V2" and a[n].tobytes() == b[n].tobytes() for n in a)


def test_nothing_is_written_over(tmp_path, npz, capsys):
  def refuses(words, *argv):
    code, err = big_vision.main([*map(str, argv)]), capsys.readouterr().err
    assert code in (1, 2) and err.startswith("big_vision: ") and err.count("\n") == 1 and words in err, err
  for name in ("pt.npz", "pt.json", "tokenizer.model"):
    place = tmp_path / name.replace(".", "-")
    place.mkdir()
    (place / name).write_text("mine")
    refuses(name, WEIGHTS / "tiny1", place / "pt.npz")
    assert [f.name for f in place.iterdir()] == [name] and (place / name).read_text() == "mine"
  arrays, key = vlm.read_weights(WEIGHTS / "tiny1"), "language_model.norm.weight"
  changes = {"missing": {n: a for n, a in arrays.items() if n != key}, "extra": arrays | {"x": arrays[key]},
             "misshaped": arrays | {key: arrays[key][1:]}}
  for name, changed in changes.items():
    refuses("by config.json should be", folder_of(changed, tmp_path / name), tmp_path / "x.npz")
  quantize.save(WEIGHTS / "tiny1", tmp_path / "packed", 8)
  refuses("quantised", tmp_path / "packed", tmp_path / "x.npz")
  refuses("name of an .npz", WEIGHTS / "tiny1", tmp_path / "x.zip")
  refuses("name of an .npz", npz(), tmp_path / "x.npz")
  refuses("config.json", tmp_path, tmp_path / "x.npz")
  assert not list(tmp_path.glob("x.*"))


def test_nothing_is_left_of_what_fails(tmp_path, npz, capsys, monkeypatch):
  def full(path, pieces, write=checkpoint.write_file):
    if path.name.endswith(".json"):
      raise OSError(28, "No space left on device")
    write(path, pieces)
  path, place = npz(), tmp_path / "place"
  place.mkdir()
  monkeypatch.setattr(checkpoint, "write_file", full)
  for source, target in ((path, place / "folder"), (WEIGHTS / "tiny1", place / "x.npz")):
    assert big_vision.main([str(source), str(target)]) == 1 and "No space left" in capsys.readouterr().err
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
  for source, target in ((path, place / "folder"), (WEIGHTS / "tiny1", place / "x.npz")):
    assert big_vision.main([str(source), str(target)]) == 1 and "too full" in capsys.readouterr().err
  assert not list(place.iterdir())


def test_command_line(tmp_path):
  """there and back again, from another folder, by the name of a folder of weights/"""
  def start(*argv):
    command = [sys.executable, ROOT / "examples/big_vision.py", *argv]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
  there, back = start("tiny1", "x/tiny1.npz"), start("x/tiny1.npz", "y", "--quiet")
  assert (there.returncode, there.stdout, there.stderr) == (0, "", "x/tiny1.npz is written\n")
  assert (back.returncode, back.stdout, back.stderr) == (0, "", "")
  assert same_arrays(vlm.read_weights(tmp_path / "y"), vlm.read_weights(WEIGHTS / "tiny1"))
