"""Tests of batch.py: several pictures for one question, and lists of questions. `-k live` compares with
transformers itself, with new seeds and sizes at every run (VLM_SEED=N repeats one); that needs torch and
transformers."""
import base64
import csv
import errno
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import batch
import golden
import vlm
from test_vlm import live_seed  # noqa: F401

WEIGHTS, KINDS = ROOT / "weights", ("tiny1", "tiny2", "tiny2-28b")
TOLERANCE = 1e-4  # of the logits, in standard deviations: see test_vlm.py
PROMPT = golden.PROMPTS[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


@functools.cache
def model(kind):
  return vlm.load(WEIGHTS / kind)


def differ(a, b):
  assert a.shape == b.shape
  return float(np.abs(np.float64(a) - b).max() / b.std())


def picture(path, seed, size=(80, 60)):
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)).save(path)
  return str(path)

# ---- several pictures for one question ----
@pytest.mark.parametrize("kind", KINDS)
def test_golden_two_pictures(kind):
  m, expected, pair = model(kind), np.load(WEIGHTS / kind / "golden.npz"), list(golden.pixels(56))
  assert differ(golden.next_logits(m, pair, PROMPT), expected["both_logits"]) < TOLERANCE
  answer, = m.generate([pair], [PROMPT], max_tokens=golden.TOKENS)
  assert answer.tokens == expected["both_tokens"].tolist() and len(answer.tokens) == golden.TOKENS
  assert differ(golden.next_logits(m, pair[::-1], PROMPT), expected["both_logits"]) > 100 * TOLERANCE  # order matters
  assert differ(golden.next_logits(m, pair[0], PROMPT), expected["both_logits"]) > 100 * TOLERANCE


def test_rows_of_two_pictures_in_a_batch():
  m, (a, b) = model("tiny2"), golden.pixels(56)
  rows, prompts = [[a, b], (b, a), [a, a]], ["x", "what?", "x"]
  alone = [m.generate([row], [prompt], max_tokens=6)[0] for row, prompt in zip(rows, prompts)]
  assert m.generate(rows, prompts, max_tokens=6) == alone and len({tuple(r.tokens) for r in alone}) == 3
  for wrong in ([[a, b], a], [a, [a, b]], [[a], [a, b, b]], [[], []], [[], a]):
    with pytest.raises(vlm.Fault, match="equally many"):
      m.generate(wrong, ["x"] * 2, max_tokens=2)


def test_what_is_picture_and_what_is_prompt(capsys, monkeypatch):
  asked = []
  monkeypatch.setattr(vlm, "open_model", lambda args: None)
  monkeypatch.setattr(vlm, "ask", lambda model, args, images, prompt: asked.append((images, prompt)))
  monkeypatch.setattr(vlm.terminal, "loop", lambda question, images, open_image: asked.append((images, None)))
  for name in ("a.jpg", "b.jpg", "cat"):
    Image.new("RGB", (9, 9)).save(name, "JPEG")
  for words, pictures, prompt in (
      ("a.jpg", ["a.jpg"], None), ("a.jpg|what is it?", ["a.jpg"], "what is it?"),
      ("a.jpg|b.jpg", ["a.jpg", "b.jpg"], None), ("a.jpg|b.jpg|what?", ["a.jpg", "b.jpg"], "what?"),
      ("a.jpg|a.jpg|ocr", ["a.jpg"] * 2, "ocr"), ("a.jpg|cat", ["a.jpg", "cat"], None),
      ("a.jpg|is b.png there", ["a.jpg"], "is b.png there"), ("a.jpg|mr. x", ["a.jpg"], "mr. x"),
      ("a.jpg|v1.5", ["a.jpg"], "v1.5"), ("a.jpg|" + "long " * 9000, ["a.jpg"], "long " * 9000)):
    assert not vlm.main(words.split("|")) and asked.pop() == (pictures, prompt), words
  for words, message in (("none.jpg", "none.jpg: no such image"), ("none.jpg|what?", "none.jpg: no such"),
                         ("a.jpg|none.JPG", "none.JPG: no such image"), ("a.jpg|caption|en", "quotes"),
                         ("none.jpg|b.jpg|x", "none.jpg: no such"), ("a.jpg|b.jpg|none.png", "none.png")):
    assert vlm.main(words.split("|")) == 2 and message in capsys.readouterr().err and not asked


