"""Measurements at full size. They need memory and minutes, so the tests run them on a tiny model.

    python examples/bench.py DIR                                speed, memory, what the machine could do
    python examples/bench.py DIR --vs transformers --python REF the same beside transformers, as ratios
    python examples/bench.py DIR --beside CHECKOUT              the same beside another vlm.py, as of before
    python examples/bench.py DIR --peer COMMAND                 the same beside any program, see run_peer
    python examples/bench.py DIR --check --python REF           does transformers choose the same tokens?
    python examples/bench.py DIR --quantized [--vs ...]         8 and 4 bits: speed, agreement with DIR; --vs quanto:
                                                                beside transformers in 8 bits of optimum-quanto, too
    python examples/bench.py DIR --sides 224 448 896            seconds and memory of larger pictures
    python examples/bench.py DIR --texts 5 200                  seconds of longer prompts, in tokens
    python examples/bench.py DIR --batches 1 8 32               pictures a second, so many at once; these three
                                                                go with each other, and with what others are beside
    python examples/bench.py --products                         the matmul kernel beside the machine
    python examples/bench.py --train                            the toy's training step, and its kernels

REF is a Python with torch and transformers, in an environment of its own (see .ci/run). Every figure is the
median of --repeat processes, by turns, with the machine's own limits measured between them. A GPU has
bench_gpu.py.
"""
import argparse
import contextlib
import dataclasses
import json
import os
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
# vlm first, because it says what is not installed. Other modules are imported where they are used: a process
# that is measured needs none.
import vlm
import numpy as np
from tinygrad import Device, Tensor, TinyJit, dtypes
from tinygrad.nn.state import get_state_dict

ROOT = Path(vlm.__file__).resolve().parent
TOKENS, TEXT = 21, [2, 10, 20, 30, 108]  # tokens to answer, ids of the prompt: 5, as of "caption en"
PROMPTS = ["caption en", "detect cat ; dog", "answer en what color is the square?", "describe en"]


# ---- 1. One process of ours, one of transformers ----
# Each starts cold, answers with 21 tokens, and then repeats vision, prefill and decode. Prints one line of
# JSON.

def pixels(side):
  return np.random.default_rng(0).uniform(-1, 1, (1, 3, side, side)).astype(np.float32)


def bytes_read(model):
  """How many bytes of weights a token reads: all of the language model's."""
  return sum(t.nbytes() for t in get_state_dict(model.net.language_model).values())


def with_side(config, side):
  """A Config for pictures of another side, in pixels; None: as it is."""
  vision = dataclasses.replace(config.vision, image_size=side or config.vision.image_size)
  return dataclasses.replace(config, vision=vision)


@contextlib.contextmanager
def resized(side):
  """Checkpoints differ in the picture's side by their position embedding alone: load one as if it were of
  `side`."""
  read_config, read_weights = vlm.read_config, vlm.read_weights

  def config(path):
    return with_side(read_config(path), side)

  def weights(folder):
    name, arrays = "vision_tower.embeddings.position_embedding.weight", read_weights(folder)
    patches = config(folder / "config.json").vision.patches
    return arrays | {name: np.resize(arrays[name], (patches, arrays[name].shape[1]))}
  vlm.read_config, vlm.read_weights = config, weights
  try:
    yield
  finally:
    vlm.read_config, vlm.read_weights = read_config, read_weights


