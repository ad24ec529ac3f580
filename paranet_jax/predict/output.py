"""Predictions as rows of text: a table, JSON or CSV, to standard output or to a file."""

import csv
import io
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from paranet_jax.display.tables import human_count
from paranet_jax.host.errors import UserError, discard_output
from paranet_jax.host.files import replacing
from paranet_jax.portable.run import UNKNOWN, printable, ranked_classes

FORMATS = ('table', 'json', 'csv')
_LONGEST_FILE, _LONGEST_LABEL = 60, 24  # Characters; a longer name only shifts the rest of its own row.


class Format(NamedTuple):
  """The text before and after the rows, and a function that makes the text of each of `prediction_rows`."""

  before: str
  row: Callable[[dict[str, Any]], str]
  after: str = ''


def prediction_rows(
  files: Sequence[str],
  predictions: Any,
  class_names: Sequence[str],
  top: int,
  rejects: bool = False,
  sets: np.ndarray | None = None,
) -> list[dict]:
  """One JSON object per file: `file`, `label`, `probability`, `exit`, `macs` and `top`, a list of {label, probability}.

  With `rejects` they also have `unknown`; where it is true, `label` is None, and `probability` that of the most
  probable class. With `sets`, they have `set`, the classes that the image may have, most probable first.

  Args:
    predictions: the runtime's `Predictions`.
    top: number of classes, at most all, most probable first; the predicted label always comes first.
    rejects: whether images may be unknown.
    sets: bool [N, classes], of the runtime's `sets`.
  """
  ranked, known = np.array(predictions.probabilities, np.float64), np.flatnonzero(~predictions.unknown)
  ranked[known, predictions.labels[known]] = np.inf  # Float32 may make several equal.
  order = np.argsort(-ranked, axis=1, kind='stable')[:, :top]
  rows = []
  for i, file in enumerate(files):
    best = [{'label': class_names[c], 'probability': float(f'{predictions.probabilities[i, c]:.6g}')} for c in order[i]]
    rows.append(
      {'file': file, **best[0], 'exit': int(predictions.exits[i]), 'macs': int(predictions.macs[i]), 'top': best}
    )
    if rejects:
      unknown = bool(predictions.unknown[i])
      rows[-1] |= {'unknown': unknown} | ({'label': None} if unknown else {})
    if sets is not None:
      rows[-1]['set'] = [class_names[c] for c in ranked_classes(sets[i], predictions.probabilities[i])]
  return rows


def json_format() -> Format:
  """One list, with one object per line."""
  separators = itertools.chain(['\n'], itertools.repeat(',\n'))
  return Format('[', lambda row: next(separators) + json.dumps(row), '\n]\n')


def csv_format(top: int, escape: bool = False, more: Sequence[str] = ()) -> Format:
  """file, label, probability, exit, macs, then label_2, probability_2 and so on for the runners-up.

  The label of an unknown image is empty, and a set is a JSON list.

  Args:
    escape: what is not printable, for a terminal.
    more: `unknown` and `set`, if the rows have them: the last columns.
  """
  first = ('file', 'label', 'probability', 'exit', 'macs')
  others = [f'{name}_{place}' for place in range(2, top + 1) for name in ('label', 'probability')]

  def text(row: dict[str, Any]) -> str:
    values = [row[key] for key in first] + [value for entry in row['top'][1:] for value in entry.values()]
    values += [json.dumps(row[key]) for key in more]
    return _csv_line([printable(value) if escape and isinstance(value, str) else value for value in values])

  return Format(_csv_line([*first, *others, *more]), text)


def _csv_line(values: Sequence[Any]) -> str:
  text = io.StringIO()
  csv.writer(text, lineterminator='\n').writerow(values)
  return text.getvalue()


