"""Tests of vlm.py and tokenizer.py: offline, on the tiny checkpoints of weights/. `-m quick`: those of a minute.

Golden numbers are transformers' (examples/golden.py). `-k live` compares with transformers itself, with new seeds and
sizes at every run; it needs torch and transformers. A failure names its seed: VLM_SEED=N repeats it.
"""
import ast
import contextlib
import dataclasses
import functools
import gc
import importlib
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import tokenize
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import sentencepiece
from PIL import Image, ImageColor, PngImagePlugin
from tinygrad import dtypes
from tinygrad.helpers import Context
from tinygrad.nn.state import get_state_dict

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "examples"))
import golden
import vlm
from tokenizer import LOC, SEG, Box, Tokenizer, parse_boxes

WEIGHTS, KINDS = ROOT / "weights", ("tiny1", "tiny2", "tiny2-28b")
README = (ROOT / "README.md").read_text()
# Largest difference, in standard deviations of the stage. Float32 alone is measured to differ by 1e-5 at most.
TOLERANCE = {"vision": 1e-4, "projected": 1e-4, "logits": 1e-4}
ROUNDING = 2e-5  # the same sums in another order, in standard deviations
# With the processor's bfloat16 instructions a matmul's input is rounded to 8 bits as well: 2^-9 an element, measured to
# come to 0.02 in the logits of the tiny models. vlm.kernels.PORTABLE turns those instructions off; then the rest must be exact.
BFLOAT16 = 0.05
SHORT, LONG = "detect cat ; dog", golden.PROMPTS[2]

@functools.cache
def model(kind):
  return vlm.load(WEIGHTS / kind)

@functools.cache
def expected(kind):
  return dict(np.load(WEIGHTS / kind / "golden.npz"))

@functools.cache
def pixels(count=2, seed=golden.SEED):
  return golden.pixels(56, count, seed)

def differ(a, b):
  """Largest difference in standard deviations of b; shapes must be equal."""
  assert a.shape == b.shape
  return float(np.abs(np.float64(a) - b).max() / b.std())

def run(m, images, prompts, **options):
  """-> tokens, a list a row; logits (steps, B, V), those that each of the tokens was chosen from"""
  seen, options = [], dict(max_tokens=golden.TOKENS) | options
  def recorded(function):
    def call(*args):
      if (outputs := function(*args)) is not None:  # None where a program is only made ready
        seen.append(outputs[1].numpy())
      return outputs
    return call
  with mock.patch.object(m, "prefill", recorded(m.prefill)), mock.patch.object(m, "decode", recorded(m.decode)):
    steps = list(m.tokens(images, prompts, **options))
  return [[step[i] for step in steps if step[i] is not None] for i in range(len(prompts))], np.stack(seen)[:len(steps)]

@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # where pictures with boxes go, should an answer have any

def fresh(m):
  """The same weights with nothing compiled, cached or remembered."""
  return changed(m, m.config)

def changed(m, config):
  """The same weights under another config"""
  return vlm.VLM(m.net, config, m.tokenizer, m.device, m.place)

# ---- golden: equal to transformers ----
# Those marked gpu run on whatever device DEV names, too: .ci/run has an OpenCL one, .github/workflows a Mac's.
@pytest.mark.quick
@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_golden_vision_and_projector(kind):
  for i, picture in enumerate(pixels()):
    vision, projected = model(kind).vision(picture)
    assert differ(vision, expected(kind)["vision"][i]) < TOLERANCE["vision"]
    assert differ(projected, expected(kind)["projected"][i]) < TOLERANCE["projected"]

@pytest.mark.quick
@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_golden_prefix_logits(kind):
  for i, picture in enumerate(pixels()):
    for j, prompt in enumerate(golden.PROMPTS):
      logits = golden.next_logits(model(kind), picture, prompt)
      assert logits.dtype == np.float32 and differ(logits, expected(kind)["logits"][i, j]) < TOLERANCE["logits"]

@pytest.mark.quick
@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_golden_tokens(kind):
  for i, picture in enumerate(pixels()):
    for j, prompt in enumerate(golden.PROMPTS):
      answer, = model(kind).generate([picture], [prompt], max_tokens=golden.TOKENS)
      assert answer.tokens == expected(kind)["tokens"][i, j].tolist()

@pytest.mark.quick
@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_golden_batch(kind):
  """two pictures and two prompt lengths at once, the shorter prompt padded"""
  tokens, logits = run(model(kind), list(pixels()), [SHORT, LONG])
  for row, prompt in ((0, 1), (1, 2)):
    assert tokens[row] == expected(kind)["tokens"][row, prompt].tolist()
    assert differ(logits[0, row], expected(kind)["logits"][row, prompt]) < TOLERANCE["logits"]

CAPTION = "a green triangle, a red circle and a yellow star"

@pytest.mark.quick
@pytest.mark.gpu
def test_toy_caption():
  [answer] = vlm.load(WEIGHTS / "toy").generate([ROOT / "examples" / "shapes.png"], ["caption en"], max_tokens=24)
  assert answer.text == CAPTION

@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["tiny1", "tiny2"])
def test_int8(kind, tmp_path, folder, monkeypatch):
  """a folder of examples/quantize.py answers as its weights do in float32"""
  monkeypatch.setattr(vlm.kernels, "PORTABLE", True)  # see BFLOAT16
  subprocess.run([sys.executable, ROOT / "examples" / "quantize.py", WEIGHTS / kind, "int8", "--bits", "8"], check=True)
  packed_model, arrays = vlm.load("int8"), vlm.read_weights(Path("int8"))
  scales = {name.removesuffix("_scale"): scale for name, scale in arrays.items() if name.endswith("_scale")}
  assert len(scales) > 20
  wide = {name: array * scales[name][:, None] if name in scales else array for name, array in arrays.items()
          if not name.endswith("_scale")}
  plain = vlm.load(folder(wide, kind=kind))
  tokens, logits = run(packed_model, list(pixels()), [SHORT, LONG], max_tokens=8)
  right, right_logits = run(plain, list(pixels()), [SHORT, LONG], max_tokens=8)
  assert tokens == right and differ(logits, right_logits) < TOLERANCE["logits"]

@pytest.mark.quick
def test_golden_files_tell_implementations_apart():
  """the golden answers would not fit by luck: they change from step to step, with the picture and with the prompt"""
  for kind in KINDS:
    g = expected(kind)
    assert g["seed"] == golden.SEED and list(g["prompts"]) == golden.PROMPTS
    assert g["tokens"].shape == (2, 3, golden.TOKENS)
    assert len({row.tobytes() for row in g["tokens"].reshape(6, -1)}) == 6
    assert len(np.unique(g["tokens"])) > 20 and g["tokens"].min() > 1  # no end token: all 32 count
  lengths = {len(model("tiny1").tokenizer.prompt(prompt)) for prompt in golden.PROMPTS}
  assert len(lengths) == 3 and len({max(8, 1 << (n - 1).bit_length()) for n in lengths}) > 1
  c, other = model("tiny2").config, model("tiny2-28b").config.text
  assert c.text.sliding_window < c.vision.patches and golden.TOKENS > c.text.sliding_window
  assert c.text.query_pre_attn_scalar == c.text.head_dim and other.query_pre_attn_scalar != other.head_dim
  assert not model("tiny1").config.text.gemma2
  assert len(list((WEIGHTS / "tiny2").glob("model-*.safetensors"))) > 1

# ---- invariants ----
@pytest.mark.quick
@pytest.mark.parametrize("kind", ["tiny1", "tiny2"])
def test_a_batch_row_is_the_question_alone(kind):
  m, images, prompts = model(kind), [pixels()[0], pixels()[1]], [LONG, SHORT]
  for options in ({}, dict(temperature=1.0, top_k=50, seed=3)):
    tokens, logits = run(m, images, prompts, max_tokens=20, **options)
    for row in range(2):
      alone, alone_logits = run(m, images[row:row + 1], prompts[row:row + 1], max_tokens=20, **options)
      assert tokens[row] == alone[0] and len(alone[0]) == 20
      assert differ(logits[:, row], alone_logits[:, 0]) < ROUNDING

def test_a_row_that_ends_early_leaves_the_others_alone():
  m = fresh(model("tiny2"))
  whole = [m.generate([p], [SHORT], max_tokens=12)[0].tokens for p in pixels()]
  stop = next(id for id in whole[0] if id not in whole[1])
  m.config = dataclasses.replace(m.config, eos=(1, stop))
  answers = m.generate(list(pixels()), [SHORT] * 2, max_tokens=12)
  assert answers[0].tokens == whole[0][:whole[0].index(stop)] and answers[1].tokens == whole[1]

def one_shot(m, picture, ids, answer):
  """No cache, no padding, no compiled program: all positions at once under training_mask -> logits (1 + answer, V)"""
  c, start = m.config, m.config.vision.patches + len(ids)
  n, gemma = start + len(answer), m.net.language_model
  sequence = vlm.collate(c.text, c.vision.patches, [(ids, answer)], n - c.vision.patches)
  ids, _, full, sliding, cos, sin = (vlm.upload(t, m.device) for t in sequence)
  image = vlm.upload(m.vision(picture)[1][None], m.device)
  x = gemma(image.cat(gemma.embed(ids), dim=1), cos, sin, (full, sliding))
  return gemma.logits(x[0, start - 1:].contiguous()).numpy()

@pytest.mark.quick
@pytest.mark.parametrize("kind", ["tiny1", "tiny2"])
def test_cached_is_uncached_and_token_by_token_is_one_shot(kind):
  m = model(kind)  # in tiny2 the answer is four windows long
  (tokens,), logits = run(m, [pixels()[1]], [SHORT])
  assert differ(logits[:, 0], one_shot(m, pixels()[1], m.tokenizer.prompt(SHORT), tokens[:-1])) < ROUNDING

def test_jit_is_no_jit():
  m = model("tiny2")
  tokens, logits = run(m, [pixels()[0]], [SHORT], max_tokens=6)  # prefill and 5 decode steps
  with Context(JIT=0):
    plain_tokens, plain_logits = run(fresh(m), [pixels()[0]], [SHORT], max_tokens=6)
  assert tokens == plain_tokens and differ(logits, plain_logits) < ROUNDING
  again = [run(m, [pixels()[0]], [SHORT], max_tokens=6) for _ in range(2)]  # nothing is left in the cache
  assert all(t == tokens and np.array_equal(l, logits) for t, l in again)

def test_a_second_question_costs_no_vision(pictures, monkeypatch):
  m, run, keys = fresh(model("tiny1")), vlm.VLM._run, []
  # Of the class: what wraps the model's own method and holds it would keep it until a garbage collection.
  monkeypatch.setattr(vlm.VLM, "_run", lambda self, key, *rest: (keys.append(key), run(self, key, *rest))[1])
  first = golden.next_logits(m, pictures["rgb"], SHORT)
  for same in (pictures["rgb"], Image.open(pictures["rgb"]), io.BytesIO(pictures["rgb"].read_bytes())):
    assert np.array_equal(golden.next_logits(m, same, SHORT), first)
  m.generate([pictures["rgb"]] * 2, [SHORT, LONG], max_tokens=2)
  assert keys.count(("vision",)) == 1
  assert not np.array_equal(golden.next_logits(m, pictures["tall"], SHORT), first) and keys.count(("vision",)) == 2

def test_prompts_of_many_lengths_share_programs():
  m = fresh(model("tiny1"))
  lengths, programs = set(), set()
  for words in range(2, 8):
    prompt = " ".join(["ab"] * words)
    lengths.add(len(m.tokenizer.prompt(prompt)))
    m.generate([pixels()[0]], [prompt], max_tokens=2)
    programs.add(len(m.programs))
  assert len(lengths) == 6 and max(lengths) > 2 * min(lengths) and len(programs) <= 2 and max(programs) <= 4

@pytest.mark.quick
def test_long_answers_and_the_end_of_the_context():
  whole = model("tiny2").config
  m = changed(model("tiny2"), dataclasses.replace(whole, text=dataclasses.replace(whole.text, max_position_embeddings=64)))
  length = len(m.tokenizer.prompt(SHORT))
  room = 64 - 16 - length
  assert len(m.generate([pixels()[0]], [SHORT], max_tokens=room)[0].tokens) == room  # to the last position
  with pytest.raises(vlm.Fault, match="fit"):
    m.generate([pixels()[0]], [SHORT], max_tokens=room + 1)
  full = next(p for n in range(1, 99) if len(m.tokenizer.prompt(p := "x" * n)) == 64 - 16 - 1)
  assert golden.next_logits(m, pixels()[0], full).shape == (1536,)
  with pytest.raises(vlm.Fault, match="fit"):
    golden.next_logits(m, pixels()[0], full + "x")

def test_a_dropped_model_is_freed_at_once():
  """By reference counts: the cycle collector may run on a thread of tinygrad's CPU device, and wait for itself."""
  m = fresh(model("tiny1"))
  m.generate([pixels()[0]], [SHORT], max_tokens=4)
  parts = [weakref.ref(part) for part in (m, *m.programs.values(), *m.caches.values())]
  assert len(parts) > 4
  gc.disable()
  try:
    del m
    assert not [part() for part in parts if part() is not None]
  finally:
    gc.enable()

