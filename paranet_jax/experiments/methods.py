"""`python -m paranet_jax.experiments methods`: methods of training several exits, as one table for each network.

It reads the results of a queue whose rows are named NETWORK-METHOD, such as configs/queues/methods.toml, and computes
nothing: what is not finished is shown with its epoch.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from paranet_jax.display.tables import ABSENT
from paranet_jax.experiments.markdown import table, with_std
from paranet_jax.host.arguments import Parser, absolute
from paranet_jax.host.errors import UserError, report_no_room, say
from paranet_jax.host.files import read_object, write_text

RESULTS = 'results.json'
MARKDOWN = 'methods.md'
CONTROL = 'plain'
"""The method that the others are compared with."""

_WORKDIR = 'results/queue-methods'
_QUEUE = 'configs/queues/methods.toml'

Rows = Sequence[Mapping[str, Any]]


def run(argv: Sequence[str]) -> int:
  """Runs the command with the arguments after `methods`; returns its exit code."""
  parser = Parser(
    prog='python -m paranet_jax.experiments methods',
    description=f'Writes one table for each network, by method, from the results of a queue such as {_QUEUE}.',
  )
  parser.add_argument('--workdir', default=_WORKDIR, help=f'Folder of the queue (default: {_WORKDIR}).')
  folder = absolute(parser.parse_args(argv).workdir)
  found = read_object(folder / RESULTS, 'write it again by `run QUEUE.toml --write`, or set --workdir')
  if found is None:
    raise UserError(
      f'expected {RESULTS} of a queue in {folder}, found none; write it by `python -m paranet_jax.experiments run '
      f'{_QUEUE} --write`, or set --workdir'
    )
  try:
    text = methods_markdown(found)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise UserError(f'{folder / RESULTS} is not of a queue ({error!r:.60}); set --workdir') from error
  with report_no_room(folder):
    write_text(folder / MARKDOWN, text)
  say(f'{text}\nwritten: {folder / MARKDOWN}')
  return 0


def methods_markdown(found: Mapping[str, Any]) -> str:
  """The tables.

  Args:
    found: the content of a queue's results.json (see `queue.results`).
  """
  rows = [row for row in found['rows'] if '-' in row['run']]
  if found['rows'] and not rows:
    raise UserError(
      f'expected rows named NETWORK-METHOD, found {found["rows"][0]["run"]!r:.60} in {RESULTS} of {found["queue"]}; '
      'name them so, or set --workdir'
    )
  networks = dict.fromkeys(row['run'].partition('-')[0] for row in rows)
  parts = [
    f'# Methods of training several exits, {found["date"]}',
    'Test accuracy (%) of the last step, mean +- standard deviation (n - 1) over the seeds; in brackets the mean '
    f'difference from `{CONTROL}` over the seeds that both have. Multiply-adds for an image include the exits before. '
    f'Made from `{RESULTS}` of {found["queue"]} by `python -m paranet_jax.experiments methods`; commands, hardware and '
    'wall times are in `results.md`.',
  ]
  for network in networks:
    parts += _section(network, [row for row in rows if row['run'].partition('-')[0] == network])
  return '\n\n'.join(parts if rows else [parts[0], 'Nothing has been measured yet.']) + '\n'


def _section(network: str, rows: Rows) -> list[str]:
  control = [row for row in rows if row['run'] == f'{network}-{CONTROL}' and not row['partial']]
  plain = {row['exit']: dict(zip(row['seeds'], row['each_seed'], strict=True)) for row in control}
  exits = sorted({row['exit'] for row in rows})
  costs = {number: sorted({row['macs'] for row in rows if row['exit'] == number}) for number in exits}
  common = set.intersection(*(set(row['reduced']) for row in rows))
  lines = [['multiply-adds, M', '', '', *(_millions(costs[number]) for number in exits), '']]
  for name, seeds, partial in dict.fromkeys((row['run'], tuple(row['seeds']), row['partial']) for row in rows):
    own = [row for row in rows if (row['run'], tuple(row['seeds']), row['partial']) == (name, seeds, partial)]
    first, by_exit = own[0], {row['exit']: row for row in own}
    length = f'{first["epochs"]:g}'
    if partial:
      length = f'**partial: {first["epoch"]:g} of {length}**'
    cells = [_cell(by_exit.get(number), {} if partial else plain.get(number, {})) for number in exits]
    what = '; '.join(change for change in first['reduced'] if change not in common)
    lines.append([name.partition('-')[2], ', '.join(map(str, seeds)), length, *cells, what])
  names = [rows[0]['network'], *sorted({row['network'] for row in rows} - {rows[0]['network']})]
  header = ['method', 'seeds', 'epochs', *(f'exit {number}' for number in exits), 'fields (default -> here)']
  recipe = '; '.join(change for change in rows[0]['reduced'] if change in common) or 'nothing'
  return [f'## {", ".join(names)}', f'All rows (default -> here): {recipe}.', table(header, lines)]


def _millions(costs: Sequence[int]) -> str:
  """The cost of an exit, or the smallest and the largest of several: a method may change its network."""
  return ' to '.join(f'{cost / 1e6:.1f}' for cost in dict.fromkeys((costs[0], costs[-1])))


def _cell(row: Mapping[str, Any] | None, plain: Mapping[int, float]) -> str:
  if row is None:
    return ABSENT
  pairs = zip(row['seeds'], row['each_seed'], strict=True)
  differences = [value - plain[seed] for seed, value in pairs if seed in plain]
  ours = with_std(f'{row["ours"]:.2f}', row['std'])
  if not differences or row['run'].endswith(f'-{CONTROL}'):
    return ours
  return f'{ours} ({statistics.mean(differences):+.2f})'
