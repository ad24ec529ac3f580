"""Plain-text tables of a model's exits, at most 100 columns wide."""

import unicodedata
from collections.abc import Mapping, Sequence

from paranet_jax.host.errors import printable

ABSENT = '—'
_MOST_CLASSES, _MOST_EXITS, _LONGEST_NAME = 10, 3, 20

_DESCRIBE_NOTE = 'macs: multiply-adds an image; own: added by this stage; alone: needed by this exit alone.'


def describe_table(description: dict) -> str:
  """Formats what would be trained: a title, one row per exit and a note on the columns.

  Args:
    description: of `describe`; entries other than `name`, `dataset` and `exits` are ignored.
  """
  counts = ('own_params', 'params', 'own_macs', 'macs', 'macs_alone')
  exits = description['exits']
  rows = [
    (str(entry['exit']), entry['learns_from'] if entry['trained'] else ABSENT, *(f'{entry[key]:,}' for key in counts))
    for entry in exits
  ]
  title = (
    f'{description["name"]} on {description["dataset"]}: {human_count(exits[-1]["params"])} parameters, '
    f'{human_count(exits[-1]["macs"])} multiply-adds an image'
  )
  header = ('exit', 'learns from', *(key.replace('_', ' ') for key in counts))
  return '\n'.join([title, *align(header, rows, left=(1,)), _DESCRIBE_NOTE])


def evaluation_table(evaluations: Mapping[str, Sequence[dict]]) -> str:
  """Formats one row per split and exit: accuracies in percent, loss, and NLL in nats.

  Args:
    evaluations: for each split a list of `exit`, `trained`, `accuracy`, `balanced_accuracy`, `top5` (fractions 0..1),
      `loss`, `nll`, or, of images without labels, of `exit`, `trained` and `agreement` with the last exit. None, and
      all metrics of an exit that is not trained, are shown as a dash.
  """
  if any('agreement' in entry for entries in evaluations.values() for entry in entries):
    rows = [
      (split, str(entry['exit']), _number(entry, 'agreement', 100, 2))
      for split, entries in evaluations.items()
      for entry in entries
    ]
    return '\n'.join(align(('split', 'exit', 'same answer as the last exit (%)'), rows, left=(0,)))
  columns = (('accuracy', 100, 2), ('balanced_accuracy', 100, 2), ('top5', 100, 2), ('loss', 1, 4), ('nll', 1, 4))
  rows = [
    (split, str(entry['exit']), *(_number(entry, *column) for column in columns))
    for split, entries in evaluations.items()
    for entry in entries
  ]
  header = ('split', 'exit', 'accuracy (%)', 'balanced (%)', 'top-5 (%)', 'loss', 'nll')
  return '\n'.join(align(header, rows, left=(0,)))


def class_table(exits: Sequence[dict], class_names: Sequence[str]) -> str:
  """Formats the classes that the last trained exit gets right least often, and what it takes them for.

  Args:
    exits: of `Evaluator.evaluate` on one split, with `class_accuracy` and `confusion`.
    class_names: one per output.
  """
  trained = [entry for entry in exits if entry['trained']]
  last, matrix = trained[-1], trained[-1]['confusion']
  shown = trained if len(trained) <= _MOST_EXITS else [trained[0], *trained[1 - _MOST_EXITS :]]
  present = [number for number, share in enumerate(last['class_accuracy']) if share is not None]
  worst = sorted(present, key=lambda number: last['class_accuracy'][number])[:_MOST_CLASSES]
  rows = []
  for number in worst:
    shares = (f'{100 * entry["class_accuracy"][number]:.2f}' for entry in shown)
    images, taken_for = ABSENT, ABSENT
    if matrix is not None:
      wrong = [0 if other == number else int(count) for other, count in enumerate(matrix[number])]
      images, most = f'{int(matrix[number].sum()):,}', max(wrong)
      taken_for = f'{short_name(class_names[wrong.index(most)], _LONGEST_NAME)} ({most:,})' if most else ABSENT
    rows.append((short_name(class_names[number], _LONGEST_NAME), images, *shares, taken_for))
  what = f'the {len(worst)} least accurate of {len(present):,} classes' if len(present) > len(worst) else 'all classes'
  header = ('class', 'images', *(f'exit {entry["exit"]} (%)' for entry in shown), 'most often taken for')
  title = f'{what} on test images, least accurate at exit {last["exit"]} first'
  return '\n'.join([title, *align(header, rows, left=(0, len(header) - 1))])


def short_name(name: str, longest: int) -> str:
  """A class name in at most `longest` columns that can be printed."""
  name = printable(name)
  if width(name) <= longest:
    return name
  while width(name) >= longest:
    name = name[:-1]
  return f'{name}…'


def width(text: str) -> int:
  """Columns of a terminal: a Chinese character takes two, and an accent that is a character of its own none."""
  return sum(0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in 'FW') for char in text)


def human_count(count: int) -> str:
  """Formats a count for reading: `9,999`, `198.5 k`, `3.41 M`, `1.23 G`."""
  for unit, size, digits in (('G', 1e9, 2), ('M', 1e6, 2), ('k', 1e3, 1)):
    # Compare after rounding, so that 999,960 is 1.00 M and not 1000.0 k.
    if count >= 10_000 and round(count / size, digits) >= 1:
      return f'{count / size:.{digits}f} {unit}'
  return f'{count:,}'


def rounded(value: float, digits: int = 3) -> str:
  """Formats a number with so many digits, and never fewer than its integer has: `0.0124`, `12.4`, `1,235`."""
  text = f'{value:.{digits}g}'
  return f'{value:,.0f}' if 'e+' in text else text


def _number(entry: dict, key: str, scale: float, digits: int) -> str:
  if not entry['trained'] or entry[key] is None:
    return ABSENT
  return f'{scale * entry[key]:.{digits}f}'


def align(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
  """Formats a table; the columns numbered in `left` are left-aligned, all others right-aligned."""
  widths = [max(map(width, column)) for column in zip(header, *rows, strict=True)]
  lines = []
  for row in (header, *rows):
    free = [' ' * (widest - width(cell)) for cell, widest in zip(row, widths, strict=True)]
    cells = [cell + space if i in left else space + cell for i, (cell, space) in enumerate(zip(row, free, strict=True))]
    lines.append('  '.join(cells).rstrip())
  return lines
