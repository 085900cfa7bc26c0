"""Tests of examples/draw.py: the decoder is worked out again here in numpy, with loops, on random weights."""
import base64
import io
import json
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import shapes
import vlm
from tokenizer import Box, Fault, parse_boxes

draw = vlm.beside("draw")
ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "weights" / "toy"

# ---- a decoder of its own ----
def convolution(x, weight, bias, pad=0):
  """x (c, H, W), weight (out, in, k, k)"""
  k, x = weight.shape[2], np.pad(np.float64(x), ((0, 0), (pad, pad), (pad, pad)))
  H, W = x.shape[1] - k + 1, x.shape[2] - k + 1
  out = np.zeros((len(weight), H, W)) + bias[:, None, None]
  for dy in range(k):
    for dx in range(k):
      out += np.einsum("oi,ihw->ohw", weight[:, :, dy, dx], x[:, dy:dy + H, dx:dx + W])
  return out

def transposed(x, weight, bias):
  """Stride 2, padding 1: each pixel of x (in, H, W) adds weight (in, out, 4, 4) times itself around its
  place."""
  _, H, W = x.shape
  out = np.zeros((weight.shape[1], 2 * H + 2, 2 * W + 2))
  for i in range(H):
    for j in range(W):
      out[:, 2 * i:2 * i + 4, 2 * j:2 * j + 4] += np.einsum("c,cokl->okl", np.float64(x[:, i, j]), weight)
  return out[:, 1:-1, 1:-1] + bias[:, None, None]

def by_hand(w, codes):
  """-> logits (64, 64)"""
  book = w["_vq_vae._embedding"]
  x = np.array([[book[codes[4 * i + j]] for j in range(4)] for i in range(4)]).transpose(2, 0, 1)
  layer = lambda name: (w[f"decoder.{name}.weight"], w[f"decoder.{name}.bias"])
  relu = lambda x: np.maximum(x, 0)
  x = relu(convolution(x, *layer("0")))
  for block in ("2", "3"):
    h = relu(convolution(x, *layer(f"{block}.net.0"), pad=1))
    h = relu(convolution(h, *layer(f"{block}.net.2"), pad=1))
    x = x + convolution(h, *layer(f"{block}.net.4"))
  for name in ("4", "6", "8", "10"):
    x = relu(transposed(x, *layer(name)))
  return convolution(x, *layer("12"))[0]

PUBLISHED = {  # names and shapes of big_vision's decoder, for E = 512
  "_vq_vae._embedding": (128, 512), "decoder.0.weight": (128, 512, 1, 1), "decoder.0.bias": (128,),
  **{f"decoder.{n}.net.{m}.weight": (128, 128, k, k) for n in (2, 3) for m, k in ((0, 3), (2, 3), (4, 1))},
  **{f"decoder.{n}.net.{m}.bias": (128,) for n in (2, 3) for m in (0, 2, 4)},
  "decoder.4.weight": (128, 128, 4, 4), "decoder.4.bias": (128,),
  "decoder.6.weight": (128, 64, 4, 4), "decoder.6.bias": (64,),
  "decoder.8.weight": (64, 32, 4, 4), "decoder.8.bias": (32,),
  "decoder.10.weight": (32, 16, 4, 4), "decoder.10.bias": (16,),
  "decoder.12.weight": (1, 16, 1, 1), "decoder.12.bias": (1,)}

def random_weights(sizes=PUBLISHED, seed=0):
  """About as large as trained ones, so that no layer's output vanishes."""
  rng, w = np.random.default_rng(seed), {}
  for name, shape in sizes.items():
    fan = shape[0] * 4 if shape[2:] == (4, 4) else np.prod(shape[1:])
    scale = 1 if "_vq" in name else (2 / fan) ** .5 if shape[1:] else .3
    w[name] = (rng.standard_normal(shape) * scale).astype(np.float32)
  return w