def test_interleaved_answers_and_threads(pictures):
  m = fresh(model("tiny1"))
  sources, questions = [pictures["rgb"], pictures["tall"]], [SHORT, LONG]
  alone = [m.generate([source], [question], max_tokens=8)[0].text for source, question in zip(sources, questions)]
  first = m.stream(sources[0], questions[0], max_tokens=8)
  begun = next(first)
  assert "".join(m.stream(sources[1], questions[1], max_tokens=8)) == alone[1]
  with pytest.raises(vlm.Fault, match="another question"):
    list(first)
  assert alone[0].startswith(begun)
  with ThreadPoolExecutor(4) as pool:
    ask = lambda i: m.generate([sources[i % 2]], [questions[i % 2]], max_tokens=8)[0].text
    assert list(pool.map(ask, range(12))) == alone * 6

@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_fork_says_so_instead_of_hanging(tmp_path):
  code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import vlm
m = vlm.load({str(WEIGHTS / 'tiny1')!r})
ask = lambda m: m.generate([{str(ROOT / 'examples' / 'shapes.png')!r}], ["caption en"], max_tokens=2)
ask(m)
if os.fork() == 0:
  try:
    ask(m)
  except vlm.Fault as e:
    print(e, flush=True)
  os._exit(0)
os.wait()
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
  assert "fork" in done.stdout and done.returncode == 0, done

def test_library(pictures):
  m = model("tiny1")
  assert isinstance(m, vlm.VLM)
  logits = golden.next_logits(m, str(pictures["rgb"]), "caption en")
  assert logits.shape == (1536,) and logits.dtype == np.float32
  with open(pictures["rgb"], "rb") as file:
    sources = [pictures["rgb"], Image.open(pictures["rgb"]), file, vlm.to_pixels(pictures["rgb"], 56)[0]]
    answers = [m.generate([source], ["caption en"], max_tokens=8)[0] for source in sources]
  assert all(a == answers[0] for a in answers) and isinstance(answers[0], vlm.Answer)
  assert len(answers[0].tokens) == 8 and answers[0].tokens[0] == logits.argmax() and answers[0].boxes == []
  pieces = list(m.stream(pictures["rgb"], "caption en", max_tokens=8))
  assert "".join(pieces) == answers[0].text == m.tokenizer.decode(answers[0].tokens)
  batch = m.generate([pictures["rgb"], pictures["tall"]], ["caption en", "detect cat"], temperature=0.0, max_tokens=8)
  assert len(batch) == 2 and batch[0] == answers[0]
  for images, prompts in (([pictures["rgb"]], ["a", "b"]), ([], [])):
    with pytest.raises(vlm.Fault):
      m.generate(images, prompts)
  for images, prompts, name in (("a.png", "caption en", "images"), ([pictures["rgb"]], "caption en", "prompts"),
                                ([pictures["rgb"]], [5], "prompt"), ([5], ["a"], "5"), ([None], ["a"], "None")):
    with pytest.raises(vlm.Fault, match=name):
      m.generate(images, prompts)
  for wrong in (np.zeros((3, 55, 56), np.float32), np.zeros((56, 56, 3), np.float32), np.full((3, 56, 56), 200, np.uint8),
                np.full((3, 56, 56), 255.0), np.full((3, 56, 56), np.nan), np.zeros((3, 56, 56), np.uint8),
                np.zeros((3, 56, 56), bool), np.full((3, 56, 56), "a")):
    with pytest.raises(vlm.Fault, match="56"):
      golden.next_logits(m, wrong, "caption en")

@pytest.mark.quick
def test_arguments_of_other_types(pictures):
  """each a Fault that names what is wrong, before anything is computed"""
  m = model("tiny1")
  ask = {"generate": lambda image, prompt, **options: m.generate([image], [prompt], **options),
         "stream": lambda image, prompt, **options: list(m.stream(image, prompt, **options))}
  numbers = {"max_tokens": ["5", 2.5, None, True, [1], 1j], "temperature": ["hot", None, 1j, True],
             "top_k": ["3", 1.5, None], "top_p": ["x", None], "seed": [1.5, "x", True, []]}
  for call in ask.values():
    for name, values in numbers.items():
      for value in values:
        with pytest.raises(vlm.Fault, match=f"{name} is a number"):
          call(pictures["rgb"], "caption en", **{name: value})
    with pytest.raises(vlm.Fault, match="--seed: from 0"):
      call(pictures["rgb"], "caption en", seed=-1)
    with pytest.raises(TypeError, match="nonsense"):
      call(pictures["rgb"], "caption en", nonsense=1)
    for image in (None, 5, 1.5, {}, open, b"bytes", [None], [[pictures["rgb"]]]):
      with pytest.raises(vlm.Fault, match="not an image|No such file"):
        call(image, "caption en")
    for prompt in (None, 5, b"caption en", ["caption en"], {}):
      with pytest.raises(vlm.Fault, match=f"a prompt is a text, not {type(prompt).__name__}"):
        call(pictures["rgb"], prompt)
  assert vlm.Sampling(np.int64(2), np.float32(0), np.int32(3), 1, None) == vlm.Sampling(2, 0.0, 3, 1.0)
  for folder in (None, 5, b"weights", []):
    with pytest.raises(vlm.Fault, match="folder is a path"):
      vlm.load(folder)
  for device in (5, "", b"CPU", []):
    with pytest.raises(vlm.Fault, match="device .*: its name is to be a text"):
      vlm.load(WEIGHTS / "tiny1", device)

@pytest.mark.quick
def test_no_words_are_not_those_of_another_command_line(capsys, monkeypatch):
  """a program that has words of its own calls main([])"""
  said = vlm.program(lambda argv: vlm.log.info("said"))
  monkeypatch.setattr(sys, "argv", ["own.py", "--quiet"])
  said([])
  assert capsys.readouterr().err == "said\n"

# ---- text ----
TEXTS = ["caption en", "detect cat ; dog", "answer en what color is the square?", "12 345 67", "", " ", "trailing ",
         " leading", "line\nline\n\nline\n\n\nend", "ends in a newline\n", "a  b   c", "Grüße, 日本語 🎉", "tab\there",
         "UPPER Case!?",
         "describe <loc0012><loc1023><seg003> y", "[<loc0001>]", "<loc1024> <seg128> <loc12> <seg1000>", "<loc 12>",
         "▁x"]

@pytest.fixture(scope="session")
def own_pieces(tmp_path_factory):
  """A SentencePiece file that holds the loc, seg and image tokens itself, as big_vision's does"""
  names = [f"<seg{i:03d}>" for i in range(SEG)] + [f"<loc{i:04d}>" for i in range(LOC)] + ["<image>"]
  path = tmp_path_factory.mktemp("own") / "tokenizer"
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["caption en detect cat ; dog answer what color is the square"] * 9), model_prefix=str(path),
    vocab_size=256 + 4 + 2 + len(names) + 40, model_type="bpe", byte_fallback=True, split_digits=True, num_threads=1,
    normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
    allow_whitespace_only_pieces=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
    bos_piece="<bos>", user_defined_symbols=["\n", "\n\n", *names], hard_vocab_limit=False)
  return path.with_suffix(".model")

@pytest.fixture(params=["hub", "own"])
def text(request, own_pieces):
  return Tokenizer(WEIGHTS / "tiny1" / "tokenizer.model" if request.param == "hub" else own_pieces)

@pytest.mark.quick
def test_loc_and_seg_are_single_ids(text):
  base = sentencepiece.SentencePieceProcessor(model_file=str(WEIGHTS / "tiny1" / "tokenizer.model")).get_piece_size()
  hub = text.model.get_piece_size() == base
  names = {f"<loc{i:04d}>": base + i for i in (0, 7, 512, 999, 1000, 1023)}
  names |= {f"<seg{i:03d}>": base + LOC + i for i in (0, 99, 100, 127)}
  for name, after_the_base in names.items():
    id, = text.encode(name)
    assert id == (after_the_base if hub else text.model.piece_to_id(name)) and text.decode([id]) == name
  assert text.image == (base + LOC + SEG if hub else text.model.piece_to_id("<image>"))
  assert len(text.encode("a<loc0001><loc0002>b<seg003>")) == len(text.encode("a")) + len(text.encode("b")) + 3
  for no_name in ("<loc1024>", "<seg128>", "<loc12>", "<LOC0001>", "<loc00001>"):
    assert len(text.encode(no_name)) > 1 and text.decode(text.encode(no_name)) == no_name

@pytest.mark.quick
def test_control_names_are_plain_text(text):
  control = {text.image, 0, 1, 2, 3}
  for name in ("<image>", "<bos>", "<eos>", "<pad>", "<unk>"):
    for typed in (name, f"a {name}{name} b", f"<{name}>"):
      ids = text.encode(typed)
      assert not control & set(ids) and text.decode(ids) == typed

@pytest.mark.quick
def test_prompt(text):
  assert text.prompt("caption en") == [2, *text.encode("caption en"), text.newline]
  assert text.prompt("") == [2, text.newline] and text.bos == 2
  assert text.model.id_to_piece(text.newline) == "\n"
  assert text.prompt("a\n") == [2, *text.encode("a"), text.model.piece_to_id("\n\n")]  # as transformers does
  assert text.image not in text.prompt("<image><bos>") and text.prompt("<bos>").count(2) == 1

@pytest.mark.quick
def test_text_survives(text):
  for typed in TEXTS:
    ids = text.encode(typed)
    assert text.decode(ids) == typed.replace("▁", " ")  # SentencePiece's own sign for a space
    assert 3 not in ids
  assert all(len(text.encode(digits)) >= len(digits) for digits in ("12", "2024"))  # one piece a digit

@pytest.mark.quick
def test_streamed_pieces_join(text):
  rng = np.random.default_rng(0)
  for ids in [text.encode(t) for t in TEXTS] + [rng.integers(0, len(text.ids) + 300, 40).tolist() for _ in range(50)]:
    assert "".join(text.stream(ids)) == text.decode(ids)
  ids = text.encode("🎉é")
  assert len(ids) == 6 and all(map(text.model.is_byte, ids))  # four and two byte tokens
  came, shown = [], []
  for piece in text.stream(came.append(id) or id for id in ids):
    shown.append((len(came), piece))
  assert shown == [(4, "🎉"), (6, "é")]  # each as soon as its last byte is there
  assert list(text.stream(ids[:2])) == ["\ufffd"] and text.decode(ids[:2]) == "\ufffd"
  assert text.decode([0, 1, 2, text.image]) == ""

@pytest.mark.quick
def test_not_a_tokenizer(tmp_path):
  (tmp_path / "a.model").write_bytes(b"not a SentencePiece model")
  with pytest.raises(vlm.Fault, match="SentencePiece"):
    Tokenizer(tmp_path / "a.model")
  sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a b c d e"] * 9), model_prefix=str(tmp_path / "b"),
                                           vocab_size=12, minloglevel=2, hard_vocab_limit=False)
  with pytest.raises(vlm.Fault, match="newline|bos"):
    Tokenizer(tmp_path / "b.model")

# ---- sampling ----
def share(logits, temperature, top_k, top_p, draws=4000):
  rng, sampling = np.random.default_rng(1), vlm.Sampling(1, temperature, top_k, top_p)
  drawn = [sampling.draw(np.array(logits, np.float32), rng) for _ in range(draws)]
  return np.bincount(drawn, minlength=len(logits)) / draws

def close(got, p, draws=4000):
  p = np.array(p)
  return (np.abs(got - p) <= 4 * np.sqrt(p * (1 - p) / draws)).all()

@pytest.mark.quick
def test_sampling_distribution():
  p = np.array([.1, .5, .05, .35])
  assert close(share(np.log(p), 1.0, 0, 1.0), p)
  assert close(share(np.log(p) + 50, 1.0, 0, 1.0), p)
  assert close(share(np.log(p), 2.0, 0, 1.0), p ** .5 / (p ** .5).sum())
  assert close(share(np.log(p), 1.0, 2, 1.0), [0, .5 / .85, 0, .35 / .85])
  assert close(share(np.log(p), 1.0, 9, 1.0), p)
  assert close(share(np.log(p), 1.0, 0, .8), [0, .5 / .85, 0, .35 / .85])  # the least whose mass reaches top-p
  assert close(share(np.log(p), 1.0, 0, .9), [.1 / .95, .5 / .95, 0, .35 / .95])
  assert close(share(np.log(p), 1.0, 0, .3), [0, 1, 0, 0])
  assert close(share([0, 200, -np.inf, 100], 1.0, 0, 1.0), [0, 1, 0, 0])

@pytest.mark.quick
def test_sampling_order():
  p = np.array([.1, .5, .05, .35])
  hot = p ** .25 / (p ** .25).sum()  # temperature 4: .22 .33 .18 .28; a mass of .7 takes three of these, but two of p
  assert close(share(np.log(p), 4.0, 0, .7), np.where(hot > hot.min(), hot, 0) / (1 - hot.min()))
  # top-k 2 leaves .59 and .41: top-p .55 of that is one; of all four it would take two
  assert close(share(np.log(p), 1.0, 2, .55), [0, 1, 0, 0]) and (share(np.log(p), 1.0, 0, .55) > 0).sum() == 2

@pytest.mark.quick
def test_seeds_and_greedy():
  m = model("tiny1")
  ask = lambda **options: m.generate([pixels()[0]], [SHORT], max_tokens=12, **options)[0].tokens
  greedy = ask()
  assert ask(temperature=1.0, top_k=1) == greedy == ask(temperature=1.0, top_p=1e-9) == ask(seed=5, top_k=9)
  samples = [ask(temperature=1.0, seed=seed) for seed in (1, 2, 3, 1)]
  assert samples[0] == samples[3] and len(set(map(tuple, samples))) == 3
  assert ask(temperature=1.0) != ask(temperature=1.0)  # without a seed: 12 tokens of a flat distribution
  a, b = m.generate([pixels()[0]] * 2, [SHORT] * 2, max_tokens=12, temperature=1.0, seed=2)
  assert a.tokens == b.tokens == samples[1]

