"""A run's folder and the configuration saved in it."""

import json
import os
from pathlib import Path

from ml_collections import ConfigDict

from paranet_jax.base_config import RENAMED, base_config, family_of, field_names
from paranet_jax.config import differences
from paranet_jax.host.errors import UserError
from paranet_jax.host.files import read_object, write_json

CONFIG = 'config.json'
SUMMARY = 'summary.json'
FOLDERS = ('checkpoints', 'tensorboard')


def prepare_workdir(workdir: Path, config: ConfigDict, accept_changes: bool) -> None:
  """Creates the folder, or compares the configuration with the one saved in it.

  Args:
    workdir: absolute.
    accept_changes: the configuration may differ from the saved one.

  Raises:
    UserError: the folder cannot be written, or holds a run with a different configuration.
  """
  prepare_folder(workdir)
  for name in FOLDERS:
    if (workdir / name).exists():
      prepare_folder(workdir / name)
  if (workdir / CONFIG).exists() and not accept_changes:
    _check_same(workdir, config)


def prepare_folder(folder: Path) -> None:
  """Creates a folder, or checks that it is writable.

  Raises:
    UserError: it cannot be created or is not writable.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError) as error:
    raise UserError(f'workdir {folder} must be a folder, found a file; set --workdir') from error
  except OSError as error:
    raise UserError(f'workdir {folder} cannot be created: {error.strerror}; set --workdir') from error
  if not os.access(folder, os.W_OK | os.X_OK):
    raise UserError(f'workdir {folder} is not writable; set --workdir')


def save_config(workdir: Path, config: ConfigDict) -> None:
  """Saves the configuration, replacing an earlier one."""
  write_json(workdir / CONFIG, _as_saved(config))


def restore_config(workdir: Path) -> ConfigDict:
  """Reads the saved configuration; fields that it lacks take their defaults.

  Raises:
    UserError: there is none, or it has fields that this version does not know.
  """
  saved, path = _load_config(workdir), workdir / CONFIG
  config = base_config(family=family_of(saved))
  unknown = set(field_names(saved)) - set(field_names(config))
  if unknown:
    raise UserError(f'{path} has a field {min(unknown)} that this version does not know; set --config instead')
  try:
    config.update(saved)
  except (TypeError, ValueError) as error:
    raise UserError(f'{path} does not fit ({error}); fix it, or set --config') from error
  return config


def changes(workdir: Path, config: ConfigDict) -> list[str]:
  """The fields in which the saved configuration differs from this one, as `field: saved -> now`.

  Raises:
    UserError: the saved configuration cannot be read.
  """
  saved = _load_config(workdir)
  return differences(_with_defaults(saved, _as_saved(base_config(family=family_of(saved)))), _as_saved(config))


def _check_same(workdir: Path, config: ConfigDict) -> None:
  changed = changes(workdir, config)
  if changed:
    raise UserError(
      f'workdir {workdir} holds a run with a different configuration: {"; ".join(changed)} (saved -> now); '
      'set --workdir for a new run, or --accept_config_changes to train with the new one'
    )


def _with_defaults(saved: dict, defaults: dict) -> dict:
  """A saved configuration with the fields that were added later."""
  sections = {key for key, value in saved.items() if isinstance(value, dict) and isinstance(defaults.get(key), dict)}
  return defaults | saved | {key: _with_defaults(saved[key], defaults[key]) for key in sections}


def _as_saved(config: ConfigDict) -> dict:
  return json.loads(config.to_json())


def _load_config(workdir: Path) -> dict:
  path = workdir / CONFIG
  try:
    return _present_names(read_object(path))
  except OSError as error:
    raise UserError(f'expected a run with a {CONFIG} in {workdir}, found none; set --workdir') from error
  except ValueError as error:
    raise UserError(f'{path} is not a JSON object ({error}); restore it, or set --workdir for a new run') from error


def _present_names(saved: dict) -> dict:
  """The same configuration with the present names of fields."""
  for old, new in RENAMED.items():
    section, name = old.split('.')
    if name in (fields := saved.get(section, {})):
      fields[new.removeprefix(f'{section}.')] = fields.pop(name)
  return saved
