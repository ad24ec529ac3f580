"""`python -m paranet_jax.pack`: packs a run to share it, at a tenth of its size."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from paranet_jax.host.arguments import Parser, absolute
from paranet_jax.host.errors import exit_code, say


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command with these arguments (default: sys.argv); returns the exit code."""
  return exit_code(lambda: _run(_parse(argv)), has_config=False)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = Parser(
    prog='python -m paranet_jax.pack',
    description='Writes the parameters of a run (in float16), its log and its configuration to another folder.',
  )
  add = parser.add_argument
  add('--workdir', type=absolute, required=True, help='Folder of a finished run.')
  add('--out', type=absolute, required=True, help='Folder to write; it must not exist, or be empty.')
  add('--step', type=int, help='Checkpoint (default: the latest).')
  return parser.parse_args(argv)


def _run(given: argparse.Namespace) -> None:
  from paranet_jax.runs.packed import pack  # jax takes a second to import; flags are checked first.

  step = pack(given.workdir, given.out, given.step)
  size = sum(path.stat().st_size for path in given.out.rglob('*'))
  say(f'packed: {given.out}, step {step}, {size / 1e6:.2f} MB')
  run = shlex.quote(str(given.out))
  say(f'its exits must be calibrated again: python -m paranet_jax.calibrate --workdir={run} --budget=...')


if __name__ == '__main__':
  sys.exit(main())
