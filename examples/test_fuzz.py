"""Damaged files of every kind that the programs read: each is read, or refused by a Fault, and nothing else happens. No
other exception, no wait. The seed is printed; VLM_SEED=N repeats it, VLM_FUZZ=N makes the number of inputs another, of
which the full form has 40000.

    VLM_FUZZ=40000 python -m pytest -q -s examples/test_fuzz.py
"""
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import batch
import vlm
from tokenizer import Fault, Tokenizer, parse_boxes

draw, samples = vlm.beside("draw"), vlm.beside("samples")
TINY, TOY = (Path(vlm.__file__).resolve().parent / "weights" / name for name in ("tiny1", "toy"))
SEED = int(os.environ.get("VLM_SEED") or time.time())
COUNT = int(os.environ.get("VLM_FUZZ") or 5000)
LIMIT = 60  # seconds that one input may take, on a busy machine
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="Windows has no alarm")
VALUES = [0, 1, -1, 3, 1.5, 1e300, 1e-300, float("nan"), float("inf"), 2 ** 31, 2 ** 63, 10 ** 400, None, True, "", "x", "1e-6",
          [], [1], {}, {"a": [1]}, "\ud800", "\0", "../../x", "a" * 5000]


def damaged(rng, data):
  """Bytes -> bytes, changed in one to four places, or cut, or with a piece twice."""
  data = bytearray(data)
  for _ in range(rng.randint(1, 4)):
    kind, at = rng.randrange(7), rng.randrange(len(data) + 1) if rng.random() < .5 else rng.randrange(min(len(data), 200) + 1)
    if kind == 0:
      del data[at:]
    elif kind == 1:
      data[at:at] = rng.randbytes(rng.randint(1, 40))
    elif kind == 2:
      del data[at:at + rng.randint(1, 40)]
    elif kind == 3:
      data[at:at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\x27\x10"])
    elif kind == 4:
      data[at:at] = data[at:at + rng.randint(1, 400)]
    else:
      for _ in range(rng.randint(1, 8)):
        if data:
          place = min(len(data) - 1, at + rng.randint(0, 60))
          data[place] ^= 1 << rng.randrange(8)
  return bytes(data)


def pictures(rng):
  """-> {format: bytes of a small picture}, of all that Pillow writes and reads."""
  found = {}
  noise = np.random.default_rng(rng.randrange(2 ** 32)).integers(0, 255, (24, 32, 4), np.uint8)
  Image.init()
  for format in sorted(Image.SAVE.keys() & Image.OPEN.keys() - {"EPS"}):  # EPS would be another program's work
    for mode in ("RGB", "RGBA", "P", "L", "1", "CMYK", "I;16", "F", "LA"):
      with contextlib.suppress(Exception):
        image = Image.fromarray(noise).convert("L" if mode == "I;16" else mode)
        image = image.convert("I").convert("I;16") if mode == "I;16" else image
        image.save(data := io.BytesIO(), format, **({"sizes": [(16, 16)]} if format == "ICO" else {}))
        found[f"{format} {mode}"] = data.getvalue()
  exif = Image.Exif()
  exif[274] = 6
  for format in ("JPEG", "PNG", "WEBP", "TIFF"):
    Image.fromarray(noise[..., :3]).save(data := io.BytesIO(), format, exif=exif)
    found[f"{format} turned"] = data.getvalue()
  return found


def changed(rng, thing):
  """What JSON holds -> the same with another value somewhere in it."""
  keys = list(thing) if isinstance(thing, dict) else list(range(len(thing))) if isinstance(thing, list) else []
  if not keys or rng.random() < .1:
    return rng.choice(VALUES)
  key, thing = rng.choice(keys), thing.copy()
  if rng.random() < .1:
    del thing[key]
  else:
    thing[key] = changed(rng, thing[key])
  return thing


def written(path, data):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)
  return path


def a_picture(rng, folder, found):
  name = rng.choice(sorted(found))
  data = damaged(rng, found[name])
  source = io.BytesIO(data) if rng.random() < .3 else written(folder / "picture", data)
  image = vlm.open_image(source)
  assert image.mode == "RGB"
  assert vlm.to_pixels(image, 28).shape == (1, 3, 28, 28)


def weights(rng, folder, found):
  data = (TINY / "model.safetensors").read_bytes()
  length = int.from_bytes(data[:8], "little")
  if rng.random() < .5:
    header = json.dumps(changed(rng, json.loads(data[8:8 + length]))).encode()
    data = len(header).to_bytes(8, "little") + header + data[8 + length:]
  else:
    data = damaged(rng, data[:8 + length]) + data[8 + length:]
  written(folder / "weights" / "model.safetensors", data)
  for array in vlm.read_weights(folder / "weights").values():
    array.sum(dtype=np.float64)


