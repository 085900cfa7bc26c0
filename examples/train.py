"""Training: the toy world from random weights, or a folder of pictures on top of a checkpoint.

    python examples/train.py
    python examples/train.py DATA --init weights/paligemma-3b-pt-224
    python examples/train.py DATA --init weights/paligemma-3b-pt-224 --part attention
    python examples/train.py DATA --eval --weights weights/paligemma-3b-pt-224 --adapter OUT
    python examples/train.py --merge OUT --init weights/paligemma-3b-pt-224 --save weights/merged

A data folder holds pictures and a data.jsonl with lines {"image": file, "prefix": question, "suffix":
answer}, the format of PaliGemma's own fine-tunes. A run's folder (--save) is a complete PaliGemma folder, or
with --part lora an adapter, see lora.py; and training.state (what --resume needs), loss.csv and loss.png.
"""
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import weakref
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import vlm  # first, because it says what is not installed
import numpy as np
from safetensors import SafetensorError, safe_open
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict
import by_layer
import checkpoint
import codebook
import samples
import score
import shapes
from tokenizer import CODES, LOC, Tokenizer, regular
from vlm import Fault

try:
  from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # Windows: nobody keeps two runs from writing to one folder
  flock = None

ROOT = Path(vlm.__file__).resolve().parent  # where weights/ is
REPORTS = 40   # times in a run: held-out loss, a sample answer, a checkpoint
LARGE = 500_000_000  # weights: from there on LoRA, layer by layer, and few reports are the defaults
lora = vlm.beside("lora")
KNOWN = 8      # held-out questions of a data folder that a report asks
QUESTIONS = 4  # about a toy picture at once: SigLIP runs once for all, and what is asked has to be heeded
TOY = {
  "model_type": "paligemma", "architectures": ["PaliGemmaForConditionalGeneration"], "dtype": "float32",
  "note": "this is the toy: it knows only pictures like examples/shapes.png (real weights: see README.md)",
  "image_token_index": 424 + 1024 + 128, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
  "hidden_size": 128, "projection_dim": 128,
  "vision_config": {
    "model_type": "siglip_vision_model", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "image_size": 112, "patch_size": 14, "vision_use_head": False},
  "text_config": {
    "model_type": "gemma", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "num_image_tokens": 64,
    "vocab_size": 1584, "max_position_embeddings": 1024},
}