def table_format(
  files: Sequence[str], class_names: Sequence[str], columns: int | None, more: Sequence[str] = ()
) -> Format:
  """Aligned columns, and as many of the next best classes as fit: those of the set, where there are sets.

  Args:
    files, class_names: all that may occur, for the widths of the columns.
    columns: width of the terminal; None: no limit.
    more: `unknown` and `set`, if the rows have them.
  """
  file_width = _width(('file', *map(printable, files)), _LONGEST_FILE)
  names = (*class_names, UNKNOWN) if 'unknown' in more else class_names
  label_width = _width(('label', *map(printable, names)), _LONGEST_LABEL)
  layout = f'{{:{file_width}}}  {{:{label_width}}}  {{:>11}}  {{:>4}}  {{:>8}}'

  def line(row: dict[str, Any]) -> str:
    probability, macs = f'{row["probability"]:.3f}', human_count(row['macs'])
    names = printable(row['file']), printable(UNKNOWN if row['label'] is None else row['label'])
    text, separator = layout.format(*names, probability, row['exit'], macs), '  '
    if 'set' in more:
      return text + _set_text(row['set'], columns and columns - len(text)) + '\n'
    for entry in row['top'][1:]:
      another = f'{separator}{printable(entry["label"])} {entry["probability"]:.3f}'
      if columns and len(text + another) > columns:
        break
      text, separator = text + another, ', '
    return text + '\n'

  last = 'set' if 'set' in more else 'next best'
  return Format(layout.format('file', 'label', 'probability', 'exit', 'macs') + f'  {last}\n', line)


def _set_text(names: Sequence[str], columns: int | None) -> str:
  """As many of the names as fit, and the number of the others."""
  for kept in range(len(names), 0, -1):
    text = '  ' + ', '.join(map(printable, names[:kept])) + (f' and {len(names) - kept:,} more' * (kept < len(names)))
    if not columns or len(text) <= columns:
      return text
  return f'  {len(names):,} classes'


def _width(texts: Sequence[str], most: int) -> int:
  return min(most, max(map(len, texts)))


def make_format(
  name: str,
  files: Sequence[str],
  class_names: Sequence[str],
  top: int,
  stream: IO[str],
  more: Sequence[str] = (),
) -> Format:
  """Makes one of FORMATS for a stream. more: `unknown` and `set`, if the rows have them."""
  if name == 'json':
    return json_format()
  if name == 'csv':
    return csv_format(top, stream.isatty(), more)
  return table_format(files, class_names, shutil.get_terminal_size().columns if stream.isatty() else None, more)


def check_output(path: Path, overwrite: bool) -> None:
  """Raises a `UserError` for a file that cannot be written or already exists."""
  if os.path.lexists(path) and not os.path.isfile(path):
    raise UserError(f'--output must be a file, and {path} is not one; set --output')
  if os.path.lexists(path) and not overwrite:
    raise UserError(f'{path} already exists; set --output to another file, or --overwrite')
  if not os.path.isdir(path.parent):
    raise UserError(f'--output must be in an existing folder, and {path.parent} is none; make it, or set --output')
  if not os.access(path.parent, os.W_OK | os.X_OK):
    raise UserError(f'--output must be in a writable folder, and {path.parent} is not; set --output')


def check_replaced(path: Path, files: Sequence[str]) -> None:
  """Raises a `UserError` if writing to a path would replace an image that is read, or a file of a run."""
  from paranet_jax.runs.workdir import run_of  # Imports configurations, which --help does not wait for.

  if run := run_of(path):
    raise UserError(f'{path} would be a file of the run in {run}; set --output to another file')
  if os.path.exists(path):
    for file in files:
      with suppress(OSError):
        if os.path.samefile(file, path):
          raise UserError(f'{path} would replace the image {file}, which is read; set --output to another file')


@contextmanager
def open_output(path: Path | None, overwrite: bool = False) -> Iterator[IO[str]]:
  """Opens standard output, or a file that appears only when the context ends without an error.

  Args:
    overwrite: replace what is there by then.

  Raises:
    UserError: it cannot be written, or exists.
    BrokenPipeError: the reader of standard output has stopped.
  """
  try:
    if path is None:
      yield sys.stdout
      return
    with replacing(path, newline='') as stream:
      yield stream
      check_output(path, overwrite)  # Another process may have written it since it was first checked.
  except OSError as error:
    if path is None:  # Otherwise Python tries to write the rest again at exit.
      discard_output(sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
      raise
    where = path or 'standard output'
    raise UserError(f'{where} cannot be written: {error.strerror or error}; set --output to another file') from error
