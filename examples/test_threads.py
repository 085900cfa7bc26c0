"""Tests of threads.c: kernels share their work among threads, and a program is one call of many kernels."""
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Device, Tensor, TinyJit, UOp, dtypes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # vlm.py, wherever this is started from
import vlm

fast = vlm.kernels
pytestmark = pytest.mark.skipif(not fast.runs_c(vlm.open_device("CPU")), reason="no C compiler")
several = pytest.mark.skipif(fast.THREADS < 2, reason="one core")
MUCH = 1 << 30  # multiply-adds: more than one thread's

# Each part waits, for some seconds at most, until the other one has begun too.
MEET = """
static void share(float *restrict out, ARGS const int core_id) {
  volatile float *met = out;
  met[core_id] = 1;
  for (long n = 0; n < 1000000000 && met[1 - core_id] != 1; n++);
  met[2 + core_id] = met[1 - core_id];
}"""
# The first part ends when the second one has begun, and that one takes its time.
SLOW = """
static void share(float *restrict out, ARGS const int core_id) {
  volatile float *met = out;
  if (core_id == 0) for (long n = 0; n < 1000000000 && met[1] != 1; n++);
  else {
    met[1] = 1;
    for (volatile long n = 0; n < 30000000; n++);
    met[0] = 1;
  }
}"""
COUNT = """
static void share(float *restrict out, ARGS const int core_id) {
  for (volatile long n = 0; n < STEPS; n++);
  out[core_id] += x[core_id] + core_id;
}"""


def zeros(n, device="CPU"):
  return Tensor(np.zeros(n, np.float32), device=device).realize()


def count(out, x, wait=0):
  """-> out after one addition of x and of the number of each part, after so many steps of waiting; it is a kernel
  of as many parts as threads."""
  return fast.c_kernel(f"count_{wait}", {"STEPS": wait}, {"out": out}, {"x": x}, MUCH, code=COUNT)


def normal(*shape, seed=0):
  return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


@several
def test_parts_run_at_the_same_time(monkeypatch):
  monkeypatch.setattr(fast, "THREADS", 2)
  for pause in (0, 0, .3):  # after which all sleep
    time.sleep(pause)
    out = fast.c_kernel("meet", {}, {"out": zeros(4)}, {}, MUCH, code=MEET)
    assert out.numpy().tolist() == [1, 1, 1, 1]


@several
def test_all_parts_have_ended(monkeypatch):
  monkeypatch.setattr(fast, "THREADS", 2)
  assert fast.c_kernel("slow", {}, {"out": zeros(2)}, {}, MUCH, code=SLOW).numpy().tolist() == [1, 1]


@pytest.mark.parametrize("parts", [1, 2, 3, 64, 1000])
def test_each_part_runs_once(parts, monkeypatch):
  """However many there are, and however many threads."""
  monkeypatch.setattr(fast, "THREADS", parts)
  out, x = zeros(parts), Tensor(normal(parts), device="CPU").realize()
  step = TinyJit(lambda out, x: count(out, x).realize())
  for _ in range(100):
    step(out, x)
  assert np.allclose(out.numpy(), 100 * (x.numpy() + np.arange(parts)), rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 5, 40, 300])
def test_a_product_does_not_depend_on_them(rows, threads, monkeypatch):
  monkeypatch.setattr(fast, "THREADS", threads)
  monkeypatch.setattr(fast, "SHARED", 0)
  a, b = normal(rows, 97), normal(131, 97)
  found = vlm.matmul(Tensor(a, device="CPU"), Tensor(b, device="CPU").realize()).numpy()
  assert np.allclose(found, a @ b.T, atol=1e-3)


def test_two_callers_at_once(monkeypatch):
  """The one that comes second does its work alone."""
  monkeypatch.setattr(fast, "THREADS", 2)

  def work(device):
    vlm.open_device(device)
    out, x = zeros(2, device), Tensor(np.ones(2, np.float32), device=device).realize()
    step = TinyJit(lambda out, x: count(out, x, 100_000).realize())  # long enough for the two to meet
    for _ in range(3):
      step(out, x)
    return step, out, x
  programs = [work("CPU"), work("CPU:1")]

  def repeat(program):
    step, out, x = program
    for _ in range(100):
      step(out, x)
    return out.numpy().tolist()
  with ThreadPoolExecutor(2) as pool:
    assert list(pool.map(repeat, programs)) == [[103, 206]] * 2


