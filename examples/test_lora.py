"""Tests of lora.py, by_layer.py, score.py and LoRA in train.py. `-k live` compares with PEFT on transformers'
model, both ways, and needs torch, transformers and peft."""
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import by_layer
import checkpoint
import quantize
import shapes
import train
import vlm

lora = vlm.beside("lora")
ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "weights"
KINDS = "tiny1", "tiny2"
PROMPT = "caption en"

def pixels(seed=0, count=1):
  return np.random.default_rng(seed).uniform(-1, 1, (count, 3, 56, 56)).astype(np.float32)

def logits(model):
  return model.prefix([pixels()[0]], [PROMPT], 8)[1].numpy()[0]

def random_adapter(folder, kind="tiny1", rank=4, vision=True, change=None, alpha=8, size=0.2, **settings):
  """A folder with an adapter whose B is not zero."""
  folder.mkdir(exist_ok=True)
  rng, tensors = np.random.default_rng(1), {}
  shapes_of = {n: t.shape for n, t in get_state_dict(vlm.PaliGemma(vlm.read_config(WEIGHTS / kind / "config.json"))).items()}
  names = [n.removesuffix(".weight") for n in shapes_of if n.endswith(".weight")]
  for name in [n for n in names if lora.re.fullmatch(lora.pattern(vision), n)]:
    outputs, inputs = shapes_of[name + ".weight"]
    for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
      tensors[f"{lora.PREFIX}{name}.lora_{part}.weight"] = size * rng.standard_normal(shape).astype(np.float32)
  if change:
    change(tensors)
  save_file(tensors, folder / lora.WEIGHTS)
  config = lora.config(rank, alpha, vision, WEIGHTS / kind) | settings
  (folder / lora.CONFIG).write_text(json.dumps(config))
  return folder

# ---- using one ----
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_sum_of_its_products(kind, tmp_path):
  """Logits of a model with an adapter, of one whose weights are W + scale B A, and of the plain one."""
  folder = random_adapter(tmp_path / "a", kind)
  model = vlm.load(WEIGHTS / kind, adapter=folder)
  arrays = {n: np.array(a) for n, a in vlm.read_weights(WEIGHTS / kind).items()}
  pairs, scale, _ = lora.read(folder)
  assert scale == 2 and len(pairs) == 6 * model.config.vision.num_hidden_layers + 7 * model.config.text.num_hidden_layers
  for name, (a, b) in pairs.items():
    arrays[f"{name}.weight"] += scale * b @ a
  shutil.copytree(WEIGHTS / kind, tmp_path / "m")
  for file in (tmp_path / "m").glob("model*safetensors*"):
    file.unlink()
  save_file({checkpoint.hub_name(n): a for n, a in arrays.items()}, tmp_path / "m" / "model.safetensors")
  got, merged, plain = logits(model), logits(vlm.load(tmp_path / "m")), logits(vlm.load(WEIGHTS / kind))
  assert np.abs(got - merged).max() < 1e-4 * merged.std() and np.abs(got - plain).max() > 0.1 * plain.std()

@pytest.mark.parametrize("bits", [8, 4])
def test_an_adapter_on_quantised_weights(bits, tmp_path):
  quantize.save(WEIGHTS / "tiny1", tmp_path / "q", bits)
  folder = random_adapter(tmp_path / "a")
  plain = vlm.load(tmp_path / "q")
  pairs, scale, _ = lora.read(folder)
  model = vlm.load(tmp_path / "q", adapter=folder)
  layer, _ = lora.find(plain.net, "language_model.layers.0.mlp.up_proj")
  adapted = model.net.language_model.layers[0].mlp.up_proj
  x = np.random.default_rng(0).standard_normal((3, 48)).astype(np.float32)
  a, b = pairs["language_model.layers.0.mlp.up_proj"]
  want = layer(Tensor(x)).numpy() + scale * x @ a.T @ b.T
  assert np.abs(adapted(Tensor(x)).numpy() - want).max() < 1e-4 * want.std()
  assert np.isfinite(logits(model)).all()

