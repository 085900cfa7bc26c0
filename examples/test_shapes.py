"""Tests of examples/shapes.py. Answers are worked out again here, in other words than in shapes.py."""
import functools
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import codebook
import shapes
import tokenizer
import vlm

draw = vlm.beside("draw")
ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(scope="module")
def scenes():
  return [shapes.scene(shapes.VALID_SEED, i) for i in range(300)]

def digest(image):
  return hashlib.sha256(image.tobytes()).hexdigest()

def kind(prefix):
  first = prefix.split()[0]
  words = {"how many": "how many", "color": "color", "relation": "what is "}
  return first if first != "answer" else next(kind for kind in words if words[kind] in prefix)

# ---- scenes ----
def test_deterministic_whatever_the_order():
  forward = [digest(shapes.scene(7, i).image) for i in range(6)]
  assert forward == [digest(shapes.scene(7, i).image) for i in reversed(range(6))][::-1]
  assert len(set(forward)) == 6 and digest(shapes.scene(8, 0).image) != forward[0]
  code = "import sys; sys.path.insert(0, sys.argv[1]); import shapes, hashlib\n" \
         "image, asked = shapes.examples(7, 3, 4)\nprint(hashlib.sha256(image.tobytes()).hexdigest(), asked)"
  command = [sys.executable, "-B", "-c", code, str(ROOT / "examples")]
  out = subprocess.run(command, capture_output=True, text=True, check=True)
  image, asked = shapes.examples(7, 3, 4)
  assert out.stdout.strip() == f"{digest(image)} {asked}"

def test_seeds_are_disjoint():
  seeds = (shapes.TRAIN_SEED, shapes.VALID_SEED, shapes.TEST_SEED, shapes.EXAMPLE_SEED)
  assert len({digest(shapes.scene(seed, i).image) for seed in seeds for i in range(20)}) == 80

def test_pictures(scenes):
  sizes = [s.image.size for s in scenes]
  assert all(96 <= side <= 320 for size in sizes for side in size)
  ratios = [w / h for w, h in sizes]
  assert .48 < min(ratios) < .6 and 1.7 < max(ratios) < 2.1
  assert all(s.image.mode == "RGB" for s in scenes)
  assert shapes.scene(1, 0, (448, 336)).image.size == (448, 336)
  for size in ((63, 100), (100, 513)):
    with pytest.raises(ValueError):
      shapes.scene(1, 0, size)
  counts = Counter(len(s.objects) for s in scenes)
  assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 25

def test_mask_and_box_agree(scenes):
  for s in scenes[:100]:
    for obj in s.objects:
      m = shapes.mask(obj)
      assert m.shape == s.image.size[::-1] and m.dtype == bool
      y, x = np.nonzero(m)
      around = x.min(), y.min(), x.max() + 1, y.max() + 1
      tips = 1.2 if obj.shape == "circle" else 5  # the last pixels of a thin tip are hardly covered
      assert np.abs(np.array(around) - obj.box).max() < tips, obj
      x1, y1, x2, y2 = obj.box
      assert 0 < x1 < x2 < s.image.width and 0 < y1 < y2 < s.image.height
      smallest, largest = (share * min(s.image.size) for share in shapes.SIZES[len(s.objects) - 1])
      assert smallest - .01 <= max(x2 - x1, y2 - y1) <= largest + .01
      if obj.shape == "circle":
        assert abs(m.sum() / (np.pi / 4 * (x2 - x1) * (y2 - y1)) - 1) < .05
      assert shapes.iou(around, obj.box) > .75

def test_pixels_show_the_colors(scenes):
  for s in scenes[:100]:
    pixels, hidden = np.asarray(s.image).astype(int), np.zeros(s.image.size[::-1], bool)
    for obj in reversed(s.objects):
      inside = np.asarray(obj.coverage) == 255
      seen = pixels[inside & ~hidden].mean(0)
      nearest = min(shapes.COLORS, key=lambda c: np.abs(seen - shapes.COLORS[c]).sum())
      assert nearest == obj.color
      hidden |= np.asarray(obj.coverage) > 0
    ground = pixels[~hidden].mean(0)
    assert ground.max() - ground.min() < 45  # greyish
    assert min(np.abs(ground - c).max() for c in shapes.COLORS.values()) > 50