def test_two_pictures_on_the_command_line(capsys, monkeypatch):
  m, a, b = model("tiny1"), picture("a.png", 1), picture("b.png", 2)
  monkeypatch.setattr(vlm, "load", lambda *args, **options: m)
  right, single = (m.generate([row], ["what changed?"], max_tokens=8)[0].text for row in ([a, b], a))
  assert right != single
  assert vlm.main([a, b, "what changed?", "--max-tokens", "8"]) == 0
  assert capsys.readouterr().out == right + "\n"
  monkeypatch.setattr(sys, "stdin", io.StringIO(f"what changed?\n:image {a}\nwhat changed?\n"))
  assert vlm.main([a, b, "--max-tokens", "8"]) == 0  # asks
  assert capsys.readouterr().out == right + "\n" + single + "\n"
  for argv, words in (([a, b, "x", "--out", "b.png"], "input"), ([a, "c.png", "x"], "c.png"),
                      ([a, "c.png"], "c.png")):
    assert vlm.main(argv) == 2 and words in capsys.readouterr().err

# ---- the loop ----
def test_answer_all(echo):
  a, b = Image.new("RGB", (3, 4)), Image.new("RGB", (5, 6))
  questions = [(a, "0"), ([b], "1"), ((b,), "2"), ([a, b], "3"), ([b, a], "4"), (a, "5"), (b, "6"), (a, "7"),
               (a, "8")]
  answers = batch.answer_all(echo, iter(questions), 3, max_tokens=7)
  assert next(answers).text == "0 [(3, 4)]" and echo.sizes == [3]  # no more than that is answered yet
  assert echo.options == {"max_tokens": 7}
  assert [answer.text for answer in answers] == [
    "1 [(5, 6)]", "2 [(5, 6)]", "3 [(3, 4), (5, 6)]", "4 [(5, 6), (3, 4)]", "5 [(3, 4)]", "6 [(5, 6)]",
    "7 [(3, 4)]", "8 [(3, 4)]"]
  assert echo.sizes == [3, 3, 3, 3]  # always as many, that one program serves all
  assert list(batch.answer_all(echo, [], 3)) == [] and len(echo.sizes) == 4
  def fail(prompt):
    if prompt == "4":
      raise vlm.Fault("the prompt does not fit")
  echo.fail, answers = fail, batch.answer_all(echo, questions, 3)
  assert [next(answers).text[0] for _ in range(4)] == ["0", "1", "2", "3"]
  with pytest.raises(vlm.Fault, match="does not fit"):
    next(answers)


def test_answer_all_answers_as_the_model_does():
  m, pictures = model("tiny1"), golden.pixels(56, 5)
  questions = [(pixels, f"caption {'x' * i}") for i, pixels in enumerate(pictures)]
  answers = list(batch.answer_all(m, questions, 2, max_tokens=6))
  assert answers == [m.generate([pixels], [prompt], max_tokens=6)[0] for pixels, prompt in questions]

# ---- lists ----
def write_list(*rows, name="list.jsonl"):
  lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
  Path(name).write_bytes(b"".join(line + b"\n" for line in lines))


def read(name="answers.jsonl"):
  data = Path(name).read_bytes()
  assert data.endswith(b"\n") or not data
  return [json.loads(line) for line in data.splitlines()]


def do(*argv, out="answers.jsonl", quiet=True):
  return batch.main(["list.jsonl", "--out", out, "--max-tokens", "6", *["--quiet"] * quiet, *map(str, argv)])


class Echo:
  """A model that answers with what it was asked, and counts."""
  config, folder, device = vlm.read_config(WEIGHTS / "tiny1" / "config.json"), ".", "CPU"
  def __init__(self):
    self.sizes, self.fail = [], lambda prompt: None
  def generate(self, images, prompts, **options):
    assert len({len(row) for row in images}) == 1 and len(images) == len(prompts)
    for prompt in prompts:
      self.fail(prompt)
    self.sizes.append(len(prompts))
    self.options = options
    texts = [f"{prompt} {[image.size for image in row]}" for row, prompt in zip(images, prompts)]
    boxes = [vlm.parse_boxes(prompt, *row[0].size) for row, prompt in zip(images, prompts)]
    return [vlm.Answer(text, [1], found) for text, found in zip(texts, boxes)]


@pytest.fixture
def echo(monkeypatch):
  m = Echo()
  monkeypatch.setattr(vlm, "load", lambda *args, **options: m)
  monkeypatch.setattr(vlm.terminal, "default_weights", lambda root: WEIGHTS / "tiny1")
  return m