class Masks(draw.Masks):
  """Those of this folder alone, never of the weights/vae-oid.npz that a user may have."""
  def __init__(self, folder, device=None):
    super().__init__(folder, device or vlm.open_device(None))
    self.places = self.places[:1]

@pytest.fixture
def folder(tmp_path):
  """Writes a vae-oid.npz of these arrays (none: random ones of small sizes) -> its folder."""
  def write(arrays=None, **changed):
    arrays = random_weights(SMALL) if arrays is None else arrays
    np.savez(tmp_path / "vae-oid.npz", **{n: a for n, a in (arrays | changed).items() if a is not None})
    return tmp_path
  return write

SMALL = draw.decoder_shapes(5, (12, 10, 8, 6, 4), (7, 9))

@pytest.mark.parametrize("sizes", [PUBLISHED, SMALL], ids=["published", "small"])
def test_decoder_is_the_one_worked_out_by_hand(sizes, folder):
  rng, w = np.random.default_rng(1), random_weights(sizes)
  found = Masks(folder(w | {"encoder.0.weight": np.zeros((128, 1, 4, 4), np.float32)}))  # the file holds more
  for _ in range(2):
    codes = rng.integers(0, 128, 16).tolist()
    logits, expected = found.logits(codes), by_hand(w, codes)
    assert logits.shape == (64, 64) and logits.dtype == np.float32 and expected.std() > .1
    assert np.abs(logits - expected).max() < 1e-4 * max(1, expected.std())
    assert 0 < (expected > 0).mean() < 1

def test_the_shapes_are_big_visions():
  assert draw.decoder_shapes(512, (128, 128, 64, 32, 16), (128, 128)) == PUBLISHED

# ---- geometry ----
ON, OFF = np.ones((64, 64), np.float32), -np.ones((64, 64), np.float32)

@pytest.mark.parametrize("box,area", [
  ((10, 20, 30, 50), np.s_[20:50, 10:30]), ((0, 0, 97, 61), np.s_[:, :]),
  ((90.9, 60.2, 97, 61), np.s_[60:, 90:]),
  ((0, 0, .9, 61), np.s_[:0]), ((5, 5, 5, 9), np.s_[:0]), ((30, 20, 10, 50), np.s_[:0]),
  ((0.9, 0.9, 2.1, 2.9), np.s_[0:2, 0:2])])
def test_a_mask_that_is_all_on_fills_its_box(box, area):
  found = draw.paste(ON, box, 97, 61)
  expected = np.zeros((61, 97), bool)
  expected[area] = True
  assert found.shape == (61, 97) and found.dtype == bool and np.array_equal(found, expected)
  assert not draw.paste(OFF, box, 97, 61).any()

def test_logits_are_stretched_bilinearly():
  rng, (w, h) = np.random.default_rng(0), (150, 101)
  logits = rng.standard_normal((64, 64)).astype(np.float32)
  y, x = [((np.arange(n) + .5) * 64 / n - .5).clip(0, 63) for n in (h, w)]
  low = [np.minimum(v.astype(int), 62) for v in (y, x)]
  fy, fx = (y - low[0])[:, None], x - low[1]
  at = lambda dy, dx: logits[np.ix_(low[0] + dy, low[1] + dx)]
  expected = (at(0, 0) * (1 - fx) + at(0, 1) * fx) * (1 - fy) + (at(1, 0) * (1 - fx) + at(1, 1) * fx) * fy
  found = draw.paste(logits, (3, 4, 3 + w, 4 + h), 200, 150)
  sure = np.abs(expected) > 1e-4
  assert sure.mean() > .99 and np.array_equal(found[4:4 + h, 3:3 + w][sure], expected[sure] > 0)
  assert not found[:4].any() and not found[:, 153:].any()

def loc(*values):
  return "".join(f"<loc{v:04d}>" for v in values)

def seg(codes):
  return "".join(f"<seg{code:03d}>" for code in codes)

CODES = [tuple(np.random.default_rng(seed).integers(0, 128, 16).tolist()) for seed in range(2)]

