"""A toy world for a tiny PaliGemma: pictures of coloured shapes, and questions about them in PaliGemma's own
prompts.

    python examples/shapes.py --make DIR [--count N] [--seed S]   # pictures, and a question about each
    python examples/shapes.py --eval [--weights DIR]              # measure a checkpoint on scenes new to it
    python examples/shapes.py --example [DIR]                     # the few larger pictures beside this file

Every question has exactly one right answer: a scene about which two captions could be defended is drawn
again, and a borderline question is not asked. Pixels are (x, y) from the top left corner, boxes (x1, y1, x2,
y2). """
import functools
import io
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import vlm  # first, because it says what is not installed
import numpy as np
from PIL import Image, ImageDraw
import batch

ROOT = Path(vlm.__file__).resolve().parent  # where weights/ is
TRAIN_SEED, VALID_SEED, TEST_SEED, EXAMPLE_SEED = 1, 2, 3, 4
COLORS = {"red": (214, 36, 40), "green": (36, 158, 62), "blue": (40, 84, 216), "yellow": (236, 210, 36),
          "purple": (142, 48, 186), "orange": (236, 128, 28)}
CORNERS = {"circle": 64, "square": 4, "triangle": 3, "star": 10}  # a circle has so many that none shows
TILT = {"circle": 0, "square": .3, "triangle": .5, "star": .6}    # radians to either side; no diamonds
NAMES = [f"{color} {shape}" for color in COLORS for shape in CORNERS]
SIDES = ("left of", "right of", "above", "below")
COUNTS = (.15, .35, .25, .25)  # shares of scenes with one, two, three and four objects
SIZES = ((.45, .90), (.30, .65), (.25, .55), (.25, .50))  # in shorter sides of the picture, by their number
GAP = .06                      # least distance of two centres in x, in widths: left to right is never a tie
CLEAR, NEAR = 1.4, .10         # see sides()
SHARED = .20                   # a shape has at most this much of its area in common with others
PLACES = 128                   # see locations()
ABSENT, OFTEN = .15, .25       # how often what a detect prompt names is not in the picture: measured, trained
# Weights of the kinds of question. To find what a prompt names is learnt last, so that is asked most.
MIX = {"caption": .20, "detect": 1.1, "how many": .08, "color": .16, "relation": .16}
SEGMENT = 2.0                  # weight of segment questions, asked where a codebook is: only tilt is hard
BATCH, MAX_TOKENS = 25, 40     # of --eval, constant so that a model compiles once; four boxes are 27 tokens


# ---- 1. Scenes ----


@dataclass(frozen=True)
class Object:
  shape: str
  color: str
  box: tuple              # of the whole shape, in pixels; a part may be hidden by a later object
  coverage: Image.Image = field(repr=False, compare=False)  # "L", as large as the picture, smooth edges

  @property
  def name(self):
    return f"{self.color} {self.shape}"

  @property
  def center(self):
    x1, y1, x2, y2 = self.box
    return (x1 + x2) / 2, (y1 + y2) / 2


@dataclass(frozen=True)
class Scene:
  image: Image.Image
  objects: tuple          # in the order in which they were painted


def mask(obj):
  """bool (height, width): the whole shape, with what other shapes hide of it."""
  return np.asarray(obj.coverage) > 127


def place(rng, color, shape, width, height, smallest, largest):
  """An Object of random size, tilt and position inside the picture. smallest, largest: see SIZES."""
  size, tilt, x, y = rng.random(4).tolist()
  size = (smallest + size * (largest - smallest)) * min(width, height)
  corner = np.arange(CORNERS[shape])
  first = 1 / 8 if shape == "square" else 1 / 4  # of a turn, where the corners begin
  angle = (corner / len(corner) - first) * 2 * np.pi + (2 * tilt - 1) * TILT[shape]
  radius = np.where(corner % 2, .42, 1) if shape == "star" else 1
  points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)  # (corners, 2)
  points -= points.min(0)
  points *= size / points.max()
  w, h = points.max(0).tolist()
  x, y = 1 + x * (width - w - 2), 1 + y * (height - h - 2)
  left, top = int(x), int(y)
  # Only the shape is drawn three times too large and reduced: smooth edges for little time.
  canvas = Image.new("L", (3 * (int(x + w) + 1 - left), 3 * (int(y + h) + 1 - top)))
  ImageDraw.Draw(canvas).polygon((3 * (points + (x - left, y - top))).ravel().tolist(), fill=255)
  coverage = Image.new("L", (width, height))
  coverage.paste(canvas.reduce(3), (left, top))
  return Object(shape, color, (x, y, x + w, y + h), coverage)