# ---- boxes ----
def loc(*values):
  return "".join(f"<loc{v:04d}>" for v in values)

@pytest.mark.quick
def test_boxes():
  one, = parse_boxes(loc(0, 256, 1023, 512) + " cat", 1023, 2046)  # y1 x1 y2 x2, in 1023rds
  assert one.label == "cat" and one.box == pytest.approx((256, 0, 512, 2046))
  several = f"{loc(1, 2, 3, 4)} red circle ; {loc(5, 6, 7, 8)} the old blue square;{loc(9, 9, 9, 9)} cat"
  assert [b.label for b in parse_boxes(several, 100, 100)] == ["red circle", "the old blue square", "cat"]
  seg = "".join(f"<seg{i:03d}>" for i in range(16))
  assert parse_boxes(loc(0, 0, 1023, 1023) + seg + " big cat", 7, 5) == [Box("big cat", (0, 0, 7, 5), tuple(range(16)))]
  assert parse_boxes(loc(1, 2, 3, 4), 10, 10)[0].label == ""
  assert [b.label for b in parse_boxes(f"There is one: {loc(1, 2, 3, 4)} cat", 10, 10)] == ["cat"]
  assert parse_boxes(loc(0, 0, 1023, 1023) + seg + "<seg099>" + " cat", 7, 5)[0].codes == tuple(range(16))

@pytest.mark.quick
@pytest.mark.parametrize("tail", [loc(1, 2, 3), loc(1, 2, 3) + " cat", loc(1, 2, 3, 4, 5) + " cat", "cat", "",
                                  "<loc0001><loc12", loc(1, 2, 3, 1024) + " cat", loc(1, 2, 3, 9999), loc(1, 2) + " a " + loc(3, 4) + " b"])
def test_a_malformed_tail_stays_text(tail):
  good = loc(1, 2, 3, 4) + " cat"
  assert len(parse_boxes(f"{good} ; {tail}", 10, 10)) == 1 and parse_boxes(tail, 10, 10) == []

# ---- pixels ----
def bicubic(image, width, height):
  """Pillow's antialiased bicubic resize of uint8 (H, W, 3), written out: 22-bit weights, rounded after each direction.
  -> [columns first, rows first]: newer releases take the order that is less work"""
  def kernel(x):
    x = abs(x)
    return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0
  def rows(image, size):
    scale, out = len(image) / size, []
    stretch = max(scale, 1.0)
    for i in range(size):
      center = (i + .5) * scale
      low, high = max(int(center - 2 * stretch + .5), 0), min(int(center + 2 * stretch + .5), len(image))
      weights = [kernel((y - center + .5) / stretch) for y in range(low, high)]
      k = [math.floor(w / sum(weights) * 2**22 + .5) for w in weights]
      out.append((np.tensordot(k, image[low:high].astype(np.int64), 1) + 2**21) >> 22)
    return np.clip(out, 0, 255).astype(np.uint8)
  turn = lambda image: image.transpose(1, 0, 2)
  return [rows(turn(rows(turn(image), width)), height), turn(rows(turn(rows(image, height)), width))]

def off(pixels, image):
  """Largest difference between pixels (1, 3, S, S) and what an uint8 (H, W, 3) should become"""
  right = [resized.transpose(2, 0, 1) / 127.5 - 1 for resized in bicubic(image, *pixels.shape[2:])]
  return min(np.abs(pixels[0] - r).max() for r in right)

def noise(h, w, channels, seed=0):
  rng = np.random.default_rng(seed)
  coarse = np.asarray(Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((w, h)), np.int64)
  values = np.resize(coarse, (h, w, channels)) + rng.integers(-20, 20, (h, w, channels))
  values = np.clip(values, 0, 255).astype(np.uint8)
  return values[..., 0] if channels == 1 else values

@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
  """{name: file}, a picture of every kind"""
  folder, of = tmp_path_factory.mktemp("pictures"), Image.fromarray
  rotated = Image.Exif()
  rotated[0x0112] = 6  # the camera lay on its side
  made = {
    "rgb.png": (of(noise(40, 60, 3)), {}), "grey.png": (of(noise(61, 33, 1)), {}),
    "palette.png": (of(noise(40, 60, 3)).quantize(17), {}), "rgba.png": (of(noise(50, 70, 4), "RGBA"), {}),
    "clear_palette.png": (of(noise(40, 60, 3)).quantize(17), {"transparency": 3}),
    "grey_alpha.png": (of(noise(30, 30, 2), "LA"), {}), "cmyk.jpg": (of(noise(40, 60, 4), "CMYK"), {"quality": 95}),
    "bit.png": (of(noise(80, 80, 1)).convert("1"), {}), "deep.png": (of(noise(40, 60, 1).astype(np.uint16) * 257), {}),
    "tall.png": (of(noise(300, 7, 3)), {}), "wide.png": (of(noise(5, 400, 3)), {}), "one.png": (of(noise(1, 1, 3)), {}),
    "square.png": (of(noise(56, 56, 3)), {}), "turned.jpg": (of(noise(40, 60, 3)), {"exif": rotated, "quality": 95}),
    "photo.jpg": (of(noise(90, 120, 3)), {"quality": 90}), "anim.gif": (of(noise(40, 60, 3)), {}),
  }
  for name, (image, options) in made.items():
    image.save(folder / name, **options)
  return {name.split(".")[0]: folder / name for name in made}

def upright(path, turned=False):
  """The file as uint8 (H, W, 3), by hand where Pillow's conversions are in doubt"""
  image = Image.open(path)
  values = np.asarray(image.transpose(Image.Transpose.ROTATE_270) if turned else image)
  if image.mode == "P":  # colors of the palette, and the clear one
    palette = np.array(image.getpalette()).reshape(-1, 3)
    rgb = palette[values]
    if "transparency" in image.info:
      rgb[values == image.info["transparency"]] = 255
    return rgb.astype(np.uint8)
  if image.mode in ("RGBA", "LA"):  # over white, as transformers 5 does
    color, alpha = values[..., :-1].astype(np.float64), values[..., -1:] / 255
    return np.broadcast_to(np.rint(color * alpha + 255 * (1 - alpha)), (*values.shape[:2], 3)).astype(np.uint8)
  if values.ndim == 2:
    return np.repeat((values * 255 if image.mode == "1" else values)[..., None], 3, 2).astype(np.uint8)
  if image.mode == "CMYK":
    return np.asarray(image.convert("RGB"))
  return values

@pytest.mark.quick
@pytest.mark.parametrize("name", ["rgb", "grey", "palette", "clear_palette", "cmyk", "bit", "tall", "wide", "one",
                                  "square", "turned", "photo"])
def test_pixels(name, pictures):
  for side in (56, 28):
    got = vlm.to_pixels(pictures[name], side)
    assert got.shape == (1, 3, side, side) and got.dtype == np.float32
    assert off(got, upright(pictures[name], name == "turned")) < 1e-6

@pytest.mark.quick
@pytest.mark.parametrize("name", ["rgba", "grey_alpha"])
def test_transparent_pixels(name, pictures):
  # Pillow rounds the mix with white in steps of its own: the source may be one off
  assert off(vlm.to_pixels(pictures[name], 56), upright(pictures[name])) < 2.01 / 127.5

@pytest.mark.quick
def test_pictures_are_turned_upright(pictures):
  assert Image.open(pictures["turned"]).size == (60, 40) and vlm.open_image(pictures["turned"]).size == (40, 60)
  image = Image.new("RGB", (40, 20), "red")
  image.paste("blue", (0, 0, 20, 20))
  for orientation, corner in ((1, "blue"), (2, "red"), (3, "red"), (6, "blue"), (8, "red")):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    seen = vlm.open_image(file)
    assert seen.size == ((20, 40) if orientation > 4 else (40, 20))
    assert seen.getpixel((2, 2)) == {"red": (255, 0, 0), "blue": (0, 0, 255)}[corner]

# ---- loading ----
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64}

def read(folder):
  """Every tensor of a folder, {name: array}"""
  tensors = {}
  for file in sorted(Path(folder).glob("*.safetensors")):
    data = file.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for name, t in json.loads(data[8:start]).items():
      if name != "__metadata__":
        low, high = t["data_offsets"]
        tensors[name] = np.frombuffer(data[start + low:start + high], DTYPES[t["dtype"]]).reshape(t["shape"])
  return tensors

def packed(tensors, change=lambda header: None):
  """The bytes of a safetensors file; `change` edits the header after it is right"""
  header, at, names = {}, 0, {np.dtype(v): k for k, v in DTYPES.items()}
  for name, array in tensors.items():
    header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
    at += array.nbytes
  change(header)
  text = json.dumps(header).encode()
  return struct.pack("<Q", len(text)) + text + b"".join(np.ascontiguousarray(a).tobytes() for a in tensors.values())

@pytest.fixture
def folder(tmp_path):
  """folder(tensors={...} or rename=..., config={...}, kind="tiny1") -> a copy of a tiny folder with those changes"""
  def make(tensors=None, rename=lambda name: name, config=None, kind="tiny1", change=lambda header: None):
    target = tmp_path / f"w{len(list(tmp_path.glob('w*')))}"
    target.mkdir()
    shutil.copy(WEIGHTS / kind / "tokenizer.model", target)
    text = json.loads((WEIGHTS / kind / "config.json").read_text()) | {"note": ""} | (config or {})
    (target / "config.json").write_text(json.dumps(text))
    tensors = {rename(n): a for n, a in (read(WEIGHTS / kind) if tensors is None else tensors).items()}
    (target / "model.safetensors").write_bytes(packed(tensors, change))
    return target
  return make

def weights(m):
  return {name: t.numpy() for name, t in get_state_dict(m.net).items()}

def same_weights(a, b):
  return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)

HEAD = "language_model.model.embed_tokens.weight"  # tied: the head is the embedding table
def hub(name):     # A: hub files, saved by transformers <= 4.51
  return re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name)
def memory(name):  # B: saved from memory by 4.52+
  return "model." + re.sub(r"^language_model\.model\.", "language_model.", hub(name))
LAYOUTS = {
  "A": hub, "B": memory, "C as A": lambda name: hub(name).replace("vision_model.", ""),
  "C as B": lambda name: memory(name).replace("vision_model.", ""),
  "D ColPali": lambda name: "vlm." + memory(name), "D ColPali A": lambda name: "vlm." + hub(name),
  "D robots": lambda name: "paligemma_with_expert.paligemma." + memory(name),
  "D robots in a model": lambda name: "model.paligemma_with_expert.paligemma." + memory(name),
}

@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, folder):
  for kind in ("tiny1", "tiny2"):
    names = read(WEIGHTS / kind)
    assert HEAD in names and (kind != "tiny2" or "vision_tower.vision_model.post_layernorm.bias" in names)
    assert same_weights(weights(vlm.load(folder(rename=LAYOUTS[layout], kind=kind))), weights(model(kind)))

@pytest.mark.quick
def test_heads(folder):
  tensors, right = read(WEIGHTS / "tiny1"), weights(model("tiny1"))
  for head in ("lm_head.weight", "language_model.lm_head.weight", "vlm.lm_head.weight"):
    assert same_weights(weights(vlm.load(folder(tensors | {head: tensors[HEAD]}))), right)
    only = {head if name == HEAD else name: array for name, array in tensors.items()}
    assert same_weights(weights(vlm.load(folder(only))), right)
    with pytest.raises(vlm.Fault, match="lm_head"):
      vlm.load(folder(tensors | {head: tensors[HEAD] + 1}))
    with pytest.raises(vlm.Fault, match="lm_head"):
      vlm.load(folder(tensors | {head: tensors[HEAD][:-1]}))

@pytest.mark.quick
def test_shards(folder):
  tensors, target = read(WEIGHTS / "tiny1"), folder()
  names = sorted(tensors, reverse=True)
  parts = {f"model-0000{i}-of-00003.safetensors": part
           for i, part in enumerate((names[:20], names[20:25], names[25:]), 1)}
  (target / "model.safetensors").unlink()
  for file, part in parts.items():
    (target / file).write_bytes(packed({name: tensors[name] for name in part}))
  (target / "adapter_model.safetensors").write_bytes(packed({"x": np.zeros(3, np.float32)}))  # another file: not read
  assert same_weights(weights(vlm.load(target)), weights(model("tiny1")))
  first, *_, last = parts
  (target / "model-again.safetensors").write_bytes(packed({names[0]: tensors[names[0]]}))
  assert same_weights(weights(vlm.load(target)), weights(model("tiny1")))  # the same twice does no harm
  (target / "model-again.safetensors").write_bytes(packed({names[0]: tensors[names[0]] + 1}))
  with pytest.raises(vlm.Fault, match="twice"):
    vlm.load(target)
  (target / "model-again.safetensors").unlink()
  (target / last).unlink()
  with pytest.raises(vlm.Fault, match="missing.*is the download complete"):
    vlm.load(target)

