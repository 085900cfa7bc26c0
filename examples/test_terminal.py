"""Tests of examples/terminal.py: what a person at a terminal meets, typed and said. Most with no model."""
import contextlib
import io
import logging
import os
import re
import select
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # vlm.py, wherever this is started from
import vlm

terminal = vlm.terminal
PICTURE, TOY = ROOT / "examples" / "shapes.png", ["--weights", "toy"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


@pytest.fixture
def log(monkeypatch):
  """vlm's logger with a handler of its own, all levels"""
  handler = terminal.StreamHandler()
  monkeypatch.setattr(vlm.log, "handlers", [handler])
  monkeypatch.setattr(vlm.log, "propagate", False)
  level = vlm.log.level
  vlm.log.setLevel(logging.DEBUG)
  yield vlm.log
  handler.end()
  vlm.log.setLevel(level)


def screen_of(monkeypatch):
  """stderr, a terminal -> what was written; stdout is none. No fixture: after those pytest sets stderr anew."""
  found = io.StringIO()
  found.isatty = lambda: True
  monkeypatch.setattr(sys, "stderr", found)
  return found


def vlm_py(*words, **options):
  command = [sys.executable, ROOT / "vlm.py", *map(str, words)]
  return subprocess.run(command, capture_output=True, **{"text": True, "timeout": 300} | options)


# ---- stages ----
def question(log):
  """what vlm.py logs while it answers"""
  log.debug("loading somewhere")
  log.info("somewhere answers")
  log.debug("vision, compiling, the first time only")
  log.debug("prefill, compiling, the first time only")
  log.debug("")
  log.info("load 1 s")


def test_stages_where_lines_stay(log, capsys):
  question(log)
  expected = (r"loading somewhere \.\.\. 0\.\d s\nsomewhere answers\n"
              r"looking, compiling, the first time only \.\.\. 0\.\d s\n"
              r"reading, compiling, the first time only \.\.\. 0\.\d s\nanswering\nload 1 s\n")
  out, err = capsys.readouterr()
  assert out == "" and re.fullmatch(expected, err), err
  question(log)  # what was said once is not said again: a list of questions would fill the screen
  assert capsys.readouterr().err == "somewhere answers\nload 1 s\n"


def test_seconds_count_on_a_terminal(log, monkeypatch):
  screen = screen_of(monkeypatch)
  log.debug("prefill")
  time.sleep(1.3)
  log.debug("")
  shown = screen.getvalue()
  assert "reading" in shown and "\r\033[Kreading  1 s" in shown and shown.endswith("\r\033[Kanswering")
  log.info("done")
  time.sleep(1.2)  # nothing counts any more
  assert screen.getvalue().endswith("answering\r\033[Kdone\n")
  vlm.log.handlers[0].end()  # as Ctrl-C ends a program: half an answer may be on that line
  assert screen.getvalue().endswith("done\n")


def test_nothing_is_shown_on_the_line_of_the_answer(log, monkeypatch):
  screen = screen_of(monkeypatch)
  monkeypatch.setattr(sys, "stdout", screen)
  log.debug("prefill")
  log.debug("")
  time.sleep(1.2)
  assert screen.getvalue().endswith("reading\r\033[K")
  monkeypatch.setattr(sys, "argv", ["vlm.py", "--json"])  # the answer comes when it is whole
  log.debug("prefill")
  log.debug("")
  assert screen.getvalue().endswith("answering")


def test_a_bar_stays_while_its_parts_are_worked_on(log, monkeypatch):
  screen = screen_of(monkeypatch)
  terminal.bar(1, 3, "rows")
  before = screen.getvalue()
  for text in ("vision", "prefill", ""):
    log.debug(text)
  assert "1/3  rows" in before and screen.getvalue() == before
  terminal.bar(3, 3, "rows")
  log.debug("vision")
  assert screen.getvalue().endswith("looking")


def test_a_fault_has_a_line_of_its_own(log, capsys):
  log.debug("loading somewhere")
  log.critical("vlm: wrong")
  assert re.fullmatch(r"loading somewhere \.\.\. 0\.\d s\nvlm: wrong\n", capsys.readouterr().err)


def test_every_stage_of_a_question_is_said():
  done = vlm_py(PICTURE, "caption en", *TOY)
  lines = [re.sub(r"(, compiling, the first time only)? \.\.\. \d+\.\d s", "", line)
           for line in done.stderr.splitlines()]
  words = [line.split()[0] for line in lines[:1] + lines[2:]]
  assert words == ["loading", "looking", "reading", "answering", "load"]
  assert vlm_py(PICTURE, "caption en", *TOY, "--quiet").stderr == ""


# ---- prompts ----
@pytest.mark.parametrize("typed,asked", [
  ("detect a; b", "detect a ; b"), ("detect a;b ;c", "detect a ; b ; c"), ("detect a ; b", "detect a ; b"),
  ("detect red circle;", "detect red circle"), ("segment a;b", "segment a ; b"), ("detect  a", "detect  a"),
  ("caption en", "caption en"), ("answer en a; b?", "answer en a; b?"), ("ocr", "ocr")])
def test_lists_of_objects_are_parted_as_in_training(typed, asked, log, capsys):
  assert terminal.asked(typed) == asked
  assert capsys.readouterr().err == ("" if typed == asked else f"asked as in training: {asked}\n")


@pytest.mark.parametrize("typed", ["what is this", "Caption en", "detection a ; b", ""])
def test_a_prompt_without_a_task(typed, log, capsys):
  assert terminal.asked(typed) == typed
  err = capsys.readouterr().err
  assert err.count("\n") == 1 and "caption en" in err and "detect A ; B" in err and "as it is" in err


def model_that_says(monkeypatch, text):
  """vlm.main asks it -> the list of what it was asked"""
  m, asked = vlm.load(ROOT / "weights" / "tiny1"), []
  def tokens(images, prompts, **options):
    asked.extend(prompts)
    yield from ([id] for id in m.tokenizer.encode(text))
  monkeypatch.setattr(m, "tokens", tokens)
  m.timings |= {"vision_s": 0.0, "prefill_s": 0.0, "decode_tok_s": 1.0}
  monkeypatch.setattr(vlm, "load", lambda *args: m)
  return asked


def test_only_the_command_line_changes_a_prompt(monkeypatch, capsys):
  asked = model_that_says(monkeypatch, "")
  assert vlm.main([str(PICTURE), "detect a; b"]) == 0
  out, err = capsys.readouterr()
  assert out == "\n" and "(no answer)\n" in err and "detect a ; b" in err
  [*vlm.load("").stream(PICTURE, "detect a; b")]
  assert asked == ["detect a ; b", "detect a; b"]
  assert vlm.main([str(PICTURE), "caption en", "--quiet"]) == 0 and capsys.readouterr() == ("\n", "")


def test_boxes_are_said(monkeypatch, capsys):
  whole = "<loc0000><loc0000><loc1023><loc1023> all"
  model_that_says(monkeypatch, f"<loc0519><loc0488><loc0855><loc0735> red circle ; {whole}")
  assert vlm.main([str(PICTURE), "detect red circle ; all"]) == 0
  out, err = capsys.readouterr()
  assert "\nred circle  (214, 170) to (322, 281)\nall         (0, 0) to (448, 336)\n2 boxes drawn: " in err
  model_that_says(monkeypatch, whole)
  assert vlm.main([str(PICTURE), "detect all"]) == 0
  assert "\n1 box drawn: shapes.boxes.png\n" in capsys.readouterr().err


# ---- pictures ----
def fault(word, *argv, code=2):
  done = vlm_py(*argv, "--quiet", stdin=subprocess.DEVNULL)
  assert re.fullmatch(r"vlm: .*\n", done.stderr) and word in done.stderr, done.stderr
  assert done.returncode == code and done.stdout == ""


def test_what_stands_where_a_picture_should():
  fault('a picture is missing: vlm.py IMAGE "caption en"', "caption en")
  fault("a picture is missing", "what is on this picture?")
  fault("a picture is missing", "ocr")
  fault("no such image", "none.png")
  fault("no such image", "my photo.jpg")
  fault("no such image", "photo")
  fault("curl -LO https://example.org/a.jpg", "https://example.org/a.jpg", "caption en")
  fault("curl -LO https://example.org/a.jpg", "https://example.org/a.jpg")
  fault("examples/batch.py", *[PICTURE] * 200, "caption en", *TOY)


def test_heic(monkeypatch):
  Path("a.heic").touch()
  monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
  with pytest.raises(vlm.Fault, match="pip install pillow-heif"):
    terminal.check_picture("a.heic")
  registered = []
  installed = types.SimpleNamespace(register_heif_opener=lambda: registered.append(1))
  monkeypatch.setitem(sys.modules, "pillow_heif", installed)
  terminal.check_picture("a.HEIC" if os.path.exists("a.HEIC") else "a.heic")
  assert registered == [1]
  terminal.check_picture(PICTURE)
  assert registered == [1]


def test_a_picture_from_standard_input():
  right = vlm_py(PICTURE, "detect red circle", *TOY)
  done = vlm_py("-", "detect red circle", *TOY, input=PICTURE.read_bytes(), text=False)
  assert done.returncode == 0 and done.stdout.decode() == right.stdout and Path("stdin.boxes.png").exists()
  fault("a prompt comes after it", "-")
  fault("a prompt comes after it", PICTURE, "-")
  fault("one picture", "-", "-", "caption en")
  fault("stdin", "-", "caption en")  # nothing comes


# ---- the loop ----
def converse(monkeypatch, lines, question, image="a.png", opened=lambda name: None):
  monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
  return terminal.loop(question, [image], opened)


def test_commands_of_the_loop(log, monkeypatch, capsys, tmp_path):
  for name in ("a.png", "b.png", "my photo.png"):
    Path(name).touch()
  monkeypatch.setenv("HOME", str(tmp_path))
  asked, opened = [], []
  lines = (":help", "detect a; b", ":image ~/b.png", "ocr", ":image none.png", ":image 'my photo.png'",
           ":nonsense", "ocr", ":image my photo.png", "ocr", ":quit", "never")
  question = lambda *words: asked.append(words)
  assert converse(monkeypatch, "\n".join(lines), question, opened=opened.append) == 0
  assert asked == [(["a.png"], "detect a ; b"), ([str(tmp_path / "b.png")], "ocr"), (["my photo.png"], "ocr"),
                   (["my photo.png"], "ocr")]
  assert opened == [str(tmp_path / "b.png"), "my photo.png", "my photo.png"]
  out, err = capsys.readouterr()
  assert out == "" and "vlm: none.png: no such image\n" in err and "vlm: :nonsense: no such command" in err
  assert err.count("a.png> ") == 3 and err.count("b.png> ") == 3
  assert "answer en QUESTION" in err and ":quit" in err


def test_ctrl_c_ends_an_answer_and_the_end_of_the_input_the_loop(log, monkeypatch, capsys):
  def question(images, prompt):
    print("a c", end="")
    raise KeyboardInterrupt
  assert converse(monkeypatch, "ocr\nocr\n", question) == 0
  out, err = capsys.readouterr()
  assert out == "a c\na c\n" and err.count("a.png> ") == 3 and "stopped" in err


def test_pictures_of_a_conversation_have_numbers(monkeypatch, capsys):
  model_that_says(monkeypatch, "<loc0000><loc0000><loc1023><loc1023> all")
  Image.new("RGB", (200, 200)).save("b.png")
  lines = "detect all", ":image b.png", *["detect all"] * 3
  monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
  assert vlm.main([str(PICTURE)]) == 0
  drawn = ["b.boxes-2.png", "b.boxes-3.png", "b.boxes.png", "shapes.boxes.png"]
  assert sorted(os.listdir()) == sorted(["b.png", *drawn])
  assert re.findall("drawn: (.*)", capsys.readouterr().err) == [drawn[3], drawn[2], drawn[0], drawn[1]]
  monkeypatch.setattr(sys, "stdin", io.StringIO("detect all\ndetect all\n"))
  assert vlm.main([str(PICTURE), "--out", "x.jpg"]) == 0
  assert {"x.jpg", "x-2.jpg"} < set(os.listdir())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pty")
def test_lines_are_edited_and_remembered(tmp_path):
  """at a terminal: the arrow keys, Ctrl-C that drops a line, Ctrl-D that leaves"""
  pytest.importorskip("readline")
  import pty
  code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import vlm; vlm.log.handlers = []\n"
          "question = lambda images, prompt: print(f'[{prompt}]', flush=True)\n"
          "sys.exit(vlm.terminal.loop(question, ['a.png'], None))")
  place, inside = pty.openpty()
  with subprocess.Popen([sys.executable, "-c", code], stdin=inside, stdout=inside, stderr=inside,
                        start_new_session=True, preexec_fn=lambda: controlling(inside)) as run, \
       contextlib.ExitStack() as ends:
    ends.callback(run.kill)  # a failure would wait for it
    os.close(inside)
    shown = b""
    def until(text):
      nonlocal shown
      while text not in shown:
        assert select.select([place], [], [], 60)[0], f"{text} does not come after {shown}"
        shown += os.read(place, 4096)
      shown = shown[shown.index(text) + len(text):]
    for keys, answer in ((b"ocx\x7fr\r", b"[ocr]"), (b"\x1b[A en\r", b"[ocr en]"),
                         (b"ab\x1b[D\x1b[Dx\r", b"[xab]")):
      until(b"a.png> ")
      os.write(place, keys)
      until(answer)
    until(b"a.png> ")
    os.write(place, b"dropped")
    until(b"dropped")
    os.write(place, b"\x03")
    while not select.select([place], [], [], 5)[0]:
      os.write(place, b"\x03")  # Python's line editor misses one that comes between a key and its waiting for the next
    until(b"a.png> ")
    os.write(place, b"\x04")
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
      while select.select([place], [], [], 60)[0] and os.read(place, 4096):
        pass
    assert run.wait(60) == 0
  os.close(place)