def sides(subject, other, width, height):
  """On which sides of `subject` the centre of `other` lies: one of SIDES if that is clear, two if it is not.

  Distances are in widths and heights of the picture, as the model sees it, stretched to a square. A side is
  clear if the distance on its axis is at least NEAR, and at least CLEAR times the distance on the other axis.
  """
  dx = (other.center[0] - subject.center[0]) / width
  dy = (other.center[1] - subject.center[1]) / height
  across, along = "left of" if dx < 0 else "right of", "above" if dy < 0 else "below"
  if abs(dx) >= max(NEAR, CLEAR * abs(dy)):
    return [across]
  if abs(dy) >= max(NEAR, CLEAR * abs(dx)):
    return [along]
  return [across, along]


def stays_clear(new, objects, pair, width, height):
  """Whether `new` may be painted over `objects` with no answer ambiguous and no shape hard to recognise.
  pair: these two will be all, and the caption will tell how they lie."""
  painted = mask(new)
  for old in objects:
    x, y = old.center
    if abs(new.center[0] - x) < GAP * width or pair and len(sides(old, new, width, height)) > 1:
      return False
    if painted[int(y), int(x)]:  # a hidden centre
      return False
    if old.color == new.color and (painted & mask(old)).any():  # they would melt into one shape
      return False
  masks = [mask(obj) for obj in objects] + [painted]
  several = np.sum(masks, 0, np.uint8) > 1  # (height, width)
  return all(np.count_nonzero(m & several) <= SHARED * np.count_nonzero(m) for m in masks)


def arrange(rng, names, width, height):
  """Tuple of one Object for each name, or None if chance found no room for one."""
  objects = ()
  for name in names:
    tries = (place(rng, *name.split(), width, height, *SIZES[len(names) - 1]) for _ in range(12))
    new = next((obj for obj in tries if stays_clear(obj, objects, len(names) == 2, width, height)), None)
    if new is None:
      return None
    objects += (new,)
  return objects


def background(rng, width, height):
  """RGB picture: flat, a gradient or soft stripes between two greyish tones, no colour that a shape could
  have."""
  grey = rng.uniform(50, 220)
  first = grey + rng.uniform(-10, 10, 3)
  second = grey + rng.choice([-1, 1]) * rng.uniform(8, 40) + rng.uniform(-10, 10, 3)
  kind, angle = rng.integers(3), rng.uniform(0, 2 * np.pi)
  x, y = np.cos(angle) * np.arange(width), np.sin(angle) * np.arange(height)
  x, y = x - x.min(), y - y.min()
  # An index a pixel into 256 tones: a gradient runs through them once, stripes let it wrap around.
  step = (0, 255 / (x.max() + y.max()), 256 / rng.uniform(14, 70))[kind]
  index = (x * step).astype(np.uint16) + (y * step).astype(np.uint16)[:, None]  # (height, width)
  ramp = (np.zeros(256), np.linspace(0, 1, 256), .5 - .5 * np.cos(np.arange(256) * np.pi / 128))[kind]
  image = Image.fromarray(index.astype(np.uint8))
  image.putpalette((first + ramp[:, None] * (second - first)).clip(16, 239).astype(np.uint8).tobytes())
  return image.convert("RGB")


@functools.cache
def noise():
  """uint8 (4, 576, 576, 3) of four strengths, the first none; drawing it anew for each picture would take
  longer than all the rest. Negative values wrap around: added to a picture within 16..239, they wrap back."""
  normal = np.random.default_rng(0).standard_normal((576, 576, 3), np.float32)
  return np.stack([(normal * s).round().clip(-16, 16).astype(np.int8).view(np.uint8) for s in (0, 2, 4, 6)])