def test_shapes_stay_recognisable(scenes):
  for s in scenes:
    masks = [shapes.mask(obj) for obj in s.objects]
    for n, (obj, m) in enumerate(zip(s.objects, masks)):
      later = np.any(masks[n + 1:], 0) if masks[n + 1:] else np.zeros_like(m)
      assert (m & later).sum() <= .2 * m.sum()
      x, y = map(int, obj.center)
      assert m[y, x] and not later[y, x]
    for (a, p), (b, q) in combinations(zip(s.objects, masks), 2):
      assert a.name != b.name
      if a.color == b.color:
        assert not (p & q).any()

def test_some_overlap(scenes):
  def touch(objects):
    return any((shapes.mask(a) & shapes.mask(b)).any() for a, b in combinations(objects, 2))
  assert .05 < sum(touch(s.objects) for s in scenes) / len(scenes) < .5

# ---- questions ----
def delta(s, a, b):
  """from a to b in fractions of the picture"""
  (w, h), box = s.image.size, lambda o: np.array(o.box)
  d = (box(b)[:2] + box(b)[2:] - box(a)[:2] - box(a)[2:]) / 2
  return d[0] / w, d[1] / h

def test_margins(scenes):
  for s in scenes:
    for a, b in combinations(s.objects, 2):
      dx, dy = map(abs, delta(s, a, b))
      assert dx >= .06
      if len(s.objects) == 2:
        big, small = max(dx, dy), min(dx, dy)
        assert big >= 1.3 * small and big >= .1

def test_captions(scenes):
  for s in scenes:
    said = shapes.caption(s)
    names = re.findall(r"\b(?:a|an) (\w+ \w+?)\b", said)
    assert sorted(names) == sorted(o.name for o in s.objects)
    assert not re.search(r"\ba [aeiou]|\ban [^o]", said)
    order = [next(o for o in s.objects if o.name == n) for n in names]
    if len(order) == 2:
      dx, dy = delta(s, *order)
      assert ("above" in said) == (abs(dy) > abs(dx)) != ("left of" in said)
      assert (dy if "above" in said else dx) > 0
    else:
      xs = [o.box[0] + o.box[2] for o in order]
      assert xs == sorted(xs)
      assert said.count(" and ") == (len(order) > 1) and said.count(", ") == max(0, len(order) - 2)

def test_answers(scenes):
  asked_relations = 0
  for s in scenes:
    qs = shapes.questions(s)
    assert qs["how many"] == [("answer en how many shapes are there?", str(len(s.objects)))]
    kinds = Counter(o.shape for o in s.objects)
    expected = {f"answer en what color is the {o.shape}?": o.color for o in s.objects if kinds[o.shape] == 1}
    assert dict(qs["color"]) == expected
    for prefix, suffix in qs["relation"]:
      asked_relations += 1
      pattern = r"answer en what is (left of|right of|above|below) the (\w+)\?"
      side, shape = re.fullmatch(pattern, prefix).groups()
      assert kinds[shape] == 1
      subject = next(o for o in s.objects if o.shape == shape)
      there = []
      for o in s.objects:
        if o is not subject:
          dx, dy = delta(s, subject, o)
          along, across = {"left of": (-dx, dy), "right of": (dx, dy),
                           "above": (-dy, dx), "below": (dy, dx)}[side]
          if along > 0 and along > abs(across) / 1.3:  # there, or not clearly elsewhere
            assert along >= 1.3 * abs(across) and along >= .1
            there.append(o.name)
      assert there == [suffix]
  assert asked_relations > 150
  two = [s for s in scenes if len(s.objects) == 2 and len({o.shape for o in s.objects}) == 2]
  assert all(len(shapes.relations(s)) == 2 for s in two)

