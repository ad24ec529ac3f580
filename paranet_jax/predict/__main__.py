"""`python -m paranet_jax.predict`: predicts the classes of image files with a run."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import Any

from paranet_jax.host.arguments import Parser, absolute, add_jax_flags, positive
from paranet_jax.host.errors import UserError, exit_code
from paranet_jax.host.starting import begin
from paranet_jax.portable.run import (
  DIVERGED,
  MAX_MEMORY,
  MAX_PIXELS,
  BundleError,
  left_out_line,
  list_images,
  parse_size,
  printable,
)
from paranet_jax.predict.image_files import Batch, read_batches
from paranet_jax.predict.output import FORMATS, check_output, check_replaced, make_format, open_output, prediction_rows
from paranet_jax.predict.tally import LiveLine, Tally


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command with these arguments (None: those of the process).

  Returns:
    The exit code: 0; 1: some files were unreadable, or have no finite answer; 2: a user's error, nothing was predicted
    or written; 130: interrupted; 141: the reader of standard output has stopped.
  """
  return exit_code(lambda: _run(_parse(argv)), has_config=False)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = Parser(
    prog='python -m paranet_jax.predict',
    description='Predicts the classes of image files, each at the first exit that is confident enough by exits.json; '
    'without it, at the last one.',
  )
  add = parser.add_argument
  add('files', nargs='*', metavar='FILE_OR_FOLDER', help='Images; a folder stands for all images below it.')
  add('--workdir', required=True, type=absolute, metavar='RUN', help='Folder of a run; its data set is not needed.')
  add('--step', type=int, help='Checkpoint (default: the one that was calibrated).')
  add('--top', type=positive, default=5, help='Classes reported per image, most probable first (default: 5).')
  add('--format', choices=FORMATS, default='table', help='Default: table.')
  add('--output', type=absolute, help='File to write (default: standard output).')
  add('--overwrite', action='store_true', help='Replace an existing --output file.')
  add(
    '--batch-size', type=partial(positive, most=16_384), default=256, help='Images predicted at a time (default: 256).'
  )
  add('--max-pixels', type=parse_size, default=MAX_PIXELS, help='Refuse larger images (default: 179M).')
  add(
    '--max-memory',
    type=parse_size,
    default=MAX_MEMORY,
    help='Bytes that decoding an image may take; images that need more are refused (default: 1.07G).',
  )
  add_jax_flags(parser)
  given = parser.parse_intermixed_args(argv)
  if given.output:
    check_output(given.output, given.overwrite)
  try:
    given.files, given.left_out = list_images(given.files)
  except BundleError as error:
    raise UserError(str(error)) from error
  if given.output:
    check_replaced(given.output, given.files)
  return given


def _run(given: argparse.Namespace) -> int:
  # jax takes a second to import; a wrong flag is reported before.
  from paranet_jax.early.exit_plan import FULL, uncalibrated_line
  from paranet_jax.early.runtime import EarlyExit
  from paranet_jax.host.machine import start_jax
  from paranet_jax.host.processes import refuse_several

  refuse_several('predict')
  start_jax(given)
  early_exit = EarlyExit.load(given.workdir, step=given.step)
  tally = Tally(early_exit.plan)
  # A live line would be in the way of rows on the same terminal.
  rows_on_terminal = given.output is None and sys.stdout.isatty()
  line = LiveLine(sys.stderr, len(given.files), sys.stderr.isatty() and not rows_on_terminal)
  if early_exit.plan.policy == FULL:
    line.message(uncalibrated_line(early_exit.plan, given.workdir))
  if given.left_out:
    line.message(printable(left_out_line(given.left_out)))
  interrupted = False
  try:
    _predict(early_exit, given, tally, line)
  except KeyboardInterrupt:
    interrupted = True
    unwritten = f', and {given.output} was not written' if given.output else ''
    line.message(f'stopped after {tally.images + tally.unreadable:,} of {len(given.files):,} files{unwritten}')
  line.message(tally.summary())
  return 130 if interrupted else int(tally.unreadable > 0)


def _predict(early_exit: Any, given: argparse.Namespace, tally: Tally, line: LiveLine) -> None:
  """Writes one row per file as the batches come, and reports unreadable files."""
  top = min(given.top, len(early_exit.class_names))
  side, _, channels = early_exit.image_shape
  limits = given.max_pixels, given.max_memory
  batches = read_batches(given.files, side, channels, given.batch_size, *limits, early_exit.scaling)
  with open_output(given.output, given.overwrite) as stream, closing(batches):
    more = ['unknown'] * early_exit.rejects + ['set'] * (early_exit.coverage is not None)
    format = make_format(given.format, given.files, early_exit.class_names, top, stream, more)
    stream.write(format.before)
    line.update(0, 0)
    try:
      for batch in batches:
        batch, predictions = _answered(batch, early_exit.predict(batch.images))
        sets = early_exit.sets(predictions) if 'set' in more else None
        rows = prediction_rows(batch.files, predictions, early_exit.class_names, top, early_exit.rejects, sets)
        stream.write(''.join(map(format.row, rows)))
        stream.flush()
        tally.add(predictions.exits, predictions.macs, len(batch.unreadable), int(predictions.unknown.sum()))
        for file, reason in batch.unreadable:
          line.message(f'error: {printable(file)}: {reason}')
        line.update(tally.images + tally.unreadable, tally.images_per_second)
    finally:
      stream.write(format.after)  # Keeps JSON valid after an interrupt.
      stream.flush()


def _answered(batch: Batch, predictions: Any) -> tuple[Batch, Any]:
  """The files that have an answer, and it; the others are among those that cannot be read, with the reason."""
  finite = predictions.finite
  if finite.all():
    return batch, predictions
  diverged = [(file, DIVERGED) for file, answered in zip(batch.files, finite, strict=True) if not answered]
  files = [file for file, answered in zip(batch.files, finite, strict=True) if answered]
  kept = type(predictions)(*(column[finite] for column in predictions))
  return Batch(files, batch.images[finite], [*batch.unreadable, *diverged]), kept


if __name__ == '__main__':
  begin()
  sys.exit(main())