def scene(seed, i, size=None, most=4):
  """Scene number i of a seed, whatever was drawn before. size: (width, height), 64 to 512 each; if None, the
  sides vary from 96 to 320 and the aspect ratio up to 2."""
  rng = np.random.default_rng((seed, i))
  longer = int(rng.integers(112, 321))
  shorter = round(longer / rng.uniform(1, min(2, longer / 96)))
  width, height = size or rng.permutation([longer, shorter]).tolist()
  if not 64 <= min(width, height) <= max(width, height) <= 512:
    raise ValueError(f"size {width} x {height}: each side must be 64 to 512 pixels")
  count, objects = rng.choice(most, p=np.array(COUNTS[:most]) / sum(COUNTS[:most])) + 1, None
  while objects is None:  # names without replacement: no two objects have both colour and shape in common
    objects = arrange(rng, rng.choice(NAMES, count, replace=False).tolist(), width, height)
  image = background(rng, width, height)
  for obj in objects:
    shade = (COLORS[obj.color] + rng.integers(-14, 15, 3)).clip(16, 239)
    image.paste(tuple(shade.tolist()), mask=obj.coverage)
  strength, x, y = rng.integers((4, 65, 65))
  return Scene(Image.fromarray(np.asarray(image) + noise()[strength, y:y + height, x:x + width]), objects)


# ---- 2. Questions and answers ----


def left_to_right(objects):
  return sorted(objects, key=lambda obj: obj.center[0])


def caption(scene):
  """One object: "a red circle". Two: "A above B" or "A left of B", on the axis that separates the centres
  clearly (see sides). Three or four, left to right by centre: "a red circle, a blue square and an orange
  star"."""
  objects = left_to_right(scene.objects)
  names = [f"{'an' if obj.color == 'orange' else 'a'} {obj.name}" for obj in objects]
  if len(objects) == 2:
    [side] = sides(objects[1], objects[0], *scene.image.size)
    return f"{names[1]} above {names[0]}" if side == "below" else f"{names[0]} {side} {names[1]}"
  return ", ".join(names[:-1]) + (" and " if names[1:] else "") + names[-1]


def singles(scene):
  """The objects that are alone of their shape, which "the star" therefore names."""
  shapes = [obj.shape for obj in scene.objects]
  return [obj for obj in scene.objects if shapes.count(obj.shape) == 1]


def relations(scene):
  """List of (prefix, suffix): what lies on one side of a shape that is alone of its kind. Asked only if
  exactly one object is clearly there and none on the border between this side and another."""
  asked = []
  for subject in singles(scene):
    others = [(obj, sides(subject, obj, *scene.image.size)) for obj in scene.objects if obj is not subject]
    for side in SIDES:
      there = [(obj, found) for obj, found in others if side in found]
      if len(there) == 1 and there[0][1] == [side]:
        asked.append((f"answer en what is {side} the {subject.shape}?", there[0][0].name))
  return asked


def questions(scene):
  """Kind -> list of all its (prefix, suffix), which may be empty; detect, of which there are too many, is
  left out."""
  return {
    "caption": [("caption en", caption(scene))],
    "how many": [("answer en how many shapes are there?", str(len(scene.objects)))],
    "color": [(f"answer en what color is the {obj.shape}?", obj.color) for obj in singles(scene)],
    "relation": relations(scene)}


def wanted(scene, label):
  """The objects that "red circle" or "circle" names in a detect prompt, left to right by centre."""
  return left_to_right(obj for obj in scene.objects if label in (obj.name, obj.shape))


def locations(box, width, height):
  """Box in pixels -> "<locY1><locX1><locY2><locX2>", 1023rds of the picture's own height and width. Rounded
  to PLACES of them: finer than the model's pixels they would be noise, over which a likeliest token spreads
  so thin that the end of the answer is likelier."""
  x1, y1, x2, y2 = box
  values = np.array([y1 / height, x1 / width, y2 / height, x2 / width])
  places = (values * PLACES).round().clip(0, PLACES) / PLACES
  return "".join(f"<loc{n:04d}>" for n in (places * 1023).round().astype(int))


