"""`python -m paranet_jax.pack`: packs a run to share it, at a tenth of its size."""

import argparse
import sys
from collections.abc import Sequence

from paranet_jax.host.arguments import Parser, absolute
from paranet_jax.host.errors import UserError, exit_code


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command with these arguments, by default sys.argv's; returns the exit code."""
  return exit_code(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = Parser(
    prog='python -m paranet_jax.pack',
    description='Writes the parameters of a run (in float16), its log and its configuration to another folder.',
  )
  parser.add_argument('--workdir', type=absolute, help='Folder of a finished run.')
  parser.add_argument('--out', type=absolute, help='Folder to write; it must not exist, or be empty.')
  parser.add_argument('--step', type=int, help='Checkpoint (default: the latest).')
  given = parser.parse_args(argv)
  for flag in ('workdir', 'out'):
    if getattr(given, flag) is None:
      raise UserError(f'expected a folder, found none; set --{flag}')
  return given


def _run(given: argparse.Namespace) -> None:
  from paranet_jax.runs.packed import pack  # jax takes a second to import, which a mistyped flag should not wait for.

  step = pack(given.workdir, given.out, given.step)
  size = sum(path.stat().st_size for path in given.out.rglob('*'))
  print(f'packed: {given.out}, step {step}, {size / 1e6:.2f} MB')
  print(f'its exits must be calibrated again: python -m paranet_jax.calibrate --workdir={given.out} --budget=...')


if __name__ == '__main__':
  sys.exit(main())