def a_config(rng, folder, found):
  text = (rng.choice([TINY, TOY, TINY.with_name("tiny2")]) / "config.json").read_bytes()
  config = json.loads(text)
  for _ in range(rng.randint(1, 3)):
    config = changed(rng, config)
  data = damaged(rng, text) if rng.random() < .3 else json.dumps(config).encode()
  written(folder / "config" / rng.choice(["config.json"] * 9 + ["generation_config.json"]), data)
  vlm.PaliGemma(vlm.read_config(folder / "config" / "config.json"))


def a_tokenizer(rng, folder, found):
  path = written(folder / "tokenizer.model", damaged(rng, (rng.choice([TINY, TOY]) / "tokenizer.model").read_bytes()))
  tokenizer = Tokenizer(path, rng.choice([None, 1536]), rng.choice([None, 1535]))
  ids = tokenizer.prompt("detect a red circle ; <loc0001> \u65e5")
  tokenizer.decode(ids)


def a_decoder(rng, folder, found):
  path = written(folder / draw.NAME, damaged(rng, (TOY / draw.NAME).read_bytes()))
  draw.read(path, rng.choice(["decoder", "encoder"]))


def lines(rng, folder, found):
  home = folder / "lines"
  home.mkdir(exist_ok=True)
  for name in ("data.jsonl", "captions.csv"):
    (home / name).unlink(missing_ok=True)
  written(home / "a.png", found["PNG RGB"])
  row = {"image": "a.png", "prefix": "caption en", "suffix": "a cat", "prompt": "caption en"}
  if rng.random() < .7:
    text = "\n".join(json.dumps(changed(rng, row) if rng.random() < .1 else row) for _ in range(12)).encode()
    path = written(home / "data.jsonl", damaged(rng, text) if rng.random() < .5 else text)
  else:
    path = written(home / "captions.csv", damaged(rng, b'image,caption\n' + b'a.png,"a, cat"\n' * 12))
  with contextlib.suppress(Fault):
    samples.read(home)
  for line in batch.List(path):
    line.question(56)


def an_answer(rng, folder, found):
  pieces = ["<loc0000>", "<loc1023>", "<loc1024>", "<loc9999>", "<loc0512>", "<seg000>" * 16, "<seg127>", "<seg128>", " cat", ";",
            "\n", "<", ">", "<loc", "\ufffd", " ", "<loc\u0661\u0662\u0663\u0664>"]
  text = "".join(rng.choices(pieces, k=rng.randint(0, 60)))
  for box in parse_boxes(text, 640, 480):
    assert len(box.box) == 4 and all(0 <= v <= 640 for v in box.box) and len(box.codes) in (0, 16)
    assert all(0 <= code < 128 for code in box.codes)
  tokenizer = found["tokenizer"]
  assert tokenizer.decode(tokenizer.encode(text)).count("<loc1023>") >= text.count("<loc1023>")
  if rng.random() < .1:
    tokenizer.encode(text + rng.choice(["\ud800", "\udcff"]))


KINDS = [a_picture] * 8 + [weights] * 2 + [a_config] * 4 + [a_tokenizer] * 2 + [a_decoder] * 2 + [lines] * 2 + [an_answer] * 2


class Waited(BaseException):
  """One input took LIMIT seconds."""


def test_fuzz(tmp_path, capfd):
  def alarm(*_):
    raise Waited
  found = pictures(random.Random(SEED)) | {"tokenizer": Tokenizer(TOY / "tokenizer.model")}
  images = {name: data for name, data in found.items() if isinstance(data, bytes)}
  wrong, read, before = [], 0, signal.signal(signal.SIGALRM, alarm)
  with capfd.disabled():
    print(f"\nseed {SEED}, {COUNT} inputs, pictures of {len(images)} kinds", flush=True)
  for i in range(COUNT):
    rng = random.Random(f"{SEED} {i}")
    kind = rng.choice(KINDS)
    signal.alarm(LIMIT)
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind(rng, tmp_path, images if kind is a_picture else found)
      read += 1
    except Fault as e:
      if "\n" in str(e) or len(str(e)) > 3000:
        wrong.append((i, kind.__name__, f"{len(str(e))} characters, {str(e).count(chr(10))} line ends: {str(e)[:300]}"))
    except (Exception, Waited) as e:
      wrong.append((i, kind.__name__, f"{type(e).__name__}: {str(e)[:300]}"))
      shutil.copytree(tmp_path, tmp_path.parent / f"wrong-{i}", dirs_exist_ok=True)
    finally:
      signal.alarm(0)
  signal.signal(signal.SIGALRM, before)
  with capfd.disabled():
    print(f"seed {SEED}: {COUNT} inputs, {read} read, {COUNT - read - len(wrong)} refused, {len(wrong)} wrong", flush=True)
  assert not wrong, f"seed {SEED}: " + "\n".join(map(str, wrong))