def detect(scene, rng, asked=(), absence=ABSENT):
  """A random (prefix, suffix) not in `asked`, for one to three names or shapes, some of them absent. The
  answer has the order of the prompt, and left to right within a label; absent labels are left out, so it may
  be empty."""
  names = rng.random() < .6  # "red circle", otherwise "circle"
  present = list(dict.fromkeys(obj.name if names else obj.shape for obj in scene.objects))
  absent = [label for label in (NAMES if names else CORNERS) if label not in present]
  if names and rng.random() < .5:  # a shape that is there, in another colour: harder to refuse
    absent = [label for label in absent if label.split()[1] in [obj.shape for obj in scene.objects]]
  labels = []
  for _ in range(rng.choice(3, p=(.55, .35, .10)) + 1):
    if pool := absent if absent and rng.random() < absence else present:
      labels.append(pool.pop(rng.integers(len(pool))))
  found = [f"{locations(obj.box, *scene.image.size)} {label}"
           for label in labels for obj in wanted(scene, label)]
  question = "detect " + " ; ".join(labels), " ; ".join(found)
  return detect(scene, rng, asked, absence) if question in asked else question


def segment(scene, name, codes):
  """(prefix, suffix) for one name: its box, 16 codes of the whole shape in it, and the name; an empty answer
  if it is not there. codes: (coverage, box) of an Object -> "<seg000>...", see codebook.tokens."""
  found = [f"{locations(obj.box, *scene.image.size)}{codes(obj.coverage, obj.box)} {name}"
           for obj in scene.objects if obj.name == name]
  return f"segment {name}", "".join(found)


def tasks(scene, rng):
  """List of (prefix, suffix): all that can be asked of a scene, with five of its many detect questions."""
  asked = sum(questions(scene).values(), [])
  for _ in range(5):
    asked.append(detect(scene, rng, asked))
  return asked


def examples(seed, i, k, most=4, codes=None):
  """-> picture, list of k different (prefix, suffix) about it, in random order; k up to 20. codes: see
  segment()."""
  drawn, rng = scene(seed, i, most=most), np.random.default_rng((seed, i, 1))
  pools = questions(drawn)
  mix = MIX | {"segment": SEGMENT} if codes else MIX
  if codes:
    present = [obj.name for obj in drawn.objects]
    absent = str(rng.choice([name for name in NAMES if name not in present]))
    pools["segment"] = present + [absent] * (rng.random() < ABSENT * 3)
  kinds = [kind for kind in mix if kind == "detect" or pools[kind]]
  edges = np.cumsum([mix[kind] for kind in kinds])
  # k even steps from a random start, not k independent draws: the shares are right for any k, and repeats are
  # rare.
  steps = (rng.random() + rng.permutation(k)) / k * edges[-1]
  asked = []
  for kind in np.searchsorted(edges, steps):
    pool = pools.get(kinds[kind])  # none for detect; an emptied one also becomes a detect question
    if pool:
      question = pool.pop(rng.integers(len(pool)))
      asked.append(segment(drawn, question, codes) if kinds[kind] == "segment" else question)
    else:
      asked.append(detect(drawn, rng, asked, OFTEN))
  return drawn.image, asked


def example(seed, i):
  """-> picture, prefix, suffix: one random question."""
  image, [(prefix, suffix)] = examples(seed, i, 1)
  return image, prefix, suffix


# ---- 3. Tokenizer ----


def make_tokenizer(path):
  """Write the toy's tokenizer."""
  Path(path).write_bytes(tokenizer_model())


@functools.cache
def tokenizer_model():
  """-> the bytes of a SentencePiece model of 424 pieces with Gemma's options, in which every word of the questions and
  answers, with its leading space, is one piece. The ids of <loc>, <seg> and <image> follow its own, as in hub
  checkpoints."""
  import sentencepiece
  first = ["a", "an", "caption", "answer", "detect", "segment", *COLORS, *CORNERS]
  inner = ("a an and en how many shapes are there what color is the left right of above below ;".split()
           + [*COLORS, *CORNERS])
  model = io.BytesIO()  # a file name would become part of the model
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(10 * (first + [f"? {word}" for word in inner])), model_writer=model,
    vocab_size=424, model_type="bpe", byte_fallback=True, split_digits=True, num_threads=1,
    normalization_rule_name="identity",
    add_dummy_prefix=False, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2,
    required_chars="abcdefghijklmnopqrstuvwxyz0123456789,;?", pad_id=0, eos_id=1, bos_id=2, unk_id=3,
    pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
    user_defined_symbols=["<mask>", "\n", "\n\n", "\n\n\n", "\u2581\u2581", "\u2581\u2581\u2581"])
  return model.getvalue()