def test_who_waits_takes_no_time():
  count(zeros(fast.THREADS), zeros(fast.THREADS)).realize()
  Device["CPU"].synchronize()
  time.sleep(.1)
  before = time.process_time()
  time.sleep(.5)
  assert time.process_time() - before < .1


def test_as_many_as_are_asked_for():
  code = ("import threading, vlm; vlm.open_device('CPU'); "
          "print(vlm.kernels.THREADS, sum(t.daemon for t in threading.enumerate()))")
  told = {}
  for threads in ("1", "3"):
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"VLM_THREADS": threads},
                         capture_output=True, text=True, check=True)
    told[threads] = [int(n) for n in run.stdout.split()]
  assert told["1"][0] == 1 and told["3"][0] == 3 and told["3"][1] - told["1"][1] == 2


def test_a_share_of_a_container(tmp_path, monkeypatch):
  for text, cores in (("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("900000 100000", 8), ("", 8)):
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(fast, "GROUP", tmp_path)
    monkeypatch.setattr(fast.CORES, "value", 8)
    assert fast.usable_cores() == cores
  monkeypatch.setattr(fast, "GROUP", tmp_path / "none")
  assert fast.usable_cores() == 8


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the system does not say")
def test_memory_of_a_container(tmp_path, monkeypatch):
  """Its files can be given up, but for those that are in use."""
  monkeypatch.setattr(fast, "GROUP", tmp_path / "none")
  free = fast.free_memory()
  assert 1e8 < free < 1e14
  monkeypatch.setattr(fast, "GROUP", tmp_path)
  (tmp_path / "memory.current").write_text("5000000\n")
  (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 1000000\nactive_file 7\n")
  for most, found in ("9000000\n", 5000000), ("1000000\n", 0):
    (tmp_path / "memory.max").write_text(most)
    assert fast.free_memory() == found
  (tmp_path / "memory.max").write_text("max\n")
  assert abs(fast.free_memory() / free - 1) < .5


# ---- programs ----
@pytest.fixture
def calls(monkeypatch):
  """How many parts the kernels had in each call of a program."""
  made, plain = [], fast.Kernels.run

  def run(function, thread, rows):
    made.append(rows[:, 1])
    plain(function, thread, rows)
  monkeypatch.setattr(fast.Kernels, "run", staticmethod(run))
  return made


def test_a_program_is_one_call(calls):
  """With other inputs and another value of a variable each time; a view of a buffer begins where it should."""
  cache, w = zeros((4, 6)), Tensor(normal(6, 6), device="CPU").realize()

  def work(x, slot):
    y = (vlm.softmax(vlm.matmul(x, w), 1.0) * 2).contiguous()
    store = cache[slot:slot + 1].uop.store(y.uop)
    return y, (Tensor(cache.uop.after(store)) + 1).contiguous()
  program, right = vlm.capture(work, "CPU"), np.zeros((4, 6), np.float32)
  for i in (2, 0, 3, 1):
    x = normal(1, 6, seed=i)
    e = np.exp(x @ w.numpy().T)
    right[i] = 2 * e / e.sum()
    y, all_of_them = program(Tensor(x, device="CPU").realize(), UOp.variable("slot", 0, 3).bind(i))
    assert np.allclose(y.numpy(), right[i:i + 1], atol=1e-5) and np.allclose(all_of_them.numpy(), right + 1, atol=1e-5)
  assert len(calls) == 4 and min(map(len, calls)) >= 3


@several
def test_tinygrad_s_own_kernels_are_shared(calls):
  """Those of which it has made several parts."""
  a, b = normal(512, 512), normal(512, 512, seed=1)
  program = TinyJit(lambda a, b: ((a + 1) @ b + 2).realize() * 3)
  for _ in range(4):
    found = program(Tensor(a, device="CPU").realize(), Tensor(b, device="CPU").realize()).numpy()
  assert np.allclose(found, ((a + 1) @ b + 2) * 3, atol=1e-2)
  assert max(max(parts) for parts in calls) > 1


def test_a_kernel_of_too_many_arguments_stays_tinygrad_s(calls):
  many = [Tensor(np.full(3, i, np.float32), device="CPU").realize() for i in range(40)]
  program = TinyJit(lambda *many: (vlm.gelu(sum(many)) * 2).realize())
  for _ in range(3):
    assert program(*many).numpy().tolist() == [1560, 1560, 1560]
