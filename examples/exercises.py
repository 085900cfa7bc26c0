"""The checks of the exercises in tour.ipynb and solutions.ipynb, one for each exercise.

A check takes the learner's function, compares it with what vlm.py itself computes, and prints one line:
"right", or "not yet:" and what is wrong. It never raises, so that a notebook with open exercises runs to its
end. All that a learner writes is numpy. SLIPS are usual mistakes, which a check can tell from others.
"""
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import vlm  # first, because it says what is not installed
import numpy as np
from tinygrad import Tensor

vlm.open_device(None)  # which finds a compiler
CHECKS = []  # in the order of the exercises
SLIPS = {}   # {name of a check: {what is wrong: a function with that mistake}}

class NotYet(Exception):
  """Its text is what a learner reads after "not yet:"."""

def check(work):
  """Makes work(mine), which raises what is wrong, into a check, which prints it."""
  @functools.wraps(work)
  def run(mine):
    try:
      work(mine)
    except NotYet as e:
      print("not yet:", e)
    except NotImplementedError:
      print("not yet: the function is still to be written")
    except Exception as e:  # whatever a half-written function raises
      print(f"not yet: the function stopped with {type(e).__name__}: {e}")
    else:
      print("right")
  CHECKS.append(run)
  return run

def slip(of, what):
  """Decorates a wrong function: a check that meets its results can say what is wrong."""
  def keep(function):
    SLIPS.setdefault(of, {})[what] = function
    return function
  return keep

def compare(name, mine, right, inputs, tolerance=1e-4):
  """Calls mine(*inputs) on copies and raises NotYet unless it gives the array `right`."""
  def call(function):
    return function(*(np.copy(t) if isinstance(t, np.ndarray) else t for t in inputs))
  found = call(mine)
  if found is None:
    raise NotYet("the function returns None; does it end with return?")
  found, right = np.asarray(found), np.asarray(right)
  if found.shape != right.shape:
    raise NotYet(f"the result has shape {found.shape}, it should have {right.shape}")
  if right.dtype == bool and found.dtype != bool:
    raise NotYet(f"the result holds {found.dtype}, it should hold True and False")
  if not near(found, right, tolerance):
    for what, wrong in SLIPS.get(name, {}).items():
      known = np.asarray(call(wrong))
      if known.shape == found.shape and near(found, known, tolerance):
        raise NotYet(what)
    place = tuple(map(int, np.argwhere(~np.isclose(found, right, tolerance, tolerance))[0]))
    where = f" at {place}" if place else ""
    raise NotYet(f"the result{where} is {found[place]:.6g}, it should be {right[place]:.6g}")

def near(a, b, tolerance):
  return bool(np.isclose(a, b, tolerance, tolerance).all())

def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)

# ---- 1. Attention ----
@check
def check_attention(mine):
  """mine(q, k, v, scale, mask): q (H, T, d), k and v (K, C, d), mask (T, C) -> (T, H d)."""
  rng = np.random.default_rng(1)
  for H, K, T, C in ((1, 1, 3, 5), (4, 2, 5, 5), (6, 2, 2, 7)):
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((H, T, 8), (K, C, 8), (K, C, 8)))
    mask = np.tri(T, C, C - T, dtype=bool)  # causal, of the last T of C
    mask[:, 1] = mask[0, 1]
    q *= 3  # so that it matters where a query looks
    right = vlm.attention(*(Tensor(t[None]) for t in (q, k, v)), 8 ** -0.5, Tensor(mask[None, None, None]))
    compare("check_attention", mine, right.numpy()[0], (q, k, v, 8 ** -0.5, mask), 1e-3)

def _attention(q, k, v, scale, mask, scaled=True, pick=None, axis=-1):
  H, K = len(q), len(k)
  heads = []
  for h in range(H):
    kv = pick(h, H, K) if pick else h // (H // K)
    scores = q[h] @ k[kv].T * (scale if scaled else 1)
    scores = np.where(mask, scores, -1e9)
    weights = softmax(scores) if axis == -1 else softmax(scores.T).T
    heads.append(weights @ v[kv])
  return np.concatenate(heads, -1)

slip("check_attention", "the scores are not multiplied by scale")(functools.partial(_attention, scaled=False))
slip("check_attention", "every query looks everywhere; where mask is False its weight must be 0")(
  lambda q, k, v, scale, mask: _attention(q, k, v, scale, np.ones_like(mask)))
slip("check_attention", "the mask is turned round: True says that a query may look")(
  lambda q, k, v, scale, mask: _attention(q, k, v, scale, ~mask))
