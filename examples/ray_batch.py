"""The work of batch.py on the machines of a Ray cluster, or on several processes of this one.

    python -m pip install -r examples/requirements-ray.txt
    python examples/ray_batch.py SOURCE --prompt TEXT --out FOLDER --actors 2

SOURCE is what batch.py takes, and all machines see it and FOLDER at the same place. FOLDER gets Parquet files
with the columns of batch.py's tables. Started again after a kill it answers what is not in them yet.
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # vlm.py, wherever this is started from
import batch
import vlm

THREADS = "VLM_THREADS"  # how many a CPU device uses
OTHERS = 4  # Ray's own tasks, which read, look up what is done, and write: they wait forever for a processor


class Captioner:
  """An actor: a model, and the source, which it reads by itself. folder: what names are relative to."""
  def __init__(self, argv, folder):
    os.chdir(folder)
    args = arguments(argv)
    self.options, self.rows = vlm.sampling(args), batch.read_source(args)
    self.job = batch.Job(self.rows.path, vlm.open_model(args), args.batch_size)

  def __call__(self, numbers):
    """{"id": which rows, from 0} -> their columns, and the same ids: what Ray keeps to know what is done."""
    rows = [self.rows[int(i)] for i in numbers["id"]]
    lines = [line for _, line in self.job.lines(rows, self.options)]
    table = list(batch.table_rows(lines))
    return {"id": numbers["id"]} | {name: [row.get(name) for row in table] for name in batch.COLUMNS}


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


@vlm.program
def main(argv):
  args = arguments(argv)
  rows = batch.read_source(args)
  try:
    import ray.data
    from ray.data.checkpoint import CheckpointConfig
  except ImportError:
    raise vlm.Fault("Ray is not installed: python -m pip install -r examples/requirements-ray.txt") from None
  out = args.out.resolve()
  ray.init(args.address, num_cpus=None if args.address else args.actors * args.cpus + OTHERS,
           runtime_env={"env_vars": {THREADS: str(args.cpus)}}, log_to_driver=not args.quiet)
  context = ray.data.DataContext.get_current()
  context.checkpoint_config = CheckpointConfig("id", str(out / "done"), delete_checkpoint_on_success=False)
  words = [sys.argv[1:] if argv is None else argv, os.getcwd()]
  answers = ray.data.range(len(rows)).map_batches(
    Captioner, fn_constructor_args=words, batch_size=args.batch_size, num_cpus=args.cpus, num_gpus=args.gpus,
    compute=ray.data.ActorPoolStrategy(size=args.actors))
  answers.write_parquet(str(out))
  vlm.log.info(f"{len(rows)} rows: {args.out}")


if __name__ == "__main__":
  sys.exit(main())