def controlling(place):
  """makes the terminal the one whose Ctrl-C reaches this process"""
  import fcntl
  import termios
  fcntl.ioctl(place, termios.TIOCSCTTY, 0)


def test_what_a_new_model_answers_is_a_line_each(log, capsys):
  """whatever it says: after a step or two that is often nothing but ends of lines"""
  truths = ["a red circle", "a blue\nsquare", "a dog"] * 9
  said = {"a red circle": "a red circle", "a blue\nsquare": "\n\n", "a dog": "a\n\ncat"}
  asked = []
  def generate(pictures, questions, max_tokens):
    asked.append((len(questions), max_tokens))
    return [types.SimpleNamespace(text=said[picture]) for picture in pictures]
  model = types.SimpleNamespace(tokenizer=types.SimpleNamespace(encode=list), generate=generate, folder="mine")
  vlm.terminal.trained(model, [("shown", "?", "shown")] * 243 + [(truth, "?", truth) for truth in truths])
  assert asked == [(20, 14), (7, 14)]  # the longest has 13 tokens, and then an end
  said = capsys.readouterr().err
  lines = [line for line in said.splitlines() if line.startswith("  ")]
  assert lines[:3] == ["  a red circle: right", "  a blue square: nothing", "  a dog: a cat"]
  assert "9 of 27 pictures" in said


# ---- without the packages ----
@pytest.mark.parametrize("package", ["numpy", "PIL", "safetensors", "tinygrad", "sentencepiece"])
def test_without_a_package(package, tmp_path):
  """as a program one line; in somebody's own an ImportError, which says the same"""
  line = f"{package} is not installed; install the requirements: python -m pip install -r requirements.txt"
  without = f"import sys; sys.modules[{package!r}] = None"
  (tmp_path / "own.py").write_text(f"{without}; sys.path.insert(0, {str(ROOT)!r})\n"
                                   "try: import vlm\nexcept ImportError as e: print(e)\n")
  own = subprocess.run([sys.executable, "own.py"], cwd=tmp_path, capture_output=True, text=True)
  assert (own.stdout, own.stderr) == (line + "\n", "")
  (tmp_path / "sitecustomize.py").write_text(without)
  done = vlm_py(PICTURE, "caption en", env=os.environ | {"PYTHONPATH": str(tmp_path)})
  assert (done.returncode, done.stdout, done.stderr) == (1, "", f"vlm: {line}\n")
