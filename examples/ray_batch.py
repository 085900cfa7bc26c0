"""The work of batch.py on the machines of a Ray cluster, or on several processes of this one.

    python -m pip install -r examples/requirements-ray.txt
    python examples/ray_batch.py SOURCE --prompt TEXT --out FOLDER --actors 2

SOURCE is what batch.py takes, and all machines see it and FOLDER at the same place. FOLDER gets Parquet files
with the columns of batch.py's tables. Started again after a kill it answers what is not in them yet.
"""
import hashlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import batch
import vlm

THREADS = "VLM_THREADS"  # how many a CPU device uses
ASKED, DONE = "_asked", "_done"  # in FOLDER; who reads it as one table passes over names with _
OTHERS = 4  # Ray's own tasks, which read, look up what is done, and write: they wait forever for a processor
BLOCK = 4  # batches of rows that are kept together, and of which the pictures are opened ahead


class Captioner:
  """An actor: a model, and the source, which it reads by itself. folder: what names are relative to."""
  def __init__(self, argv, folder):
    os.chdir(folder)
    args = arguments(argv)
    self.options, self.rows = vlm.sampling(args), batch.read_source(args)
    self.job = batch.Job(self.rows.path, vlm.open_model(args), args.batch_size)

  def __call__(self, numbers):
    """{"id": which rows, from 0} -> their columns, and the same ids: what Ray keeps to know what is done."""
    import pyarrow
    rows = [self.rows[int(i)] for i in numbers["id"]]
    lines = [line for _, line in self.job.lines(rows, self.options)]
    table = pyarrow.Table.from_pylist([*batch.table_rows(lines)], batch.schema())  # types, where all is None
    return table.add_column(0, "id", pyarrow.array(numbers["id"]))


def arguments(argv):
  p = vlm.terminal.ArgumentParser(prog="ray_batch.py", allow_abbrev=False,
                                  description="Answer many questions about pictures on a Ray cluster.")
  batch.add_source(p)
  p.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="gets Parquet files")
  p.add_argument("--batch-size", type=int, default=16, metavar="N", help="rows at once (default %(default)s)")
  p.add_argument("--actors", type=int, default=1, metavar="N", help="models at once (default %(default)s)")
  p.add_argument("--cpus", type=int, default=1, metavar="N", help="of each of these (default %(default)s)")
  p.add_argument("--gpus", type=float, default=0, metavar="N", help="of each of these (default %(default)s)")
  p.add_argument("--address", metavar="ADDRESS", help="of a running cluster (default: one on this machine)")
  p.set_defaults(part="1/1")  # Ray shares the work
  vlm.add_arguments(p)
  args = p.parse_args(argv)
  if min(args.batch_size, args.actors, args.cpus) < 1 or args.gpus < 0:
    raise vlm.Fault("--batch-size, --actors and --cpus: at least 1; --gpus: at least 0")
  vlm.terminal.check_sampling(args)
  vlm.sampling(args)
  return args


def check_folder(out, rows):
  """Ray knows rows by their numbers: those of other pictures or questions would count as done. Raises Fault."""
  asked = hashlib.sha256()
  for row in rows:
    asked.update(row.line())
  try:
    out.mkdir(parents=True, exist_ok=True)
    if not any(out.iterdir()):
      (out / ASKED).write_text(asked.hexdigest())
    elif not (out / ASKED).exists() or (out / ASKED).read_text() != asked.hexdigest():
      raise vlm.Fault(f"--out {out} holds something other than answers to these questions; choose another folder")
  except OSError as e:
    raise vlm.Fault(f"--out {out}: {e.strerror}; choose another folder") from None


@vlm.program
def main(argv):
  args = arguments(argv)
  rows = batch.read_source(args)
  try:
    import pyarrow.dataset
    import ray.data
    from ray.data.checkpoint import CheckpointConfig
  except ImportError:
    raise vlm.Fault("Ray is not installed: python -m pip install -r examples/requirements-ray.txt") from None
  out, block = args.out.resolve(), args.batch_size * BLOCK
  check_folder(out, rows)
  elsewhere = args.address or os.environ.get("RAY_ADDRESS")
  try:
    ray.init(elsewhere or "local", num_cpus=None if elsewhere else args.actors * args.cpus + OTHERS,
             runtime_env={"env_vars": {THREADS: str(args.cpus)}}, log_to_driver=not args.quiet)
  except (ConnectionError, ValueError) as e:
    raise vlm.Fault(f"--address {elsewhere}: {' '.join(str(e).split())}", code=1) from None
  context = ray.data.DataContext.get_current()
  context.checkpoint_config = CheckpointConfig("id", str(out / DONE), delete_checkpoint_on_success=False)
  words = [sys.argv[1:] if argv is None else argv, os.getcwd()]
  numbers = ray.data.range(len(rows), override_num_blocks=-(-len(rows) // block))
  answers = numbers.map_batches(
    Captioner, fn_constructor_args=words, batch_size=block, num_cpus=args.cpus, num_gpus=args.gpus,
    compute=ray.data.ActorPoolStrategy(size=args.actors))
  answers.write_parquet(str(out))
  text = pyarrow.dataset.field("text").is_valid()
  good = pyarrow.dataset.dataset(out, format="parquet").count_rows(filter=text)
  bad = f", {len(rows) - good} of them bad" if good < len(rows) else ""
  vlm.log.info(f"{len(rows)} rows{bad}: {args.out}")
  return 0 if good else 1


if __name__ == "__main__":
  sys.exit(main())
