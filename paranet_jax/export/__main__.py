"""`python -m paranet_jax.export`: a run as a folder that runs without JAX."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from paranet_jax.host.arguments import Parser, absolute, add_data_flags, add_jax_flags
from paranet_jax.host.errors import exit_code, say
from paranet_jax.host.starting import begin
from paranet_jax.weights.hub import check_upload, hub_place, upload_folder

FORMATS = {'onnx': ('onnx',), 'stablehlo': ('stablehlo',), 'both': ('onnx', 'stablehlo')}
DTYPES = ('float32', 'float16', 'int8')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command with these arguments (default: sys.argv); returns the exit code."""
  return exit_code(lambda: _run(_parse(argv)), has_config=False)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = Parser(
    prog='python -m paranet_jax.export',
    description='Writes a run as one model file per stage, with one script that runs them without JAX.',
  )
  add = parser.add_argument
  add('--workdir', type=absolute, required=True, help='Folder of a run; without exits.json, its last exit answers.')
  add('--out', type=absolute, required=True, help='Folder to write; it must not exist.')
  add('--format', choices=FORMATS, default='onnx', help='Model files to write (default: onnx).')
  add(
    '--dtype',
    choices=DTYPES,
    default='float32',
    help='float16: the weights; int8: weights and activations (default: float32).',
  )
  add(
    '--push-to',
    metavar='hf:OWNER/NAME',
    help='Repository of the Hugging Face Hub to send the folder to, as one commit; hf:OWNER/NAME@BRANCH for a branch.',
  )
  add('--web', action='store_true', help='Add a page, index.html, that runs the bundle in a browser.')
  add(
    '--web-runtime',
    type=absolute,
    metavar='FILE',
    help='Archive of the npm package that the page runs on (default: downloaded once, and kept in PARANET_CACHE_DIR).',
  )
  add_data_flags(parser)
  add_jax_flags(parser)
  given = parser.parse_args(argv)
  given.push_to = given.push_to and hub_place(given.push_to, '--push-to', folder=True)
  return given


def _run(given: argparse.Namespace) -> None:
  # jax takes a second to import; flags are checked first.
  from paranet_jax.early.sentences import is_another_network
  from paranet_jax.export.bundle import Request, export_run
  from paranet_jax.host.machine import start_jax

  start_jax(given)
  if given.push_to:
    check_upload(given.push_to, '--push-to')
  bundle = export_run(
    Request(
      *(given.workdir, given.out, FORMATS[given.format], given.dtype, given.data_dir, given.accept_data_changes),
      *(given.web, given.web_runtime),
    )
  )
  size = sum(path.stat().st_size for path in given.out.rglob('*') if path.is_file())
  say(f'bundle: {given.out}, {given.format}, {given.dtype}, step {bundle["step"]}, {size / 1e6:.2f} MB')
  found = bundle.get('agreement')
  if found:
    say(
      f'compared with JAX on {found["images"]:,} {found["of"]} images: {100 * found["labels"]:.2f} % the same labels, '
      f'{100 * found["exits"]:.2f} % the same exits, logits differ by at most {found["logits"]:.1e}'
    )
    say(f'try it: python {shlex.quote(str(given.out / "run.py"))} IMAGE...')
  if is_another_network(bundle):
    again = f'python -m paranet_jax.calibrate --bundle={shlex.quote(str(given.out))} --images=FOLDER'
    line = f'calibrated in {bundle["calibrated_dtype"]}: nothing is promised in {given.dtype}'
    say(f'{line} before it is calibrated on images: {again}' if 'onnx' in bundle['formats'] else line)
  if given.web:
    serve = f'python -m http.server --bind 127.0.0.1 --directory {shlex.quote(str(given.out))}'
    say(f'see it: {serve}, then open http://localhost:8000')
  if given.push_to:
    say(f'pushed: {upload_folder(given.out, given.push_to)}')


if __name__ == '__main__':
  begin()
  sys.exit(main())