def measure(folder, born, steady, _, side, choices):
  """What a process of ours answers; born: when it was started, steady: how often vision, prefill and decode
  are repeated, side: of the picture, None as it is, choices: after how many random texts the likeliest token
  is told. _ is None: older checkouts, which a run of --beside may start, quantised while loading."""
  with resized(side):
    model = vlm.load(folder)
  P, image = model.config.vision.patches, pixels(model.config.vision.image_size)
  C = 256 * -(-(P + 8 + TOKENS) // 256)
  positions = vlm.layout([len(TEXT)], P, 8, C)
  ids = np.array([[0] * (8 - len(TEXT)) + TEXT])
  slots = vlm.upload(positions, model.device)
  marks, result = [], {"load": time.time() - born}

  def vision():
    model.features.clear()  # or it would be remembered
    return vlm.upload(model.vision(image[0])[1][None], model.device)

  def prefill(features):
    return model.prefill(features, ids, positions)[0].numpy()

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
  work = {"vision": vision, "prefill": lambda: prefill(features), "decode": lambda: decode(token, 5)}
  for _ in range(steady):
    for name in times:
      start = time.perf_counter()
      work[name]()
      times[name].append((time.perf_counter() - start) / (5 if name == "decode" else 1))
  result |= {name: statistics.median(t) for name, t in times.items() if t}
  result |= {"bytes": bytes_read(model), "third": marks[1] - marks[0]}
  # the choice after prefixes of random text
  words = model.config.text.vocab_size // 2  # further up are <loc>, <seg> and rare ones
  rng = np.random.default_rng(1)
  texts = [np.array([[0] * 3 + [2, *rng.integers(4, words, 3), 108]]) for _ in range(choices)]
  result["choices"] = [int(model.prefill(features, text, positions)[0].numpy()[0]) for text in texts]
  return result


THEIRS = """
import json, resource, statistics, sys, time
folder, *numbers, pixels = sys.argv[1:]
born, steady, threads, tokens, text, quanto = map(json.loads, numbers)
import numpy as np, torch
from transformers import PaliGemmaForConditionalGeneration
torch.set_num_threads(threads)
torch.set_grad_enabled(False)
model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
if quanto:
  from optimum.quanto import freeze, qint8, quantize
  quantize(model, weights=qint8)
  freeze(model)
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
  done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True)
  if done.returncode:
    raise vlm.Fault(f"this failed: {' '.join(map(str, command[:4]))} ...", 1)
  return json.loads(done.stdout.splitlines()[-1])


def run_ours(folder, steady, side=None, choices=0, checkout=ROOT):
  job = json.dumps([time.time(), steady, None, side, choices])
  return run([sys.executable, checkout / "examples" / "bench.py", folder, "--worker", job])


def run_theirs(folder, python, quanto=False):
  """One process of transformers. quanto: in 8 bits, which of its ways is the fastest at a token."""
  with tempfile.TemporaryDirectory() as tmp:
    np.save(image := f"{tmp}/pixels.npy", pixels(vlm.read_config(folder / "config.json").vision.image_size))
    job = time.time(), 3, os.cpu_count(), TOKENS, json.dumps(TEXT), int(quanto), image
    return run([python, "-c", THEIRS, folder, *job])


def run_peer(command):
  """One process of a program, given by its words, that answers a picture and prints as its last line a JSON object:
  seconds of vision, prefill and decode (a token), of load, of first and last (the first token, and token TOKENS, since
  it was started), and memory in GB. What it leaves out is not compared. Raises Fault."""
  trouble, found = "", None
  try:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    trouble = f"ends with exit code {done.returncode}" if done.returncode else ""
    found = json.loads(done.stdout.splitlines()[-1])
  except (OSError, ValueError, IndexError) as e:
    trouble = trouble or (f"{e.strerror}" if isinstance(e, OSError) else "prints no JSON in its last line")
  numbers = isinstance(found, dict) and all(isinstance(found.get(key, 0), (int, float)) for key in ROWS)
  if trouble or not numbers or not found.keys() & ROWS.keys():
    raise vlm.Fault(f"--peer {shlex.join(command)}: {trouble or f'prints none of {list(ROWS)} as numbers'}", 1)
  return found


def by_turns(repeat, runs):
  """{name: function that runs a process} -> {name: results}, and the machine's limits, measured between
  them."""
  results, ceilings = {name: [] for name in runs}, []
  for i in range(repeat):
    vlm.terminal.bar(i, repeat, "rounds")
    ceilings.append(limits())
    for name, work in runs.items():
      results[name].append(work())
  vlm.log.debug("")
  return results, ceilings


# ---- 2. The machine's limits ----

PEAK = """
static void share(float *restrict out, ARGS const int core_id) {
  vec s[SUMS], a = *(vec *)x, b = *(vec *)(x + LANES);
  _Pragma("clang loop unroll(full)") for (int i = 0; i < SUMS; i++) s[i] = (vec){0};
  for (int n = 0; n < STEPS; n++)
    _Pragma("clang loop unroll(full)") for (int i = 0; i < SUMS; i++) {
      s[i] = STEP;
      __asm__ volatile("" : REGISTER(s[i]));
    }
  _Pragma("clang loop unroll(full)") for (int i = 1; i < SUMS; i++) s[0] += s[i];
  *(vec *)(out + 16 * core_id) = s[0];
}"""
READ = """
static void share(float *restrict out, ARGS const int core_id) {
  vec s[8] = {{0}};
  const float *p = x + (long)FLOATS * core_id;
  for (long n = 0; n < FLOATS; n += 8 * LANES)
    _Pragma("clang loop unroll(full)") for (int i = 0; i < 8; i++) s[i] += *(vec *)(p + n + LANES * i);
  _Pragma("clang loop unroll(full)") for (int i = 1; i < 8; i++) s[0] += s[i];
  *(vec *)(out + 16 * core_id) = s[0];
}"""
FLOATS = 1 << 25  # 128 MB a core: beyond every cache
STEPS = 400000
OUTPUTS, INPUTS = 16384, 2048  # of a product: Gemma's largest
MANY = 1 << 17  # outputs: beyond every cache
TRAINED = 22    # steps of the toy's training, of which the first two are left out
QUESTIONS = 32  # in one of them


def calls(function, x, count):
  """Seconds of calls of a captured function, but for the first three, which capture it."""
  jit, times = TinyJit(function), []
  for _ in range(3 + count):
    Device[x.device].synchronize()
    start = time.perf_counter()
    jit(x)
    Device[x.device].synchronize()
    times.append(time.perf_counter() - start)
  return times[3:]


def limits(portable=False):
  """-> multiply-adds a second in bfloat16 (float32 where the processor has no such instructions, or if
  portable), bytes read a second, by all cores; the best of five runs each. Raises Fault."""
  device, cores, known = vlm.open_device("CPU"), vlm.kernels.THREADS, "".join(vlm.kernels.processor())
  if not vlm.kernels.runs_c(device):
    raise vlm.Fault("the machine's limits are measured in C, which this device does not run", 1)
  # numbers in a vector, sums at a time (fewer than registers), and what C calls a register: AVX-512, AVX2,
  # NEON
  lanes, sums, register = 4, 24, "+w"
  if "avx2" in known:
    lanes, sums, register = (16, 24, "+v") if "avx512f" in known else (8, 12, "+x")
  pairs = "avx512_bf16" in known and not portable
  types = f"typedef float vec __attribute__((vector_size({4 * lanes}), aligned(4)));\n"
  types += "typedef __bf16 pairs __attribute__((vector_size(64)));\n" * pairs
  step = "(vec)__builtin_ia32_dpbf16ps_512(s[i], (pairs)a, (pairs)b)" if pairs else "s[i] + a * b"
  defines = {"LANES": lanes, "SUMS": sums, "REGISTER": f'"{register}"', "STEP": step, "STEPS": STEPS,
             "FLOATS": FLOATS}
  source = Tensor.ones(FLOATS * cores, device=device).contiguous().realize()

  def rate(code, work):
    def call(x):
      out = {"out": Tensor.invalids(16 * cores, dtype=dtypes.float32, device=device)}
      return vlm.kernels.c_kernel("limit", defines, out, {"x": x}, work * cores, code=types + code).realize()
    return work * cores / min(calls(call, source, 5))
  return rate(PEAK, STEPS * sums * lanes * (2 if pairs else 1)), rate(READ, 4 * FLOATS)


def arithmetic(config, text):
  """Multiply-adds of vision and prefill, with those of attention."""
  v, c, P = config.vision, config.text, config.vision.patches
  block = 4 * v.hidden_size ** 2 + 2 * v.hidden_size * v.intermediate_size + 2 * P * v.hidden_size
  vision = P * (v.num_hidden_layers * block + 3 * v.patch_size ** 2 * v.hidden_size)
  n, queries = P + text, c.num_attention_heads * c.head_dim
  layer = c.hidden_size * (2 * queries + 2 * c.num_key_value_heads * c.head_dim + 3 * c.intermediate_size)
  layer += 2 * n * queries
  return vision, P * v.hidden_size * c.hidden_size + n * c.num_hidden_layers * layer


# ---- 3. Tables ----

ROWS = {"load": "load", "vision": "vision, steady", "prefill": "prefill, steady",
        "both": "vision + prefill, steady", "decode": "decode, a token", "first": "fresh process to token 1",
        "last": f"fresh process to token {TOKENS}", "memory": "peak memory, GB"}


def median(runs, key):
  return statistics.median(run[key] for run in runs)


def compare(folder, repeat, python=None, checkout=None, peer=None):
  """The table of examples/README.md."""
  runs = {"ours": lambda: run_ours(folder, 3)}
  if checkout:
    run_ours(folder, 0, checkout=checkout)  # may have to compile
    runs[checkout.name] = lambda: run_ours(folder, 3, checkout=checkout)
  if python:
    runs["transformers"] = lambda: run_theirs(folder, python)
  if peer is not None:
    runs["peer"] = lambda: run_peer(peer)
  first = run_ours(folder, 0)  # may have to compile
  results, ceilings = by_turns(repeat, runs)
  for result in sum(results.values(), []):
    if "vision" in result and "prefill" in result:
      result["both"] = result["vision"] + result["prefill"]
  peak, read = (statistics.median(c[i] for c in ceilings) for i in (0, 1))
  vision, prefill = arithmetic(vlm.read_config(folder / "config.json"), len(TEXT))
  work = {"vision": vision, "prefill": prefill, "both": vision + prefill}
  _, *others = runs
  columns = [f"{folder.name}, seconds", "ours", *(f"{name} | ours / {name}" for name in others)]
  print(f"| {' | '.join(columns)} | ours, of this machine's limit |")
  print("|---" * (3 + 2 * len(others)) + "|")
  for key, title in ROWS.items():
    a, note = median(results["ours"], key), ""
    if key in work:
      note = f"{2e-9 * work[key] / a:.0f} of {2e-9 * peak:.0f} GFLOPS"
    elif key == "decode":
      note = f"{results['ours'][0]['bytes'] / a * 1e-9:.1f} of {read * 1e-9:.1f} GB/s"
    known = [all(key in result for result in results[name]) and median(results[name], key) for name in others]
    cells = [f"{b:.3f} | {a / b:.2f}" if b else "- | -" for b in known]
    print(f"| {' | '.join([title, f'{a:.3f}', *cells])} | {note} |")
  rounds = ", ".join(f"{2e-9 * p:.0f} GFLOPS {r * 1e-9:.1f} GB/s" for p, r in ceilings)
  third = median(results["ours"], "third")
  print(f"\nlimits in each round: {rounds}; third token of a fresh process: {third:.3f} s; "
        f"first run of all (compiles what was not compiled before): {first['first']:.1f} s to token 1")


@contextlib.contextmanager
def quantized_folders(folder):
  """-> {"int8": folder, "int4": folder}, made for as long as they are needed, by processes of their own: Linux
  counts the memory of a process in that of those which it starts."""
  with tempfile.TemporaryDirectory() as tmp:
    folders = {f"int{bits}": Path(tmp) / f"int{bits}" for bits in (8, 4)}
    for name, made in folders.items():
      command = [sys.executable, ROOT / "examples" / "quantize.py", folder, made, "--bits", name[3:], "--quiet"]
      subprocess.run(command, check=True)
    yield folders


def quantized(folder, repeat, python=None, quanto=False):
  """Speed of the quantised weights beside the checkpoint's own, and how often they choose the same token."""
  prefixes = 16
  with quantized_folders(folder) as made:
    folders = {"as they are": folder} | made
    choices = {name: run_ours(path, 0, choices=prefixes)["choices"] for name, path in folders.items()}
    runs = {name: lambda path=path: run_ours(path, 3) for name, path in folders.items()}
    if python:
      runs["transformers"] = lambda: run_theirs(folder, python)
    if quanto:
      runs["transformers, int8"] = lambda: run_theirs(folder, python, quanto)
    results, ceilings = by_turns(repeat, runs)
  for result in sum(results.values(), []):
    result["both"] = result["vision"] + result["prefill"]
  columns = ["weights", "vision, s", "prefill, s", "both / as they are", "both / transformers", "a token, ms",
             "a token / transformers", "GB a token", "GB/s", "peak memory, GB",
             f"same first token as unquantised, of {prefixes}"]
  print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")

  def ratio(name, key, other):
    return f"{median(results[name], key) / median(results[other], key):.2f}" if other in results else "-"
  for name in folders:
    vision, prefill, decode, memory = (median(results[name], key) for key in ("vision", "prefill", "decode", "memory"))
    same = sum(a == b for a, b in zip(choices[name], choices["as they are"]))
    size = results[name][0]["bytes"] / 1e9
    print(f"| {name} | {vision:.2f} | {prefill:.2f} | {ratio(name, 'both', 'as they are')} | "
          f"{ratio(name, 'both', 'transformers')} | {decode * 1e3:.0f} | {ratio(name, 'decode', 'transformers')} | "
          f"{size:.2f} | {size / decode:.1f} | {memory:.2f} | {same} |")
  for name in [name for name in results if name not in folders]:
    seconds = (f"{key} {median(results[name], key):.3f} s" for key in ("vision", "prefill", "decode"))
    print(f"\n{name}: {', '.join(seconds)}, {median(results[name], 'memory'):.2f} GB")
  print(f"\nlimits in each round: {', '.join(f'{read * 1e-9:.1f} GB/s' for _, read in ceilings)}")


def sides(folder, wanted):
  print("| picture | image tokens | vision, s | prefill, s | beside the first | GFLOPS | peak memory, GB |")
  print("|---" * 7 + "|")
  first = None
  for side in wanted:
    run_ours(folder, 0, side=side)  # compiles
    result = run_ours(folder, 1, side=side)
    config = with_side(vlm.read_config(folder / "config.json"), side)
    both = result["vision"] + result["prefill"]
    rate, first = 2e-9 * sum(arithmetic(config, len(TEXT))) / both, first or both
    print(f"| {side} | {config.vision.patches} | {result['vision']:.2f} | {result['prefill']:.2f} | "
          f"{both / first:.1f} | {rate:.0f} | {result['memory']:.2f} |", flush=True)


def texts(folder, lengths):
  """Prompts of so many tokens, which random pieces of text are cut to."""
  model = vlm.load(folder)
  P, image = model.config.vision.patches, pixels(model.config.vision.image_size)
  features = vlm.upload(model.vision(image[0])[1][None], model.device)
  print("| tokens of the prompt | prefill, s | beside the first | of the limit | a token, ms | of the limit |")
  print("|---" * 6 + "|")
  first = None
  for length in lengths:
    T, times = 8 * -(-length // 8), {"prefill": [], "decode": []}
    C = 256 * -(-(P + T + TOKENS) // 256)
    positions = vlm.layout([length], P, T, C)
    slots = vlm.upload(positions, model.device)
    ids = np.array([[0] * (T - length) + [2, *range(10, 8 + length), 108][-length:]])
    for _ in range(4):  # the first one compiles
      start = time.perf_counter()
      token = model.prefill(features, ids, positions)[0].numpy()
      times["prefill"].append(time.perf_counter() - start)
      start = time.perf_counter()
      for i in range(5):
        token = model.decode(token, P + T + i, slots)[0].numpy()
      times["decode"].append((time.perf_counter() - start) / 5)
    prefill, decode = (statistics.median(t[1:]) for t in times.values())
    (multiply, read), first = limits(), first or prefill
    shares = arithmetic(model.config, length)[1] / multiply / prefill, bytes_read(model) / read / decode
    print(f"| {length} | {prefill:.3f} | {prefill / first:.1f} | {shares[0]:.0%} | {decode * 1e3:.1f} | {shares[1]:.0%} |", flush=True)


def batches(folder, sizes):
  """A caption of TOKENS tokens for each of so many pictures at once, beside what the machine's limits allow."""
  model = vlm.load(folder)
  numbers = sum(t.numel() for t in get_state_dict(model.net.language_model).values())  # in a token: multiply-adds
  side, rng = model.config.vision.image_size, np.random.default_rng(0)
  print("| pictures at once | vision, s | prefill, s | decode, s | pictures/s | beside the first | of the limit |")
  print("|---" * 7 + "|")
  first = None
  for size in sizes:
    for _ in range(2):  # the first one compiles
      images = [rng.uniform(-1, 1, (3, side, side)).astype(np.float32) for _ in range(size)]
      token, _, positions, slot = model.prefix(images, PROMPTS[:1] * size, TOKENS)
      start = time.perf_counter()
      for i in range(TOKENS - 1):
        token = model.decode(token, slot + i, positions)[0].numpy()
      decode = time.perf_counter() - start
    vlm.log.debug("")  # clears the line that the row is about to be on
    multiply, read = limits()
    vision, prefill = model.timings["vision_s"], model.timings["prefill_s"]
    limit = size * sum(arithmetic(model.config, len(TEXT))) / multiply
    limit += (TOKENS - 1) * max(bytes_read(model) / read, size * numbers / multiply)
    total = vision + prefill + decode
    first = first or size / total
    print(f"| {size} | {vision:.3f} | {prefill:.3f} | {decode:.3f} | {size / total:.3g} | {size / total / first:.1f} | "
          f"{limit / total:.0%} |", flush=True)


def products():
  """The matmul kernel beside the machine: multiply-adds for 264 rows, bytes for one."""
  import quantize
  device = vlm.open_device("CPU")
  rng = np.random.default_rng(0)

  def seconds(rows, weight):
    x = vlm.upload(rng.standard_normal((rows, INPUTS), np.float32), device)
    return statistics.median(calls(lambda x: vlm.matmul(x, weight).realize(), x, 9))
  print("| product | measured | limit, same run | of it |\n|---|---|---|---|")
  weight = vlm.upload(rng.integers(0, 1 << 14, (OUTPUTS, INPUTS), np.uint16), device)
  for rows, portable in ((264, False), (264, True), (1032, False), (4104, False)):
    vlm.kernels.PORTABLE = portable
    peak = 2e-9 * limits(portable)[0]
    rate = 2e-9 * rows * weight.numel() / seconds(rows, weight)
    kind = "portable: float32" if portable else "bfloat16"
    print(f"| ({rows}, {INPUTS}) @ ({OUTPUTS}, {INPUTS}).T, {kind} | {rate:.0f} GFLOPS | {peak:.0f} GFLOPS | "
          f"{rate / peak:.0%} |", flush=True)
  vlm.kernels.PORTABLE = False
  for bits in (16, 8, 4):
    if bits == 16:
      weight = vlm.upload(rng.integers(0, 1 << 14, (MANY, INPUTS), np.uint16), device)
      size = weight.nbytes()
    else:
      row, scale = quantize.quantize(rng.standard_normal((1, INPUTS), np.float32), bits)
      row, scale = (np.repeat(array, MANY, 0) for array in (row, scale.astype(np.float32)))
      data, scale = vlm.upload(row, device), vlm.upload(scale, device)
      weight, size = vlm.kernels.Packed(data, scale, (MANY, INPUTS)), data.nbytes() + scale.nbytes()
    read = 1e-9 * limits()[1]
    rate = 1e-9 * size / seconds(1, weight)
    print(f"| one row, {bits} bits | {rate:.1f} GB/s | {read:.1f} GB/s | {rate / read:.0%} |", flush=True)


def training():
  """The toy's training step, by kernel: JIT=2 runs and times them one by one."""
  code = """
import os, statistics, sys, tempfile, time
import train
from tinygrad.helpers import Context
if os.environ["JIT"] == "2":
  train.vlm.kernels.KEPT = 0  # a kept program is one call, whatever JIT says
with tempfile.TemporaryDirectory() as folder:
  args = train.arguments(["--steps", "100", "--batch", sys.argv[2], "--save", folder, "--quiet"])
  run = train.Run(args)
  batch = run.trainer.batch(*run.data.batch(0), run.data.text)
  times = []
  for _ in range(int(sys.argv[1])):
    start = time.perf_counter()
    run.trainer.step(batch, 1e-3)
    times.append(time.perf_counter() - start)
  print("step", statistics.median(times[2:]), args.batch, flush=True)
  with Context(DEBUG=2):
    run.trainer.step(batch, 1e-3)
"""
  output = {}
  for jit, steps in ("1", TRAINED), ("2", 3):  # together, as they run; and one by one
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    env = os.environ | {"JIT": jit, "PYTHONPATH": path}
    command = [sys.executable, "-c", code, str(steps), str(QUESTIONS)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
      raise vlm.Fault("the training step failed", 1)
    output[jit] = done.stdout
  step, batch = map(float, re.search(r"step (\S+) (\S+)", output["1"]).groups())
  kinds = {"matmul": 0, "reductions": 0, "elementwise": 0}
  kernels = {}
  for line in re.sub(r"\x1b\[[0-9;]*m", "", output["2"]).splitlines():
    if found := re.search(r"^\*\*\* CPU\s+\d+\s+(\S+).* tm\s+([0-9.]+)(us|ms)/", line):
      name, took = found[1], float(found[2]) * (1 if found[3] == "ms" else 1e-3)
      rest = "reductions" if name.startswith("r_") else "elementwise"
      kinds["matmul" if "matmul" in name else rest] += took
      kernels[name] = kernels.get(name, 0) + took
  total = sum(kinds.values())
  shares = ", ".join(f"{name} {took / total:.0%}" for name, took in kinds.items())
  print(f"{batch:.0f} questions a step, {step * 1e3:.0f} ms a step, {batch / step:.0f} questions/s; "
        f"of the kernels' time {shares}")
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
  """Compare the prefix logits of a few prompts with transformers' in the checkpoint's own number type ->
  agreement."""
  import golden
  model, agree = vlm.load(folder), []
  image = golden.pixels(model.config.vision.image_size, 1)
  ours = np.stack([model.prefix([image[0]], [prompt], 1)[1].numpy()[0] for prompt in PROMPTS])
  took = model.timings
  print(f"ours: {took['load_s']:.2f} s load, {took['prefill_s']:.2f} s last prefill", flush=True)
  ids = {f"ids{i}": np.array(model.tokenizer.prompt(prompt)) for i, prompt in enumerate(PROMPTS)}
  patches = model.config.vision.patches
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
    rounding = 2 ** -7 * np.abs(b).max() / b.std()  # bfloat16 keeps 8 bits
    agree.append(a.argmax() == b.argmax() or margin < rounding)
    print(f"{prompt:40}{a.argmax():8}{b.argmax():8}{error:13.4f}{margin:20.4f}")
  return all(agree)


MODES = "check", "quantized", "products", "train"
TABLES = {"sides": sides, "texts": texts, "batches": batches}  # after the first table, if that is asked for
GOES_WITH = {"vs": ("", "quantized"), "beside": ("",), "peer": ("",), "repeat": ("", "quantized"),
             "python": ("", "quantized", "check")}


@vlm.program
def main(argv):
  p = vlm.terminal.ArgumentParser(prog="bench.py", description="Measure speed and memory at full size.", allow_abbrev=False)
  p.add_argument("folder", metavar="DIR", nargs="?", help="PaliGemma's folder or name")
  p.add_argument("--vs", choices=["transformers", "quanto"],
                 help="beside transformers, as ratios; quanto: in 8 bits too; needs --python")
  p.add_argument("--beside", metavar="CHECKOUT", type=Path, help="beside another vlm.py, as ratios")
  p.add_argument("--peer", type=shlex.split, metavar="COMMAND",
                 help="beside a program that prints its seconds as JSON, as ratios")
  p.add_argument("--python", metavar="REF", help="a Python with torch and transformers")
  p.add_argument("--repeat", type=int, metavar="N", help="processes of each kind (default 3)")
  modes = p.add_mutually_exclusive_group()
  modes.add_argument("--check", action="store_true", help="does transformers choose the same tokens?")
  modes.add_argument("--quantized", action="store_true", help="8 and 4 bits: speed, agreement with DIR")
  modes.add_argument("--products", action="store_true", help="the matmul kernel beside the machine's limits")
  modes.add_argument("--train", action="store_true", help="the toy's training step, where its time goes")
  modes.add_argument("--worker", help=argparse.SUPPRESS)
  p.add_argument("--sides", type=int, nargs="+", metavar="S", help="seconds and memory of other pictures")
  p.add_argument("--texts", type=int, nargs="+", metavar="N", help="seconds of prompts of so many tokens")
  p.add_argument("--batches", type=int, nargs="+", metavar="N", help="pictures a second, so many at once")
  args = p.parse_args(argv)
  mode = next((mode for mode in MODES if getattr(args, mode)), "")
  repeat = 3 if args.repeat is None else args.repeat
  tables = {name: values for name in TABLES if (values := getattr(args, name))}
  beside = bool(args.vs or args.beside or args.peer is not None)
  for option, where in (GOES_WITH | dict.fromkeys(tables, ("",))).items():
    if getattr(args, option) is not None and mode not in where:
      raise vlm.Fault(f"--{option} does not go with --{mode}")
  if args.repeat and tables and not beside:
    raise vlm.Fault(f"--repeat does not go with --{[*tables][0]} alone")
  without_model = mode in ("products", "train")
  if without_model and args.folder:
    raise vlm.Fault(f"--{mode} is of no checkpoint; leave out {args.folder}")
  if not without_model and not args.folder:
    raise vlm.Fault("which checkpoint? give its folder")
  if bool(args.python) != bool(args.vs or args.check):
    raise vlm.Fault("--vs and --check, and nothing else, go with --python REF")
  if args.beside and not (args.beside / "examples" / "bench.py").is_file():
    raise vlm.Fault(f"--beside {args.beside}: there is no examples/bench.py")
  if repeat < 1 or min(sum(tables.values(), [1])) < 1:
    raise vlm.Fault("--repeat, --sides, --texts and --batches: at least 1")
  if args.vs == "quanto" and mode != "quantized":
    raise vlm.Fault("--vs quanto goes with --quantized")
  if mode == "products":
    return products()
  if mode == "train":
    return training()
  folder = vlm.terminal.find_weights(args.folder, ROOT).resolve()
  if args.worker:
    result = measure(folder, *json.loads(args.worker))
    print(json.dumps(result | {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
  elif mode == "check":
    return 0 if check(folder, args.python) else 1
  elif mode == "quantized":
    quantized(folder, repeat, args.python, args.vs == "quanto")
  else:
    if beside or not tables:
      compare(folder, repeat, args.python, args.beside and args.beside.resolve(), args.peer)
    for i, (name, values) in enumerate(tables.items()):
      if beside or i:
        print()
      TABLES[name](folder, values)


if __name__ == "__main__":
  sys.exit(main())
