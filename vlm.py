"""PaliGemma and PaliGemma 2 in one file: a picture and a question in, text and boxes out.

    picture -- pixels (B, 3, S, S) -- patches (B, P, 3*14*14) -- SigLIP (B, P, Dv) -- projector (B, P, D) --+
    prompt --- tokens (B, T) -------- embedding * sqrt(D) (B, T, D) ----------------------------------------+
                                                                             prefix (B, P + T, D) ----------+
    prefix --- Gemma, every token sees every other --> KV cache, logits (B, V) of the answer's first token
    token ---- Gemma, sees everything so far --------> KV cache, logits (B, V) of the next token, and again

Letters in shape comments: B batch, S image side, P image tokens (patches), T text tokens, C context (slots of the KV
cache), H heads, K key/value heads, d head size, D width, V vocabulary. A Linear weight is (out, in), as in the files.
"""
import argparse
import functools
import json
import math
import re
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageOps
from tinygrad import Tensor, TinyJit, UOp, dtypes
from tinygrad.dtype import truncate
from tinygrad.helpers import DEV
from tinygrad.nn.state import get_state_dict

from tokenizer import Tokenizer, parse_boxes

# ---- 1. Config ----
class Fault(Exception):
  """Something is wrong with what the user gave: the message says what, and what to do. The command line prints it and
  exits with `code`: 2 for bad input, 1 for work that cannot go on."""
  def __init__(self, message, code=2):
    super().__init__(message)
    self.code = code

