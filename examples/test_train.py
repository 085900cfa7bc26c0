"""Tests of train.py: offline, on a smaller toy and the tiny checkpoints of weights/. `-k live` loads what it
saves in transformers; that needs torch and transformers."""
import copy
import functools
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import codebook
import shapes
import train
import vlm

ROOT = Path(__file__).resolve().parents[1]
TINY, TOY = ROOT / "weights" / "tiny1", ROOT / "weights" / "toy"
ROWS, TEXT = 4, 36

def smaller():
  """train.TOY with a fraction of its width, depth and picture."""
  toy = copy.deepcopy(train.TOY) | {"hidden_size": 32, "projection_dim": 32}
  toy["vision_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                           "num_attention_heads": 2, "image_size": 56}
  toy["text_config"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                         "num_attention_heads": 2, "head_dim": 16, "num_image_tokens": 16}
  return toy

def shrink(patch):
  patch.setattr(train, "TOY", smaller())
  patch.setattr(train, "REPORTS", 2)
  patch.setattr(train.Run, "report", lambda self: None)  # a sample answer compiles two more programs

@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
  shrink(monkeypatch)
  monkeypatch.chdir(tmp_path)

def arguments(*argv):
  return train.arguments(list(map(str, argv)))

def toy(folder, part="all"):
  """-> a model from random weights, its trainer, rows and pixels of a batch."""
  args = arguments("--save", folder, "--batch", ROWS, "--steps", 8, "--part", part)
  job = train.Run(args)
  return job.model, job.trainer, *job.data.batch(0)

@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  """One model and one compiled loss for all tests that change no weights."""
  with pytest.MonkeyPatch.context() as patch:
    shrink(patch)
    return toy(tmp_path_factory.mktemp("shared"))

def arrays(folder):
  return {n: a.copy() for n, a in vlm.read_weights(Path(folder)).items()}

def rows_of(folder):
  lines = (Path(folder) / "loss.csv").read_text().splitlines()
  return [[float(v) for v in line.split(",")] for line in lines[1:]]

@pytest.fixture
def refused(capsys):
  """Run the command line: it must fail with one line on stderr, after what it was doing -> that line."""
  def run(*argv, code=2):
    got = train.main(list(map(str, argv)))
    out, err = capsys.readouterr()
    assert got == code, err
    *stages, last = err.splitlines()
    assert out == "" and last.startswith("train: ") and all(line.startswith("loading ") for line in stages), err
    return last
  return run

# ---- mask and loss ----
def picture(text):
  return np.array([[int(v) for v in line.split()] for line in text.strip().splitlines()], bool)

def test_the_mask_is_its_picture():
  lines = [line.split()[-6:] for line in vlm.training_mask.__doc__.splitlines()]
  drawn = picture("\n".join(" ".join(line) for line in lines if len(line) == 6 and set(line) <= {"0", "1"}))
  assert drawn.shape == (6, 6) and (vlm.training_mask([3], [5], 6)[0, 0, 0] == drawn).all()

def test_the_mask_with_a_window():
  """The window bites on answers only: the prefix sees all of itself, and padding all the rest."""
  rows = 3 * ["1 1 1 0 0 0 0"] + ["0 0 1 1 0 0 0", "0 0 0 1 1 0 0"] + 2 * ["1 1 1 1 1 0 0"]
  wanted = picture("\n".join(rows))
  assert (vlm.training_mask([3], [5], 7, 2)[0, 0, 0] == wanted).all()
  both = vlm.training_mask([3, 1], [5, 7], 7, 2)
  assert both.shape == (2, 1, 1, 7, 7) and (both[0, 0, 0] == wanted).all() and (both.any(-1)).all()

def test_loss_is_a_cross_entropy_of_the_models_own_logits(shared):
  """vlm.logits after each beginning of an answer, which shares neither mask nor batch with vlm.loss."""
  model, trainer, rows, pixels = shared
  terms = []
  for i, (prefix, answer) in enumerate(rows):
    image = pixels[i * len(pixels) // len(rows)]
    for n in range(len(answer)):
      ids = prefix + answer[:n]
      logits = one_shot(model, image, ids, len(prefix)).astype(np.float64)
      terms.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[answer[n]])
  assert trainer.loss(trainer.batch(rows, pixels, TEXT)) == pytest.approx(np.mean(terms), abs=1e-5)

def one_shot(model, image, ids, prefix):
  """Next-token logits after `ids`, of which the first are a prefix: by numpy's own mask, on the uncached
  model."""
  P, n = model.config.vision.patches, model.config.vision.patches + TEXT
  total = P + len(ids)
  mask = np.tril(np.ones((n, n), bool))
  mask[:P + prefix, :P + prefix] = True
  padded = np.array([ids + [0] * (TEXT - len(ids))], np.int32)
  cos, sin = (Tensor(t, device=model.device) for t in vlm.rope_table(model.config.text, np.arange(n)))
  if not hasattr(one_shot, "run"):
    def run(pixels, padded, mask, cos, sin):
      net = model.net
      text = net.language_model.embed(padded)
      features = net.multi_modal_projector.linear(net.vision_tower(pixels))
      x = net.language_model(features.cat(text, dim=1), cos, sin, (mask, mask))
      return net.language_model.logits(x.contiguous()).contiguous()
    one_shot.run = vlm.TinyJit(run)
    one_shot.run.cnt = 1
  inputs = [Tensor(t, device=model.device).realize() for t in (image[None], padded, mask[None, None, None])]
  return one_shot.run(*inputs, cos.realize(), sin.realize()).numpy()[0, total - 1]

def test_only_answers_are_scored(shared):
  model, trainer, rows, pixels = shared
  batch = trainer.batch(rows, pixels, TEXT)
  labels, before = batch[2].numpy(), trainer.loss(batch)
  def with_label(row, place):
    changed = labels.copy()
    changed[row, place] = (changed[row, place] + 7) % 400
    return trainer.loss([*batch[:2], Tensor(changed, device=model.device).realize(), *batch[3:]])
  for row, (prefix, answer) in enumerate(rows[:2]):
    scored = range(len(prefix) - 1, len(prefix) + len(answer) - 1)
    assert [labels[row, place] for place in scored] == answer  # from the first token to the eos
    assert (labels[row] >= 0).sum() == len(answer)  # and nothing else
    for place in (scored[0], scored[-1]):
      assert abs(with_label(row, place) - before) > 1e-4

def test_padding_is_ignored(shared):
  model, trainer, rows, pixels = shared
  batch = trainer.batch(rows, pixels, TEXT)
  ids, before = batch[1].numpy(), trainer.loss(batch)
  for row, (prefix, answer) in enumerate(rows):
    ids[row, len(prefix) + len(answer):] = 99
  assert trainer.loss([batch[0], Tensor(ids, device=model.device).realize(), *batch[2:]]) == before

def test_a_row_of_a_batch_is_the_row_alone(shared):
  model, trainer, rows, pixels = shared
  mixed, alone = trainer.loss(trainer.batch(rows, pixels, TEXT)), []
  for i in range(len(rows)):
    picture = pixels[i * len(pixels) // len(rows)]
    alone.append(trainer.loss(trainer.batch([rows[i]] * ROWS, np.stack([picture] * len(pixels)), TEXT)))
  lengths = [len(answer) for _, answer in rows]
  assert len(set(alone)) > 1 and mixed == pytest.approx(np.average(alone, weights=lengths), abs=1e-5)

def test_padding_beyond_a_sliding_window():
  """A row that is shorter than the longest by more than the window: its padding would see nothing, and be
  NaN."""
  model = vlm.load(ROOT / "weights" / "tiny2")
  trainer, rng = train.Trainer(model.net, model.config, "projector"), np.random.default_rng(0)
  rows = [([2, 5, 9], [8, 1]), ([2] + rng.integers(5, 300, 39).tolist(), rng.integers(5, 300, 40).tolist())]
  pixels = rng.uniform(-1, 1, (2, 3, 56, 56)).astype(np.float32)
  assert model.config.text.sliding_window < 79 - 5
  assert np.isfinite(trainer.loss(trainer.batch(rows, pixels, 80)))

# ---- steps ----
@pytest.mark.long
def test_one_batch_overfits(tmp_path):
  _, trainer, rows, pixels = toy(tmp_path)
  batch, rates = trainer.batch(rows, pixels, TEXT), 1e-2 * np.minimum(1, np.arange(1, 81) / 10)
  losses = [trainer.step(batch, rate) for rate in rates]
  assert losses[0] > 4 and losses[10] < losses[0] - 0.5 and losses[-1] < 0.3, losses

@pytest.mark.long
def test_the_optimizer_remembers(tmp_path):
  """At a rate of 0 the gradient g stays: after n steps the mean is (1 - 0.9^n) g, that of squares (1 -
  0.99^n) g^2."""
  _, trainer, rows, pixels = toy(tmp_path)
  batch, seen = trainer.batch(rows, pixels, TEXT), []
  for n in range(1, 4):
    trainer.step(batch, 0.0)
    seen.append({name: t.numpy().copy() for name, t in trainer.state().items()})
    assert seen[-1]["b1_t.0"] == pytest.approx(0.9 ** n) and seen[-1]["b2_t.1"] == pytest.approx(0.99 ** n)
  for name, first in seen[0].items():
    if name.startswith(("m.", "v.")):
      grown = (1 - 0.9 ** 3) / 0.1 if name.startswith("m.") else (1 - 0.99 ** 3) / 0.01
      assert np.abs(seen[2][name] - first * grown).max() <= 1e-3 * np.abs(first * grown).max(), name

@pytest.mark.long
@pytest.mark.parametrize("part,moves", [
  ("projector", lambda n: n.startswith("multi_modal_projector.")),
  ("attention", lambda n: n.startswith("language_model.") and ".self_attn." in n),
  ("language", lambda n: n.startswith("language_model.")), ("all", lambda n: True)])
def test_frozen_weights_do_not_move(part, moves, tmp_path):
  """Of a bfloat16 checkpoint, whose frozen weights pass gradients on but for `all`."""
  copy_bfloat16(TINY, tmp_path / "half")
  model = vlm.load(tmp_path / "half")
  places = get_state_dict(model.net)
  trainer = train.Trainer(model.net, model.config, part)
  before = {n: t.numpy().copy() for n, t in places.items()}
  rows = [train.tokenize(model.tokenizer, "caption en", "hello")] * 2
  batch = trainer.batch(rows, np.random.default_rng(1).uniform(-1, 1, (2, 3, 56, 56)).astype(np.float32), 24)
  losses = [trainer.step(batch, 1e-3) for _ in range(3)]
  moved = {n for n, t in places.items() if (t.numpy() != before[n]).any()}
  assert losses[2] < losses[0] - 0.1
  # Softmax does not see what is added to all keys alike: no gradient reaches their bias but rounding.
  assert {n for n in places if moves(n)} - moved <= {n for n in places if "k_proj.bias" in n}
  assert moved <= {n for n in places if moves(n)} == set(trainer.weights)

def copy_bfloat16(source, target):
  """The checkpoint in half the bits, at addresses that are only as even as the format promises."""
  target.mkdir()
  for name in ("config.json", "tokenizer.model"):
    shutil.copy(source / name, target)
  header, blobs, end = {}, [], 0
  for name, array in vlm.read_weights(source).items():
    blobs.append((array.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    header[name] = {"dtype": "BF16", "shape": array.shape, "data_offsets": [end, end := end + len(blobs[-1])]}
  text = json.dumps(header)
  text += " " * (-len(text) % 64)
  header = len(text).to_bytes(8, "little") + text.encode()
  (target / "model.safetensors").write_bytes(header + b"".join(blobs))

def test_learning_rate(tmp_path):
  job = train.Run.__new__(train.Run)
  job.args = arguments("--steps", 100, "--lr", 0.5)
  rates = [job.learning_rate(step) for step in range(100)]
  assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(0.5, rel=0.01)
  assert np.argmax(rates) in (4, 5)
  assert (np.diff(rates[5:]) < 0).all() and 0 < rates[-1] < 0.001

def test_a_dropped_trainer_is_freed_at_once(tmp_path):
  """See test_a_dropped_model_is_freed_at_once of test_vlm.py."""
  model, trainer, rows, pixels = toy(tmp_path)
  batch = trainer.batch(rows, pixels, TEXT)
  trainer.step(batch, 1e-3)
  held = model, model.net, trainer, trainer.step_program
  references = [weakref.ref(thing) for thing in held]
  gc.disable()
  try:
    del model, trainer, held
    assert not [reference() for reference in references if reference() is not None]
  finally:
    gc.enable()

def test_a_kept_step_changes_the_weights_of_its_reader(tmp_path, monkeypatch):
  monkeypatch.setattr(vlm.kernels, "CACHE", tmp_path / "programs")
  found = []
  for name in ("first", "again"):
    _, trainer, rows, pixels = toy(tmp_path / name)
    batch = trainer.batch(rows, pixels, TEXT)
    losses = [trainer.step(batch, 1e-2) for _ in range(3)] + [trainer.loss(batch)]
    found.append((losses, {name: t.numpy() for name, t in trainer.state().items()}))
    def refuse(*args):
      raise AssertionError("captured again")
    monkeypatch.setattr(vlm.kernels, "captured", refuse)
  (losses, state), (same, again) = found
  assert losses == same and losses[3] < losses[0]
  assert state.keys() == again.keys() and all(np.array_equal(state[name], again[name]) for name in state)

# ---- runs ----
RUN = "--steps", 8, "--batch", ROWS, "--lr", 1e-3, "--quiet"

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that nobody interrupts -> its folder."""
  folder = tmp_path_factory.mktemp("runs") / "whole"
  with pytest.MonkeyPatch.context() as patch:
    shrink(patch)
    assert train.main(["--save", str(folder), *map(str, RUN)]) == 0
  return folder

def test_a_run_leaves_a_whole_folder(whole):
  names = {"config.json", "model.safetensors", "tokenizer.model", "training.state", "loss.csv", "loss.png"}
  assert {p.name for p in whole.iterdir()} == names
  tensors = load_file(whole / "model.safetensors")  # hub names
  assert "language_model.model.layers.1.self_attn.q_proj.weight" in tensors
  assert tensors["vision_tower.vision_model.embeddings.patch_embedding.weight"].shape == (32, 3, 14, 14)
  assert [row[0] for row in rows_of(whole)] == [4, 8]
  assert Image.open(whole / "loss.png").size == (720, 420)
  [answer] = vlm.load(whole).generate([shapes.scene(3, 0).image], ["caption en"], max_tokens=4)
  assert len(answer.tokens) <= 4

@pytest.mark.long
@pytest.mark.parametrize("after", [2, 4])
def test_resume_equals_uninterrupted(after, whole, tmp_path, monkeypatch, capsys):
  """Ctrl-C in the middle of a step, between two rows of loss.csv and at one: the step ends, then all is
  saved."""
  plain, steps = train.Trainer.step, []
  def step(self, *args):
    steps.append(0)
    if len(steps) == after:
      signal.raise_signal(signal.SIGINT)
    return plain(self, *args)
  monkeypatch.setattr(train.Trainer, "step", step)
  command = ["--save", str(tmp_path / "run"), *map(str, RUN)]
  handler = signal.getsignal(signal.SIGINT)
  assert train.main(command) == 130 and len(steps) == after and signal.getsignal(signal.SIGINT) == handler
  assert (tmp_path / "run" / "loss.csv").read_text().count("\n") == 1 + after // 4
  assert train.main([*command, "--resume"]) == 0 and len(steps) == 8
  assert rows_of(tmp_path / "run") == rows_of(whole)
  for name in ("model.safetensors", "training.state"):
    assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()
  assert capsys.readouterr().err == ""  # --quiet

@pytest.mark.long
def test_scenes_grow_unless_a_checkpoint_goes_on(whole, tmp_path, monkeypatch):
  seen, plain = [], shapes.examples
  def examples(seed, i, k, most=4, codes=None):
    seen.append(most)
    return plain(seed, i, k, most, codes)
  monkeypatch.setattr(shapes, "examples", examples)
  m = vlm.load(whole)
  for grow, wanted in ((True, [1, 1, 2, 2, 3, 3, 4, 4]), (False, [4] * 8)):
    toy = train.Toy(m.tokenizer, m.config, 2, 12, grow)
    for i in (0, 1, 2, 3, 4, 5, 6, 11):
      toy.batch(i)
    assert seen == wanted
    seen.clear()
  command = ["--save", str(tmp_path / "run"), *map(str, RUN)]
  step = train.Trainer.step
  def interrupt(self, *args):
    signal.raise_signal(signal.SIGINT)
    return step(self, *args)
  with monkeypatch.context() as patch:
    patch.setattr(train.Trainer, "step", interrupt)
    assert train.main([*command, "--init", str(whole)]) == 130
  seen.clear()
  assert train.main([*command, "--resume"]) == 0
  assert set(seen) == {4}, "what --init said is remembered"
  assert json.loads((tmp_path / "run" / "config.json").read_text())["note"] == train.TOY["note"]

def test_resume_wants_the_same_run(whole, refused, tmp_path):
  err = refused("--save", whole, "--resume", "--steps", 9, "--batch", ROWS, "--lr", 0.5)
  assert "--steps 8" in err and "--lr 0.001" in err
  assert "--resume" in refused("--save", whole, *RUN)
  assert "nothing to resume" in refused("--save", tmp_path / "none", "--resume")
  assert not (tmp_path / "none").exists()
  broken = shutil.copytree(whole, tmp_path / "broken")
  (broken / "training.state").write_bytes(b"x" * 100)
  assert "training.state" in refused("--save", broken, "--resume", *RUN)

def test_a_checkpoint_is_never_trained_over(refused, tmp_path):
  folder = shutil.copytree(TINY, tmp_path / "tiny")
  before = {p: p.read_bytes() for p in folder.iterdir()}
  for init in ((), ("--init", folder)):
    assert "another --save" in refused("--save", folder, *init, *RUN)
  assert {p: p.read_bytes() for p in folder.iterdir()} == before

def test_options(refused, tmp_path):
  for option, value in (("--steps", 0), ("--steps", -1), ("--batch", 0), ("--lr", 0), ("--lr", "nan"),
                        ("--lr", "inf"), ("--lr", -1), ("--steps", "x"), ("--part", "vision")):
    assert option in refused("--save", tmp_path / "no", option, value)
  assert "--init" in refused(tmp_path, "--save", tmp_path / "no")
  assert "no such folder" in refused("--init", tmp_path / "nothing", "--save", tmp_path / "no")
  assert "big_vision.py" in refused("--init", "paligemma.npz", "--save", tmp_path / "no")
  assert "--skip-bad" in refused("--skip-bad", "--save", tmp_path / "no")
  assert "--eval" in refused("--save", tmp_path / "no", "--weights", TINY)
  for other in (("--temperature", 1), ("--seed", 1), ("--json",), ("--out", "x.png"),
                ("--sa", "x"), (tmp_path, "caption en")):  # of other programs
    assert "unrecognized" in refused("--save", tmp_path / "no", *other)
  assert "cannot be used" in refused("--save", tmp_path / "no", "--device", "NOSUCH")
  assert not (tmp_path / "no").exists()

@pytest.fixture
def job(whole, tmp_path):
  """The run `whole`, ready to go on, in a folder of its own."""
  return train.Run(arguments("--save", shutil.copytree(whole, tmp_path / "copy"), "--resume", *RUN))

def test_a_save_that_fails_leaves_the_old(job, monkeypatch):
  before = {p: p.read_bytes() for p in job.folder.iterdir()}
  weight = next(iter(job.trainer.weights.values()))
  weight.assign(weight + 1).realize()
  def full(*args):
    raise OSError(28, "No space left on device")
  for name in ("replace", "fsync"):
    with monkeypatch.context() as patch:
      patch.setattr(os, name, full)
      with pytest.raises(vlm.Fault, match="No space.*step 8") as e:
        job.save()
      assert e.value.code == 1 and {p: p.read_bytes() for p in job.folder.iterdir()} == before

def test_nan_stops(job, monkeypatch):
  before = (job.folder / "model.safetensors").read_bytes()
  job.done, job.args.steps = 6, 8
  weight = job.trainer.weights["language_model.norm.weight"]
  weight.assign(weight * np.nan).realize()
  with pytest.raises(vlm.Fault, match="nan at step 7.*copy, step 8") as e:
    job.train()
  assert e.value.code == 1 and (job.folder / "model.safetensors").read_bytes() == before

def test_places_that_cannot_be_written(refused, tmp_path, monkeypatch, whole):
  (tmp_path / "file").write_text("")
  for save in (tmp_path / "file", tmp_path / "file" / "deeper", "/proc/none"):
    assert str(save) in refused("--save", save, code=1)
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
  assert "free some" in refused("--save", tmp_path / "full", code=1)

# ---- data folders ----
@pytest.fixture
def data(tmp_path):
  folder = tmp_path / "data"
  folder.mkdir()
  lines = []
  for i in range(4):
    shapes.scene(1, i, (64, 64)).image.save(folder / f"{i}.png")
    lines.append(json.dumps({"image": f"{i}.png", "prefix": "caption en", "suffix": f"picture\u2028{i}"},
                            ensure_ascii=False))
  (folder / "data.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
  return folder

BAD = {
  "not JSON": b'{"image": ', "not JSON ": b"\xff\xfe\xff", "not JSON  ": b"[" * 100000,
  "three strings": b"[1, 2]",
  "three strings ": b'{"image": "0.png", "prefix": "x"}',
  "three strings  ": b'{"image": "0.png", "prefix": "x", "suffix": 3}',
  "three strings   ": b'{"image": null, "prefix": "x", "suffix": "y"}',
  "three strings    ": b'{"image": 5, "prefix": "x", "suffix": "y"}',
  "three strings     ": b'{"image": ["0.png"], "prefix": "x", "suffix": "y"}',
  "not UTF-8": b'{"image": "0.png", "prefix": "x", "suffix": "\\ud800"}',
  "suffix is empty": b'{"image": "0.png", "prefix": "x", "suffix": ""}',
  "no such image": b'{"image": "9.png", "prefix": "x", "suffix": "y"}',
  "not an image": b'{"image": "half.png", "prefix": "x", "suffix": "y"}',
  "not an image ": b'{"image": "data.jsonl", "prefix": "x", "suffix": "y"}',
  "not an image  ": b'{"image": "a\\u0000b", "prefix": "x", "suffix": "y"}',
  "do not fit": b'{"image": "0.png", "prefix": "x", "suffix": "' + b"y " * 9000 + b'"}'}

@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "loss.csv", "loss.png", "model.safetensors"])
def test_files_of_the_user_are_never_written_over(name, refused, tmp_path):
  (tmp_path / name).write_text("mine")
  refused("would be lost", "--save", tmp_path, "--steps", "1")
  assert [file.name for file in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"

def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(tmp_path):
  train.Run(train.arguments(["--save", str(tmp_path / "new")])).unlock()
  (tmp_path / "new" / "model.safetensors.part").write_bytes(b"half")
  train.Run(train.arguments(["--save", str(tmp_path / "new")])).unlock()

@pytest.mark.skipif(train.flock is None, reason="no locks")
def test_one_run_in_a_folder(tmp_path, refused):
  run = train.Run(train.arguments(["--save", str(tmp_path / "new")]))
  refused("another run", "--save", tmp_path / "new")
  run.unlock()

def test_damaged_states(whole, refused, tmp_path):
  shutil.copytree(whole, tmp_path / "run")
  state = (whole / "training.state").read_bytes()
  length = int.from_bytes(state[:8], "little")
  header = json.loads(state[8:8 + length])
  run = json.loads(header["__metadata__"]["run"])
  def changed(**what):
    text = json.dumps(header | {"__metadata__": {"run": json.dumps(run | what)}}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + state[8 + length:]
  bare = json.dumps({k: v for k, v in header.items() if k != "__metadata__"}).encode()
  for data in (b"", state[:100], state[:-1], changed(settings=5), changed(step="x"), changed(history=3),
               len(bare).to_bytes(8, "little") + bare + state[8 + length:]):
    (tmp_path / "run" / "training.state").write_bytes(data)
    settings = [word for key in ("steps", "batch", "lr") for word in (f"--{key}", str(run["settings"][key]))]
    assert "training.state" in refused("--resume", "--save", tmp_path / "run", *settings)

def test_bad_lines_are_named(data, refused, tmp_path, capsys):
  (data / "half.png").write_bytes((data / "0.png").read_bytes()[:200])
  good = (data / "data.jsonl").read_bytes()
  command = data, "--init", TINY, "--save", tmp_path / "out"
  for what, line in BAD.items():
    (data / "data.jsonl").write_bytes(good + line)
    err = refused(*command)
    assert "1 bad line" in err and "line 6: " in err and what.strip() in err, err
    assert not (tmp_path / "out").exists()
  (data / "data.jsonl").write_bytes(good + b"\n".join(BAD.values()))
  assert f"{len(BAD)} bad lines" in refused(*command) and f"and {len(BAD) - 5} more" in refused(*command)
  config = vlm.read_config(TINY / "config.json")
  kept = train.Folder(data, vlm.Tokenizer(TINY / "tokenizer.model"), config, 2, skip_bad=True)
  assert kept.found.endswith(f"4 lines, {len(BAD)} bad ones left out") and len(kept.examples) == 4
  (data / "data.jsonl").write_bytes(b"\n".join(BAD.values()))
  assert "no usable line" in refused(*command, "--skip-bad")
  (data / "data.jsonl").unlink()
  assert "data.jsonl" in refused(*command)
  Path(data / "captions.csv").write_text("".join(f"{i % 4}.png,picture {i}\n" for i in range(21)))
  table = train.Folder(data, vlm.Tokenizer(TINY / "tokenizer.model"), config, 2, skip_bad=False)
  assert len(table.examples) == 20 and [e[2] for e in table.held] == [["caption en", "picture 19"]]

def test_every_epoch_shows_every_line(data):
  lines = [json.dumps({"image": "0.png", "prefix": str(i), "suffix": "y"}) for i in range(41)]
  (data / "data.jsonl").write_text("\n".join(lines))
  config = vlm.read_config(TINY / "config.json")
  folder = train.Folder(data, vlm.Tokenizer(TINY / "tokenizer.model"), config, 13, False)
  assert [question[0] for _, _, question in folder.held] == ["19", "39"] and len(folder.examples) == 39
  seen = [[str(ids) for ids in folder.batch(i)[0]] for i in range(6)]
  assert sorted(sum(seen[:3], [])) == sorted(sum(seen[3:], [])) and len(set(sum(seen[:3], []))) == 39
  assert seen[:3] != seen[3:]

def test_fine_tuning(data, tmp_path, monkeypatch, capsys):
  """A bfloat16 checkpoint: its number types, sizes and tokens stay, and so does all that is frozen; its note
  goes."""
  monkeypatch.undo()
  copy_bfloat16(TINY, tmp_path / "half")
  (data / "data.jsonl").open("a").write("oops")
  save = tmp_path / "tuned"
  argv = [str(data), "--init", str(tmp_path / "half"), "--save", str(save), "--steps", "2", "--batch", "2",
          "--part", "attention", "--skip-bad"]
  assert train.main(argv) == 0
  err = capsys.readouterr().err
  assert "4 lines, 1 bad ones left out" in err and "step 2: loss" in err and "'caption en': 'picture" in err
  config, old = (json.loads((folder / "config.json").read_text()) for folder in (save, tmp_path / "half"))
  assert old.pop("note") and config == old
  assert (save / "tokenizer.model").read_bytes() == (TINY / "tokenizer.model").read_bytes()
  before, after = arrays(tmp_path / "half"), arrays(save)
  assert all(a.dtype == np.uint16 for a in after.values()) and before.keys() == after.keys()
  moved = {n for n in before if (before[n] != after[n]).any()}
  assert moved and all(".self_attn." in n and n.startswith("language_model.") for n in moved)

def test_the_toy_world_fits_other_tokenizers():
  codes = functools.partial(codebook.tokens, TOY / "vae-oid.npz")
  for path, texts in ((TINY, 50), (None, 50)):
    if not path:
      shapes.make_tokenizer("own.model")
    tokenizer = vlm.Tokenizer(path / "tokenizer.model" if path else "own.model")
    most = train.longest(tokenizer)
    assert path or most == 36
    for i in range(texts):
      for question in shapes.examples(1, i, 8, codes=codes)[1]:
        assert sum(map(len, train.tokenize(tokenizer, *question))) - 1 <= most

def test_training_goes_on_with_masks(tmp_path, monkeypatch):
  asked, plain = [], shapes.examples
  def examples(*args):
    picture, questions = plain(*args)
    asked.extend(questions)
    return picture, questions
  monkeypatch.setattr(shapes, "examples", examples)
  monkeypatch.setattr(train.Trainer, "step", lambda self, batch, lr: 1.0)
  monkeypatch.setattr(train.Trainer, "loss", lambda self, batch: 1.0)
  command = ["--save", tmp_path / "run", "--steps", "3", "--batch", "16", "--quiet", "--init", TOY]
  assert train.main(list(map(str, command))) == 0
  assert (tmp_path / "run" / "vae-oid.npz").read_bytes() == (TOY / "vae-oid.npz").read_bytes()
  assert any(prefix.startswith("segment ") and suffix.count("<seg") == 16 for prefix, suffix in asked)

# ---- live: photographs, transformers itself ----
def test_live_photographs(tmp_path):
  """20 photographs of scikit-image with captions: a new small model, and then the same one taught another question."""
  if os.environ.get("VLM_LIVE"):  # CI, which must not skip
    importlib.import_module("skimage")
  skimage = pytest.importorskip("skimage", reason="needs scikit-image's photographs: see .ci/run")
  names = ("coffee.png camera.png chessboard_RGB.png astronaut.png color.png gravel.png brick.png logo.png text.png page.png "
           "motorcycle_left.png hubble_deep_field.jpg moon.png grass.png retina.jpg ihc.png cell.png rocket.jpg horse.png "
           "chelsea.png coins.png").split()
  photos = Path(skimage.__file__).parent / "data"
  (tmp_path / "photos").mkdir()
  for name in names:
    shutil.copy(photos / name, tmp_path / "photos")
  table = [(name, f"a photo, {Path(name).stem.replace('_', ' ')}") for name in names]
  (tmp_path / "photos" / "captions.csv").write_text("".join(f'{name},"{text}"\n' for name, text in table))
  new, tuned = tmp_path / "new", tmp_path / "tuned"
  assert vlm.main(["--train", str(tmp_path / "photos"), "--steps", "160", "--save", str(new)]) == 0

  def right(folder, question, texts):
    answers = vlm.load(folder).generate([tmp_path / "photos" / name for name in names], [question] * len(names), max_tokens=48)
    return sum(answer.text == text for answer, text in zip(answers, texts))
  assert right(new, "caption en", [text for _, text in table]) >= 16  # of the 18 it was shown
  lines = [{"image": name, "prefix": "what?", "suffix": Path(name).stem} for name in names]
  (tmp_path / "photos" / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
  assert train.main([str(tmp_path / "photos"), "--init", str(new), "--steps", "160", "--reports", "2",
                     "--save", str(tuned)]) == 0
  assert right(tuned, "what?", [Path(name).stem for name in names]) >= 18


def same_answers(folder, count=20):
  import golden
  reference, model = golden.load(folder), vlm.load(folder)
  for i in range(count):
    image, prefix, _ = shapes.example(shapes.TEST_SEED, i)
    pixels = vlm.to_pixels(image, model.config.vision.image_size)
    right = golden.reference(reference, pixels, model.tokenizer.prompt(prefix), 16)["tokens"][0].tolist()
    [answer] = model.generate([image], [prefix], max_tokens=16)
    assert answer.tokens == right[:right.index(1) if 1 in right else None], (i, prefix)

def need_transformers():
  for package in ("torch", "transformers"):
    if os.environ.get("VLM_LIVE"):  # CI, which must not skip
      importlib.import_module(package)
    pytest.importorskip(package, reason=f"the live comparison needs {package}: see .ci/run")

def test_live_saved_folder(whole):
  need_transformers()
  same_answers(whole)

def test_live_shipped_folder():
  need_transformers()
  same_answers(TOY)
