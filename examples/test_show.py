"""Tests of examples/show.py: what it shows is what the model does, on the tiny checkpoints and on the toy.
`-k live` compares with transformers, as in test_vlm.py."""
import functools
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tinygrad import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import golden
import shapes
import show
import vlm

PAGES = [page.read_text() for page in (ROOT / "README.md", ROOT / "examples/README.md") if page.exists()]
PICTURE, PROMPT = str(ROOT / "examples" / "shapes.png"), "detect red circle"

@functools.cache
def model(kind):
  return vlm.load(ROOT / "weights" / kind)

@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)

@pytest.fixture
def toy(monkeypatch):
  m = model("toy")
  monkeypatch.setattr(vlm, "load", lambda *args, **options: m)

@functools.cache
def answered(kind, count=1):
  """-> images, prompts, tokens of a batch: two questions of different lengths, `count` pictures each"""
  m, prompts = model(kind), ["caption en", "answer en what color is the star?"]
  scenes = [[shapes.scene(shapes.VALID_SEED, 2 * row + i).image for i in range(count)] for row in range(2)]
  answers = m.generate(scenes, prompts, max_tokens=20)
  return scenes, prompts, [answer.tokens for answer in answers]

def seen_by_layers(kind, count=1):
  """-> hidden states (B, P + T, D), prompt lengths, (q, k, v, scale, mask, softcap) of each layer"""
  seen = []
  x, lengths = show.watched_pass(model(kind), *answered(kind, count), lambda *args: seen.append(args))
  Tensor.realize(x, *(t for args in seen for t in args[:3]))
  return x, lengths, seen

# ---- attention is the model's ----
@pytest.mark.parametrize("kind,count", [("tiny1", 1), ("tiny2", 1), ("toy", 1), ("tiny2", 2)])
def test_the_pass_that_is_shown_chooses_the_answer(kind, count):
  """in tiny2 an answer is longer than the window, and there are soft-caps"""
  m, (_, _, answers) = model(kind), answered(kind, count)
  x, lengths, _ = seen_by_layers(kind, count)
  P = m.config.vision.patches * count
  logits = m.net.language_model.logits(x[:, P:].contiguous()).numpy()
  assert any(answers)
  for row, n, tokens in zip(logits, lengths, answers):
    assert row[n - 1:n - 1 + len(tokens)].argmax(-1).tolist() == tokens

