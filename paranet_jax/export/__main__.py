"""`python -m paranet_jax.export`: a run as a folder that needs no JAX. User errors are one line and exit code 2."""

import argparse
import sys
from collections.abc import Sequence

from paranet_jax.host.arguments import Parser, absolute
from paranet_jax.host.errors import UserError, exit_code
from paranet_jax.host.huge_pages import use_huge_pages

FORMATS = {'onnx': ('onnx',), 'stablehlo': ('stablehlo',), 'both': ('onnx', 'stablehlo')}
DTYPES = ('float32', 'float16', 'int8')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command with these arguments, those of sys.argv if None; returns the exit code."""
  return exit_code(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = Parser(
    prog='python -m paranet_jax.export',
    description='Writes a calibrated run as one model file a stage, and the one file that runs them without JAX.',
  )
  add = parser.add_argument
  add('--workdir', type=absolute, help='Folder of a run that was calibrated.')
  add('--out', type=absolute, help='Folder to write; it must not be there.')
  add('--format', default='onnx', help=f'One of {", ".join(FORMATS)} (default: onnx).')
  add(
    '--dtype',
    default='float32',
    help=f'One of {", ".join(DTYPES)} (default: float32). float16: of the weights; int8: of weights and activations.',
  )
  given = parser.parse_args(argv)
  for flag in ('workdir', 'out'):
    if getattr(given, flag) is None:
      raise UserError(f'expected a folder, found none; set --{flag}')
  for flag, known in (('format', FORMATS), ('dtype', DTYPES)):
    if getattr(given, flag) not in known:
      raise UserError(f"unknown {flag} '{getattr(given, flag)}', expected one of {', '.join(known)}; set --{flag}")
  return given


def _run(given: argparse.Namespace) -> None:
  # jax takes a second to import, and a mistyped flag should not wait for it.
  from paranet_jax.export.write import Request, export_run

  bundle = export_run(Request(given.workdir, given.out, FORMATS[given.format], given.dtype))
  size = sum(path.stat().st_size for path in given.out.iterdir())
  print(f'bundle: {given.out}, {given.format}, {given.dtype}, step {bundle["step"]}, {size / 1e6:.2f} MB')
  found = bundle.get('agreement')
  if found:
    print(
      f'against the network in JAX on {found["images"]:,} {found["of"]} images: {100 * found["labels"]:.2f} % the same '
      f'labels, {100 * found["exits"]:.2f} % the same exits, logits {found["logits"]:.1e} apart'
    )
    print(f'try it: python {given.out}/run.py IMAGE...')


if __name__ == '__main__':
  use_huge_pages()
  sys.exit(main())
