"""What a shell, a machine and other people do to the programs: streams that are full, closed or end early, environments
without home, compiler or sense. Each is a process of its own."""
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import vlm  # and with it the way to examples/

ROOT = Path(__file__).resolve().parents[1]
ASK = [str(ROOT / "vlm.py"), str(ROOT / "examples" / "shapes.png"), "caption en", "--weights", str(ROOT / "weights" / "toy")]
RIGHT = "a green triangle, a red circle and a yellow star"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="streams and signals of Unix")


def shell(line, *words, env=None, folder=None, without=()):
  """A line of sh, $@ in it being Python and words -> what became of it, never a traceback."""
  known = {name: value for name, value in os.environ.items() if name not in without} | (env or {})
  done = subprocess.run(["/bin/sh", "-c", line, "sh", sys.executable, *words], capture_output=True, env=known, cwd=folder,
                        timeout=300)
  assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr, done.stderr.decode()
  return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_stdout():
  code, _, err = shell('"$@" > /dev/full', *ASK)
  assert code == 1 and "stdout: No space left" in err


def test_streams_that_are_closed():
  assert shell('"$@" <&-', *ASK)[:2] == (0, RIGHT + "\n")
  assert shell('"$@" 2>&-', *ASK)[:2] == (0, RIGHT + "\n")
  assert shell('"$@" >&-', *ASK)[0] == 0
  assert shell('"$@" <&-', *ASK[:2], *ASK[3:])[0] == 0  # where questions would be read


def test_a_reader_that_has_seen_enough():
  assert shell('"$@" --json | head -c1', *ASK) [1] == "{"


def test_an_encoding_that_lacks_characters(tmp_path):
  code = "import sys; sys.path.insert(0, sys.argv[1]); import vlm; " \
         "main = vlm.program(lambda argv: print('\\u65e5', '\\udcff')); main.__call__([]); "
  assert shell('"$@"', "-c", code, str(ROOT), env={"PYTHONIOENCODING": "cp1252"})[:2] == (0, "\\u65e5 \\udcff\n")


PROGRAMS = [path for path in (ROOT / "vlm.py", *sorted(ROOT.glob("examples/*.py")))
            if not path.name.startswith("test_") and "@program\ndef main" in path.read_text().replace("vlm.", "")]


def started(code, path, folder):
  """A program without words, in whose process that code runs first -> what became of it."""
  (folder / "sitecustomize.py").write_text(code)
  return shell('"$@"', str(path), env={"PYTHONPATH": str(folder)}, folder=folder)


@pytest.mark.parametrize("package", ["numpy", "tinygrad"])
def test_programs_without_a_package(package, tmp_path):
  line = f"{package} is not installed; install the requirements: python -m pip install -r requirements.txt"
  assert len(PROGRAMS) > 10
  for path in PROGRAMS:
    assert started(f"import sys; sys.modules[{package!r}] = None", path, tmp_path) == (1, "", f"{path.stem}: {line}\n")


TINY = ROOT / "weights" / "tiny1"
PIPES = {  # words of a program -> the pipe among its files
  "batch pipe --out a": "pipe", "batch list --out pipe": "pipe", "big_vision pipe.npz new": "pipe.npz",
  "big_vision a.npz new": "a.json", "big_vision w new.npz": "w/tokenizer.model", "codebook --eval pipe": "pipe",
  "codebook --train pipe": "pipe", "draw_answer pipe x a.png": "pipe",
  "draw_answer a.png <loc0000><loc0000><loc0100><loc0100> pipe.png": "pipe.png", "quantize w new --bits 8": "w/config.json",
  "quantize w new --bits 4": "w/vae-oid.npz", "shapes --make new": "new", "shapes --eval --weights w": "w/model.safetensors",
  "shard pipe x": "pipe", "show attention pipe x": "pipe", "show patches a.png x --weights w": "w/tokenizer.model",
  "show eval --weights w": "w/config.json", "train data --init w --save new": "data/data.jsonl",
  "train data --init w --save new --steps 1": "w/vae-oid.npz", "train --save new --resume": "new/training.state"}


