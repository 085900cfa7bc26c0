"""What a person at a terminal meets beyond the answer itself: what is being done, boxes and masks on the
picture, one question after another, where a model is found, and what to type instead. Imports nothing of vlm,
which hands over the model's folder and the answer."""
import argparse
import atexit
import contextlib
import errno
import importlib
import io
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

from PIL import Image

from tokenizer import Fault, write_whole

log = logging.getLogger("vlm")
MOVED = {"--init": "train", "--resume": "train", "--batch": "batch", "--batch-size": "batch",
         "--show": "show", "--layer": "show", "--quantize": "quantize", "--shard": "shard"}


# ---- 1. What is being done ----


STAGES = {"vision": "looking", "prefill": "reading"}  # programs of vlm.py, as what a person waits for


def run(work, argv):
  """A program's work, with streams that may be closed, full, of few characters, or end early -> exit code. Raises Fault."""
  for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
    if getattr(sys, name) is None:  # closed by who started this
      setattr(sys, name, open(os.devnull, mode))
    with contextlib.suppress(AttributeError, ValueError):  # a stream that a test has put there
      getattr(sys, name).reconfigure(errors="surrogateescape" if name == "stdin" else "backslashreplace")
  main = threading.current_thread() is threading.main_thread()
  before = main and signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by the way of every `finally`
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # Pillow's and numpy's own lines
      code = work(argv)
    sys.stdout.flush()
    return code
  except KeyboardInterrupt:
    print(flush=True)  # what is on the line stays there
    raise
  except MemoryError:
    raise Fault("out of memory; ask for less at once", code=1) from None
  except OSError as e:
    if e.filename is not None or e.errno not in (errno.ENOSPC, errno.EPIPE, errno.EBADF, errno.EIO):
      raise Fault(f"{f'{e.filename}: ' if e.filename else ''}{e.strerror or e}", code=1) from None
    with contextlib.suppress(OSError, ValueError):  # or Python would say it once more at its end
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(e, BrokenPipeError):  # who reads has seen enough
      return 1
    raise Fault(f"stdout: {e.strerror or e}", code=1) from None
  finally:
    if main:
      signal.signal(signal.SIGTERM, before)


class StreamHandler(logging.Handler):
  """What vlm logs, on stderr. Of debug, which tells what is being done, a terminal shows the last line only,
  with its seconds; elsewhere each kind of work has one line, which its seconds end. A record whose first two
  arguments are how many are done and how many there are is a bar, which the work for each leaves as it is."""
  def __init__(self):
    super().__init__()
    atexit.register(self.end)  # of a program that Ctrl-C ends
    self.start = self.shown = time.monotonic()
    self.stage, self.began, self.told = "", 0.0, set()
    self.bar = self.open = False  # is a bar under way; is the last line going to be cleared or ended

  def emit(self, record):
    text = record.getMessage()
    done, total, *_ = (*(record.args or ()), 0, 0)
    if total:
      self.progress(text, done, total)
    elif record.levelno > logging.DEBUG:
      self.end()
      self.bar = False
      print(text, file=sys.stderr, flush=True)
    elif not self.bar:
      name, comma, more = text.partition(",")
      answers = not text and self.stage.startswith("reading")
      self.end()
      self.begin("answering" if answers else STAGES.get(name, name) + comma + more)

  def progress(self, text, done, total):
    terminal, now = sys.stderr.isatty(), time.monotonic()
    self.bar = done < total
    if done <= 2:  # until then it was compiled
      self.start = now
    if now < self.shown + (0.1 if terminal else 2) and not (terminal and done in (1, total)):
      return  # a line every two seconds, where each stays
    self.end()
    self.shown, left = now, (now - self.start) / max(done - 2, 1) * (total - done)
    text = f"[{'#' * (20 * done // total):20}] {text}" + (f", {left:.0f} s left" if done > 2 else "")
    print(text, end="" if terminal else "\n", file=sys.stderr, flush=True)
    self.open = terminal

  def begin(self, stage):
    self.stage, self.began = stage, time.monotonic()
    new = stage not in self.told
    self.told.add(stage)
    if stage and sys.stderr.isatty():  # where the answer may be going to be on that line
      if stage != "answering" or not sys.stdout.isatty() or "--json" in sys.argv:
        print(stage, end="", file=sys.stderr, flush=True)
        self.open = True
        threading.Thread(target=self.count, args=(self.began,), daemon=True).start()
    elif stage and new:
      self.open = stage != "answering"  # whose line is whole: the answer may go to the same file
      print(stage, end=" ..." if self.open else "\n", file=sys.stderr, flush=True)

  def count(self, began):
    """Each second how many have passed, until another stage begins."""
    while True:
      time.sleep(1 - (time.monotonic() - began) % 1)
      with self.lock:
        if self.began != began:
          return
        seconds = time.monotonic() - began
        print(f"\r\033[K{self.stage}  {seconds:.0f} s", end="", file=sys.stderr, flush=True)

  def end(self):
    """On a terminal the line of a stage or bar goes; elsewhere it gets its seconds."""
    if self.open:
      terminal, seconds = sys.stderr.isatty(), time.monotonic() - self.began
      print("\r\033[K" if terminal else f" {seconds:.1f} s\n", end="", file=sys.stderr, flush=True)
    self.stage, self.began, self.open = "", 0.0, False