@pytest.mark.parametrize("dtype,factor", [("BF16", 6.9375), ("F16", 6.9296875)])
def test_number_types(dtype, factor, folder, monkeypatch):
  """A 16-bit file answers as its values in a float32 file do; but sqrt(48) = 6.9282 is rounded to the file's type."""
  tensors = read(WEIGHTS / "tiny1")
  if dtype == "BF16":  # its upper 16 bits, cut off: any bits will do, only their meaning is tested
    small = {n: (a.view(np.uint32) >> 16).astype(np.uint16) for n, a in tensors.items()}
    wide = {n: (a.astype(np.uint32) << 16).view(np.float32) for n, a in small.items()}
  else:
    small = {n: a.astype(np.float16) for n, a in tensors.items()}
    wide = {n: a.astype(np.float32) for n, a in small.items()}
  tolerance = BFLOAT16 if dtype == "BF16" else ROUNDING
  fast = golden.next_logits(vlm.load(folder(small)), pixels()[0], SHORT)
  monkeypatch.setattr(vlm.kernels, "PORTABLE", True)
  monkeypatch.setattr(vlm.kernels, "KEPT", 0)  # a kept program does not know of the factor
  (got,), got_logits = run(vlm.load(folder(small)), [pixels()[0]], [SHORT], max_tokens=8)
  monkeypatch.setattr(vlm, "truncate", {dtypes.float32: lambda value: factor})
  (right,), right_logits = run(vlm.load(folder(wide)), [pixels()[0]], [SHORT], max_tokens=8)
  assert got == right and differ(got_logits, right_logits) < ROUNDING
  assert differ(fast, right_logits[0, 0]) < tolerance

@pytest.mark.quick
def test_names_and_shapes_must_match(folder):
  tensors = read(WEIGHTS / "tiny1")
  norm, fc1 = "language_model.model.norm.weight", "vision_tower.encoder.layers.1.mlp.fc1.weight"
  assert norm in tensors and fc1 in tensors
  missing = {n: a for n, a in tensors.items() if n not in (norm, fc1)}
  many = {n: a for n, a in tensors.items() if "layers.2." not in n}
  misshaped = tensors | {fc1: tensors[fc1].T.copy()}
  extra = tensors | {"language_model.model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}
  renamed = {n.replace("language_model", "lang"): a for n, a in tensors.items()}
  patch = "vision_tower.embeddings.patch_embedding.weight"
  turned = tensors | {patch: tensors[patch].transpose(0, 2, 3, 1).copy()}  # (Dv, p, p, 3): the same number of values
  for changed, words in ((missing, ["fc1.weight is missing", "complete"]), (many, ["layers.2", "missing"]), (misshaped, ["fc1.weight", "64, 112", "112, 64"]),
                         (extra, ["q_proj.bias", "absent"]), (renamed, ["missing"]), (turned, ["patch_embedding"])):
    with pytest.raises(vlm.Fault) as fault:
      vlm.load(folder(changed))
    assert all(word in str(fault.value) for word in words) and fault.value.code == 2 and len(str(fault.value)) < 1000
  with pytest.raises(vlm.Fault, match="layers"):
    vlm.load(folder(config={"text_config": json.loads((WEIGHTS / "tiny1" / "config.json").read_text())["text_config"]
                            | {"num_hidden_layers": 2}}))
  constants = {"vision_tower.vision_model.embeddings.position_ids": np.arange(16)[None]}  # in some old files
  assert same_weights(weights(vlm.load(folder(tensors | constants))), weights(model("tiny1")))

@pytest.mark.quick
def test_missing_config_keys_have_their_documented_defaults(tmp_path):
  sizes = dict(hidden_size=8, intermediate_size=8)
  def config(text, vision={}, **top):
    (tmp_path / "config.json").write_text(json.dumps(dict(
      model_type="paligemma", vision_config=sizes | dict(num_attention_heads=2, num_hidden_layers=1) | vision,
      text_config=sizes | dict(num_hidden_layers=5) | text) | top))
    return vlm.read_config(tmp_path / "config.json")
  one, two = config({"model_type": "gemma"}), config({"model_type": "gemma2"})
  for c in (one, two):
    t, v = c.text, c.vision
    assert (t.head_dim, t.rms_norm_eps, t.rope_theta, t.max_position_embeddings) == (256, 1e-6, 10000, 8192)
    assert (v.image_size, v.patch_size, v.patches, v.layer_norm_eps) == (224, 14, 256, 1e-6)
    assert (c.eos, t.query_pre_attn_scalar, t.vocab_size, t.num_attention_heads) == ((1,), 256, 257216, 8)
  assert (one.text.num_key_value_heads, two.text.num_key_value_heads) == (1, 4)
  caps = lambda c: (c.text.attn_logit_softcapping, c.text.final_logit_softcapping)
  assert not one.text.gemma2 and caps(one) == (0, 0)
  assert two.text.gemma2 and caps(two) == (50, 30) and two.text.sliding_window == 4096
  assert caps(config({"model_type": "gemma2", "final_logit_softcapping": None})) == (50, 0)
  kinds = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
  assert config({"model_type": "gemma2", "layer_types": kinds}) == two
  assert config({"layer_types": ["full_attention"] * 5}) == one
  for text in ({"model_type": "gemma2", "layer_types": kinds[1:] + kinds[:1]}, {"layer_types": kinds}):
    with pytest.raises(vlm.Fault, match="layer_types"):  # another model than this file computes
      config(text)
  assert config({"model_type": "gemma2", "query_pre_attn_scalar": 144}).text.query_pre_attn_scalar == 144
  for text in ({"rope_parameters": {"rope_theta": 5e5}}, {"rope_theta": 5e5}):
    assert config(text).text.rope_theta == 5e5
  assert config({}, hidden_size=999).text.hidden_size == 8  # a stale top level
  assert config({"eos_token_id": [1, 107]}).eos == (1, 107) and config({}, eos_token_id=1).eos == (1,)
  assert config({}, {"image_size": 448, "num_positions": 256}).vision.patches == 1024  # that key is wrong in some files

SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27,
          "patch_size": 14, "model_type": "siglip_vision_model", "projector_hidden_act": "gelu_fast"}
GEMMA = {"hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8, "num_hidden_layers": 18,
         "num_key_value_heads": 1, "model_type": "gemma", "torch_dtype": "float32", "vocab_size": 257216}
GEMMA2 = {"architectures": ["Gemma2ForCausalLM"], "eos_token_id": [1, 107], "bos_token_id": 2, "model_type": "gemma2",
          "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": False,
          "torch_dtype": "bfloat16", "vocab_size": 257216}
G3 = GEMMA2 | {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_key_value_heads": 4}
G10 = GEMMA2 | {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16,
                "num_key_value_heads": 8, "query_pre_attn_scalar": 256}
G28 = GEMMA2 | {"hidden_size": 4608, "intermediate_size": 36864, "num_hidden_layers": 46, "num_attention_heads": 32,
                "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 144}
PUBLISHED = {  # text, vision, then: patches, layers, heads, kv heads, head size, 1 / query scale, weights
  "paligemma-3b-224": (GEMMA, {}, 256, 18, 8, 1, 256, 16, 2923466480),
  "paligemma-3b-448": (GEMMA, {"image_size": 448, "num_image_tokens": 1024}, 1024, 18, 8, 1, 256, 16, 2924351216),
  "paligemma-3b-896": (GEMMA, {"image_size": 896, "num_image_tokens": 4096}, 4096, 18, 8, 1, 256, 16, 2927890160),
  "paligemma2-3b-224": (G3, {"num_positions": 256}, 256, 26, 8, 4, 256, 16, 3032242416),
  "paligemma2-3b-896": (G3, {"num_positions": 256, "image_size": 896}, 4096, 26, 8, 4, 256, 16, 3036666096),
  "paligemma2-10b-448": (G10, {"num_positions": 256, "image_size": 448}, 1024, 42, 16, 8, 256, 16, 9663523568),
  "paligemma2-28b-224": (G28, {"num_positions": 256}, 256, 46, 32, 16, 128, 12, 27650487024),
}

@pytest.mark.quick
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name, tmp_path):
  text, vision, patches, layers, heads, kv_heads, head_dim, scale, total = PUBLISHED[name]
  (tmp_path / "config.json").write_text(json.dumps({
    "architectures": ["PaliGemmaForConditionalGeneration"], "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    "ignore_index": -100, "image_token_index": 257152, "model_type": "paligemma", "projection_dim": text["hidden_size"],
    "hidden_size": 2048, "text_config": text, "vision_config": SIGLIP | vision, "vocab_size": 257216}))
  c = vlm.read_config(tmp_path / "config.json")
  t, v = c.text, c.vision
  assert (v.patches, t.num_hidden_layers, t.num_attention_heads) == (patches, layers, heads)
  assert (t.num_key_value_heads, t.head_dim, t.vocab_size) == (kv_heads, head_dim, 257216)
  assert t.query_pre_attn_scalar == scale ** 2 and t.gemma2 == ("2-" in name) and 1 in c.eos
  assert (v.hidden_size, v.num_hidden_layers, v.num_attention_heads, v.intermediate_size) == (1152, 27, 16, 4304)
  assert (t.attn_logit_softcapping, t.final_logit_softcapping) == ((50, 30) if t.gemma2 else (0, 0))
  shapes = {n: t.shape for n, t in get_state_dict(vlm.PaliGemma(c)).items()}
  assert sum(map(math.prod, shapes.values())) == total
  assert shapes["language_model.layers.0.self_attn.q_proj.weight"] == (heads * head_dim, text["hidden_size"])
  assert shapes["language_model.layers.0.self_attn.v_proj.weight"] == (kv_heads * head_dim, text["hidden_size"])
  assert shapes["vision_tower.embeddings.position_embedding.weight"] == (patches, 1152)

# ---- bad input: one line on stderr, exit code 1 or 2, no traceback ----
@pytest.fixture
def refused(capsys):
  """refused(word, arguments..., code=2): vlm.py says one line with that word in it, on stderr, and nothing else"""
  def check(word, *argv, code=2):
    assert vlm.main([str(a) for a in argv] + ["--quiet"]) == code
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"vlm: .{,1500}\n", err) and word in err, err
  return check

def png(width, height):
  """A PNG of a few bytes that claims any size"""
  chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
  head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")

@pytest.mark.quick
def test_bad_images(refused, tmp_path, pictures, recwarn):
  (tmp_path / "text.jpg").write_text("not a picture")
  (tmp_path / "empty.png").touch()
  photo = pictures["photo"].read_bytes()
  for part in (20, len(photo) // 2, len(photo) - 200):
    (tmp_path / "cut.jpg").write_bytes(photo[:part])
    refused("cut.jpg", tmp_path / "cut.jpg", "caption en", "--weights", WEIGHTS / "tiny1")
  (tmp_path / "cut.png").write_bytes(pictures["rgb"].read_bytes()[:-3000])
  for name in ("none.jpg", "text.jpg", "empty.png", "cut.png", ""):
    refused(name, tmp_path / name, "caption en", "--weights", WEIGHTS / "tiny1")
  for width, height in ((10001, 10000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)):  # 60 bytes, gigabytes unpacked
    (tmp_path / "bomb.png").write_bytes(png(width, height))
    refused("bomb.png", tmp_path / "bomb.png", "caption en", "--weights", WEIGHTS / "tiny1")
  (tmp_path / "bomb.png").write_bytes(png(10001, 10000))
  with mock.patch.object(Image.Image, "load", side_effect=AssertionError("decoded")):
    with pytest.raises(vlm.Fault, match="100000000 pixels"):
      vlm.open_image(tmp_path / "bomb.png")
  (tmp_path / "large.png").write_bytes(png(9700, 10000))  # but not too large: only what it lacks is wrong with it
  refused("truncated", tmp_path / "large.png", "caption en", "--weights", WEIGHTS / "tiny1")
  assert not [w for w in recwarn if "Bomb" in w.category.__name__]  # Pillow's warning: two more lines on stderr

@pytest.mark.quick
def test_garbage_beside_good_pixels(tmp_path):
  image = Image.new("RGB", (30, 20), "red")
  for key in ("transparency", "xmp", "exif", "XML:com.adobe.xmp"):
    for mode in ("RGB", "P", "L", "RGBA"):
      info = PngImagePlugin.PngInfo()
      info.add_text(key, "hello")
      image.convert(mode).save(tmp_path / "a.png", pnginfo=info)
      assert vlm.open_image(tmp_path / "a.png").size == (30, 20)
  for format in ("JPEG", "PNG", "WEBP"):
    for exif in (b"\0", b"Exif\0\0garbage", b"\xff" * 40):
      image.save(tmp_path / "a", format, exif=exif)
      assert vlm.open_image(tmp_path / "a").size == (30, 20)

@pytest.mark.quick
def test_an_icon_holds_no_bomb(tmp_path):
  inner = png(30000, 30000)
  (tmp_path / "a.ico").write_bytes(struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 9, 9, 0, 0, 1, 32, len(inner), 22)
                                   + inner)
  with pytest.raises(vlm.Fault, match="100000000 pixels"):
    vlm.open_image(tmp_path / "a.ico")
  inner = png(20000, 20000)
  (tmp_path / "a.icns").write_bytes(b"icns" + struct.pack(">I", len(inner) + 16) + b"ic07"
                                    + struct.pack(">I", len(inner) + 8) + inner)
  with pytest.raises(vlm.Fault, match="100000000 pixels"):
    vlm.open_image(tmp_path / "a.icns")