def test_several_objects(folder):
  found = Masks(folder())
  text = (f"{loc(0, 0, 1023, 512)}{seg(CODES[0])} cat ; {loc(512, 512, 1023, 1023)}{seg(CODES[1])} dog ; "
          f"{loc(1, 2, 3, 4)} cow")
  cat, dog, cow = boxes = parse_boxes(text, 80, 60)
  assert [box.label for box in boxes] == ["cat", "dog", "cow"]
  assert (cat.codes, dog.codes, cow.codes) == (*CODES, ())
  masks = [found(box, 80, 60) for box in boxes]
  for box, mask in zip((cat, dog), masks):
    assert np.array_equal(mask, draw.paste(by_hand(random_weights(SMALL), box.codes), box.box, 80, 60))
    assert mask.any()
  assert masks[2] is None and not (masks[0][:, 41:].any() or masks[1][:30].any())

@pytest.mark.parametrize("codes", [CODES[0][:15], ()])
def test_a_box_without_all_its_codes_has_no_mask(codes, folder):
  found = Masks(folder())
  box, = parse_boxes(f"{loc(0, 0, 9, 9)}{seg(codes)} cat", 80, 60)
  assert box.codes == () and found(box, 80, 60) is None and box.label == "cat"
  assert found.program is None  # its file is not read for nothing

def test_more_codes_and_none_of_paligemma():
  box, = parse_boxes(f"{loc(0, 0, 9, 9)}{seg(CODES[0] + (3,))} cat", 80, 60)
  assert box.codes == CODES[0]  # the first of them, as in big_vision
  assert parse_boxes(f"{loc(0, 0, 9, 9)}{seg((128,) + CODES[0][1:])} cat", 80, 60) == []

def test_pictures_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  picture = Image.new("RGB", (40, 30), "red")
  (tmp_path / "a.png").write_text("mine")
  with monkeypatch.context() as patch:
    patch.setattr(draw.os, "replace", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(Fault, match="a.png: No space"):
      draw.save_picture(picture, "a.png", [])
  assert [file.name for file in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_text() == "mine"
  (tmp_path / "photo.boxes.png").write_text("mine")
  picture.save("photo.boxes-2.png")
  for _ in range(2):  # the second time over its own
    draw.save_picture(picture, draw.own_name("folder/photo.jpg"), [])
  assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", *(f"photo.boxes{n}.png" for n in ("-2", "-3", ""))]
  assert len(os.fsencode(draw.own_name("x" * 250 + ".png"))) < 256 > len(os.fsencode(draw.own_name("ö" * 120 + ".png")))

@pytest.mark.parametrize("name", ["x.psd", "x.cur", "x.fli", "x.pcd", "y" * 300 + ".png", "x.txt"])
def test_formats_that_are_not_written(name, tmp_path):
  with pytest.raises(Fault, match="must end in|too long"):
    draw.check_output(tmp_path / name, [])

def test_outline_and_overlay():
  image, mask = Image.new("RGB", (190, 180), (200, 200, 200)), np.zeros((180, 190), bool)
  mask[20:60, 30:70] = True
  boxes = parse_boxes(f"{loc(0, 0, 1023, 1023)}{seg(CODES[0])} cat", 190, 180)
  pixels = np.asarray(draw.draw_boxes(image, boxes, [mask])).astype(int)
  [color] = draw.choose_colors(image, ["cat"], [(0, 0, 190, 180)], [mask])
  color = np.array(ImageColor.getrgb(color))
  assert np.abs(pixels[40, 50] - (200 * .55 + color * .45)).max() <= 1  # through it the picture is seen
  assert (pixels[20:22, 30:70] == color).all() and (pixels[20:60, 68:70] == color).all()
  below = np.s_[20:]  # the label is in the corner of the box, above
  assert (pixels[below][~mask[below]] == 200).all() and (pixels[:15] != 200).any()
  inside = pixels[22, 40]  # within the line another one, black or white, whatever is below
  assert inside.min() == inside.max() in (0, 255)

GROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128), "red": (214, 45, 42),
           "green": (42, 172, 75), "yellow": (226, 222, 32), "blue": (30, 60, 200), "orange": (230, 159, 0)}

