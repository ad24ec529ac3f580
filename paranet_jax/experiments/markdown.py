"""table1.md and table2.md: the paper's numbers, ours, their difference, and the runs behind them."""

import shlex
from collections.abc import Sequence
from typing import Any

from paranet_jax.display.progress import human_duration
from paranet_jax.display.tables import ABSENT

_ROWS = (
  'network',
  'pipeline',
  'paper (%)',
  'ours (%)',
  'difference',
  'seeds',
  'multiply-adds',
  'parameters',
  'differs from the paper',
)
_EFFECTS = ('difference', 'pipeline', 'paper', 'ours', 'each seed')
_RUNS = ('run', 'steps', 'finished', 'device', 'processor', 'cores', 'wall time')
_WIDTH = 98  # Characters of a command's line, without the backslash.


def table_markdown(section: dict[str, Any], protocol: str) -> str:
  """One of the paper's tables.

  Args:
    section: as `results.section` returns it.
    protocol: its name.
  """
  parts = [
    f'# {section["title"]}',
    section['question'],
    conditions(section, protocol),
    table(_ROWS, [_row(row, section) for row in section['rows']]),
    'Test accuracy of the last checkpoint; multiply-adds per image and parameters include this exit and the ones '
    'before it, tried in turn. Difference: ours - paper.',
    table(_EFFECTS, [_effect(effect) for effect in section['effects']]),
    table(_RUNS, [_run(run) for run in section['runs']]),
    commands_block([run['command'] for run in section['runs']]),
  ]
  return '\n\n'.join(parts) + '\n'


def conditions(section: dict[str, Any], protocol: str) -> str:
  """One paragraph: what is reduced, and over how many seeds."""
  seeds = ', '.join(map(str, section['seeds']))
  many = len(section['seeds']) > 1
  spread = f'seeds {seeds} (mean +- standard deviation, n - 1)' if many else f'seed {seeds} only'
  changes = '; '.join(section['reduced'])
  reduced = f'Reduced (paper -> here): {changes}.' if changes else "Nothing is reduced: the paper's own training."
  other = '' if section['dataset'] == 'cifar100' else f' Not comparable: on {section["dataset"]}, not on CIFAR-100.'
  return f'Protocol {protocol}, {spread}. {reduced}{other}'


def _row(row: dict[str, Any], section: dict[str, Any]) -> tuple[str, ...]:
  ours = with_std(f'{row["ours"]:.2f}', row['std'])
  run = (', '.join(map(str, section['seeds'])), f'{row["macs"]:,}', f'{row["params"]:,}', from_paper(section))
  return row['network'], str(row['exit']), published(row), ours, f'{row["difference"]:+.2f}', *run


def from_paper(own: dict[str, Any]) -> str:
  """How a row or a section differs from the paper, in a cell."""
  return '; '.join(own['reduced']) or 'nothing'


def published(row: dict[str, Any]) -> str:
  """The paper's accuracy in a row, as it gives it."""
  return f'{row["paper"]:g}' + (f' +- {row["paper_std"]:g}' if row['paper_std'] is not None else '')


def _effect(effect: dict[str, Any]) -> tuple[str, ...]:
  each = ', '.join(f'{value:+.2f}' for value in effect['each_seed'])
  ours = with_std(f'{effect["ours"]:+.2f}', effect['std'])
  return effect['what'], str(effect['exit']), f'{effect["paper"]:+.2f}', ours, each


def _run(run: dict[str, Any]) -> tuple[str, ...]:
  device = f'{run["device"]["count"]} x {run["device"]["kind"]}'
  # Runs of version 0.1.0 do not say where and when.
  finished, *place = (str(run.get(key) or ABSENT) for key in ('finished', 'processor', 'cores'))
  return run['run'], f'{run["steps"]:,}', finished, device, *place, human_duration(run['wall_time_s'])


def with_std(mean: str, std: float | None) -> str:
  """A mean as text, with its standard deviation if there is one."""
  return mean if std is None else f'{mean} +- {std:.2f}'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table in Markdown. A bar in a cell, as of a path, is escaped: it would begin another cell."""
  lines = [header, ['---'] * len(header), *([cell.replace('|', r'\|') for cell in row] for row in rows)]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def commands_block(commands: Sequence[str]) -> str:
  """Commands for a shell in Markdown, in lines that fit a page."""
  lines = []
  for command in commands:
    line = ''
    for part in map(shlex.quote, shlex.split(command)):
      if line and len(f'{line} {part}') > _WIDTH:
        lines.append(f'{line} \\')
        line = f'  {part}'
      else:
        line = f'{line} {part}' if line else part
    lines.append(line)
  return '\n'.join(['```bash', *lines, '```'])