def test_batches_answer_as_single_questions_do(monkeypatch, capsys):
  m = model("tiny1")
  monkeypatch.setattr(vlm, "load", lambda *args, **options: m)
  Path("pictures").mkdir()
  for i in range(5):
    picture(f"pictures/{i}.png", i)
  rows = [{"image": f"{i}.png", "prompt": f"caption {'x' * i}"} for i in range(4)]
  rows += [{"image": ["1.png", "2.png"], "prompt": "what?"}, {"image": ["3.png", "4.png"], "prompt": "and?"},
           {"image": "4.png", "prompt": "caption"}]
  write_list(*rows, name="pictures/list.jsonl")
  argv = ["pictures/list.jsonl", "--out", "a.jsonl", "--batch-size", "3", "--max-tokens", "6"]
  assert batch.main([*argv, "--weights", str(WEIGHTS / "tiny1")]) == 0
  out, err = capsys.readouterr()
  assert out == "" and "tiny1 answers" in err
  assert re.search(r"7 rows: a\.jsonl; 9 pictures in .* s, .* pictures/s\n$", err)
  got = read("a.jsonl")
  assert [list(row) for row in got] == [["row", "image", "prompt", "text", "boxes"]] * 7
  for i, (row, asked) in enumerate(zip(got, rows), 1):
    names = asked["image"] if isinstance(asked["image"], list) else [asked["image"]]
    right, = m.generate([["pictures/" + name for name in names]], [asked["prompt"]], max_tokens=6)
    assert row == asked | {"row": i, "text": right.text, "boxes": []}


def test_batches_are_full_and_boxes_are_there(echo):
  picture("a.png", 1, (100, 50))
  box = "<loc0000><loc0000><loc1023><loc0512> dog"
  write_list(*[{"image": "a.png", "prompt": f"{box} {i}"} for i in range(3)],
             {"image": "none.png", "prompt": "x"}, *[{"image": "a.png", "prompt": "x"}] * 4,
             {"image": ["a.png"] * 2, "prompt": "y"})
  assert do("--batch-size", 4) == 0
  assert echo.sizes == [4, 3, 1]  # a bad row takes no place
  rows = read()
  assert [row["row"] for row in rows] == list(range(1, 10)) and "error" in rows[3]
  assert rows[1]["boxes"] == [{"label": "dog 1 [(56, 56)]", "box": [0.0, 0.0, pytest.approx(50, abs=.1), 50.0]}]


def test_bad_rows_are_reported_and_skipped(echo, capsys):
  picture("a.png", 1)
  Path("text.png").write_text("not a picture")
  def fail(prompt):
    if prompt == "too long":
      raise vlm.Fault("the prompt does not fit")
  echo.fail = fail
  good = {"image": "a.png", "prompt": "x"}
  bad = [{"image": image, "prompt": "x"} for image in (
    "none.png", "text.png", [], ["a.png", 3], "", "a\0", "x" * 9000, ["a.png", "none.png"], ".", "n\nn")]
  bad += [b"{", b"3", b"\xff\xfe", b"[" * 100000, b'{"image": "a.png", "prompt": "\\ud800"}',
          {"image": "a.png"}, {"prompt": "x"}, {"image": "a.png", "prompt": 3},
          {"image": "a.png", "prompt": "too long"}]
  rows = [row for pair in zip([good] * len(bad), bad) for row in pair]
  write_list(*rows[:4], b"", b"  ", *rows[4:], good)  # lines 5 and 6 are blank
  assert do("--batch-size", 5) == 0
  got, lines = read(), [*range(1, 5), *range(7, len(rows) + 4)]
  assert [row["row"] for row in got] == lines
  assert ["error" in row for row in got] == [False, True] * len(bad) + [False]
  assert got[1] == {"row": 2, **bad[0], "error": got[1]["error"]} and "none.png" in got[1]["error"]
  err = capsys.readouterr().err.splitlines()
  assert [int(re.match(r"batch: list.jsonl row (\d+): .", line)[1]) for line in err] == lines[1::2]
  before, asked = Path("answers.jsonl").read_bytes(), len(echo.sizes)
  assert do() == 0 and Path("answers.jsonl").read_bytes() == before and len(echo.sizes) == asked


def test_heic(echo, capsys, monkeypatch):
  """by the package that vlm.py takes, too; without it the row says how to get that"""
  Image.new("RGB", (8, 8)).save("a.heic", "PNG")
  write_list({"image": "a.heic", "prompt": "caption en"})
  registered = []
  installed = SimpleNamespace(register_heif_opener=lambda: registered.append(1))
  monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
  assert do() == 1 and "pip install pillow-heif" in read()[0]["error"]
  Path("answers.jsonl").unlink()
  monkeypatch.setitem(sys.modules, "pillow_heif", installed)
  assert do() == 0 and "error" not in read()[0] and registered == [1]