def without_red_and_green(rgb):
  """as who lacks one of the two cones sees it: Vienot, Brettel and Mollon 1999, in linear light"""
  linear = (np.asarray(rgb, float) / 255) ** 2.2
  both = .11238 * linear[..., 0] + .88762 * linear[..., 1]
  return np.stack([both, both, linear[..., 2]], -1) ** (1 / 2.2) * 255

@pytest.mark.parametrize("ground", GROUNDS)
def test_boxes_stand_out(ground):
  """three labels and a mask, on any ground: from it and from each other, also without red and green"""
  boxes = [Box(name, (20 + 60 * i, 30, 60 + 60 * i, 90)) for i, name in enumerate(("a", "b", "c", "b"))]
  image, mask = Image.new("RGB", (280, 200), GROUNDS[ground]), np.zeros((200, 280), bool)
  mask[120:180, 20:120] = True
  colors = draw.choose_colors(image, [box.label for box in boxes], [box.box for box in boxes], [None] * 4)
  assert colors[1] == colors[3] and len(set(colors)) == 3
  seen = [np.array(rgb, float) for rgb in (GROUNDS[ground], *map(ImageColor.getrgb, colors[:3]))]
  for view in (np.asarray, without_red_and_green):
    apart = [np.linalg.norm(view(seen[i]) - view(seen[j])) for i in range(4) for j in range(i)]
    assert min(apart) > 60, (colors, apart)
  fill = np.asarray(draw.draw_boxes(image, [Box("d", (20, 120, 120, 180), CODES[0])], [mask]), float)[150, 70]
  assert np.linalg.norm(without_red_and_green(fill) - without_red_and_green(seen[0])) > 40, fill

def test_labels_cover_no_other_where_there_is_room(monkeypatch):
  """boxes that share a corner, or lie on top of each other, or at the edges"""
  corners = [(100, 100, 200, 160), (104, 103, 230, 170), (100, 96, 160, 220), (0, 0, 90, 60),
             (330, 240, 399, 299), (150, 130, 160, 140)]
  boxes = [Box(f"label {i}", corner) for i, corner in enumerate(corners)]
  image, taken = Image.new("RGB", (400, 300), "#808080"), []
  plain = ImageDraw.ImageDraw.text
  def text(self, at, words, **options):
    taken.append(self.textbbox(at, words, font=options["font"], anchor=options["anchor"]))
    plain(self, at, words, **options)
  monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
  draw.draw_boxes(image, boxes)
  assert len(taken) == 6
  for i, a in enumerate(taken):
    assert a[0] >= 0 and a[1] >= 0 and a[2] <= 400 and a[3] <= 300
    assert not any(draw.shared(a, b) for b in taken[:i])
    small = corners[5]
    assert not draw.shared(a, small)

@pytest.mark.parametrize("size,drawn", [((20, 10), (260, 130)), ((1, 1), (256, 256)), ((127, 40), (381, 120)),
                                        ((128, 40), (128, 40)), ((3000, 20), (3000, 20))])
def test_tiny_pictures_are_enlarged(size, drawn):
  w, h = size
  mask = np.ones((h, w), bool)
  boxes = [Box("a very long label of a box", (0, 0, w, h)), Box("", (w, h, 0, 0)), Box("mask", (0, 0, w, h))]
  assert draw.draw_boxes(Image.new("RGB", size), boxes, [None, None, mask]).size == drawn