@pytest.mark.quick
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pipes with names")
def test_pipes_are_not_waited_for(refused, tmp_path, pictures, folder):
  os.mkfifo(tmp_path / "pipe")
  refused("a pipe or a device", tmp_path / "pipe", "caption en", "--weights", WEIGHTS / "tiny1")
  refused("a pipe or a device", "/dev/zero", "caption en", "--weights", WEIGHTS / "tiny1")
  for file in ("config.json", "tokenizer.model", "model.safetensors", "generation_config.json"):
    target = folder()
    (target / file).unlink(missing_ok=True)
    os.mkfifo(target / file)
    refused("a pipe or a device", pictures["rgb"], "caption en", "--weights", target)
  for name, line in (("data.jsonl", None), ("captions.csv", None), ("pipe", '{"image": "pipe", "prefix": "a", "suffix": "b"}')):
    data = tmp_path / name.replace(".", "")
    data = data.with_name(data.name + "folder")
    data.mkdir()
    os.mkfifo(data / name)
    if line:
      (data / "data.jsonl").write_text(line)
    refused("pipe or a device" if line is None else "no such image", data, "--train", "--save", tmp_path / "new")

@pytest.mark.quick
def test_the_tokenizer_of_another_model(refused, pictures, folder, own_pieces):
  target = folder()
  shutil.copy(WEIGHTS / "toy" / "tokenizer.model", target)
  refused("<image> is 1576 in it, by config.json 1535", pictures["rgb"], "caption en", "--weights", target)
  refused("another model", pictures["rgb"], "caption en", "--weights", folder(config={"image_token_index": "1535"}))

@pytest.mark.quick
def test_text_that_is_not_utf8(refused, pictures, tmp_path):
  refused("not UTF-8", pictures["rgb"], "caption \udcff en", "--weights", WEIGHTS / "tiny1")
  refused("not UTF-8", pictures["rgb"], "caption \ud800 en", "--json", "--weights", WEIGHTS / "tiny1")
  (tmp_path / "data.jsonl").write_text('{"image": "a.png", "prefix": "a", "suffix": "\\ud800"}\n' * 12)
  shutil.copy(pictures["rgb"], tmp_path / "a.png")
  refused("data.jsonl, line 1: the text is not UTF-8", tmp_path, "--train", "--save", tmp_path / "new")

@pytest.mark.quick
def test_bad_folders(refused, pictures, folder, tmp_path):
  ask = lambda word, target: refused(word, pictures["rgb"], "caption en", "--weights", target)
  ask("nothing: no such folder", tmp_path / "nothing")
  ask("config.json", pictures["rgb"])
  for file in ("config.json", "tokenizer.model", "model.safetensors"):
    target = folder()
    (target / file).unlink()
    ask(file, target)
    (target / file).mkdir()
    ask(file, target)
    (target / file).rmdir()
    (target / file).touch()
    ask(file, target)
    (target / file).write_bytes(b"\xff\xfe\x00 nonsense")
    ask(file, target)
  ask("model_type", folder(config={"model_type": "llava"}))
  for config in ({"model_type": None}, {"text_config": {}}, {"text_config": None}, {"vision_config": 3},
                 {"vision_config": {"patch_size": 0}}, {"text_config": {"model_type": "llama"}}):
    ask("config.json", folder(config=config))
  for text in ("[]", "3", "null", '"paligemma"', "{"):
    target = folder()
    (target / "config.json").write_text(text)
    ask("config.json", target)

def test_bad_sizes_in_the_config(refused, pictures, folder):
  whole = json.loads((WEIGHTS / "tiny1" / "config.json").read_text())
  text = [{"num_attention_heads": 3}, {"num_attention_heads": 0}, {"num_key_value_heads": 0}, {"head_dim": 15},
          {"num_key_value_heads": 3}, {"hidden_size": "48"}, {"hidden_size": -48}, {"num_hidden_layers": 2.5},
          {"vocab_size": 10**12}, {"num_hidden_layers": 10**9}, {"layer_types": ["full_attention"]}, {"layer_types": 3},
          {"rope_scaling": {"factor": 2}}, {"hidden_activation": "relu"}, {"rope_parameters": {"rope_type": "yarn"}}]
  # numbers reach the C compiler: none may be text, or no number
  text += [{"rms_norm_eps": wrong} for wrong in ("1e-6", "({ 1; })", math.nan, math.inf, True, 0, -1e-6, [], 10**400)]
  vision = [{"num_attention_heads": 7}, {"num_attention_heads": 0}, {"image_size": 70}, {"image_size": "56"},
            {"patch_size": 15}, {"layer_norm_eps": "1e-6"}, {"hidden_act": "quick_gelu"}, {"hidden_act": "gelu"}]
  for part, changes in (("text_config", text), ("vision_config", vision)):
    for change in changes:
      refused("config.json", pictures["rgb"], "caption en", "--weights", folder(config={part: whole[part] | change}))

@pytest.mark.quick
def test_windows_that_are_not_gemma2s(refused, pictures, folder):
  """every other layer sees 4096 tokens: files that say other things mean another model, or nobody knows which"""
  text = json.loads((WEIGHTS / "tiny2" / "config.json").read_text())["text_config"]
  layers = ["sliding_attention", "full_attention"] * text["num_hidden_layers"]
  count = text["num_hidden_layers"]
  for key, value in (("sliding_window", None), ("layer_types", ["full_attention"] * count), ("layer_types", layers[1:count + 1]),
                     ("layer_types", layers[:count - 1]), ("layer_types", layers[:count + 1]), ("head_dim", None)):
    target = folder(config={"text_config": text | {key: value}})
    refused(f"config.json: {key} {str(value)[:99]} is not understood", pictures["rgb"], "caption en", "--weights", target)

def test_lying_headers(refused, pictures, folder):
  whole = packed(read(WEIGHTS / "tiny1"))
  names, size = sorted(read(WEIGHTS / "tiny1")), len(whole)
  def first(**change):
    return lambda header: header[names[0]].update(change)
  def overlap(header):
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
  target = folder()
  def ask(data):
    (target / "model.safetensors").write_bytes(data)
    refused("model.safetensors", pictures["rgb"], "caption en", "--weights", target)
  beyond = {"dtype": "F32", "shape": [2], "data_offsets": [size * 9, size * 9 + 8]}
  for lie in (first(data_offsets=[size, size + 100]), first(data_offsets=[-8, 8]), first(data_offsets=[10, 2]),
              first(data_offsets=[0]), first(data_offsets=[0, 10**30]), first(shape=[7]), first(shape=[-1]),
              first(shape=[2**40, 2**40]), first(shape=None), first(shape=[1.5]), first(dtype="F64"), first(dtype="I8"),
              first(dtype="X1"), first(dtype=None), overlap, lambda header: header.clear(),
              lambda header: header.update(more=beyond), lambda header: header.update(more=3),
              lambda header: header.pop(names[0])):
    ask(packed(read(WEIGHTS / "tiny1"), lie))
  for cut in (0, 4, 8, 100, size // 2, size - 1):
    ask(whole[:cut])
  ask(whole + b"more")
  for length in (0, 1, size, 2**31, 2**60, 2**63, 2**64 - 1):
    ask(struct.pack("<Q", length) + whole[8:])
  ask(struct.pack("<Q", 50) + b"[" * 50)
  ask(struct.pack("<Q", 10**5) + b"[" * 10**5)  # deeper than a parser's stack

def test_number_types_that_are_not_weights(refused, pictures, folder):
  tensors = read(WEIGHTS / "tiny1")
  name = sorted(tensors)[0]
  refused("I64", pictures["rgb"], "caption en", "--weights", folder(tensors | {name: tensors[name].astype(np.int64)}))

def test_weights_that_do_not_fit(refused, pictures, folder):
  tensors = read(WEIGHTS / "tiny1")
  name = "vision_tower.post_layernorm.bias"
  for word, changed in (("post_layernorm.bias", {n: a for n, a in tensors.items() if n != name}),
                        ("fluff", tensors | {"fluff": tensors[name]}), ("(63,)", tensors | {name: tensors[name][:63]}),
                        ("by config.json", {name: tensors[name]})):
    refused(word, pictures["rgb"], "caption en", "--weights", folder(changed))

@pytest.mark.parametrize("where", ["vision", "language"])
def test_nan_weights(where, refused, pictures, folder):
  tensors = read(WEIGHTS / "tiny1")
  name = {"vision": "vision_tower.post_layernorm.bias", "language": "language_model.model.norm.weight"}[where]
  bad = tensors[name].copy()
  bad[5] = np.nan
  target = folder(tensors | {name: bad})
  refused("NaN", pictures["rgb"], "caption en", "--weights", target, code=1)
  refused("NaN", pictures["rgb"], "caption en", "--weights", target, "--temperature", 1, code=1)

@pytest.fixture
def tiny(monkeypatch):
  """vlm.main answers with the tiny model that is already there, whatever folder is named; -> that model"""
  m = model("tiny1")
  monkeypatch.setattr(vlm, "load", lambda *args, **options: m)
  return m

@pytest.mark.quick
def test_bad_options(refused, pictures, tmp_path, tiny):
  for name, values in (("--max-tokens", [0, -3, "x", 1.5]), ("--temperature", [-0.1, "nan", "inf", "hot"]),
                       ("--top-p", [0, 1.01, -1, "nan"]), ("--top-k", [-1, "x"]), ("--seed", ["x", -1])):
    for value in values:
      refused(name, pictures["rgb"], "caption en", name, value)
  refused("--nonsense", pictures["rgb"], "caption en", "--nonsense")
  refused("--weights", pictures["rgb"], "caption en", "--weights")
  refused("fit", pictures["rgb"], "word " * 9000)
  refused("fit", pictures["rgb"], "caption en", "--max-tokens", 9000)
  for out in (tmp_path, tmp_path / "no" / "folder.png", tmp_path / "no-format", tmp_path / "text.txt"):
    refused(str(out), pictures["rgb"], "caption en", "--out", out)

def test_words_without_quotes(pictures, refused):
  refused("quotes", pictures["rgb"], "caption", "en")

def test_device_that_is_not_there(pictures):
  for arguments, more in ((["--device", "NOPE"], {}), ([], {"DEV": "NOPE"}), (["--device", "CPU:NOPE"], {})):
    done = cli(pictures["rgb"], "caption en", "--weights", WEIGHTS / "tiny1", *arguments, "--quiet", env=more)
    assert done.returncode == 2 and done.stdout == "" and re.fullmatch(r"vlm: .*device.*\n", done.stderr), done.stderr

# ---- command line ----
def cli(*argv, env={}, **options):
  command = [sys.executable, ROOT / "vlm.py", *map(str, argv)]
  return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, **options)

def test_answer_on_stdout_all_else_on_stderr(pictures, tmp_path):
  done = cli(pictures["rgb"], "caption en", "--weights", WEIGHTS / "tiny2", "--max-tokens", 8, cwd=tmp_path)
  assert done.returncode == 0
  assert done.stdout == model("tiny2").generate([pictures["rgb"]], ["caption en"], max_tokens=8)[0].text + "\n"
  loading, answers, *_, last = done.stderr.splitlines()
  assert loading.startswith(f"loading {WEIGHTS / 'tiny2'} ... ") and answers == f"{WEIGHTS / 'tiny2'} answers"
  number = r"\d+\.\d+"
  assert re.fullmatch(f"load {number} s, vision {number} s, prefill {number} s, {number} tok/s", last)
  assert "\r" not in done.stderr and "\033" not in done.stderr  # progress is for terminals
  bad = cli(tmp_path / "none.png", "caption en")
  assert bad.returncode == 2 and bad.stdout == "" and re.fullmatch(r"vlm: .*none\.png.*\n", bad.stderr)

def test_without_a_c_compiler(tmp_path, pictures):
  """neither clang nor ziglang: slower, but the same answer, and a word about it; of tinygrad 0.14 that word alone"""
  code = "import sys; sys.modules['ziglang'] = None; import vlm; sys.exit(vlm.main(sys.argv[1:]))"
  bare = {name: value for name, value in os.environ.items() if name not in ("CC", "DEV")} | {"PATH": str(tmp_path)}
  argv = [pictures["rgb"], "caption en", "--weights", WEIGHTS / "tiny2", "--max-tokens", "3"]
  done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, env=bare, cwd=ROOT)
  assert done.returncode == vlm.kernels.NEW and "ziglang" in done.stderr and "clang" in done.stderr, done.stderr
  assert vlm.kernels.NEW or done.stdout == model("tiny2").generate([pictures["rgb"]], ["caption en"], max_tokens=3)[0].text + "\n"

def test_progress_on_a_terminal(pictures, monkeypatch, capsys, folder):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr(sys, "stderr", terminal)
  assert vlm.main([str(pictures["rgb"]), "caption en", "--max-tokens", "3", "--weights", str(folder())]) == 0
  assert all(stage in terminal.getvalue() for stage in ("loading ", "looking", "reading"))
  assert "\033" not in capsys.readouterr().out