def test_detect(scenes):
  rng, empty, partial, total = np.random.default_rng(0), 0, 0, 0
  for s in scenes:
    width, height = s.image.size
    for prefix, suffix in [shapes.detect(s, rng) for _ in range(5)]:
      labels = prefix.removeprefix("detect ").split(" ; ")
      assert len(set(labels)) == len(labels) <= 3
      parts = suffix.split(" ; ") if suffix else []
      got = []
      for part in parts:
        *v, label = re.fullmatch(r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})> ([a-z ]+)", part).groups()
        y1, x1, y2, x2 = (int(n) / 1023 for n in v)
        got.append((label, (x1 * width, y1 * height, x2 * width, y2 * height)))
      truth = [(l, o.box) for l in labels for o in sorted(s.objects, key=lambda o: o.box[0] + o.box[2])
               if l in (o.name, o.shape)]
      assert [g[0] for g in got] == [t[0] for t in truth]
      for g, t in zip(got, truth):
        assert np.abs(np.array(g[1]) - t[1]).max() <= (.5 / shapes.PLACES + .51 / 1023) * max(width, height)
      total, empty = total + 1, empty + (suffix == "")
      partial += bool(suffix) and any(l not in suffix for l in labels)
  assert .05 < empty / total < .13 and .05 < partial / total < .2

def test_locations():
  assert shapes.locations((0, 0, 100, 50), 100, 50) == "<loc0000><loc0000><loc1023><loc1023>"
  assert shapes.locations((10, 40, 30, 45), 100, 50) == "<loc0815><loc0104><loc0919><loc0304>"
  assert shapes.locations((-5, 0, 120, 50), 100, 50) == "<loc0000><loc0000><loc1023><loc1023>"

def test_tasks_and_examples():
  for i in range(40):
    s = shapes.scene(5, i)
    asked = shapes.tasks(s, np.random.default_rng(0))
    assert len(set(asked)) == len(asked) == 5 + sum(map(len, shapes.questions(s).values()))
    image, many = shapes.examples(5, i, 20)
    assert digest(image) == digest(s.image) and len(set(many)) == 20
    assert all(p == p.lower() and a == a.lower() for p, a in many)
    image, prefix, suffix = shapes.example(5, i)
    assert digest(image) == digest(s.image) and isinstance(prefix, str) and isinstance(suffix, str)