def test_more_labels_than_colors():
  labels = [f"label {i}" for i in range(30)]
  places = [(i, i, 100 + i, 100 + i) for i in range(30)]
  colors = draw.choose_colors(Image.new("RGB", (200, 200)), labels, places, [None] * 30)
  assert set(colors) == set(draw.COLORS) and all(a != b for a, b in zip(colors, colors[1:]))
  assert draw.draw_boxes(Image.new("RGB", (200, 200)), [Box(*pair) for pair in zip(labels, places)])

# ---- the file ----
def fault(folder, match):
  box, = parse_boxes(f"{loc(0, 0, 1023, 1023)}{seg(CODES[0])} cat", 8, 8)
  with pytest.raises(vlm.Fault, match=match) as found:
    Masks(folder)(box, 8, 8)
  assert "\n" not in str(found.value) and "vae-oid.npz" in str(found.value)
  return found.value

def test_wrong_files(folder, tmp_path):
  w = random_weights(SMALL)
  fault(folder(w, **{"decoder.6.bias": None}), "decoder.6.bias")
  fault(folder(w, **{"decoder.6.weight": None}), "decoder.6")
  fault(folder(w, **{"_vq_vae._embedding": None}), "_embedding")
  fault(folder(w, **{"_vq_vae._embedding": np.zeros((64, 5), np.float32)}), "_embedding")
  fault(folder(w, **{"_vq_vae._embedding": np.zeros(128, np.float32)}), "dimension")
  fault(folder(w, **{"decoder.8.weight": np.zeros((8, 6, 3, 3), np.float32)}), "decoder.8.weight")
  fault(folder(w, **{"decoder.12.bias": np.array([np.nan], np.float32)}), "decoder.12.bias")
  fault(folder(w, **{"decoder.12.bias": np.array(["x"])}), "no numbers")
  fault(folder(w, **{"decoder.12.bias": np.array([None])}), "pickle|object|Object")
  fault(folder({"x": np.zeros(3)}), "missing")
  whole = folder(w) / "vae-oid.npz"
  data = whole.read_bytes()
  for broken in (b"", b"text", data[:1000], data[:-300], data[:5000] + b"\0" * 2000 + data[7000:]):
    whole.write_bytes(broken)
    fault(tmp_path, "npz")
  with open(whole, "wb") as file:
    np.save(file, np.zeros(3))
  fault(tmp_path, "npz")
  whole.unlink()
  assert isinstance(fault(tmp_path, "big_vision"), draw.Missing)
  whole.mkdir()
  fault(tmp_path, "npz")

def test_the_places_that_the_file_is_looked_for_in(folder, tmp_path):
  """A model's folder, the one around it, and weights/ of this repository."""
  own, around = tmp_path / "weights" / "model", tmp_path / "weights"
  own.mkdir(parents=True)
  def path():
    found = draw.Masks(own, None)
    assert found.places.pop() == ROOT / "weights" / "vae-oid.npz"
    return found.path
  data = folder() / "vae-oid.npz"
  assert path() is None
  (around / "vae-oid.npz").write_bytes(data.read_bytes())
  assert path() == around / "vae-oid.npz"
  (own / "vae-oid.npz").write_bytes(data.read_bytes())
  assert path() == own / "vae-oid.npz"

# ---- command line ----
@pytest.fixture
def speak(monkeypatch, tmp_path):
  """vlm.main answers with a tiny model that says this, and looks for masks in that folder only; -> picture"""
  model = vlm.load(ROOT / "weights" / "tiny1")
  monkeypatch.setattr(vlm, "load", lambda *args, **options: model)
  monkeypatch.setattr(draw, "Masks", Masks)
  monkeypatch.chdir(tmp_path)
  Image.new("RGB", (180, 120), (90, 120, 130)).save("a.png")
  def say(text, folder):
    def tokens(images, prompts, *args, **options):
      model.timings |= {"vision_s": 0.0, "prefill_s": 0.0, "decode_tok_s": 1.0}
      yield from ([id] for id in model.tokenizer.encode(text))
    monkeypatch.setattr(model, "tokens", tokens)
    model.folder = folder
  return say