def test_nothing_but_bad_rows_is_no_success(echo, capsys):
  picture("a.png", 1)
  write_list({"image": "none.png", "prompt": "x"}, b"nonsense")
  assert do() == 1 and ["error" in row for row in read()] == [True, True]
  assert capsys.readouterr().err.count("\n") == 2
  assert do(quiet=False) == 1 and "all 2 rows" in capsys.readouterr().err  # nor is it when asked again
  with open("list.jsonl", "a") as file:
    file.write('{"image": "a.png", "prompt": "\\"error\\""}\n')
  assert do() == 0 and do() == 0 and [row["row"] for row in read()] == [1, 2, 3]


def test_masks_are_there(echo, capsys, monkeypatch):
  picture("a.png", 1, (100, 50))
  monkeypatch.setattr(echo, "folder", WEIGHTS / "toy")
  monkeypatch.setattr(echo, "device", vlm.open_device("CPU"))
  box = "<loc0000><loc0000><loc1023><loc0512>" + "".join(f"<seg{i:03d}>" for i in range(16)) + " dog"
  write_list({"image": "a.png", "prompt": f"{box} ; <loc0000><loc0000><loc1023><loc0512> cat"})
  assert do() == 0 and capsys.readouterr().err == ""
  dog, cat = read()[0]["boxes"]
  drawn = vlm.beside("draw")
  mask = drawn.Masks(WEIGHTS / "toy", vlm.open_device("CPU"))(vlm.parse_boxes(box, 100, 50)[0], 100, 50)
  read_back = np.array(Image.open(io.BytesIO(base64.b64decode(dog["mask"]))))
  assert np.array_equal(read_back, mask) and mask.shape == (50, 100)
  assert list(cat) == ["label", "box"] and cat["label"] == "cat [(56, 56)]"


def test_without_a_decoder_masks_are_left_out(echo, capsys):
  picture("a.png", 1, (100, 50))
  box = "<loc0000><loc0000><loc1023><loc0512>" + "<seg000>" * 16 + " dog"
  write_list(*[{"image": "a.png", "prompt": box}] * 5)
  assert do("--batch-size", 2, quiet=False) == 0
  assert capsys.readouterr().err.count("no vae-oid.npz") == 1  # once is enough
  assert [list(row["boxes"][0]) for row in read()] == [["label", "box"]] * 5
  Path("answers.jsonl").unlink()
  assert do() == 0 and capsys.readouterr().err == ""
  Path("answers.jsonl").unlink()
  Path("vae-oid.npz").write_bytes(b"nonsense")
  assert do() == 2 and re.fullmatch(r"batch: .*vae-oid\.npz.*\n", capsys.readouterr().err) and read() == []


def test_a_fault_of_the_model_is_no_row_s(echo, capsys):
  picture("a.png", 1)
  write_list(*[{"image": "a.png", "prompt": str(i)} for i in range(6)])
  def fail(prompt):
    if prompt == "4":
      raise vlm.Fault("the logits are NaN", code=1)
  echo.fail = fail
  assert do("--batch-size", 2) == 1 and "NaN" in capsys.readouterr().err
  assert [row["row"] for row in read()] == [1, 2, 3, 4]
  echo.fail = lambda prompt: None
  assert do("--batch-size", 2) == 0 and [row["row"] for row in read()] == [1, 2, 3, 4, 5, 6]


def test_goes_on_after_every_possible_cut(echo, capsys):
  picture("a.png", 1)
  write_list({"image": "a.png", "prompt": "ä\n"}, b"nonsense", {"image": "none.png", "prompt": "x"},
             {"image": ["a.png", "a.png"], "prompt": "y"})
  assert do(quiet=False) == 0
  assert "4 rows, 2 of them bad: answers.jsonl" in capsys.readouterr().err
  whole = Path("answers.jsonl").read_bytes()
  for end in range(len(whole) + 1):
    Path("answers.jsonl").write_bytes(whole[:end])
    echo.sizes.clear()
    assert do() == 0 and Path("answers.jsonl").read_bytes() == whole, end
    done = whole[:end].count(b"\n")
    assert sum(echo.sizes) == [2, 1, 1, 1, 0][done]  # nothing that was finished is done again
  Path("answers.jsonl").write_bytes(whole[:len(whole) - 5])
  capsys.readouterr()
  assert do(quiet=False) == 0 and "4 rows, 3 of them before: answers.jsonl" in capsys.readouterr().err
  with open("list.jsonl", "a") as file:  # a list may grow
    file.write('{"image": "a.png", "prompt": "more"}')
  assert do() == 0 and Path("answers.jsonl").read_bytes().startswith(whole) and len(read()) == 5


