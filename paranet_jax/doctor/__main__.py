"""`python -m paranet_jax.doctor`: reports versions, devices, flags, checks of numbers, memory, disk, and what to do."""

import argparse
import contextlib
import sys
from collections.abc import Sequence

from paranet_jax.host.arguments import Parser
from paranet_jax.host.errors import exit_code, say
from paranet_jax.host.files import json_line
from paranet_jax.host.starting import begin


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command with these arguments (default: sys.argv).

  Returns:
    The exit code: 0; 1: a check failed; 2: a user's error.
  """
  return exit_code(lambda: _run(*_parse(argv)))


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  parser = Parser(
    prog='python -m paranet_jax.doctor',
    description='Reports what this machine has, and checks against NumPy that its jax computes right numbers.',
    epilog='--config.section.field=value overrides a field, as in paranet_jax.main.',
  )
  parser.add_argument('--config', help='Configuration at whose shapes numbers are checked (default: the quickstart).')
  parser.add_argument('--json', action='store_true', help='Print one JSON object.')
  return parser.parse_with_overrides(argv)


def _run(given: argparse.Namespace, overrides: Sequence[str]) -> int:
  from paranet_jax.doctor.report import as_text, examine  # jax takes a second to import; flags are checked first.

  with contextlib.redirect_stdout(sys.stderr):  # Warnings, such as that a kernel does not compile.
    found = examine(given.config, overrides)
  say(json_line(found) if given.json else as_text(found))
  return int(not all(check['right'] for check in found['checks']))


if __name__ == '__main__':
  begin()
  sys.exit(main())
