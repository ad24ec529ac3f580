"""What a benchmark found: rows, the machine, and the table to read."""

import datetime
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from benchmarks.peers import PACKAGES
from paranet_jax.doctor import report as doctor
from paranet_jax.host.machine import cpu_features, cpu_name, environment, usable_cores

EXTRAS = (*PACKAGES, 'libtpu')
FEATURES = frozenset({*doctor.FEATURES, 'avx512_vnni'})
"""Instruction sets that decide how fast products are, by Linux's names."""
COLUMNS = ('what', 'peer', 'batch', 'exit', 'ours', 'theirs', 'ratio', 'unit')


def row(
  what: str, peer: str, ours: float, theirs: float, unit: str, batch: int | None = None, exit: int | None = None
) -> dict[str, Any]:
  """One comparison.

  Args:
    what: was measured.
    peer: whom with.
    ours, theirs: in `unit`; the ratio is ours / theirs.
    batch: images.
    exit: 1-based, computed alone; None: all of them.
  """
  return dict(zip(COLUMNS, (what, peer, batch, exit, ours, theirs, ours / theirs, unit), strict=True))


def compare(
  what: str, seconds: Mapping[str, float], *, unit: str, batch: int, exit: int | None = None
) -> list[dict[str, Any]]:
  """A row for each peer of 'ours'.

  Args:
    seconds: a call, of 'ours' and of each peer.
    unit: 'images/s' or 'ms' a call.
  """
  values = {name: batch / value if unit == 'images/s' else 1000 * value for name, value in seconds.items()}
  ours = values.pop('ours')
  return [row(what, peer, ours, theirs, unit, batch, exit) for peer, theirs in values.items()]


def headline(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """`ours`, `theirs` and `ratio` of the first row, and `rows`."""
  return {name: rows[0][name] for name in ('ours', 'theirs', 'ratio')} | {'rows': list(rows)}


def surroundings() -> dict[str, Any]:
  """`machine`, `versions` and `date`: what a number needs beside it."""
  facts = environment(jax.devices()[:1])
  extras = {name: importlib.metadata.version(name) for name in EXTRAS if importlib.util.find_spec(name)}
  machine = {
    'cpu': cpu_name(),
    'cores': usable_cores(),
    'features': ' '.join(sorted(FEATURES & cpu_features())),
    'system': platform.platform(),
    'device': facts['device'],
    'load_average': round(os.getloadavg()[0], 2),
  }
  versions = facts['versions'] | extras
  return {'machine': machine, 'versions': versions, 'date': datetime.date.today().isoformat()}


def text(result: Mapping[str, Any]) -> str:
  """The rows as an aligned table, then every other fact on a line of its own."""
  columns = list(result['rows'][0])
  cells = [columns, *([_cell(entry[column]) for column in columns] for entry in result['rows'])]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  # Names left, numbers right.
  sides = ['<' if column in ('what', 'peer', 'unit') else '>' for column in columns]
  lines = ['  '.join(map(format, line, map('{}{}'.format, sides, widths))).rstrip() for line in cells]
  facts = [f'{name}: {_fact(value)}' for name, value in result.items() if name != 'rows']
  return '\n'.join([*lines, '', *facts])


def rounded(value: Any) -> Any:
  """Every float of a tree of dicts and lists, to five digits."""
  if isinstance(value, float):
    return float(f'{value:.5g}')
  if isinstance(value, dict):
    return {name: rounded(part) for name, part in value.items()}
  return [rounded(part) for part in value] if isinstance(value, list) else value


def _cell(value: Any) -> str:
  if isinstance(value, float):
    return f'{value:,.0f}' if value >= 1000 else f'{value:.3g}'
  return '' if value is None else str(value)


def _fact(value: Any) -> str:
  return ', '.join(f'{name} {_fact(part)}' for name, part in value.items()) if isinstance(value, dict) else str(value)
