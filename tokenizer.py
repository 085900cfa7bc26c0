"""Text to token ids and back, exactly as PaliGemma was trained: a SentencePiece model plus loc, seg and image tokens.

A SentencePiece file from the hub holds only Gemma's base pieces; the 1024 <loc>, 128 <seg> and the <image> token
follow them in the embedding table. big_vision's own file holds them as pieces. Both work: the file is asked first.
"""
import os
import signal
import sys

MAIN = sys.modules["__main__"]
ROOT = os.path.dirname(os.path.realpath(__file__))
PROGRAM = os.path.realpath(getattr(MAIN, "__file__", None) or "")
OURS = PROGRAM == os.path.join(ROOT, "vlm.py") or os.path.dirname(PROGRAM) == os.path.join(ROOT, "examples")


def leave(number, frame):
  """Ctrl-C. A program that is still importing, which takes a second, has no `main` yet; it just ends."""
  if not hasattr(MAIN, "main"):
    os._exit(130)
  signal.default_int_handler(number, frame)


if OURS and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
  signal.signal(signal.SIGINT, leave)

import atexit
import codecs
import errno
import functools
import importlib
import io
import numbers
import re
import shutil
import stat
import string
import tempfile
import threading
from dataclasses import dataclass, fields
from pathlib import Path

try:
  import sentencepiece
  if "vlm" in sys.modules or OURS:  # which begins with this file, so that this is said here
    for name in ("numpy", "PIL", "safetensors", "tinygrad"):
      importlib.import_module(name)
except ModuleNotFoundError as e:
  missing = f"{e.name} is not installed; install the requirements: python -m pip install -r requirements.txt"
  if OURS:  # started as a program: one line
    sys.exit(f"{Path(PROGRAM).stem}: {missing}")
  raise ModuleNotFoundError(missing, name=e.name) from None

LOC, SEG, CODES = 1024, 128, 16  # location and segmentation tokens of every PaliGemma, those of a mask
LOC_TOKEN, SEG_TOKEN = r"<loc(?:0\d{3}|10[01]\d|102[0-3])>", r"<seg(?:0\d\d|1[01]\d|12[0-7])>"
SPECIAL = re.compile(f"{LOC_TOKEN}|{SEG_TOKEN}")


class Fault(Exception):
  """Something is wrong with what the user gave: the message says what, and what to do. Programs print it and exit with
  `code`: 2 for bad input, 1 for work that cannot go on. It stands here because everything imports this file."""
  def __init__(self, message, code=2):
    super().__init__(message)
    self.code = code


def find_clang():
  """tinygrad compiles for a CPU with the program that CC names, or clang. Where there is neither, let it be the one in
  the package ziglang. Raises Fault."""
  if shutil.which(os.environ.get("CC", "clang")):
    return
  try:
    zig = Path(importlib.import_module("ziglang").__file__).with_name("zig")
  except ImportError:
    raise Fault("no C compiler, which tinygrad needs: `python -m pip install ziglang`, or install clang", 1) from None
  folder = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  wrapper = Path(folder) / "clang"
  wrapper.write_text(f"#!/bin/sh\nexec '{zig}' clang \"$@\"\n")
  wrapper.chmod(0o700)
  os.environ["CC"] = str(wrapper)


def regular(source):
  """-> the path of a file, or the file object, that is to be read. Raises OSError: a pipe would be waited for, a device
  may never end."""
  if isinstance(source, (str, os.PathLike)):
    mode = os.stat(source).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # to open a folder has a message of its own
      raise OSError(errno.EINVAL, "a pipe or a device, not a file")
  return source


def write_whole(path, data):
  """Bytes or text -> a file, whole or not at all, whenever this process ends. Raises OSError."""
  part = f"{path}.part"
  with open(part, "wb") as file:
    file.write(data.encode() if isinstance(data, str) else data)
  os.replace(part, path)


def check_text(text):
  """Raises Fault of what no tokenizer can encode."""
  if not isinstance(text, str):
    raise Fault(f"a prompt is a text, not {type(text).__name__}")
  if text != text.encode(errors="replace").decode():  # halves of characters, which a shell makes of other bytes
    raise Fault("the text is not UTF-8")