@pytest.mark.quick
def test_help(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  with pytest.raises(SystemExit) as end:
    vlm.main(["--help"])
  out = capsys.readouterr().out
  assert end.value.code == 0 and all(f"--{name}" in out for name in (
    "weights", "max-tokens", "temperature", "top-k", "top-p", "seed", "out", "json", "device", "quiet"))
  assert len(out.splitlines()) <= 24  # a screen

@pytest.mark.quick
def test_json(pictures, tiny, capsys):
  prompt = "detect cat <loc0001>"
  assert vlm.main([str(pictures["photo"]), prompt, "--json", "--max-tokens", "9"]) == 0
  out, err = capsys.readouterr()
  said, (answer,) = json.loads(out), tiny.generate([pictures["photo"]], [prompt], max_tokens=9)
  assert out.count("\n") == 1 and list(said) == ["text", "tokens", "boxes", "timings"]
  assert said["text"] == answer.text and said["tokens"] == answer.tokens and said["boxes"] == []
  assert sorted(said["timings"]) == ["decode_tok_s", "load_s", "prefill_s", "vision_s"]
  assert all(value >= 0 for value in said["timings"].values())

def test_sampling_options(pictures, tiny, capsys):
  def ask(*options):
    assert vlm.main([str(pictures["rgb"]), "caption en", "--max-tokens", "12", "--quiet", *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out
  hot = ["--temperature", "1.0"]
  assert ask() == ask(*hot, "--top-k", "1") == ask("--temperature", "0") == ask(*hot, "--top-p", "1e-9")
  assert ask(*hot, "--seed", "7") == ask(*hot, "--seed", "7") not in (ask(*hot, "--seed", "8"), ask())

def speak(monkeypatch, m, text, last=None):
  """The model answers `text`, whatever it is asked; then `last` is raised"""
  def tokens(images, prompts, *args, **options):
    m.timings |= {"vision_s": 0.0, "prefill_s": 0.0, "decode_tok_s": 1.0}
    for id in m.tokenizer.encode(text):
      yield [id]
    if last:
      raise last
  monkeypatch.setattr(m, "tokens", tokens)

@pytest.mark.quick
def test_boxes_are_drawn(pictures, tiny, capsys, tmp_path, monkeypatch):
  text = f"{loc(0, 0, 512, 512)} red circle ; {loc(256, 512, 1023, 1023)} dog ; {loc(1, 2, 3)}"
  speak(monkeypatch, tiny, text)
  before = pictures["photo"].read_bytes()
  assert vlm.main([str(pictures["photo"]), "detect red circle ; dog"]) == 0
  out, err = capsys.readouterr()
  assert out == text + "\n" and "photo.boxes.png" in err and os.listdir() == ["photo.boxes.png"]
  drawn = Image.open("photo.boxes.png").convert("RGB")
  assert drawn.size == (360, 270)  # three times the picture, which is too small for labels
  large = vlm.open_image(pictures["photo"]).resize(drawn.size, Image.Resampling.NEAREST)
  changed = np.asarray(drawn).astype(int) != np.asarray(large)
  assert changed.any() and not changed[150:264, 5:165].any()  # below the first box, left of the second
  assert changed[:138, 0].any() and changed[267:, 186:354].any()
  assert vlm.main([str(pictures["photo"]), "detect dog", "--json", "--out", "mine.jpg", "--quiet"]) == 0
  out, err = capsys.readouterr()
  boxes = json.loads(out)["boxes"]
  assert [b["label"] for b in boxes] == ["red circle", "dog"] and err == "" and Image.open("mine.jpg").size == (360, 270)
  assert boxes[0]["box"] == pytest.approx([0, 0, 60, 45], abs=.2)
  assert boxes[1]["box"] == pytest.approx([60, 22.5, 120, 90], abs=.2)
  assert pictures["photo"].read_bytes() == before

def test_boxes_on_a_turned_picture(pictures, tiny, capsys, tmp_path, monkeypatch):
  speak(monkeypatch, tiny, loc(0, 0, 1023, 1023) + " all")
  assert vlm.main([str(pictures["turned"]), "detect all", "--json"]) == 0
  assert json.loads(capsys.readouterr().out)["boxes"] == [{"label": "all", "box": [0, 0, 40, 60]}]
  assert Image.open("turned.boxes.png").size == (200, 300)

def test_inputs_are_never_written_over(pictures, tiny, capsys, tmp_path, monkeypatch):
  speak(monkeypatch, tiny, loc(0, 0, 1023, 1023) + " all")
  shutil.copy(pictures["rgb"], "a.png")
  before = Path("a.png").read_bytes()
  os.symlink("a.png", "soft.png")
  os.link("a.png", "hard.png")
  Path("a.boxes.png").symlink_to("a.png")  # what a.png's boxes would be called
  for out in ("a.png", "./a.png", "soft.png", "hard.png", str(tmp_path / "a.png")):
    assert vlm.main(["a.png", "detect all", "--out", out]) == 2
    assert "vlm: " in capsys.readouterr().err and Path("a.png").read_bytes() == before
  assert vlm.main(["a.png", "detect all"]) == 0
  assert Path("a.png").read_bytes() == before and Path("a.boxes-2.png").exists()

def test_output_that_cannot_be_written(pictures, tiny, capsys, tmp_path, monkeypatch):
  speak(monkeypatch, tiny, loc(0, 0, 1023, 1023) + " all")
  with mock.patch("os.replace", side_effect=OSError(28, "No space left on device")):
    assert vlm.main([str(pictures["rgb"]), "detect all", "--out", "full.png", "--quiet"]) == 1
  out, err = capsys.readouterr()
  assert out.endswith(" all\n") and err == "vlm: full.png: No space left on device\n"
  assert not list(tmp_path.iterdir())
  if os.geteuid():  # root may write anywhere
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert vlm.main([str(pictures["rgb"]), "detect all", "--out", "closed.png", "--quiet"]) == 2
    tmp_path.chmod(stat.S_IRWXU)

def converse(monkeypatch, lines, *argv):
  monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
  return vlm.main([str(a) for a in argv])

def test_question_after_question(pictures, tiny, capsys, monkeypatch):
  asked = ["caption en", "detect cat", f":image {pictures['tall']}", "caption en", ":image none.png", "word " * 9000,
           "caption en", "", "never asked"]
  assert converse(monkeypatch, "\n".join(asked), pictures["rgb"], "--max-tokens", 6) == 0
  out, err = capsys.readouterr()
  questions = ("rgb", "caption en"), ("rgb", "detect cat"), ("tall", "caption en"), ("tall", "caption en")
  answers = [tiny.generate([pictures[name]], [prompt], max_tokens=6)[0].text for name, prompt in questions]
  assert out == "".join(answer + "\n" for answer in answers) and answers[0] != answers[2]
  assert err.count("> ") == 8 and "vlm: none.png" in err and "fit" in err and ":image" in err  # a mistake ends nothing
  assert converse(monkeypatch, "caption en\n", pictures["rgb"], "--max-tokens", 6, "--quiet") == 0  # Ctrl-D
  assert capsys.readouterr().out == answers[0] + "\n"

def test_interrupted_answers(pictures, tiny, capsys, monkeypatch):
  speak(monkeypatch, tiny, "a cat", KeyboardInterrupt())
  assert vlm.main([str(pictures["rgb"]), "caption en"]) == 130
  assert capsys.readouterr().out == "a cat\n"  # what is there stays there
  assert converse(monkeypatch, "caption en\nagain\n\n", pictures["rgb"]) == 0  # back to the prompt
  out, err = capsys.readouterr()
  assert out == "a cat\na cat\n" and err.count("> ") == 3

def test_interrupted_before_the_first_token(pictures, capsys, monkeypatch):
  m = fresh(model("tiny1"))
  m.folder = WEIGHTS / "tiny1"
  monkeypatch.setattr(vlm, "load", lambda *args: m)
  monkeypatch.setattr(m, "prefill", mock.Mock(side_effect=KeyboardInterrupt))
  assert vlm.main([str(pictures["rgb"]), "caption en"]) == 130
  out, err = capsys.readouterr()
  assert out == "\n" and "Traceback" not in err

@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c(pictures, tmp_path):
  command = [sys.executable, ROOT / "vlm.py", pictures["rgb"], "caption en", "--weights", WEIGHTS / "tiny2",
             "--max-tokens", "8000"]
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
    first = process.stdout.read(1)  # comes while the rest is still being decoded
    assert first and process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
  assert process.returncode == 130 and (first + out).endswith(b"\n") and b"Traceback" not in err

def test_no_arguments(capsys, monkeypatch):
  asked, m = [], model("tiny2")
  def load(folder, *options):
    asked.append(Path(folder))
    return m
  monkeypatch.setattr(vlm, "load", load)
  assert vlm.main(["--max-tokens", "5"]) == 0
  out, err = capsys.readouterr()
  answer, = m.generate([ROOT / "examples" / "shapes.png"], ["caption en"], max_tokens=5)
  assert out == answer.text + "\n" and "answers\n" in err
  assert asked == [vlm.terminal.default_weights(ROOT)] and (asked[0] / "config.json").exists()

@pytest.mark.quick
def test_default_weights(tmp_path, monkeypatch, capsys, pictures):
  monkeypatch.setattr(vlm, "ROOT", tmp_path)
  assert vlm.main([str(pictures["rgb"]), "caption en"]) == 2
  assert re.fullmatch(r"vlm: .*weights.*\n", capsys.readouterr().err)
  def folder(name, *sizes):
    (tmp_path / "weights" / name).mkdir(parents=True)
    for i, size in enumerate(sizes):
      (tmp_path / "weights" / name / f"{i}.safetensors").write_bytes(b"x" * size)
    (tmp_path / "weights" / name / "config.json").write_text("{}")
    return tmp_path / "weights" / name
  toy, _ = folder("toy", 10, 10), folder("tiny1", 15)
  folder("without-config", 100)
  (tmp_path / "weights" / "without-config" / "config.json").unlink()
  assert vlm.terminal.find_weights(None, tmp_path) == toy
  trained = folder("trained", 2)  # smaller than what ships, but the user's own
  assert vlm.terminal.find_weights(None, tmp_path) == trained
  folder("empty")
  assert vlm.terminal.find_weights(None, tmp_path) == trained and folder("large", 3, 3) == vlm.terminal.find_weights(None, tmp_path)

def test_weights_by_name(tmp_path, monkeypatch, capsys, pictures, refused):
  """--weights google/x: a folder, weights/x, or Hugging Face's cache, made here in the hub's own layout"""
  name, hub = "google/paligemma-tiny", tmp_path / "hub"
  ask = lambda: vlm.main([str(pictures["rgb"]), "caption en", "--weights", name, "--max-tokens", "4"])
  monkeypatch.setenv("HF_HUB_CACHE", str(hub))
  refused("hf download google/paligemma-tiny --local-dir weights/paligemma-tiny", pictures["rgb"], "caption en",
          "--weights", name)
  refused("huggingface.co/google/paligemma-tiny", pictures["rgb"], "caption en", "--weights", name)
  repository = hub / "models--google--paligemma-tiny"
  snapshot = repository / "snapshots" / "0123abcd"
  snapshot.mkdir(parents=True)
  (repository / "blobs").mkdir()
  (repository / "refs").mkdir()
  (repository / "refs" / "main").write_text("0123abcd")
  for i, file in enumerate((WEIGHTS / "tiny1").iterdir()):  # the hub's cache holds links to blobs
    shutil.copy(file, repository / "blobs" / str(i))
    (snapshot / file.name).symlink_to(f"../../blobs/{i}")
  answer = model("tiny1").generate([pictures["rgb"]], ["caption en"], max_tokens=4)[0].text + "\n"
  def said():
    assert ask() == 0
    out, err = capsys.readouterr()
    assert out == answer
    return re.search(r"^(.*) answers$", err, flags=re.M)[1]
  assert said() == str(snapshot)
  for variable, value in (("HF_HOME", tmp_path), ("XDG_CACHE_HOME", tmp_path / "xdg")):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv(variable, str(value))
    if variable == "XDG_CACHE_HOME":
      (tmp_path / "xdg").mkdir()
      (tmp_path / "xdg" / "huggingface").symlink_to(tmp_path)
    assert vlm.terminal.find_weights(name, ROOT).resolve() == snapshot
  shutil.copytree(WEIGHTS / "tiny1", "google/paligemma-tiny")
  assert said() == name  # an existing folder wins

OLD = {"--batch": "batch", "--quantize": "quantize", "--show": "show", "--shard": "shard", "--init": "train"}

@pytest.mark.quick
@pytest.mark.parametrize("flag", OLD)
def test_old_spellings_name_their_program(flag, refused, pictures):
  refused("unrecognized", pictures["rgb"], "caption en", "--json", "")
  for words in ((flag, "x"), (f"{flag}=x",)):
    refused(f"python examples/{OLD[flag]}.py", pictures["rgb"], "caption en", *words)
  assert (ROOT / "examples" / f"{OLD[flag]}.py").exists()

def test_an_npz_names_its_program(refused, pictures):
  refused("python examples/big_vision.py pt_224.npz DIR", pictures["rgb"], "caption en", "--weights", "pt_224.npz")

def test_options_that_would_do_nothing(refused, pictures):
  for option in (("--seed", 1), ("--top-k", 5), ("--top-p", .5)):
    refused("--temperature", pictures["rgb"], "caption en", *option)

# ---- size ----
def python_tokens(path):
  skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
             tokenize.ENDMARKER)
  count = inside = 0
  with open(path, "rb") as file:
    for token in tokenize.tokenize(file.readline):
      name = tokenize.tok_name[token.type]
      inside += name == "FSTRING_START"  # since Python 3.12 an f-string is many tokens: here it is the one it was
      count += token.type not in skipped and (not inside or name == "FSTRING_END" and inside == 1)
      inside -= name == "FSTRING_END"
  return count

@pytest.mark.quick
def test_one_sitting():
  text = (ROOT / "vlm.py").read_text()
  lines, count = text.splitlines(), python_tokens(ROOT / "vlm.py")
  assert len(lines) <= 850 and max(map(len, lines)) <= 110 and count <= 8500
  ends = {node.name: node.end_lineno for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
  assert ends["Gemma"] <= 320
  assert ";" not in re.sub(r"\"[^\"]*\"|#.*", "", text) and "lambda" not in text  # no golf
  for said in (f"{len(lines)} lines", f"{count:,} tokens"):
    assert said in README, f"README.md must say {said}"

# ---- the house ----
BESIDE = ["fast", "terminal", "lora", "draw", "samples"]

def imports(path):
  """Names of the modules that a file imports, wherever in it"""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
  return names

@pytest.mark.quick
def test_imports_have_no_circle():
  files = {path.stem: path for path in [ROOT / "vlm.py", ROOT / "tokenizer.py", *ROOT.glob("examples/*.py")]
           if not path.stem.startswith("test_")}
  graph = {name: imports(path) & files.keys() for name, path in files.items()}
  assert graph["tokenizer"] == set() and graph["vlm"] == {"tokenizer"}
  for name in BESIDE:
    assert graph[name] <= {"tokenizer", *BESIDE}  # nothing of vlm
  text = (ROOT / "vlm.py").read_text()
  assert re.findall(r'beside\("(\w+)"\)', text) == ["fast", "terminal", "lora"] and "sys.path" not in text
  beside = text[text.index("def beside("):text.index("kernels, terminal =")]
  assert text.count("sys.modules") == beside.count("sys.modules") == 1
  left = dict(graph)
  while left:  # take away what imports nothing that is left
    free = [name for name, needs in left.items() if not needs & left.keys()]
    assert free, f"a circle among {sorted(left)}"
    for name in free:
      del left[name]

@pytest.mark.quick
def test_what_import_vlm_loads():
  code = ("import sys; before = set(sys.modules); import vlm; "
          "print(*[f'{n} {getattr(m, \"__file__\", None)}' for n, m in sys.modules.items() if n not in before], sep='\\n')")
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
  ours = {line.split()[0] for line in done.stdout.splitlines() if str(ROOT) in line and "site-packages" not in line}
  assert ours == {"vlm", "tokenizer", "vlm_examples.fast", "vlm_examples.terminal"}

@pytest.fixture(scope="session")
def alone(tmp_path_factory):
  """A folder with vlm.py and tokenizer.py and nothing else"""
  folder = tmp_path_factory.mktemp("alone")
  for name in ("vlm.py", "tokenizer.py"):
    shutil.copy(ROOT / name, folder)
  return folder

@pytest.mark.long
def test_two_files_alone(alone, tmp_path, pictures):
  """the golden answers, logits and the toy's caption without examples/: only speed differs"""
  code = f"""
import sys
sys.path.insert(0, {str(alone)!r})
import numpy as np
import vlm
assert vlm.__file__.startswith({str(alone)!r}) and vlm.kernels is None and vlm.terminal is None
for kind in {KINDS!r}:
  m, g = vlm.load({str(WEIGHTS)!r} + "/" + kind), np.load({str(WEIGHTS)!r} + f"/{{kind}}/golden.npz")
  pixels = np.random.default_rng(int(g["seed"])).uniform(-1, 1, (2, 3, 56, 56)).astype(np.float32)
  prompts = g["prompts"].tolist()
  seen, prefill = [], m.prefill
  m.prefill = lambda *inputs: (seen.append(prefill(*inputs)), seen[-1])[1]
  answers = m.generate([p for p in pixels for _ in prompts], prompts * 2, max_tokens={golden.TOKENS})
  [(_, logits)] = seen
  logits, right = np.float64(logits.numpy()), g["logits"].reshape(6, -1)
  assert (np.abs(logits - right).max(1) < 1e-4 * right.std(1)).all(), kind
  assert [answer.tokens for answer in answers] == g["tokens"].reshape(6, -1).tolist(), kind
"""
  cpu = {"DEV": "CPU"} | os.environ  # without examples/ tinygrad would take any OpenCL for the best device
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=cpu)
  assert done.returncode == 0, done.stderr
  def ask(*argv):
    command = [sys.executable, alone / "vlm.py", ROOT / "examples" / "shapes.png", *argv, "--weights", WEIGHTS / "toy"]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=cpu)
  caption, boxes, loop = ask("caption en"), ask("detect red circle", "--json"), ask()
  assert caption.stdout == CAPTION + "\n"
  assert caption.returncode == 0 and "examples/" in caption.stderr and "slowly" in caption.stderr
  assert [box["label"] for box in json.loads(boxes.stdout)["boxes"]] == ["red circle"] and os.listdir(tmp_path) == []
  assert loop.returncode == 2 and re.search(r"^vlm: .*prompt.*\n\Z", loop.stderr, flags=re.M)
  adapted = ask("caption en", "--adapter", "x")
  assert adapted.returncode == 2 and re.search(r"^vlm: --adapter needs the folder examples/.*\n\Z", adapted.stderr, flags=re.M)
  code = f"import sys; sys.path.insert(0, {str(alone)!r}); sys.modules['ziglang'] = None; import vlm; sys.exit(vlm.main(sys.argv[1:]))"
  bare = {name: value for name, value in os.environ.items() if name not in ("CC", "DEV")} | {"PATH": str(tmp_path)}
  command = [sys.executable, "-c", code, ROOT / "examples" / "shapes.png", "caption en", "--weights", WEIGHTS / "toy",
             "--device", "CPU"]
  done = subprocess.run(command, capture_output=True, text=True, env=bare, cwd=tmp_path)
  assert done.returncode == 1 and re.search(r": no C compiler.*ziglang.*\n\Z", done.stderr), done.stderr

def test_a_hostile_folder(tmp_path):
  """A user's script beside modules with the names of ours: none is executed or mistaken, and the kernels are there"""
  names = ["train", "masks", "batch", "kernels", "draw", "fast", "terminal", "shapes", "examples/fast", "examples/terminal",
           "examples/__init__", "vlm_examples/fast", "examples/draw"]
  for name in names:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / f"{name}.py").write_text(f"print('executed {name}')\n")
  (tmp_path / "script.py").write_text(f"""
import sys
sys.path.append({str(ROOT)!r})
import vlm
m = vlm.load({str(WEIGHTS / 'toy')!r})
[answer] = m.generate([{str(ROOT / 'examples' / 'shapes-two.png')!r}], ["segment purple square"], max_tokens=40)
mask = vlm.beside("draw").Masks(m.folder, m.device)(answer.boxes[0], 448, 336)
print(mask.any(), vlm.kernels.__file__, vlm.terminal.__file__)
""")
  done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
  assert done.stdout.split() == ["True", str(ROOT / "examples" / "fast.py"), str(ROOT / "examples" / "terminal.py")], done.stderr