@pytest.mark.parametrize("words", PIPES)
def test_pipes_are_not_waited_for(words, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  shutil.copytree(TINY, "w")
  shutil.copytree(TINY, "new") if "--resume" in words else None
  shutil.copy(ROOT / "examples" / "shapes.png", "a.png")
  Path("list").write_text('{"image": "a.png", "prompt": "caption en"}\n')
  Path("data").mkdir()
  if words == "big_vision a.npz new":
    import big_vision
    assert big_vision.main(["w", "a.npz", "--quiet"]) == 0
  Path(PIPES[words]).unlink(missing_ok=True)
  os.mkfifo(PIPES[words])
  name, *argv = words.split()
  signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
  signal.alarm(60)
  try:
    quiet = [] if name == "codebook" or "--make" in argv else ["--quiet"]
    code = importlib.import_module(name).main(argv + quiet)
  finally:
    signal.alarm(0)
  err = capsys.readouterr().err
  assert code in (1, 2) and re.fullmatch(rf"{name}: .+\n", err), err
  assert PIPES[words].split("/")[-1].split(".")[0] in err or "w/vae" in PIPES[words], err
  assert Path(PIPES[words]).is_fifo() and (not Path("new").exists() or "new" in PIPES[words])


AT = """
import os, signal, sys
def hook(event, words):
  if event == "import" and words[0] == {!r}:
    os.kill(os.getpid(), signal.{})
sys.addaudithook(hook)
"""


def test_ctrl_c_before_a_program_has_begun(tmp_path):
  """while it imports this or that, which takes a second together"""
  moments = [(path, name) for path in PROGRAMS for name in ("sentencepiece", "tinygrad.helpers")]
  moments += [(ROOT / "vlm.py", name)
              for name in ("pathlib", "threading", "numpy.linalg", "safetensors.numpy", "sqlite3", "shlex")]
  for path, name in [*moments, (ROOT / "examples" / "train.py", "codebook")]:
    assert started(AT.format(name, "SIGINT"), path, tmp_path) == (130, "", ""), (path, name)
  assert started(AT.format("tinygrad.helpers", "SIGTERM"), ROOT / "vlm.py", tmp_path)[:2] == (143, "")


def test_ctrl_c_is_left_to_programs_that_import_vlm(tmp_path):
  code = "import signal, sys; sys.path.insert(0, sys.argv[1]); import vlm; " \
         "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
  assert shell('"$@"', "-c", code, str(ROOT))[:2] == (0, "True\n")
  (tmp_path / "main.py").write_text(code)
  assert shell('"$@"', "main.py", str(ROOT), folder=tmp_path)[:2] == (0, "True\n")


def test_sigterm_is_an_end_like_another(tmp_path):
  job = subprocess.Popen([sys.executable, str(ROOT / "examples" / "codebook.py"), "--train", str(tmp_path / "a.npz")],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  time.sleep(6)
  job.send_signal(signal.SIGTERM)
  out, err = job.communicate(timeout=60)
  assert job.returncode == 143 and b"Traceback" not in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("cores", ["0", "-1", "two", "99999999"])
def test_cores_that_are_none(cores):
  code, out, err = shell('"$@"', *ASK, env={"VLM_THREADS": cores})
  assert (code, out) == (2, "") and f"VLM_THREADS={cores}: at least 1" in err


@pytest.mark.long
@pytest.mark.parametrize("env", [{"CC": "gcc"}, {"CC": "/bin/false"}, {"CC": ""}, {"JIT": "0"}], ids=str)
def test_a_compiler_that_is_none(env, tmp_path):
  code, out, err = shell('"$@"', *ASK, env=env | {"XDG_CACHE_HOME": str(tmp_path)})
  assert (code, out) == (0, RIGHT + "\n")
  assert ("is not used" in err) == bool(env.get("CC"))


@pytest.mark.long
@pytest.mark.parametrize("case", ["no home", "no folder", "garbage", "no PATH", "no name"])
def test_a_cache_that_cannot_be_written(case, tmp_path):
  env = {"no folder": {"HOME": "/dev/null"}, "no name": {"XDG_CACHE_HOME": "", "HOME": str(tmp_path)},
         "garbage": {"XDG_CACHE_HOME": str(tmp_path)}}.get(case, {})
  without = ["XDG_CACHE_HOME"]
  if case == "garbage":
    for name in ("tinygrad", "vlm"):
      (tmp_path / name).mkdir(mode=0o700)
    (tmp_path / "tinygrad" / "cache.db").write_text("garbage " * 1000)
  if case == "no PATH":
    env["XDG_CACHE_HOME"] = str(tmp_path)
  without += {"no home": ["HOME"], "no PATH": ["PATH"]}.get(case, [])
  code, out, err = shell('"$@"', *ASK, env=env, without=[name for name in without if name not in env], folder=tmp_path)
  assert (code, out) == (0, RIGHT + "\n") and not (tmp_path / "~").exists()
  assert not (tmp_path / "tinygrad").exists() or case in ("garbage", "no PATH")


ROOT_USER = hasattr(os, "geteuid") and os.geteuid() == 0


def works(*command):
  """Whether a program of the system is there and may do that here."""
  return bool(shutil.which(command[0])) and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(ROOT_USER and not works("setpriv", "--bounding-set=-dac_override", "true"), reason="no setpriv")
def test_a_warm_cache_that_can_only_be_read_is_used(tmp_path):
  """no kernel is compiled again: a compiler that counts is asked whether it is clang, and for threads and queues, which
  tinygrad keeps in a folder of its own"""
  zig = shutil.which("clang") or f"{Path(pytest.importorskip('ziglang').__file__).with_name('zig')} clang"
  compiler, asked, cache = tmp_path / "clang", tmp_path / "asked", tmp_path / "cache"
  compiler.write_text(f"#!/bin/sh\necho >> '{asked}'\nexec {zig} \"$@\"\n")
  compiler.chmod(0o755)
  env = {"CC": str(compiler), "XDG_CACHE_HOME": str(cache)}
  assert shell('"$@"', *ASK, env=env)[:2] == (0, RIGHT + "\n")
  assert asked.read_text().count("\n") > 15
  asked.unlink()
  shutil.rmtree(cache / "tinygrad")  # of vlm's own programs alone
  for path in (*cache.glob("*/*"), *cache.iterdir(), cache):
    path.chmod(0o500)
  obeying = "setpriv --bounding-set=-dac_override " if ROOT_USER else ""  # root may write anywhere, but without that
  assert shell(obeying + '"$@"', *ASK, env=env)[:2] == (0, RIGHT + "\n")
  assert asked.read_text().count("\n") <= 7
  for path in (cache, *cache.iterdir()):
    path.chmod(0o700)
  assert [path.name for path in cache.iterdir()] == ["vlm"]


READS_ALL = "--inh-caps=+dac_read_search --ambient-caps=+dac_read_search"  # Python may lie in root's home


@pytest.mark.long
@pytest.mark.skipif(not ROOT_USER or not works("setpriv", "--reuid=12345", *READS_ALL.split(), "true"), reason="not root")
def test_a_user_without_a_name_and_a_cold_cache_that_can_only_be_read(tmp_path):
  (tmp_path / "cache").mkdir(mode=0o500)
  os.chown(tmp_path / "cache", 12345, -1)
  env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
  code, out, err = shell(f'setpriv --reuid=12345 --clear-groups {READS_ALL} "$@"', *ASK, env=env, without=["HOME"])
  assert (code, out) == (0, RIGHT + "\n") and not list((tmp_path / "cache").iterdir()), err


@pytest.mark.long
@pytest.mark.skipif(not ROOT_USER, reason="only root mounts disks")
def test_a_full_disk_that_executes_nothing(tmp_path):
  if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,noexec", "tmpfs", tmp_path], capture_output=True).returncode:
    pytest.skip("root may mount nothing here")
  try:
    assert shell('"$@"', *ASK, env={"XDG_CACHE_HOME": str(tmp_path)})[:2] == (0, RIGHT + "\n")
  finally:
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("device", ["NULL", "DISK", "NPY"])
def test_devices_that_compute_nothing(device):
  code, out, err = shell('"$@"', *ASK, "--device", device)
  assert (code, out) == (2, "") and "computes nothing" in err