def toy_weights(net, config, tokenizer, device, seed=0):
  """Random weights for a model that has seen nothing yet: norms are the identity, matrices keep the
  variance."""
  rng = np.random.default_rng(seed)
  for name, t in get_state_dict(net).items():
    if t.ndim == 1:
      identity = "layer_norm" in name or "layernorm" in name and "vision" in name
      value = np.full(t.shape, 1.0 if identity and name.endswith("weight") else 0.0)
    else:
      value = rng.standard_normal(t.shape) * math.prod(t.shape[1:]) ** -0.5
      if name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
        value *= (2 * config.text.num_hidden_layers) ** -0.5  # what every block adds to the residual stream
    if "patch_embedding.weight" in name:  # flat colour is nearly all of a patch, and drowns the edges
      value = value.reshape(len(t), 3, -1)
      value = 2 * (value - 0.8 * value.mean(2, keepdims=True)).reshape(t.shape)
    if "position_embedding" in name:  # slow waves in y and x: near patches are alike from the first step on
      side = config.vision.image_size // config.vision.patch_size
      y, x = (waves(axis.ravel() / side, t.shape[1] // 4, side) for axis in np.mgrid[:side, :side])
      value = np.concatenate([y, x, 0 * y, 0 * x], 1)
    if "embed_tokens" in name:  # the same for <loc0000> .. <loc1023>, in a part of the width
      start, width = tokenizer.ids["<loc0000>"], t.shape[1] * 3 // 8
      value[start:start + LOC] = 0
      value[start:start + LOC, :width] = waves(np.arange(LOC) / LOC, width, 128) * (2 / width) ** 0.5
    t.replace(vlm.upload(value.astype(np.float32), device))

def waves(position, width, most):
  """position (n,) in 0..1 -> (n, width): sines and cosines of one half wave up to `most`."""
  angle = position[:, None] * np.pi * np.geomspace(1, most, width // 2)
  return np.concatenate([np.sin(angle), np.cos(angle)], 1)

# --part: which weights move; attention is big_vision's own recipe
PARTS = {"lora": r".*\.lora_[AB]\.", "all": "",
         "projector": r"multi_modal_projector\.", "attention": r"language_model.*self_attn\.",
         "language": r"language_model\.", "decoder": r"(multi_modal_projector|language_model)\."}

class Trainer:
  """AdamW on the weights whose names match `part` (a key of PARTS), in one compiled step; the rest has no
  gradient."""
  def __init__(self, net, config, part="all"):
    self.net, self.config = net, config
    self.weights = {n: t for n, t in get_state_dict(net).items() if re.match(PARTS[part], n)}
    for n, t in get_state_dict(net).items():
      t.is_param_(n in self.weights)
    # float32: small steps would round away in half precision. A copy: the file is mapped at addresses that
    # fast.c takes, but tinygrad's own kernels do not.
    for t in self.weights.values():
      t.replace(vlm.to_float32(Tensor(t.numpy(), device=t.device)).contiguous().realize())
    # The embedding, which is the head too, learns at a tenth of the rate: most of its rows are seen seldom,
    # and Adam makes each sighting a full step.
    slow = {n: t for n, t in self.weights.items() if "embed_tokens" in n}
    groups = [(1.0, [t for n, t in self.weights.items() if n not in slow]), (0.1, list(slow.values()))]
    self.optimizers = [(rate, vlm.kernels.AdamW(group, lr=0.0, b2=0.99)) for rate, group in groups if group]
    self.compile()

  def compile(self):
    net, weights, update = self.net, [*self.weights.values()], self.update()
    def step(*batch):  # holds no self: see VLM._run
      value = vlm.loss(net, *batch)
      return update(value, value.gradient(*weights))
    loss = functools.partial(vlm.loss, net)
    self.step_program, self.loss_program = (vlm.capture(f, weights[0].device) for f in (step, loss))

  def update(self):
    """-> a function of the loss and the gradients of all `weights`, which changes these."""
    weights, optimizers = list(self.weights.values()), [optimizer for _, optimizer in self.optimizers]
    def update(value, gradients):
      # contiguous: or one group of a GPU's threads would sum all squares, in a kernel that takes minutes to compile
      norm = Tensor.stack(*[g.square().sum().contiguous() for g in gradients]).sum().sqrt().contiguous()
      clip = (1 / (norm + 1e-6)).minimum(1).contiguous()  # to a norm of 1
      for t, g in zip(weights, gradients):
        t.grad = g * clip
      # Beyond infinity the weights are lost, which the loss itself would show a step later.
      value = (norm < math.inf).where(value, math.nan)
      return value.realize(*[t for optimizer in optimizers for t in optimizer.schedule_step()])
    return update

  def batch(self, rows, pixels, T):
    """rows: B pairs of ids (prefix, answer with its eos), pixels (G, 3, S, S), T text positions -> inputs of
    `step`."""
    device = self.optimizers[0][1].device
    sequence = vlm.collate(self.config.text, self.config.vision.patches, rows, T)
    return [vlm.upload(t, device) for t in (pixels, *sequence)]

  def step(self, batch, lr):
    """One update -> the loss before it."""
    self.set_rate(lr)
    with vlm.kernels.train():
      return self.step_program(*batch).item()

  def set_rate(self, lr):
    for rate, optimizer in self.optimizers:
      optimizer.lr.assign(Tensor([lr * rate], device=optimizer.device)).realize()

  def state(self):
    """All that the next step depends on, by name: weights, optimiser. Frozen weights are not in it."""
    state = dict(self.weights)
    for i, (_, o) in enumerate(self.optimizers):
      state |= {f"m.{i}.{k}": t for k, t in enumerate(o.m)} | {f"v.{i}.{k}": t for k, t in enumerate(o.v)}
      state |= {f"b1_t.{i}": o.b1_t, f"b2_t.{i}": o.b2_t}
    return state

  def loss(self, batch):
    return self.loss_program(*batch).item()

class LayerTrainer(Trainer):
  """The same by gradients of one layer at a time, but for the last ones, `together`, of several batches an update:
  less memory, more time."""
  def __init__(self, net, config, part, together=0):
    self.together = together
    super().__init__(net, config, part)

  def compile(self):
    self.layers = by_layer.Layers(self.net, self.config, set(self.weights), self.together)
    update = self.update()
    def from_gradients(value, *gradients):
      return update(value, gradients)
    device = next(iter(self.weights.values())).device
    self.update_program = vlm.capture(from_gradients, device)

  def step(self, batch, lr, more=()):
    """One update from a batch and others -> the loss before it, the mean of all their answers' tokens."""
    self.set_rate(lr)
    batches = [batch, *more]
    total = {name: np.zeros(t.shape, np.float32) for name, t in self.weights.items()}
    tokens = [int((batch[2].numpy() >= 0).sum()) for batch in batches]  # whose mean each loss is
    value = 0.0
    for batch, n in zip(batches, tokens):
      loss, gradients = self.layers.gradients(batch)
      value += loss * n / sum(tokens)
      for name, g in gradients.items():
        total[name] += g * np.float32(n / sum(tokens))
    device = self.optimizers[0][1].device
    inputs = [vlm.upload(a, device) for a in (np.full((), value, np.float32), *total.values())]
    with vlm.kernels.train():
      return self.update_program(*inputs).item()

  def loss(self, batch):
    return self.layers.loss(batch)

class Toy:
  """Scenes drawn as they are needed: batch i is always the same. With `grow` the first sixth of the steps
  shows one shape a picture, the second up to two, the third up to three: what a name looks like and where it
  is are easier to learn from single, large shapes. codes: see shapes.segment; with them, `segment` is asked
  too."""
  def __init__(self, tokenizer, config, rows, steps, grow=True, codes=None):
    self.tokenizer, self.side, self.codes = tokenizer, config.vision.image_size, codes
    self.text = longest(tokenizer)
    self.stage = steps / 6 if grow else None  # steps until one more shape may appear
    self.questions = math.gcd(QUESTIONS, rows)
    self.pictures = rows // self.questions

  def batch(self, i, seed=shapes.TRAIN_SEED):
    """-> B rows (prefix ids, answer ids), pixels (G, 3, S, S)."""
    grow, rows, pixels = self.stage and seed == shapes.TRAIN_SEED, [], []
    most = min(4, 1 + int(i / self.stage)) if grow else 4
    for n in range(i * self.pictures, (i + 1) * self.pictures):
      image, asked = shapes.examples(seed, n, self.questions, most, self.codes)
      pixels.append(vlm.to_pixels(image, self.side))
      rows += [tokenize(self.tokenizer, *question) for question in asked]
    return rows, np.concatenate(pixels)

  def held_out(self):
    return self.batch(0, shapes.VALID_SEED)

  def sample(self, i):
    """-> picture, prefix, suffix of a held-out question."""
    return shapes.example(shapes.VALID_SEED, i)

  def known(self):
    return []  # shapes.py --eval tells more

def tokenize(tokenizer, prefix, suffix):
  """-> ids of the prompt, ids of the answer with the end of the sequence."""
  return tokenizer.prompt(prefix), tokenizer.encode(suffix) + [tokenizer.eos]

def longest(tokenizer):
  """Text positions that no question of the toy world exceeds: 36 with its own tokenizer."""
  name, shape = (max(names, key=lambda name: len(tokenizer.encode(f" {name}")))
                 for names in (shapes.NAMES, shapes.CORNERS))
  detect = lambda asked, label, found: ("detect " + " ; ".join(asked * [label]),
                                        " ; ".join(found * ["<loc0000>" * 4 + f" {label}"]))
  questions = [detect(3, name, 3), detect(3, shape, 4), ("caption en", " and ".join(4 * [f"an {name}"])),
               (f"segment {name}", "<loc0000>" * 4 + "<seg000>" * CODES + f" {name}"),
               (f"answer en what is right of the {shape}?", name),
               ("answer en how many shapes are there?", "4")]
  return -(-max(sum(map(len, tokenize(tokenizer, *question))) for question in questions) // 4) * 4

class Folder:
  """The pictures and texts of a folder, see samples.py; one in twenty is held out. Raises Fault for bad lines of a
  data.jsonl, all at once, unless they are to be skipped."""
  def __init__(self, folder, tokenizer, config, rows, skip_bad):
    self.folder, self.config, self.rows, examples, bad = Path(folder), config, rows, [], []
    path = self.folder / "data.jsonl"
    if path.exists():
      try:
        lines = regular(path).read_bytes().split(b"\n")
      except OSError as e:
        raise Fault(f"{path}: {e.strerror}; a data folder holds pictures and a data.jsonl") from None
    else:
      lines = [json.dumps({"image": str(image.relative_to(self.folder)), "prefix": question, "suffix": answer})
               for image, question, answer in samples.read(folder)]
    for number, line in enumerate(lines, 1):
      if line.strip():
        vlm.terminal.bar(number, len(lines), f"lines of {folder} checked")
        try:
          examples.append(self.check(line, tokenizer))
        except Fault as e:
          bad.append(f"line {number}: {e}")
    vlm.log.debug("")
    if bad and not skip_bad:
      raise Fault(f"{path}: {len(bad)} bad lines (--skip-bad leaves them out): {vlm.terminal.some(bad, most=5)}")
    if not examples:
      raise Fault(f"{path} has no usable line" + (f"; {bad[0]}" if bad else ""))
    self.found = f"{folder}: {len(examples)} lines" + (f", {len(bad)} bad ones left out" if bad else "")
    self.text = -(-max(sum(map(len, ids)) for _, ids, _ in examples) // 8) * 8
    self.all, self.examples = examples, [e for i, e in enumerate(examples) if i % 20 != 19]
    self.held = examples[19::20] or examples[:1]  # of fewer than 20 lines none can be spared

  def check(self, line, tokenizer):
    """A line -> path of its picture, its ids, (prefix, suffix)."""
    try:
      example = json.loads(line)
      image, *question = (example[key] + "" for key in ("image", "prefix", "suffix"))
      ids = tokenize(tokenizer, *question)
    except (KeyError, TypeError):
      raise Fault("needs image, prefix and suffix, three strings") from None
    except (ValueError, RecursionError) as e:
      raise Fault(f"not JSON ({e})") from None
    if not question[1].strip():
      raise Fault("the suffix is empty")
    if self.config.vision.patches + sum(map(len, ids)) > self.config.text.max_position_embeddings:
      raise Fault(f"{sum(map(len, ids))} tokens of text do not fit the model's context")
    if "\0" not in image and not os.path.exists(self.folder / image):
      raise Fault(f"{image}: no such image")
    vlm.terminal.allow_heic(image)
    vlm.open_image(self.folder / image)  # all of it: a damaged one would stop the run when its turn comes
    return self.folder / image, ids, question

  def collate(self, examples):
    pixels = [vlm.to_pixels(path, self.config.vision.image_size) for path, _, _ in examples]
    return [ids for _, ids, _ in examples], np.concatenate(pixels)

  def batch(self, i):
    """-> B rows (prefix ids, answer ids), pixels (B, 3, S, S). Every epoch in another order."""
    n, chosen = len(self.examples), []
    for k in range(i * self.rows, (i + 1) * self.rows):
      chosen.append(self.examples[np.random.default_rng((0, k // n)).permutation(n)[k % n]])
    return self.collate(chosen)

  def held_out(self):
    return self.collate([self.held[i % len(self.held)] for i in range(self.rows)])

  def sample(self, i):
    path, _, question = self.held[i % len(self.held)]
    return vlm.open_image(path), *question

  def known(self):
    """-> [(picture, prefix, suffix)], a few held-out questions: an answer may take seconds."""
    return [(path, *question) for path, _, question in self.held[:KNOWN]]

class Run:
  """A training run and its folder. All files are written whole or not at all, the state (weights and
  optimiser) as one: a kill at any moment leaves a checkpoint that answers and a state that --resume continues
  from."""
  def __init__(self, args):
    self.args, self.folder = args, Path(args.save)
    self.state, self.unlock = self.folder / "training.state", list  # nothing to do until there is a lock
    if args.resume and not self.state.exists():
      raise Fault(f"{self.folder} holds no training.state: there is nothing to resume")
    if self.state.exists() and not args.resume:
      raise Fault(f"{self.folder} holds a training run; --resume continues it, another --save starts anew")
    for file in () if args.resume else (*self.folder.glob("*.safetensors*"), self.folder / "loss.csv",
                                        self.folder / "loss.png"):
      if file.suffix != ".part" and os.path.lexists(file):  # a kill in the first save leaves a part
        raise Fault(f"{self.folder} holds a checkpoint, which would be lost; choose another --save"
                    if "safetensors" in file.name else f"{file} would be lost; choose another --save")
    if args.data and not (args.init or args.resume):
      raise Fault("a data folder needs --init: which checkpoint to start from")
    if args.part == "lora" and not (args.init or args.resume):
      raise Fault("--part lora needs --init: which checkpoint is adapted")
    init, self.adapts = self.folder if args.resume else args.init, False
    if args.resume and (self.folder / lora.CONFIG).exists():
      init, args.part = lora.read_config(self.folder).get("base_model_name_or_path"), args.part or "lora"
      if args.init not in (None, init):
        raise Fault(f"this run was started with --init {init}; resume with that")
    source = vlm.terminal.find_weights(init, ROOT) if init is not None else None
    if source and args.data:
      vlm.log.debug(f"loading {source}")
    self.model = vlm.load(source, args.device) if source else self.prepare_toy()
    net, config, tokenizer = self.model.net, self.model.config, self.model.tokenizer
    settle(args, sum(t.numel() for t in get_state_dict(vlm.PaliGemma(config)).values()))
    self.adapts = args.part == "lora"  # and so only an adapter is written
    if not self.adapts and any(t.dtype in (dtypes.int8, dtypes.uint8) for t in get_state_dict(net).values()):
      raise Fault(f"{source} is quantised, which only --part lora can train; or start from what it was made "
                  "of")
    if args.data:
      self.data = Folder(args.data, tokenizer, config, args.batch, args.skip_bad)
      vlm.log.info(self.data.found)
    else:
      codes = source / vlm.beside("draw").NAME if source else None
      codes = functools.partial(codebook.tokens, codes) if codes and codes.exists() else None
      self.data = Toy(tokenizer, config, args.batch, args.steps, not args.init, codes)
    if self.adapts:
      place = functools.partial(vlm.upload, device=self.model.device)
      names = {re.sub(r"\.weight(\.data)?$", "", n) for n in get_state_dict(net)}
      names = sorted(n for n in names if re.fullmatch(lora.pattern(args.vision), n))
      lora.create(net, names, args.rank, args.alpha, place)
    need = memory(net, config, args, self.data.text)
    check_memory(need, args, source)
    if source:
      self.prepare_folder(source)
    self.told = f"{args.part}: {need.trained / 1e6:.3g} million weights are trained; memory: {need.told}"
    self.types = {n: t.dtype for n, t in get_state_dict(net).items()}  # a checkpoint keeps its number types
    more = [need.together] if args.by_layer else []
    self.trainer = (LayerTrainer if args.by_layer else Trainer)(net, config, args.part, *more)
    self.done, self.saved, self.stop = 0, 0, False
    self.history, self.losses = [], []  # rows of loss.csv, losses since the last of them
    self.settings = {key: getattr(args, key) for key in SETTINGS}
    saved = self.trainer.weights if self.adapts else get_state_dict(net)
    weights = sum(t.numel() * self.types[n].itemsize for n, t in saved.items())
    state = 12 * sum(t.numel() for t in self.trainer.weights.values())
    # An old file stays until its new one is whole.
    need = max(weights, state) + (0 if args.resume else weights + state)
    if shutil.disk_usage(self.folder).free < need:
      raise Fault(f"{self.folder}: checkpoints take {need / 1e6:.0f} MB, and the disk has less; free some", 1)
    if args.resume:
      self.restore()

  def prepare_toy(self):
    """-> a model that has seen nothing yet."""
    device = vlm.open_device(self.args.device)
    self.prepare_folder()
    config = vlm.read_config(self.folder / "config.json")
    tokenizer = Tokenizer(self.folder / "tokenizer.model")
    model = vlm.VLM(vlm.PaliGemma(config), config, tokenizer, device, vlm.upload)
    toy_weights(model.net, config, tokenizer, device)
    return model

  def prepare_folder(self, source=None):
    """config.json and tokenizer.model: those of a checkpoint, or the toy's. What --resume writes again proves
    that the folder can be written to, before anything long starts."""
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      self.lock()
      small = self.small_files(source)
      if source and not self.adapts and (source / checkpoint.MASKS).exists():
        small[checkpoint.MASKS] = regular(source / checkpoint.MASKS).read_bytes()
      for path in [self.folder / name for name in small]:  # those of a run that was killed early are the same
        if not self.args.resume and os.path.lexists(path) and path.read_bytes() != small[path.name]:
          raise Fault(f"{path} is there already and would be lost; choose another --save")
      for name, data in small.items():
        checkpoint.write_file(self.folder / name, [data])
    except OSError as e:
      raise Fault(f"{self.folder}: {e.strerror or e}; choose another --save", code=1) from None

  def small_files(self, source):
    """-> {name: bytes} of what does not change while the weights are trained."""
    if self.adapts:
      config = lora.config(self.args.rank, self.args.alpha, self.args.vision, self.args.init or source)
      return {lora.CONFIG: json.dumps(config, indent=1).encode()}
    config = json.loads((source / "config.json").read_text()) if source else TOY
    if self.args.init and self.args.data:
      config.pop("note", None)  # it says what the weights were
    tokenizer = (source / "tokenizer.model").read_bytes() if source else shapes.tokenizer_model()
    return {"config.json": json.dumps(config, indent=1).encode(), "tokenizer.model": tokenizer}

  def lock(self):
    """One run in a folder at a time: the folder itself is locked, until this process ends. Raises Fault."""
    if flock:
      try:
        number = os.open(self.folder, os.O_RDONLY)
        self.unlock = weakref.finalize(self, os.close, number)
        flock(number, LOCK_EX | LOCK_NB)
      except BlockingIOError:
        raise Fault(f"{self.folder}: another run is writing to it; choose another --save") from None
      except OSError:  # a file system without locks
        pass

  def restore(self):
    try:
      with safe_open(regular(self.state), "numpy") as file:
        saved = json.loads(file.metadata()["run"])
        settings = {key: value for key, value in saved["settings"].items() if value != self.settings.get(key)}
        wrong = [f"--{key.replace('_', '-')} {value}" for key, value in settings.items() if key != "data"]
        if "data" in settings:
          wrong.insert(0, settings["data"] or "no data folder")
        if wrong:
          raise Fault(f"this run was started with {' '.join(wrong)}; resume with that")
        for name, tensor in self.trainer.state().items():
          tensor.assign(Tensor(file.get_tensor(name), device=tensor.device)).realize()
      self.done = self.saved = saved["step"] + 0
      self.history, self.losses = saved["history"] + [], saved["losses"] + []
      self.data.stage = saved["stage"]
    # whatever is in a damaged file: a text where numbers are, a tensor of another shape
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError,
            RecursionError) as e:
      raise Fault(f"{self.state}: damaged ({e}); start a new run with --init {self.folder} and another "
                  "--save") from None

  def save(self):
    """model.safetensors, or the adapter, then the state; the names are those of hub files."""
    if self.adapts:
      file = lora.WEIGHTS
      weights = {lora.PREFIX + n: (t, dtypes.float32) for n, t in self.trainer.weights.items()}
    else:
      file, weights = "model.safetensors", {
        checkpoint.hub_name(n): (t, self.types[n]) for n, t in get_state_dict(self.model.net).items()}
    state = {n: (t, dtypes.float32) for n, t in self.trainer.state().items()}
    run = {"settings": self.settings, "step": self.done, "history": self.history, "losses": self.losses,
           "stage": getattr(self.data, "stage", None)}
    table = [("step", "loss", "held_out_loss"), *self.history]
    try:
      checkpoint.write_file(self.folder / file, checkpoint.safetensors(weights))
      checkpoint.write_file(self.state, checkpoint.safetensors(state, metadata={"run": json.dumps(run)}))
      self.saved = self.done
      lines = [f"{','.join(map(str, row))}\n".encode() for row in table]
      checkpoint.write_file(self.folder / "loss.csv", lines)
      if self.history:
        picture = io.BytesIO()
        curves = {name: [(row[0], row[column]) for row in self.history]
                  for column, name in ((1, "training loss"), (2, "held-out loss"))}
        vlm.beside("draw").curve(curves).save(picture, "PNG")
        checkpoint.write_file(self.folder / "loss.png", [picture.getbuffer()])
    except OSError as e:
      raise Fault(f"{self.folder}: {e.strerror or e}; the checkpoint of step {self.saved} is whole",
                  code=1) from None

  def learning_rate(self, step):
    """Linear warm-up over the first 5 %, then half a cosine."""
    warm = max(1, self.args.steps // 20)
    return self.args.lr * min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / self.args.steps))

  def interrupt(self, number, frame):
    """On Ctrl-C: a step that is cut off in the middle would leave weights that no uninterrupted run ever
    has."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    self.stop = True
    vlm.log.info("finishing this step, then saving; Ctrl-C again leaves at once, without")

  def train(self):
    """All steps that are left, or those until Ctrl-C."""
    vlm.log.info(self.told)
    args, patches = self.args, self.model.config.vision.patches
    held_out = self.trainer.batch(*self.data.held_out(), self.data.text)
    every, start, tokens = -(-args.steps // args.reports), time.perf_counter(), 0
    def batches(step):
      return [self.data.batch(step * args.accumulate + i) for i in range(args.accumulate)]
    with ThreadPoolExecutor(1) as pool:  # the next pictures are drawn or read while these are computed
      ahead = pool.submit(batches, self.done)
      while self.done < args.steps and not self.stop:
        found = ahead.result()
        ahead = pool.submit(batches, self.done + 1)
        inputs = [self.trainer.batch(rows, pixels, self.data.text) for rows, pixels in found]
        more = [inputs[1:]] if args.by_layer else []
        value = self.check(self.trainer.step(inputs[0], self.learning_rate(self.done), *more))
        self.done += 1
        self.losses.append(value)
        tokens += sum(patches + len(prefix) + len(answer) for rows, _ in found for prefix, answer in rows)
        spent = time.perf_counter() - start
        speed = f"{tokens / spent:.0f} tokens/s"
        vlm.terminal.bar(self.done, args.steps, f"steps, loss {value:.3f}, {speed}")
        if self.done % every == 0 or self.done == args.steps:
          unseen = self.check(self.trainer.loss(held_out))
          self.history.append([self.done, float(np.mean(self.losses)), unseen])
          self.losses = []
          self.report()
          self.save()
    if self.saved < self.done:
      self.save()

  def check(self, value):
    if not math.isfinite(value):
      raise Fault(f"the loss is {value} at step {self.done + 1}; try a lower --lr. Last good checkpoint: " +
                  (f"{self.folder}, step {self.saved}" if self.saved else "none"), code=1)
    return value

  def report(self):
    """One line with the losses, one with a held-out question, its true answer and the model's."""
    step, loss, held_out = self.history[-1]
    image, prefix, suffix = self.data.sample(len(self.history))
    model, config = self.model, self.model.config
    room = config.text.max_position_embeddings - config.vision.patches - len(model.tokenizer.prompt(prefix))
    model.features.clear()  # they are of the weights of before
    [answer] = model.generate([image], [prefix], max_tokens=min(self.data.text, room))
    vlm.log.info(f"step {step}: loss {loss:.3f}, held out {held_out:.3f}\n"
                 f"  {prefix!r}: {suffix!r}, model: {answer.text!r}")
    if known := self.data.known():
      vlm.log.info(f"  held out: {score.summary([*score.ask(model, known, min(self.data.text, room))])}")

# what a run depends on
SETTINGS = "data", "steps", "batch", "accumulate", "lr", "part", "rank", "alpha", "vision"

def merge(adapter, source, folder):
  """An adapter and the folder of 16- or 32-bit weights it is for -> a new folder of the same number types.
  Raises Fault."""
  pairs, scale, replaced = lora.read(adapter)
  arrays = vlm.read_weights(source)
  if any(array.itemsize == 1 for array in arrays.values()):
    raise Fault(f"{source} is quantised; merge with the weights it was made of, and quantise what comes out")
  lora.check_shapes(adapter, pairs, replaced, {n: array.shape for n, array in arrays.items()})

  def merged(array, a, b):
    """As float32, which checkpoint.safetensors rounds to the type of the array."""
    if array.dtype == np.uint16:
      array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32) + np.float32(scale) * (b @ a)
  tensors = {n: checkpoint.Later.of(array) for n, array in arrays.items()}
  for name, (a, b) in pairs.items():
    array = arrays[f"{name}.weight"]
    make = functools.partial(merged, array, a, b)
    tensors[f"{name}.weight"] = checkpoint.Later(array.shape, array.dtype, make)
  for name, new in replaced.items():
    array = arrays[name]
    tensors[name] = checkpoint.Later(array.shape, array.dtype, lambda new=new: new)
  config = json.loads((source / "config.json").read_text())
  config.pop("note", None)  # it says what the weights were
  checkpoint.write(folder, config, source / "tokenizer.model", tensors)

def evaluate(args):
  """--eval: how good the answers to the questions of a data folder are, as a line on stdout and a picture of
  the worst ones."""
  out, draw = Path(args.worst), vlm.beside("draw")
  draw.check_output(out, [])
  if os.path.lexists(out) and not draw.is_ours(out):
    raise Fault(f"{out} is there already, and would be lost; name another file with --worst")
  model = vlm.open_model(args)
  data = Folder(args.data, model.tokenizer, model.config, 1, args.skip_bad)
  vlm.log.info(data.found)
  examples, results = [(path, *question) for path, _, question in data.all], []
  for done, found in enumerate(score.ask(model, examples, data.text), 1):
    results.append(found)
    vlm.terminal.bar(done, len(examples), f"questions asked, {score.summary(results)}")
  vlm.log.debug("")
  draw.save_picture(score.worst(results), out, [])
  print(score.summary(results))
  vlm.log.info(f"the worst {min(len(results), score.WORST)} answers: {out}")

RATES = {"lora": 2e-4, "projector": 1e-4}  # of a large checkpoint; of all other parts big_vision's 1e-5

def settle(args, weights):
  """What was not given of a run, by how many weights the model has. A checkpoint that knows something is
  easily wrecked by the rate that a toy needs."""
  large = weights > LARGE
  args.part = args.part or ("lora" if large else "all")
  small_batch = large or args.part == "lora"
  defaults = {"batch": 1 if large else 32, "accumulate": 8 if large else 1,
              "lr": RATES.get(args.part, 1e-5) if small_batch else 1e-3,
              "reports": 5 if small_batch else REPORTS,
              "steps": 24000 if not args.data else 500 if large else 2000}
  for name, value in defaults.items():
    if getattr(args, name) is None:
      setattr(args, name, value)
  args.reports = min(args.reports, args.steps)
  args.by_layer = small_batch or args.accumulate > 1
  if args.part != "lora" and args.given & {"--rank", "--alpha", "--vision"}:
    raise Fault("--rank, --alpha and --vision go with --part lora")

TOGETHER = 600_000_000  # bytes that the last layers may take to be computed once instead of twice
Memory = namedtuple("Memory", "total weights trained told together")

def memory(net, config, args, text):
  """Bytes that a run is going to take, of which the weights; how many weights move; the same in words; how many
  layers are computed together."""
  v, t, weights = config.vision, config.text, get_state_dict(net)
  trained = sum(w.numel() for n, w in weights.items() if re.match(PARTS[args.part], n))
  frozen = sum(w.nbytes() for n, w in weights.items() if not re.match(PARTS[args.part], n))
  rows, positions = args.batch, v.patches + text
  layer = rows * positions * (8 * t.intermediate_size + 12 * t.hidden_size
                              + 5 * t.num_attention_heads * (positions + t.head_dim))
  head = 4 * rows * text * t.vocab_size
  kept = rows * t.num_hidden_layers * positions * t.hidden_size
  kept += rows * v.num_hidden_layers * v.patches * v.hidden_size
  half = layer // 2  # that goes from a layer's forward to its backward pass
  together = min(t.num_hidden_layers, TOGETHER // (4 * half)) if args.by_layer else 0
  layer = layer + max(0, together - 1) * half if args.by_layer else layer * t.num_hidden_layers
  activations, optimizer = 4 * (layer + head + kept), 4 * 5 * trained
  parts = {"weights": frozen + 4 * trained, "optimiser": optimizer, "activations": activations,
           "programs": PROCESS}
  total = sum(parts.values())
  listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
  told = f"{total / 1e9:.1f} GB ({listed})"
  return Memory(total, frozen, trained, told, together)

PROCESS = 600_000_000  # bytes of Python, tinygrad and compiled programs

def check_memory(need, args, source):
  """Raises Fault if the machine has less, with what would fit."""
  room = vlm.kernels.free_memory()
  if not room or need.total <= room:
    return
  advice = []
  if args.part != "lora":
    advice.append("--part lora")
  if args.batch > 1:
    advice.append(f"--batch 1 --accumulate {args.batch * args.accumulate}")
  if need.weights > room / 2 and args.part == "lora":
    half, quarter = (need.total - need.weights * share for share in (0.5, 0.6))
    advice.append(f"weights in 8 or 4 bits, about {half / 1e9:.1f} or {quarter / 1e9:.1f} GB: "
                  f"python examples/quantize.py {source} PACKED --bits 8")
  raise Fault(f"this run takes {need.told}, and {room / 1e9:.1f} GB are free; less take: "
              f"{', or '.join(advice) or 'a smaller checkpoint'}", code=1)

def arguments(argv):
  """-> the options on a command line, checked. Raises Fault."""
  p = vlm.terminal.ArgumentParser(prog="train.py", allow_abbrev=False,
                 description="Train the toy world from random weights, or pictures on top of a checkpoint.")
  p.add_argument("data", nargs="?", default="", metavar="DATA",
                 help="a folder with data.jsonl; none: the toy world")
  p.add_argument("--eval", action="store_true", help="how good are the answers of --weights to DATA?")
  p.add_argument("--weights", metavar="DIR", help="of --eval (default: largest in weights/)")
  p.add_argument("--adapter", metavar="DIR", help="of --eval")
  p.add_argument("--worst", metavar="FILE", default="worst.png",
                 help="of --eval: a picture of the ten worst answers (default: %(default)s)")
  p.add_argument("--merge", metavar="ADAPTER", help="an adapter and --init become one folder, --save")
  p.add_argument("--init", metavar="DIR", help="checkpoint to start from (default: random weights)")
  p.add_argument("--save", metavar="DIR", help="where it goes (default: weights/trained)")
  p.add_argument("--part", choices=PARTS,
                 help="what moves (default: lora from half a billion weights on, else all)")
  p.add_argument("--rank", type=int, default=8, metavar="N", help="of --part lora (default %(default)s)")
  p.add_argument("--alpha", type=float, default=16, metavar="X", help="of --part lora (default %(default)s)")
  p.add_argument("--vision", action="store_true", help="--part lora adapts SigLIP, too")
  p.add_argument("--steps", type=int, metavar="N",
                 help="how many (default: 24000, of a data folder 2000, of a large checkpoint 500)")
  p.add_argument("--batch", type=int, metavar="N", help="questions at a time (default: 32, of a large one 1)")
  p.add_argument("--accumulate", type=int, metavar="N", help="batches a step (default: 1, of a large one 8)")
  p.add_argument("--lr", type=float, metavar="R",
                 help="highest (default: 1e-3; lora 2e-4; other parts of a large one 1e-5, projector 1e-4)")
  p.add_argument("--reports", type=int, metavar="N",
                 help="how often a sample is shown and all is saved (default: 40, of a large one 5)")
  p.add_argument("--resume", action="store_true", help="go on with the run in --save")
  p.add_argument("--skip-bad", action="store_true", help="leave out bad lines of data.jsonl")
  p.add_argument("--device", metavar="DEV", help="METAL, CUDA, CPU, ... (default: the best, or $DEV)")
  p.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
  args = p.parse_args(argv)
  shared = {"--device", "--quiet"}
  if args.merge is not None and (args.data or args.given - shared != {"--merge", "--init", "--save"}):
    raise Fault("--merge ADAPTER goes with --init DIR and --save DIR, and with nothing else")
  evaluating = {"--eval", "--weights", "--adapter", "--worst", "--skip-bad"}
  if args.eval and (not args.data or args.given - evaluating - shared):
    raise Fault("--eval takes a data folder, --weights, --adapter, --worst and --skip-bad")
  if not args.eval and args.given & (evaluating - {"--skip-bad"}):
    raise Fault("--weights, --adapter and --worst go with --eval; to train there are --init and --save")
  args.save = args.save or ROOT / "weights" / "trained"
  given = {name: value for name, value in vars(args).items() if value is not None}
  for wrong, message in ((given.get("steps", 1) < 1, "--steps: at least 1"),
                         (not 1 <= given.get("batch", 1) <= 10_000, "--batch: at least 1, at most 10000"),
                         (not 1 <= given.get("accumulate", 1) <= 10_000, "--accumulate: from 1 to 10000"),
                         (not 0 < given.get("lr", 1) < math.inf, "--lr: above 0"),
                         (not 1 <= args.rank <= 1024, "--rank: at least 1, at most 1024"),
                         (not 0 < args.alpha < 1e6, "--alpha: above 0"),
                         (given.get("reports", 1) < 1, "--reports: at least 1"),
                         (args.skip_bad and not args.data, "--skip-bad goes with a data folder")):
    if wrong:
      raise Fault(message)
  return args

@vlm.program
def main(argv):
  args = arguments(argv)
  if args.eval:
    return evaluate(args)
  if args.merge is not None:
    merge(args.merge, vlm.terminal.find_weights(args.init, ROOT), Path(args.save))
    vlm.log.info(f"{args.save}: a whole model")
    return 0
  job = Run(args)
  before = signal.signal(signal.SIGINT, job.interrupt)
  try:
    job.train()
  finally:
    signal.signal(signal.SIGINT, before)
    job.unlock()
  vlm.log.info(f"stopped after step {job.done}; --resume continues" if job.stop else
                f"{args.steps} steps done: {job.folder}")
  return 130 if job.stop else 0

if __name__ == "__main__":
  sys.exit(main())