# ---- 4. Measuring a model ----

GOALS = {  # kind: title, must, aim
  "caption": ("caption, exact match", .85, .97), "how many": ("how many", .95, .99),
  "color": ("what color", .95, .99),
  "relation": ("left, right, above, below", .85, .95), "detect": ("detect, all boxes right", .85, .97),
  "iou": ("detect, mean IoU", .75, .90), "segment": ("segment, mean IoU", .75, .85)}


def iou(a, b):
  """Intersection over union of two boxes."""
  w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
  shared = max(w, 0) * max(h, 0)
  return shared / (sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b)) - shared or 1)


def overlap(a, b):
  """Intersection over union of two masks."""
  return np.count_nonzero(a & b) / max(np.count_nonzero(a | b), 1)


def match(truth, found):
  """Two lists of (label, box) -> the IoU of each pair, best first: one label, some overlap, no box in two
  pairs."""
  pairs = [(iou(box, other), t, f) for t, (label, box) in enumerate(truth)
           for f, (guess, other) in enumerate(found) if guess == label]
  kept = []
  for overlap, t, f in sorted(pairs, reverse=True):
    if overlap > 0 and all(t != t2 and f != f2 for _, t2, f2 in kept):
      kept.append((overlap, t, f))
  return [overlap for overlap, _, _ in kept]


def evaluate(model, count):
  """Ask one question of each kind about `count` held-out scenes and print a table -> whether every must is
  met."""
  masks = vlm.beside("draw").Masks(model.folder, model.device)
  asked = []  # (kind, scene, prefix, suffix)
  for i in range(count):
    drawn, rng = scene(TEST_SEED, i), np.random.default_rng((TEST_SEED, i, 2))
    pools = questions(drawn) | {"detect": [detect(drawn, rng)]}
    asked += [(kind, drawn, *pool[rng.integers(len(pool))]) for kind, pool in pools.items() if pool]
    if masks.path:  # without a decoder nothing can be drawn
      name = drawn.objects[rng.integers(len(drawn.objects))].name
      asked.append(("segment", drawn, f"segment {name}", None))
  asked.sort(key=lambda question: question[0])  # prompts of like length share a batch
  results = {kind: [] for kind in GOALS}
  answers = batch.answer_all(model, [(drawn.image, prefix) for _, drawn, prefix, _ in asked], BATCH,
                             max_tokens=MAX_TOKENS)
  for done, ((kind, drawn, prefix, suffix), answer) in enumerate(zip(asked, answers), 1):
    vlm.terminal.bar(done, len(asked), "questions asked")
    if kind == "detect":
      labels = prefix.removeprefix("detect ").split(" ; ")
      truth = [(label, obj.box) for label in labels for obj in wanted(drawn, label)]
      overlaps = match(truth, [(found.label, found.box) for found in answer.boxes])
      results["iou"] += overlaps
      results[kind].append(sum(o > .5 for o in overlaps) == len(truth) == len(answer.boxes))
    elif kind == "segment":
      [truth] = wanted(drawn, prefix.removeprefix("segment "))
      found = [box for box in answer.boxes if box.label == truth.name and box.codes]
      drawable = len(found) == 1
      results[kind].append(overlap(mask(truth), masks(found[0], *drawn.image.size)) if drawable else 0)
    else:
      results[kind].append(answer.text.strip() == suffix)
  vlm.log.debug("")
  print(f"{'':27}     n  measured   must    aim")
  met = True
  for kind, (title, must, aim) in GOALS.items():
    measured = float(np.mean(results[kind] or [0]))
    met &= measured >= must
    note = "" if measured >= must else "  too low"
    print(f"{title:27}{len(results[kind]):6}{measured:10.3f}{must:7.2f}{aim:7.2f}{note}")
  return met


