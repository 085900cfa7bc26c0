"""One table for a GPU: ours beside transformers as it comes and with a static cache and torch.compile, all on
the same GPU in one run, and what the GPU itself can do.

    python examples/bench_gpu.py DIR --device CUDA [--python REF]

REF is a Python with torch and transformers; without it there is only our column. Each side is a process of
its own; a figure is the median of five. The limits are torch's: bytes copied (read and written) and a large
bfloat16 product.
"""
import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import vlm  # first, because it says what is not installed
import numpy as np
import bench

BATCHES, SIDES, STEPS = (1, 8, 32), (224, 448, 896), 20


def timed(work, repeat=5):
  """-> seconds, the median; the first two calls, which compile, apart."""
  times = []
  for _ in range(repeat + 2):
    start = time.perf_counter()
    work()
    times.append(time.perf_counter() - start)
  return statistics.median(times[2:])


def measure(folder, device, side, batch, start):
  """-> {"load", "first", "prefill" (with vision), "decode" (one step)} in seconds, the first two from the
  start of the process."""
  with bench.resized(side):
    model = vlm.load(folder, device)
  result, P = {"load": time.time() - start, "bytes": bench.bytes_read(model)}, model.config.vision.patches
  T, C = 8, 256 * -(-(P + 8 + STEPS) // 256)
  positions = vlm.layout([len(bench.TEXT)] * batch, P, T, C)
  ids = np.array([[0] * (T - len(bench.TEXT)) + bench.TEXT] * batch)
  picture, slots = bench.pixels(model.config.vision.image_size), vlm.upload(positions, model.device)

  def prefill():
    model.features.clear()  # or it would be remembered
    image = vlm.upload(np.stack([model.vision(picture[0])[1]] * batch), model.device)
    return model.prefill(image, ids, positions)[0].numpy()

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
  model.generate(input_ids=inputs, pixel_values=image.expand(batch, -1, -1, -1),
                 token_type_ids=torch.zeros_like(inputs), attention_mask=torch.ones_like(inputs),
                 do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, **options)
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


def table(folder, device, python=None):
  config = vlm.read_config(folder / "config.json")
  own_side = config.vision.image_size

  def worker(path=folder, side=own_side, batch=1):
    job = json.dumps([device, side, batch, time.time()])
    return bench.run([sys.executable, __file__, path, "--worker", job])
  cold, warm = worker(), worker()  # the first may have to compile
  theirs = {}
  if python:
    with tempfile.TemporaryDirectory() as tmp:
      np.save(f"{tmp}/pixels.npy", bench.pixels(own_side))
      job = {"pixels": f"{tmp}/pixels.npy", "text": bench.TEXT, "batches": BATCHES, "steps": STEPS,
             "start": time.time()}
      theirs = bench.run([python, "-c", THEIRS, folder, device.split(":")[0].lower(), json.dumps(job)])

  def row(name, a, key=None, limit=""):
    cells = [f"{theirs[k]:.4f} | {a / theirs[k]:.2f}" if k in theirs else "- | -"
             for k in (f"eager {key}", f"compiled {key}")]
    print(f"| {name} | {a:.4f} | {' | '.join(cells)} | {limit} |", flush=True)
  print(f"| {folder.name} on {device}, seconds | ours | transformers | ours / theirs | "
        "transformers, compiled | ours / theirs | ours, of the limit |")
  print("|---" * 7 + "|")
  row("process to weights on the GPU", warm["load"], "load")
  row("process to first token, kernels on disk", warm["first"], "first")
  row("process to first token, the first time", cold["first"], "first")
  memory, arithmetic = (theirs.get(key, float("nan")) / 1e12 for key in ("bytes/s", "flop/s"))
  for side in SIDES:
    result = warm if side == own_side else worker(side=side)
    rate = 2e-12 * sum(bench.arithmetic(bench.with_side(config, side), len(bench.TEXT))) / result["prefill"]
    row(f"vision and prefill, {side} px", result["prefill"], "prefill 1" if result is warm else None,
        f"{rate:.1f} of {arithmetic:.0f} TFLOP/s")

  def of_memory(result):
    return f"{result['bytes'] / result['decode'] / 1e12:.2f} of {memory:.2f} TB/s"
  for batch in BATCHES:
    result = warm if batch == 1 else worker(batch=batch)
    row(f"a token, batch {batch}", result["decode"], f"decode {batch}",
        f"{of_memory(result)}, {batch / result['decode']:.0f} tokens/s")
  with bench.quantized_folders(folder) as folders:
    for name, path in folders.items():
      result = worker(path)
      row(f"a token, {name}", result["decode"], "decode 1", of_memory(result))


@vlm.program
def main(argv):
  p = vlm.terminal.ArgumentParser(prog="bench_gpu.py", description="One table of speed for a GPU.", allow_abbrev=False)
  p.add_argument("folder", metavar="DIR", help="PaliGemma's folder or name")
  p.add_argument("--device", metavar="DEV", help="CUDA, METAL, ...")
  p.add_argument("--python", metavar="REF", help="a Python with torch and transformers, to compare with")
  p.add_argument("--worker", help=argparse.SUPPRESS)
  args = p.parse_args(argv)
  folder = vlm.terminal.find_weights(args.folder, bench.ROOT).resolve()
  if args.worker:
    print(json.dumps(measure(folder, *json.loads(args.worker))))
  elif args.device:
    table(folder, args.device, args.python)
  else:
    raise vlm.Fault("which GPU? give --device CUDA, METAL, ...")


if __name__ == "__main__":
  sys.exit(main())