def test_rslora_older_names_and_half_precision(tmp_path):
  """Names of transformers 4, float16, and alpha / sqrt(r)."""
  def older(tensors):
    for name in list(tensors):
      t = tensors.pop(name).astype(np.float16)
      name = name.replace("model.model.language_model.", "model.language_model.model.")
      tensors[name.replace("model.model.vision_tower.", "model.vision_tower.vision_model.")] = t
  right, scale, _ = lora.read(random_adapter(tmp_path / "a", alpha=4))
  found, root, _ = lora.read(random_adapter(tmp_path / "b", alpha=4, change=older, use_rslora=True))
  assert (scale, root) == (1, 2) and found.keys() == right.keys()
  assert all(np.abs(a - b).max() < 1e-2 for n in right for a, b in zip(right[n], found[n]))

REFUSED = [({"use_dora": True}, None, "use_dora"), ({"bias": "all"}, None, "bias"), ({"peft_type": "IA3"}, None, "IA3"),
           ({"rank_pattern": {"q_proj": 2}}, None, "rank_pattern"), ({"alpha_pattern": {"q_proj": 2}}, None, "alpha_pattern"),
           ({"layer_replication": [[0, 1]]}, None, "layer_replication"), ({"r": 3}, None, "rank 3"), ({"r": 0}, None, "r and"),
           ({}, lambda t: t.update({"base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)}), "lm_head"),
           ({}, lambda t: t.update({"x.lora_magnitude_vector": np.zeros(2, np.float32)}), "magnitude"),
           ({}, lambda t: t.pop(next(n for n in t if "lora_B" in n)), "no A and B"), ({}, dict.clear, "no adapter"),
           ({}, lambda t: t.update({n.replace("layers.0", "layers.9"): t[n] for n in list(t) if "layers.0" in n}), "layers.9"),
           ({}, lambda t: t.update({n: np.zeros((4, 7), np.float32) for n in t if "lora_A" in n}), "another model")]

@pytest.mark.parametrize("settings,change,said", REFUSED, ids=[said for *_, said in REFUSED])
def test_what_is_not_supported_is_refused_by_name(settings, change, said, tmp_path, capsys):
  folder = random_adapter(tmp_path / "a", change=change, **settings)
  code = vlm.main([str(ROOT / "examples" / "shapes.png"), PROMPT, "--weights", str(WEIGHTS / "tiny1"), "--adapter", str(folder)])
  out, err = capsys.readouterr()
  assert code == 2 and out == "" and said in err.splitlines()[-1] and "Traceback" not in err

@pytest.mark.parametrize("name,content", [(lora.CONFIG, None), (lora.WEIGHTS, None), (lora.CONFIG, b"[]"), (lora.WEIGHTS, b"123")])
def test_damaged_adapters(name, content, tmp_path):
  folder = random_adapter(tmp_path / "a")
  (folder / name).unlink()
  if content:
    (folder / name).write_bytes(content)
  with pytest.raises(vlm.Fault, match=name):
    vlm.load(WEIGHTS / "tiny1", adapter=folder)

@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_folder_answers_alike(kind, tmp_path):
  folder = random_adapter(tmp_path / "a", kind)
  assert train.main(["--merge", str(folder), "--init", str(WEIGHTS / kind), "--save", str(tmp_path / "m")]) == 0
  right = logits(vlm.load(WEIGHTS / kind, adapter=folder))
  assert np.abs(logits(vlm.load(tmp_path / "m")) - right).max() < 1e-4 * right.std()

def test_merging_keeps_number_types_and_leaves_the_rest(tmp_path):
  """bfloat16 is rounded to the nearest; what no adapter names is the same to the bit."""
  source = {n: np.array(a) for n, a in vlm.read_weights(WEIGHTS / "tiny1").items()}
  half = {n: checkpoint.Later(a.shape, np.uint16, lambda a=a: a) for n, a in source.items()}
  config = json.loads((WEIGHTS / "tiny1" / "config.json").read_text())
  checkpoint.write(tmp_path / "half", config, WEIGHTS / "tiny1" / "tokenizer.model", half)
  folder = random_adapter(tmp_path / "a", vision=False)
  train.merge(folder, tmp_path / "half", tmp_path / "m")
  before, after = vlm.read_weights(tmp_path / "half"), vlm.read_weights(tmp_path / "m")
  pairs, scale, _ = lora.read(folder)
  for name, array in after.items():
    assert array.dtype == np.uint16
    if name.removesuffix(".weight") in pairs:
      a, b = pairs[name.removesuffix(".weight")]
      old, new = ((t.astype(np.uint32) << 16).view(np.float32) for t in (before[name], array))
      right = old + scale * b @ a
      assert (np.abs(new - right) <= 2 ** -8 * np.abs(right) + 1e-30).all()
    else:
      assert (array == before[name]).all()

# ---- measuring, and COCO ----
def test_eval_counts(tmp_path, capsys, monkeypatch):
  """Answers that are known: one exact, one with half of the boxes, one wrong."""
  shapes.make(tmp_path / "scenes", 10, 1)
  lines = [{"image": f"{i:06}.png", "prefix": "detect a", "suffix": suffix} for i, suffix in enumerate((
    "<loc0000><loc0000><loc0511><loc0511> a", "<loc0000><loc0000><loc0511><loc0511> a ; <loc0600><loc0600><loc0900><loc0900> a",
    "yes"))]
  (tmp_path / "scenes" / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  text = lines[0]["suffix"]
  def generate(self, images, prompts, **options):
    return [vlm.Answer(text, [], vlm.parse_boxes(text, *image.size)) for image in images]
  monkeypatch.setattr(vlm.VLM, "generate", generate)
  assert train.main([str(tmp_path / "scenes"), "--eval", "--weights", str(WEIGHTS / "tiny1"), "--quiet"]) == 0
  assert capsys.readouterr().out == "exact 0.333 of 3, boxes right 0.667 of 3, mean IoU 0.667\n"
  assert vlm.open_image(tmp_path / "worst.png").size[0] == 900
  mine = tmp_path / "worst.png"
  mine.write_text("mine")
  assert "worst.png" in refuses(capsys, tmp_path / "scenes", "--eval", "--weights", WEIGHTS / "tiny1")
  assert mine.read_text() == "mine"

def coco(folder, change=None, count=10):
  """A folder in COCO's form: a 100 x 50 picture has a cat at (10, 5) to (60, 30), and a dog."""
  folder.mkdir()
  for i in range(count):
    Image.new("RGB", (100, 50)).save(folder / f"{i}.png")
  content = {"images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 50} for i in range(count)],
             "categories": [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}],
             "annotations": [{"image_id": i, "category_id": c, "bbox": box} for i in range(count)
                             for c, box in ((7, [0, 0, 100, 50]), (1, [10, 5, 50, 25]))]}
  if change:
    change(content)
  (folder / "instances.json").write_text(json.dumps(content))
  return folder

def test_coco(tmp_path):
  found = vlm.beside("samples").read(coco(tmp_path / "c"))
  path, question, answer = found[0]
  assert len(found) == 10 and path.name == "0.png" and question == "detect cat ; dog"
  assert answer == "<loc0102><loc0102><loc0614><loc0614> cat ; <loc0000><loc0000><loc1023><loc1023> dog"
  cat, dog = vlm.parse_boxes(answer, 100, 50)
  assert cat.box == pytest.approx((10, 5, 60, 30), abs=0.1) and dog.box == pytest.approx((0, 0, 100, 50))

@pytest.mark.parametrize("change,said", [
  (lambda c: c["annotations"][3].update(bbox=[1, 2, 3]), "annotation 4"), (lambda c: c.pop("images"), "needs images"),
  (lambda c: c["annotations"][0].update(category_id=3), "annotation 1"), (lambda c: c["images"][2].update(width=0), "COCO"),
  (lambda c: c["images"][2].update(file_name="no.png"), "image 3: no.png: no such image")])
def test_bad_coco(change, said, tmp_path):
  with pytest.raises(vlm.Fault, match=said):
    vlm.beside("samples").read(coco(tmp_path / "c", change))

# ---- gradients ----
def example(model, rows=4, text=24):
  """A batch with prompts and answers of several lengths, of two pictures."""
  rng, c = np.random.default_rng(0), model.config
  pairs = [([2] + rng.integers(3, 500, n + 2).tolist(), rng.integers(3, 500, n).tolist() + [1]) for n in range(1, rows + 1)]
  sequence = vlm.collate(c.text, c.vision.patches, pairs, text)
  return pairs, [vlm.upload(t, model.device) for t in (pixels(3, 2 if rows > 1 else 1), *sequence)]

@pytest.mark.long
@pytest.mark.parametrize("kind", ["tiny2"])  # windows and soft-caps; the live test compares both kinds with PEFT's
def test_gradients_by_layer_are_those_of_the_whole(kind):
  model = vlm.load(WEIGHTS / kind)
  _, batch = example(model)
  weights = get_state_dict(model.net)
  for t in weights.values():
    t.replace(Tensor(t.numpy()).realize()).is_param_()
  with vlm.kernels.train():
    value = vlm.loss(model.net, *batch)
    right = value.gradient(*weights.values())
    value.realize(*right)
  apart, some, all_of_them = (by_layer.Layers(model.net, model.config, set(weights), together) for together in (0, 1, 9))
  for layers in (apart, apart, some, all_of_them):  # captured, replayed
    loss, found = layers.gradients(batch)
    assert layers.loss(batch) == pytest.approx(loss, rel=1e-6)
    assert loss == pytest.approx(value.item(), rel=1e-5) and found.keys() == weights.keys()
    for name, g in zip(weights, right):
      if not name.endswith("k_proj.bias"):  # zero but for rounding: softmax sees differences
        assert np.abs(found[name] - g.numpy()).max() < 1e-4 * np.abs(g.numpy()).max(), name

def adapted(folder, *options, kind="tiny1", count=24):
  """-> a run of LoRA on pictures of shapes, ready to start."""
  scenes = folder.parent / "scenes"
  if not scenes.exists():
    shapes.make(scenes, count, 1)
  args = ["--init", WEIGHTS / kind, "--save", folder, "--part", "lora", "--steps", 4, "--batch", 2, "--reports", 2, *options]
  return train.Run(train.arguments([str(word) for word in [scenes, *args]]))

@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
  monkeypatch.setattr(train.Run, "report", lambda self: None)  # a sample answer compiles two more programs
  monkeypatch.chdir(tmp_path)

@pytest.mark.long
def test_several_batches_are_one(tmp_path):
  """One update from four batches of one row is that from one batch of four."""
  found = {}
  for rows, n in ((4, 1), (1, 4)):
    job = adapted(tmp_path / f"r{rows}", "--batch", rows, "--accumulate", n)
    batches = [job.trainer.batch(*job.data.batch(i), job.data.text) for i in range(n)]
    loss = job.trainer.step(batches[0], 1e-2, batches[1:])
    found[rows] = loss, {name: t.numpy() for name, t in job.trainer.weights.items()}
    job.unlock()
  assert found[4][0] == pytest.approx(found[1][0], rel=1e-5)
  for name, t in found[4][1].items():
    assert np.abs(t - found[1][1][name]).max() < 2e-3, name  # Adam makes a step of every size from noise

@pytest.mark.long
def test_a_run_writes_an_adapter_that_is_used_and_nothing_else_moves(tmp_path):
  job = adapted(tmp_path / "run", "--lr", 1e-2, "--vision")
  before = {n: t.numpy().copy() for n, t in get_state_dict(job.model.net).items() if ".lora_" not in n}
  plain = logits(vlm.load(WEIGHTS / "tiny1"))
  job.train()
  job.unlock()
  assert {f.name for f in (tmp_path / "run").iterdir()} == {
    lora.CONFIG, lora.WEIGHTS, "training.state", "loss.csv", "loss.png"}
  assert all((t.numpy() == before[n]).all() for n, t in get_state_dict(job.model.net).items() if n in before)
  used = logits(vlm.load(WEIGHTS / "tiny1", adapter=tmp_path / "run"))
  assert np.abs(used - logits(job.model)).max() < 1e-4 * used.std() and np.abs(used - plain).max() > 0.01 * plain.std()

@pytest.mark.long
def test_resume_equals_an_uninterrupted_run(tmp_path):
  whole = adapted(tmp_path / "whole", "--accumulate", 2)
  whole.train()
  part = adapted(tmp_path / "part", "--accumulate", 2)
  step = part.trainer.step
  def twice(*args):
    part.stop = part.done == 1  # as Ctrl-C does
    return step(*args)
  part.trainer.step = twice
  part.train()
  assert part.done == 2
  for job in (whole, part):
    job.unlock()
  again = adapted(tmp_path / "part", "--accumulate", 2, "--resume")
  again.train()
  again.unlock()
  for name in (lora.WEIGHTS, "training.state"):
    right, found = load_file(tmp_path / "whole" / name), load_file(tmp_path / "part" / name)
    assert all((right[n] == found[n]).all() for n in right) and right.keys() == found.keys()

@pytest.mark.long
def test_an_adapter_on_int4_learns(tmp_path):
  quantize.save(WEIGHTS / "tiny1", tmp_path / "q", 4)
  job = adapted(tmp_path / "run", "--init", tmp_path / "q")
  batch = job.trainer.batch(*job.data.batch(0), job.data.text)
  losses = [job.trainer.step(batch, 1e-2) for _ in range(20)]
  job.unlock()
  assert losses[-1] < losses[0] - 1

def refuses(capsys, *argv, code=2):
  got = train.main([str(word) for word in argv])
  err = capsys.readouterr().err.splitlines()
  assert got == code and "Traceback" not in "".join(err), err
  return err[-1]

def test_what_cannot_be_trained(tmp_path, capsys, monkeypatch):
  shapes.make(tmp_path / "scenes", 20, 1)
  quantize.save(WEIGHTS / "tiny1", tmp_path / "q", 8)
  base = [tmp_path / "scenes", "--save", tmp_path / "out", "--steps", 2]
  assert "--init" in refuses(capsys, "--part", "lora", "--save", tmp_path / "o")
  assert "--part lora" in refuses(capsys, *base, "--init", tmp_path / "q")
  assert "--rank" in refuses(capsys, *base, "--init", WEIGHTS / "tiny1", "--rank", 4)
  assert "--rank" in refuses(capsys, *base, "--init", WEIGHTS / "tiny1", "--part", "lora", "--rank", 0)
  monkeypatch.setattr(train.vlm.kernels, "free_memory", lambda: 10 ** 8)
  said = refuses(capsys, *base, "--init", WEIGHTS / "tiny1", "--batch", 4, code=1)
  assert "0.1 GB are free" in said and "--part lora" in said and "--batch 1 --accumulate 4" in said
  assert not (tmp_path / "out").exists()

def test_defaults_by_size(tmp_path):
  """A checkpoint of over half a billion weights gets LoRA, and no part of it a rate that would wreck it."""
  def settled(weights, *words):
    args = train.arguments(["data", "--init", "x", *words])
    train.settle(args, weights)
    return args.part, args.batch, args.accumulate, args.lr, args.reports, args.by_layer
  assert settled(3 * 10 ** 9) == ("lora", 1, 8, 2e-4, 5, True)
  assert settled(3 * 10 ** 9, "--part", "all") == ("all", 1, 8, 1e-5, 5, True)
  assert settled(3 * 10 ** 9, "--part", "projector", "--lr", "1e-3")[3] == 1e-3
  assert settled(2 * 10 ** 6) == ("all", 32, 1, 1e-3, train.REPORTS, False)
  assert settled(2 * 10 ** 6, "--part", "lora") == ("lora", 32, 1, 2e-4, 5, True)

# ---- live ----
@pytest.fixture(scope="module")
def peft():
  """PEFT, with torch and transformers; the test is skipped without, unless VLM_LIVE is set."""
  if not os.environ.get("VLM_LIVE"):
    for name in ("torch", "transformers", "peft"):
      pytest.importorskip(name)
  import peft
  import torch
  import transformers
  def model(kind):
    return transformers.PaliGemmaForConditionalGeneration.from_pretrained(WEIGHTS / kind, attn_implementation="eager")
  return SimpleNamespace(peft=peft, torch=torch, model=model)

def their_logits(peft, theirs, ours):
  ids = peft.torch.tensor([[ours.config.image] * ours.config.vision.patches + ours.tokenizer.prompt(PROMPT)])
  with peft.torch.no_grad():
    out = theirs.eval()(input_ids=ids, pixel_values=peft.torch.tensor(pixels()), attention_mask=peft.torch.ones_like(ids),
                        token_type_ids=peft.torch.zeros_like(ids))
  return out.logits[0, -1].numpy()

def assert_same(got, right):
  assert np.abs(got[:len(right)] - right).max() < 1e-4 * right.std()

@pytest.mark.parametrize("kind", KINDS)
def test_live_peft_reads_ours(kind, peft, tmp_path):
  job = adapted(tmp_path / "run", "--lr", 1e-2, "--vision", "--rank", 4, kind=kind)
  job.train()
  job.unlock()
  theirs = peft.peft.PeftModel.from_pretrained(peft.model(kind), tmp_path / "run")
  ours = vlm.load(WEIGHTS / kind, adapter=tmp_path / "run")
  right = their_logits(peft, theirs, ours)
  assert_same(logits(ours), right)
  assert np.abs(right - logits(vlm.load(WEIGHTS / kind))[:len(right)]).max() > 0.01 * right.std()

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "fc1", "down_proj"], "modules_to_save": ["multi_modal_projector"]},
                                      {"target_modules": "all-linear", "use_rslora": True},
                                      {"target_modules": r".*language_model.*(k_proj|up_proj)"}])