def test_files_that_are_something_else_are_left_alone(echo, capsys):
  a = picture("a.png", 1)
  write_list({"image": "a.png", "prompt": "x"}, {"image": "a.png", "prompt": "y"})
  assert do() == 0
  whole = Path("answers.jsonl").read_bytes()
  others = [b"mine", b"mine\n", b'{"row": 2', b'{"row": 1, "image": "b.png"', b"\n", b"\n\n", whole + b"more",
            whole + whole, whole + b"\n", whole.replace(b'"y"', b'"z"'),
            whole.replace(b'"a.png"', b'"b.png"'), whole.replace(b'"row": 1', b'"row": 3'),
            whole.splitlines(True)[1], whole.replace(b'"text"', b'"word"')]
  for data in others:
    Path("answers.jsonl").write_bytes(data)
    assert do() == 2, data
    err = capsys.readouterr().err
    assert re.fullmatch(r"batch: .*answers\.jsonl.*\n", err) and Path("answers.jsonl").read_bytes() == data
  before = Path("list.jsonl").read_bytes(), Path(a).read_bytes()
  os.link("a.png", "hard.png")
  for out in ("list.jsonl", "./list.jsonl", "a.png", "hard.png"):
    assert do(out=out) == 2 and "choose another" in capsys.readouterr().err
  assert (Path("list.jsonl").read_bytes(), Path(a).read_bytes()) == before
  for out in (".", "no/answers.jsonl"):
    assert do(out=out) == 2 and re.fullmatch(r"batch: .*--out.*\n", capsys.readouterr().err)


def test_one_run_at_a_time(echo, capsys):
  fcntl = pytest.importorskip("fcntl")
  picture("a.png", 1)
  write_list({"image": "a.png", "prompt": "x"})
  with open("answers.jsonl", "ab") as other:
    fcntl.flock(other, fcntl.LOCK_EX)
    assert do() == 2 and "another run" in capsys.readouterr().err
  assert do() == 0 and len(read()) == 1


def test_a_full_disk_leaves_whole_rows(echo, capsys, monkeypatch):
  picture("a.png", 1)
  write_list(*[{"image": "a.png", "prompt": str(i)} for i in range(4)])
  resource = pytest.importorskip("resource")
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))  # two rows and a half
  try:
    code = do()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert code == 1 and re.fullmatch(r"batch: answers\.jsonl: .*\n", capsys.readouterr().err)
  some = read()
  assert 0 < len(some) < 4
  assert do() == 0 and read()[:len(some)] == some and len(read()) == 4


def test_mistakes_on_the_command_line(echo, capsys):
  picture("a.png", 1)
  write_list({"image": "a.png", "prompt": "x"})
  Path("empty.jsonl").write_text("\n \n")
  for argv, words in (
      ("list.jsonl", "--out"), ("none.jsonl --out o", "none.jsonl"), ("--out o", "SOURCE"),
      ("empty.jsonl --out o", "empty"), (". --out o", "--prompt"), ("list.jsonl a.png --out o", "SOURCE"),
      ("list.jsonl --prompt x --out o", "leave out"), ("a.png --out o", "--prompt"),
      (". --prompt ocr --glob *.jpg --out o", "no pictures called"), ("a.png --glob *.png --prompt ocr --out o", "--glob"),
      ("none.tar --prompt ocr --out o", "none.tar"), ("none.png --prompt ocr --part 2/1 --out o", "--part"),
      ("list.jsonl --part 0/1 --out o", "--part"), ("list.jsonl --part x --out o", "--part"),
      ("list.jsonl --out o --json", "--json"), ("list.jsonl --out o --layer 3", "--layer"),
      ("list.jsonl --out o --batch-size 0", "--batch-size"), ("list.jsonl --out o --batch 3", "--batch"),
      ("list.jsonl --out o --batch-size x", "--batch-size"), ("list.jsonl --out o --seed 3", "--seed"),
      ("list.jsonl --out o --max-tokens 0", "--max-tokens")):
    assert batch.main(argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"batch: .*\n", err) and words in err, err
    assert not Path("o").exists()
  assert batch.main(["list.jsonl", "--out", ""]) == 2 and "--out" in capsys.readouterr().err
  assert vlm.main(["--batch", "list.jsonl", "--out", "o"]) == 2
  assert re.fullmatch(r"vlm: .*python examples/batch\.py.*\n", capsys.readouterr().err)


def test_weights_that_do_not_load_leave_no_file(capsys):
  picture("a.png", 1)
  write_list({"image": "a.png", "prompt": "x"})
  assert do("--weights", "nothing") == 2 and "nothing" in capsys.readouterr().err
  assert not Path("answers.jsonl").exists()
  Path("empty").mkdir()
  assert do("--weights", "empty") == 2 and "config.json" in capsys.readouterr().err
  assert not Path("answers.jsonl").exists()