@pytest.mark.parametrize("kind", ["tiny1", "tiny2", "toy"])
def test_weights_times_v_is_the_attention(kind):
  for q, k, v, *rest in seen_by_layers(kind)[2]:
    weights = show.attention_weights(q, k, *rest).numpy()  # (B, H, T, C)
    B, H, T, _ = weights.shape
    values = np.repeat(v.numpy(), H // k.shape[1], 1)
    mixed = (weights @ values).transpose(0, 2, 1, 3).reshape(B, T, -1)
    right = vlm.attention(q, k, v, *rest).numpy()
    assert np.abs(mixed - right).max() < 1e-4 * right.std() and np.allclose(weights.sum(-1), 1, atol=1e-5)

@pytest.mark.parametrize("kind,count", [("tiny2", 1), ("toy", 2)])
def test_maps_are_those_weights(kind, count):
  """of the place before each token, on image tokens, mean of the heads"""
  m, (_, _, answers) = model(kind), answered(kind, count)
  maps = show.attention_maps(m, *answered(kind, count))
  _, lengths, seen = seen_by_layers(kind, count)
  P = m.config.vision.patches * count
  for i, (n, tokens) in enumerate(zip(lengths, answers)):
    assert maps[i].shape == (m.config.text.num_hidden_layers, len(tokens), P)
    for layer, (q, k, v, *rest) in enumerate(seen):
      whole = show.attention_weights(q, k, *rest).numpy()[i].mean(0)  # (T, C)
      assert np.allclose(maps[i][layer], whole[P + n - 1:P + n - 1 + len(tokens), :P], atol=1e-5)

def test_a_batch_is_its_rows_and_nothing_is_left_behind():
  images, prompts, answers = answered("toy")
  plain = vlm.attention
  both = show.attention_maps(model("toy"), images, prompts, answers)
  assert vlm.attention is plain
  for i in range(2):
    [alone] = show.attention_maps(model("toy"), images[i:i + 1], prompts[i:i + 1], answers[i:i + 1])
    assert np.allclose(alone, both[i], atol=1e-5)
  def fail(*args):
    raise KeyboardInterrupt
  with pytest.raises(KeyboardInterrupt):
    show.watched_pass(model("toy"), images, prompts, answers, fail)
  assert vlm.attention is plain
  with pytest.raises(vlm.Fault, match="context"):
    show.contributions(model("toy"), images, ["word " * 9000] * 2)

def test_many_queries_are_watched_once(monkeypatch):
  """fast.attention() computes parts of them, where that is not a kernel in C"""
  monkeypatch.setattr(vlm.kernels, "CHUNK", 40)
  monkeypatch.setattr(vlm.kernels, "forward_in_c", lambda x: False)
  monkeypatch.setattr(vlm.kernels, "KEPT", 0)  # a kept program does not know of that
  images, prompts, answers = answered("toy")
  seen = []
  show.watched_pass(model("toy"), images, prompts, answers, lambda q, *rest: seen.append(q.shape[2]))
  assert len(seen) == model("toy").config.text.num_hidden_layers and min(seen) > 64

# ---- words ----
def test_words():
  texts = show.words(model("toy").tokenizer)
  assert {*shapes.COLORS, *shapes.CORNERS, "caption", "1"} <= set(texts.values())
  assert not any(re.search(r"[<>;,?\n ]", text) or not text for text in texts.values())
  names = model("toy").tokenizer.ids
  assert not any(model("toy").tokenizer.model.is_byte(id) for id in texts)
  assert not set(texts) & set(names.values()) and 0 not in texts and max(texts) < min(names.values())

def test_nearest():
  m = model("toy")
  texts, embedding = show.words(m.tokenizer), m.net.language_model.embed_tokens.weight.numpy()
  ids = list(texts)[::7] + list(texts)[-1:]
  found, cosines = show.nearest(m, 3 * embedding[ids])  # longer is no nearer
  assert found == [texts[id] for id in ids] and np.allclose(cosines, 1, atol=1e-5)
  features = np.random.default_rng(0).standard_normal((40, m.config.text.hidden_size))
  features += embedding[m.tokenizer.ids["<loc0100>"]]
  rows = embedding[list(texts)]
  cosine = features @ rows.T / np.linalg.norm(rows, axis=1) / np.linalg.norm(features, axis=1, keepdims=True)
  for block in (10, 50, 4096):  # the last block is not full
    found, best = show.nearest(m, features, block)
    assert found == [list(texts.values())[i] for i in cosine.argmax(1)]
    assert np.allclose(best, cosine.max(1), atol=1e-5)

@pytest.mark.parametrize("kind", ["tiny1", "tiny2"])
def test_contributions_are_the_attention_to_one_token(kind):
  m, (images, prompts, _) = model(kind), answered(kind)
  contributions = show.contributions(m, images, prompts)
  seen, layers = [], m.net.language_model.layers
  show.watched_pass(m, images, prompts, [[], []], lambda *args: seen.append(args))
  for block, values, (q, k, v, scale, _, softcap) in zip(layers, contributions, seen, strict=True):
    n = k.shape[2]
    for patch in (0, 9):
      only = vlm.upload(np.arange(n).reshape(1, 1, 1, 1, n) == patch, m.device).expand(2, 1, 1, 1, n)
      right = block.self_attn.o_proj(vlm.attention(q[:, :, :2].contiguous(), k, v, scale, only, softcap))
      right = (block.post_attention_layernorm(right) if m.config.text.gemma2 else right).numpy()
      assert np.abs(values[:, patch] - right[:, 0]).max() < 1e-4 * right.std()
      assert np.abs(right[:, 0] - right[:, 1]).max() < 1e-4 * right.std()  # whoever looks

# ---- pictures ----
def test_strip_has_a_cell_for_each_token():
  picture, other = Image.new("RGB", (300, 150), "white"), Image.new("RGB", (100, 300), "white")
  cell = show.PANEL + 10, show.PANEL // 2 + 44
  for n in (1, 5, 6, 7, 40):
    maps = np.full((n, 64), .001)
    maps[:, 10] = .5  # second row, third column
    sheet = show.strip([picture], maps, ["word"] * n)
    columns = min(n, show.STRIP // cell[0])
    assert sheet.size == (columns * cell[0] + 10, -(-n // columns) * cell[1] + 10)
    last = [10 + (n - 1) % columns * cell[0], 10 + (n - 1) // columns * cell[1]]
    lit = np.asarray(sheet.crop((*last, last[0] + show.PANEL, last[1] + show.PANEL // 2)), float).mean(2)
    y, x = np.unravel_index(lit.argmax(), lit.shape)
    assert (y // 25, x // 50) == (1, 2) and lit[:, 250:].max() < 140 and lit[150:].max() < 140
    if n % columns:  # nothing stands where no token is
      assert np.asarray(sheet.crop((last[0] + cell[0], last[1], *sheet.size))).min() == 255
  maps = np.zeros((2, 128))
  maps[:, 64:] = 1 / 64  # two pictures of one question, of which it looked at the second
  sheet = show.strip([picture, other], maps, ["a", "b"])
  assert sheet.size == (2 * (show.PANEL + 133 + 10) + 10, show.PANEL + 44 + 10)
  row = np.asarray(sheet, float).mean(2)[110]
  assert row[60:380].max() < 140 and row[430:520].min() > 170

def test_what_is_next_to_nothing_stays_dark():
  picture, maps = Image.new("RGB", (80, 80), "white"), np.zeros((2, 64))
  maps[0, 0], maps[1, 0] = .9, .01
  sheet = np.asarray(show.strip([picture], maps, ["a", "b"]), float).mean(2)
  at = 10 + show.PANEL // 16
  assert sheet[at, at] > 180 > 140 > sheet[at, at + show.PANEL + 10]
  assert show.strip([picture], np.zeros((1, 64)), ["a"])  # a window may hide the whole picture

def test_colors_of_heat():
  """each lighter than the one before, in grey too, and not grey themselves: seen on a grey picture, too"""
  colors = show.heat_colors(np.linspace(0, 1, 50))
  assert (np.diff(colors @ (.3, .6, .1)) > 0).all() and colors[-1].min() > 150
  middle = np.asarray(show.light(Image.new("RGB", (80, 80), "#808080"), np.full((8, 8), .5)), int)[45, 45]
  assert middle.max() - middle.min() > 60

def test_a_box_for_its_codes():
  labels = ["<loc0512>", "<loc0000>", "<loc1023>", "<loc0256>", "red", "circle", ";", "<loc0100>", "on",
            "<0xC3>"]
  captions, marks = show.read_edges(labels, (200, 100))
  assert captions == ["top, y = 50", "left, x = 0", "bottom, y = 100", "right, x = 50", "red", "circle", ";",
                      "top, y = 10", "on", "<0xC3>"]
  y, x = 512 / 1023, 256 / 1023
  assert marks[:4] == [(0, y, 1, y), (0, 0, 0, 1), (0, 1, 1, 1), (x, 0, x, 1)]
  assert marks[4] == marks[5] == (0, y, x, 1) and marks[6] is marks[8] is None
  maps = np.full((2, 64), .1)
  plain, marked = (np.asarray(show.strip([Image.new("RGB", (200, 100))], maps, [text, "a"]), int)
                   for text in ("a", "<loc0512>"))
  changed = (plain != marked).any(2)
  rows = changed[10:210, 20:400].all(1).nonzero()[0]
  assert len(rows) and abs(rows.mean() - 100) < 3 and not changed[:210, 420:].any()

def test_titles():
  picture = Image.new("RGB", (300, 50), "red")
  one, two = show.titled(picture, "short", "x"), show.titled(picture, "short", "word " * 40)
  assert one.width == two.width == 300 and 50 < one.height < two.height  # a long line has several rows
  assert np.array_equal(np.asarray(two)[-50:], np.asarray(picture))
  assert (np.asarray(one)[:-50] == 0).any() and (np.asarray(one)[:, -4:][:-50] == 255).all()

def test_grid():
  picture, near = Image.new("RGB", (448, 336), "#808080"), np.full(64, .1)
  near[9], near[20] = .9, .75
  sheet = show.grid(picture, ["word"] * 64, near)
  assert sheet.size == (1024, 768)
  cells = np.asarray(sheet, float).mean(2).reshape(8, 96, 8, 128)[:, 4:-4, :, 4:-4]
  loud = np.abs(cells - 128).max((1, 3))
  assert np.unravel_index(loud.argmax(), loud.shape) == (1, 1)
  assert 20 < loud[2, 4] < loud[1, 1] - 20  # the farther, the fainter
  assert np.sort(loud.ravel())[-3] < 1  # and what is weak not at all
  long = show.grid(picture, ["Donaudampfschifffahrtsgesellschaft日本語"] * 64, near)
  edges = np.asarray(long, float).mean(2).reshape(768, 8, 128)[:, :, -2:]
  assert np.abs(edges - 128).max() < 5  # none leaves its cell

def test_labels():
  tokenizer = model("toy").tokenizer
  ids = [tokenizer.ids["<loc0012>"], *tokenizer.encode(" red"), tokenizer.newline, *tokenizer.encode("é")]
  ids.append(tokenizer.image)
  assert [show.label(tokenizer, id) for id in ids] == \
    ["<loc0012>", "red", r"'\n'", "<0xC3>", "<0xA9>", f"<{tokenizer.image}>"]
  assert show.plain("é日") == r"é\u65e5"

# ---- does it mean anything ----
@pytest.mark.long
def test_it_means_something_on_the_toy(capsys):
  """what is printed of 200 scenes in a README, on 50"""
  titles = "mean of all layers|layer 1 alone|layer 2|layer 3|layer 4|projected features|taken by layer 1"
  rows = [[float(v) for v in re.findall(r"\d\.\d{3}", line)] for page in PAGES
          for line in re.findall(rf"^\| (?:{titles}) \|.*$", page, flags=re.M)]
  assert list(map(len, rows)) == [4] * 5 + [2] * 5
  results = show.evaluate(model("toy"), 50)
  for task in ("caption", "color"):
    assert results[task].shape == (5, 2)
    assert results[task][0, 0] > .8 and results[task][0, 1] > .3  # all layers
    assert results[task][3, 0] > .8 and results[task][3, 1] > .65  # the third
    assert max(results[task][[1, 2, 4], 0]) < .5
  assert results["patches"].shape == (5, 2)
  assert results["patches"][0].max() < .02 and results["patches"][3, 0] > .9 and results["patches"][4, 1] > .5
  for i in range(5):
    caption, color = results["caption"][i], results["color"][i]
    assert np.abs(np.array(rows[i]) - [caption[0], color[0], caption[1], color[1]]).max() < .15
    assert np.abs(np.array(rows[5 + i]) - results["patches"][i]).max() < .1
  out = capsys.readouterr().out
  [line] = re.findall(r"all layers +([\d. ]+)\n", out)
  right = [float(v) for task in ("caption", "color") for v in results[task][0]]
  assert np.abs(np.array(line.split(), float) - right).max() < .001

@pytest.mark.long
def test_eval_wants_weights_that_know_the_toy_world():
  with pytest.raises(vlm.Fault, match="toy"):
    show.evaluate(model("tiny1"), 2)

def test_boxes_and_patches():
  shares, centers = show.patches_in((0, 0, 50, 100), (200, 100), 8)  # the left quarter: two columns
  assert np.array_equal(shares.reshape(8, 8), np.tile([1, 1, 0, 0, 0, 0, 0, 0], (8, 1)))
  assert np.array_equal(centers.reshape(8, 8), np.tile([1, 1, 0, 0, 0, 0, 0, 0], (8, 1)) > 0)
  shares, centers = show.patches_in((30, 10, 45, 20), (80, 80), 8)
  assert shares.reshape(8, 8)[1, 3] == 1 and shares.reshape(8, 8)[1, 4] == .5 and shares.sum() == 1.5
  assert centers.reshape(8, 8)[1, 3] and centers.sum() == 1

def test_color_words():
  class Scene:
    objects = [shapes.Object(shape, color, (0, 0, 1, 1), None)
               for shape, color in (("circle", "red"), ("star", "blue"))]
  def of(task, prefix, text):
    answer = vlm.Answer(text, model("toy").tokenizer.encode(text), [])
    found, wrong = show.color_words(model("toy"), task, Scene, prefix, answer)
    return [(i, obj.name) for i, obj in found], wrong
  named = [(1, "red circle"), (6, "blue star")]
  assert of("caption", "caption en", "a red circle left of a blue star") == (named, 0)
  assert of("caption", "caption en", "a red star") == ([], 1)
  assert of("caption", "caption en", "a red") == ([], 1)
  assert of("color", "answer en what color is the star?", "blue") == ([(0, "blue star")], 0)
  assert of("color", "answer en what color is the star?", "red") == ([], 1)

# ---- command line ----
def test_command_line(toy, capsys):
  for what, words, out, size in (
      ("attention", [PROMPT], "shapes.attention.png", (1240, 757)),
      ("attention", [PROMPT, "--layer", "3", "--out", "a.png"], "a.png", (1240, 757)),
      ("patches", [], "shapes.patches.png", (1024, 827)),
      ("patches", ["caption en", "--layer", "4", "--out", "p.png"], "p.png", (1024, 827)),
      ("patches", [PICTURE, "--layer", "0", "--out", "two.png"], "two.png", (2048, 827)),
      ("patches", [PICTURE, "caption en", "--layer", "3", "--out", "both.png"], "both.png", (2048, 827))):
    assert not show.main([what, PICTURE, *words])
    stdout, stderr = capsys.readouterr()
    answer = model("toy").generate([PICTURE], [PROMPT])[0].text + "\n"
    assert stdout == (answer if what == "attention" else "") and out in stderr
    assert words or "layer 3\n" in stderr  # whose words are nearest
    assert Image.open(out).size == size
  for pair in (("shapes.attention.png", "a.png"), ("shapes.patches.png", "p.png"), ("two.png", "both.png")):
    one, two = (np.asarray(Image.open(name), float) for name in pair)
    assert np.abs(one - two).mean() > 1
  assert sorted(file.name for file in Path().iterdir()) == [
    "a.png", "both.png", "p.png", "shapes.attention.png", "shapes.patches.png", "two.png"]

def test_eval_on_the_command_line(monkeypatch, capsys):
  asked, m = [], model("toy")
  monkeypatch.setattr(vlm, "load", lambda folder, *args: asked.append(folder) or m)
  monkeypatch.setattr(show, "evaluate", lambda *args: asked.append(args))
  assert not show.main(["eval"]) and not show.main(["eval", "--scenes", "3", "--quiet"])
  toy = ROOT / "weights" / "toy"
  assert asked == [toy, (m, 200), toy, (m, 3)]
  loading, answers = capsys.readouterr().err.splitlines()  # the quiet one says nothing
  assert loading.startswith("loading ") and answers.endswith(" answers")

def test_any_answer(monkeypatch, capsys, kind="tiny1"):
  """one token, and a sampled answer of several rows of pictures"""
  m = model(kind)
  monkeypatch.setattr(vlm, "load", lambda *args, **options: m)
  for options in ("--max-tokens 1", "--max-tokens 30 --temperature 1 --seed 3"):
    assert not show.main(["attention", PICTURE, "caption en", "--out", "out.png", *options.split()])
    out = capsys.readouterr().out
  [answer] = m.generate([PICTURE], ["caption en"], max_tokens=30, temperature=1, seed=3)
  assert out == answer.text + "\n" and Image.open("out.png").height > 3 * 130

def test_an_empty_answer(toy, capsys, monkeypatch):
  monkeypatch.setattr(vlm.VLM, "tokens", lambda *args, **options: iter([]))
  assert not show.main(["attention", PICTURE, PROMPT])
  out, err = capsys.readouterr()
  assert out == "\n" and "empty" in err and not list(Path().iterdir())

@pytest.mark.parametrize("words,message", [
  ("attention IMAGE x --layer 0", "layer 0"), ("attention IMAGE x --layer 5", "has 4"),
  ("attention IMAGE x --layer x", "layer"), ("attention IMAGE x --out a.txt", "a.txt"),
  ("attention IMAGE x --out none/a.png", "none"), ("attention IMAGE x --json", "--json"),
  ("attention IMAGE x --scenes 3", "--scenes"), ("attention IMAGE x --seed 3", "--temperature"),
  ("attention IMAGE", "prompt"), ("attention IMAGE IMAGE", "prompt"), ("attention none.png x", "none.png"),
  ("attention IMAGE none.png x", "none.png"), ("attention", "PROMPT"), ("attention IMAGE b c", "quotes"),
  ("patches IMAGE --out IMAGE", "input"), ("patches none.png", "none.png"), ("patches IMAGE a.jpg", "a.jpg"),
  ("patches IMAGE x --layer 5", "has 4"), ("patches IMAGE x --layer -1", "layer -1"),
  ("patches IMAGE --temperature 1", "--temperature"), ("patches IMAGE --max-tokens 3", "--max-tokens"),
  ("patches IMAGE --seed 3", "--seed"), ("eval --scenes 0", "--scenes"), ("eval --layer 3", "--layer"),
  ("eval --out a.png", "--out"), ("eval --top-k 3", "--top-k"), ("eval IMAGE", "shapes.png"),
  ("words IMAGE", "words"), ("--eval", "attention|patches|eval"), ("", "attention|patches|eval")])
def test_faults(words, message, toy, capsys):
  before = Path(PICTURE).read_bytes()
  assert show.main([PICTURE if word == "IMAGE" else word for word in words.split()]) == 2
  out, err = capsys.readouterr()
  *_, last = err.strip().splitlines()
  assert last.startswith("show: ") and message in last and not out and not list(Path().iterdir())
  assert Path(PICTURE).read_bytes() == before

def test_old_spelling(capsys):
  assert vlm.main([PICTURE, PROMPT, "--show", "attention"]) == 2
  assert re.fullmatch(r"vlm: .*python examples/show\.py.*\n", capsys.readouterr().err)

SHIPPED = {
  'python examples/show.py attention examples/shapes.png "detect red circle" --out show-attention.png':
    "show-attention.png",
  'python examples/show.py patches examples/shapes.png --out show-patches.png':
    "show-patches.png"}

@pytest.mark.parametrize("command,name", SHIPPED.items())
def test_shipped_pictures_are_what_the_commands_make(command, name, toy):
  words = [PICTURE if word == "examples/shapes.png" else word for word in shlex.split(command)[2:]]
  assert not show.main(words)
  files = ROOT / "examples" / name, name
  shipped, made = (np.asarray(Image.open(file).convert("RGB"), float) for file in files)
  assert shipped.shape == made.shape and np.abs(shipped - made).mean() < 1

def test_a_readme_shows_these_pictures():
  for command, name in SHIPPED.items():
    assert any(command in page and re.search(rf"\]\((examples/)?{name}\)", page) for page in PAGES), command

def test_from_any_folder(tmp_path):
  command = [sys.executable, ROOT / "examples/show.py", "patches", PICTURE, "--weights", "tiny1", "--quiet"]
  done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
  assert [file.name for file in tmp_path.iterdir()] == ["shapes.patches.png"]

@pytest.mark.parametrize("kind", ["tiny1", "tiny2", "tiny2-28b"])
def test_live_attention(kind, monkeypatch):
  """equal to the attentions that transformers gives out while it answers; needs torch and transformers"""
  for package in ("torch", "transformers"):
    if os.environ.get("VLM_LIVE"):
      importlib.import_module(package)
    pytest.importorskip(package)
  import torch
  m, theirs, [picture] = model(kind), golden.load(ROOT / "weights" / kind), golden.pixels(56, 1)
  ids, P = m.tokenizer.prompt(PROMPT), m.config.vision.patches
  [answer] = m.generate([picture], [PROMPT], max_tokens=20)
  [maps] = show.attention_maps(m, [picture], [PROMPT], [answer.tokens])
  prefix, right = torch.tensor([[theirs.config.image_token_id] * P + ids]), []
  with torch.no_grad():
    out = theirs(input_ids=prefix, pixel_values=torch.tensor(picture[None]),
                 token_type_ids=torch.zeros_like(prefix), attention_mask=torch.ones_like(prefix),
                 use_cache=True, output_attentions=True)
    for i, token in enumerate(answer.tokens):
      # (layers, P), mean of the heads. None: a sliding layer's cache forgets what left its window.
      rows = [a[0, :, -1].mean(0).numpy() for a in out.attentions]
      right.append([row[:P] if len(row) == P + len(ids) + i else None for row in rows])
      token = torch.tensor([[token]])
      seen = torch.ones(1, P + len(ids) + i + 1, dtype=torch.long)
      out = theirs(input_ids=token, past_key_values=out.past_key_values, output_attentions=True,
                   token_type_ids=torch.ones_like(token), attention_mask=seen)
  assert len(right) == 20
  for i, layers in enumerate(right):
    for layer, row in enumerate(layers):
      if row is None:
        assert layer % 2 == 0 and maps[layer, i].max() < 1e-30
      else:
        assert np.abs(maps[layer, i] - row).max() < 1e-5
