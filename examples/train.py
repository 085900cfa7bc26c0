"""Training: the toy world from random weights, or a folder of pictures on top of a checkpoint. `python vlm.py --train`.

A data folder holds pictures and a data.jsonl with lines {"image": file, "prefix": question, "suffix": answer}, the
format of PaliGemma's own fine-tunes. A run's folder (--save) is a complete PaliGemma folder, plus training.state
(what --resume needs), loss.csv and loss.png.
"""
import csv
import json
import math
import os
import queue
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from tinygrad import Tensor, TinyJit, dtypes, nn
from tinygrad.nn.state import get_state_dict

import shapes
import vlm
from tokenizer import LOC, Tokenizer
from vlm import Fault

TEXT = 36      # text positions of a toy batch: the longest question and answer of the toy world have 39 tokens
QUESTIONS = 2  # a toy picture is asked so many questions at once: SigLIP runs once for all of them
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
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "num_image_tokens": 64, "vocab_size": 1584,
    "max_position_embeddings": 1024},
}

def toy_weights(net, config, tokenizer, device, seed=0):
  """Random weights for a model that has seen nothing yet: norms are the identity, matrices keep the variance."""
  rng = np.random.default_rng(seed)
  for name, t in get_state_dict(net).items():
    if t.ndim == 1:
      identity = "layer_norm" in name or "layernorm" in name and "vision" in name
      value = np.full(t.shape, 1.0 if identity and name.endswith("weight") else 0.0)
    else:
      value = rng.standard_normal(t.shape) * math.prod(t.shape[1:]) ** -0.5
      if name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
        value *= (2 * config.layers) ** -0.5  # what every block adds to the residual stream
    if "patch_embedding" in name:
      value = whitening(config) if t.ndim > 1 else value
    if "position_embedding" in name:  # start from slow waves in y and x: near patches are alike from the first step on
      side = config.image_size // config.patch_size
      y, x = (waves(axis.ravel() / side, t.shape[1] // 4, side) for axis in np.mgrid[:side, :side])
      value = 0.3 * np.concatenate([y, x, 0 * y, 0 * x], 1)
    if "embed_tokens" in name:  # the same for <loc0000> .. <loc1023>, in a part of the width: near places are near
      start, some = tokenizer.ids["<loc0000>"], t.shape[1] * 3 // 8
      value[start:start + LOC] = 0
      value[start:start + LOC, :some] = waves(np.arange(LOC) / LOC, some, 128) * (2 / some) ** 0.5
    t.replace(Tensor(value.astype(np.float32), device=device).realize())

def whitening(config, pictures=200):
  """The strongest principal components of the toy world's patches, each scaled to variance 1 -> (Dv, 3 * p * p). Flat
  colour is nearly all of a patch's variance, and seen through random weights it drowns the edges."""
  S, p, g = config.image_size, config.patch_size, config.image_size // config.patch_size
  pixels = np.concatenate([vlm.to_pixels(shapes.scene(shapes.TRAIN_SEED, i).image, S) for i in range(pictures)])
  patches = pixels.reshape(-1, 3, g, p, g, p).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 3 * p * p)
  variance, components = np.linalg.eigh(np.cov(patches.T))
  return (components * (variance + 1e-3) ** -0.5).T[::-1][:config.vision_width]

def waves(position, width, most):
  """position (n,) in 0..1 -> (n, width): sines and cosines of one half wave up to `most`."""
  angle = position[:, None] * np.pi * np.geomspace(1, most, width // 2)
  return np.concatenate([np.sin(angle), np.cos(angle)], 1)

PARTS = {"all": "", "projector": r"multi_modal_projector\.", "attention": r"language_model.*self_attn\.",
         "language": r"language_model\."}  # --train-only: which weights move; attention is big_vision's own recipe

def training_mask(prefix, total, n, window=None):
  """prefix (B,): how many tokens of a row all see each other; total (B,): how many are no padding -> (B, 1, n, n) bool.

      3 prefix + 2 answer tokens, 1 padding     1 1 1 0 0 0
      a row is a query, a column what           1 1 1 0 0 0
      it may look at                            1 1 1 0 0 0
                                                1 1 1 1 0 0
                                                1 1 1 1 1 0
  """
  query, key = np.arange(n)[:, None], np.arange(n)[None]
  prefix, total = (np.asarray(t)[:, None, None] for t in (prefix, total))
  near = (key <= query) & (key > query - (window or n))
  return ((near | ((query < prefix) & (key < prefix))) & (key < total))[:, None]

def loss(net, pixels, ids, cos, sin, masks, weight):
  """Mean next-token cross-entropy over the answers. pixels (G, 3, S, S): picture g belongs to B / G rows in turn of
  ids (B, T + 1), the text; masks (full, sliding) (B, 1, 1, n, n); weight (B, T): 1 where the next token is scored."""
  gemma, (B, T), V = net.language_model, weight.shape, net.language_model.config.vocab
  image = net.multi_modal_projector.linear(net.vision_tower(pixels))  # (G, P, D)
  G, P, D = image.shape
  image = image.reshape(G, 1, P, D).expand(G, B // G, P, D).reshape(B, P, D)
  embedding = gemma.embed_tokens.weight
  if embedding.dtype == dtypes.float32 and V < 10000:
    # As a product with one-hot rows, because its gradient is a product too: that of a look-up took a third of the step.
    one_hot = (ids[:, :-1].unsqueeze(-1) == Tensor.arange(V, device=ids.device)).float()
    text = vlm.matmul(one_hot, embedding, "nn") * gemma.config.width ** 0.5
  else:
    text = vlm.widen(embedding[ids[:, :-1]]) * gemma.config.width ** 0.5
  x = gemma(image.cat(text, dim=1), cos, sin, masks, [lambda k, v: (k, v)] * gemma.config.layers)
  logits = gemma.logits(x[:, P:].contiguous()).contiguous()  # (B, T, V)
  target = (ids[:, 1:].unsqueeze(-1) == Tensor.arange(V, device=ids.device)).where(logits, 0).sum(-1)
  return ((logits.logsumexp(-1) - target) * weight).sum() / weight.sum()

class Trainer:
  """AdamW on the weights whose names match `part` (a key of PARTS), in one compiled step; no gradient for the rest."""
  def __init__(self, net, config, part="all"):
    self.net, self.config = net, config
    self.weights = {n: t for n, t in get_state_dict(net).items() if re.match(PARTS[part], n)}
    for t in self.weights.values():  # small steps would round away in half precision
      t.replace(vlm.widen(t).contiguous().realize())
    # The embedding, which is the head too, learns at a tenth of the rate: most of its rows are seen seldom, and Adam
    # makes each sighting a full step. At the full rate <loc> answers stayed worse than chance for thousands of steps.
    slow = {n: t for n, t in self.weights.items() if "embed_tokens" in n}
    groups = [(1.0, [t for n, t in self.weights.items() if n not in slow]), (0.1, list(slow.values()))]
    self.optimizers = [(rate, nn.optim.AdamW(group, lr=0.0, b2=0.99)) for rate, group in groups if group]
    weights, optimizers = list(self.weights.values()), [optimizer for _, optimizer in self.optimizers]
    def batch_loss(pixels, ids, cos, sin, full, sliding, weight):
      return loss(net, pixels, ids, cos, sin, (full, sliding), weight)
    def update(*batch):
      value = batch_loss(*batch)
      gradients = value.gradient(*weights)
      norm = Tensor.stack(*[g.square().sum() for g in gradients]).sum().sqrt()
      clip = (1 / (norm + 1e-6)).minimum(1).contiguous()  # to a norm of 1
      for t, g in zip(weights, gradients):
        t.grad = g * clip
      return value.realize(*[t for optimizer in optimizers for t in optimizer.schedule_step()])
    self.step_jit, self.loss_jit = TinyJit(update), TinyJit(batch_loss)  # neither holds self: see VLM._run
    self.step_jit.cnt = self.loss_jit.cnt = 1

  def batch(self, rows, pixels, T):
    """rows: B pairs of ids (prefix, answer with its eos), pixels (G, 3, S, S), T text positions -> inputs of `step`."""
    P, device = self.config.patches, self.optimizers[0][1].device
    ids, weight = np.zeros((len(rows), T + 1), np.int32), np.zeros((len(rows), T), np.float32)
    for i, (prefix, answer) in enumerate(rows):
      ids[i, :len(prefix) + len(answer)] = prefix + answer
      weight[i, len(prefix) - 1:len(prefix) + len(answer) - 1] = 1
    lengths = [P + len(prefix) for prefix, _ in rows], [P + len(prefix) + len(answer) for prefix, answer in rows]
    masks = [training_mask(*lengths, P + T, window)[:, None] for window in (None, self.config.window)]
    cos, sin = vlm.rope_table(self.config, np.arange(P + T))
    return [Tensor(t, device=device).realize() for t in (pixels, ids, cos, sin, *masks, weight)]

  def step(self, batch, lr):
    """One update -> the loss before it."""
    for rate, optimizer in self.optimizers:
      optimizer.lr.assign(Tensor([lr * rate], device=optimizer.device)).realize()
    with Tensor.train():
      return self.step_jit(*batch).item()

  def state(self):
    """All that the next step depends on, by name: weights, optimiser. Frozen weights are not in it."""
    state = dict(self.weights)
    for i, (_, o) in enumerate(self.optimizers):
      state |= {f"m.{i}.{k}": t for k, t in enumerate(o.m)} | {f"v.{i}.{k}": t for k, t in enumerate(o.v)}
      state |= {f"b1_t.{i}": o.b1_t, f"b2_t.{i}": o.b2_t}
    return state

  def loss(self, batch):
    return self.loss_jit(*batch).item()

class Toy:
  """Scenes drawn as they are needed: batch i is always the same. The first tenth of the steps shows one shape a
  picture, the second up to two, the third up to three: what a name looks like and where it is are learnt in minutes
  from single shapes; from up to four at once 3000 steps were not enough to see either."""
  def __init__(self, tokenizer, config, rows, steps):
    self.tokenizer, self.side, self.text, self.steps = tokenizer, config.image_size, TEXT, steps
    self.questions = math.gcd(QUESTIONS, rows)
    self.pictures = rows // self.questions

  def batch(self, i, seed=shapes.TRAIN_SEED):
    """-> B rows (prefix ids, answer ids), pixels (G, 3, S, S)."""
    rows, pixels, most = [], [], min(4, 1 + 10 * i // self.steps) if seed == shapes.TRAIN_SEED else 4
    for n in range(i * self.pictures, (i + 1) * self.pictures):
      image, asked = shapes.examples(seed, n, self.questions, most)
      pixels.append(vlm.to_pixels(image, self.side))
      rows += [tokenize(self.tokenizer, *question) for question in asked]
    return rows, np.concatenate(pixels)

  def held_out(self):
    return self.batch(0, shapes.VALID_SEED)

  def sample(self, i):
    """-> picture, prefix, suffix of a held-out question."""
    return shapes.example(shapes.VALID_SEED, i)

def tokenize(tokenizer, prefix, suffix):
  """-> ids of the prompt, ids of the answer with the end of the sequence."""
  return tokenizer.prompt(prefix), tokenizer.encode(suffix) + [tokenizer.eos]

class Folder:
  """The lines of DATA/data.jsonl, one in twenty of them held out. Raises Fault for bad lines, all at once, unless they
  are to be skipped."""
  def __init__(self, folder, tokenizer, config, rows, skip_bad):
    self.folder, self.config, self.rows, self.examples, bad = Path(folder), config, rows, [], []
    self.path = self.folder / "data.jsonl"
    try:
      lines = self.path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
      raise Fault(f"{self.path}: {e}; a data folder holds pictures and a data.jsonl") from None
    for number, line in enumerate(lines, 1):
      if line.strip():
        try:
          self.examples.append((number, *self.check(line, tokenizer)))
        except Fault as e:
          bad.append(f"line {number}: {e}")
    if bad and not skip_bad:
      raise Fault(f"{self.path}: {len(bad)} bad lines (--skip-bad leaves them out): " + "; ".join(bad[:5]) +
                  (f"; and {len(bad) - 5} more" if len(bad) > 5 else ""))
    if not self.examples:
      raise Fault(f"{self.path} has no usable line")
    if bad:
      print(f"{self.path}: {len(bad)} bad lines left out, {len(self.examples)} kept", file=sys.stderr)
    self.text = -(-max(len(prefix) + len(answer) - 1 for _, _, (prefix, answer), _ in self.examples) // 8) * 8
    self.held = self.examples[19::20] or self.examples[:1]  # fewer than 20 lines: nothing to hold out
    self.examples = [e for e in self.examples if e not in self.held] or self.examples

  def check(self, line, tokenizer):
    """A line -> path of its picture, its ids, (prefix, suffix)."""
    try:
      example = json.loads(line)
      image, prefix, suffix = (example[key] for key in ("image", "prefix", "suffix"))
    except ValueError as e:
      raise Fault(f"not JSON ({e})") from None
    except (KeyError, TypeError) as e:
      raise Fault(f"needs image, prefix and suffix ({e!r})") from None
    if not all(isinstance(value, str) for value in (image, prefix, suffix)):
      raise Fault("image, prefix and suffix must be strings")
    if not suffix:
      raise Fault("the suffix is empty")
    ids = tokenize(tokenizer, prefix, suffix)
    if self.config.patches + sum(map(len, ids)) > self.config.max_context:
      raise Fault(f"{sum(map(len, ids))} tokens of text do not fit the model's context")
    try:
      with Image.open(self.folder / image):
        return self.folder / image, ids, (prefix, suffix)
    except (OSError, Image.DecompressionBombError) as e:
      raise Fault(f"{image}: {'no such picture' if isinstance(e, FileNotFoundError) else 'not a picture'}") from None

  def collate(self, examples):
    pixels = []
    for number, path, _, _ in examples:
      try:
        pixels.append(vlm.to_pixels(path, self.config.image_size))
      except Fault as e:
        raise Fault(f"{self.path}: line {number}: {e}", code=1) from None
    return [ids for _, _, ids, _ in examples], np.concatenate(pixels)

  def batch(self, i):
    """-> B rows (prefix ids, answer ids), pixels (B, 3, S, S). Every epoch in another order."""
    n, chosen = len(self.examples), []
    for k in range(i * self.rows, (i + 1) * self.rows):
      chosen.append(self.examples[np.random.default_rng((0, k // n)).permutation(n)[k % n]])
    return self.collate(chosen)

  def held_out(self):
    return self.collate([self.held[i % len(self.held)] for i in range(self.rows)])

  def sample(self, i):
    _, path, _, question = self.held[i % len(self.held)]
    return vlm.open_image(path), *question

class Run:
  """A training run and its folder. All files are written whole or not at all, the state (weights and optimiser) as one:
  a kill at any moment leaves a checkpoint that answers and a state that --resume continues from."""
  def __init__(self, args):
    self.args, self.folder = args, Path(args.save)
    self.state = self.folder / "training.state"
    if args.resume and not self.state.exists():
      raise Fault(f"{self.folder} holds no training.state: there is nothing to resume")
    if self.state.exists() and not args.resume:
      raise Fault(f"{self.folder} holds a training run; --resume continues it, another --save starts a new one")
    if args.train and not (args.init or args.resume):
      raise Fault("a data folder needs --init: which checkpoint to start from")
    source = Path(args.init) if args.init and not args.resume else self.folder
    self.prepare_folder(None if args.resume else args.init)
    if args.init or args.resume:
      self.model = vlm.load(source)
    else:
      self.model = vlm.VLM(vlm.PaliGemma(c := vlm.read_config(source / "config.json")), c,
                           Tokenizer(source / "tokenizer.model"), vlm.open_device())
      toy_weights(self.model.net, c, self.model.tokenizer, self.model.device)
    self.types = {n: t.dtype for n, t in get_state_dict(self.model.net).items()}  # a checkpoint keeps its number types
    self.trainer = Trainer(self.model.net, self.model.config, args.train_only)
    data = (Folder(args.train, self.model.tokenizer, self.model.config, args.batch, args.skip_bad) if args.train else
            Toy(self.model.tokenizer, self.model.config, args.batch, args.steps))
    self.data, self.done, self.history = data, 0, []
    self.settings = {key: getattr(args, key) for key in ("train", "steps", "batch", "lr", "train_only")}
    count = lambda tensors: sum(t.numel() for t in tensors.values())
    need = 4 * (count(get_state_dict(self.model.net)) + 3 * count(self.trainer.weights))
    if shutil.disk_usage(self.folder).free < 2 * need:  # the old files stay until the new ones are whole
      raise Fault(f"{self.folder}: checkpoints take {2 * need / 1e6:.0f} MB, and the disk has less; free some", 1)
    if args.resume:
      self.restore()

  def prepare_folder(self, init):
    """config.json and tokenizer.model, before anything long starts."""
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      if init:
        for name in ("config.json", "tokenizer.model"):
          if not (Path(init) / name).exists():
            raise Fault(f"{init} holds no {name}; --init wants a PaliGemma folder")
          if Path(init).resolve() != self.folder.resolve():
            shutil.copyfile(Path(init) / name, self.folder / name)
      elif not self.args.resume:
        (self.folder / "config.json").write_text(json.dumps(TOY, indent=1))
        shapes.make_tokenizer(self.folder / "tokenizer.model")
    except OSError as e:
      raise Fault(f"{self.folder}: {e.strerror}; choose another --save", code=1) from None

  def restore(self):
    with safe_open(self.state, "numpy") as file:
      saved = json.loads(file.metadata()["run"])
      if saved["settings"] != self.settings:
        wrong = [k for k, v in saved["settings"].items() if v != self.settings[k]]
        raise Fault(f"this run was started with --{wrong[0].replace('_', '-')} {saved['settings'][wrong[0]]}; "
                    "resume with that")
      for name, tensor in self.trainer.state().items():
        tensor.assign(Tensor(file.get_tensor(name), device=tensor.device)).realize()
    self.done, self.history = saved["step"], saved["history"]

  def save(self):
    """model.safetensors, then the state; the names are those of hub files."""
    arrays = {}
    for name, t in get_state_dict(self.model.net).items():
      array = t.numpy()
      if self.types[name] == dtypes.uint16 and array.dtype != np.uint16:  # bfloat16 again, rounded to the nearest
        bits = array.view(np.uint32)
        array = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
      elif self.types[name] == dtypes.float16:
        array = array.astype(np.float16)
      if name.endswith("patch_embedding.weight"):
        array = array.reshape(len(array), 3, *[self.model.config.patch_size] * 2)
      arrays[hub_name(name)] = array
    try:
      write_file(self.folder / "model.safetensors", arrays)
      run = {"settings": self.settings, "step": self.done, "history": self.history}
      write_file(self.state, {n: t.numpy() for n, t in self.trainer.state().items()}, {"run": json.dumps(run)})
      with open(self.folder / "loss.csv", "w", newline="") as file:
        csv.writer(file).writerows([("step", "loss", "held_out_loss"), *self.history])
      curve(self.history).save(self.folder / "loss.png")
    except OSError as e:
      raise Fault(f"{self.folder}: {e.strerror}; the checkpoint of before is untouched", code=1) from None

  def learning_rate(self, step):
    """Linear warm-up over the first 5 %, then half a cosine."""
    warm = max(1, self.settings["steps"] // 20)
    return self.args.lr * min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / self.args.steps))

  def train(self):
    args, batches = self.args, queue.Queue(4)
    def feed():  # the next pictures are drawn or read while the last ones are computed
      try:
        for i in range(self.done, args.steps):
          batches.put(self.data.batch(i))
      except Exception as e:
        batches.put(e)
    threading.Thread(target=feed, daemon=True).start()
    held_out = self.trainer.batch(*self.data.held_out(), self.data.text)
    every, start, first, losses, tokens = max(1, args.steps // 40), time.perf_counter(), self.done, [], 0
    while self.done < args.steps:
      batch = batches.get()
      if isinstance(batch, Exception):
        raise batch
      value = self.trainer.step(self.trainer.batch(*batch, self.data.text), self.learning_rate(self.done))
      if not math.isfinite(value):
        raise Fault(f"the loss is {value} at step {self.done + 1}; try a lower --lr. Last good checkpoint: "
                    f"{self.folder}, step {self.history[-1][0] if self.history else 'none'}", code=1)
      self.done += 1
      losses.append(value)
      tokens += sum(len(prefix) + len(answer) + self.model.config.patches for prefix, answer in batch[0])
      spent = time.perf_counter() - start
      left = spent / (self.done - first) * (args.steps - self.done)
      vlm.status(f"step {self.done}/{args.steps} [{'#' * (20 * self.done // args.steps):20}] loss {value:.3f}  "
                 f"{tokens / spent:.0f} tokens/s  {left / 60:.1f} min left")
      if self.done % every == 0 or self.done == args.steps:
        self.history.append((self.done, float(np.mean(losses)), self.trainer.loss(held_out)))
        losses = []
        self.report()
        self.save()

  def report(self):
    """One line with the losses, one with a held-out question, its true answer and the model's."""
    step, loss, held_out = self.history[-1]
    image, prefix, suffix = self.data.sample(len(self.history))
    [answer] = self.model.generate([image], [prefix], max_tokens=self.data.text)
    vlm.status("")
    if not self.args.quiet:
      print(f"step {step}: loss {loss:.3f}, held out {held_out:.3f}\n  {prefix!r}: {suffix!r}, model: {answer.text!r}",
            file=sys.stderr)

def curve(history, width=640, height=400):
  """History of (step, loss, held-out loss) -> picture of both curves, from zero."""
  image = Image.new("RGB", (width, height), "white")
  draw, font, pad = ImageDraw.Draw(image), ImageFont.load_default(size=13), 45
  last, top = history[-1][0], max(max(row[1:]) for row in history) * 1.05
  at = lambda step, loss: (pad + step / last * (width - 2 * pad), height - pad - loss / top * (height - 2 * pad))
  draw.line([at(0, top), at(0, 0), at(last, 0)], fill="black")
  for i in range(5):
    x, y = at(last * i / 4, top * i / 4)
    draw.text((x, height - pad + 6), f"{last * i / 4:.0f}", fill="black", font=font, anchor="mt")
    draw.text((pad - 6, y), f"{top * i / 4:.1f}", fill="black", font=font, anchor="rm")
  for column, color, name in ((1, "#4363d8", "training loss"), (2, "#e6194b", "held-out loss")):
    draw.line([at(row[0], row[column]) for row in history], fill=color, width=2)
    draw.text((width - pad, pad + 18 * column), name, fill=color, font=font, anchor="rt")
  return image

def hub_name(name):
  """The reverse of vlm.canonical: the name that hub files use."""
  name = re.sub(r"^language_model\.", "language_model.model.", name)
  return re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)

def write_file(path, arrays, metadata=None):
  """{name: array}, uint16 meaning bfloat16, -> a safetensors file, whole or not at all."""
  kinds = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.uint16): "BF16"}
  header, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
  for name, array in arrays.items():
    place = [end, end := end + array.nbytes]
    header[name] = {"dtype": kinds[array.dtype], "shape": list(array.shape), "data_offsets": place}
  text = json.dumps(header).encode()
  text += b" " * (-(8 + len(text)) % 64)  # aligned for vectors: the CPU uses tensors where the file is mapped
  part = path.with_name(path.name + ".part")
  try:
    with open(part, "wb") as file:
      file.write(len(text).to_bytes(8, "little") + text)
      for array in arrays.values():
        file.write(np.ascontiguousarray(array).data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)

def add_arguments(parser):
  """The training options of `python vlm.py`."""
  t = parser.add_argument_group("training")
  t.add_argument("--train", nargs="?", const="", metavar="DATA", help="a folder with data.jsonl; none: the toy world")
  t.add_argument("--init", metavar="DIR", help="checkpoint to start from (default: random weights)")
  t.add_argument("--save", default="weights/trained", metavar="DIR", help="where it goes (default: %(default)s)")
  t.add_argument("--steps", type=int, default=2000, metavar="N", help="updates (default: %(default)s)")
  t.add_argument("--batch", type=int, default=32, metavar="B", help="questions an update (default: %(default)s)")
  t.add_argument("--lr", type=float, default=1e-3, metavar="R", help="highest learning rate (default: %(default)s)")
  t.add_argument("--train-only", default="all", choices=PARTS, help="freeze the rest")
  t.add_argument("--resume", action="store_true", help="go on with the run in --save")
  t.add_argument("--skip-bad", action="store_true", help="leave out bad lines of data.jsonl")

def run(args):
  """What `python vlm.py --train` does -> exit code. Raises Fault."""
  for wrong, message in ((args.steps < 1, "--steps: at least 1"), (args.batch < 1, "--batch: at least 1"),
                         (not 0 < args.lr < math.inf, "--lr: above 0")):
    if wrong:
      raise Fault(message)
  job = Run(args)
  try:
    job.train()
  except KeyboardInterrupt:
    vlm.status("")
    if job.done and (not job.history or job.history[-1][0] != job.done):
      job.save()
    print(f"stopped after step {job.done}; --resume continues", file=sys.stderr)
    return 130
  print(f"{args.steps} steps done: {job.folder}", file=sys.stderr)
  return 0
