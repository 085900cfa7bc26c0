"""Lists of questions: `python examples/batch.py LIST --out ANSWERS`, and `answer_all` for programs.

LIST has a JSON object on each line, {"image": FILE or [FILE, ...], "prompt": TEXT}; files are relative to its
folder. ANSWERS gets a line for each of them, in order, {"row": its line number, "image", "prompt", "text",
"boxes"}, or "error" instead of the last two for a row that cannot be answered. A line is written whole, at
once, as soon as it is known, so that the file says by itself where to go on after a kill.
"""
import contextlib
import json
import os
import sys
import time
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
  """Questions as `batches` takes them -> yields an Answer or Fault for each, in order. fill: see `filled`."""
  for batch in batches(questions, size):
    asked = [question for question in batch if not isinstance(question, Fault)]
    answers = iter(attempt(model, filled(asked, size) if fill else asked, options) if asked else ())
    for question in batch:
      yield question if isinstance(question, Fault) else next(answers)


def answer_all(model, questions, size, **options):
  """Questions are (picture or list of pictures, prompt), options those of Sampling -> yields an Answer for
  each, in order. `size` are answered at once, always as many, so that one compiled program serves all. Raises
  Fault."""
  questions = ((pictures_of(image), prompt) for image, prompt in questions)
  for answer in attempt_all(model, questions, size, options, fill=True):
    if isinstance(answer, Fault):
      raise answer
    yield answer


# ---- 2. The list ----


def is_text(prompt):
  """JSON can also spell halves of characters, which nothing can encode."""
  return isinstance(prompt, str) and prompt == prompt.encode(errors="replace").decode()


class Row:
  """A line of a list. number: from 1; record: what its answer begins with; images: paths; size: (width,
  height) of the first picture, once it is opened."""
  def __init__(self, number, line, folder):
    self.number, self.record, self.images, self.size, trouble = number, {"row": number}, [], None, None
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as e:
      row, trouble = {}, f"not JSON ({e})"
    if not isinstance(row, dict):
      row, trouble = {}, "not a JSON object"
    self.record |= {key: row[key] for key in ("image", "prompt") if key in row}
    self.prompt = row.get("prompt")
    names = pictures_of(row.get("image"))
    if trouble is None and not (names and all(isinstance(name, str) and name for name in names)):
      trouble = "'image' must be a file or a list of files"
    elif trouble is None and not is_text(self.prompt):
      trouble = "'prompt' must be a text"
    elif trouble is None:
      self.images = [folder / name for name in names]
    self.fault = trouble and Fault(trouble)

  def question(self):
    """-> ([PIL image], prompt), or the Fault that says why it cannot be asked."""
    if self.fault:
      return self.fault
    try:
      for path in self.images:
        vlm.terminal.allow_heic(path)
      pictures = [vlm.open_image(path) for path in self.images]
    except Fault as e:
      return e
    self.size = pictures[0].size
    return pictures, self.prompt

  def line(self, **more):
    return json.dumps(self.record | more).encode() + b"\n"

  def beginnings(self):
    """How this row's line may begin, whatever its answer."""
    same = self.line()[:-2]  # without brace and newline
    return same + b', "text": ', same + b', "error": '


def read_list(path):
  """-> [Row], blank lines left out. Raises Fault."""
  try:
    lines = regular(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
  except (OSError, ValueError) as e:
    raise Fault(f"{path}: {getattr(e, 'strerror', e)}; LIST is a file with a JSON object on each line") from None
  rows = [Row(i, line, path.parent) for i, line in enumerate(lines, 1) if line.strip()]
  if not rows:
    raise Fault(f"{path} is empty; it takes lines like " + '{"image": "a.jpg", "prompt": "caption en"}')
  return rows


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
  """The file of answers, open at the place to go on from. before: how many rows it had; rows: what is
  left."""
  def __init__(self, path, rows, source):
    self.path, self.created = path, not os.path.exists(path)
    if not self.created:
      known = os.stat(path)
      for other in [source, *(image for row in rows for image in row.images)]:
        if os.path.exists(other) and os.path.samestat(os.stat(other), known):
          raise Fault(f"--out {path} is the list or one of its pictures; choose another name")
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
    self.before, self.rows = done[0], rows[done[0]:]

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

  def exit_code(self):
    """1 where no row has an answer."""
    with self.path.open("rb") as lines:
      return 0 if any("text" in json.loads(line) for line in lines) else 1


class Job:
  """Answers what is left, counts, and says how far it is."""
  def __init__(self, args, answers, model):
    self.args, self.answers, self.model, self.start = args, answers, model, time.perf_counter()
    self.draw = vlm.beside("draw")
    self.masks = self.draw.Masks(model.folder, model.device)
    self.rows = self.bad = self.pictures = 0

  def run(self, options):
    rows = self.answers.rows
    questions = (row.question() for row in rows)
    for row, answer in zip(rows, attempt_all(self.model, questions, self.args.batch_size, options)):
      self.finish(row, answer)

  def finish(self, row, answer):
    if isinstance(answer, Fault):
      vlm.log.critical(f"batch: {self.args.list} line {row.number}: {' '.join(str(answer).split())}")
      self.answers.write(row.line(error=str(answer)))
      self.bad += 1
    else:
      self.answers.write(row.line(text=answer.text, boxes=self.entries(answer.boxes, *row.size)))
      self.pictures += len(row.images)
    self.rows += 1
    before, spent, left = self.answers.before, self.seconds(), len(self.answers.rows) - self.rows
    vlm.terminal.bar(before + self.rows, before + self.rows + left,
                     f"rows, {self.pictures / spent:.2f} pictures/s")

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

  def summary(self):
    before = f", {self.answers.before} of them before" if self.answers.before else ""
    bad = f", {self.bad} of them bad" if self.bad else ""
    rows = self.answers.path.read_bytes().count(b"\n")  # Ctrl-C may fall between a line and its being counted
    return (f"{rows} rows{before}{bad}: {self.answers.path}; {self.pictures} pictures in "
            f"{self.seconds():.1f} s, {self.pictures / self.seconds():.2f} pictures/s")


# ---- 4. Command line ----


@vlm.program
def main(argv):
  p = vlm.terminal.ArgumentParser(prog="batch.py", allow_abbrev=False,
                 description="Answer a list of questions about pictures. Started again, it goes on.")
  p.add_argument("list", metavar="LIST", help='file of lines like {"image": "a.jpg", "prompt": "caption en"}')
  p.add_argument("--out", metavar="ANSWERS", required=True, help="file that gets a JSON object for each line")
  p.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at once (default %(default)s)")
  vlm.add_arguments(p)
  args = p.parse_args(argv)
  vlm.terminal.check_sampling(args)
  options = vlm.sampling(args)
  if not 1 <= args.batch_size <= 10_000:
    raise Fault("--batch-size: at least 1, at most 10000")
  source = Path(args.list)
  answers = Answers(Path(args.out), read_list(source), source)
  with answers.file:
    if not answers.rows:
      vlm.log.info(f"all {answers.before} rows are done: {args.out}")
      return answers.exit_code()
    try:
      model = vlm.open_model(args)
    except BaseException:
      answers.discard()
      raise
    job = Job(args, answers, model)
    try:
      job.run(options)
    except KeyboardInterrupt:
      vlm.log.info(f"stopped: {job.summary()}; the same command goes on")
      return 130
    vlm.log.info(job.summary())
    return answers.exit_code()


if __name__ == "__main__":
  sys.exit(main())
