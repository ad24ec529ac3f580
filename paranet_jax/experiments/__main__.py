"""`python -m paranet_jax.experiments`: the paper's tables and figure, a queue of runs, or pages of their results."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from paranet_jax.experiments.published import EXPERIMENTS
from paranet_jax.host.arguments import Parser, absolute, add_data_flags, add_jax_flags, positive
from paranet_jax.host.errors import UserError, exit_code, say
from paranet_jax.host.starting import begin

ALL = 'all'
QUEUE = 'run'
METHODS = 'methods'
PAGE = 'results'
STOPPED = 130  # As the shell reports an interrupted command.


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command with these arguments (default: sys.argv).

  Returns:
    The exit code: 0; 2: a user error; 130: stopped before its tables were written; the same command resumes.
  """
  return exit_code(lambda: _reworded(argv), stopped='stopped at once; the same command resumes')


def _reworded(argv: Sequence[str] | None) -> int:
  argv = sys.argv[1:] if argv is None else argv
  if argv[:1] == [QUEUE]:
    from paranet_jax.experiments.queue.command import run

    return run(argv[1:])
  if argv[:1] == [METHODS]:
    from paranet_jax.experiments.methods import run

    return run(argv[1:])
  if argv[:1] == [PAGE]:
    from paranet_jax.experiments.page import run

    return run(argv[1:])
  try:
    return _run(_parse(argv))
  except UserError as error:  # This command sets fields with --set.
    raise UserError(str(error).replace('--config.', '--set=')) from error


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = Parser(
    prog='python -m paranet_jax.experiments',
    description="Trains the missing runs behind the paper's tables and figure, and compares them with the paper.",
    epilog='`run QUEUE.toml` trains the runs of a queue file instead, `methods` makes one table of the results of '
    'configs/queues/methods.toml, and `results` a page of all results. See `run --help`, `methods --help` and '
    '`results --help`.',
  )
  add = parser.add_argument
  add('experiment', choices=(*EXPERIMENTS, ALL), help='The table or figure to reproduce.')
  add(
    '--seeds',
    type=partial(positive, most=10_000),
    default=1,
    help='Runs of each network, with seeds 0, 1, ... (default: 1).',
  )
  add(
    '--protocol',
    choices=('paper', 'quarter', 'tenth', 'smoke'),
    default='paper',
    help='paper: 130 epochs (default); quarter: 32.5; tenth: 13; smoke: minutes, on digits.',
  )
  add('--set', action='append', default=[], metavar='FIELD=VALUE', help='A field of every run; may be repeated.')
  add('--workdir', help='Folder of runs and results (default: results/<protocol>, followed by what --set changes).')
  add('--dry-run', action='store_true', help='List the runs and estimate how long they take; write nothing.')
  add_jax_flags(parser)
  add_data_flags(parser)
  return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> int:
  # jax takes a second to import; flags are checked first.
  from paranet_jax.experiments.planned_runs import plan_runs, run_missing
  from paranet_jax.experiments.protocols import default_workdir, parse_protocol
  from paranet_jax.experiments.results import RESULTS, load_results, write_results
  from paranet_jax.experiments.speed import dry_run
  from paranet_jax.host.files import write_json
  from paranet_jax.host.machine import start_jax
  from paranet_jax.runs.workdir import prepare_folder

  experiments = EXPERIMENTS if arguments.experiment == ALL else (arguments.experiment,)
  protocol = parse_protocol(arguments.protocol, arguments.set)
  folder = Path(arguments.workdir or default_workdir(protocol))
  workdir = absolute(arguments.workdir or default_workdir(protocol))
  runs = plan_runs(experiments, protocol, arguments.seeds, folder, arguments.data_dir)
  results = load_results(workdir, protocol)
  start_jax(arguments)
  if arguments.dry_run:
    say(dry_run(runs))
    return 0
  prepare_folder(workdir)
  if not (workdir / RESULTS).exists():
    write_json(workdir / RESULTS, results)  # Records the protocol before anything is trained.
  summaries = run_missing(runs, arguments.accept_data_changes)
  if summaries is None:
    return STOPPED
  results = load_results(workdir, protocol)  # Another command may have added its tables while this one trained.
  say(write_results(workdir, results, experiments, list(zip(runs, summaries, strict=True))))
  return 0


if __name__ == '__main__':
  begin()
  sys.exit(main())