def check_numbers(options):
  """options: a dataclass of int and float fields; a field may be None if that is its default. Raises Fault."""
  for f in fields(options):
    value, kind = getattr(options, f.name), numbers.Real if f.type is float else numbers.Integral
    if not (isinstance(value, kind) and not isinstance(value, bool) or value is None and f.default is None):
      raise Fault(f"{f.name} is a number of type {f.type.__name__}, and not {value!r:.99}")


def as_path(folder):
  """-> the Path of a folder. Raises Fault of what is none."""
  if not isinstance(folder, (str, os.PathLike)):
    raise Fault(f"folder is a path, and not {folder!r:.99}")
  return Path(folder)


class Turns:
  """The right to use one model, whose programs and KV cache hold one question: a thread waits for another's, and an
  answer that is taken step by step ends with a Fault when another question was asked meanwhile."""

  def __init__(self):
    self.lock, self.now = threading.RLock(), None

  def __enter__(self):
    self.lock.acquire()

  def __exit__(self, *trouble):
    self.lock.release()


def in_turn(steps):
  """Decorates a generator method, of two lists and options, of an object that has `turns`, see there."""
  @functools.wraps(steps)
  def call(self, images, prompts, **options):
    for name, given in (("images", images), ("prompts", prompts)):
      if not isinstance(given, (list, tuple)):  # the letters of a text would be taken for pictures
        raise Fault(f"{name} is a list, of one for each answer, and not a {type(given).__name__}; "
                    "stream(image, prompt) asks one question")
    if len(images) != len(prompts) or not prompts:
      raise Fault(f"{len(images)} images for {len(prompts)} prompts: give one for each")
    turn, rest, step = object(), steps(self, images, prompts, **options), None
    with self.turns:
      self.turns.now = turn
      step = next(rest, None)
    while step is not None:
      yield step
      with self.turns:
        if self.turns.now is not turn:
          raise Fault("another question was asked before this answer was whole, and a model holds one at a time; "
                      "take answers one after the other, or load the model twice")
        step = next(rest, None)
  return call


class Tokenizer:
  """path: a SentencePiece `tokenizer.model`. rows: of the embedding that its ids are for, image: the id that its model
  has for <image>; None: not known. Raises Fault if it is no tokenizer, another model's, or lacks pieces Gemma needs."""

  def __init__(self, path, rows=None, image=None):
    try:
      data = Path(regular(path)).read_bytes() or b"nothing"  # of an empty file SentencePiece would complain for pages
      self.model = sentencepiece.SentencePieceProcessor(model_proto=data)
    except (OSError, RuntimeError, ValueError) as e:
      why = getattr(e, "strerror", None) or "not a SentencePiece model"
      raise Fault(f"{path}: {why}; download tokenizer.model again") from None
    names = [f"<loc{i:04d}>" for i in range(LOC)] + [f"<seg{i:03d}>" for i in range(SEG)] + ["<image>"]
    base = self.model.get_piece_size()
    known = [self.model.piece_to_id(name) for name in names]
    unknown = self.model.unk_id()
    further = iter(range(base, base + len(names)))
    self.ids = {name: next(further) if id == unknown else id for name, id in zip(names, known)}
    self.names = {id: name for name, id in self.ids.items()}
    self.bos, self.eos, self.newline = self.model.bos_id(), self.model.eos_id(), self.model.piece_to_id("\n")
    self.image = self.ids["<image>"]
    if self.bos < 0 or self.newline == unknown:
      raise Fault(f"{path} has no <bos> or no newline piece: it is not a PaliGemma tokenizer")
    if image not in (None, self.image) or rows is not None and max(base - 1, self.ids["<seg127>"]) >= rows:
      raise Fault(f"{path} is of another model: <image> is {self.image} in it, by config.json {image} of {rows} ids; take "
                  "this model's own")

  def encode(self, text):
    """str -> list of ids. <locNNNN> and <segNNN> are single ids; control names such as <bos> are plain text. Raises
    Fault."""
    check_text(text)
    ids, end = [], 0
    for match in SPECIAL.finditer(text):
      ids += self._plain(text[end:match.start()]) + [self.ids[match.group()]]
      end = match.end()
    return ids + self._plain(text[end:])

  def _plain(self, text):
    # SentencePiece never matches its control pieces in text, but a file that defines <image> or the like as a user
    # piece would: such a name is encoded in two halves, which no piece can straddle.
    halves = re.split(r"(?<=<)(?=(?:image|bos|eos|pad|unk)>)", text)
    return [id for half in halves for id in self.model.encode(half)]

  def prompt(self, text):
    """str -> [bos, *text, newline], what follows the image tokens. The newline is tokenised with the text, as
    transformers does, so a prompt that itself ends in a newline gives the piece for two."""
    check_text(text)
    return [self.bos] + self.encode(text + "\n")

  def piece(self, id):
    """The UTF-8 bytes that token `id` adds to the answer: several byte tokens make one character."""
    if id in self.names:
      return b"" if id == self.image else self.names[id].encode()
    if id >= self.model.get_piece_size() or self.model.is_control(id) or self.model.is_unknown(id):
      return b""
    try:
      name = self.model.id_to_piece(id)
    except UnicodeDecodeError:
      raise Fault(f"piece {id} of the tokenizer is damaged; download tokenizer.model again") from None
    return bytes([int(name[1:-1], 16)]) if self.model.is_byte(id) else name.replace("\u2581", " ").encode()

  def decode(self, ids):
    """list of ids -> str."""
    return b"".join(map(self.piece, ids)).decode(errors="replace")

  def stream(self, ids):
    """Iterable of ids -> pieces of text, each as soon as its last byte is there; joined they equal decode(ids). The
    generator returns the list of ids."""
    utf8, seen = codecs.getincrementaldecoder("utf-8")(errors="replace"), []
    for id in ids:
      seen.append(id)
      if text := utf8.decode(self.piece(id)):
        yield text
    if rest := utf8.decode(b"", final=True):
      yield rest
    return seen


