"""`python -m paranet_jax.report`: what is known of a run or a bundle, as one HTML file."""

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence

from paranet_jax.host.arguments import Parser, absolute, add_data_flags, add_jax_flags
from paranet_jax.host.errors import UserError, exit_code, say
from paranet_jax.host.starting import begin


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command with these arguments (default: sys.argv); returns the exit code."""
  argv = sys.argv[1:] if argv is None else argv
  command = shlex.join(['python', '-m', 'paranet_jax.report', *argv])
  return exit_code(lambda: _run(_parse(argv), command), has_config=False)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
  parser = Parser(
    prog='python -m paranet_jax.report',
    description='Writes one HTML file: curves, exits, budgets, reliability, images and commands of a run or a bundle.',
  )
  add = parser.add_argument
  add('--workdir', type=absolute, help='Folder of a run; without exits.json, its last exit answers.')
  add('--bundle', type=absolute, help='Folder of a bundle, instead of a run.')
  add('--out', type=absolute, help='File to write, replacing an earlier one (default: report.html in that folder).')
  add_data_flags(parser)
  add_jax_flags(parser)
  given = parser.parse_args(argv)
  if (given.workdir is None) == (given.bundle is None):
    found = 'neither' if given.workdir is None else 'both'
    raise UserError(f'expected --workdir of a run or --bundle, found {found}; set one of them')
  given.folder = given.workdir or given.bundle
  given.out = given.out or given.folder / 'report.html'
  return given


def _run(given: argparse.Namespace, command: str) -> None:
  if importlib.util.find_spec('jinja2') is None:
    raise UserError('a report needs jinja2, found none; pip install jinja2')
  # jax takes a second to import; flags are checked first.
  from paranet_jax.host.machine import start_jax
  from paranet_jax.report.facts import read_facts
  from paranet_jax.report.page import write_page

  start_jax(given)
  facts = read_facts(given.folder, given.bundle is not None, given.data_dir, given.accept_data_changes, given.out)
  if facts.lacking:
    say(f'without the data set, so without budgets, reliability and images: {facts.lacking}')
  size = write_page(given.out, facts, command)
  say(f'report: {given.out}, {size / 1e6:.2f} MB')


if __name__ == '__main__':
  begin()
  sys.exit(main())
