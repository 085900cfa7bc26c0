"""What a person at a terminal meets beyond the answer itself: what is being done, boxes and masks on the picture, one
question after another, where a model is found, and what to type instead. Imports nothing of vlm, which hands over the
model's folder and the answer."""
import argparse
import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

from PIL import Image

from tokenizer import Fault

log = logging.getLogger("vlm")
MOVED = {"--init": "train", "--resume": "train", "--batch": "batch", "--batch-size": "batch",
         "--show": "show", "--layer": "show", "--quantize": "quantize", "--save": "quantize", "--shard": "shard"}


# ---- 1. What is being done ----


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
  """What vlm logs, on stderr. Of debug, which tells what is being done, a terminal shows the last line only, with a bar
  if its first two arguments are how many are done and how many there are."""
  def __init__(self):
    super().__init__()
    self.start = self.shown = time.monotonic()

  def emit(self, record):
    text, terminal, now = record.getMessage(), sys.stderr.isatty(), time.monotonic()
    done, total, *_ = (record.args or (0, 0))
    if done == 1:
      self.start = now
    if total:
      if now < self.shown + (0.1 if terminal else 2) and not (terminal and done in (1, total)):
        return  # a line every two seconds, where each stays
      self.shown, left = now, (now - self.start) / max(done - 1, 1) * (total - done)
      text = f"[{'#' * (20 * done // total):20}] {text}" + (f", {left:.0f} s left" if done > 1 else "")
    if record.levelno > logging.DEBUG or total and not terminal:
      print(f"\r\033[K{text}" if terminal else text, file=sys.stderr, flush=True)
    elif terminal:
      print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


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
    return args


SHIPPED = "toy", "tiny1", "tiny2", "tiny2-28b"


def default_weights(root):
  """The largest checkpoint under root/weights; what was downloaded or trained comes before what ships. Raises Fault."""
  found = []
  for config in root.glob("weights/*/config.json"):
    size = sum(file.stat().st_size for file in config.parent.glob("*.safetensors"))
    if size:
      found.append((config.parent.name not in SHIPPED, size, config.parent))
  if not found:
    raise Fault("no checkpoint under weights/; name one with --weights, or get one (README.md, A real photograph)")
  return max(found)[-1]


def find_weights(name, root):
  """A folder, or a repository of the hub, looked for under root/weights and in Hugging Face's cache: what transformers
  has downloaded need not be downloaded again -> folder. None: see default_weights. Raises Fault."""
  if name is None:
    return default_weights(root)
  name, folder = str(name), Path(name)
  if name.endswith(".npz"):
    raise Fault(f"{name}: convert it once, python examples/big_vision.py {name} DIR, and name that folder")
  home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
  hub = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser() / f"models--{name.replace('/', '--')}"
  main = hub / "refs" / "main"
  cached = hub / "snapshots" / (main.read_text().strip() if main.is_file() else "none")
  for place in (folder, root / "weights" / folder, root / "weights" / folder.name, cached):
    if name and os.path.exists(place):  # False of a name too long, too
      return place
  get = (f"; accept its licence at huggingface.co/{name}, then: hf download {name} --local-dir weights/{folder.name}"
         if name.count("/") == 1 else "")
  raise Fault(f"{name}: no such folder, here, under weights/ or in Hugging Face's cache{get}")


SAMPLING = {
  "max_tokens": "longest answer (default: %(default)s)", "temperature": "0: always the likeliest token (default)",
  "top_k": "sample from the N likeliest tokens", "top_p": "sample from the likeliest tokens, of mass N together",
  "seed": "repeat a sample"}


def add_arguments(parser):
  parser.add_argument("--out", metavar="FILE", help="where boxes are drawn (default: IMAGE.boxes.png here)")


def words(args, root):
  """What vlm.py was given -> [*images, prompt]; the prompt is None where it is asked for. Raises Fault."""
  training = args.given & {"--train", "--steps", "--save"}
  if training and training != args.given - {"--device", "--quiet"} or training and not args.train:
    raise Fault("--train takes a folder, --steps, --save, --device and --quiet, and these three go with it only")
  if args.train and len(args.words) > 1:
    raise Fault("--train takes one folder, or none")
  *images, prompt = args.words or [root / "examples" / "shapes.png", "caption en"]
  if not images or os.path.isfile(prompt):
    images, prompt = [*images, prompt], None
  if not args.train:
    check(args, images, prompt)
  return [*images, prompt]