def test_masks_on_the_command_line(speak, folder, capsys):
  text = f"{loc(0, 0, 1023, 512)}{seg(CODES[0])} cat ; {loc(512, 512, 1023, 1023)} dog"
  speak(text, folder())
  assert vlm.main(["a.png", "segment cat", "--json", "--out", "out.png"]) == 0
  out, err = capsys.readouterr()
  cat, dog = json.loads(out)["boxes"]
  s = cat["mask"]
  mask = np.array(Image.open(io.BytesIO(base64.b64decode(s))))  # what README.md says
  expected = draw.paste(by_hand(random_weights(SMALL), CODES[0]), (0, 0, 512 / 1023 * 180, 120), 180, 120)
  assert mask.dtype == bool and np.array_equal(mask, expected) and mask.any() and "mask" not in dog
  changed = (np.asarray(Image.open("out.png")) != np.asarray(Image.open("a.png"))).any(2)
  assert changed[mask].all() and "big_vision" not in err

def test_without_the_file_boxes_are_drawn_and_a_line_says_so(speak, tmp_path, capsys):
  text = f"{loc(0, 0, 1023, 512)}{seg(CODES[0])} cat"
  speak(text, tmp_path / "nowhere")
  assert vlm.main(["a.png", "segment cat", "--out", "boxes.png"]) == 0
  out, err = capsys.readouterr()
  assert out == text + "\n" and Image.open("boxes.png").size == (180, 120)
  drawn = np.asarray(Image.open("boxes.png"))
  assert tuple(drawn[60, 0]) in map(ImageColor.getrgb, draw.COLORS)
  assert (drawn[60, 40] == [90, 120, 130]).all()  # a frame, not an area
  said = [line for line in err.splitlines() if "vae-oid.npz" in line]
  assert len(said) == 1 and "big_vision" in said[0] and str(tmp_path / "nowhere") in said[0]
  assert vlm.main(["a.png", "segment cat", "--json", "--quiet"]) == 0
  out, err = capsys.readouterr()
  assert err == "" and list(json.loads(out)["boxes"][0]) == ["label", "box"]

def test_a_wrong_file_is_a_fault_but_the_answer_is_not_lost(speak, folder, capsys):
  text = f"{loc(0, 0, 1023, 512)}{seg(CODES[0])} cat"
  speak(text, folder({"x": np.zeros(3)}))
  assert vlm.main(["a.png", "segment cat", "--out", "boxes.png", "--quiet"]) == 2
  out, err = capsys.readouterr()
  assert out == text + "\n" and err.startswith("vlm: ") and err.count("\n") == 1 and "vae-oid.npz" in err
  assert Image.open("boxes.png").size == (180, 120)

def test_boxes_alone_want_no_file(speak, folder, capsys):
  speak(f"{loc(0, 0, 1023, 512)} cat", folder({"x": np.zeros(3)}))
  assert vlm.main(["a.png", "detect cat", "--out", "boxes.png"]) == 0
  assert "vae-oid" not in capsys.readouterr().err

# ---- the toy ----
def test_the_picture_of_the_readme_is_what_the_toy_draws():
  picture = ROOT / "examples" / "shapes-two.png"
  model, image = vlm.load(TOY), vlm.open_image(picture)
  [answer] = model.generate([picture], ["segment purple square"])
  [box] = answer.boxes
  drawn = shapes.scene(shapes.EXAMPLE_SEED, shapes.EXAMPLES[picture.name], (448, 336))
  [truth] = [obj for obj in drawn.objects if obj.name == "purple square"]
  mask = draw.Masks(model.folder, model.device)(box, *image.size)
  assert box.label == "purple square" and shapes.overlap(mask, shapes.mask(truth)) > .85
  shown = Image.open(ROOT / "examples" / "shapes-mask.png").convert("RGB")
  assert np.array_equal(np.asarray(draw.draw_boxes(image, answer.boxes, [mask])), np.asarray(shown))