def bar(done, total, text):
  """The one progress bar of all programs."""
  log.debug("%d/%d  %s", done, total, text)


def some(names, most=3):
  """A list of names as text; of a long one its beginning."""
  return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


# ---- 2. What was typed ----


class ArgumentParser(argparse.ArgumentParser):
  """What is wrong with a command line is one line, like every other fault."""
  def error(self, message):
    word = message.split(": ")[-1].partition(" ")[0].partition("=")[0]
    if self.prog == "vlm.py" and word in MOVED:  # which vlm.py once had
      message = f"{word} is a program of its own: python examples/{MOVED[word]}.py"
    raise Fault(f"{message}; see --help")

  def parse_args(self, argv=None):
    """`given`: the options that were really typed, which have to mean something."""
    args = super().parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    args.given = {word.partition("=")[0] for word in map(str, words) if word.startswith("--")}
    args.drawn = []  # names of the pictures that were written, in a conversation more than one
    return args


SHIPPED = "toy", "tiny1", "tiny2", "tiny2-28b"


def default_weights(root):
  """The largest checkpoint under root/weights; what was downloaded or trained comes before what ships. Raises
  Fault."""
  found = []
  for config in root.glob("weights/*/config.json"):
    size = sum(file.stat().st_size for file in config.parent.glob("*.safetensors"))
    if size:
      found.append((config.parent.name not in SHIPPED, size, config.parent))
  if not found:
    raise Fault("no checkpoint under weights/; name one with --weights, or get one (README.md, A real "
                "photograph)")
  return max(found)[-1]


def find_weights(name, root):
  """A folder, or a repository of the hub, looked for under root/weights and in Hugging Face's cache: what
  transformers has downloaded need not be downloaded again -> folder. None: see default_weights. Raises
  Fault."""
  if name is None:
    return default_weights(root)
  name, folder = str(name), Path(name)
  if name.endswith(".npz"):
    raise Fault(f"{name}: convert it once, python examples/big_vision.py {name} DIR, and name that folder")
  home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
  hub = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
  hub /= f"models--{name.replace('/', '--')}"
  main = hub / "refs" / "main"
  cached = hub / "snapshots" / (main.read_text().strip() if main.is_file() else "none")
  for place in (folder, root / "weights" / folder, root / "weights" / folder.name, cached):
    if name and os.path.exists(place):  # False of a name too long, too
      return place
  get = (f"; accept its licence at huggingface.co/{name}, then: hf download {name} --local-dir "
         f"weights/{folder.name}" if name.count("/") == 1 else "")
  raise Fault(f"{name}: no such folder, here, under weights/ or in Hugging Face's cache{get}")


