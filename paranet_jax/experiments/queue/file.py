"""The queue file: which runs, in which order, and which of them are compared."""

import dataclasses
import difflib
import itertools
import os
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from paranet_jax import config as config_lib
from paranet_jax.base_config import RENAMED
from paranet_jax.command_line import load_config, override
from paranet_jax.experiments.protocols import PROTOCOLS, SET_PER_RUN
from paranet_jax.host.arguments import absolute
from paranet_jax.host.errors import UserError
from paranet_jax.host.files import read_file

_TOP = ('workdir', 'set', 'runs', 'comparisons')
_RUN = ('name', 'config', 'protocol', 'seeds', 'priority', 'paper', 'set')
_COMPARISON = ('question', 'control', 'treated', 'exit')
_NAME = re.compile(r'[A-Za-z0-9][\w.+-]*')
_INT32 = 2**31


@dataclasses.dataclass(frozen=True)
class QueuedRun:
  """One run of a queue.

  Attributes:
    row: name of the row of results that it shares with other seeds.
    priority: lower ones first; of equal ones, the first seed of each in the order of the file, then the second ones.
    arguments: for `python -m paranet_jax.main`, without `--workdir`.
    config: what these arguments mean now.
    paper: network of the paper whose accuracies its own are compared with; '': none.
  """

  row: str
  seed: int
  priority: int
  arguments: tuple[str, ...]
  config: ConfigDict = dataclasses.field(compare=False)
  paper: str = ''

  @property
  def name(self) -> str:
    """Name of its folder."""
    return f'{self.row}-s{self.seed}'


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Rows whose accuracies at one exit are compared with a control, seed by seed."""

  question: str
  control: str
  treated: tuple[str, ...]
  exit: int


@dataclasses.dataclass(frozen=True)
class QueueFile:
  """A parsed queue file.

  Attributes:
    runs: in the order in which they are trained.
    workdir: folder of the queue.
    modified: when the file was last changed before it was read, in nanoseconds; None: unknown.
  """

  path: Path
  workdir: str
  runs: tuple[QueuedRun, ...]
  comparisons: tuple[Comparison, ...]
  modified: int | None = None


def read_queue(path: Path, workdir: str | Path | None = None) -> QueueFile:
  """Reads a queue file (TOML).

  Args:
    workdir: folder of the queue; None: as the file says, or results/<name of the file>. It stands for `{workdir}` in
      values of the file.

  Raises:
    UserError: it cannot be read, or something in it is unknown, invalid or given twice.
  """
  given, modified = absolute(workdir) if workdir else None, when_modified(path)
  content = read_file(path, 'name a queue file, such as configs/queues/paper.toml')
  if content is None:
    raise UserError(f'expected a queue file at {path}, found none; name one, such as configs/queues/paper.toml')
  try:
    found = tomllib.loads(content.decode())
  except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors.
    raise UserError(f'{path} is not TOML ({error}); fix it') from error
  try:
    _check_keys(found, _TOP, 'the file')
    own = _get(found, 'workdir', str, '') or str(Path('results', path.stem))
    if given and os.path.realpath(given) != os.path.realpath(absolute(own)):
      own = str(given)
    shared = _fields(found.get('set', {}), 'set')
    entries = _tables(found, 'runs')
    if not entries:
      raise UserError('expected at least one [[runs]], found none')
    turns = itertools.zip_longest(*(_runs(entry, shared, own) for entry in entries))
    runs = [run for turn in turns for run in turn if run]  # A whole table of first seeds comes before any second one.
    _check_unique(runs)
    rows = {run.row: run.config for run in runs}
    comparisons = tuple(_comparison(entry, rows) for entry in _tables(found, 'comparisons'))
  except UserError as error:
    raise UserError(f'{path}: {error}'.replace('--config.', '')) from error
  return QueueFile(path, own, tuple(sorted(runs, key=lambda run: run.priority)), comparisons, modified)


def when_modified(path: Path) -> int | None:
  """When a file was last changed, in nanoseconds; None: it cannot be told."""
  try:
    return path.stat().st_mtime_ns
  except OSError:
    return None


def _runs(entry: dict[str, Any], shared: Mapping[str, str], workdir: str) -> list[QueuedRun]:
  where = f'[[runs]] {entry.get("name", entry.get("config", ""))}'.strip()
  _check_keys(entry, _RUN, where)
  flag = _get(entry, 'config', str, None)
  if not flag:
    raise UserError(f'{where} needs a config, such as config = "paranet_jax:paranet:PN3-xdx"')
  protocol = _get(entry, 'protocol', str, 'paper')
  if protocol not in PROTOCOLS:
    raise UserError(f'{where}: protocol must be one of {", ".join(PROTOCOLS)}, found {protocol}')
  seeds = _get(entry, 'seeds', list, [0])
  if not seeds or not all(type(seed) is int and -_INT32 <= seed < _INT32 for seed in seeds):
    raise UserError(f'{where}: seeds must be a list of integers of 32 bits, such as [0, 1, 2], found {seeds!r:.60}')
  fields = PROTOCOLS[protocol] | shared | _fields(entry.get('set', {}), where)
  values = {field: value.replace('{workdir}', workdir) for field, value in sorted(fields.items())}
  arguments = [f'--config={flag}', *(f'--config.{field}={value}' for field, value in values.items())]
  try:
    config = _config(flag, arguments[1:])
  except UserError as error:
    raise UserError(f'{where}: {error}') from error
  if config.seeds != 1:
    raise UserError(f'{where}: its configuration has {config.seeds} seeds; list them in seeds')
  name = _get(entry, 'name', str, config.name)
  if not _NAME.fullmatch(name):
    raise UserError(f'{where}: a name has letters, digits and ._+-, found {name!r:.60}')
  priority, paper = _get(entry, 'priority', int, 100), _get(entry, 'paper', str, config.name)
  runs = []
  for seed in seeds:
    own = config.copy_and_resolve_references()
    own.seed = seed
    runs.append(QueuedRun(name, seed, priority, (*arguments, f'--config.seed={seed}'), own, paper))
  return runs


def _config(flag: str, overrides: Collection[str]) -> ConfigDict:
  config = load_config(flag)
  override(config, list(overrides))
  config_lib.validate(config)
  config_lib.absolute_paths(config)
  return config


def _check_unique(runs: list[QueuedRun]) -> None:
  first: dict[str, QueuedRun] = {}
  names = set()
  for run in runs:
    if run.name in names:
      raise UserError(f'two runs are named {run.name}; give one of them another name')
    names.add(run.name)
    other = first.setdefault(run.row, run)
    if other.arguments[:-1] != run.arguments[:-1] or other.paper != run.paper:
      raise UserError(f'runs named {run.row} differ in more than their seeds; give one of them another name')


def _comparison(entry: dict[str, Any], rows: Mapping[str, ConfigDict]) -> Comparison:
  where = f'[[comparisons]] {entry.get("question", "")}'.strip()
  _check_keys(entry, _COMPARISON, where)
  treated = entry.get('treated', [])
  treated = [treated] if isinstance(treated, str) else treated
  control, number = _get(entry, 'control', str, ''), _get(entry, 'exit', int, 0)
  if not isinstance(treated, list) or not all(isinstance(name, str) for name in treated) or not treated or number < 1:
    raise UserError(f'{where} needs control, treated (a list of names) and exit (from 1)')
  for name in (control, *treated):
    if name not in rows:
      raise UserError(f'{where}: expected names of [[runs]], found {name!r}{_near(str(name), rows)}')
    if number > (exits := len(config_lib.targets(rows[name]))):
      raise UserError(f'{where}: expected an exit from 1 to {exits}, the last one of {name}, found {number}; set exit')
  return Comparison(_get(entry, 'question', str, ''), control, tuple(treated), number)


def _fields(found: Any, where: str, section: str = '') -> dict[str, str]:
  """Fields and values as on the command line."""
  if not isinstance(found, dict):
    raise UserError(f'{where}: set must be a table of fields and values, such as {{ "train.epochs" = 13 }}')
  fields = {}
  for name, value in found.items():
    field = RENAMED.get(section + name, section + name)  # Otherwise the old name of a field would be another one.
    if isinstance(value, dict):  # train.epochs without quotes is a table in TOML.
      fields |= _fields(value, where, f'{field}.')
    elif field in SET_PER_RUN:
      raise UserError(f'{where}: {field} differs between the runs; set name, config or seeds of [[runs]]')
    else:
      fields[field] = f'({",".join(map(str, value))}{"," * bool(value)})' if isinstance(value, list) else str(value)
  return fields


def _tables(found: dict[str, Any], key: str) -> list[dict[str, Any]]:
  tables = found.get(key, [])
  if not isinstance(tables, list) or not all(isinstance(entry, dict) for entry in tables):
    raise UserError(f'expected tables [[{key}]], found {tables!r:.60}')
  return tables


def _check_keys(found: dict[str, Any], known: Collection[str], where: str) -> None:
  for key in found:
    if key not in known:
      raise UserError(f'{where} has an unknown key {key!r}{_near(key, known)}; known are {", ".join(known)}')


def _near(name: str, known: Collection[str]) -> str:
  near = difflib.get_close_matches(name, known, 1)
  return f' (did you mean {near[0]}?)' if near else ''


def _get(found: dict[str, Any], key: str, kind: type, default: Any) -> Any:
  value = found.get(key, default)
  if value is not default and type(value) is not kind:
    raise UserError(f'{key} must be {_KINDS[kind]}, found {value!r:.60}')
  return value


_KINDS = {str: 'a string in quotes', int: 'an integer', list: 'a list'}
