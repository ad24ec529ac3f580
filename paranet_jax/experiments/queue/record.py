"""queue.json: with which code and environment each run of a queue began and went on, and what became of it."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from paranet_jax.host.errors import UserError
from paranet_jax.host.files import read_object, write_json
from paranet_jax.host.machine import cpu_name, library_versions, usable_cores

FILE = 'queue.json'

_FIX = 'restore it, or move it away: runs then go on with the present code'


@dataclasses.dataclass
class RunRecord:
  """What a queue knows of a run.

  Attributes:
    arguments: with which the run began; a queue file may ask for others later.
    code, commit: fingerprint of the code that it began with, and its git commit, if known.
    starts: of its processes, each with `date` and the entries of `environment`.
    finished: date; '': it is not.
    failed: why its last process failed; '': it did not.
  """

  arguments: list[str]
  code: str
  commit: str | None
  starts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  finished: str = ''
  failed: str = ''


def environment(cores: tuple[int, ...] = ()) -> dict[str, Any]:
  """What determines results besides code, configuration and data: libraries, flags, processor and number of cores."""
  return {
    'versions': library_versions(),
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
    'platforms': os.environ.get('JAX_PLATFORMS', ''),
    'processor': cpu_name(),
    'cores': len(cores) or usable_cores(),
  }


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """The entries in which two environments differ, as `jax: before -> now`."""
  old, new = ({**entry, **entry['versions']} for entry in (before, now))
  names = [name for name in new if name not in ('versions', 'date')]
  return [f'{name}: {old.get(name)} -> {new[name]}' for name in names if old.get(name) != new[name]]


def read_records(workdir: Path) -> dict[str, RunRecord]:
  """Reads queue.json; without one, there are no records.

  Raises:
    UserError: it is damaged.
  """
  found = read_object(workdir / FILE, _FIX)
  try:
    records = {name: RunRecord(**own) for name, own in (found or {'runs': {}})['runs'].items()}
    if all(isinstance(start['versions'], dict) for record in records.values() for start in record.starts):
      return records
    raise TypeError('versions')
  except (KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{workdir / FILE} is damaged ({error!r:.60}); {_FIX}') from error


def write_records(workdir: Path, records: dict[str, RunRecord]) -> None:
  """Writes queue.json atomically."""
  write_json(workdir / FILE, {'runs': {name: dataclasses.asdict(own) for name, own in records.items()}})