slip("check_attention", "the mask is transposed: its rows are queries")(
  lambda q, k, v, scale, mask: _attention(q, k, v, scale, mask.T if len(mask) == len(mask.T) else mask))
slip("check_attention", "query head h must read key/value head h // (H / K), not h % K")(
  functools.partial(_attention, pick=lambda h, H, K: h % K))
slip("check_attention", "the softmax runs over the queries; the weights of each query must add up to 1")(
  functools.partial(_attention, axis=0))

# ---- 2. RoPE ----
@check
def check_rope(mine):
  """mine(x, positions, theta): x (T, d), positions (T,) -> (T, d)."""
  rng = np.random.default_rng(2)
  for T, d, theta in ((1, 2, 10000.0), (5, 8, 10000.0), (4, 16, 100.0)):
    x, positions = rng.standard_normal((T, d)).astype(np.float32), rng.integers(1, 50, T)
    c = vlm.TextConfig(d, 1, d, head_dim=d, rope_theta=theta)
    cos, sin = vlm.rope_table(c, positions)
    right = vlm.rope(Tensor(x[None, None]), Tensor(cos), Tensor(sin)).numpy()[0, 0]
    compare("check_rope", mine, right, (x, positions, theta), 1e-3)

def _rope(x, positions, theta, sign=1, pairs="half", width=None):
  d = x.shape[1]
  angle = positions[:, None] * theta ** (-np.arange(0, d, 2) / (width or d))
  cos, sin = np.cos(angle), sign * np.sin(angle)
  if pairs == "half":
    a, b = x[:, :d // 2], x[:, d // 2:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], 1)
  a, b = x[:, ::2], x[:, 1::2]
  return np.stack([a * cos - b * sin, b * cos + a * sin], 2).reshape(x.shape)

slip("check_rope", "the pairs are interleaved, (2 i, 2 i + 1); in this file they are (i, i + d / 2)")(
  functools.partial(_rope, pairs="interleaved"))
slip("check_rope", "the pairs turn the other way round")(functools.partial(_rope, sign=-1))
slip("check_rope", "pair i turns by position * theta ** (-2 i / d): the 2 is missing")(
  lambda x, positions, theta: _rope(x, positions, theta, width=2 * x.shape[1]))
slip("check_rope", "nothing is turned")(lambda x, positions, theta: x)

# ---- 3. The mask of a prefix-LM ----
@check
def check_mask(mine):
  """mine(start, n): the first `start` of n tokens are the prefix -> bool (n, n)."""
  for start, n in ((3, 5), (1, 4), (4, 4), (2, 7)):
    compare("check_mask", mine, vlm.training_mask([start], [n], n)[0, 0, 0], (start, n))

slip("check_mask", "the mask is transposed: a row is a query, a column is what it may look at")(
  lambda start, n: (np.tri(n, dtype=bool) | (np.arange(n) < start)).T)
slip("check_mask", "this is the causal mask; the tokens of the prefix must all see each other")(
  lambda start, n: np.tri(n, dtype=bool))
slip("check_mask", "everybody sees everything; a token of the answer must not see a later one")(
  lambda start, n: np.ones((n, n), bool))
slip("check_mask", "True and False are exchanged")(
  lambda start, n: ~(np.tri(n, dtype=bool) | (np.arange(n) < start)))
slip("check_mask", "the first token of the answer must not be seen by the prefix")(
  lambda start, n: np.tri(n, dtype=bool) | (np.arange(n) <= start))
slip("check_mask", "a token must see itself")(
  lambda start, n: np.tri(n, k=-1, dtype=bool) | (np.arange(n) < start))

# ---- 4. RMSNorm ----
@check
def check_rms_norm(mine):
  """mine(x, weight, eps): x (T, D), weight (D,) -> (T, D)."""
  rng = np.random.default_rng(4)
  for size, eps in ((1, 1e-6), (20, 1e-6), (1e-3, 1e-4)):
    x = ((rng.standard_normal((3, 16)) + 0.5) * size).astype(np.float32)
    weight = rng.standard_normal(16).astype(np.float32)
    right = vlm.rms_norm(Tensor(x), Tensor(weight), eps).numpy()
    compare("check_rms_norm", mine, right, (x, weight, eps), 1e-4)

def _mean_square(x):
  return (x ** 2).mean(-1, keepdims=True)

slip("check_rms_norm", "the factor is 1 + weight, not weight")(
  lambda x, weight, eps: x / np.sqrt(_mean_square(x) + eps) * weight)
slip("check_rms_norm", "weight is not used")(lambda x, weight, eps: x / np.sqrt(_mean_square(x) + eps))
slip("check_rms_norm", "this is LayerNorm: the mean must not be subtracted")(
  lambda x, weight, eps: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
  * (1 + weight))
slip("check_rms_norm", "the squares are added up; it should be their mean")(
  lambda x, weight, eps: x / np.sqrt((x ** 2).sum(-1, keepdims=True) + eps) * (1 + weight))
slip("check_rms_norm", "each row has a mean of its own; this one is of all rows")(
  lambda x, weight, eps: x / np.sqrt((x ** 2).mean() + eps) * (1 + weight))
slip("check_rms_norm", "eps is missing")(lambda x, weight, eps: x / np.sqrt(_mean_square(x)) * (1 + weight))
slip("check_rms_norm", "eps must be added before the square root is taken")(
  lambda x, weight, eps: x / (np.sqrt(_mean_square(x)) + eps) * (1 + weight))

# ---- 5. Sampling ----
class Listener:
  """In place of a random generator: keeps the probabilities that it is asked to draw from."""
  def choice(self, n, p):
    self.p = p
    return 0

@check
def check_sampling(mine):
  """mine(logits, temperature, top_k, top_p) -> the probabilities (V,) from which the token is drawn."""
  rng = np.random.default_rng(5)
  logits = (2 * rng.standard_normal(12)).astype(np.float32)
  cases = ((1.0, 0, 1.0), (2.0, 0, 1.0), (1.0, 4, 1.0), (1.0, 0, 0.7), (2.0, 0, 0.7), (0.5, 0, 0.9),
           (1.5, 5, 0.8))
  for temperature, top_k, top_p in cases:
    listener = Listener()
    vlm.Sampling(temperature=temperature, top_k=top_k, top_p=top_p).draw(logits, listener)
    compare("check_sampling", mine, listener.p, (logits, temperature, top_k, top_p))
  compare("check_sampling", mine, [0, 1, 0], (np.array([0, 2000, 100], np.float32), 1.0, 0, 1.0))

def _sampling(logits, temperature, top_k, top_p, order="temperature, k, p", again=True, times=False,
              less=False):
  x = np.asarray(logits, np.float64)
  if order.startswith("temperature"):
    x = x * temperature if times else x / temperature
  def nucleus(x):
    p = softmax(x)
    order = np.argsort(-p, kind="stable")
    mass = np.cumsum(p[order]) - (0 if less else p[order])
    return np.where(np.isin(np.arange(len(x)), order[mass >= top_p]), -np.inf, x) if top_p < 1 else x
  def best(x):
    return np.where(x < np.sort(x)[-top_k], -np.inf, x) if top_k else x
  kept = best(nucleus(x)) if order == "temperature, p, k" else nucleus(best(x))
  if order == "k, p, temperature":
    kept = kept / temperature
  return softmax(kept) if again else np.where(kept == -np.inf, 0, softmax(x))

for what, options in {
    "the temperature comes first: top-p must see the probabilities after it": {"order": "k, p, temperature"},
    "top-k comes before top-p": {"order": "temperature, p, k"},
    "after top-k or top-p the rest must add up to 1 again": {"again": False},
    "logits are divided by the temperature, not multiplied": {"times": True},
    "top-p keeps the token with which the sum reaches it": {"less": True}}.items():
  slip("check_sampling", what)(functools.partial(_sampling, **options))

# ---- 6. The cache ----
@check
def check_cache(mine):
  """mine(cache, start, seen, new): new (B, K, T, d) into cache (B, K, C, d) -> its first `seen` slots."""
  rng = np.random.default_rng(6)
  B, K, C, d = 2, 2, 8, 4
  c = vlm.TextConfig(8, 1, 8, num_key_value_heads=K, head_dim=d)
  theirs, cache = vlm.Cache(c, B, C, vlm.open_device(None), vlm.upload), np.zeros((B, K, C, d), np.float32)
  for start, T, seen in ((0, 3, 3), (3, 1, 8), (4, 1, 8), (5, 2, 7)):
    new = rng.standard_normal((B, K, T, d)).astype(np.float32)
    right, _ = (t.numpy() for t in theirs.write(start, seen, 0, Tensor(new), Tensor(new)))
    before = cache.copy()
    found = mine(cache, start, seen, new.copy())
    if found is None:
      raise NotYet("the function returns None; does it end with return?")
    if np.shape(found) != right.shape:
      raise NotYet(f"the first {seen} slots were asked for, of shape {right.shape}, not {np.shape(found)}")
    kept = np.copy(before)
    kept[:, :, start:start + T] = new
    if np.array_equal(cache, before):
      raise NotYet("the cache is as it was before; write into it, do not make another array")
    if not np.array_equal(cache, kept):
      raise NotYet(f"slots {start} to {start + T - 1} of the cache must be the new ones, all others stay")
    if not np.array_equal(found, right):
      raise NotYet("the cache is right, but what is returned are not its first slots")

# ---- 7. Boxes ----
@check
def check_boxes(mine):
  """mine(text, width, height) -> [(label, (x1, y1, x2, y2)), ...] in pixels."""
  two = "<loc0100><loc0200><loc0300><loc0400> red circle ; <loc0000><loc0000><loc1023><loc1023> star"
  mask = "<loc0010><loc0020><loc0030><loc0040>" + "".join(f"<seg{i:03d}>" for i in range(16)) + " square"
  none = "a red circle", "<loc0001><loc0002> star"
  for text in ("<loc0256><loc0128><loc0768><loc1023> cat", two, mask, *none):
    right = [(box.label, box.box) for box in vlm.parse_boxes(text, 1000, 600)]
    found = mine(text, 1000, 600)
    if found is None:
      raise NotYet("the function returns None; does it end with return?")
    found = [(label, tuple(map(float, box))) for label, box in found]
    if len(found) != len(right):
      raise NotYet(f"{text!r} has {len(right)} boxes, the result has {len(found)}")
    for (label, box), (name, place) in zip(found, right):
      if label != name:
        raise NotYet(f"the label of {text!r} is {name!r}, not {label!r}")
      if not np.allclose(box, place, atol=0.02):
        x1, y1, x2, y2 = place
        wrong = {(y1 / .6, x1 * .6, y2 / .6, x2 * .6): "the first number is y1, the second x1: y before x",
                 tuple(v * 1023 / 1024 for v in place): "the numbers are 1023rds of the sides, not 1024ths",
                 (x1 * .6, y1 / .6, x2 * .6, y2 / .6): "x belongs to the width, y to the height",
                 (x1 / 1000, y1 / 600, x2 / 1000, y2 / 600): "the box should be in pixels"}
        known = [what for slip, what in wrong.items() if np.allclose(box, slip, atol=0.002)]
        rounded = tuple(round(v, 1) for v in place)
        raise NotYet(known[0] if known else f"the box of {text!r} is {rounded}, not {box}")

# ---- 8. The loss ----
@check
def check_loss(mine):
  """mine(logits, labels): logits (B, T, V), labels (B, T), -1 where none is learnt -> mean of the rest."""
  rng = np.random.default_rng(8)
  for size in (1, 3, 300):  # exp(300) is beyond float32
    logits = (size * rng.standard_normal((3, 5, 7))).astype(np.float32)
    labels = rng.integers(0, 7, (3, 5))
    labels[0, :4], labels[1, 1:3], labels[2, 4] = -1, -1, -1
    marked = Tensor(np.where(labels < 0, -100, labels))  # tinygrad takes -1 for "none is ignored"
    right = Tensor(logits).sparse_categorical_crossentropy(marked, ignore_index=-100).numpy()
    compare("check_loss", mine, right, (logits, labels), 1e-4)

def _terms(logits, labels):
  """-> -log p of each label (B, T), 0 where none is learnt, and where one is."""
  x = logits.astype(np.float64)
  x = x - x.max(-1, keepdims=True)
  logp = x - np.log(np.exp(x).sum(-1, keepdims=True))
  learnt = labels >= 0
  return -np.take_along_axis(logp, labels.clip(0)[..., None], -1)[..., 0] * learnt, learnt

slip("check_loss", "the mean must be of the learnt tokens only; this one counts all")(
  lambda logits, labels: _terms(logits, labels)[0].mean())
slip("check_loss", "labels of -1 must not be learnt")(
  lambda logits, labels: _terms(logits, labels % 7)[0].mean())
slip("check_loss", "the sum must be divided by the number of learnt tokens")(
  lambda logits, labels: _terms(logits, labels)[0].sum())
slip("check_loss", "the sign is wrong: the loss is minus the logarithm")(
  lambda logits, labels: -_terms(logits, labels)[0].sum() / _terms(logits, labels)[1].sum())
slip("check_loss", "this is the mean of each row's mean; every learnt token must count the same")(
  lambda logits, labels: (_terms(logits, labels)[0].sum(1) / _terms(logits, labels)[1].sum(1)).mean())
slip("check_loss", "the labels are shifted once more; vlm.collate has shifted them already")(
  lambda logits, labels: (lambda t, n: t.sum() / n.sum())(*_terms(logits[:, :-1], labels[:, 1:])))
