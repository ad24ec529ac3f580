"""`python -m paranet_jax.predict`: image files in, their classes out. User errors are one line and exit code 2."""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from absl import logging

from paranet_jax.host.arguments import Parser
from paranet_jax.host.errors import UserError
from paranet_jax.host.huge_pages import use_huge_pages
from paranet_jax.portable.run import printable
from paranet_jax.predict.files import Batch, list_images, read_batches
from paranet_jax.predict.output import (
  FORMATS,
  check_output,
  make_format,
  open_output,
  prediction_rows,
)
from paranet_jax.predict.progress import LiveLine, Tally

_BROKEN_PIPE = 141  # What the shell reports of a command that SIGPIPE ended.


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command with these arguments, those of sys.argv if None.

  Returns:
    The exit code: 0; 1: some files could not be read; 2: a user's error, nothing was predicted or written; 130: it was
    interrupted; 141: whoever read standard output has stopped.
  """
  logging.set_verbosity(logging.WARNING)  # orbax tells much at INFO that is not for the reader of a terminal.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')  # For file names that its encoding does not have.
  try:
    arguments = _parse(argv)
    return _run(arguments, list_images(arguments.files))
  except UserError as error:
    print('error:', printable(' '.join(str(error).split())), file=sys.stderr)
    return 2
  except BrokenPipeError:
    return _BROKEN_PIPE
  except KeyboardInterrupt:
    print('stopped at once', file=sys.stderr)
    return 130


def _path(text: str) -> Path:
  return Path(os.path.expanduser(text))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = Parser(
    prog='python -m paranet_jax.predict',
    description='Predicts the classes of image files, each at the exit that is sure enough, as RUN/exits.json says.',
  )
  add = parser.add_argument
  add('files', nargs='*', metavar='FILE_OR_FOLDER', help='Images; of a folder, all images below it.')
  add('--workdir', help='Folder of a run that was calibrated.')
  add('--step', type=int, help='Checkpoint (default: the one that was calibrated).')
  add('--top', type=int, default=5, help='Classes told of each image, surest first (default: 5).')
  add('--format', default='table', help=f'One of {", ".join(FORMATS)} (default: table).')
  add('--output', type=_path, help='File to write, whole or not at all (default: standard output).')
  add('--overwrite', action='store_true', help='Replace the --output file that is there.')
  add('--batch-size', type=int, default=256, help='Images predicted at a time (default: 256).')
  add('--compilation_cache', help='Folder of compiled programs (default: compiled/ in PARANET_CACHE_DIR); off: none.')
  arguments = parser.parse_intermixed_args(argv)
  _check(arguments)
  return arguments


def _check(arguments: argparse.Namespace) -> None:
  if not arguments.workdir:
    raise UserError('expected the folder of a run, found none; set --workdir')
  if arguments.format not in FORMATS:
    raise UserError(f"unknown format '{arguments.format}', expected one of {', '.join(FORMATS)}; set --format")
  for flag in ('top', 'batch_size'):
    if getattr(arguments, flag) < 1:
      name = '--' + flag.replace('_', '-')
      raise UserError(f'{name} must be 1 or more, found {getattr(arguments, flag)}; set {name}')
  if arguments.output:
    check_output(arguments.output, arguments.overwrite)


def _run(arguments: argparse.Namespace, files: list[str]) -> int:
  # jax takes a second to import, and a mistyped flag should not wait for it.
  from paranet_jax.early.runtime import EarlyExit
  from paranet_jax.host.machine import use_compilation_cache
  from paranet_jax.host.processes import refuse_several

  refuse_several('predict')
  use_compilation_cache(arguments.compilation_cache)
  early_exit = EarlyExit.load(_path(arguments.workdir).absolute(), step=arguments.step)
  tally = Tally(early_exit.plan)
  # Where the rows themselves appear on the terminal, a live line would be in their way.
  in_the_way = arguments.output is None and sys.stdout.isatty()
  line = LiveLine(sys.stderr, len(files), sys.stderr.isatty() and not in_the_way)
  interrupted = False
  try:
    _predict(early_exit, files, arguments, tally, line)
  except KeyboardInterrupt:
    interrupted = True
    unwritten = f', and {arguments.output} was not written' if arguments.output else ''
    line.message(f'stopped after {tally.images + tally.unreadable:,} of {len(files):,} files{unwritten}')
  line.message(tally.summary())
  return 130 if interrupted else int(tally.unreadable > 0)


def _predict(early_exit: Any, files: list[str], arguments: argparse.Namespace, tally: Tally, line: LiveLine) -> None:
  """Writes a row a file as they come; what cannot be read is told on the way."""
  top = min(arguments.top, len(early_exit.class_names))
  side, _, channels = early_exit.image_shape
  batches = read_batches(files, side, channels, arguments.batch_size)
  with open_output(arguments.output) as stream, closing(batches), warnings.catch_warnings():
    warnings.filterwarnings('ignore', module=r'PIL|paranet_jax\.bundle\.run')  # Of odd but readable files.
    format = make_format(arguments.format, files, early_exit.class_names, top, stream)
    stream.write(format.before)
    line.update(0, 0)
    try:
      for batch in batches:
        predictions = early_exit.predict(batch.images)
        rows = prediction_rows(batch.files, predictions, early_exit.class_names, top)
        stream.write(''.join(map(format.row, rows)))
        stream.flush()
        tally.add(predictions.exits, predictions.macs, len(batch.unreadable))
        _tell(batch, tally, line)
    finally:
      stream.write(format.after)  # JSON stays JSON when it ends early.
      stream.flush()


def _tell(batch: Batch, tally: Tally, line: LiveLine) -> None:
  for file, reason in batch.unreadable:
    line.message(f'error: {printable(file)}: {reason}')
  line.update(tally.images + tally.unreadable, tally.images_per_second)


if __name__ == '__main__':
  use_huge_pages()
  sys.exit(main())
