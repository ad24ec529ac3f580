"""Plain-text tables of a model's exits, at most 100 columns wide."""

from collections.abc import Mapping, Sequence

ABSENT = '—'

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
  """Formats one row per split and exit: accuracy and top-5 accuracy in percent, loss, and NLL in nats.

  Args:
    evaluations: for each split a list of `exit`, `trained`, `accuracy`, `top5` (fractions 0..1), `loss`, `nll`. None,
      and all metrics of an exit that is not trained, are shown as a dash.
  """
  columns = (('accuracy', 100, 2), ('top5', 100, 2), ('loss', 1, 4), ('nll', 1, 4))
  rows = [
    (split, str(entry['exit']), *(_number(entry, *column) for column in columns))
    for split, entries in evaluations.items()
    for entry in entries
  ]
  header = ('split', 'exit', 'accuracy (%)', 'top-5 (%)', 'loss', 'nll')
  return '\n'.join(align(header, rows, left=(0,)))


def human_count(count: int) -> str:
  """Formats a count for reading: `9,999`, `198.5 k`, `3.41 M`, `1.23 G`."""
  for unit, size, digits in (('G', 1e9, 2), ('M', 1e6, 2), ('k', 1e3, 1)):
    # Compare after rounding, so that 999,960 is 1.00 M and not 1000.0 k.
    if count >= 10_000 and round(count / size, digits) >= 1:
      return f'{count / size:.{digits}f} {unit}'
  return f'{count:,}'


def _number(entry: dict, key: str, scale: float, digits: int) -> str:
  if not entry['trained'] or entry[key] is None:
    return ABSENT
  return f'{scale * entry[key]:.{digits}f}'


def align(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
  """Formats a table; the columns numbered in `left` are left-aligned, all others right-aligned."""
  columns = zip(header, *rows, strict=True)
  formats = [f'{"<" if i in left else ">"}{max(map(len, column))}' for i, column in enumerate(columns)]
  return ['  '.join(map(format, row, formats)).rstrip() for row in (header, *rows)]
