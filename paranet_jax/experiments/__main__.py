"""`python -m paranet_jax.experiments`: the paper's tables and figure. User errors are one line and exit code 2."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from paranet_jax.host.arguments import Parser
from paranet_jax.host.errors import UserError
from paranet_jax.host.huge_pages import use_huge_pages

ALL = 'all'
STOPPED = 130  # What the shell reports of an interrupted command.


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command with these arguments, those of sys.argv if None.

  Returns:
    The exit code: 0; 2: a user's error; 130: it was stopped before its tables were written, and the same command goes
    on.
  """
  logging.set_verbosity(logging.WARNING)  # orbax tells much at INFO that is not for the reader of a terminal.
  try:
    return _run(_parse(argv))
  except UserError as error:
    # Fields are set by --set here.
    print('error:', *str(error).replace('--config.', '--set=').split(), file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('stopped at once; the same command resumes', file=sys.stderr)
    return STOPPED


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = Parser(
    prog='python -m paranet_jax.experiments',
    description="Trains what is missing for the paper's tables and figure, and writes them beside the paper's numbers.",
  )
  add = parser.add_argument
  add('experiment', help='table1, table2, figure2 or all.')
  add('--seeds', default='1', help='Runs of each network, with seeds 0, 1, ... (default: 1).')
  add('--protocol', default='paper', help='paper: 130 epochs (default); tenth: 13; smoke: minutes, on digits.')
  add('--set', action='append', default=[], metavar='FIELD=VALUE', help='A field of every run; may be repeated.')
  add('--workdir', help='Folder of runs and results (default: results/<protocol>, with what --set changes).')
  add('--dry-run', action='store_true', help='List the runs and measure how long they would take; write nothing.')
  add('--compilation_cache', help='Folder of compiled programs (default: compiled/ in PARANET_CACHE_DIR); off: none.')
  return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> int:
  # jax takes a second to import, and a mistyped flag should not wait for it.
  from paranet_jax.experiments.dry_run import dry_run
  from paranet_jax.experiments.protocols import default_workdir, parse_protocol
  from paranet_jax.experiments.results import load_results
  from paranet_jax.experiments.runs import plan_runs, run_missing
  from paranet_jax.experiments.write import FILES, claim, write_results
  from paranet_jax.host.machine import use_compilation_cache

  experiments = _experiments(arguments.experiment)
  protocol = parse_protocol(arguments.protocol, arguments.set)
  folder = Path(arguments.workdir or default_workdir(protocol))
  runs = plan_runs(experiments, protocol, _seeds(arguments.seeds), folder)
  workdir = folder.expanduser().absolute()
  results = load_results(workdir, protocol, list(FILES.values()))
  use_compilation_cache(arguments.compilation_cache)
  if arguments.dry_run:
    print(dry_run(runs))
    return 0
  claim(workdir, results)
  summaries = run_missing(runs)
  if summaries is None:
    return STOPPED
  print(write_results(workdir, results, experiments, list(zip(runs, summaries, strict=True))))
  return 0


def _experiments(name: str) -> tuple[str, ...]:
  from paranet_jax.experiments.published import EXPERIMENTS

  if name not in (*EXPERIMENTS, ALL):
    raise UserError(f"unknown experiment '{name}', expected one of {', '.join((*EXPERIMENTS, ALL))}")
  return EXPERIMENTS if name == ALL else (name,)


def _seeds(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise UserError(f'seeds must be a whole number of 1 or more, found {text}; set --seeds')
  return int(text)


if __name__ == '__main__':
  use_huge_pages()
  sys.exit(main())