def test_progress_on_a_terminal_only(echo, capsys, monkeypatch):
  picture("a.png", 1)
  write_list(*[{"image": "a.png", "prompt": str(i)} for i in range(4)])
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  with monkeypatch.context() as patch:
    patch.setattr(sys, "stderr", terminal)
    assert do("--batch-size", 1, quiet=False) == 0
  shown = terminal.getvalue()
  assert "[#####               ] 1/4 " in shown and "[" + "#" * 20 + "] 4/4 " in shown
  assert "pictures/s" in shown
  Path("answers.jsonl").unlink()
  assert do(quiet=False) == 0 and "[#" not in capsys.readouterr().err

# ---- folders, tars, pictures; parts; tables ----
@pytest.fixture
def pictures():
  """4 pictures in a folder and one below it, beside something else, and all in a .tar, too"""
  Path("photos/more").mkdir(parents=True)
  names = ["photos/b.png", "photos/a.JPG", "photos/more/c.png", "photos/d.png", "photos/e.txt"]
  for i, name in enumerate(names):
    Image.new("RGB", (20 + i, 30)).save(name, "PNG")
  with tarfile.open("photos.tar", "w") as tar:
    for name in sorted(names):
      tar.add(name)
  return names


def ask_all(*argv, out="answers.jsonl"):
  code = batch.main([*map(str, argv), "--out", out, "--quiet"])
  return code, read() if out == "answers.jsonl" else None


def test_every_kind_of_source(echo, pictures, capsys):
  names = ["a.JPG", "b.png", "d.png", "more/c.png"]
  for argv, found in ((["photos"], names), (["photos.tar"], [f"photos/{name}" for name in names]),
                      (pictures[:2], pictures[:2]), (["photos/d.png"], ["photos/d.png"]),
                      (["photos", "--glob", "*.png"], names[1:])):
    code, rows = ask_all(*argv, "--prompt", "caption en", "--prompt", "detect a; b")
    assert code == 0 and [row["row"] for row in rows] == list(range(1, 2 * len(found) + 1))
    assert [row["image"] for row in rows] == [name for name in found for _ in range(2)]
    assert [row["prompt"] for row in rows] == ["caption en", "detect a ; b"] * len(found)
    assert all("text" in row for row in rows)
    Path("answers.jsonl").unlink()
  Path("photos/b.png").write_bytes(b"nothing")
  with tarfile.open("bad.tar", "w") as tar:
    tar.add("photos/b.png")
    tar.add("photos/d.png")
  capsys.readouterr()
  code, rows = ask_all("bad.tar", "--prompt", "x")
  assert code == 0 and "error" in rows[0] and "text" in rows[1]
  err = capsys.readouterr().err
  assert "bad.tar row 1: photos/b.png: not an image" in err and "0x" not in err


def test_members_of_a_tar(echo, capsys):
  """by their places: names begin with ./, occur twice, and are links"""
  for i in range(2):
    picture(f"{i}.png", 1, (20 + i, 30))
  with tarfile.open("odd.tar", "w") as tar:
    for name in ("0.png", "1.png"):
      tar.add(name, "./same.png")
    for name, target in (("link.png", "./same.png"), ("nowhere.png", "none.png")):
      link = tarfile.TarInfo(name)
      link.type, link.linkname = tarfile.LNKTYPE, target
      tar.addfile(link)
  sizes, resize = [], Image.Image.resize
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Image.Image, "resize", lambda self, *args: (sizes.append(self.size), resize(self, *args))[1])
    code, rows = ask_all("odd.tar", "--prompt", "x")
  assert code == 0 and [row["image"] for row in rows] == ["same.png", "same.png", "link.png", "nowhere.png"]
  assert sizes == [(20, 30), (21, 30), (21, 30)]
  assert "text" in rows[2] and rows[3]["error"] == "nowhere.png: a link to what the .tar does not hold"


def test_a_pattern_that_is_none(echo, pictures, capsys):
  assert ask_all("photos", "--prompt", "x", "--glob", "/x/*.png", out="o.jsonl")[0] == 2
  assert "--glob /x/*.png" in capsys.readouterr().err


def test_an_empty_share(echo, pictures):
  assert ask_all("photos", "--prompt", "x", "--part", "1/9") == (0, []), "its command has done all it was to do"


def test_parts_are_the_whole(echo, pictures):
  argv = ["photos", "--prompt", "x", "--prompt", "y"]
  ask_all(*argv)
  whole, parts = Path("answers.jsonl").read_bytes(), b""
  for i in (1, 2, 3):
    assert ask_all(*argv, "--part", f"{i}/3", out=f"{i}.jsonl")[0] == 0
    part = Path(f"{i}.jsonl").read_bytes()
    assert 2 <= part.count(b"\n") <= 3
    parts += part
  assert parts == whole
  assert ask_all(*argv, "--part", "2/3", out="1.jsonl")[0] == 2  # holds another part's


