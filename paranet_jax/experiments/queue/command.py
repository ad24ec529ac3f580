"""`python -m paranet_jax.experiments run QUEUE.toml`."""

import argparse
from collections.abc import Sequence

from paranet_jax.host.arguments import Parser, absolute, add_data_flags, add_jax_flags, positive
from paranet_jax.host.errors import UserError, report_no_room, say

FAILED = 1
STOPPED = 130  # As the shell reports an interrupted command.


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Parses the arguments after `run`."""
  parser = Parser(
    prog='python -m paranet_jax.experiments run',
    description='Trains the runs of a queue file by priority; what is finished is skipped, what was stopped goes on.',
  )
  add = parser.add_argument
  add('queue', type=absolute, metavar='QUEUE.toml', help='The queue file, such as configs/queues/paper.toml.')
  add('--workdir', help='Folder of the queue (default: as the file says, or results/<name of the file>).')
  add('--at-once', type=positive, default=1, metavar='N', help='Runs that train at the same time (default: 1).')
  add('--cores', type=positive, metavar='N', help='Cores that they share, the last ones (default: all).')
  add('--status', action='store_true', help='Print what is done, running and left; train and write nothing.')
  add('--write', action='store_true', help='Write what has been measured so far; train nothing.')
  add_jax_flags(parser)
  add_data_flags(parser)
  return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
  """Runs the command; returns its exit code: 1 if runs failed, 130 if a signal stopped it."""
  arguments = parse(argv)
  # jax takes a second to import; flags are checked first.
  from paranet_jax.experiments.queue.estimate import status_table
  from paranet_jax.experiments.queue.file import read_queue
  from paranet_jax.experiments.queue.loop import Queue
  from paranet_jax.experiments.queue.process import share_cores
  from paranet_jax.experiments.queue.record import read_records
  from paranet_jax.experiments.queue.results import MARKDOWN, check_results, write_results
  from paranet_jax.host.lock import workdir_lock
  from paranet_jax.host.signals import StopRequest
  from paranet_jax.runs.workdir import CONFIG, prepare_folder

  queue = read_queue(arguments.queue, arguments.workdir)
  workdir = absolute(queue.workdir)
  cores = share_cores(arguments.cores, arguments.at_once)
  if (workdir / CONFIG).exists():
    raise UserError(f'expected the folder of a queue, found a run in {workdir}; set --workdir')
  if not arguments.status:
    check_results(queue, workdir)
  if arguments.status or arguments.write:
    records = read_records(workdir)
    say(status_table(queue, workdir, records, arguments.at_once))
    if arguments.write:
      prepare_folder(workdir)
      with report_no_room(workdir):
        write_results(queue, workdir, records)
      say(f'written: {workdir / MARKDOWN}')
    return 0
  prepare_folder(workdir)
  with workdir_lock(workdir), StopRequest() as stop:

    def report(queue) -> None:
      with report_no_room(workdir):
        write_results(queue, workdir, read_records(workdir))

    work = Queue(queue, workdir, flags=_passed_on(arguments), cores=cores, report=report)
    failed = work.work(stop)
    report(work.queue)
  say(status_table(work.queue, workdir, read_records(workdir), arguments.at_once))
  say(f'written: {workdir / MARKDOWN}')
  if stop.received:
    say(f'stopped by {stop.received}; the same command goes on')
    return STOPPED
  return FAILED if failed else 0


def _passed_on(arguments: argparse.Namespace) -> list[str]:
  """The flags of every run."""
  flags = [f'--{name}={value}' for name in ('data_dir', 'compilation_cache') if (value := getattr(arguments, name))]
  return flags + [f'--{name}' for name in ('accept_data_changes', 'accept_wrong_numbers') if getattr(arguments, name)]