SAMPLING = {
  "max_tokens": "longest answer (default: %(default)s)",
  "temperature": "0: always the likeliest token (default)", "top_k": "sample from the N likeliest tokens",
  "top_p": "sample from the likeliest tokens, of mass N together",
  "seed": "repeat a sample"}


def add_arguments(parser):
  parser.add_argument("--out", metavar="FILE", help="where boxes are drawn (default: IMAGE.boxes.png here)")


def words(args, root):
  """What vlm.py was given -> [*images, prompt]; the prompt is None where it is asked for. Raises Fault."""
  training = args.given & {"--train", "--steps", "--save"}
  if training and training != args.given - {"--device", "--quiet"} or training and not args.train:
    raise Fault("--train takes a folder, --steps, --save, --device and --quiet, and these three go with it "
                "only")
  if args.train and len(args.words) > 1:
    raise Fault("--train takes one folder, or none")
  *images, prompt = args.words or [root / "examples" / "shapes.png", "caption en"]
  if not images or os.path.isfile(prompt) or prompt == "-":
    images, prompt = [*images, prompt], None
  if args.train:
    return [*images, prompt]
  if prompt is None and len(images) == 1 and is_prompt(images[0]):
    raise Fault(f'a picture is missing: vlm.py IMAGE "{images[0]}"')
  if "-" in images:
    images = standard_input(images, prompt)
  check(args, images, prompt)
  return [*images, prompt if prompt is None else asked(prompt)]


TASKS = 'caption en, describe en, ocr, answer en QUESTION, detect A ; B, segment A'  # of mix checkpoints
FIRST = "caption", "cap", "describe", "ocr", "answer", "question", "detect", "segment"


def is_prompt(word):
  """Whether what stands where a picture is expected is a question: no file, nor the mistyped name of one."""
  known = word.split(" ")[0] in FIRST or " " in word and Path(word).suffix.lower() not in extensions()
  return known and not os.path.exists(word) and "://" not in word


def extensions():
  return {".heic", ".heif", *Image.registered_extensions()}


def asked(prompt):
  """A prompt as it is going to be asked: the objects of a list are parted as in training, by " ; ", and all
  else is as it was typed. A line says what may be wrong with it."""
  task, _, objects = prompt.partition(" ")
  if task in ("detect", "segment") and ";" in objects:
    typed, names = prompt, [part.strip() for part in objects.split(";")]
    prompt = f"{task} {' ; '.join(filter(None, names))}"
    if prompt != typed:
      log.info(f"asked as in training: {prompt}")
  elif task not in FIRST:
    log.info(f"mix checkpoints know {TASKS}; this is another prompt, and asked as it is")
  return prompt


def standard_input(images, prompt):
  """The names of pictures, `-` replaced by a file with what standard input holds, since it is read more than
  once. Raises Fault."""
  if prompt is None or images.count("-") > 1:
    raise Fault('"-" is one picture from standard input, and a prompt comes after it')
  if sys.stdin.isatty():
    raise Fault('"-" reads a picture from standard input, which is this terminal; pipe one into it')
  folder = tempfile.TemporaryDirectory(prefix="vlm-")
  atexit.register(folder.cleanup)
  path = Path(folder.name) / "stdin"
  path.write_bytes(sys.stdin.buffer.read())
  return [str(path) if name == "-" else name for name in images]


def check_picture(name, order=""):
  """What can be said of a picture's name. Raises Fault."""
  if re.match(r"\w+://", str(name)):
    raise Fault(f"{name} is an address; download it first: curl -LO {shlex.quote(str(name))}")
  if not os.path.exists(name):
    raise Fault(f"{name}: no such image{order}")
  allow_heic(name)


