"""PaliGemma and PaliGemma 2 in one file: a picture and a question in, text and boxes out.

    picture -- pixels (B, 3, S, S) -- patches (B, P, 3*14*14) -- SigLIP (B, P, Dv) -- projector (B, P, D) --+
    prompt --- tokens (B, T) -------- embedding * sqrt(D) (B, T, D) ----------------------------------------+
                                                                             prefix (B, P + T, D) ----------+
    prefix --- Gemma, every token sees every other --> KV cache, logits (B, V) of the answer's first token
    token ---- Gemma, sees everything so far --------> KV cache, logits (B, V) of the next token, and again

Letters: B batch, S image side, P image tokens (patches), T text tokens, C context (slots of the KV cache),
H heads, K key/value heads, d head size, D width, V vocabulary; v SigLIP's. A Linear weight is (out, in), as
in the files. Sections 1 to 5 are the model, 6 to 12 what it takes to use it.
Papers: PaliGemma arxiv.org/abs/2407.07726 and 2412.03555, Gemma 2403.08295 and 2408.00118, SigLIP 2303.15343.
"""
# First, because it says what is not installed, and ends quietly on Ctrl-C.
from tokenizer import (Fault, Tokenizer, Turns, as_path, check_numbers, find_clang, in_turn,
                       learn_characters, parse_boxes, regular, write_whole)
import argparse
import importlib
import json
import logging
import math
import re
import sys
from collections import namedtuple
from dataclasses import asdict, dataclass, fields, replace
from functools import partial, wraps
from pathlib import Path
from time import perf_counter
from types import ModuleType, SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tinygrad import Device, Tensor, TinyJit, UOp, dtypes
from tinygrad.dtype import truncate
from tinygrad.helpers import DEV
from tinygrad.nn import optim
from tinygrad.nn.state import get_state_dict

