"""`python examples/bench.py DIR --device CUDA [--python REF]`: one table for a GPU. Ours beside transformers as it comes
and with a static cache and torch.compile, all on the same GPU in one run, and what the GPU itself can do.

Each side is a process of its own; a figure is the median of five. The limits are torch's: bytes copied (read and
written) and a large bfloat16 product. Without REF there is only our column.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

BATCHES, SIDES, STEPS = (1, 8, 32), (224, 448, 896), 20


def timed(work, repeat=5):
  """-> seconds, the median; the first two calls, which compile, apart."""
  times = []
  for _ in range(repeat + 2):
    start = time.perf_counter()
    work()
    times.append(time.perf_counter() - start)
  return statistics.median(times[2:])


def ours(folder, device, bits, side, batch, start):
  """-> {"load", "first", "prefill" (with vision), "decode" (one step)} in seconds, the first two from the start of the
  process."""
  import bench
  import vlm
  with bench.resized(side):
    model = vlm.load(folder, device, bits=bits)
  result, P = {"load": time.time() - start, "bytes": model.bytes}, model.config.patches
  T, C = 8, 256 * -(-(P + 8 + STEPS) // 256)
  where = vlm.layout([len(bench.TEXT)] * batch, P, T, C)
  ids = np.array([[0] * (T - len(bench.TEXT)) + bench.TEXT] * batch)
  picture, slots = bench.pixels(model.config.image_size), vlm.upload(where, model.device)

  def prefill():
    image = model.vision(picture)[1]
    image = image.expand(batch, *image.shape[1:]).contiguous().realize() if batch > 1 else image
    return model.prefill(image, ids, where)[0].numpy()

  def decode():
    next_token = token
    for i in range(STEPS):
      next_token = model.decode(next_token, P + T + i, slots)[0].numpy()
  token = prefill()
  result["first"] = time.time() - start
  return result | {"prefill": timed(prefill), "decode": timed(decode) / STEPS}


THEIRS = """
import json, statistics, sys, time
folder, device, job = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
import numpy as np, torch
from transformers import PaliGemmaForConditionalGeneration
start = job["start"]
torch.set_grad_enabled(False)
model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype="auto").eval().to(device)
result = {"eager load": time.time() - start}
sync = torch.cuda.synchronize if device == "cuda" else lambda: None
side, patch = model.config.vision_config.image_size, model.config.vision_config.patch_size
image = torch.tensor(np.load(job["pixels"])).to(model.dtype).to(device)
ids = [[model.config.image_token_id] * (side // patch) ** 2 + job["text"]]

def answer(batch, tokens, **options):
  inputs = torch.tensor(ids * batch, device=device)
  model.generate(input_ids=inputs, pixel_values=image.expand(batch, -1, -1, -1), token_type_ids=torch.zeros_like(inputs),
                 attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens,
                 **options)
  sync()

def timed(work):
  times = []
  for _ in range(7):
    start = time.perf_counter()
    work()
    times.append(time.perf_counter() - start)
  return statistics.median(times[2:])

answer(1, 1)
result["eager first"] = time.time() - start
for name, options in ("eager", {}), ("compiled", {"cache_implementation": "static"}):
  for batch in job["batches"]:
    one, all = (timed(lambda: answer(batch, n, **options)) for n in (1, job["steps"] + 1))
    result[f"{name} prefill {batch}"], result[f"{name} decode {batch}"] = one, (all - one) / job["steps"]
if device == "cuda":
  a = torch.empty(1 << 31, dtype=torch.uint8, device=device)
  b, m = torch.empty_like(a), torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
  result["bytes/s"] = 2 * a.numel() / timed(lambda: (b.copy_(a), sync()))
  result["flop/s"] = 2 * 8192 ** 3 / timed(lambda: (m @ m, sync()))
print(json.dumps(result))
"""


def run(command):
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
  if done.returncode:
    sys.exit(f"bench: this failed: {' '.join(map(str, command[:4]))} ...")
  return json.loads(done.stdout.splitlines()[-1])


def table(folder, device, python):
  import bench
  import vlm
  config = vlm.read_config(f"{folder}/config.json")

  def worker(bits=None, side=config.image_size, batch=1):
    job = json.dumps([device, bits, side, batch, time.time()])
    return run([sys.executable, __file__, folder, job])
  cold, warm = worker(), worker()  # the first may have to compile
  theirs = {}
  if python:
    with tempfile.TemporaryDirectory() as tmp:
      np.save(f"{tmp}/pixels.npy", bench.pixels(config.image_size))
      job = {"pixels": f"{tmp}/pixels.npy", "text": bench.TEXT, "batches": BATCHES, "steps": STEPS,
             "start": time.time()}
      theirs = run([python, "-c", THEIRS, folder, device.split(":")[0].lower(), json.dumps(job)])

  def row(name, a, key=None, limit=""):
    cells = [f"{theirs[k]:.4f} | {a / theirs[k]:.2f}" if k in theirs else "- | -"
             for k in (f"eager {key}", f"compiled {key}")]
    print(f"| {name} | {a:.4f} | {' | '.join(cells)} | {limit} |", flush=True)
  print(f"| {os.path.basename(os.path.normpath(folder))} on {device}, seconds | ours | transformers | ours / theirs | "
        "transformers, compiled | ours / theirs | ours, of the limit |\n|---|---|---|---|---|---|---|")
  row("process to weights on the GPU", warm["load"], "load")
  row("process to first token, kernels on disk", warm["first"], "first")
  row("process to first token, the first time", cold["first"], "first")
  memory, arithmetic = theirs.get("bytes/s", float("nan")) / 1e12, theirs.get("flop/s", float("nan")) / 1e12
  for side in SIDES:
    result = warm if side == config.image_size else worker(side=side)
    config.patches = (side // config.patch_size) ** 2
    rate = 2e-12 * sum(bench.arithmetic(config, len(bench.TEXT))) / result["prefill"]
    row(f"vision and prefill, {side} px", result["prefill"], "prefill 1" if result is warm else None,
        f"{rate:.1f} of {arithmetic:.0f} TFLOP/s")
  for batch in BATCHES:
    result = warm if batch == 1 else worker(batch=batch)
    row(f"a token, batch {batch}", result["decode"], f"decode {batch}",
        f"{result['bytes'] / result['decode'] / 1e12:.2f} of {memory:.2f} TB/s, {batch / result['decode']:.0f} tokens/s")
  for bits in ("int8", "int4"):
    result = worker(bits=bits)
    row(f"a token, {bits}", result["decode"], "decode 1",
        f"{result['bytes'] / result['decode'] / 1e12:.2f} of {memory:.2f} TB/s")


if __name__ == "__main__":
  sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(os.path.abspath(__file__))]
  print(json.dumps(ours(sys.argv[1], *json.loads(sys.argv[2]))))
