"""Measurements at full size. They need memory and minutes, so they are not in the tests.

    python examples/bench.py DIR                                    speed, memory, and what the machine could do
    python examples/bench.py DIR --vs transformers --python REF     the same beside transformers, as ratios
    python examples/bench.py DIR --check --python REF               top-1 of the prefix logits, ours and transformers'
    python examples/bench.py DIR --quantized [--vs ...]             int8 and int4: speed, and agreement with DIR itself
    python examples/bench.py DIR --sides 224 448 896                seconds and memory of larger pictures
    python examples/bench.py DIR --device CUDA [--python REF]       one table for a GPU
    python examples/bench.py --products                             the matmul kernel beside the machine's limits
    python examples/bench.py --train                                the toy's training step, and where its time goes

REF is a Python with torch and transformers, in an environment of its own (see .ci/run). Every figure is the median of
--repeat processes, ours and theirs by turns, with the machine's own limits measured between them.
"""
import argparse
import contextlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
TOKENS, TEXT = 21, [2, 10, 20, 30, 108]  # tokens to answer, ids of the prompt: 5, as of "caption en"
PROMPTS = ["caption en", "detect cat ; dog", "answer en what color is the square?", "describe en"]


# ---- 1. One process of ours, one of transformers ----
# Each starts cold, answers with 21 tokens, and then repeats vision, prefill and decode. Prints one line of JSON.

def pixels(side):
  return np.random.default_rng(0).uniform(-1, 1, (1, 3, side, side)).astype(np.float32)