class Losses(logging.Handler):
  """A training's loss as it is logged -> loss.csv and loss.png in its folder, from the first minute on."""
  def __init__(self, folder):
    super().__init__()
    self.folder, self.losses, self.written = folder, [], time.monotonic()

  def emit(self, record):
    if record.levelno > logging.DEBUG or len(record.args) < 3:
      return
    step, steps, loss = record.args
    self.losses.append((step, loss))
    if step == steps or time.monotonic() > self.written + 20:
      self.write()

  def write(self):
    from . import draw
    self.written = time.monotonic()
    if self.losses:
      rows = "".join(f"{step},{loss}\n" for step, loss in self.losses)
      (self.folder / "loss.csv").write_text("step,loss\n" + rows)
      draw.curve({"training loss": self.losses}).save(self.folder / "loss.png")


def samples(args):
  """What --train is given to learn: [(picture, question, answer)], None if it is to draw that. Raises Fault."""
  from . import samples
  if args.steps < 1:
    raise Fault("--steps: at least 1")
  found = samples.read(args.words[0]) if args.words else None
  log.info(f"{args.save} is going to hold a small PaliGemma that learns, character by character, "
           f"{f'{len(found)} pictures' if found else '4000 pictures of shapes that it draws'}: {args.steps} steps, after "
           "compiling for half a minute. Ctrl-C ends it early, and saves.")
  log.addHandler(Losses(args.save))
  return found


def trained(model, samples):
  """What the new model answers to samples that it was not shown."""
  for handler in log.handlers:
    if isinstance(handler, Losses):
      handler.write()  # Ctrl-C may have come between two times
  held = samples[len(samples) * 9 // 10:][:100]
  answers = []
  for done, (picture, question, truth) in enumerate(held, 1):
    [answer] = model.generate([picture], [question])
    answers.append((truth, answer.text))
    bar(done, len(held), "pictures that it has not seen")
  for truth, answer in answers[:8]:
    log.info(f"  {truth}: {'right' if answer == truth else answer}")
  log.info(f"{sum(truth == answer for truth, answer in answers)} of {len(answers)} pictures that it has not seen are answered "
           f'exactly. Ask it: python vlm.py IMAGE "caption en" --weights {model.folder}')


def check(args, images, prompt):
  """What can be wrong with a command line, before the slow part. Raises Fault."""
  if not args.temperature and args.given & {"--top-k", "--top-p", "--seed"}:
    raise Fault("--top-k, --top-p and --seed choose among likely tokens: they need a --temperature above 0")
  absent = [name for name in images if not os.path.exists(name)]
  if absent:
    order = "; pictures come first, then a prompt, with quotes around several words" if len(images) > 1 else ""
    raise Fault(f"{absent[0]}: no such image{order}")
  if prompt and " " not in prompt and Path(prompt).suffix.lower() in Image.registered_extensions():
    raise Fault(f"{prompt}: no such image")  # a mistyped name is no question
  if args.out is not None:
    from . import draw
    draw.check_output(args.out, images)


# ---- 3. The answer ----


class Drawing:
  """The boxes of an answer on its picture. folder, device: of the model, for the decoder of masks."""
  def __init__(self, picture, boxes, folder, device):
    self.picture, self.boxes, self.entries = picture, boxes, []
    self.masks, self.trouble = [None] * len(boxes), None
    if boxes:
      from . import draw
      try:
        masks = draw.Masks(folder, device)
        self.masks = [masks(box, *picture.size) for box in boxes]
      except Fault as e:
        self.trouble = e
      self.entries = [draw.entry(*pair) for pair in zip(boxes, self.masks)]

  def save(self, args, images):
    """Where args.out says, or beside the name of the first of images. Raises Fault."""
    if self.boxes:
      from . import draw
      out = args.out or draw.own_name(images[0])
      draw.save_picture(draw.draw_boxes(self.picture, self.boxes, self.masks), out, images)
      log.info(f"{len(self.boxes)} {'box' if len(self.boxes) == 1 else 'boxes'} drawn: {out}")
    elif args.out:
      log.info(f"no boxes in the answer: {args.out} not written")
    if self.trouble and self.trouble.code:
      raise self.trouble
    if self.trouble:
      log.info(str(self.trouble))


def loop(question, images, open_image):
  """Question after question, until an empty line or the end of the input -> exit code."""
  log.info("ask about the picture; :image FILE changes it; an empty line leaves")
  while True:
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline().strip()
    if not line:
      return 0
    try:
      if line.startswith(":image"):
        name = line.removeprefix(":image").strip()
        open_image(name)
        images = [name]
      else:
        question(images, line)
    except KeyboardInterrupt:  # ends an answer, not the conversation
      print()
    except Fault as e:
      print(f"vlm: {e}", file=sys.stderr)