# ---- 1. Config ----
# The sizes of a model under the names of config.json, with the values of keys that published files leave out.
@dataclass(frozen=True)
class VisionConfig:
  hidden_size: int                     # Dv
  num_hidden_layers: int
  num_attention_heads: int             # Hv
  intermediate_size: int
  image_size: int = 224                # S, in pixels
  patch_size: int = 14                 # in pixels
  layer_norm_eps: float = 1e-6
  hidden_act: str = "gelu_pytorch_tanh"  # of a text there is one right value
  @property
  def patches(self):                   # P
    return (self.image_size // self.patch_size) ** 2

@dataclass(frozen=True)
class TextConfig:
  hidden_size: int                     # D
  num_hidden_layers: int
  intermediate_size: int
  num_attention_heads: int = 8         # H
  num_key_value_heads: int = 1         # K
  head_dim: int = 256                  # d
  vocab_size: int = 257216             # V
  max_position_embeddings: int = 8192  # the largest C
  rope_theta: float = 10000.0
  rms_norm_eps: float = 1e-6
  query_pre_attn_scalar: float = 256.0
  attn_logit_softcapping: float = None  # none, as 0 is
  final_logit_softcapping: float = None
  hidden_activation: str = "gelu_pytorch_tanh"
  rope_type: str = "default"
  model_type: str = "gemma"
  gemma2, sliding_window = False, 10 ** 9

@dataclass(frozen=True)
class Gemma2Config(TextConfig):
  gemma2 = True
  sliding_window: int = 4096           # how far every other layer sees
  num_key_value_heads: int = 4
  attn_logit_softcapping: float = 50.0
  final_logit_softcapping: float = 30.0
  model_type: str = "gemma2"

@dataclass(frozen=True)
class Config:
  vision: VisionConfig
  text: TextConfig
  eos: tuple = (1,)                    # ids that end an answer
  image: int = None                    # the id of <image>, where the file tells it

# ---- 2. Operations ----
# In plain tinygrad: right on every device, and what kernels are tested against. Where examples/fast.py lies
# beside this file, its kernels of the same names and arguments are used.
ROOT = Path(__file__).resolve().parent
log = logging.getLogger("vlm")  # debug: what is being done, for a person who waits

def beside(name):
  """The module examples/<name>.py by its place, since a user may have another examples/; None without it."""
  package = sys.modules.setdefault("vlm_examples", ModuleType("vlm_examples"))  # they import each other
  package.__path__ = [str(ROOT / "examples")]
  if (ROOT / f"examples/{name}.py").exists():
    return importlib.import_module(f"vlm_examples.{name}")

kernels, terminal = beside("fast"), beside("terminal")

def fast(plain):
  """An operation that is the kernel of its name where there is one, and where that does not answer None."""
  own = getattr(kernels, plain.__name__, None)
  if own:
    own.plain = plain
  @wraps(plain)
  def call(*args, **options):
    out = own and own(*args, **options)
    return plain(*args, **options) if out is None else out
  return call

def to_float32(t):
  """Any weight -> float32. uint16 holds the bits of bfloat16, which are the upper half of a float32."""
  return (t.cast(dtypes.uint32) << 16).bitcast(dtypes.float32) if t.dtype == dtypes.uint16 else t.float()

@fast
def matmul(a, b, transposed=True):
  """a @ b.T, as in a Linear, or a @ b. Leading dimensions of b are a batch; without, those of a are rows."""
  b = to_float32(b)
  return a @ (b.transpose(-1, -2) if transposed else b)

@fast
def rows(weight, ids):
  return to_float32(weight[ids])  # (V, D) at (B, T) -> (B, T, D)
@fast
def layer_norm(x, weight, bias, eps):
  return x.layernorm(eps=eps) * to_float32(weight) + to_float32(bias)
@fast
def rms_norm(x, weight, eps):
  # LayerNorm without the mean, which brings little for its time (arxiv.org/abs/1910.07467). 1 + weight: Gemma
  # stores the distance from one, so that a weight of zero changes nothing.
  return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (1 + to_float32(weight))
def softmax(x, scale):
  """softmax(x * scale) of the last dimension. In float32: bfloat16 moves the likeliest token."""
  # contiguous: fused into what follows, every exponential would be computed again for each of its terms
  weights = ((x - x.max(-1, keepdim=True).detach()) * scale).exp().contiguous()
  return weights / weights.sum(-1, keepdim=True)
@fast
def soft_cap(x, cap, scale=1.0):
  """cap * tanh(x * scale / cap): nearly x * scale, never beyond cap. Keeps Gemma 2's training stable."""
  return ((x * (scale / cap)).tanh() * cap).contiguous()
@fast
def gelu(x, times=None):
  """GELU in the form with tanh, times another tensor of its shape: a gated unit, arxiv.org/abs/2002.05202."""
  return (x.gelu() if times is None else x.gelu() * times).contiguous()

@fast
def attention(q, k, v, scale, mask=None, softcap=0.0):
  """q (B, H, T, d), k, v (B, K, C, d), mask (B, 1, 1, T or 1, C), True where a query may look -> (B, T, Hd).
  Query head h reads key/value head h // (H / K). Fewer of these make the cache smaller: with one for eight
  PaliGemma keeps 37 kB a token, not 295 (arxiv.org/abs/2305.13245)."""
  B, H, T, d = q.shape
  K, C = k.shape[1:3]
  logits = matmul(q.reshape(B, K, H // K * T, d), k)  # (B, K, H/K T, d) x (B, K, C, d) -> (B, K, H/K T, C)
  if softcap:  # before the mask: -inf would become -softcap
    logits, scale = soft_cap(logits, softcap, scale), 1.0
  if mask is not None:
    logits = mask.expand(B, 1, H // K, T, C).reshape(B, 1, H // K * T, C).where(logits, -math.inf)
  out = matmul(softmax(logits, scale), v, transposed=False)  # (B, K, H/K T, C) x (B, K, C, d) -> (.., d)
  return out.reshape(B, H, T, d).transpose(1, 2).reshape(B, T, H * d)

# ---- 3. Layers ----
class Linear:
  def __init__(self, inputs, outputs, bias=False):
    self.weight, self.bias = Tensor.empty(outputs, inputs), Tensor.empty(outputs) if bias else None
  def __call__(self, x):
    x = matmul(x, self.weight.flatten(1))  # a convolution whose patches do not overlap is a matmul, too
    return x if self.bias is None else x + to_float32(self.bias)
class Embedding:
  def __init__(self, rows, width):
    self.weight = Tensor.empty(rows, width)
  def __call__(self, ids):
    return rows(self.weight, ids)
class LayerNorm:
  def __init__(self, width, eps):
    self.weight, self.bias, self.eps = Tensor.empty(width), Tensor.empty(width), eps
  def __call__(self, x):
    return layer_norm(x, self.weight, self.bias, self.eps)
class RMSNorm:
  def __init__(self, width, eps):
    self.weight, self.eps = Tensor.empty(width), eps
  def __call__(self, x):
    return rms_norm(x, self.weight, self.eps)
@fast
def through(layers, x, *inputs):  # one after the other; fast.py schedules those that are alike once
  for layer in layers:
    x = layer(x, *inputs).contiguous()
  return x

# ---- 4. SigLIP: patches to features ----
# A vision transformer, trained with texts: whether a picture belongs to a text is yes or no for each pair of
# a batch, a sigmoid, where CLIP has a softmax over all (arxiv.org/abs/2303.15343).
class Attention:
  def __init__(self, width, heads):
    self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width, bias=True) for _ in range(4))
    self.heads = heads
  def __call__(self, x):
    B, P, D = x.shape
    projections = self.q_proj, self.k_proj, self.v_proj
    q, k, v = (f(x).reshape(B, P, self.heads, -1).transpose(1, 2) for f in projections)  # (B, Hv, P, dv) each
    return self.out_proj(attention(q, k, v, (D // self.heads) ** -0.5))  # (B, P, Dv)

class MLP:
  def __init__(self, width, hidden):
    self.fc1, self.fc2 = Linear(width, hidden, bias=True), Linear(hidden, width, bias=True)
  def __call__(self, x):
    return self.fc2(gelu(self.fc1(x)))  # (B, P, Dv) -> (B, P, hidden) -> (B, P, Dv)

class EncoderLayer:
  def __init__(self, c):
    self.layer_norm1, self.layer_norm2 = (LayerNorm(c.hidden_size, c.layer_norm_eps) for _ in range(2))
    self.self_attn = Attention(c.hidden_size, c.num_attention_heads)
    self.mlp = MLP(c.hidden_size, c.intermediate_size)
  def __call__(self, x):
    x = x + self.self_attn(self.layer_norm1(x))
    return x + self.mlp(self.layer_norm2(x))

class SigLIP:
  """SimpleNamespace stands for levels of the checkpoint's names that compute nothing."""
  def __init__(self, c):
    patches = Linear(3 * c.patch_size ** 2, c.hidden_size, bias=True)
    patches.weight = patches.weight.reshape(-1, 3, c.patch_size, c.patch_size)  # a convolution, in the file
    places = Embedding(c.patches, c.hidden_size)  # learnt: attention itself does not know where a patch is
    self.embeddings = SimpleNamespace(patch_embedding=patches, position_embedding=places)
    self.encoder = SimpleNamespace(layers=[EncoderLayer(c) for _ in range(c.num_hidden_layers)])
    self.post_layernorm, self.patch = LayerNorm(c.hidden_size, c.layer_norm_eps), c.patch_size
  def __call__(self, pixels):
    """(B, 3, S, S) -> (B, P, Dv). PaliGemma uses every patch: no class token, no pooling head."""
    B, _, S, _ = pixels.shape
    p, g = self.patch, S // self.patch  # pixels of a patch's side, patches of the image's side
    x = pixels[:, :, :g * p, :g * p].reshape(B, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5)  # (B, g, g, 3, p, p)
    x = self.embeddings.patch_embedding(x.reshape(B, g * g, 3 * p * p))  # (B, P, Dv)
    x = x + to_float32(self.embeddings.position_embedding.weight)  # (P, Dv)
    return self.post_layernorm(through(self.encoder.layers, x))

# ---- 5. Gemma: positions, attention, blocks ----
def rope_table(c, positions):
  """(.., T) positions -> cos and sin, each (.., T, d / 2), float32 as transformers computes them."""
  frequency = np.float32(c.rope_theta) ** (-np.arange(0, c.head_dim, 2, dtype=np.float32) / c.head_dim)
  angle = positions[..., None].astype(np.float32) * frequency
  return np.cos(angle), np.sin(angle)

def rope(x, cos, sin):
  """Turn each pair (i, i + d/2) of x (B, H, T, d) by its position's angle: the product of a query and a key
  then depends on their distance only (arxiv.org/abs/2104.09864). Half-split, not interleaved pairs."""
  a, b = x.chunk(2, dim=-1)  # (B, H, T, d / 2) each
  return (a * cos - b * sin).cat(b * cos + a * sin, dim=-1)

class GemmaAttention:
  def __init__(self, c, layer):
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    self.q_proj, self.o_proj = Linear(c.hidden_size, q), Linear(q, c.hidden_size)
    self.k_proj, self.v_proj = Linear(c.hidden_size, kv), Linear(c.hidden_size, kv)
    self.config, self.layer = c, layer
  def __call__(self, x, cos, sin, masks, write):
    c, (B, T, _) = self.config, x.shape
    projections = self.q_proj, self.k_proj, self.v_proj
    q, k, v = (f(x).reshape(B, T, -1, c.head_dim).transpose(1, 2) for f in projections)
    k = rope(k, cos, sin)  # (B, K, T, d), as v; q (B, H, T, d)
    if write:  # into a cache
      k, v = write(self.layer, k, v)  # (B, K, T, d) new -> (B, K, C, d) all
    scale = (c.query_pre_attn_scalar if c.gemma2 else c.head_dim) ** -0.5
    mask = masks[c.gemma2 and self.layer % 2 == 0]  # every other layer sees no farther than the window
    return self.o_proj(attention(rope(q, cos, sin), k, v, scale, mask, c.attn_logit_softcapping))

class GemmaMLP:
  def __init__(self, width, hidden):
    self.gate_proj, self.up_proj = Linear(width, hidden), Linear(width, hidden)
    self.down_proj = Linear(hidden, width)
  def __call__(self, x):
    return self.down_proj(gelu(self.gate_proj(x), self.up_proj(x)))  # (B, T, D), hidden between

class Block:
  """Gemma 2 differs from Gemma in four things (arxiv.org/abs/2408.00118): each half of a block is normalised
  on its way out, too; soft-caps on attention and final logits; a query scale of its own; sliding windows in
  some layers, which make long texts cheaper."""
  def __init__(self, c, layer):
    self.self_attn, self.mlp = GemmaAttention(c, layer), GemmaMLP(c.hidden_size, c.intermediate_size)
    halves = ["input_layernorm", "post_attention_layernorm"]
    for name in halves + ["pre_feedforward_layernorm", "post_feedforward_layernorm"] * c.gemma2:
      setattr(self, name, RMSNorm(c.hidden_size, c.rms_norm_eps))
    self.gemma2 = c.gemma2
  def __call__(self, x, *attention_inputs):
    h = self.self_attn(self.input_layernorm(x), *attention_inputs)
    if self.gemma2:  # post_attention_layernorm: here it is applied to the output of the attention ...
      x = x + self.post_attention_layernorm(h)
      return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
    x = x + h  # ... and in Gemma 1 to the input of the MLP
    return x + self.mlp(self.post_attention_layernorm(x))

class Gemma:
  def __init__(self, c):
    self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
    self.layers = [Block(c, i) for i in range(c.num_hidden_layers)]
    self.norm, self.config = RMSNorm(c.hidden_size, c.rms_norm_eps), c
  def embed(self, ids):
    """(B, T) -> (B, T, D), times sqrt(D), which the projected image is not. As in transformers the factor is
    rounded to the weights' type: sqrt(2048) = 45.2548 is 45.25 in bfloat16."""
    kinds = {dtypes.uint16: dtypes.bfloat16, dtypes.float16: dtypes.float16}  # of all others float32
    root = truncate[kinds.get(self.embed_tokens.weight.dtype, dtypes.float32)](self.config.hidden_size ** 0.5)
    return self.embed_tokens(ids) * root
  def __call__(self, x, cos, sin, masks, write=None):
    """x (B, T, D), cos, sin (B or 1, 1, T, d / 2), masks (full, sliding), write: see Cache -> (B, T, D)."""
    return self.norm(through(self.layers, x, cos, sin, masks, write))
  def logits(self, x):
    """(B, D) -> (B, V), by the embedding matrix again: what a token means going in, it means coming out."""
    logits, cap = matmul(x, self.embed_tokens.weight), self.config.final_logit_softcapping
    return soft_cap(logits, cap) if cap else logits

class PaliGemma:
  """All weights. Attribute names are the checkpoint's, so a weight's path here is its name in the file."""
  def __init__(self, c):
    self.vision_tower, self.language_model = SigLIP(c.vision), Gemma(c.text)
    projector = Linear(c.vision.hidden_size, c.text.hidden_size, bias=True)
    self.multi_modal_projector = SimpleNamespace(linear=projector)

# ---- 6. Pixels ----
# Beyond twice this Pillow refuses before it decodes: a few kB can unpack to gigabytes.
Image.MAX_IMAGE_PIXELS = 50_000_000

def open_image(source):
  """Path, file object or PIL image -> upright RGB PIL image. Raises Fault."""
  try:
    image = source if isinstance(source, Image.Image) else Image.open(regular(source))
    image.load()
    try:
      image = ImageOps.exif_transpose(image)  # the picture as its viewer shows it: boxes are drawn on that
    except Exception:  # garbage beside the pixels, which are good
      pass
    if isinstance(image.info.get("transparency"), str):  # a text that has this name
      del image.info["transparency"]
    if image.has_transparency_data:  # on white, as transformers does
      image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")
  except Exception as e:  # Pillow's readers raise whatever they stumble over
    raise Fault(f"{source}: {getattr(e, 'strerror', 0) or f'not an image, or a damaged one ({e})'}") from None

def to_pixels(source, side):
  """Anything open_image takes, or a float32 array (3, S, S) in [-1, 1] as it is -> float32 (1, 3, S, S)."""
  if isinstance(source, np.ndarray):
    if source.dtype.kind != "f" or source.shape != (3, side, side) or not (abs(source) <= 1).all():  # or NaN
      raise Fault(f"pixels are {source.dtype} {source.shape}, not floats (3, {side}, {side}) from -1 to 1")
    return source.astype(np.float32)[None]
  # Squeezed to a square, not cropped: boxes are relative to each side, so they unsqueeze by themselves.
  image = open_image(source).resize((side, side), Image.Resampling.BICUBIC)
  return ((np.asarray(image, np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None]  # (1, 3, S, S)

# ---- 7. KV cache ----
# No token sees a later one, so its keys and values never change: kept, they make the next token cost the work
# of one, not of the whole sequence.
NOWHERE = -10 ** 9  # the position of a slot that nobody may look at

def layout(lengths, image_tokens, T, C):
  """Prompt lengths (B,) -> the position of each cache slot, (B, C) int32, NOWHERE for padding. A row is
  [image][padding][prompt][answer], so that prompts of all lengths share one program and end at the same slot,
  which is the position of all text. The image moves up by the padding: RoPE sees distances only."""
  slots, pad = np.arange(C)[None], T - np.array(lengths)[:, None]
  after_image = np.where(slots < image_tokens + pad, NOWHERE, slots)
  return np.where(slots < image_tokens, slots + pad, after_image).astype(np.int32)

class Cache:
  """k and v (B, K, C, d) for each layer. It never grows, so that one compiled step serves every token."""
  def __init__(self, c, B, C, device, place):
    empty = np.zeros((B, c.num_key_value_heads, C, c.head_dim), np.float32)
    self.k, self.v = ([place(empty, device) for _ in range(c.num_hidden_layers)] for _ in "kv")
    self.rope = [upload(t, device) for t in rope_table(c, np.arange(C))]
  def write(self, start, seen, layer, k, v):
    """New k and v (B, K, T, d) of a layer into its slots from `start`; yields the first `seen` of each."""
    for cache, new in ((self.k[layer], k), (self.v[layer], v)):
      store = cache[:, :, start:start + new.shape[2]].uop.store(new.uop)
      yield Tensor(cache.uop.after(store))[:, :, :seen]  # what is read is the cache after its write

# ---- 8. Sampling ----
@dataclass(frozen=True)
class Sampling:
  """How the tokens of an answer are chosen. Raises Fault."""
  max_tokens: int = 256      # room for several boxes and masks: of 4 tokens and a label, and 16 more
  temperature: float = 0.0   # 0: greedy, always the likeliest
  top_k: int = 0             # 0: off
  top_p: float = 1.0         # nucleus sampling, arxiv.org/abs/1904.09751
  seed: int = None
  def __post_init__(self):
    check_numbers(self)
    if not (self.max_tokens >= 1 and (self.temperature == 0 or 1e-6 <= self.temperature <= 1e6)
            and self.top_k >= 0 and 0 < self.top_p <= 1 and (self.seed or 0) >= 0):  # nor is NaN
      raise Fault("--max-tokens: from 1; --temperature: 0, or from 1e-6 to 1e6; --top-k and --seed: from 0; "
                  "--top-p: above 0, at most 1")
  def draw(self, logits, rng):
    """(V,) float32 -> token id. Temperature first, then top-k, then top-p of what is left."""
    logits = logits.astype(np.float64) / self.temperature
    if 0 < self.top_k < len(logits):
      logits[logits < np.partition(logits, -self.top_k)[-self.top_k]] = -np.inf
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]  # the mass of all likelier tokens
    p[order[before >= self.top_p]] = 0
    return int(rng.choice(len(p), p=p / p.sum()))

# ---- 9. Generate ----
Answer = namedtuple("Answer", "text tokens boxes")  # boxes: of tokenizer.Box, in pixels of the picture

@fast
def likeliest(logits):
  """(B, V) -> (B,) int32, -1 where a logit is NaN."""
  return logits.isnan().any(-1).where(-1, logits.argmax(-1)).cast(dtypes.int32)

@fast
def capture(function, *shaped_by):
  """A function of tensors -> a compiled program. shaped_by: what it depends on besides its code and tensors,
  so that fast.py can keep programs on disk for the next process."""
  program = TinyJit(function)
  program.cnt = not getattr(Tensor, "training", False)  # 1 skips the dry run, which only an optimizer needs
  return program

def next_token(gemma, x):
  """(B, T, D) -> the likeliest token (B,) after the last one, and the logits (B, V)."""
  logits = gemma.logits(x[:, -1].contiguous()).contiguous()
  return likeliest(logits), logits

class VLM:
  """A loaded model and its programs, one for each shape that came up: vision, prefill and a step of decoding.
  An image is a path, a file object, a PIL image or a float32 array (3, S, S) in [-1, 1]; several, of one
  question, are a list. One question at a time: see Turns in tokenizer.py."""
  def __init__(self, net, config, tokenizer, device, place):
    self.net, self.config, self.tokenizer, self.device, self.place = net, config, tokenizer, device, place
    self.programs, self.caches, self.features, self.timings, self.turns = {}, {}, {}, {}, Turns()
  def _run(self, key, function, *inputs):
    # No function holds self: a garbage collection on one of tinygrad's threads would wait for itself forever.
    if key[0] != "decode":  # by then the answer has begun, on the line that this would clear
      log.debug(f"{key[0]}{', compiling, the first time only' * (key not in self.programs)}")
    if key not in self.programs:
      self.programs[key] = capture(function, self.device, key, self.config)
    inputs = [upload(t, self.device) if isinstance(t, np.ndarray) else t for t in inputs]
    return self.programs[key](*inputs)
  def vision(self, image):
    """-> float32 arrays: SigLIP's features (P, Dv), those projected (P, D), kept for a second question."""
    net, pixels = self.net, to_pixels(image, self.config.vision.image_size)  # not self in `run`: see _run
    def run(pixels):
      features = net.vision_tower(pixels).contiguous()
      return features, net.multi_modal_projector.linear(features).contiguous()  # used as it is: no scaling
    if (key := pixels.tobytes()) not in self.features:
      outputs = self._run(("vision",), run, pixels)
      self.features = dict([*self.features.items()][-7:]) | {key: [t.numpy()[0] for t in outputs]}
    return self.features[key]
  def prefill(self, image, ids, positions):
    """image (B, P, D), ids (B, T) right-aligned, positions (B, C) -> next token (B,), logits (B, V)."""
    (B, C), n = positions.shape, image.shape[1] + ids.shape[1]
    c, gemma = self.config.text, self.net.language_model
    cache = self.caches[B, C] = self.caches.get((B, C)) or Cache(c, B, C, self.device, self.place)
    def run(image, ids, cos, sin, seen):
      # No mask but of padding: image and prompt all see each other, in Gemma 2's sliding layers too. Both are
      # there before the answer begins, so the picture can be read in the light of the question.
      x, write = image.cat(gemma.embed(ids), dim=1), partial(cache.write, 0, n)
      return next_token(gemma, gemma(x, cos, sin, (seen, seen), write))
    cos, sin = (t[:, None] for t in rope_table(c, positions[:, :n].clip(0)))  # (B, 1, n, d / 2)
    seen = positions[:, None, None, None, :n] >= 0
    return self._run(("prefill", B, n, C), run, image, ids.astype(np.int32), cos, sin, seen)
  def decode(self, token, slot, positions):
    """token (B,) for a slot, positions (B, C) -> next token (B,), logits (B, V). For any slot."""
    B, C = positions.shape
    cache, gemma, window = self.caches[B, C], self.net.language_model, self.config.text.sliding_window
    def run(token, slot, positions):
      cos, sin = (t[slot:slot + 1] for t in cache.rope)
      positions = positions[:, None, None, None]  # (B, 1, 1, 1, C)
      seen = (positions >= 0) & (positions <= slot)
      masks = seen, seen & (positions + window > slot)
      x, write = gemma.embed(token.reshape(B, 1)), partial(cache.write, slot, C)
      return next_token(gemma, gemma(x, cos, sin, masks, write))
    slot = UOp.variable("slot", 0, C - 1).bind(slot)
    return self._run(("decode", B, C), run, np.asarray(token, np.int32), slot, positions)
  def prefix(self, images, prompts, max_tokens):
    """-> next token (B,) and logits (B, V) after the prefix, positions (B, C), the next slot."""
    prompts = [self.tokenizer.prompt(prompt) for prompt in prompts]
    images = [image if isinstance(image, list | tuple) else [image] for image in images]
    if {len(row) for row in images} != {len(images[0]) or 1}:
      raise Fault("a prompt needs a picture, and all rows of a batch equally many; ask such rows one by one")
    P, longest = self.config.vision.patches * len(images[0]), max(map(len, prompts))
    room = self.config.text.max_position_embeddings - P - max_tokens
    if longest > room:
      raise Fault(f"the prompt does not fit: of its {longest} tokens there is room for {room}; shorten it, "
                  "lower --max-tokens, or ask about each picture by itself (examples/batch.py)")
    T = min(max(8, 1 << (longest - 1).bit_length()), room)  # 8, 16, 32, ...: few programs, few wasted rows
    C = P + T + max_tokens
    C += min(-C % 256, room - T)  # in steps of 256: seldom another program
    start = perf_counter()
    image = np.concatenate([self.vision(image)[1] for row in images for image in row])
    seen = perf_counter()
    ids = np.array([[0] * (T - len(prompt)) + prompt for prompt in prompts])
    positions = layout([len(prompt) for prompt in prompts], P, T, C)
    token, logits = self.prefill(image.reshape(len(images), P, -1), ids, positions)
    if kernels and max_tokens > 1:  # while the device is busy
      kernels.prepare(self.decode, ids[:, 0], P + T, positions)
    token = token.numpy()
    self.timings |= {"vision_s": seen - start, "prefill_s": perf_counter() - seen, "decode_tok_s": 0.0}
    return token, logits, upload(positions, self.device), P + T
  @in_turn
  def tokens(self, images, prompts, **options):
    """Lists of B images and B prompts, options of Sampling -> for each step a list of B token ids, None in
    rows that have ended."""
    sampling = Sampling(**options)
    token, logits, positions, slot = self.prefix(images, prompts, sampling.max_tokens)
    log.debug("")  # clears the line that the answer is about to be on
    rngs = [np.random.default_rng(sampling.seed) for _ in prompts]  # alike: a row draws what it would alone
    ended, start = np.zeros(len(prompts), bool), perf_counter()
    for step in range(sampling.max_tokens):
      if step:
        token, logits = self.decode(token, slot + step - 1, positions)
        token = token.numpy()
        self.timings["decode_tok_s"] = step / (perf_counter() - start)
      if (token < 0).any():
        raise Fault("the logits are NaN: the weights are damaged, or too large for their number type", code=1)
      if sampling.temperature:
        token = np.array([sampling.draw(row, rng) for row, rng in zip(logits.numpy(), rngs)], np.int32)
      ended |= np.isin(token, self.config.eos)
      if ended.all():
        return
      yield [None if end else id for end, id in zip(ended, token.tolist())]
  def stream(self, image, prompt, **options):
    """Yields the answer as str pieces, each as soon as it is known; then `answered` is the whole Answer."""
    ids = (id for [id] in self.tokens([image], [prompt], **options))
    self.answered = self.answer(image, (yield from self.tokenizer.stream(ids)))
  def generate(self, images, prompts, **options):
    """Lists of B images and B prompts -> list of B Answers."""
    with self.turns:  # of another thread
      steps = list(self.tokens(images, prompts, **options))
    rows = [[step[i] for step in steps if step[i] is not None] for i in range(len(images))]
    return list(map(self.answer, images, rows))
  def answer(self, image, tokens):
    """Token ids -> Answer. Boxes are in pixels of the (first) picture, or of an array's square."""
    text, image = self.tokenizer.decode(tokens), image[0] if isinstance(image, list | tuple) else image
    size = image.shape[:0:-1] if isinstance(image, np.ndarray) else open_image(image).size
    return Answer(text, tokens, parse_boxes(text, *size))

# ---- 10. Weights ----
# bfloat16 has no fast arithmetic on a CPU: such weights stay the 16 bits that they are, see to_float32. int8
# and uint8 are what examples/quantize.py makes of weights, and examples/fast.py multiplies with.
TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8, "U8": np.uint8}

def read_json(path):
  """-> the dict in a JSON file. Raises Fault."""
  try:
    return table(json.loads(Path(regular(path)).read_text()))
  except (OSError, ValueError, RecursionError) as e:
    raise Fault(f"{path}: {getattr(e, 'strerror', None) or 'not JSON'}; download the folder again") from None
def table(found):
  return found if isinstance(found, dict) else {}

def read_config(path):
  """A published config.json -> Config; what is taken from it is checked. Raises Fault."""
  def check(right, found, key):
    if not right:
      raise Fault(f"{path}: {key} {repr(found.get(key))[:99]} is not understood; is it PaliGemma's?")
  def sizes(kind, found):
    """That dataclass, whose fields are keys of this part; null, but for an int, is the default or off."""
    values = {}
    for f in fields(kind):
      value = found.get(f.name, f.default)
      value = (0.0 if "softcap" in f.name else f.default) if value is None and f.type != int else value
      if f.type == str:
        check(value == f.default, found, f.name)
      else:  # a bool is of another type, and NaN no such number
        least, most = 0 if "softcap" in f.name else 1e-12, 1000 if "layers" in f.name else 10 ** 7
        check(type(value) in (int, f.type) and least <= value <= most, found, f.name)
      values[f.name] = f.type(value)
    return kind(**values)
  top, more = read_json(path), path.with_name("generation_config.json")
  vision, text = table(top.get("vision_config")), table(top.get("text_config"))
  text |= table(text.get("rope_parameters"))
  check(top.get("model_type") == "paligemma", top, "model_type")
  check(text.get("rope_scaling") is None, text, "rope_scaling")
  v = sizes(VisionConfig, vision)
  t = sizes(Gemma2Config if text.get("model_type") == "gemma2" else TextConfig, text)
  kinds = "sliding" if t.gemma2 else "full", "full"
  layers = [f"{kinds[i % 2]}_attention" for i in range(t.num_hidden_layers)]
  check(text.get("layer_types") in (None, layers), text, "layer_types")
  check(v.hidden_size % v.num_attention_heads == 0, vision, "num_attention_heads")
  check(t.num_attention_heads % t.num_key_value_heads == 0, text, "num_key_value_heads")
  found = text | top | (read_json(more) if more.exists() else {})
  eos = found.get("eos_token_id") or 1
  eos = eos if isinstance(eos, list) else [eos]
  check(all(type(id) is int for id in eos), found, "eos_token_id")
  return Config(v, t, tuple(eos), top.get("image_token_index"))

def canonical(name):
  """The name of a tensor in any published layout -> its path in PaliGemma, "" of what is no weight."""
  name = re.sub(r"^((model|vlm|base_model|paligemma|paligemma_with_expert)\.)+", "", name)
  name = re.sub(r"^(language_model|vision_tower)\.(model|vision_model)\.", r"\1.", name)
  name = re.sub(r"^(language_model\.)?lm_head\.", "language_model.embed_tokens.", name)  # which they share
  return re.sub(r"^__metadata__$|.*\.(position_ids|inv_freq)$", "", name)  # constants, once saved

def read_weights(folder):
  """-> {path in PaliGemma: array} of model.safetensors or of the parts of a model: views of mapped files,
  bfloat16 as uint16. Raises Fault."""
  arrays = {}
  for file in sorted(folder.glob("model*.safetensors")) or [folder / "model.safetensors"]:
    try:
      with safe_open(regular(file), "numpy"):  # checks the header, and that tensors fill the file alone
        data = np.asarray(np.memmap(file, np.uint8, "c"))
    except (SafetensorError, OSError, ValueError) as e:
      raise Fault(f"{file}: not a complete safetensors file ({str(e)[:300]}); get it again") from None
    start = 8 + data[:8].view(np.uint64).item()
    for name, t in json.loads(data[8:start].tobytes()).items():
      path = canonical(name)
      if path:
        if t["dtype"] not in TYPES:
          raise Fault(f"{file}: {name} is {t['dtype']}; weights must be float32, float16 or bfloat16")
        array = data[start:][slice(*t["data_offsets"])].view(TYPES[t["dtype"]]).reshape(t["shape"])
        if path in arrays and not np.array_equal(arrays[path], array):
          raise Fault(f"{file}: {name} is there twice, with other values; this is another model")
        arrays[path] = array
  return arrays

def check_names(expected, found):
  """Both {name: shape}. A missing tensor would stay random, an extra one means another model."""
  for name in expected | found:
    right, shape = expected.get(name, "absent"), found.get(name, "missing")
    if shape != right:
      raise Fault(f"{name} is {shape}, but by config.json should be {right}; is the download complete?")

@fast
def upload(array, device, name=None):
  """An array -> a Tensor. name: of a weight, whose array stays, so that fast.py may use its memory."""
  return Tensor(array, device=device).realize()

def assemble(config, arrays, device, place):
  """{path in PaliGemma: array}, as files have them -> PaliGemma on the device. Raises Fault."""
  net = PaliGemma(config)
  shapes = {name: t.shape for name, t in get_state_dict(net).items()}
  if kernels:  # which can multiply with quantised weights
    arrays = kernels.join_scales(arrays, shapes)
  check_names(shapes, {name: array.shape for name, array in arrays.items()})
  for name, array in arrays.items():
    owner, (*path, leaf) = net, name.split(".")
    for part in path:
      owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
    setattr(owner, leaf, place(array, device, name))
  return net

@fast
def open_device(name):
  """A name of tinygrad's, None: the best there is -> the device's full name, ready for use. Raises Fault."""
  try:
    name = Device.canonicalize(name)
    if name.startswith("CPU"):
      find_clang()
    return Device[name].device
  except Fault:
    raise
  except Exception as e:  # whatever a driver that is not there raises
    raise Fault(f"device {name or DEV.device or 'CPU'} cannot be used ({e}); omit --device, DEV") from None

def load(folder, device=None, place=upload, adapter=None):
  """A PaliGemma folder (config.json, *.safetensors, tokenizer.model) -> VLM. place: what makes arrays into
  tensors, see examples/shard.py; adapter: a folder, see examples/lora.py. Raises Fault."""
  start, folder = perf_counter(), as_path(folder)
  config = read_config(folder / "config.json")
  tokenizer = Tokenizer(folder / "tokenizer.model", config.text.vocab_size, config.image)
  device, arrays = open_device(device), read_weights(folder)
  net = assemble(config, arrays, device, place)
  if adapter:
    if not kernels:
      raise Fault("--adapter needs the folder examples/ beside vlm.py")
    beside("lora").attach(net, adapter, place, device)
  model = VLM(net, config, tokenizer, device, place)
  model.folder, model.arrays = folder, arrays  # a tensor over borrowed memory does not keep it alive
  model.timings["load_s"] = perf_counter() - start
  return model

# ---- 11. Training: a small PaliGemma from random weights ----
TOY = Config(VisionConfig(128, 4, 4, 384, image_size=56), TextConfig(128, 3, 384, 4, 1, 32))
COLORS = "red", "green", "blue", "yellow", "purple", "black"
CORNERS = {"triangle": 3, "square": 4, "circle": 60}  # of a circle nobody sees that many

def draw_scene(rng, side=56):
  """-> a picture of one or two shapes, a question, and its answer: what they are, from left to right."""
  picture, names, count = Image.new("RGB", (side, side), "white"), [], rng.integers(1, 3)
  for i in range(count):
    color, shape, r = rng.choice(COLORS), rng.choice([*CORNERS]), rng.uniform(0.3, 0.5) * side / count
    center = side * (i + 0.5) / count, rng.uniform(r, side - r)
    ImageDraw.Draw(picture).regular_polygon((center, r), CORNERS[shape], fill=color)
    names.append(f"a {color} {shape}")
  return picture, "caption en", " and ".join(names)

def training_mask(starts, ends, n, window=math.inf):
  """starts (B,): how many tokens of a row all see each other; ends (B,): how many are no padding -> bool
  (B, 1, 1, n, n). Padding is seen by nobody and sees the rest: the softmax of a row that sees nothing is NaN.

      3 prefix + 2 answer tokens, 1 padding     1 1 1 0 0 0
      a row is a query, a column what           1 1 1 0 0 0
      it may look at                            1 1 1 0 0 0
                                                1 1 1 1 0 0
                                                1 1 1 1 1 0
                                                1 1 1 1 1 0
  """
  query, key = np.arange(n)[:, None], np.arange(n)
  starts, ends = (np.reshape(t, (-1, 1, 1, 1, 1)) for t in (starts, ends))
  near = (key <= query) & (key > query - window)
  return (near | (query < starts) & (key < starts) | (query >= ends)) & (key < ends)

def collate(c, P, rows, T):
  """B rows (prompt ids, answer ids), each after P image tokens -> ids (B, T); labels (B, T), the token after
  each, -100 where none is learnt; masks full and sliding (B, 1, 1, n, n); cos and sin (n, d / 2)."""
  starts, ends = np.transpose([(len(prompt), len(prompt + answer)) for prompt, answer in rows])
  ids = np.array([(prompt + answer + [0] * T)[:T] for prompt, answer in rows], np.int32)
  place = np.arange(T) + 1  # of the label
  learnt = (place >= starts[:, None]) & (place < ends[:, None])
  masks = [training_mask(P + starts, P + ends, P + T, window) for window in (math.inf, c.sliding_window)]
  return ids, np.where(learnt, np.roll(ids, -1, 1), -100), *masks, *rope_table(c, np.arange(P + T))

def loss(net, pixels, ids, labels, full, sliding, cos, sin):
  """Mean cross-entropy of the answers' tokens. pixels (G, 3, S, S): each is the picture of B / G rows."""
  gemma, image = net.language_model, net.multi_modal_projector.linear(net.vision_tower(pixels))  # (G, P, D)
  image = image.repeat_interleave(len(ids) // len(image), 0)  # (B, P, D)
  x = gemma(image.cat(gemma.embed(ids), dim=1), cos, sin, (full, sliding))  # (B, P + T, D)
  logits = gemma.logits(x[:, image.shape[1]:].contiguous()).contiguous()  # (B, T, V)
  return logits.sparse_categorical_crossentropy(labels, ignore_index=-100)  # with -1 it would ignore nothing

def train(folder, samples, steps, device):
  """[(picture, question, answer)], or drawn ones -> a folder of a PaliGemma that has learnt nine tenths."""
  rng = np.random.default_rng(0)
  samples = samples or [draw_scene(rng) for _ in range(4000)]
  tokenizer = learn_characters(samples, folder)
  vision, text = TOY.vision, replace(TOY.text, vocab_size=tokenizer.image + 1)
  pixels = np.concatenate([to_pixels(picture, vision.image_size) for picture, *_ in samples])
  rows = [(tokenizer.prompt(asked), tokenizer.encode(said) + [tokenizer.eos]) for _, asked, said in samples]
  longest = max(len(prompt + answer) for prompt, answer in rows)
  def batch(chosen):
    table = collate(text, vision.patches, [rows[i] for i in chosen], longest)
    return [upload(t, device) for t in (pixels[chosen], *table)]
  net, shown = PaliGemma(Config(vision, text)), len(rows) * 9 // 10
  weights = get_state_dict(net)
  for name, t in weights.items():
    value = rng.standard_normal(t.shape) * math.prod(t.shape[1:]) ** -0.5  # keeps the variance of its input
    if t.ndim == 1:  # no bias, and norms that are the identity, as Gemma's are at zero
      value = np.full(t.shape, "vision" in name and "norm" in name and "weight" in name)
    t.replace(upload(value.astype(np.float32), device))
  optimizer = (kernels or optim).AdamW(weights.values())
  def step(*batch):
    optimizer.zero_grad()
    return loss(net, *batch).backward().realize(*optimizer.schedule_step())
  measure, unseen = capture(partial(loss, net), device), batch(range(shown, len(rows))[:64])
  Tensor.training = optim.TRAINING = True  # gradients are wanted; as tinygrad 0.13 and 0.14 name it
  step = capture(step, device)
  try:
    for i in range(steps):
      if i % 50 == 0:
        held_out = measure(*unseen).item()
      optimizer.lr.assign([2e-3 * min(i / 50, 1 - i / steps)]).realize()
      value = step(*batch(rng.integers(shown, size=32))).item()
      log.debug("%d of %d steps, loss %.3f, held-out %.3f", i + 1, steps, value, held_out)
  except KeyboardInterrupt:  # what has been learnt so far is saved
    pass
  Tensor.training = False
  write_whole(folder / "model.safetensors", save({name: t.numpy() for name, t in weights.items()}))
  write_whole(folder / "config.json", json.dumps(
    {"model_type": "paligemma", "image_token_index": tokenizer.image,
     "projection_dim": text.hidden_size, "text_config": asdict(text),
     "vision_config": asdict(vision) | {"vision_use_head": False}}))
  if terminal:
    terminal.trained(load(folder, device), samples)

# ---- 12. Command line ----
def program(work):
  """Decorates a program's main(argv): what the user did wrong is one line on stderr and an exit code."""
  def main(argv=sys.argv[1:]):
    log.handlers = [(terminal or logging).StreamHandler()]
    log.setLevel("CRITICAL" if "--quiet" in argv else "DEBUG" if terminal else "INFO")
    try:
      return (terminal.run(work, argv) if terminal else work(argv)) or 0
    except Fault as e:
      log.critical(f"{Path(work.__code__.co_filename).stem}: {e}")
      return e.code
    except KeyboardInterrupt:
      return 130
  return main

def add_arguments(p, answers=True):
  """The options that programs share; `answers`: those of Sampling too, for programs that ask the model."""
  p.add_argument("--weights", help="a PaliGemma folder or name (default: largest in weights/)")
  p.add_argument("--adapter", help="a folder that examples/train.py or PEFT has made")
  p.add_argument("--device", help="METAL, CUDA, CPU, ... (default: the best, or $DEV)")
  p.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
  for f in fields(Sampling) if answers else ():
    p.add_argument(f"--{f.name.replace('_', '-')}", type=f.type, default=f.default, metavar="N",
                   help=terminal and terminal.SAMPLING[f.name])

def sampling(args):
  """-> the options of Sampling on a command line, checked. Raises Fault."""
  return asdict(Sampling(**{f.name: getattr(args, f.name) for f in fields(Sampling)}))

def open_model(args, place=upload):
  """The model that the options of add_arguments name. Raises Fault."""
  folder = terminal.find_weights(args.weights, ROOT) if terminal else args.weights or "weights"
  if not terminal:
    log.info("without examples/ beside vlm.py: the same answers, but slowly, and no boxes drawn")
  log.debug(f"loading {folder}")
  model = load(folder, args.device, place, args.adapter)
  log.info(f"{folder} answers")
  return model

def ask(model, args, images, prompt):
  """One question, as the command line answers it: text or JSON, boxes, seconds."""
  pictures = [open_image(name) for name in images]
  for piece in model.stream(pictures, prompt, **sampling(args)):
    print("" if args.json else piece, end="", flush=True)
  answer, t = model.answered, model.timings
  drawing = terminal and terminal.Drawing(pictures[0], answer, model.folder, model.device)
  boxes = drawing.entries if drawing else answer.boxes
  print(json.dumps(answer._asdict() | {"boxes": boxes, "timings": t}, default=asdict)
        if args.json else "", flush=True)
  if drawing:
    drawing.save(args, images)
  log.info(f"load {t['load_s']:.2f} s, vision {t['vision_s']:.2f} s, prefill {t['prefill_s']:.2f} s, "
           f"{t['decode_tok_s']:.1f} tok/s")

@program
def main(argv):
  p = (terminal or argparse).ArgumentParser(
    prog="vlm.py", usage="vlm.py [IMAGE ...] [PROMPT] [options]", allow_abbrev=False,
    description="Ask PaliGemma about a picture or several; without a prompt, again and again.",
    epilog='prompts: "caption en", "answer en QUESTION", "detect A ; B", "segment A"')
  p.add_argument("words", nargs="*", help=argparse.SUPPRESS)  # the usage and description tell it
  p.add_argument("--json", action="store_true", help="one JSON object instead of text")
  p.add_argument("--train", action="store_true", help="a small model, on drawn shapes or IMAGE, a folder")
  p.add_argument("--steps", type=int, default=1000, help="of --train (default: %(default)s)")
  p.add_argument("--save", type=Path, default=ROOT / "weights/mine", help="of --train: a new folder")
  add_arguments(p)
  if terminal:
    terminal.add_arguments(p)
  args = p.parse_args(argv)
  *images, prompt = terminal.words(args, ROOT) if terminal else args.words or [""]
  if args.train:
    return train(args.save, terminal and terminal.samples(args), args.steps, open_device(args.device))
  sampling(args)  # all that can be wrong, before the slow part
  for name in images:
    open_image(name)
  question = partial(ask, open_model(args), args)
  return terminal.loop(question, images, open_image) if prompt is None else question(images, prompt)

if __name__ == "__main__":
  sys.exit(main())