def test_tables(echo, pictures, capsys, monkeypatch):
  box = "<loc0000><loc0000><loc1023><loc0512> dog"
  picture("a.png", 1, (100, 50))
  write_list({"image": "a.png", "prompt": box}, {"image": ["a.png", "a.png"], "prompt": 'a "b", c\nd'},
             {"image": "none.png", "prompt": "x"})
  assert ask_all("list.jsonl", out="t.csv")[0] == 0
  with open("t.csv", newline="") as file:
    one, two, three = csv.DictReader(file)
  assert one["text"].startswith(box) and json.loads(one["boxes"])[0]["box"] == [0, 0, pytest.approx(50, abs=.1), 50]
  assert two["prompt"] == 'a "b", c\nd' and json.loads(two["image"]) == ["a.png", "a.png"] and not two["error"]
  assert "none.png" in three["error"] and three["text"] == "" and three["row"] == "3"
  table, asked = Path("t.csv").read_bytes(), len(echo.sizes)
  Path("t.csv").unlink()
  assert ask_all("list.jsonl", out="t.csv")[0] == 0 and Path("t.csv").read_bytes() == table
  assert len(echo.sizes) == asked  # of the lines that are there
  Path("t.csv.jsonl").unlink()
  capsys.readouterr()
  assert ask_all("list.jsonl", out="t.csv")[0] == 2 and "another name" in capsys.readouterr().err
  assert Path("t.csv").read_bytes() == table
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  assert ask_all("list.jsonl", out="t.parquet")[0] == 2 and "pip install pyarrow" in capsys.readouterr().err
  assert not list(Path().glob("t.parquet*"))


def test_tables_of_what_is_no_text(echo):
  """numbers and lists in place of texts, and a name that is no UTF-8"""
  name = os.fsdecode(b"caf\xe9.png")
  picture(name, 1)
  write_list({"image": 3, "prompt": "x"}, {"image": name, "prompt": "x"}, {"image": name, "prompt": 7})
  assert ask_all("list.jsonl", out="t.csv")[0] == 0
  with open("t.csv", newline="", encoding="utf-8") as file:
    one, two, three = csv.DictReader(file)
  assert one["image"] == "3" and one["error"] and two["image"] == r"caf\udce9.png" and two["text"]
  assert three["prompt"] == "7" and three["error"]
  assert all(isinstance(value, str) for row in batch.table_rows(Path("t.csv.jsonl").read_bytes().splitlines())
             for name, value in row.items() if name != "row")


def test_live_parquet(echo):
  if os.environ.get("VLM_LIVE"):  # CI, which must not skip
    import pyarrow  # noqa: F401
  parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: see .ci/run")
  picture("a.png", 1)
  write_list({"image": "a.png", "prompt": "x"}, {"image": "none.png", "prompt": "x"}, {"image": 3, "prompt": 7})
  assert ask_all("list.jsonl", out="t.parquet")[0] == 0
  one, two, _ = parquet.read_table("t.parquet").to_pylist()
  assert one["row"] == 1 and one["text"].startswith("x") and one["error"] is None and "none.png" in two["error"]