PROGRAMS = [path.stem for path in sorted(ROOT.glob("examples/*.py"))
            if "__main__" in path.read_text() and path.stem != "golden"]  # which needs transformers, and no vlm

@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_start_anywhere(name, tmp_path):
  assert {"train", "batch", "show", "quantize", "shard", "big_vision", "shapes", "bench"} <= set(PROGRAMS)
  command = [sys.executable, ROOT / "examples" / f"{name}.py"]
  helped = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True)
  assert helped.returncode == 0 and "usage: " in helped.stdout and helped.stderr == ""
  wrong = subprocess.run([*command, "--no-such-option"], cwd=tmp_path, capture_output=True, text=True)
  assert wrong.returncode == 2 and re.fullmatch(rf"{name}: .*--help\n", wrong.stderr), wrong.stderr
  assert os.listdir(tmp_path) == []

@pytest.mark.quick
def test_every_operation_has_its_plain_body():
  """No line of the model asks which device it is on, which kernel there is, or whether it trains"""
  text = (ROOT / "vlm.py").read_text()
  model = text[text.index("@fast\ndef matmul"):text.index("# ---- 6.")]
  assert not re.search(r"kernels\.|\.device|Device|\.training|DEV\b", model)

@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pty")
def test_progress_does_not_clear_the_answer(clone, tmp_path):
  """on a terminal, where stdout and stderr share the line: nothing clears it once the answer has begun"""
  import pty
  place, terminal = pty.openpty()
  command = [sys.executable, "vlm.py", "examples/shapes.png", "caption en", "--weights", "weights/tiny1", "--max-tokens", "5"]
  with subprocess.Popen(command, cwd=clone, stdout=terminal, stderr=terminal, stdin=subprocess.DEVNULL,
                        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}) as run:  # nothing is compiled there yet
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
      while part := os.read(place, 4096):
        shown += part
  os.close(place)
  answer = model("tiny1").generate([ROOT / "examples" / "shapes.png"], ["caption en"], max_tokens=5)[0].text
  assert run.returncode == 0 and b"looking, compiling" in shown and answer.strip().encode() in shown.replace(b"\r\n", b"\n")

# ---- README: what it says is what the files are, and its commands run ----
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "examples/README.md", "weights/toy/README.md")}

def code_blocks(kind="", text=README):
  """The fenced blocks of a page, but those that need the hub or a GPU, and those that .ci/run runs."""
  text = re.sub(r"<!-- (needs [^>]*|set up [^>]*) -->\n```.*?```", "", text, flags=re.S)
  return [block for name, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.S | re.M) if name == kind]

@pytest.fixture
def clone(tmp_path):
  """A folder that looks like the repository, for commands that write where they run."""
  place = tmp_path / "clone"
  place.mkdir()
  for name in ("vlm.py", "tokenizer.py", "examples", "weights"):
    (place / name).symlink_to(ROOT / name)
  return place

@pytest.mark.quick
def test_readme_map_is_the_file():
  banners = re.findall(r"^# ---- (\d+\. .*) ----$", (ROOT / "vlm.py").read_text(), flags=re.M)
  assert re.findall(r"^\| (\d+\. [^|]*?) \|", README, flags=re.M) == banners

@pytest.mark.quick
def test_readme_is_short_and_its_links_lead_somewhere():
  lines = README.splitlines()
  assert len(lines) <= 200 and max(map(len, lines)) <= 140
  first = "\n".join(lines[:40])
  for what in ("shapes-boxes.png", "python vlm.py", "set up and run", "set up and test", "A real photograph", "#reading-map",
               "ast"):
    assert what in first
  for page, text in PAGES.items():
    for link in re.findall(r"\]\(([^)#]+)", text):
      assert link.startswith("http") or (ROOT / page).parent.joinpath(link).exists(), link
  programs = {path.name for path in ROOT.glob("examples/*.py") if "__main__" in path.read_text()}
  assert not {name for name in programs if name not in PAGES["examples/README.md"]}

LESS = {  # what is done to a command that takes minutes, or wants a downloaded checkpoint or transformers
  r"--steps \d+": "--steps 2 --batch 4",
  r"(--save|--init) weights/": r"\1 ", r"weights/paligemma-3b-mix-224": "weights/tiny1",
  r"vlm.py --train": r"\g<0> --steps 2",
  r"--count \d+": "--count 12",
  r"gpu_dry_run.py memory": "gpu_dry_run.py METAL:Apple7 3b --layers 1", r"show.py eval": "show.py eval --scenes 20",
  r"codebook.py --train weights/": "codebook.py --steps 2 --batch 4 --train "}

ELSEWHERE = ["python examples/train.py",  # the first of the toy's runs, which stands beside it
             "python examples/shapes.py --eval"]  # whose tests run it whole

SECTIONS = [(page, section) for page, text in PAGES.items() for section in text.split("\n## ")
            if code_blocks(text=section)]

@pytest.mark.long
@pytest.mark.parametrize("page,section", SECTIONS, ids=[f"{page}: {section.splitlines()[0]}" for page, section in SECTIONS])
def test_readme_commands(page, section, clone):
  """Those of a section in their order: some use what others wrote."""
  long = [line for block in re.findall(r"<!-- takes long -->\n```\n(.*?)```", section, flags=re.S)
          for line in block.splitlines()]
  commands = [line for block in code_blocks(text=section) for line in block.splitlines() if line]
  for command in [command for command in commands if command not in ELSEWHERE]:
    assert command.startswith("python "), "only commands that run with nothing but this repository"
    if command.startswith("python examples/bench.py "):  # each of its options is run by test_bench.py
      known = (ROOT / "examples" / "test_bench.py").read_text()
      assert all(f'"{word}"' in known for word in command.split() if word.startswith("--")), command
      continue
    for pattern, replacement in LESS.items() if command in long else ():
      command = re.sub(pattern, replacement, command)
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=clone, input="caption en\n\n", text=True,
                          capture_output=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, command + done.stderr

def test_readme_python(clone):
  [code] = code_blocks("python")
  run = subprocess.run([sys.executable, "-c", code], cwd=clone, text=True, capture_output=True)
  assert run.returncode == 0, run.stderr

def test_readme_prints_what_the_toy_answers():
  said = re.search(r"^    \$ python vlm.py (\S+) \"(.*?)\"\n    (.*)$", README, flags=re.M)
  [answer] = vlm.load(WEIGHTS / "toy").generate([ROOT / said[1]], [said[2]])
  assert answer.text == said[3]

# ---- training a small one from nothing ----
SMALL = vlm.Config(vlm.VisionConfig(64, 2, 2, 128, image_size=56), vlm.TextConfig(64, 2, 128, 2, 1, 32))

def coloured(rng):
  """-> a picture of one colour, a question, its name. Without the picture the best loss is log(6) / 6 = .3."""
  color = str(rng.choice(vlm.COLORS))
  pixels = np.full((56, 56, 3), ImageColor.getrgb(color)) + rng.normal(0, 20, (56, 56, 3))
  return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), "what color?", color

@functools.cache
def trained(steps):
  """A smaller model after so many steps of colours -> its folder, the loss of each step"""
  folder, losses, rng = Path(tempfile.mkdtemp()) / "mine", [], np.random.default_rng(1)
  keep = logging.Handler()
  keep.emit = lambda record: losses.append(record.args[2]) if "loss" in record.msg else None
  vlm.log.setLevel("DEBUG")
  with mock.patch.object(vlm, "TOY", SMALL), mock.patch.object(vlm.terminal, "trained"), \
       mock.patch.object(vlm.log, "handlers", [keep]):
    vlm.train(folder, [coloured(rng) for _ in range(400)], steps, vlm.open_device(None))
  return folder, losses

