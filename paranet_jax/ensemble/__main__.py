"""`python -m paranet_jax.ensemble`: evaluates finished runs as one anytime network."""

import argparse
import sys
from collections.abc import Sequence

from paranet_jax.display.tables import align
from paranet_jax.host.arguments import Parser, add_data_flags, add_jax_flags
from paranet_jax.host.errors import UserError, exit_code, say
from paranet_jax.host.files import json_line
from paranet_jax.host.starting import begin


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command with these arguments (None: those of the process) and returns the exit code."""
  return exit_code(lambda: _run(_parse(argv)), has_config=False)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = Parser(
    prog='python -m paranet_jax.ensemble',
    description="Evaluates the averaged probabilities of the first 1, 2, ... runs' last exits on the test images.",
  )
  parser.add_argument('workdirs', nargs='*', metavar='RUN', help='Folders of finished runs, cheapest first.')
  parser.add_argument('--json', action='store_true', help='Print one JSON array.')
  add_jax_flags(parser)
  add_data_flags(parser)
  given = parser.parse_args(argv)
  if len(given.workdirs) < 2:
    raise UserError(f'expected the folders of 2 runs or more, found {len(given.workdirs)}; add them to the command')
  return given


def _run(given: argparse.Namespace) -> None:
  # jax takes a second to import; a wrong flag is reported before.
  from paranet_jax.ensemble.evaluate import evaluate_ensemble, load_ensemble
  from paranet_jax.host.machine import start_jax

  start_jax(given)
  rows = evaluate_ensemble(load_ensemble(given.workdirs), given.data_dir, given.accept_data_changes)
  say(json_line(rows) if given.json else _table(rows))


def _table(rows: Sequence[dict]) -> str:
  header = ('exit', 'with', 'params', 'macs', 'accuracy (%)', 'top-5 (%)', 'nll')
  cells = []
  for row in rows:
    counts = (f'{row[key]:,}' for key in ('params', 'macs'))
    measured = f'{100 * row["accuracy"]:.2f}', f'{100 * row["top5"]:.2f}', f'{row["nll"]:.4f}'
    cells.append((str(row['exit']), f'{row["name"]}, seed {row["seed"]}', *counts, *measured))
  return '\n'.join(align(header, cells, left=(1,)))


if __name__ == '__main__':
  begin()
  sys.exit(main())