@contextlib.contextmanager
def resized(side):
  """Checkpoints differ in the picture's side by their position embedding alone: load one as if it were of `side`."""
  import vlm
  read_config, read_weights = vlm.read_config, vlm.read_weights

  def config(path):
    c = read_config(path)
    c.image_size, c.patches = side or c.image_size, ((side or c.image_size) // c.patch_size) ** 2
    return c

  def weights(folder):
    name, arrays = "vision_tower.embeddings.position_embedding.weight", read_weights(folder)
    arrays[name] = np.resize(arrays[name], (config(folder / "config.json").patches, arrays[name].shape[1]))
    return arrays
  vlm.read_config, vlm.read_weights = config, weights
  yield
  vlm.read_config, vlm.read_weights = read_config, read_weights


def ours(folder, born, steady, bits=None, side=None, choices=0):
  import vlm
  with resized(side):
    model = vlm.load(folder, bits=bits)
  P, image = model.config.patches, pixels(model.config.image_size)
  C, where = 256 * -(-(P + 8 + TOKENS) // 256), None
  where = vlm.layout([len(TEXT)], P, 8, C)
  ids = np.array([[0] * (8 - len(TEXT)) + TEXT])
  slots = vlm.upload(where, model.device)
  marks, result = [], {"load": time.time() - born}

  def vision():
    features = model.vision(image)[1]
    features.numpy()
    return features

  def prefill(features):
    return model.prefill(features, ids, where)[0].numpy()

  def decode(token, count):
    for i in range(count):
      token = model.decode(token, P + 8 + i, slots)[0].numpy()
      marks.append(time.time())
    return token
  token = prefill(features := vision())
  result["first"] = time.time() - born
  decode(token, TOKENS - 1)
  result["last"] = time.time() - born
  times = {"vision": [], "prefill": [], "decode": []}
  for _ in range(steady):
    for name in times:
      start = time.perf_counter()
      {"vision": vision, "prefill": lambda: prefill(features), "decode": lambda: decode(token, 5)}[name]()
      times[name].append((time.perf_counter() - start) / (5 if name == "decode" else 1))
  result |= {name: statistics.median(t) for name, t in times.items() if t}
  result |= {"bytes": model.bytes, "third": marks[1] - marks[0]}
  # the choice after prefixes of random text
  rng, words = np.random.default_rng(1), model.config.vocab // 2  # further up are <loc>, <seg> and rare ones
  texts = [np.array([[0] * 3 + [2, *rng.integers(4, words, 3), 108]]) for _ in range(choices)]
  result["choices"] = [int(model.prefill(features, text, where)[0].numpy()[0]) for text in texts]
  return result


THEIRS = """
import json, resource, statistics, sys, time
folder, born, steady, threads, tokens, text, pixels = sys.argv[1], *map(json.loads, sys.argv[2:7]), sys.argv[7]
import numpy as np, torch
from transformers import PaliGemmaForConditionalGeneration
torch.set_num_threads(threads)
torch.set_grad_enabled(False)
model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
result = {"load": time.time() - born}
image = torch.tensor(np.load(pixels)).to(model.dtype)
patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
ids = torch.tensor([[model.config.image_token_id] * patches + text])

def prefill():
  return model(input_ids=ids, pixel_values=image, token_type_ids=torch.zeros_like(ids),
               attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)

def decode(out, seen, count):
  for _ in range(count):
    seen += 1
    out = model(input_ids=out.logits[:, -1].argmax(-1, keepdim=True), past_key_values=out.past_key_values,
                token_type_ids=torch.ones(1, 1, dtype=torch.long),
                attention_mask=torch.ones(1, seen, dtype=torch.long), use_cache=True)
    out.logits.argmax().item()

def timed(work):
  start = time.perf_counter()
  work()
  return time.perf_counter() - start

out = prefill()
out.logits.argmax().item()
result["first"] = time.time() - born
decode(out, ids.shape[1], tokens - 1)
result["last"] = time.time() - born
vision, both, each = [], [], []
for _ in range(steady):
  vision.append(timed(lambda: model.get_image_features(image)))
  both.append(timed(prefill))
  out = prefill()
  each.append(timed(lambda: decode(out, ids.shape[1], 5)) / 5)
result["vision"] = statistics.median(vision)
result["prefill"] = statistics.median(both) - result["vision"]
result["decode"] = statistics.median(each)
result["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps(result))
"""


def run(command):
  """A process that prints JSON last -> that."""
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
  if done.returncode:
    sys.exit(f"bench: this failed: {' '.join(command[:4])} ...")
  return json.loads(done.stdout.splitlines()[-1])


def run_ours(folder, steady, bits=None, side=0, choices=0):
  return run([sys.executable, __file__, folder, "--worker", json.dumps([time.time(), steady, bits, side, choices])])


def by_turns(folder, python, repeat, kinds):
  """kinds: of weights, None for as they are -> the results of each and, if there is a python, of "transformers"; the
  machine's limits, measured between them."""
  import vlm
  results, ceilings = {kind: [] for kind in (*kinds, "transformers")}, []
  with tempfile.TemporaryDirectory() as tmp:
    np.save(image := f"{tmp}/pixels.npy", pixels(vlm.read_config(Path(folder) / "config.json").image_size))
    for i in range(repeat):
      print(f"round {i + 1} of {repeat}", file=sys.stderr, flush=True)
      ceilings.append(limits())
      for kind in kinds:
        results[kind].append(run_ours(folder, 3, kind))
      if python:
        job = [folder, time.time(), 3, os.cpu_count(), TOKENS, json.dumps(TEXT), image]
        results["transformers"].append(run([python, "-c", THEIRS, *map(str, job)]))
  return results, ceilings


# ---- 2. The machine's limits ----

VECTORS = "typedef float vec __attribute__((vector_size(64), aligned(4)));\n"
PEAK = """
void kernel(float *restrict out, ARGS const int core_id) {
  vec s[24], a = *(vec *)x, b = *(vec *)(x + 16);
  _Pragma("clang loop unroll(full)") for (int i = 0; i < 24; i++) s[i] = (vec){0};
  for (int n = 0; n < 400000; n++)
    _Pragma("clang loop unroll(full)") for (int i = 0; i < 24; i++) { s[i] = STEP; __asm__ volatile("" : "+v"(s[i])); }
  _Pragma("clang loop unroll(full)") for (int i = 1; i < 24; i++) s[0] += s[i];
  *(vec *)(out + 16 * core_id) = s[0];
}"""
READ = """
void kernel(float *restrict out, ARGS const int core_id) {
  vec s[8] = {{0}};
  const float *p = x + SIZE * core_id;
  for (long n = 0; n < SIZE; n += 128)
    _Pragma("clang loop unroll(full)") for (int i = 0; i < 8; i++) s[i] += *(vec *)(p + n + 16 * i);
  _Pragma("clang loop unroll(full)") for (int i = 1; i < 8; i++) s[0] += s[i];
  *(vec *)(out + 16 * core_id) = s[0];
}"""
FLOATS = 1 << 25  # 128 MB a core: beyond every cache


def calls(function, x, count):
  """Seconds of calls of a captured function, but for the first three, which capture it."""
  from tinygrad import Device, TinyJit
  jit, times = TinyJit(function), []
  for _ in range(3 + count):
    Device[x.device].synchronize()
    start = time.perf_counter()
    jit(x)
    Device[x.device].synchronize()
    times.append(time.perf_counter() - start)
  return times[3:]


def limits(portable=False):
  """-> multiply-adds a second in bfloat16 (float32 where the processor has no such instructions, or if portable), bytes
  read a second, by all cores; the best of five runs each."""
  from tinygrad import Tensor, dtypes
  from tinygrad.helpers import CPU_COUNT
  import vlm
  device, cores = vlm.compiled.open_device("CPU"), CPU_COUNT.value
  pairs = "avx512_bf16" in "".join(vlm.compiled.processor()) and not portable
  step = "(vec)__builtin_ia32_dpbf16ps_512(s[i], (pairs)a, (pairs)b)" if pairs else "s[i] + a * b"
  types = VECTORS + "typedef __bf16 pairs __attribute__((vector_size(64)));\n" * pairs
  source = Tensor.ones(FLOATS * cores, device=device).contiguous().realize()

  def rate(code, work):
    def call(x):
      out = Tensor.invalids(16 * cores, dtype=dtypes.float32, device=device)
      return vlm.compiled.c_kernel("limit", {}, {"out": out}, {"x": x}, work * cores, code=types + code).realize()
    return work * cores / min(calls(call, source, 5))
  return (rate(PEAK.replace("STEP", step), 400000 * 24 * (32 if pairs else 16)),
          rate(READ.replace("SIZE", str(FLOATS)), 4 * FLOATS))


def arithmetic(config, text):
  """Multiply-adds of vision and prefill, with those of attention."""
  c, P = config, config.patches
  vision = c.vision_layers * (4 * c.vision_width ** 2 + 2 * c.vision_width * c.vision_mlp + 2 * P * c.vision_width)
  n, wide = P + text, c.heads * c.head_dim
  layer = c.width * (2 * wide + 2 * c.kv_heads * c.head_dim) + 3 * c.width * c.mlp + 2 * n * wide
  return P * (vision + 3 * c.patch_size ** 2 * c.vision_width), P * c.vision_width * c.width + n * c.layers * layer


# ---- 3. Tables ----

ROWS = {"load": "load", "vision": "vision, steady", "prefill": "prefill, steady", "both": "vision + prefill, steady",
        "decode": "decode, a token", "first": "fresh process to token 1", "last": f"fresh process to token {TOKENS}",
        "memory": "peak memory, GB"}


def median(runs, key):
  return statistics.median(run[key] for run in runs)


def compare(folder, python, repeat):
  """The table of README.md."""
  import vlm
  config, text = vlm.read_config(Path(folder) / "config.json"), len(TEXT)
  first = run_ours(folder, 0)  # may have to compile
  results, ceilings = by_turns(folder, python, repeat, [None])
  for result in sum(results.values(), []):
    result["both"] = result["vision"] + result["prefill"]
  peak, read = (statistics.median(c[i] for c in ceilings) for i in (0, 1))
  vision, prefill = arithmetic(config, text)
  work = {"vision": vision, "prefill": prefill, "both": vision + prefill}
  print(f"| {Path(folder).name}, seconds | ours | transformers | ours / theirs | ours, of this machine's limit |")
  print("|---|---|---|---|---|")
  for key, title in ROWS.items():
    a, note = median(results[None], key), ""
    if key in work:
      note = f"{2e-9 * work[key] / a:.0f} of {2e-9 * peak:.0f} GFLOPS"
    elif key == "decode":
      note = f"{results[None][0]['bytes'] / a * 1e-9:.1f} of {read * 1e-9:.1f} GB/s"
    theirs = f"{(b := median(results['transformers'], key)):.3f} | {a / b:.2f}" if python else "- | -"
    print(f"| {title} | {a:.3f} | {theirs} | {note} |")
  print(f"\nlimits in each round: {', '.join(f'{2e-9 * p:.0f} GFLOPS {r * 1e-9:.1f} GB/s' for p, r in ceilings)}; "
        f"third token of a fresh process: {median(results[None], 'third'):.3f} s; first run of all (compiles what was "
        f"not compiled before): {first['first']:.1f} s to token 1")


def quantized(folder, python, repeat):
  """Speed of the quantised weights beside the checkpoint's own, and how often they choose the same token."""
  kinds, prefixes = (None, "int8", "int4"), 64
  choices = {kind: run_ours(folder, 0, kind, 0, prefixes)["choices"] for kind in kinds}
  results, ceilings = by_turns(folder, python, repeat, kinds)
  print("| weights | load, s | prefill, s | decode, ms | of transformers' bfloat16 | GB a token | GB/s | peak memory, "
        f"GB | same first token as unquantised, of {prefixes} |\n|---|---|---|---|---|---|---|---|---|")
  for kind in kinds:
    load, prefill, decode, memory = (median(results[kind], key) for key in ("load", "prefill", "decode", "memory"))
    ratio = f"{decode / median(results['transformers'], 'decode'):.2f}" if python else "-"
    same, size = sum(a == b for a, b in zip(choices[kind], choices[None])), results[kind][0]["bytes"] / 1e9
    print(f"| {kind or 'as they are'} | {load:.1f} | {prefill:.2f} | {decode * 1e3:.0f} | {ratio} | {size:.2f} | "
          f"{size / decode:.1f} | {memory:.2f} | {same} |")
  print(f"\nlimits in each round: {', '.join(f'{read * 1e-9:.1f} GB/s' for _, read in ceilings)}")


def sides(folder, wanted):
  import vlm
  config = vlm.read_config(Path(folder) / "config.json")
  print("| picture | image tokens | vision, s | prefill, s | GFLOPS | peak memory, GB |\n|---|---|---|---|---|---|")
  for side in wanted:
    run_ours(folder, 0, side=side)  # compiles
    result = run_ours(folder, 1, side=side)
    config.patches = (side // config.patch_size) ** 2
    rate = 2e-9 * sum(arithmetic(config, len(TEXT))) / (result["vision"] + result["prefill"])
    print(f"| {side} | {config.patches} | {result['vision']:.2f} | {result['prefill']:.2f} | {rate:.0f} | "
          f"{result['memory']:.2f} |", flush=True)


def products():
  """The matmul kernel beside the machine: multiply-adds for 264 rows, bytes for one."""
  import vlm
  device = vlm.compiled.open_device("CPU")
  rng = np.random.default_rng(0)

  def seconds(rows, inputs, weight):
    x = vlm.upload(rng.standard_normal((rows, inputs), np.float32), device)
    return statistics.median(calls(lambda x: vlm.matmul(x, weight).realize(), x, 9))
  print("| product | measured | limit, same run | of it |\n|---|---|---|---|")
  weight = vlm.upload(rng.integers(0, 1 << 14, (16384, 2048), np.uint16), device)
  for rows in (264, 1032, 4104):
    for portable in (False, True)[:1 + (rows == 264)]:
      vlm.kernels.PORTABLE = portable
      peak = 2e-9 * limits(portable)[0]
      rate = 2e-9 * rows * weight.numel() / seconds(rows, 2048, weight)
      kind = "portable: float32" if portable else "bfloat16"
      print(f"| ({rows}, 2048) @ (16384, 2048).T, {kind} | {rate:.0f} GFLOPS | {peak:.0f} GFLOPS | {rate / peak:.0%} |",
            flush=True)
  vlm.kernels.PORTABLE = False
  for kind in ("bfloat16", "int8", "int4"):
    N = 1 << 17  # beyond every cache
    if kind == "bfloat16":
      weight, size = vlm.upload(rng.integers(0, 1 << 14, (N, 2048), np.uint16), device), 2 * N * 2048
    else:
      data, scale = vlm.quantize.quantize(rng.standard_normal((1, 2048), np.float32), vlm.quantize.BITS[kind])
      data, scale = (vlm.upload(np.repeat(a.astype(kind), N, 0), device) for a, kind in
                     ((data, data.dtype), (scale, np.float32)))
      weight, size = vlm.quantize.Packed(data, scale, 2048), data.nbytes() + scale.nbytes()
    read = 1e-9 * limits()[1]
    rate = 1e-9 * size / seconds(1, 2048, weight)
    print(f"| one row, {kind} | {rate:.1f} GB/s | {read:.1f} GB/s | {rate / read:.0%} |", flush=True)


def training():
  """The toy's training step, by kernel: JIT=2 runs and times them one by one."""
  code = """
import argparse, sys, tempfile, time
import train
from tinygrad.helpers import Context
parser = argparse.ArgumentParser()
train.add_arguments(parser)
with tempfile.TemporaryDirectory() as folder:
  args = parser.parse_args(["--train", "--steps", "100", "--save", folder])
  args.quiet = True
  run = train.Run(args)
  batch = run.trainer.batch(*run.data.batch(0), run.data.text)
  times = []
  for _ in range(20):
    start = time.perf_counter()
    run.trainer.step(batch, 1e-3)
    times.append(time.perf_counter() - start)
  print("step", sorted(times[2:])[9], args.batch, flush=True)
  with Context(DEBUG=2):
    run.trainer.step(batch, 1e-3)
"""
  output = {}
  for jit in ("1", "2"):  # together, as they run; and one by one
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    output[jit] = subprocess.run([sys.executable, "-c", code], env=os.environ | {"JIT": jit, "PYTHONPATH": path},
                                 capture_output=True, text=True, check=True).stdout
  step, batch = map(float, re.search(r"step (\S+) (\S+)", output["1"]).groups())
  kinds = {"matmul": 0, "reductions": 0, "elementwise": 0}
  kernels = {}
  for line in re.sub(r"\x1b\[[0-9;]*m", "", output["2"]).splitlines():
    if found := re.search(r"^\*\*\* CPU\s+\d+\s+(\S+).* tm\s+([0-9.]+)(us|ms)/", line):
      name, took = found[1], float(found[2]) * (1 if found[3] == "ms" else 1e-3)
      kinds["matmul" if "matmul" in name else "reductions" if name.startswith("r_") else "elementwise"] += took
      kernels[name] = kernels.get(name, 0) + took
  total = sum(kinds.values())
  print(f"{batch:.0f} questions a step, {step * 1e3:.0f} ms a step, {batch / step:.0f} questions/s; of the kernels' "
        "time " + ", ".join(f"{name} {took / total:.0%}" for name, took in kinds.items()))
  worst = max((k for k in kernels if "matmul" not in k), key=kernels.get)
  print(f"the largest that is no matmul: {worst}, {kernels[worst] / total:.0%}")


# ---- 4. The same choices as transformers ----

REFERENCE = """
import json, sys
import numpy as np, torch
from transformers import PaliGemmaForConditionalGeneration
folder, job, out = sys.argv[1:]
model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
job, logits = np.load(job), []
pixels, patches = torch.tensor(job["pixels"]).to(model.dtype), int(job["patches"])
for i in range(int(job["count"])):
  ids = torch.tensor([[model.config.image_token_id] * patches + job[f"ids{i}"].tolist()])
  with torch.no_grad():
    out_i = model(input_ids=ids, pixel_values=pixels, token_type_ids=torch.zeros_like(ids),
                  attention_mask=torch.ones_like(ids), logits_to_keep=1)
  logits.append(out_i.logits[0, -1].float().numpy())
np.save(out, np.stack(logits))
"""


def check(folder, python):
  """Compare the prefix logits of a few prompts with transformers' in the checkpoint's own number type -> agreement."""
  import golden
  import vlm
  model, agree = vlm.load(folder), []
  image = golden.pixels(model.config.image_size, 1)
  ours = np.stack([model.logits(image[0], prompt) for prompt in PROMPTS])
  print(f"ours: {model.timings['load_s']:.2f} s load, {model.timings['prefill_s']:.2f} s last prefill", flush=True)
  ids = {f"ids{i}": np.array(model.tokenizer.prompt(prompt)) for i, prompt in enumerate(PROMPTS)}
  patches = model.config.patches
  del model  # two full-size models do not fit the memory of a small machine
  with tempfile.TemporaryDirectory() as tmp:
    job, out = Path(tmp) / "job.npz", Path(tmp) / "out.npy"
    np.savez(job, pixels=image, patches=patches, count=len(PROMPTS), **ids)
    subprocess.run([python, "-c", REFERENCE, folder, job, out], check=True)
    theirs = np.load(out)
  print(f"{'prompt':40}{'ours':>8}{'theirs':>8}{'error / std':>13}{'their margin / std':>20}")
  for prompt, a, b in zip(PROMPTS, ours, theirs):
    error = np.abs(a - b).max() / b.std()
    margin = (b.max() - b[a.argmax()]) / b.std()  # how much less likely they find our token than theirs
    agree.append(a.argmax() == b.argmax() or margin < 2 ** -7 * np.abs(b).max() / b.std())  # bfloat16 keeps 8 bits
    print(f"{prompt:40}{a.argmax():8}{b.argmax():8}{error:13.4f}{margin:20.4f}")
  return all(agree)


def main():
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("folder", metavar="DIR", nargs="?")
  p.add_argument("--vs", choices=["transformers"])
  p.add_argument("--python", metavar="REF")
  p.add_argument("--repeat", type=int, default=3, metavar="N")
  for flag in ("--check", "--quantized", "--products", "--train"):
    p.add_argument(flag, action="store_true")
  p.add_argument("--sides", type=int, nargs="+", metavar="S")
  p.add_argument("--device", metavar="DEV")
  p.add_argument("--worker", help=argparse.SUPPRESS)
  args = p.parse_args()
  if not args.folder and not args.train and not args.products:
    p.error("which checkpoint? give its folder")
  if (args.vs or args.check) and not args.python:
    p.error("--python: a Python with torch and transformers")
  if args.worker:
    result = ours(args.folder, *json.loads(args.worker))
    print(json.dumps(result | {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
  elif args.train:
    training()
  elif args.products:
    products()
  elif args.device:
    import bench_gpu
    bench_gpu.table(args.folder, args.device, args.python)
  elif args.check:
    return 0 if check(args.folder, args.python) else 1
  elif args.quantized:
    quantized(args.folder, args.python if args.vs else None, args.repeat)
  elif args.sides:
    sides(args.folder, args.sides)
  else:
    compare(args.folder, args.python if args.vs else None, args.repeat)
  return 0


if __name__ == "__main__":
  sys.path.insert(0, str(ROOT))
  import vlm
  try:
    sys.exit(main())
  except vlm.Fault as e:
    sys.exit(f"bench: {e}")