@pytest.mark.parametrize("k", [1, 2, 4])
def test_mixture(k):
  counts = Counter(kind(p) for i in range(1200 // k) for p, _ in shapes.examples(shapes.TRAIN_SEED, i, k)[1])
  for name, share in dict(caption=.13, detect=.68, color=.09, relation=.05, **{"how many": .05}).items():
    assert abs(counts[name] / counts.total() - share) < .03, (name, counts)

def test_segment_questions():
  """their codes, drawn in their boxes, are the shapes"""
  codes = functools.partial(codebook.tokens, TOY / draw.NAME)
  masks, overlaps, absent, total = draw.Masks(TOY, vlm.open_device(None)), [], 0, 0
  for i in range(60):
    s = shapes.scene(shapes.VALID_SEED, i)
    image, asked = shapes.examples(shapes.VALID_SEED, i, 8, codes=codes)
    assert digest(image) == digest(s.image) and len(set(asked)) == 8
    for prefix, suffix in asked:
      total += 1
      if prefix.startswith("segment "):
        there = [o for o in s.objects if o.name == prefix.removeprefix("segment ")]
        boxes = tokenizer.parse_boxes(suffix, *image.size)
        pattern = r"(<loc\d{4}>){4}(<seg\d{3}>){16} [a-z]+ [a-z]+" if there else ""
        assert re.fullmatch(pattern, suffix)
        assert [b.label for b in boxes] == [o.name for o in there]
        overlaps += [shapes.overlap(masks(b, *image.size), shapes.mask(o)) for b, o in zip(boxes, there)]
        absent += not there
  assert np.mean(overlaps) > .85, np.mean(overlaps)
  assert .1 < absent / (absent + len(overlaps)) < .3 and .25 < (absent + len(overlaps)) / total < .5

# ---- tokenizer ----
def test_tokenizer(tmp_path, scenes):
  shapes.make_tokenizer(tmp_path / "a.model")
  (tmp_path / "elsewhere").mkdir()
  shapes.make_tokenizer(tmp_path / "elsewhere" / "b.model")
  data = (tmp_path / "a.model").read_bytes()
  assert data == (tmp_path / "elsewhere" / "b.model").read_bytes() and len(data) < 20_000
  model = sentencepiece.SentencePieceProcessor(model_proto=data)
  assert (model.pad_id(), model.eos_id(), model.bos_id(), model.unk_id()) == (0, 1, 2, 3)
  assert model.get_piece_size() == 424 and sum(model.is_byte(i) for i in range(424)) == 256
  for text in ("\n", "\n\n", "  "):
    assert len(model.encode(text)) == 1
  rng = np.random.default_rng(1)
  for s in scenes[:150]:
    for text in sum(shapes.tasks(s, rng), ()):
      text = re.sub(r"<loc\d{4}>", "", text)  # each is one id of the caller
      assert len(model.encode(text)) == len(re.findall(r" ?[a-z]+| ?;|[,?\d]| (?= )| $", text)), text
      assert model.decode(model.encode(text)) == text
  for text in ("segment red circle", "Grüße, 12\n\n"):
    assert model.decode(model.encode(text)) == text
  for s in scenes:
    if len(s.objects) == 2:
      assert len(model.encode(shapes.caption(s))) <= 10

# ---- measuring ----
class Fake:
  """Answers from the questions of the held-out scenes, changed by `spoil`. folder: where its decoder of masks
  is."""
  device = "CPU"

  def __init__(self, spoil=lambda prefix, suffix: suffix, count=30, folder=None):
    self.known, self.spoil, self.calls, self.folder = {}, spoil, [], folder or TOY
    for i in range(count):
      s = shapes.scene(shapes.TEST_SEED, i)
      self.known[digest(s.image)] = s

  def generate(self, images, prompts, max_tokens):
    self.calls.append((len(images), len(prompts), max_tokens))
    return [self.answer(image, prompt) for [image], prompt in zip(images, prompts)]

  def answer(self, image, prompt):
    s, (kind, _, labels) = self.known[digest(image)], prompt.partition(" ")
    if kind == "detect":
      text = " ; ".join(f"{shapes.locations(o.box, *image.size)} {label}" for label in labels.split(" ; ")
                        for o in shapes.wanted(s, label))
    elif kind == "segment":
      text = shapes.segment(s, labels, functools.partial(codebook.tokens, TOY / draw.NAME))[1]
    else:
      text = dict(sum(shapes.questions(s).values(), []))[prompt]
    text = self.spoil(prompt, text)
    return vlm.Answer(text, [], tokenizer.parse_boxes(text, *image.size))

def table(out):
  row = re.compile(r"(.+?)\s+(\d+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)(.*)")
  rows = [row.match(line).groups() for line in out.splitlines()[1:]]
  return {r[0]: (int(r[1]), float(r[2]), "too low" in r[5]) for r in rows}

def test_a_perfect_model_passes(capsys):
  model = Fake()
  assert shapes.evaluate(model, 30) is True
  rows = table(capsys.readouterr().out)
  n, measured, low = rows["segment, mean IoU"]
  assert len(rows) == 7 and n == 30 and measured > .9 and not low  # less than 1 is lost in the codes
  assert rows["caption, exact match"] == (30, 1, False) and rows["detect, all boxes right"][:2] == (30, 1)
  assert .97 < rows["detect, mean IoU"][1] <= 1
  assert {call[:2] for call in model.calls} == {(shapes.BATCH, shapes.BATCH)}
  assert len({call[2] for call in model.calls}) == 1

FALSE_BOX = "<loc0000><loc0000><loc0500><loc0500> red circle"

def call_all_cats(answer):
  return re.sub("circle|square|star|triangle", "cat", answer)

@pytest.mark.parametrize("spoil,row", [
  (lambda p, a: a + " x" if p == "caption en" else a, "caption, exact match"),
  (lambda p, a: "7" if "how many" in p else a, "how many"),
  (lambda p, a: "pink" if "color" in p else a, "what color"),
  (lambda p, a: "blue" if "what is " in p else a, "left, right, above, below"),
  (lambda p, a: a.partition(" ; ")[0] and "" if p.startswith("detect") else a, "detect, all boxes right"),
  (lambda p, a: a + " ; " * bool(a) + FALSE_BOX if p[:6] == "detect" else a, "detect, all boxes right"),
  (lambda p, a: call_all_cats(a) if p[:6] == "detect" else a, "detect, all boxes right"),
  (lambda p, a: "" if p.startswith("segment") else a, "segment, mean IoU"),
  (lambda p, a: call_all_cats(a) if p[:7] == "segment" else a, "segment, mean IoU"),
  (lambda p, a: f"{a} ; {a}" if p[:7] == "segment" else a, "segment, mean IoU"),
  (lambda p, a: re.sub("<seg...>", "", a), "segment, mean IoU"),
  (lambda p, a: a.replace("<seg", "<loc0000><seg", 1), "segment, mean IoU"),
])
def test_a_wrong_model_fails(spoil, row, capsys):
  assert shapes.evaluate(Fake(spoil), 30) is False
  rows = table(capsys.readouterr().out)
  assert rows[row][1] < .5 and rows[row][2]
  assert all(rows[r][1] > (.9 if r.startswith("segment") else .95) for r in rows if r[:6] != row[:6])

def test_overlap_of_masks():
  a, b = np.zeros((2, 4, 6), bool)
  a[1:3, 1:4], b[2:4, 1:3] = True, True
  assert shapes.overlap(a, a) == 1 and shapes.overlap(a, ~a) == 0 and shapes.overlap(a, b) == 2 / 8
  assert shapes.overlap(a & False, b & False) == 0

def test_a_checkpoint_without_masks_is_not_asked_for_them(capsys, monkeypatch, tmp_path):
  monkeypatch.setattr(draw.Masks, "path", None)  # a user may have weights/vae-oid.npz
  assert shapes.evaluate(Fake(count=4), 4) is False
  assert table(capsys.readouterr().out)["segment, mean IoU"] == (0, 0, True)

def test_matching():
  a, b, far = (0, 0, 10, 10), (5, 0, 15, 10), (50, 50, 60, 60)
  assert shapes.iou(a, a) == 1 and shapes.iou(a, far) == 0 and abs(shapes.iou(a, b) - 1 / 3) < 1e-9
  assert shapes.iou((3, 3, 3, 3), (3, 3, 3, 3)) == 0
  assert shapes.match([("x", a), ("x", b)], [("x", b), ("x", a)]) == [1, 1]
  assert shapes.match([("x", a)], [("x", a), ("x", a)]) == [1]     # a double counts once
  assert shapes.match([("x", a)], [("y", a)]) == [] == shapes.match([("x", a)], [("x", far)])
  assert shapes.match([], []) == []

# ---- command line ----
@pytest.fixture
def cli(tmp_path):
  """cli(*args) -> shapes.py, done, started from another folder."""
  def start(*args):
    command = [sys.executable, "-B", ROOT / "examples/shapes.py", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
  return start

def test_make(cli, tmp_path):
  assert cli("--make", "d", "--count", 5, "--seed", 9).returncode == 0
  lines = [json.loads(l) for l in (tmp_path / "d" / "data.jsonl").read_text().splitlines()]
  assert len(lines) == 5 and all(set(l) == {"image", "prefix", "suffix"} for l in lines)
  for i, l in enumerate(lines):
    image, prefix, suffix = shapes.example(9, i)
    assert digest(Image.open(tmp_path / "d" / l["image"])) == digest(image)
    assert (prefix, suffix) == (l["prefix"], l["suffix"])

def test_example(cli, tmp_path):
  out = cli("--example", tmp_path).stdout.splitlines()
  assert out[0] == "shapes.png: a green triangle, a red circle and a yellow star" and len(out) == 5
  for line in out:
    path = tmp_path / line.split(":")[0]
    assert Image.open(path).size == (448, 336) and path.stat().st_size < 50_000

def test_the_exit_code_of_eval(monkeypatch, capsys):
  models = {"good": Fake(count=4), "bad": Fake(lambda p, a: "", count=4)}
  monkeypatch.setattr(vlm, "open_model", lambda args: models[args.weights])
  assert shapes.main(["--eval", "--weights", "good", "--scenes", "4"]) == 0
  assert shapes.main(["--eval", "--weights", "bad", "--scenes", "4"]) == 1
  assert capsys.readouterr().out.count("too low") >= 5

def test_eval_of_a_checkpoint(cli):
  done = cli("--eval", "--weights", "tiny1", "--scenes", 1)  # found under weights/ of the repository
  assert done.returncode == 1 and "tiny1" in done.stderr and table(done.stdout)["how many"] == (1, 0, True)

@pytest.mark.parametrize("words,argv", [
  ("required", ()), ("--count goes with --make", ("--eval", "--count", "5")),
  ("--seed goes with --make", ("--example", "d", "--seed", "0")), ("not allowed", ("--make", "d", "--eval")),
  ("--scenes goes with --eval", ("--make", "d", "--scenes", "5")),
  ("--weights goes with --eval", ("--make", "d", "--weights", "toy")),
  ("--device goes with --eval", ("--make", "d", "--device", "CPU")),
  ("--quiet goes with --eval", ("--example", "d", "--quiet")),
  ("--count: at least 1", ("--make", "d", "--count", "0")),
  ("--seed: at least 0", ("--make", "d", "--seed", "-1")),
  ("no such folder", ("--eval", "--weights", "no")), ("unrecognized", ("--eval", "--temperature", "1"))])
def test_an_option_that_does_nothing_is_an_error(words, argv, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert shapes.main(list(argv)) == 2 and not list(tmp_path.iterdir())
  out, err = capsys.readouterr()
  assert out == "" and err.startswith("shapes: ") and words in err and err.count("\n") == 1

def test_a_folder_that_cannot_be_written(tmp_path, capsys):
  (tmp_path / "file").write_text("")
  for action in ("--make", "--example"):
    assert shapes.main([action, str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.count("\n") == 1

# ---- the checkpoint that ships ----
TOY = ROOT / "weights" / "toy"

def test_the_toy_is_small_and_whole():
  assert {"config.json", "model.safetensors", "tokenizer.model"} <= {f.name for f in TOY.iterdir()}
  assert sum(f.stat().st_size for f in TOY.iterdir()) <= 8_000_000 and not (TOY / "training.state").exists()

@pytest.mark.long
def test_the_toy_answers_right_for_the_example_pictures():
  """What a fresh clone shows: captions, counts, and boxes for everything that is there and for nothing that
  is not."""
  model = vlm.load(TOY)
  for name, i in shapes.EXAMPLES.items():
    drawn, picture = shapes.scene(shapes.EXAMPLE_SEED, i, (448, 336)), ROOT / "examples" / name
    prompts = ["caption en", "answer en how many shapes are there?"]
    prompts += [f"detect {o.name}" for o in drawn.objects]
    caption, count, *found = model.generate([picture] * len(prompts), prompts, max_tokens=40)
    assert caption.text == shapes.caption(drawn) and count.text == str(len(drawn.objects))
    for obj, answer in zip(drawn.objects, found):
      [box] = answer.boxes
      assert box.label == obj.name and shapes.iou(box.box, obj.box) > .7, (name, obj)

@pytest.mark.long
def test_the_toy_meets_the_table(capsys):
  """On all the scenes that README.md's table is of: on fewer of them a must can be missed by chance."""
  assert shapes.evaluate(vlm.load(TOY), 500), capsys.readouterr().out

def test_the_picture_of_the_readme_is_what_the_toy_draws():
  picture = ROOT / "examples" / "shapes.png"
  [answer] = vlm.load(TOY).generate([picture], ["detect red circle ; yellow star"])
  drawn = draw.draw_boxes(vlm.open_image(picture), answer.boxes)
  shown = Image.open(ROOT / "examples" / "shapes-boxes.png").convert("RGB")
  assert len(answer.boxes) == 2 and np.array_equal(np.asarray(drawn), np.asarray(shown))

def test_pictures_of_the_user_are_never_written_over(tmp_path, capsys):
  shapes.make(tmp_path / "one", 2, 1)
  for name in ("data.jsonl", "000001.png"):
    folder = tmp_path / name.replace(".", "")
    folder.mkdir()
    (folder / name).write_text("mine")
    assert shapes.main(["--make", str(folder), "--count", "2"]) == 2
    assert "would be lost" in capsys.readouterr().err
    assert [file.name for file in folder.iterdir()] == [name] and (folder / name).read_text() == "mine"
  (tmp_path / "shapes.png").write_text("mine")
  assert shapes.main(["--example", str(tmp_path)]) == 2
  assert (tmp_path / "shapes.png").read_text() == "mine"