@pytest.mark.parametrize("trouble", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_what_does_not_fit_into_memory_is_halved(trouble, echo, capsys):
  picture("a.png", 1)
  write_list(*[{"image": "a.png", "prompt": str(i)} for i in range(11)])
  generate = echo.generate
  def small(images, prompts, **options):
    if len(prompts) > 3:
      raise trouble
    return generate(images, prompts, **options)
  echo.generate = small
  assert do("--batch-size", 8, quiet=False) == 0 and echo.sizes == [2] * 4 + [2, 1]
  assert [row["text"][:2].strip() for row in read()] == [str(i) for i in range(11)]
  assert capsys.readouterr().err.count("fit into memory") == 2
  Path("answers.jsonl").unlink()
  echo.generate = lambda *inputs, **options: 1 // 0 if len(inputs[0]) > 1 else small([0] * 4, [0] * 4)
  assert do("--batch-size", 1) == 1 and "smaller model" in capsys.readouterr().err


def test_the_size_of_a_batch_is_what_fits(monkeypatch):
  m, sizes = model("tiny1"), []
  for free in (40_000, 8_000_000, 4_000_000_000, None):
    monkeypatch.setattr(vlm.kernels, "free_memory", lambda: free)
    sizes.append(batch.fitting(m, 256))
  assert sizes[0] == 1 < sizes[1] < sizes[2] == sizes[3] == 16


def test_pictures_are_opened_ahead():
  opened, used = [], []
  def look(i):
    opened.append(i)
    return i
  for i in batch.ahead(look, range(9), 3):
    used.append(i)
    assert len(opened) <= i + 4  # not all at once
  assert used == list(range(9))
  def fail(i):
    raise ValueError(i)
  with pytest.raises(ValueError):
    next(batch.ahead(fail, range(9), 3))
  waits = batch.ahead(lambda i: time.sleep(.01) or i, range(10 ** 9), 3)
  assert next(waits) == 0
  waits.close()  # who asks for no more is not waited for


def test_several_prompts_cost_one_vision(monkeypatch, pictures):
  m, seen = model("tiny1"), []
  monkeypatch.setattr(vlm, "load", lambda *args, **options: m)
  run = vlm.VLM._run
  monkeypatch.setattr(vlm.VLM, "_run", lambda self, key, *rest: (seen.append(key[0]), run(self, key, *rest))[1])
  m.features.clear()
  code, rows = ask_all("photos/b.png", "--prompt", "x", "--prompt", "y", "--max-tokens", 3, "--batch-size", 1,
                       "--weights", WEIGHTS / "tiny1")
  assert code == 0 and seen.count("vision") == 1 and seen.count("prefill") == 2

COMMAND = [sys.executable, ROOT / "examples/batch.py", "list.jsonl", "--weights", WEIGHTS / "tiny1",
           "--batch-size", "2", "--max-tokens", "12"]


def wait_for(lines, run):
  answers = Path("answers.jsonl")
  while run.poll() is None and not (answers.exists() and answers.read_bytes().count(b"\n") >= lines):
    time.sleep(0.005)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_in_the_middle(tmp_path):
  """three times, at moments that are not chosen; the end is a file as if nobody had, byte for byte"""
  picture("a.png", 1)
  rows = [{"image": "a.png", "prompt": f"caption {'x' * (i % 3)}"} for i in range(120)]
  write_list(*rows[:60], b"no row", *rows[60:])
  command = [*COMMAND, "--out"]
  subprocess.run([*command, "whole.jsonl"], check=True, capture_output=True)
  whole, kept = Path("whole.jsonl").read_bytes(), b""
  assert whole.count(b"\n") == 121
  for lines in (3, 20, 50):
    quietly = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with subprocess.Popen([*command, "answers.jsonl"], **quietly) as run:
      wait_for(lines, run)
      run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL, "it was done before it could be killed"
    data = Path("answers.jsonl").read_bytes()
    assert whole.startswith(data) and data.endswith(b"\n") and data.startswith(kept)
    assert lines <= data.count(b"\n") < 121
    kept = data
  done = subprocess.run([*command, "answers.jsonl"], capture_output=True, text=True)
  assert done.returncode == 0 and Path("answers.jsonl").read_bytes() == whole
  assert f"121 rows, {kept.count(bytes([10]))} of them before" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c():
  picture("a.png", 1)
  write_list(*[{"image": "a.png", "prompt": "caption en"}] * 3000)
  with subprocess.Popen([*COMMAND, "--out", "answers.jsonl"], stderr=subprocess.PIPE, text=True) as run:
    wait_for(1, run)
    run.send_signal(signal.SIGINT)
    err = run.communicate(timeout=60)[1]
  assert run.returncode == 130 and "Traceback" not in err
  assert f"stopped: {len(read())} rows: answers.jsonl" in err

# ---- live ----
@pytest.mark.parametrize("gemma2", [False, True])
def test_live_two_pictures(gemma2, live_seed, tmp_path, monkeypatch):
  """and three; as transformers answers for all of them in one prompt"""
  monkeypatch.setattr(vlm.kernels, "PORTABLE", True)
  rng = np.random.default_rng([live_seed, gemma2])
  config = golden.random_config(rng, gemma2)
  note = f"VLM_SEED={live_seed} {config}"
  golden.make(tmp_path / "w", config, live_seed)
  theirs, m = golden.load(tmp_path / "w"), vlm.load(tmp_path / "w")
  for each in (2, 3):
    images = golden.pixels(m.config.vision.image_size, 2 * each, live_seed)
    rows, prompt = [list(images[:each]), list(images[each:])], "".join(rng.choice(list("abcdefg ;"), 12))
    right = golden.reference(theirs, images, m.tokenizer.prompt(prompt), each=each)
    for i, answer in enumerate(m.generate(rows, [prompt] * 2, max_tokens=golden.TOKENS)):
      assert differ(golden.next_logits(m, rows[i], prompt), right["logits"][i]) < TOLERANCE, note
      whole = right["tokens"][i].tolist()
      assert answer.tokens == whole[:whole.index(1) if 1 in whole else None], note