# ---- 5. Command line ----

# Numbers of scenes chosen by eye, without noise, so that the files are small.
EXAMPLES = {"shapes.png": 120, "shapes-one.png": 106, "shapes-two.png": 129, "shapes-four.png": 156,
            "shapes-overlap.png": 176}


def make(folder, count, seed):
  """Pictures and data.jsonl, one question a picture, as train.py takes them."""
  folder.mkdir(parents=True, exist_ok=True)
  for name in ("data.jsonl", *(f"{i:06d}.png" for i in range(count))):
    if os.path.lexists(folder / name):
      raise vlm.Fault(f"{folder / name} is there already and would be lost; choose another folder")
  with open(folder / "data.jsonl", "x") as lines:
    for i in range(count):
      image, prefix, suffix = example(seed, i)
      image.save(folder / f"{i:06d}.png")
      lines.write(json.dumps({"image": f"{i:06d}.png", "prefix": prefix, "suffix": suffix}) + "\n")


def make_examples(folder):
  folder.mkdir(parents=True, exist_ok=True)
  for name, i in EXAMPLES.items():
    drawn, data = scene(EXAMPLE_SEED, i, (448, 336)), io.BytesIO()
    drawn.image.save(data, "PNG")
    path = folder / name
    if folder != Path(__file__).resolve().parent and path.exists() and path.read_bytes() != data.getvalue():
      raise vlm.Fault(f"{path} is there already and would be lost; choose another folder")
    path.write_bytes(data.getvalue())
    print(f"{name}: {caption(drawn)}")


def arguments(argv):
  """-> the options on a command line, without those that say nothing to what is to be done. Raises Fault."""
  # resolve: --weights has another default here
  p = vlm.terminal.ArgumentParser(prog="shapes.py", allow_abbrev=False, conflict_handler="resolve",
                 description="A toy world of coloured shapes: make pictures, measure a model.")
  vlm.add_arguments(p, answers=False)
  group = p.add_mutually_exclusive_group(required=True)
  group.add_argument("--make", metavar="DIR", type=Path, help="write pictures and data.jsonl there")
  group.add_argument("--eval", action="store_true", help="measure a model; exit code 1 if it misses a must")
  group.add_argument("--example", metavar="DIR", type=Path, nargs="?", const=Path(__file__).resolve().parent,
                     help="write the example pictures (default: beside this file)")
  p.add_argument("--count", type=int, metavar="N", help="pictures of --make (default 100)")
  p.add_argument("--seed", type=int, metavar="S", help=f"of the pictures of --make (default {TRAIN_SEED})")
  p.add_argument("--scenes", type=int, metavar="N", help="held-out scenes of --eval (default 500)")
  p.add_argument("--weights", metavar="DIR", help="what --eval measures (default weights/toy)")
  p.set_defaults(quiet=None)
  args = p.parse_args(argv)
  action = "eval" if args.eval else "make" if args.make else "example"
  defaults = {"make": {"count": 100, "seed": TRAIN_SEED},
              "eval": {"scenes": 500, "weights": ROOT / "weights" / "toy", "device": None, "quiet": False}}
  for owner, options in defaults.items():
    for option, default in options.items():
      if getattr(args, option) is None:
        setattr(args, option, default)
      elif owner != action:
        raise vlm.Fault(f"--{option} goes with --{owner}")
  for option, least in (("count", 1), ("seed", 0), ("scenes", 1)):
    if getattr(args, option) < least:
      raise vlm.Fault(f"--{option}: at least {least}")
  return args


@vlm.program
def main(argv):
  args = arguments(argv)
  if args.eval:
    return 0 if evaluate(vlm.open_model(args), args.scenes) else 1
  try:
    make(args.make, args.count, args.seed) if args.make else make_examples(args.example)
  except OSError as e:
    raise vlm.Fault(f"{args.make or args.example}: {e.strerror}; choose another folder", code=1) from None


if __name__ == "__main__":
  sys.exit(main())
