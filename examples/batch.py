"""Many pictures: several for one question, and lists of questions, `python vlm.py --batch LIST --out ANSWERS`.

LIST has a JSON object on each line, {"image": FILE or [FILE, ...], "prompt": TEXT}; files are relative to its folder.
ANSWERS gets a line for each of them, in order, {"row": its line number, "image", "prompt", "text", "boxes"}, or "error"
instead of the last two for a row that cannot be answered. A line is written whole, at once, as soon as it is known, so
that the file says by itself where to go on after a kill.
"""
import contextlib
import json
import os
import sys
import time
from pathlib import Path

from PIL import Image

import masks
import vlm
from vlm import Fault

try:
  from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # Windows: nobody keeps two runs from writing to one file
  flock = None

SIZE = 8


def split(inputs):
  """The words of a command line -> pictures, prompt. The last is the prompt, unless it is a file; None without one.
  Raises Fault."""
  if len(inputs) < 2 or os.path.isfile(inputs[-1]):
    return inputs, None
  *images, prompt = inputs
  absent = [name for name in images if not os.path.exists(name)]
  if absent and len(images) > 1:
    raise Fault(f"{absent[0]}: no such image; pictures come first, then a prompt, with quotes around several words")
  kind = Path(prompt).suffix.lower()
  if kind and " " not in prompt and kind in Image.registered_extensions():  # a mistyped name is no question
    raise Fault(f"{prompt}: no such image")
  return images, prompt


def number_or_path(text):
  """--batch 8 is for --train, --batch list.jsonl is a list."""
  try:
    return int(text)
  except ValueError:
    return text


def is_text(prompt):
  """JSON can also spell halves of characters, which nothing can encode."""
  return isinstance(prompt, str) and prompt == prompt.encode(errors="replace").decode()


class Row:
  """A line of a list. number: from 1; record: what its answer begins with; fault: what is wrong with it, or None."""
  def __init__(self, number, line, folder):
    self.number, self.record, self.images, self.prompt, self.fault = number, {"row": number}, [], None, None
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as e:
      row, self.fault = {}, f"not JSON ({e})"
    if not isinstance(row, dict):
      row, self.fault = {}, "not a JSON object"
    self.record |= {key: row[key] for key in ("image", "prompt") if key in row}
    image, self.prompt = row.get("image"), row.get("prompt")
    images = image if isinstance(image, list) else [image]
    if self.fault is None and not (images and all(isinstance(name, str) and name for name in images)):
      self.fault = "'image' must be a file or a list of files"
    elif self.fault is None and not is_text(self.prompt):
      self.fault = "'prompt' must be a text"
    elif self.fault is None:
      self.images = [folder / name for name in images]

  def pictures(self):
    """-> [PIL image] or None, and then the fault says why."""
    try:
      return [vlm.open_image(path) for path in self.images] if self.fault is None else None
    except Fault as e:
      self.fault = str(e)

  def line(self, **more):
    return json.dumps(self.record | more).encode() + b"\n"

  def begins(self):
    """How this row's line may begin, whatever its answer."""
    same = self.line()[:-2]  # without brace and newline
    return same + b', "text": ', same + b', "error": '


def read_list(path):
  """-> [Row], blank lines left out. Raises Fault."""
  try:
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
  except OSError as e:
    raise Fault(f"{path}: {e.strerror}; --batch takes a file with a JSON object on each line") from None
  rows = [Row(i, line, path.parent) for i, line in enumerate(lines, 1) if line.strip()]
  if not rows:
    raise Fault(f"{path} is empty; it takes lines like " + '{"image": "a.jpg", "prompt": "caption en"}')
  return rows


def finished(data, rows):
  """What is in the answers already, and the rows of the list -> how many of these are done, and in how many bytes.
  What follows is the half line that a kill may leave. None if it is not the beginning of this list's answers."""
  *lines, half = data.split(b"\n")
  if len(lines) > len(rows) or half and len(lines) == len(rows):
    return None
  for line, row in zip(lines, rows):
    if not line.startswith(row.begins()) or not line.endswith(b"}"):
      return None
  if half and not any(half[:len(begin)] == begin[:len(half)] for begin in rows[len(lines)].begins()):
    return None
  return len(lines), len(data) - len(half)


class Answers:
  """The file of answers, open at the place to go on from; rows: those that are left."""
  def __init__(self, path, rows, source):
    self.path, self.created = path, not os.path.exists(path)
    if not self.created:
      known = os.stat(path)
      for other in [source, *(image for row in rows for image in row.images)]:
        if os.path.exists(other) and os.path.samestat(os.stat(other), known):
          raise Fault(f"--out {path} is the list or one of its pictures; choose another name")
    try:
      self.file = open(path, "a+b", buffering=0)
      if flock:
        flock(self.file, LOCK_EX | LOCK_NB)
      self.file.seek(0)
      done = finished(self.file.read(), rows)
      if done is None:
        raise Fault(f"--out {path} holds something other than answers to {source}; choose another name, or remove it")
      self.file.truncate(done[1])
    except BlockingIOError:
      raise Fault(f"--out {path}: another run is writing to it") from None
    except OSError as e:
      raise Fault(f"--out {path}: {e.strerror}; choose another place") from None
    self.done, self.rows = done[0], rows[done[0]:]

  def write(self, line):
    """All of a line or none of it. Raises Fault."""
    end = os.fstat(self.file.fileno()).st_size
    try:
      if self.file.write(line) != len(line):
        raise OSError(28, "No space left on device")
      os.fsync(self.file.fileno())
    except OSError as e:
      with contextlib.suppress(OSError):
        self.file.truncate(end)
      raise Fault(f"{self.path}: {e.strerror}; the rows before are whole, and the same command goes on", 1) from None

  def discard(self):
    """What --out was before."""
    if self.created:
      self.path.unlink()