def learn_characters(samples, folder):
  """The characters of [(picture, question, answer)], each a piece, as in makemore -> Tokenizer, written into a new
  folder as its tokenizer.model. ASCII is always there, so that the model can be asked, and taught, other texts.
  Raises Fault."""
  path, model = Path(folder) / "tokenizer.model", io.BytesIO()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.listdir(path.parent):
      raise Fault(f"{folder} is not empty; choose another --save")
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=(text for _, *texts in samples for text in texts), model_writer=model, model_type="char",
      vocab_size=100000, hard_vocab_limit=False, character_coverage=1.0, normalization_rule_name="identity",
      add_dummy_prefix=False, remove_extra_whitespaces=False, user_defined_symbols=["\n"], minloglevel=2, pad_id=0,
      required_chars=string.ascii_letters + string.digits + string.punctuation, eos_id=1, bos_id=2, unk_id=3,
      pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>")
    write_whole(path, model.getvalue())
  except OSError as e:
    raise Fault(f"{folder}: {e.strerror}; choose another --save", code=1) from None
  return Tokenizer(path)


@dataclass(frozen=True)
class Box:
  label: str
  box: tuple         # (x1, y1, x2, y2) in pixels of the picture
  codes: tuple = ()  # the 16 of a segment answer, of which examples/draw.py makes a mask


def parse_boxes(text, width, height):
  """"<loc..><loc..><loc..><loc..> label ; ..." -> list of Box. What is not a box, before it or around it, stays text."""
  boxes = []
  for part in text.split(";"):
    match = re.fullmatch(rf"[^<>]*((?:{LOC_TOKEN}){{4}})((?:{SEG_TOKEN})*)([^<>]*)", part)
    if match:
      y1, x1, y2, x2 = (int(v) / 1023 for v in re.findall(r"\d{4}", match[1]))  # y before x; written as v * 1023
      codes = tuple(map(int, re.findall(r"\d{3}", match[2])))[:CODES]  # of more the first, as in big_vision
      codes = codes if len(codes) == CODES else ()  # an answer cut short has a box and no mask
      boxes.append(Box(match[3].strip(), (x1 * width, y1 * height, x2 * width, y2 * height), codes))
  return boxes