@pytest.mark.long
def test_training_learns():
  folder, losses = trained(140)
  assert len(losses) == 140 and losses[0] > 3 and np.mean(losses[-10:]) < .1
  # Biases and norms begin as one number each, which only a gradient makes several of.
  assert not [name for name, t in vlm.read_weights(folder).items() if t.ndim == 1 and t.std() == 0]
  m, rng = vlm.load(folder), np.random.default_rng(5)
  pictures, prompts, names = zip(*(coloured(rng) for _ in range(20)))
  answers = m.generate(list(pictures), list(prompts), max_tokens=12)
  assert [answer.text for answer in answers] == list(names)

@pytest.mark.long
def test_live_trained_folder(live_seed):
  folder, rng = trained(20)[0], np.random.default_rng(live_seed)
  theirs, m = golden.load(folder), vlm.load(folder)
  for _ in range(10):
    pixels = vlm.to_pixels(coloured(rng)[0], 56)
    right = golden.reference(theirs, pixels, m.tokenizer.prompt("caption en"), 16)
    assert differ(golden.next_logits(m, pixels[0], "caption en"), right["logits"][0]) < TOLERANCE["logits"]
    tokens = right["tokens"][0].tolist()
    [answer] = m.generate([pixels[0]], ["caption en"], max_tokens=16)
    assert answer.tokens == tokens[:tokens.index(1) if 1 in tokens else None]

@pytest.mark.quick
def test_the_drawn_world():
  scenes = [vlm.draw_scene(np.random.default_rng(i)) for i in range(200)]
  texts = [answer for *_, answer in scenes]
  assert {question for _, question, _ in scenes} == {"caption en"} and len(set(texts)) > 100
  assert {word for text in texts for word in text.split()} == {"a", "and", *vlm.COLORS, *vlm.CORNERS}
  assert 60 < sum(" and " in text for text in texts) < 140  # one or two
  for picture, _, text in scenes[:50]:  # a named colour is there, on its side
    pixels, names = np.asarray(picture), [words.split()[1] for words in text.split(" and ")]
    for i, color in enumerate(names):
      part = pixels[:, 56 * i // len(names):56 * (i + 1) // len(names)]
      assert (part == ImageColor.getrgb(color)).all(-1).sum() > 40, text

@pytest.mark.quick
def test_characters_are_pieces(tmp_path):
  texts = "caption en", "ein rotes Dreieck, größer"
  tokenizer = vlm.learn_characters([(None, *texts)], tmp_path / "new")
  assert isinstance(tokenizer, Tokenizer) and (tmp_path / "new" / "tokenizer.model").exists()
  for text in texts:
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
  assert tokenizer.image == tokenizer.model.get_piece_size() + LOC + SEG  # the rest follows, as in hub folders
  with pytest.raises(vlm.Fault, match="not empty"):
    vlm.learn_characters([(None, *texts)], tmp_path / "new")
  (tmp_path / "file").touch()
  with pytest.raises(vlm.Fault, match="--save"):
    vlm.learn_characters([(None, *texts)], tmp_path / "file" / "new")

@pytest.mark.quick
def test_collate():
  c = model("tiny2").config.text  # windows of few tokens
  ids, labels, full, sliding, cos, sin = vlm.collate(c, 3, [([2, 7, 5], [8, 9, 1]), ([2, 5], [6, 1])], 8)
  assert ids.tolist() == [[2, 7, 5, 8, 9, 1, 0, 0], [2, 5, 6, 1, 0, 0, 0, 0]]
  no = -100
  assert labels.tolist() == [[no, no, 8, 9, 1, no, no, no], [no, 6, 1, no, no, no, no, no]]
  assert cos.shape == sin.shape == (11, c.head_dim // 2) and full.shape == sliding.shape == (2, 1, 1, 11, 11)
  for i, (start, end) in enumerate(((6, 9), (5, 7))):
    assert (full[i] == vlm.training_mask([start], [end], 11)[0]).all()
    assert (sliding[i] == vlm.training_mask([start], [end], 11, c.sliding_window)[0]).all()

def write_pictures(folder, names):
  for i, name in enumerate(names):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), (20 * i, 0, 0)).save(folder / name)

def test_samples_of_every_kind(tmp_path):
  read_samples = vlm.beside("samples").read
  names = [f"{i}.png" for i in range(10)]
  for kind in ("lines", "table", "labels"):
    write_pictures(tmp_path / kind, names if kind != "labels" else [f"{'cat' if i < 4 else 'dog'}/{i}.png" for i in range(10)])
  lines = [json.dumps({"image": name, "prefix": "what?", "suffix": f"it, {name}"}) for name in names]
  (tmp_path / "lines" / "data.jsonl").write_text("\n".join(lines))
  (tmp_path / "table" / "captions.csv").write_text("image,caption\n" + "".join(f'{name},"it, {name}"\n' for name in names))
  assert read_samples(tmp_path / "lines") == [(tmp_path / "lines" / name, "what?", f"it, {name}") for name in names]
  assert read_samples(tmp_path / "table") == [(tmp_path / "table" / name, "caption en", f"it, {name}") for name in names]
  labels = read_samples(tmp_path / "labels")
  assert [answer for *_, answer in labels] == ["cat"] * 4 + ["dog"] * 6 and labels[0][0] == tmp_path / "labels/cat/0.png"
  for file, text, words in (("lines/data.jsonl", '{"image": "0.png"}', ["line 1", "prefix"]),
                            ("lines/data.jsonl", "\n".join(lines[:3] + ['{"image": 5, "prefix": "a", "suffix": "b"}']), ["line 4"]),
                            ("lines/data.jsonl", lines[0].replace("0.png", "none.png", 1), ["line 1", "none.png: no such"]),
                            ("lines/data.jsonl", lines[0], ["1 pictures", "at least 10"]),
                            ("table/captions.csv", "0.png,a,b", ["line 1", "3 columns"]),
                            ("table/captions.csv", "0.png,", ["line 1", "empty"])):
    (tmp_path / file).write_text(text)
    with pytest.raises(vlm.Fault) as fault:
      read_samples((tmp_path / file).parent)
    assert all(word in str(fault.value) for word in words), str(fault.value)
  with pytest.raises(vlm.Fault, match="no such folder"):
    read_samples(tmp_path / "none")

def test_train_options(refused, pictures, tmp_path):
  for words in (("--train", "--json"), ("--train", "--weights", "toy"), ("--train", "--seed", 3), ("--steps", 3),
                ("--save", "x"), ("--train", "--temperature", 1), ("--train", "--out", "x.png")):
    refused("--train", *(() if "--train" in words else (pictures["rgb"], "caption en")), *words)
  refused("one folder", "--train", "a", "b")
  refused("no such folder", "--train", "none", "--save", "new")
  refused("at least 1", "--train", "--steps", 0, "--save", "new")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "mine.txt").touch()
  refused("not empty", "--train", "--save", "full", "--steps", 2)
  assert not (tmp_path / "new").exists() and [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]

@pytest.mark.long
def test_ctrl_c_saves_what_was_learnt(tmp_path):
  write_pictures(tmp_path / "photos", [f"{label}/{i}.png" for label in ("cat", "dog") for i in range(6)])
  command = [sys.executable, ROOT / "vlm.py", "--train", tmp_path / "photos", "--save", tmp_path / "mine"]
  with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
    said = [next(run.stderr)]
    assert "12 pictures: 1000 steps" in said[0]  # before anything slow
    while "loss" not in said[-1]:
      said.append(next(run.stderr))
    run.send_signal(signal.SIGINT)
    rest = run.stderr.read()
  assert run.returncode == 0 and "Traceback" not in rest and "2 pictures that it has not seen" in rest
  assert {path.name for path in (tmp_path / "mine").iterdir()} == {
    "config.json", "model.safetensors", "tokenizer.model", "loss.csv", "loss.png"}
  answer, = vlm.load(tmp_path / "mine").generate([tmp_path / "photos/cat/0.png"], ["caption en"], max_tokens=4)
  assert isinstance(answer.text, str)

# ---- live: transformers itself, with new seeds and sizes at every run ----
@pytest.fixture(scope="session")
def live_seed():
  for package in ("torch", "transformers"):
    if os.environ.get("VLM_LIVE"):  # CI, which must not skip
      importlib.import_module(package)
    pytest.importorskip(package, reason=f"the live comparison needs {package}: see .ci/run for its environment")
  return int(os.environ.get("VLM_SEED") or np.random.SeedSequence().entropy % 2**31)

LIVE = [(False, "float32"), (True, "float32"), (True, "bfloat16"), (False, "float16")]

@pytest.mark.parametrize("gemma2,dtype", LIVE)
def test_live_models(gemma2, dtype, live_seed, tmp_path, monkeypatch):
  monkeypatch.setattr(vlm.kernels, "PORTABLE", True)  # see BFLOAT16
  rng = np.random.default_rng([live_seed, gemma2, len(dtype)])
  config = golden.random_config(rng, gemma2)
  note = f"VLM_SEED={live_seed} {config}"
  golden.make(tmp_path, config, live_seed, dtype)
  theirs, m = golden.load(tmp_path), vlm.load(tmp_path)
  images = golden.pixels(m.config.vision.image_size, 2, live_seed)
  prompts = ["".join(rng.choice(list("abcdefg ;"), int(n))) for n in (rng.integers(1, 10), rng.integers(18, 28))]
  right = [golden.reference(theirs, images, m.tokenizer.prompt(prompt)) for prompt in prompts]
  vision, projected = (np.stack(stage) for stage in zip(*map(m.vision, images)))
  assert differ(vision, right[0]["vision"]) < TOLERANCE["vision"], note
  assert differ(projected, right[0]["projected"]) < TOLERANCE["projected"], note
  tokens, logits = run(m, list(images), prompts)  # one batch: the shorter prompt is padded
  for row in range(2):
    assert differ(logits[0, row], right[row]["logits"][row]) < TOLERANCE["logits"], note
    whole = right[row]["tokens"][row].tolist()
    assert tokens[row] == whole[:whole.index(1) if 1 in whole else None], note  # golden.py goes on after the end
    assert differ(golden.next_logits(m, images[row], prompts[row]), right[row]["logits"][row]) < TOLERANCE["logits"], note
  if dtype == "bfloat16":  # as it runs by default: nearer to float32 than transformers' own bfloat16
    monkeypatch.setattr(vlm.kernels, "PORTABLE", False)
    half = golden.reference(golden.load(tmp_path, dtype), images, m.tokenizer.prompt(prompts[0]), tokens=1)["logits"]
    mine = np.stack([golden.next_logits(fresh(m), image, prompts[0]) for image in images])
    assert differ(mine, right[0]["logits"]) < differ(half, right[0]["logits"]), note

@pytest.fixture(scope="session")
def processor(live_seed, tmp_path_factory):
  """transformers' PaliGemmaProcessor over the tiny SentencePiece file, with the added tokens that the hub's file has"""
  from transformers import GemmaTokenizer, PaliGemmaProcessor
  from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
  folder = tmp_path_factory.mktemp("processor")
  shutil.copy(WEIGHTS / "tiny1" / "tokenizer.model", folder)
  tokenizer = GemmaTokenizer.from_pretrained(folder)
  tokenizer.add_tokens([name for name in model("tiny1").tokenizer.ids if name != "<image>"])
  size = {"height": 56, "width": 56}
  images = SiglipImageProcessorPil(size=size, do_convert_rgb=True, resample=Image.Resampling.BICUBIC)
  images.image_seq_length = 16
  return PaliGemmaProcessor(images, tokenizer)

PICTURES = ["rgb", "grey", "rgba", "palette", "clear_palette", "grey_alpha", "cmyk", "bit", "deep", "tall", "wide",
            "one", "square", "photo", "anim"]

@pytest.mark.parametrize("name", PICTURES)
def test_live_pixels(name, processor, pictures):
  right = processor.image_processor(Image.open(pictures[name]), return_tensors="np")["pixel_values"]
  assert right.shape == (1, 3, 56, 56) and np.abs(vlm.to_pixels(pictures[name], 56) - right).max() < 1e-6

def test_live_pixels_of_a_turned_picture(processor, pictures):
  from PIL import ImageOps
  turned = ImageOps.exif_transpose(Image.open(pictures["turned"]))
  right = processor.image_processor(turned, return_tensors="np")["pixel_values"]
  assert turned.size == (40, 60) and np.abs(vlm.to_pixels(pictures["turned"], 56) - right).max() < 1e-6

def test_live_token_ids(processor, live_seed):
  rng, ours = np.random.default_rng(live_seed), model("tiny1").tokenizer
  words = ["caption", "en", "detect ", "<loc0007>", "<seg127>", "<loc1024>", " ", ";", "12", "\n", "\n\n", "é", "日",
           "🎉", "the", "Cat", "<", ">"]
  texts = TEXTS + ["".join(rng.choice(words, 8)) for _ in range(60)]
  # Runs of spaces longer than any piece split differently: the tiny file has pieces for up to 3, Gemma's up to 31.
  for text in [t for t in texts if "    " not in t and "▁▁" not in t]:
    ids = processor(images=Image.new("RGB", (9, 9)), text="<image>" + text)["input_ids"][0]
    assert list(ids) == [ours.image] * 16 + ours.prompt(text), f"VLM_SEED={live_seed} {text!r}"