def allow_heic(name):
  """From then on a HEIC file can be opened like any other. Raises Fault."""
  if Path(name).suffix.lower() in (".heic", ".heif"):
    try:
      importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
      raise Fault(f"{name}: HEIC needs one more package: python -m pip install pillow-heif") from None


class Losses(logging.Handler):
  """The losses of a training as they are logged, of what it is shown and of what it is not -> loss.csv and loss.png in
  its folder, from the first minute on."""
  def __init__(self, folder):
    super().__init__()
    self.folder, self.losses, self.written = folder, [], time.monotonic()

  def emit(self, record):
    if not record.msg.endswith("held-out %.3f"):
      return
    step, steps, *losses = record.args
    self.losses.append((step, *losses))
    if step == steps or time.monotonic() > self.written + 20:
      self.write()

  def write(self):
    from . import draw
    self.written = time.monotonic()
    if self.losses:
      rows = "".join(f"{step},{shown},{held_out}\n" for step, shown, held_out in self.losses)
      write_whole(self.folder / "loss.csv", "step,loss,held_out_loss\n" + rows)
      curves = {"training loss": [row[:2] for row in self.losses],
                "held-out loss": [row[::2] for row in self.losses if row[0] % 50 == 1]}
      draw.curve(curves).save(picture := io.BytesIO(), "PNG")
      write_whole(self.folder / "loss.png", picture.getvalue())


def samples(args):
  """What --train is given to learn: [(picture, question, answer)], None: what it draws. Raises Fault."""
  from . import samples
  if args.steps < 1:
    raise Fault("--steps: at least 1")
  found = samples.read(args.words[0]) if args.words else None
  for path, *_ in found or ():
    allow_heic(path)
  what = f"{len(found)} pictures" if found else "4000 pictures of shapes that it draws"
  log.info(f"{args.save} is going to hold a small PaliGemma that learns, character by character, {what}: "
           f"{args.steps} steps, after compiling for half a minute. Ctrl-C ends it early, and saves.")
  log.handlers.insert(0, Losses(args.save))  # a loss that was shown is kept, whenever Ctrl-C comes
  return found


