"""Predictions as rows of text: a table, JSON or CSV, to standard output or to a file."""

import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from paranet_jax.host.errors import UserError
from paranet_jax.host.files import replacing
from paranet_jax.portable.run import printable
from paranet_jax.report.tables import human_count

FORMATS = ('table', 'json', 'csv')
_LONGEST_FILE, _LONGEST_LABEL = 60, 24  # Characters; a longer name moves the rest of its own row alone.


class Format(Protocol):
  """The text before, of and after rows that are written as they come."""

  before: str
  after: str

  def row(self, row: dict[str, Any]) -> str:
    """The text of one of `prediction_rows`."""


def prediction_rows(files: Sequence[str], predictions: Any, class_names: Sequence[str], top: int) -> list[dict]:
  """One JSON object a file: `file`, `label`, `probability`, `exit`, `macs` and `top`, a list of {label, probability}.

  Args:
    files: [N].
    predictions: of the runtime, with labels [N], probabilities [N, C], exits [N] and macs [N].
    class_names: [C].
    top: how many classes, at most C, surest first, so that the label predicted comes first.
  """
  ranked = np.array(predictions.probabilities, np.float64)
  ranked[np.arange(len(files)), predictions.labels] = np.inf  # Also where float32 has made several equal.
  order = np.argsort(-ranked, axis=1, kind='stable')[:, :top]
  rows = []
  for i, file in enumerate(files):
    best = [{'label': class_names[c], 'probability': float(f'{predictions.probabilities[i, c]:.6g}')} for c in order[i]]
    leaving = {'exit': int(predictions.exits[i]), 'macs': int(predictions.macs[i])}
    rows.append({'file': file, **best[0], **leaving, 'top': best})
  return rows


class JsonFormat:
  """One list, an object a line."""

  before, after = '[', '\n]\n'

  def __init__(self):
    self._separator = '\n'

  def row(self, row: dict[str, Any]) -> str:
    text = self._separator + json.dumps(row)
    self._separator = ',\n'
    return text


class CsvFormat:
  """file, label, probability, exit, macs, then label_2, probability_2 and so on for the next best classes."""

  after = ''

  def __init__(self, top: int):
    runners_up = [f'{name}_{place}' for place in range(2, top + 1) for name in ('label', 'probability')]
    self.before = _csv_line(['file', 'label', 'probability', 'exit', 'macs', *runners_up])

  def row(self, row: dict[str, Any]) -> str:
    runners_up = [value for entry in row['top'][1:] for value in entry.values()]
    return _csv_line([row[key] for key in ('file', 'label', 'probability', 'exit', 'macs')] + runners_up)


def _csv_line(values: Sequence[Any]) -> str:
  text = io.StringIO()
  csv.writer(text, lineterminator='\n').writerow(values)
  return text.getvalue()


class TableFormat:
  """Aligned columns whose widths are known from the start; the next best classes as far as `columns` reach.

  Args:
    files: all that may come.
    class_names: all there are.
    columns: of the terminal; None: there is no limit.
  """

  after = ''

  def __init__(self, files: Sequence[str], class_names: Sequence[str], columns: int | None):
    self._columns = columns
    file_width = _width(('file', *map(printable, files)), _LONGEST_FILE)
    self._layout = (
      f'{{:{file_width}}}  {{:{_width(("label", *class_names), _LONGEST_LABEL)}}}  {{:>11}}  {{:>4}}  {{:>8}}'
    )
    self.before = self._layout.format('file', 'label', 'probability', 'exit', 'macs') + '  next best\n'

  def row(self, row: dict[str, Any]) -> str:
    text = self._layout.format(
      printable(row['file']), row['label'], f'{row["probability"]:.3f}', row['exit'], human_count(row['macs'])
    )
    separator = '  '
    for entry in row['top'][1:]:
      more = f'{separator}{entry["label"]} {entry["probability"]:.3f}'
      if self._columns and len(text + more) > self._columns:
        break
      text, separator = text + more, ', '
    return text + '\n'


def _width(texts: Sequence[str], most: int) -> int:
  return min(most, max(map(len, texts)))


def make_format(name: str, files: Sequence[str], class_names: Sequence[str], top: int, stream: TextIO) -> Format:
  """The format of a name in FORMATS, for a stream; the arguments are those of the formats."""
  if name == 'json':
    return JsonFormat()
  if name == 'csv':
    return CsvFormat(top)
  return TableFormat(files, class_names, shutil.get_terminal_size().columns if stream.isatty() else None)


def check_output(path: Path, overwrite: bool) -> None:
  """Refuses a file that cannot be written, or that is there already.

  Raises:
    UserError: so it is.
  """
  if os.path.lexists(path) and not os.path.isfile(path):
    raise UserError(f'--output must be a file, and {path} is none; set --output')
  if os.path.lexists(path) and not overwrite:
    raise UserError(f'{path} is there already; set --output to another file, or --overwrite')
  if not os.path.isdir(path.parent):
    raise UserError(f'--output must be in a folder, and there is no {path.parent}; make it, or set --output')


@contextmanager
def open_output(path: Path | None) -> Iterator[TextIO]:
  """A stream to write to: standard output, or a file that appears whole when the context ends without an error.

  Raises:
    UserError: it cannot be written.
    BrokenPipeError: whoever read standard output has stopped.
  """
  try:
    if path is None:
      yield sys.stdout
      return
    # A name that is not UTF-8 is written with escapes, as on standard output.
    with replacing(path, shared=True, encoding='utf-8', errors='backslashreplace', newline='') as stream:
      yield stream
  except OSError as error:
    if path is None:  # Python would try once more to write what is left when it ends.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
      raise
    where = path or 'standard output'
    raise UserError(f'{where} cannot be written: {error.strerror or error}; set --output to another file') from error
