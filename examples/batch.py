"""Many questions: `python examples/batch.py SOURCE --out ANSWERS`, and `answer_all` for programs.

SOURCE is a list with a JSON object on each line, {"image": FILE or [FILE, ...], "prompt": TEXT}, files
relative to its folder; or a folder, a .tar or pictures, and then each --prompt is asked of each picture.
ANSWERS gets a line for each question, in order, {"row": its number, "image", "prompt", "text", "boxes"}, or
"error" instead of the last two for a row that cannot be answered. A line is written whole, at once, as soon
as it is known, so that the file says by itself where to go on after a kill.
"""
import collections
import contextlib
import csv
import errno
import importlib
import io
import itertools
import json
import os
import re
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import vlm
from tokenizer import regular
from vlm import Fault

try:
  from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # Windows: nobody keeps two runs from writing to one file
  flock = None


# ---- 1. The loop ----


def pictures_of(image):
  """What VLM.generate takes for a row, a picture or several -> list of pictures."""
  return list(image) if isinstance(image, (list, tuple)) else [image]


def batches(questions, size):
  """Questions are (list of pictures, prompt, ...), or a Fault in place of one -> lists of them, in order: at
  most `size` questions about equally many pictures, and the faults among them, which take no place."""
  batch, asked = [], []
  for question in questions:
    if not isinstance(question, Fault):
      if asked and len(question[0]) != len(asked[0][0]):
        yield batch
        batch, asked = [], []
      asked.append(question)
    batch.append(question)
    if not asked or len(asked) == size:
      yield batch
      batch, asked = [], []
  if batch:
    yield batch


def filled(batch, size):
  """A batch with repetitions of its last question, so that one compiled program serves all."""
  return batch + batch[-1:] * (size - len(batch))


def attempt(model, batch, options):
  """Questions of one batch -> for each an Answer or the Fault in it. Raises a Fault that is in none."""
  images, prompts = zip(*batch)
  try:
    return model.generate(list(images), list(prompts), **options)
  except Fault as e:
    if e.code != 2:  # the weights, say
      raise
    if len(batch) > 1:  # whose fault was it?
      return [attempt(model, [question], options)[0] for question in batch]
    return [e]