def answer(model, batch, options):
  """[(Row, its pictures)] -> an Answer for each, None where a row has a fault."""
  try:
    return model.generate([pictures for _, pictures in batch], [row.prompt for row, _ in batch], **options)
  except Fault as e:
    if e.code != 2:  # nothing of a row's: the weights, say
      raise
    if len(batch) > 1:  # whose fault was it?
      return [answer(model, [pair], options)[0] for pair in batch]
    batch[0][0].fault = str(e)
    return [None]


class Job:
  """Counts, and says how far it is."""
  def __init__(self, args, answers):
    self.args, self.answers, self.start = args, answers, time.perf_counter()
    self.rows = self.bad = self.pictures = 0
    self.said = set()

  def finish(self, row, result, pictures):
    if row.fault is None:
      boxes, trouble = masks.drawable(result.boxes)
      if trouble and str(trouble) not in self.said:  # no file for the masks: once is enough
        self.said.add(str(trouble))
        masks.report(trouble, self.args)
      self.answers.write(row.line(text=result.text, boxes=[masks.entry(box) for box in boxes]))
      self.pictures += pictures
    else:
      vlm.status("")
      print(f"vlm: {self.args.batch} line {row.number}: {' '.join(row.fault.split())}", file=sys.stderr)
      self.answers.write(row.line(error=row.fault))
      self.bad += 1
    self.rows += 1
    total, done, spent = self.answers.done + len(self.answers.rows), self.answers.done + self.rows, self.seconds()
    left = spent / self.rows * (total - done)
    vlm.status(f"[{'#' * (20 * done // total):20}] {done}/{total}  {self.pictures / spent:.2f} pictures/s  "
               f"{left / 60:.1f} min left")

  def seconds(self):
    return time.perf_counter() - self.start

  def summary(self):
    before = f", {self.answers.done} of them before" if self.answers.done else ""
    bad = f", {self.bad} of them bad" if self.bad else ""
    rows = self.answers.path.read_bytes().count(b"\n")  # Ctrl-C may fall between a line and its being counted
    return (f"{rows} rows{before}{bad}: {self.answers.path}; {self.pictures} pictures in "
            f"{self.seconds():.1f} s, {self.pictures / self.seconds():.2f} pictures/s")


def run_batches(model, job, size, options):
  """Answers what is left, `size` rows at a time. Rows of one batch have equally many pictures: order is kept, so a
  batch ends where that changes. A bad row takes no place in a batch."""
  waiting, batch = [], []  # rows in order with their pictures, and those of them that have pictures
  def flush():
    results = dict(zip((id(row) for row, _ in batch), answer(model, batch, options) if batch else []))
    for row, pictures in waiting:
      job.finish(row, results.get(id(row)), len(pictures or ()))
    waiting.clear()
    batch.clear()
  for row in job.answers.rows:
    pictures = row.pictures()
    if batch and pictures and len(pictures) != len(batch[0][1]):
      flush()
    waiting.append((row, pictures))
    if pictures:
      batch.append(waiting[-1])
    if not batch or len(batch) == size:
      flush()
  flush()


def add_arguments(parser):
  """The options of `python vlm.py --batch LIST`; --batch itself is train.py's as well, and stands there."""
  parser.add_argument("--batch-size", type=int, default=SIZE, metavar="N",
                      help="rows of a --batch LIST answered at once (default: %(default)s)")


def run(args):
  """What `python vlm.py --batch LIST --out ANSWERS` does -> exit code, None without it. Raises Fault."""
  if not isinstance(args.batch, str):
    if args.batch_size != SIZE:
      raise Fault("--batch-size goes with --batch LIST --out ANSWERS")
    return None
  if not args.out:
    raise Fault("--batch needs --out: the file for the answers")
  for wrong, message in ((args.inputs, f"--batch takes its questions from the list: leave out {args.inputs[:1]}"),
                         (args.json, "--batch writes JSON anyway: leave out --json"),
                         (args.save, "--save goes without --batch"), (args.batch_size < 1, "--batch-size: at least 1")):
    if wrong:
      raise Fault(message)
  vlm.check_sampling(args.max_tokens, args.temperature, args.top_k, args.top_p, args.seed)
  source = Path(args.batch)
  answers = Answers(Path(args.out), read_list(source), source)
  with answers.file:
    if not answers.rows:
      vlm.say(args, f"all {answers.done} rows are answered: {args.out}")
      return 0
    try:
      folder = args.weights or vlm.default_weights()
      vlm.status(f"loading {folder}")
      model = vlm.load(folder, bits=args.quantize, shard=args.shard)
    except BaseException:
      answers.discard()
      raise
    if model.config.note:
      vlm.say(args, model.config.note)
    job = Job(args, answers)
    options = dict(max_tokens=args.max_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                   seed=args.seed)
    try:
      run_batches(model, job, args.batch_size, options)
    except KeyboardInterrupt:
      vlm.say(args, f"stopped: {job.summary()}; the same command goes on")
      return 130
    vlm.say(args, job.summary())
  return 0