def trained(model, samples):
  """What the new model answers to samples that it was not shown."""
  for handler in log.handlers:
    if isinstance(handler, Losses):
      handler.write()  # Ctrl-C may have come between two times
  held = samples[len(samples) * 9 // 10:][:100]
  longest = max(len(model.tokenizer.encode(truth)) for *_, truth in held)
  answers = []
  for i in range(0, len(held), 20):
    pictures, questions, truths = zip(*held[i:i + 20])
    said = model.generate(pictures, questions, max_tokens=longest + 1)  # what is longer is wrong
    answers += [(truth, answer.text) for truth, answer in zip(truths, said)]
    bar(len(answers), len(held), "pictures that it has not seen")
  def line(text):
    return " ".join(text.split()) or "nothing"
  for truth, answer in answers[:8]:
    log.info(f"  {line(truth)}: {'right' if answer == truth else line(answer)}")
  right = sum(truth == answer for truth, answer in answers)
  log.info(f"{right} of {len(answers)} pictures that it has not seen are answered exactly. Ask it: "
           f'python vlm.py IMAGE "caption en" --weights {model.folder}')


def check_sampling(args):
  if args.given & {"--top-k", "--top-p", "--seed"} and not args.temperature:
    raise Fault("--top-k, --top-p and --seed choose among likely tokens: they need a --temperature above 0")


def check(args, images, prompt):
  """What can be wrong with a command line, before the slow part. Raises Fault."""
  check_sampling(args)
  order = "; pictures come first, then a prompt, with quotes around several words" if len(images) > 1 else ""
  for name in images:
    check_picture(name, order)
  if prompt and " " not in prompt and Path(prompt).suffix.lower() in extensions():
    raise Fault(f"{prompt}: no such image")  # a mistyped name is no question
  if args.out is not None:
    from . import draw
    draw.check_output(args.out, images)


# ---- 3. The answer ----


class Drawing:
  """The boxes of an answer on its picture. folder, device: of the model, for the decoder of masks."""
  def __init__(self, picture, answer, folder, device):
    self.picture, self.text, self.boxes, self.entries = picture, answer.text, answer.boxes, []
    self.masks, self.trouble = [None] * len(self.boxes), None
    if self.boxes:
      from . import draw
      try:
        masks = draw.Masks(folder, device)
        self.masks = [masks(box, *picture.size) for box in self.boxes]
      except Fault as e:
        self.trouble = e
      self.entries = [draw.entry(*pair) for pair in zip(self.boxes, self.masks)]

  def save(self, args, images):
    """What the boxes are, and a picture of them: where args.out says, or beside the name of the first of
    images, with a number from the second of a conversation on. Raises Fault."""
    if not self.text.strip():
      log.info("(no answer)")
    width = max([len(box.label) for box in self.boxes], default=0)
    for box in self.boxes:
      x1, y1, x2, y2 = map(round, box.box)
      log.info(f"{box.label:{width}}  ({x1}, {y1}) to ({x2}, {y2})")
    if self.boxes:
      from . import draw
      first = Path(args.out or draw.own_name(images[0]))
      args.drawn.append(first)
      count = args.drawn.count(first)
      out = first.with_stem(f"{first.stem}-{count}") if count > 1 else first
      draw.save_picture(draw.draw_boxes(self.picture, self.boxes, self.masks), out, images)
      log.info(f"{len(self.boxes)} {'box' if len(self.boxes) == 1 else 'boxes'} drawn: {out}")
    elif args.out:
      log.info(f"no boxes in the answer: {args.out} not written")
    if self.trouble and self.trouble.code:
      raise self.trouble
    if self.trouble:
      log.info(str(self.trouble))


HELP = (f"prompts: {TASKS}", ":image FILE  another picture", ":help        these lines",
        ":quit        leaves, as an empty line and Ctrl-D do; Ctrl-C ends an answer")


def read_line(prompt):
  """A line that was typed, "" at the end of the input. The prompt is on stderr, unless all is one terminal:
  there the line can be edited, and the arrow keys bring older ones back."""
  if sys.stdin.isatty() and sys.stdout.isatty():
    with contextlib.suppress(ImportError):  # Windows has none
      importlib.import_module("readline")
    try:
      return input(prompt)
    except EOFError:
      print()  # the shell's prompt has a line of its own
      return ""
  print(prompt, end="", file=sys.stderr, flush=True)
  return sys.stdin.readline()


def find_picture(name, open_image):
  """The name of a picture as typed, with ~, or as a terminal writes a file that was dropped on it -> the name
  of a picture that can be opened. Raises Fault."""
  if not os.path.exists(name):
    with contextlib.suppress(ValueError):  # a quote without its other half
      name = " ".join(shlex.split(name)) or name
  name = os.path.expanduser(name)
  check_picture(name)
  open_image(name)
  return name


def loop(question, images, open_image):
  """Question after question, until an empty line or the end of the input -> exit code."""
  log.info("ask about the picture; :image FILE changes it, :help tells more, an empty line leaves")
  while True:
    try:
      line = read_line(f"{some([Path(name).name for name in images], most=1)}> ").strip()
    except KeyboardInterrupt:  # drops the line, as in a shell
      print(file=sys.stderr)
      continue
    command, _, name = line.partition(" ")
    try:
      if command in ("", ":quit"):
        return 0
      if command == ":image":
        images = [find_picture(name.strip(), open_image)]
      elif command == ":help":
        print(*HELP, sep="\n", file=sys.stderr)
      elif command.startswith(":"):
        raise Fault(f"{command}: no such command; there are :image FILE, :help and :quit")
      else:
        question(images, asked(line))
    except KeyboardInterrupt:  # ends an answer, not the conversation
      print()
      log.info("stopped")
    except Fault as e:
      log.critical(f"vlm: {e}")