def attempt_all(model, questions, size, options, fill=False):
  """Questions as `batches` takes them -> yields an Answer or Fault for each, in order. fill: see `filled`.
  What does not fit into memory is halved, from there on."""
  for batch in batches(questions, size):
    asked, answers = [question for question in batch if not isinstance(question, Fault)], []
    while len(answers) < len(asked):
      part = asked[len(answers):][:size]
      try:
        answers += attempt(model, filled(part, size) if fill else part, options)[:len(part)]
      except (MemoryError, OSError) as e:  # of what is mapped it is an OSError
        if not isinstance(e, MemoryError) and e.errno != errno.ENOMEM:
          raise
        if size == 1:
          raise Fault("not even one question fits into memory; take a smaller model", code=1) from None
        size = max(1, min(size, len(part)) // 2)
        vlm.log.info(f"that does not fit into memory: {size} at once from here on")
    answers = iter(answers)
    for question in batch:
      yield question if isinstance(question, Fault) else next(answers)


def ahead(function, items, count):
  """function of each item, in order, on a thread that is up to `count` items ahead of who asks for them."""
  items = iter(items)
  with ThreadPoolExecutor(1) as thread:
    waiting = collections.deque(thread.submit(function, item) for item in itertools.islice(items, count))
    try:
      while waiting:
        result = waiting.popleft().result()
        waiting += [thread.submit(function, item) for item in itertools.islice(items, 1)]
        yield result
    finally:  # of whoever asks for no more
      thread.shutdown(cancel_futures=True)


def fitting(model, max_tokens):
  """How many questions at once: 16, or as many as fit into half of the memory that is free. More bring PaliGemma-3B
  3 %, and answers half as often."""
  c = model.config.text
  slots = model.config.vision.patches + max_tokens + 256
  row = 4 * slots * (2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim + 3 * c.intermediate_size)
  return max(1, min(16, int((vlm.kernels.free_memory() or 8e9) / 2 / row)))


def answer_all(model, questions, size, **options):
  """Questions are (picture or list of pictures, prompt), options those of Sampling -> yields an Answer for
  each, in order. `size` are answered at once, always as many, so that one compiled program serves all. Raises
  Fault."""
  questions = ((pictures_of(image), prompt) for image, prompt in questions)
  for answer in attempt_all(model, questions, size, options, fill=True):
    if isinstance(answer, Fault):
      raise answer
    yield answer


# ---- 2. The source ----


def is_text(prompt):
  """JSON can also spell halves of characters, which nothing can encode."""
  return isinstance(prompt, str) and prompt == prompt.encode(errors="replace").decode()


class Row:
  """A question of a source. number: from 1; record: what its answer begins with; images: paths, or members of
  a .tar; size: (width, height) of the first picture, once it is opened."""
  def __init__(self, number, record, prompt, images, trouble=None, tar=None):
    self.number, self.record, self.prompt, self.images = number, {"row": number} | record, prompt, images
    self.fault, self.tar, self.size = trouble and Fault(trouble), tar, None

  def question(self, side):
    """-> ([PIL image of the model's side], prompt), or the Fault that says why it cannot be asked."""
    if self.fault:
      return self.fault
    try:
      pictures = [self.open(path) for path in self.images]
    except Fault as e:
      return e
    self.size = pictures[0].size
    return [picture.resize((side, side), vlm.Image.Resampling.BICUBIC) for picture in pictures], self.prompt

  def open(self, path):
    if self.tar is None:
      vlm.terminal.allow_heic(path)
      return vlm.open_image(path)
    vlm.terminal.allow_heic(path.name)
    try:
      return vlm.open_image(io.BytesIO(self.tar.extractfile(path).read()))
    except KeyError:
      raise Fault(f"{path.name}: a link to what the .tar does not hold") from None
    except (Fault, OSError, tarfile.TarError) as e:
      # its name in place of the file object's
      raise Fault(re.sub(" ?<_io[^>]*>", "", str(e) if str(e)[0] != "<" else f"{path.name}{e}")) from None

  def line(self, **more):
    return json.dumps(self.record | more).encode() + b"\n"

  def beginnings(self):
    """How this row's line may begin, whatever its answer."""
    same = self.line()[:-2]  # without brace and newline
    return same + b', "text": ', same + b', "error": '


class List:
  """A file of JSON lines. Rows are made when they are asked for: a million of them take no memory. Raises
  Fault."""
  def __init__(self, path):
    self.path = path
    try:
      lines = regular(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except (OSError, ValueError) as e:
      raise Fault(f"{path}: {getattr(e, 'strerror', e)}; SOURCE is a list with a JSON object on each line, a "
                  "folder, a .tar, or pictures") from None
    self.lines = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not self.lines:
      raise Fault(f"{path} is empty; it takes lines like " + '{"image": "a.jpg", "prompt": "caption en"}')

  def __len__(self):
    return len(self.lines)

  def __getitem__(self, index):
    number, line = self.lines[index]
    row, trouble = {}, None
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as e:
      trouble = f"not JSON ({e})"
    if not isinstance(row, dict):
      row, trouble = {}, "not a JSON object"
    prompt, names = row.get("prompt"), pictures_of(row.get("image"))
    if trouble is None and not (names and all(isinstance(name, str) and name for name in names)):
      trouble = "'image' must be a file or a list of files"
    elif trouble is None and not is_text(prompt):
      trouble = "'prompt' must be a text"
    record = {key: row[key] for key in ("image", "prompt") if key in row}
    images = [] if trouble else [self.path.parent / name for name in names]
    return Row(number, record, prompt, images, trouble)


class Pictures:
  """Each of some prompts asked of each picture: of names given, of a folder, or of a .tar, as WebDataset lays
  out, whose other members are left alone. Raises Fault."""
  def __init__(self, paths, prompts, pattern):
    self.path, self.prompts, self.tar, known = paths[0], prompts, None, vlm.terminal.extensions()
    if self.path.is_dir():
      try:
        paths = sorted(path for path in self.path.rglob(pattern) if path.is_file())
      except (ValueError, NotImplementedError) as e:
        raise Fault(f"--glob {pattern}: {e}; such as *.jpg, of the names in the folder") from None
      named = [(path, str(path.relative_to(self.path))) for path in paths]
    elif self.path.suffix == ".tar":
      try:
        self.tar = tarfile.open(regular(self.path))
        named = [(member, str(Path(member.name))) for member in self.tar if member.isfile() or member.islnk()]
      except (OSError, tarfile.TarError) as e:
        raise Fault(f"{self.path}: no .tar, or a damaged one ({getattr(e, 'strerror', 0) or e})") from None
    else:
      named = [(path, str(path)) for path in paths]
    self.images = [(image, name) for image, name in named if Path(name).suffix.lower() in known]
    if not self.images:
      raise Fault(f"{self.path} holds no pictures" + f" called {pattern}" * (pattern != "*"))

  def __len__(self):
    return len(self.images) * len(self.prompts)

  def __getitem__(self, index):
    if index >= len(self):
      raise IndexError(index)
    picture, prompt = divmod(index, len(self.prompts))
    image, name = self.images[picture]
    record = {"image": name, "prompt": self.prompts[prompt]}
    return Row(index + 1, record, self.prompts[prompt], [image], tar=self.tar)


class Part:
  """A share of a source, as (1, 4) the first of four: one behind the other they are the whole."""
  def __init__(self, source, part, of):
    self.source, self.path = source, source.path
    self.range = range(len(source) * (part - 1) // of, len(source) * part // of)

  def __len__(self):
    return len(self.range)

  def __getitem__(self, index):
    return self.source[self.range[index]]


def read_source(args):
  """What a command line names -> its rows. Raises Fault."""
  paths = [Path(name) for name in args.source]
  pictures = paths[0].is_dir() or paths[0].suffix.lower() in (".tar", *vlm.terminal.extensions())
  if len(paths) > 1 and not all(path.suffix.lower() in vlm.terminal.extensions() for path in paths):
    raise Fault("SOURCE: one list, folder or .tar, or several pictures")
  if pictures and not args.prompt:
    raise Fault('--prompt is missing: what to ask of each picture, such as --prompt "caption en"')
  if not pictures and args.prompt:
    raise Fault(f"{paths[0]}: a list has its own prompts, on each line; leave out --prompt")
  if args.glob != "*" and not paths[0].is_dir():
    raise Fault("--glob chooses among the pictures of a folder")
  part = re.fullmatch(r"(\d{1,9})/(\d{1,9})", args.part)
  if not part or not 1 <= int(part[1]) <= int(part[2]):
    raise Fault(f"--part {args.part}: I/N, such as 1/4 for the first quarter")
  if pictures:
    source = Pictures(paths, [vlm.terminal.asked(prompt) for prompt in args.prompt], args.glob)
  else:
    source = List(paths[0])
  return Part(source, int(part[1]), int(part[2]))


# ---- 3. The answers ----


def finished(data, rows):
  """What is in the answers already, and the rows of the list -> how many of these are done, and in how many
  bytes. What follows is the half line that a kill may leave. None if these are no answers to this list."""
  *lines, half = data.split(b"\n")
  if len(lines) > len(rows) or half and len(lines) == len(rows):
    return None
  for line, row in zip(lines, rows):
    if not line.startswith(row.beginnings()) or not line.endswith(b"}"):
      return None
  if half and not any(half[:len(begin)] == begin[:len(half)] for begin in rows[len(lines)].beginnings()):
    return None
  return len(lines), len(data) - len(half)


class Answers:
  """The file of answers, open at the place to go on from. before: how many rows it had."""
  def __init__(self, path, rows):
    self.path, self.created, source = path, not os.path.exists(path), rows.path
    if not self.created:
      known = os.stat(path)
      for other in [source, *(image for row in rows if not row.tar for image in row.images)]:
        if os.path.exists(other) and os.path.samestat(os.stat(other), known):
          raise Fault(f"--out {path} is the source or one of its pictures; choose another name")
    try:
      if not self.created:
        regular(path)
      self.file = open(path, "a+b", buffering=0)
      if flock:
        flock(self.file, LOCK_EX | LOCK_NB)
      self.file.seek(0)
      done = finished(self.file.read(), rows)
      if done is None:
        raise Fault(f"--out {path} holds something other than answers to {source}; choose another name, or "
                    "remove it")
      self.file.truncate(done[1])
    except BlockingIOError:
      raise Fault(f"--out {path}: another run is writing to it") from None
    except OSError as e:
      raise Fault(f"--out {path}: {e.strerror}; choose another place") from None
    self.before, self.rows = done[0], rows

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
      raise Fault(f"{self.path}: {e.strerror}; the rows before are whole, and the same command goes on",
                  code=1) from None

  def discard(self):
    """What --out was before."""
    if self.created:
      self.path.unlink()

  def left(self):
    """The rows that have no answer yet."""
    return itertools.islice(self.rows, self.before, None)

  def exit_code(self):
    """1 where no row has an answer, of those that there are."""
    with self.path.open("rb") as lines:
      return 0 if not self.rows or any("text" in json.loads(line) for line in lines) else 1


class Job:
  """Answers rows of a source, `size` at once, counts, and says how far it is."""
  def __init__(self, source, model, size):
    self.source, self.model, self.size, self.start = source, model, size, time.perf_counter()
    self.draw = vlm.beside("draw")
    self.masks = self.draw.Masks(model.folder, model.device)
    self.bad = self.pictures = 0

  def lines(self, rows, options):
    """Rows -> yields for each the row and its line of answers."""
    side, (rows, asked) = self.model.config.vision.image_size, itertools.tee(rows)
    # Pictures are opened and resized while the model computes, a batch ahead. JPEG's own scaled decoding, Image.draft,
    # would save 0.08 s of 0.1 that nobody waits for, and moves numbers by up to 2 of 255.
    questions = ahead(lambda row: row.question(side), asked, 2 * self.size)
    for row, answer in zip(rows, attempt_all(self.model, questions, self.size, options)):
      if isinstance(answer, Fault):
        vlm.log.critical(f"batch: {self.source} row {row.number}: {' '.join(str(answer).split())}")
        self.bad += 1
        yield row, row.line(error=str(answer))
      else:
        boxes = vlm.parse_boxes(answer.text, *row.size)  # in pixels of the picture, not of the model's square
        self.pictures += len(row.images)
        yield row, row.line(text=answer.text, boxes=self.entries(boxes, *row.size))

  def run(self, answers, options):
    """Answers what has no answer yet."""
    for done, (row, line) in enumerate(self.lines(answers.left(), options), answers.before + 1):
      answers.write(line)
      vlm.terminal.bar(done, len(answers.rows), f"rows, {self.pictures / self.seconds():.2f} pictures/s")

  def entries(self, boxes, width, height):
    """-> the boxes as JSON has them, without masks where there is no file for these."""
    try:
      masks = [self.masks and self.masks(box, width, height) for box in boxes]
    except self.draw.Missing as e:
      vlm.log.info(str(e))
      self.masks, masks = None, [None] * len(boxes)  # said once
    return [self.draw.entry(box, mask) for box, mask in zip(boxes, masks)]

  def seconds(self):
    return time.perf_counter() - self.start

  def summary(self, answers):
    before = f", {answers.before} of them before" if answers.before else ""
    bad = f", {self.bad} of them bad" if self.bad else ""
    rows = answers.path.read_bytes().count(b"\n")  # Ctrl-C may fall between a line and its being counted
    return (f"{rows} rows{before}{bad}: {answers.path}; {self.pictures} pictures in "
            f"{self.seconds():.1f} s, {self.pictures / self.seconds():.2f} pictures/s")


# ---- 4. Tables ----
COLUMNS = "row", "image", "prompt", "text", "boxes", "error"
TABLES = ".csv", ".parquet"


def table_rows(lines):
  """Lines of answers -> what a table has of them: numbers of rows, texts as they are, all else as JSON."""
  def cell(name, value):
    if isinstance(value, str):  # of a file's name there may be bytes that are no UTF-8
      return value.encode(errors="backslashreplace").decode()
    return value if name == "row" else json.dumps(value)
  for line in lines:
    row = json.loads(line)
    yield {name: cell(name, row[name]) for name in COLUMNS if row.get(name) is not None}


def schema():
  """The types of a Parquet table's columns."""
  import pyarrow
  return pyarrow.schema([(name, pyarrow.int64() if name == "row" else pyarrow.string()) for name in COLUMNS])


def check_table(path, lines):
  """A table that is asked for, and the file of lines that goes before it. Raises Fault."""
  if path.suffix == ".parquet":
    try:
      importlib.import_module("pyarrow.parquet")
    except ImportError:
      raise Fault(f"--out {path} needs one more package: python -m pip install pyarrow; .csv needs none"
                  ) from None
  if path.exists() and not lines.exists():
    raise Fault(f"--out {path} is there already, without its {lines.name}; choose another name")


def write_table(lines, path):
  """A file of answers -> the table, whole or not at all. Raises Fault."""
  half = path.with_name(path.name + ".part")
  try:
    with lines.open("rb") as source:
      if path.suffix == ".csv":
        with half.open("w", newline="", encoding="utf-8") as file:
          table = csv.DictWriter(file, COLUMNS)
          table.writeheader()
          table.writerows(table_rows(source))
      else:
        import pyarrow
        import pyarrow.parquet
        rows = table_rows(source)
        with pyarrow.parquet.ParquetWriter(half, schema()) as table:
          while some := list(itertools.islice(rows, 10_000)):
            table.write_table(pyarrow.Table.from_pylist(some, schema()))
    os.replace(half, path)
  except OSError as e:
    half.unlink(missing_ok=True)
    raise Fault(f"--out {path}: {e.strerror}; the answers are in {lines}", code=1) from None


# ---- 5. Command line ----


def add_source(p):
  p.add_argument("source", metavar="SOURCE", nargs="+", help="a list of lines like {\"image\": \"a.jpg\", "
                 "\"prompt\": \"caption en\"}, a folder, a .tar, or pictures")
  p.add_argument("--prompt", action="append", metavar="TEXT", help="what to ask of each picture; repeatable")
  p.add_argument("--glob", default="*", metavar="PATTERN", help="which pictures of a folder")


@vlm.program
def main(argv):
  p = vlm.terminal.ArgumentParser(prog="batch.py", allow_abbrev=False,
                 description="Answer many questions about pictures. Started again, it goes on.")
  add_source(p)
  p.add_argument("--out", metavar="ANSWERS", required=True,
                 help="a line of JSON for each row; .csv, .parquet: a table, made of these at the end")
  p.add_argument("--batch-size", default="auto", metavar="N", help="rows at once (default: 16, if they fit)")
  p.add_argument("--part", default="1/1", metavar="I/N", help="the share of one of N machines (default: all)")
  vlm.add_arguments(p)
  args = p.parse_args(argv)
  vlm.terminal.check_sampling(args)
  options = vlm.sampling(args)
  if args.batch_size != "auto" and not re.fullmatch("[1-9][0-9]{0,3}", args.batch_size):
    raise Fault("--batch-size: a number from 1 to 9999, or auto")
  out = Path(args.out)
  lines = out.with_name(out.name + ".jsonl") if out.suffix in TABLES else out
  rows = read_source(args)
  if lines != out:
    check_table(out, lines)
  answers = Answers(lines, rows)
  with answers.file:
    if answers.before == len(rows):
      vlm.log.info(f"all {answers.before} rows are done: {lines}")
    else:
      try:
        model = vlm.open_model(args)
      except BaseException:
        answers.discard()
        raise
      size = fitting(model, args.max_tokens) if args.batch_size == "auto" else int(args.batch_size)
      job = Job(rows.path, model, size)
      try:
        job.run(answers, options)
      except KeyboardInterrupt:
        vlm.log.info(f"stopped: {job.summary(answers)}; the same command goes on")
        return 130
      vlm.log.info(job.summary(answers))
    if lines != out:
      write_table(lines, out)
    return answers.exit_code()


if __name__ == "__main__":
  sys.exit(main())