def test_live_we_read_pefts(kind, settings, peft, tmp_path):
  theirs = peft.peft.get_peft_model(peft.model(kind), peft.peft.LoraConfig(r=4, lora_alpha=6, **settings))
  peft.torch.manual_seed(0)
  for name, w in theirs.named_parameters():
    if "lora_B" in name or "modules_to_save" in name:
      w.data += 0.1 * peft.torch.randn_like(w)
  theirs.save_pretrained(tmp_path / "a")
  ours = vlm.load(WEIGHTS / kind, adapter=tmp_path / "a")
  assert_same(logits(ours), their_logits(peft, theirs, ours))

@pytest.mark.parametrize("kind", KINDS)
def test_live_gradients_are_pefts(kind, peft, tmp_path):
  """Every adapter's gradient, of four rows with padding."""
  folder = random_adapter(tmp_path / "a", kind, size=0.05)  # large ones make much of rounding
  torch, model = peft.torch, vlm.load(WEIGHTS / kind)
  names = sorted(lora.read(folder)[0])
  lora.create(model.net, names, 4, 8, lambda array: vlm.upload(array, model.device))
  weights = {n: t for n, t in get_state_dict(model.net).items() if ".lora_" in n}
  values = load_file(folder / lora.WEIGHTS)
  for n, t in get_state_dict(model.net).items():
    t.is_param_(n in weights)
  for n, t in weights.items():
    t.assign(Tensor(values[lora.PREFIX + n])).realize()
  rows, batch = example(model)
  loss, found = by_layer.Layers(model.net, model.config, set(weights)).gradients(batch)
  theirs = peft.peft.PeftModel.from_pretrained(peft.model(kind), folder, is_trainable=True).train()
  P, image = model.config.vision.patches, model.config.image
  longest = max(len(prompt + answer) for prompt, answer in rows)
  def padded(value, row, fill):
    return row + [fill] * (P + longest - len(row))
  ids = torch.tensor([padded(0, [image] * P + prompt + answer, 0) for prompt, answer in rows])
  seen = torch.tensor([padded(0, [1] * (P + len(prompt + answer)), 0) for prompt, answer in rows])
  kinds = torch.tensor([padded(0, [0] * (P + len(prompt)) + [1] * len(answer), 1) for prompt, answer in rows])
  labels = torch.tensor([padded(0, [-100] * (P + len(prompt)) + answer, -100) for prompt, answer in rows])
  pictures = torch.tensor(batch[0].numpy()).repeat_interleave(2, 0)
  # position ids from 0: padding is at the end, as here
  out = theirs(input_ids=ids, pixel_values=pictures, attention_mask=seen, token_type_ids=kinds, labels=labels)
  out.loss.backward()
  assert loss == pytest.approx(out.loss.item(), rel=1e-4)
  right = {n.replace(".default", ""): p.grad.numpy() for n, p in theirs.named_parameters() if p.requires_grad}
  assert {lora.PREFIX + n for n in found} == right.keys()
  for n, g in found.items():
    want = right[lora.PREFIX + n]
    assert np.abs(g - want).max() <= 1e-4 * np.abs(want).max(), n