def read_config(path):
  """A published config.json, or an .npz -> the sizes of a model. Fills in what those leave out. Raises Fault."""
  try:
    top = original.config(path)
    if top.get("model_type") != "paligemma":
      raise Fault(f"{path}: model_type is {top.get('model_type')!r}, not 'paligemma'; give a PaliGemma folder")
    v, t = top["vision_config"], top["text_config"]
    gemma2 = {"gemma": False, "gemma2": True}[t.get("model_type", "gemma")]
    side, patch = v.get("image_size", 224), v.get("patch_size", 14)
    sizes = dict(
      image_size=side, patch_size=patch,  # S and a patch's side, in pixels
      patches=(side // patch) ** 2,  # P: derived, num_image_tokens and num_positions are wrong in some published files
      vision_width=v["hidden_size"], vision_layers=v["num_hidden_layers"], vision_heads=v["num_attention_heads"],
      vision_mlp=v["intermediate_size"], width=t["hidden_size"], layers=t["num_hidden_layers"],  # D
      heads=t.get("num_attention_heads", 8), kv_heads=t.get("num_key_value_heads", 4 if gemma2 else 1),  # H, K
      head_dim=t.get("head_dim", 256), mlp=t["intermediate_size"], vocab=t.get("vocab_size", 257216),  # d, V
      window=t.get("sliding_window", 4096), max_context=t.get("max_position_embeddings", 8192),
      image_token=top.get("image_token_index", 257152))
    wrong = [f"{name} {size!r}" for name, size in sizes.items() if type(size) is not int or size < 1]
    c = SimpleNamespace(**sizes)
    if wrong or c.vision_width % c.vision_heads or c.heads % c.kv_heads:
      raise Fault(f"{path}: {wrong[0] if wrong else 'a number of heads'} cannot be; is it a PaliGemma config?")
    kinds = t.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(c.layers)]
    c.gemma2, c.sliding = gemma2, [gemma2 and kind == "sliding_attention" for kind in kinds]  # one a layer
    c.vision_eps, c.eps = v.get("layer_norm_eps", 1e-6), t.get("rms_norm_eps", 1e-6)
    c.rope_theta = (t.get("rope_parameters") or {}).get("rope_theta") or t.get("rope_theta", 10000.0)
    c.query_scale = (t.get("query_pre_attn_scalar", 256) if gemma2 else c.head_dim) ** -0.5
    c.attn_softcap = t.get("attn_logit_softcapping", 50.0) or 0.0 if gemma2 else 0.0  # 0: none
    c.final_softcap = t.get("final_logit_softcapping", 30.0) or 0.0 if gemma2 else 0.0
    eos = top.get("eos_token_id") or t.get("eos_token_id") or 1
    c.eos = eos if isinstance(eos, list) else [eos]
    c.note = top.get("note", "")  # not in hub files: what the checkpoints of this repository say of themselves
    return c
  except OSError as e:
    raise Fault(f"{path}: {e.strerror}; a model folder holds config.json, *.safetensors and tokenizer.model") from None
  except ValueError as e:
    raise Fault(f"{path} is not JSON ({e}); download it again") from None
  except (KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
    raise Fault(f"{path}: {e} is missing or not understood; is it a PaliGemma config?") from None

# ---- 2. Pixels ----
MAX_PIXELS = 100_000_000
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit only warns, on lines of its own; open_image refuses

def open_image(source):
  """Path, file object or PIL image -> upright RGB PIL image. Raises Fault."""
  name = getattr(source, "filename", "") or source
  try:
    image = source if isinstance(source, Image.Image) else Image.open(source)
    if image.width * image.height > MAX_PIXELS:  # before decoding: a few kB can unpack to gigabytes
      raise Image.DecompressionBombError
    # exif_transpose: people mean the picture as their viewer shows it, and boxes are drawn on that
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:  # on white, as transformers does
      image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")
  except Image.DecompressionBombError:
    raise Fault(f"{name}: more than {MAX_PIXELS} pixels; make it smaller first") from None
  except FileNotFoundError:
    raise Fault(f"{name}: no such image") from None
  except (OSError, ValueError, SyntaxError) as e:
    raise Fault(f"{name}: not an image, or a damaged one ({e})") from None

def to_pixels(source, side):
  """Anything open_image takes, or a float32 array (3, S, S) in [-1, 1] taken as it is -> float32 (1, 3, S, S)."""
  if isinstance(source, np.ndarray):
    if source.shape != (3, side, side):
      raise Fault(f"pixels have shape {source.shape}, this model needs (3, {side}, {side})")
    return source.astype(np.float32)[None]
  # Squeezed to a square, not cropped: boxes are relative to each side, so they unsqueeze by themselves.
  image = open_image(source).resize((side, side), Image.Resampling.BICUBIC)
  return ((np.asarray(image, np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None]  # (1, 3, S, S)

# ---- 3. Building blocks ----
def upload(array, device, axis=None):
  """np.ndarray -> Tensor. So does Tensor(array).realize(), in 2 ms, 130 the first time: it schedules a copy."""
  if isinstance(device, tuple):  # split over these along the axis; without one it is whole on each
    return upload(array, device[0]).shard(device, axis).realize()
  t = Tensor.empty(*array.shape, dtype=getattr(dtypes, array.dtype.name), device=device)
  t.uop.base.buffer.ensure_allocated().copyin(np.ascontiguousarray(array).data)
  return t

class Linear:
  def __init__(self, inputs, outputs, bias=False):
    self.weight, self.bias = Tensor.empty(outputs, inputs), Tensor.empty(outputs) if bias else None
  def __call__(self, x):
    x = matmul(x, self.weight)
    return x if self.bias is None else x + widen(self.bias)

class Embedding:
  def __init__(self, rows, width):
    self.weight = Tensor.empty(rows, width)
  def __call__(self, ids):
    return rows(self.weight, ids)  # (B, T) -> (B, T, D)

class LayerNorm:
  def __init__(self, width, eps):
    self.weight, self.bias, self.eps = Tensor.empty(width), Tensor.empty(width), eps
  def __call__(self, x):
    if fused(x):
      return kernels.by_row("norm", {"x": x, "b": self.weight, "bias": self.bias}, EPS=self.eps)
    return x.layernorm(eps=self.eps) * widen(self.weight) + widen(self.bias)

class RMSNorm:
  def __init__(self, width, eps):
    self.weight, self.eps = Tensor.empty(width), eps
  def __call__(self, x):
    if fused(x):
      return kernels.by_row("norm", {"x": x, "b": self.weight}, EPS=self.eps)
    # 1 + weight: Gemma stores the distance from one, so that a weight of zero changes nothing.
    return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + widen(self.weight))

CHUNK = 512  # queries: 134 MB of float32 logits at 896 pixels (16 heads, 4096 keys)

def attention(q, k, v, scale, mask=None, softcap=0.0):
  """q (B, H, T, d), k and v (B, K, C, d), mask (B, 1, 1, T or 1, C), True where a query may look -> (B, T, H * d).
  Query head h reads key/value head h // (H / K). Logits and softmax in float32: bfloat16 ones move the argmax."""
  B, H, T, d = q.shape
  K, C = k.shape[1:3]
  if T == 1 and mask is not None and fused(q):
    return kernels.attend(q, k, v, scale, mask, softcap)
  if T > CHUNK and not Tensor.training:  # a few queries at a time, or memory would grow with the square of the picture
    parts = [(q[:, :, i:i + CHUNK], mask if mask is None or mask.shape[3] == 1 else mask[:, :, :, i:i + CHUNK])
             for i in range(0, T, CHUNK)]
    return Tensor.cat(*[attention(part, k, v, scale, seen, softcap) for part, seen in parts], dim=1)
  logits = matmul(q.reshape(B, K, H // K * T, d), k, batched=True)  # (B, K, H / K * T, C)
  if softcap:  # before the mask: -inf would become -softcap
    logits, scale = soft_cap(logits, softcap, scale), 1.0
  if mask is not None:
    logits = mask.expand(B, 1, H // K, T, C).reshape(B, 1, H // K * T, C).where(logits, -math.inf)
  weights, total = softmax(logits, scale)
  out = matmul(weights, v, "nn", batched=True) / total
  return out.reshape(B, H, T, d).transpose(1, 2).reshape(B, T, H * d)

# ---- 4. SigLIP: patches to features ----
class Attention:
  def __init__(self, width, heads):
    self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width, bias=True) for _ in range(4))
    self.heads = heads
  def __call__(self, x):
    B, P, D = x.shape
    q, k, v = (f(x).reshape(B, P, self.heads, -1).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
    return self.out_proj(attention(q, k, v, (D // self.heads) ** -0.5))  # (B, H, P, d) each -> (B, P, D)

class MLP:
  def __init__(self, width, hidden):
    self.fc1, self.fc2 = Linear(width, hidden, bias=True), Linear(hidden, width, bias=True)
  def __call__(self, x):
    return self.fc2(gelu(self.fc1(x)))

class EncoderLayer:
  def __init__(self, c):
    self.layer_norm1, self.layer_norm2 = (LayerNorm(c.vision_width, c.vision_eps) for _ in range(2))
    self.self_attn, self.mlp = Attention(c.vision_width, c.vision_heads), MLP(c.vision_width, c.vision_mlp)
  def __call__(self, x):
    x = x + self.self_attn(self.layer_norm1(x))
    return (x + self.mlp(self.layer_norm2(x))).contiguous()

class SigLIP:
  """SimpleNamespace stands for the levels of the checkpoint's names that do nothing."""
  def __init__(self, c):
    # The checkpoint's convolution has stride = kernel = patch size: one matmul a patch. `load` flattens its kernel.
    patches = Linear(3 * c.patch_size ** 2, c.vision_width, bias=True)
    self.embeddings = SimpleNamespace(patch_embedding=patches, position_embedding=Embedding(c.patches, c.vision_width))
    self.encoder = SimpleNamespace(layers=[EncoderLayer(c) for _ in range(c.vision_layers)])
    self.post_layernorm, self.patch = LayerNorm(c.vision_width, c.vision_eps), c.patch_size
  def __call__(self, pixels):
    """(B, 3, S, S) -> (B, P, Dv). PaliGemma uses every patch: no class token, no pooling head."""
    B, _, S, _ = pixels.shape
    p, g = self.patch, S // self.patch  # pixels of a patch's side, patches of the image's side
    x = pixels[:, :, :g * p, :g * p].reshape(B, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(B, g * g, 3 * p * p)
    x = self.embeddings.patch_embedding(x) + widen(self.embeddings.position_embedding.weight)  # (B, P, Dv)
    for layer in self.encoder.layers:
      x = layer(x)
    return self.post_layernorm(x)

# ---- 5. Gemma: positions, attention, blocks ----
def rope_table(c, positions):
  """(T,) positions -> cos and sin, each (T, d / 2), float32 as transformers computes them."""
  frequency = np.float32(c.rope_theta) ** (-np.arange(0, c.head_dim, 2, dtype=np.float32) / c.head_dim)
  angle = positions[:, None].astype(np.float32) * frequency[None]
  return np.cos(angle), np.sin(angle)

def rope(x, cos, sin):
  """Turn each pair (i, i + d/2) of x (B, H, T, d) by its position's angle. Half-split, not interleaved pairs."""
  a, b = x.chunk(2, dim=-1)
  return (a * cos - b * sin).cat(b * cos + a * sin, dim=-1)

class GemmaAttention:
  def __init__(self, c):
    self.q_proj, self.o_proj = Linear(c.width, c.heads * c.head_dim), Linear(c.heads * c.head_dim, c.width)
    self.k_proj, self.v_proj = (Linear(c.width, c.kv_heads * c.head_dim) for _ in range(2))
    self.config = c
  def __call__(self, x, cos, sin, mask, store):
    c = self.config
    B, T, _ = x.shape
    q, k, v = (f(x).reshape(B, T, -1, c.head_dim).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
    k, v = store(rope(k, cos, sin), v)  # (B, K, T, d) new -> (B, K, C, d) all
    return self.o_proj(attention(rope(q, cos, sin), k, v, c.query_scale, mask, c.attn_softcap))

class GemmaMLP:
  def __init__(self, width, hidden):
    self.gate_proj, self.up_proj, self.down_proj = Linear(width, hidden), Linear(width, hidden), Linear(hidden, width)
  def __call__(self, x):
    return self.down_proj(gelu(self.gate_proj(x), self.up_proj(x)))

class Block:
  """Gemma 2 differs from Gemma in four things: each half of a block is also normalised on its way out, soft-caps on
  attention and final logits, a query scale of its own, and sliding windows in some layers."""
  def __init__(self, c):
    self.input_layernorm, self.post_attention_layernorm = (RMSNorm(c.width, c.eps) for _ in range(2))
    if c.gemma2:
      self.pre_feedforward_layernorm, self.post_feedforward_layernorm = (RMSNorm(c.width, c.eps) for _ in range(2))
    self.self_attn, self.mlp, self.gemma2 = GemmaAttention(c), GemmaMLP(c.width, c.mlp), c.gemma2
  def __call__(self, x, *attention_inputs):
    h = self.self_attn(self.input_layernorm(x), *attention_inputs)
    if self.gemma2:  # post_attention_layernorm: here it is applied to the output of the attention ...
      x = x + self.post_attention_layernorm(h)
      return (x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))).contiguous()
    x = x + h
    return (x + self.mlp(self.post_attention_layernorm(x))).contiguous()  # ... and in Gemma 1 to the MLP's input

class Gemma:
  def __init__(self, c):
    self.embed_tokens, self.norm = Embedding(c.vocab, c.width), RMSNorm(c.width, c.eps)
    self.layers, self.config = [Block(c) for _ in range(c.layers)], c
  def embed(self, ids):
    # Only text is multiplied by sqrt(D), the projected image is not. The factor is rounded to the weights' type, as in
    # transformers: sqrt(2048) = 45.2548 is 45.25 in bfloat16.
    scale = round_to(self.config.width ** 0.5, self.embed_tokens.weight.dtype)
    return self.embed_tokens(ids) * scale
  def __call__(self, x, cos, sin, masks, stores):
    """x (B, T, D), cos and sin (B or 1, 1, T, d / 2), masks (full, sliding), stores: one a layer -> (B, T, D)."""
    for layer, sliding, store in zip(self.layers, self.config.sliding, stores):
      x = layer(x, cos, sin, masks[sliding], store)
    return self.norm(x)
  def logits(self, x):
    """(B, D) -> (B, V), with the embedding matrix as the head."""
    logits, cap = matmul(x, self.embed_tokens.weight), self.config.final_softcap
    return soft_cap(logits, cap) if cap else logits

class PaliGemma:
  """All weights. Attribute names are the checkpoint's, so a weight's path here is its name in the file."""
  def __init__(self, c):
    self.vision_tower, self.language_model = SigLIP(c), Gemma(c)
    self.multi_modal_projector = SimpleNamespace(linear=Linear(c.vision_width, c.width, bias=True))

# ---- 6. KV cache ----
NOWHERE = -10 ** 9  # the position of a slot that nobody may look at

def layout(lengths, image_tokens, T, C):
  """Prompt lengths (B,) -> the position of each cache slot, (B, C) int32, NOWHERE for padding. A row is
  [image][padding][prompt][answer]: prompts of different lengths share one program, each row's last prompt token is the
  last of the prefill, and slot = position for all text. The image moves up by the padding instead: RoPE only sees
  distances, and those stay as if there were no padding."""
  slots, pad = np.arange(C)[None], T - np.array(lengths)[:, None]
  image, padding = slots < image_tokens, (slots >= image_tokens) & (slots < image_tokens + pad)
  return np.where(image, slots + pad, np.where(padding, NOWHERE, slots)).astype(np.int32)

class Cache:
  """A static KV cache: k and v (B, K, C, d) for each layer. Never grows, so one compiled step serves every token."""
  def __init__(self, c, B, C, device):
    nothing = np.zeros((B, c.kv_heads, C, c.head_dim), np.float32)
    heads = sharding.axis("cache", nothing, c, device)
    self.layers = [[upload(nothing, device, heads) for _ in "kv"] for _ in range(c.layers)]
    self.rope = [upload(t, device) for t in rope_table(c, np.arange(C))]
    self.token = upload(np.zeros(B, np.int32), device)  # the last one of each row
  def stores(self, start, length, seen):
    """For each layer a function that writes new k and v (B, K, length, d) into the slots from `start` and returns the
    first `seen` slots of all k and v."""
    def store(caches, *new):
      stores = [cache[:, :, start:start + length].uop.store(x.uop) for cache, x in zip(caches, new)]
      # What is read is the cache after its write.
      return [Tensor(cache.uop.after(write))[:, :, :seen] for cache, write in zip(caches, stores)]
    return [functools.partial(store, caches) for caches in self.layers]

def choose(logits):
  """(B, V) -> (B,) int32: the likeliest token, or -1 where a logit is NaN."""
  # padded, so that tinygrad can split the row into parts: 257216 = 64 * 4019 would keep 64 threads of a GPU busy
  logits = logits.pad((0, -logits.shape[-1] % 4096), value=-math.inf)
  return logits.isnan().any(-1).where(-1, logits.argmax(-1)).cast(dtypes.int32)

# ---- 7. Sampling ----
def check_sampling(max_tokens, temperature, top_k, top_p, seed):
  for wrong, message in ((max_tokens < 1, f"--max-tokens {max_tokens}: at least 1"),
                         (not 0 <= temperature < math.inf, f"--temperature {temperature}: 0 (greedy) or more"),
                         (top_k < 0, f"--top-k {top_k}: 0 (off) or more"),
                         (not 0 < top_p <= 1, f"--top-p {top_p}: above 0 and at most 1"),
                         (seed is not None and seed < 0, f"--seed {seed}: 0 or more")):
    if wrong:
      raise Fault(message)

def sample(logits, temperature, top_k, top_p, rng):
  """(V,) float32 -> token id. Temperature first, then top-k (0: off), then top-p of what is left."""
  logits = logits.astype(np.float64) / temperature
  if 0 < top_k < len(logits):
    logits[logits < np.partition(logits, -top_k)[-top_k]] = -np.inf
  p = np.exp(logits - logits.max())
  p /= p.sum()
  order = np.argsort(-p, kind="stable")
  before = np.cumsum(p[order]) - p[order]  # the mass of all likelier tokens
  p[order[before >= top_p]] = 0
  return int(rng.choice(len(p), p=p / p.sum()))

# ---- 8. Generate ----
MAX_TOKENS = 256  # room for several boxes and masks: a box is 4 tokens and its label, a mask 16 more

Answer = namedtuple("Answer", "text tokens boxes")  # boxes: of tokenizer.Box, in pixels of the picture, with .mask

class VLM:
  """A loaded model and its compiled programs, one for each shape that came up: vision, prefill and one decode step.
  An image is a path, a file object, a PIL image or a float32 array (3, S, S) in [-1, 1]; a list of them is several
  pictures of one question."""
  def __init__(self, net, config, tokenizer, device, max_context=None):
    self.net, self.config, self.tokenizer, self.device = net, config, tokenizer, device
    self.max_context = min(max_context or config.max_context, config.max_context)
    self.bytes = sum(t.nbytes() for t in get_state_dict(net.language_model).values())  # what a decode step reads
    self.programs, self.caches, self.features, self.timings = {}, {}, {}, {}
    self.masks = masks.Masks(device=device)
  def _run(self, key, cache, function, *inputs):
    # No function holds self: a garbage collection on one of tinygrad's threads would wait for itself for ever.
    if key in self.programs:
      return self.programs[key](*inputs)
    buffers = get_state_dict(self.net) | get_state_dict(cache, "cache")
    file = compiled.place(self.device, key, vars(self.config), kernels.PORTABLE, buffers)
    program, result = compiled.read(file, buffers, inputs)  # what an earlier process has captured
    if program is None:
      if key[0] != "decode":  # by then the answer has begun, on the line that this would clear
        status(f"compiling {key[0]} (the first time only)")
      program = TinyJit(function)
      program.cnt = 1  # capture on the first call: the usual dry run would schedule everything twice
      result = program(*inputs)
      compiled.write(file, program, buffers)
    self.programs[key] = program
    return result
  def _cache(self, B, C):
    return self.caches.get((B, C)) or self.caches.setdefault((B, C), Cache(self.config, B, C, self.device))

  def vision(self, pixels):
    """float32 (1, 3, S, S) -> SigLIP's features (1, P, Dv) and the projected ones (1, P, D)."""
    net = self.net  # not self in `run`: see _run
    def run(pixels):
      features = net.vision_tower(pixels).contiguous()
      return features, net.multi_modal_projector.linear(features).contiguous()  # used as it is: no scaling
    outputs = self._run(("vision",), None, run, upload(pixels, self.device))
    return [upload(t.numpy(), self.device) for t in outputs]  # the next call writes into the same ones

  def image_features(self, image):
    """-> projected features (1, P, D), kept for the last few pictures: a second question costs no vision."""
    pixels = to_pixels(image, self.config.image_size)
    key = pixels.tobytes()
    if key not in self.features:
      if len(self.features) == 8:
        self.features.pop(next(iter(self.features)))
      self.features[key] = self.vision(pixels)[1]
    return self.features[key]

  def prefill(self, image, ids, where):
    """image (B, P, D), ids (B, T) right-aligned, where (B, C): see layout -> next token (B,), its logits (B, V)."""
    B, n, C = image.shape[0], image.shape[1] + ids.shape[1], where.shape[1]
    cache, gemma = self._cache(B, C), self.net.language_model
    def run(image, ids, cos, sin, seen):
      # No mask but for padding: image and prompt all see each other, in Gemma 2's sliding layers too.
      x = gemma(image.cat(gemma.embed(ids), dim=1), cos, sin, (seen, seen), cache.stores(0, n, n))
      logits = gemma.logits(x[:, -1].contiguous()).contiguous()
      return choose(logits), logits
    cos, sin = rope_table(self.config, where[:, :n].clip(0).reshape(-1))
    seen = where[:, None, None, None, :n] >= 0
    inputs = ids.astype(np.int32), cos.reshape(B, 1, n, -1), sin.reshape(B, 1, n, -1), seen
    return self._run(("prefill", B, n, C), cache, run, image, *(upload(t, self.device) for t in inputs))

  def decode(self, token, position, where):
    """token (B,) np.int32 at slot `position`, where (B, C) a Tensor -> next token (B,), its logits (B, V). One program
    for all slots."""
    B, C = where.shape
    cache, gemma, window = self._cache(B, C), self.net.language_model, self.config.window
    def run(token, position, where):
      cos, sin = (t[position:position + 1] for t in cache.rope)
      seen = ((where >= 0) & (where <= position)).reshape(B, 1, 1, 1, C)
      near = seen & (where > position - window).reshape(B, 1, 1, 1, C)
      x = gemma(gemma.embed(token.reshape(B, 1)), cos, sin, (seen, near), cache.stores(position, 1, C))
      logits = gemma.logits(x[:, -1].contiguous()).contiguous()
      return choose(logits), logits
    buffer = cache.token.uop.base.buffer  # written to: a new tensor takes 2 ms
    for b in getattr(buffer, "bufs", [buffer]):
      b.copyin(np.ascontiguousarray(token, np.int32).data)
    return self._run(("decode", B, C), cache, run, cache.token, UOp.variable("slot", 0, C - 1).bind(position), where)

  def _prefix(self, images, prompts, max_tokens):
    """-> next token (B,) and logits (B, V) after the prefix, where (B, C), the next slot."""
    prompts = [self.tokenizer.prompt(prompt) for prompt in prompts]
    rows = [image if isinstance(image, (list, tuple)) else [image] for image in images]
    if {len(row) for row in rows} != {len(rows[0]) or 1}:
      raise Fault("every row of a batch needs equally many pictures, and at least one; give such rows one by one")
    P, longest = self.config.patches * len(rows[0]), max(map(len, prompts))
    # Prompts are padded to 8, 16, 32, ...: at most a handful of programs to compile, few wasted rows.
    T = max(longest, min(max(8, 1 << (longest - 1).bit_length()), self.max_context - P - max_tokens))
    if P + T + max_tokens > self.max_context:
      raise Fault(f"the prompt does not fit: {P} image + {longest} text + {max_tokens} answer positions are more than "
                  f"the context's {self.max_context}; shorten the prompt or lower --max-tokens")
    C = min(-(-(P + T + max_tokens) // 256) * 256, self.max_context)  # in steps of 256: seldom another program
    start = time.perf_counter()
    features = [self.image_features(image) for row in rows for image in row]
    image = Tensor.cat(*features).reshape(len(rows), P, -1).contiguous().realize() if features[1:] else features[0]
    self.timings |= {"vision_s": time.perf_counter() - start, "decode_tok_s": None}
    ids = np.array([[0] * (T - len(prompt)) + prompt for prompt in prompts])
    where, start = layout([len(prompt) for prompt in prompts], P, T, C), time.perf_counter()
    token, logits = self.prefill(image, ids, where)
    token = token.numpy()
    self.timings["prefill_s"] = time.perf_counter() - start
    return token, logits, where, P + T

  def logits(self, image, prompt):
    """-> np.float32 (V,): next-token logits after the prefix."""
    return self._prefix([image], [prompt], 1)[1].numpy()[0]

  def tokens(self, images, prompts, max_tokens=MAX_TOKENS, temperature=0.0, top_k=0, top_p=1.0, seed=None):
    """Lists of B images and B prompts. Yields, step by step, a list of B token ids, None once a row has ended."""
    check_sampling(max_tokens, temperature, top_k, top_p, seed)
    if len(images) != len(prompts) or not prompts:
      raise Fault(f"{len(images)} images for {len(prompts)} prompts: give one for each")
    token, logits, where, position = self._prefix(images, prompts, max_tokens)
    where = upload(where, self.device)
    rngs = [np.random.default_rng(seed) for _ in prompts]  # all alike: a row of a batch draws what it would draw alone
    done, start = [False] * len(prompts), time.perf_counter()
    for step in range(1, max_tokens + 1):
      if (token < 0).any():
        raise Fault("the logits are NaN: the weights are damaged, or too large for their number type", code=1)
      if temperature > 0:
        token = [sample(row, temperature, top_k, top_p, rng) for row, rng in zip(logits.numpy(), rngs)]
        token = np.array(token, np.int32)
      done = [end or id in self.config.eos for end, id in zip(done, token.tolist())]
      if all(done):
        return
      yield [None if end else id for end, id in zip(done, token.tolist())]
      if step < max_tokens:
        token, logits = self.decode(token, position, where)
        token, position = token.numpy(), position + 1
        self.timings["decode_tok_s"] = step / (time.perf_counter() - start)

  def stream(self, image, prompt, **options):
    """Yields the answer as str pieces, each as soon as it is known. Options as in `tokens`."""
    return self.tokenizer.stream(row[0] for row in self.tokens([image], [prompt], **options))

  def generate(self, images, prompts, **options):
    """Lists of B images and B prompts -> list of B Answers. Options as in `tokens`."""
    images = [image if isinstance(image, (np.ndarray, list, tuple)) else open_image(image) for image in images]
    rows = list(self.tokens(images, prompts, **options))
    return [self.answer(image, [row[i] for row in rows if row[i] is not None]) for i, image in enumerate(images)]

  def answer(self, image, tokens):
    """Boxes are in pixels of the picture (of the square for an array; of the first of several pictures)."""
    text = self.tokenizer.decode(tokens)
    image = image[0] if isinstance(image, (list, tuple)) else image
    size = image.shape[:0:-1] if isinstance(image, np.ndarray) else open_image(image).size
    return Answer(text, tokens, parse_boxes(text, *size, self.masks))

# ---- 9. Weights ----
# bfloat16 has no fast arithmetic on a CPU: such weights stay the 16 bits that they are in the file, widened where used.
# int8 and uint8 hold what quantize.py made of a weight; its scale lies beside it, and Packed holds both.
TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8, "U8": np.uint8}

def widen(t):
  """Any weight -> float32. uint16 holds the bits of bfloat16, which are the upper half of a float32."""
  if isinstance(t, quantize.Packed):
    return t.widen()
  return (t.cast(dtypes.uint32) << 16).bitcast(dtypes.float32) if t.dtype == dtypes.uint16 else t.float()

def round_to(value, dtype):
  """A float -> the nearest value of the weights' type. Of int8 weights it is float32, as their scales are."""
  return truncate[{dtypes.uint16: dtypes.bfloat16, dtypes.int8: dtypes.float32}.get(dtype, dtype)](value)

def canonical(name):
  """The name of a tensor in any of the published layouts -> its path in PaliGemma."""
  name = re.sub(r"^((model|vlm|base_model|paligemma|paligemma_with_expert)\.)+", "", name)
  name = re.sub(r"^language_model\.(model\.|(?=lm_head\.))", "language_model.", name)
  return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)

def read_tensors(path):
  """A safetensors file -> {name: array}, views of the mapped file; bfloat16 as uint16. Raises Fault."""
  from safetensors import SafetensorError, safe_open
  try:
    with safe_open(path, "numpy"):  # checks the header: its length, and that the tensors fill the file without overlap
      data = np.memmap(path, np.uint8, "c")
    start = 8 + int(data[:8].view(np.uint64)[0])
    header = json.loads(bytes(data[8:start]))
  except FileNotFoundError:
    raise Fault(f"{path}: no such file; download the whole repository") from None
  except (SafetensorError, OSError, ValueError) as e:
    raise Fault(f"{path}: not a complete safetensors file ({e}); download it again") from None
  tensors, data = {}, np.asarray(data)[start:]
  for name, t in header.items():
    if name != "__metadata__" and not name.endswith((".position_ids", ".inv_freq")):  # constants, once saved
      if t["dtype"] not in TYPES:
        raise Fault(f"{path}: {name} is {t['dtype']}; weights must be float32, float16 or bfloat16")
      tensors[name] = data[slice(*t["data_offsets"])].view(TYPES[t["dtype"]]).reshape(t["shape"])
  return tensors

def read_weights(folder):
  """-> {path in PaliGemma: array} of the files that the index names, or else of all. Raises Fault."""
  if original.fits(folder):
    return original.read_weights(folder)
  index, arrays = folder / "model.safetensors.index.json", {}
  try:
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if wrong := [name for name in names if Path(name).name != name]:
      raise Fault(f"{index} names {wrong[0]!r}, which is not in the folder; download it again")
  except FileNotFoundError:
    names = sorted(f.name for f in folder.glob("*.safetensors")) or ["model.safetensors"]
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise Fault(f"{index} is not a safetensors index ({e!r}); download it again") from None
  for file in names:
    for name, array in read_tensors(folder / file).items():
      if canonical(name) in arrays:
        raise Fault(f"{folder / file}: {name} is there twice")
      arrays[canonical(name)] = array
  embedding, head = "language_model.embed_tokens.weight", arrays.pop("language_model.lm_head.weight", None)
  head = arrays.pop("lm_head.weight", head)
  if head is not None:  # the head is the embedding matrix; some files hold it twice, some only under this name
    if not np.array_equal(arrays.setdefault(embedding, head), head):
      raise Fault(f"{folder}: lm_head differs from embed_tokens, but PaliGemma ties them; this is another model")
  return arrays

def check_names(expected, found):
  """Both {name: shape}. A missing tensor would stay random, an extra one means another model: neither is let pass."""
  wrong = {"missing": [n for n in expected if n not in found],
           "not part of the model": [n for n in found if n not in expected],
           "not the shape config.json says": [f"{n} {found[n]}, not {shape}" for n, shape in expected.items()
                                              if found.get(n, shape) != shape]}
  parts = [f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}"
           for what, names in wrong.items() if names]
  if parts:
    raise Fault(f"the weights do not fit config.json; {'; '.join(parts)}")

def to_tensor(name, array, device, config):
  """A weight on the device, or split over several. On a CPU it is a view of the file, but for what tinygrad's own
  kernels want aligned."""
  if isinstance(device, tuple):
    return upload(array, device, sharding.axis(name, array, config, device))
  ours = array.ndim == 2 and "position_embedding" not in name and compiled.in_c(device)
  if ours or device.startswith("CPU") and array.ctypes.data % 64 == 0:
    return Tensor.from_blob(array.ctypes.data, array.shape, dtype=getattr(dtypes, array.dtype.name), device=device)
  return upload(array, device)

def assemble(config, arrays, device):
  """{path in PaliGemma: array}, as files have them, quantised or not -> PaliGemma on the device. Raises Fault."""
  net = PaliGemma(config)
  places = get_state_dict(net)
  shapes = {n: t.shape for n, t in places.items()}  # in files the patch embedding is a convolution: see SigLIP
  shapes["vision_tower.embeddings.patch_embedding.weight"] = config.vision_width, 3, *[config.patch_size] * 2
  check_names(quantize.stored_shapes(shapes, arrays), {n: a.shape for n, a in arrays.items()})
  for name, place in places.items():
    owner, (*path, leaf) = net, name.split(".")
    for part in path:
      owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
    packed = name + "_scale" in arrays
    weight = to_tensor(name, arrays[name] if packed else arrays[name].reshape(place.shape), device, config)
    if packed:
      scale = to_tensor(name + "_scale", arrays[name + "_scale"], device, config)
      weight = quantize.Packed(weight, scale.float().realize(), place.shape[-1])
    setattr(owner, leaf, weight)
  return net

def load(folder, device=None, max_context=None, bits=None, shard=1):
  """A PaliGemma folder (config.json, *.safetensors, tokenizer.model), or an .npz of big_vision -> VLM. bits: "int8" or
  "int4" to quantise its weights. shard: so many devices share them. Raises Fault."""
  start, folder = time.perf_counter(), Path(folder)
  config = read_config(original.config_path(folder))
  try:
    tokenizer = Tokenizer(original.tokenizer_path(folder))
  except (OSError, ValueError) as e:
    raise Fault(f"{folder}: {e}") from None
  if max(tokenizer.model.get_piece_size(), tokenizer.ids["<seg127>"] + 1) > config.vocab:  # <image> needs no row
    raise Fault(f"{folder}: the tokenizer has more pieces than the embedding rows, {config.vocab}; take this model's")
  device = compiled.open_device(device, shard)
  arrays = read_weights(folder)
  quantize.pack(arrays, bits)
  model = VLM(assemble(config, arrays, device), config, tokenizer, device, max_context)
  model.masks = masks.Masks(original.tokenizer_path(folder).parent, device)
  model.arrays = arrays  # a tensor over borrowed memory does not keep it alive
  model.timings["load_s"] = time.perf_counter() - start
  return model

# ---- 10. Kernels ----
# On a CPU, tinygrad's own matmul reaches 46 GFLOPS in float32 and 3 in bfloat16 (two Zen 4 cores). The C in
# examples/kernels.c, which examples/kernels.py makes kernels of tinygrad's, works on the weights as they lie in the
# file: 854 GFLOPS in bfloat16 for 264 rows where the peak was 909, and for one row 47 GB/s where the memory gave 50
# (two Zen 5 cores, examples/bench.py --products). GPUs have kernels for weights of 16 bits or fewer; all else is below.

def matmul(a, b, kind="nt", batched=False):
  """a @ b.T ("nt": a Linear), a @ b ("nn") or a.T @ b ("tn") of the last two dimensions; leading ones are a batch, or
  more rows. A float32 b is exact and has a gradient; others round a to bfloat16 where the CPU multiplies that."""
  if compiled.in_c(a.device):
    return kernels.matmul(a, b, kind, batched)
  if kind == "nt" and not batched and (out := kernels.on_gpu(a, b)) is not None:
    return out
  if kind == "tn" and not batched:
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
  b = widen(b)
  return (a.transpose(-1, -2) if kind == "tn" else a) @ (b.transpose(-1, -2) if kind == "nt" else b)

def rows(w, ids):
  """Rows ids (B, T) of w (V, D) -> (B, T, D) float32."""
  return kernels.rows(w, ids) if compiled.in_c(ids.device) else sharding.whole(widen(w[ids]))

def fused(x):
  """Whether what follows, and the attention of one token, is C: on a CPU, where nothing is differentiated."""
  return compiled.in_c(x.device) and not Tensor.training

def softmax(x, scale):
  """softmax(x * scale) of (.., C), as weights and a total (.., 1) to divide by: after a product that is less work."""
  if fused(x):
    return kernels.by_row("softmax", {"x": x}, SCALE=scale), Tensor.ones(*x.shape[:-1], 1, device=x.device)
  # contiguous: fused into the product or the sum, every exponential would be computed again for each of their terms
  weights = ((x - x.max(-1, keepdim=True).detach()) * scale).exp().contiguous()
  return weights, weights.sum(-1, keepdim=True)

def soft_cap(x, cap, scale=1.0):
  """cap * tanh(x * scale / cap): nearly x * scale, but never beyond cap."""
  if fused(x):
    return kernels.by_row("soft_cap", {"x": x}, SCALE=scale, CAP=cap)
  return ((x * (scale / cap)).tanh() * cap).contiguous()

def gelu(x, times=None):
  """GELU in the form with tanh, times another tensor of its shape."""
  if fused(x):
    return kernels.by_row("gelu", {"x": x} if times is None else {"x": x, "b": times})
  return (x.gelu() if times is None else x.gelu() * times).contiguous()

# ---- 11. Command line ----
def default_weights():
  """The largest checkpoint under weights/, by bytes of safetensors: a downloaded model wins over the shipped toy."""
  folders = [f.parent for f in sorted(Path(__file__).with_name("weights").glob("*/config.json"))]
  size = {folder: sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in folders}
  if not any(size.values()):
    raise Fault("no checkpoint under weights/; name one with --weights, or get one (README.md, Weights)")
  return max(folders, key=size.get)

def status(text):
  """A line of progress on a terminal's stderr, each over the last."""
  if sys.stderr.isatty() and not status.quiet:
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
status.quiet = False

def say(args, text):
  status("")
  if not args.quiet:
    print(text, file=sys.stderr)

def ask(model, images, prompt, args):
  """One question, as the command line answers it -> exit code."""
  pictures, tokens, code, t = [open_image(name) for name in images], [], 0, model.timings
  def ids():
    for row in model.tokens([pictures], [prompt], args.max_tokens, args.temperature, args.top_k, args.top_p, args.seed):
      if not tokens:
        status("")  # clears the line that the answer is about to be on
      tokens.append(row[0])
      yield row[0]
  try:
    for piece in model.tokenizer.stream(ids()):
      if not args.json:
        print(piece, end="", flush=True)
  except KeyboardInterrupt:  # what is there stays there
    code = 130
  answer = model.answer(pictures[0], tokens)
  boxes, trouble = masks.drawable(answer.boxes)
  print(json.dumps({"text": answer.text, "tokens": tokens, "prompt_tokens": model.tokenizer.prompt(prompt),
                    "boxes": [masks.entry(box) for box in boxes], "timings": t}) if args.json else "", flush=True)
  if boxes:
    out = args.out or f"{Path(images[0]).stem}.boxes.png"
    draw.save_picture(draw.draw_boxes(pictures[0], boxes), out, images)
    say(args, f"{len(boxes)} boxes drawn: {out}")
  elif args.out:
    say(args, f"no boxes in the answer: {args.out} not written")
  masks.report(trouble, args)
  speed = t.get("decode_tok_s") or 0
  say(args, f"load {t['load_s']:.2f} s, vision {t.get('vision_s', 0):.2f} s, prefill {t.get('prefill_s', 0):.2f} s, "
            f"{speed:.1f} tok/s, {speed * model.bytes / 1e9:.1f} GB/s")
  return code

def main(argv=None):
  def fail(message):  # one line, like every other fault
    raise Fault(f"{message}; see --help")
  p = argparse.ArgumentParser(
    prog="vlm.py", description="Ask PaliGemma about a picture. Without a prompt: ask again and again.",
    epilog='prompts of mix checkpoints: "caption en", "answer en QUESTION", "detect A ; B", "segment A"')
  p.error = fail
  p.add_argument("inputs", nargs="*", metavar="IMAGE [IMAGE ...] [PROMPT]", help="pictures, and what to ask of them")
  p.add_argument("--weights", metavar="DIR", help="a PaliGemma folder or .npz (default: the largest in weights/)")
  p.add_argument("--max-tokens", type=int, default=MAX_TOKENS, metavar="N", help="longest answer (default %(default)s)")
  p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: always the likeliest token (default)")
  p.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens")
  p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens of mass P")
  p.add_argument("--seed", type=int, metavar="S", help="repeat a sample")
  p.add_argument("--out", metavar="FILE", help="where boxes and masks are drawn (default: IMAGE.boxes.png here)")
  p.add_argument("--json", action="store_true", help="one JSON object instead of text")
  p.add_argument("--quantize", choices=quantize.BITS, help="weights in 8 or 4 bits; --save keeps them as a folder")
  p.add_argument("--device", metavar="DEV", help="METAL, CUDA, CPU, ... (default: the best there is, or $DEV)")
  p.add_argument("--shard", type=int, default=1, metavar="N", help="split the weights over N devices of a kind")
  p.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
  show.add_arguments(p)
  train.add_arguments(p)
  batch.add_arguments(p)
  try:
    args = p.parse_args(argv)
    status.quiet = args.quiet
    if args.device:
      DEV.value = args.device
    show.check(args)
    for program in (train, batch):
      if (code := program.run(args)) is not None:
        return code
    images, prompt = batch.split(args.inputs)
    if not images:
      images, prompt = [str(Path(__file__).with_name("examples") / "shapes.png")], "caption en"
    check_sampling(args.max_tokens, args.temperature, args.top_k, args.top_p, args.seed)  # all before the slow part
    for name in images:
      open_image(name)
    if args.out:
      draw.check_output(args.out, images)
    folder = args.weights or default_weights()
    status(f"loading {folder}")
    model = load(folder, bits=args.quantize, shard=args.shard)
    if args.save:
      quantize.save(model, folder, args.save, args.quantize)
      say(args, f"{args.quantize} weights saved: {args.save}")
    if args.shard > 1:
      say(args, f"{sharding.memory(get_state_dict(model.net)) / 1e9:.2f} GB of weights on each of {args.shard} devices")
    if model.config.note:
      say(args, model.config.note)
    if args.show:
      return show.run(model, images, prompt or "", args)
    return (talk.run if prompt is None else ask)(model, images, prompt, args)
  except Fault as e:
    status("")
    print(f"vlm: {e}", file=sys.stderr)
    return e.code
  except KeyboardInterrupt:
    return 130

# The programs in examples/ build on this file, so they come last; what they import as vlm is this, not a second copy.
sys.modules["vlm"] = sys.modules[__name__]
sys.path.append(str(Path(__file__).with_name("examples")))
import batch  # noqa: E402
import compiled  # noqa: E402
import draw  # noqa: E402
import kernels  # noqa: E402
import masks  # noqa: E402
import original  # noqa: E402
import quantize  # noqa: E402
import sharding  # noqa: E402
import show  # noqa: E402
import talk  # noqa: E402
import train  # noqa: E402

if __name__ == "__main__":
  sys.exit(main())
