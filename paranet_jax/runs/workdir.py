"""A run's folder and the configuration saved in it."""

import json
import os
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from paranet_jax.base_config import RENAMED, base_config, family_of, field_names
from paranet_jax.config import differences
from paranet_jax.host.arguments import absolute, check_utf8
from paranet_jax.host.errors import UserError
from paranet_jax.host.files import check_regular, read_object, write_json
from paranet_jax.host.lock import LOCK
from paranet_jax.models.registry import BFLOAT16, INSISTED, find_family

CONFIG = 'config.json'
SUMMARY = 'summary.json'
AVERAGE = 'average'
"""Folder of the averaged weights of a finished run, which is a run of weights alone."""
FOLDERS = ('checkpoints', 'tensorboard', 'damaged_checkpoints', 'exits', AVERAGE)
CONFUSION = 'confusion.npz'
"""Confusion matrices that are too large for summary.json: int32 [classes, classes] by split and exit."""
FILES = (
  *(CONFIG, SUMMARY, CONFUSION, 'metrics.jsonl', 'dataset.json', 'data_identity.npz', 'exits.json'),
  *('curves.png', 'confusion.png'),
)

_ALWAYS = ('name', 'seed', 'model.image_side', 'data.name', 'train.epochs')
"""Fields that every version has saved; others were added later, and take their defaults."""


_MEASURED_BY = (
  'name:',
  'model.',
  'data.short_side:',
  'data.interpolation:',
  'loss.class_weights:',
  'loss.label_smoothing:',
)
"""Fields that change what a checkpoint answers to an image, or what is told of it."""

_BEFORE_CONFIG = 'dataset.json', 'data_identity.npz'
"""What a run that is killed at its start may leave without a configuration."""


class Accepted(NamedTuple):
  """What may differ from what a run saved: its configuration, the data itself, and the place of the data alone."""

  config: bool = False
  data: bool = False
  place: bool = False


NOTHING = Accepted()


def prepare_workdir(workdir: Path, config: ConfigDict, accept_changes: bool, moved: bool = False) -> None:
  """Creates the folder, or compares the configuration with the one saved in it.

  Args:
    workdir: absolute.
    accept_changes: the configuration may differ from the saved one.
    moved: the place of the data may.

  Raises:
    UserError: the folder cannot be written, or holds a run with a different configuration or files of something else.
  """
  check_saved(workdir, config, accept_changes, moved)
  prepare_folder(workdir)
  for name in FOLDERS:
    if os.path.lexists(workdir / name):
      prepare_folder(workdir / name)
  for name in FILES:
    check_regular(workdir / name, 'move it away, or set --workdir')
  found = [name for name in FILES if os.path.lexists(workdir / name) and name not in _BEFORE_CONFIG]
  if found and CONFIG not in found:
    raise UserError(f'{workdir} holds {found[0]} but no {CONFIG}, so no run wrote it; move it away, or set --workdir')


def prepare_folder(folder: Path, flag: str = '--workdir') -> None:
  """Creates a folder, or checks that it is writable.

  Args:
    flag: names the folder on the command line.

  Raises:
    UserError: it cannot be created or is not writable.
  """
  what = f'{flag.removeprefix("--")} {folder}'
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError) as error:
    found = 'a file' if os.path.exists(folder) or not os.path.islink(folder) else 'a dangling link'
    raise UserError(f'{what} must be a folder, found {found}; set {flag}') from error
  except OSError as error:
    raise UserError(f'{what} cannot be created: {error.strerror}; set {flag}') from error
  if not os.access(folder, os.W_OK | os.X_OK):
    raise UserError(f'{what} is not writable; set {flag}')


def run_of(path: Path) -> Path | None:
  """The run of which a path is a file, or would be if it existed; None: there is none."""
  real = Path(os.path.realpath(path.parent)) / path.name
  for folder in real.parents:
    name, *below = real.relative_to(folder).parts
    holds_run = os.path.exists(folder / CONFIG) or os.path.exists(folder / FOLDERS[0])
    if holds_run and name in (FOLDERS if below else (*FILES, LOCK)):
      return folder
  return None


def save_config(workdir: Path, config: ConfigDict) -> None:
  """Saves the configuration, replacing an earlier one."""
  write_json(workdir / CONFIG, _as_saved(config))


def restore_config(workdir: Path) -> ConfigDict:
  """Reads the saved configuration; fields that it lacks take their defaults.

  Raises:
    UserError: there is none, or it has a family or fields that this version does not know.
  """
  saved, path = _load_config(workdir), workdir / CONFIG
  named = saved['model'].get('family')
  if named and find_family(named) is None:
    raise UserError(
      f'{path} has the model.family {named!r}, which is not known here; install the package that has it, or update '
      'paranet_jax'
    )
  config = base_config(family=family_of(saved))
  unknown = set(field_names(saved)) - set(field_names(config))
  if unknown:
    raise UserError(f'{path} has a field {min(unknown)} that this version does not know; update paranet_jax')
  try:
    config.update(saved)
  except (TypeError, ValueError) as error:
    raise UserError(f'{path} does not fit ({error}); restore it') from error
  return config


def changes(workdir: Path, config: ConfigDict, moved: bool = False) -> list[str]:
  """The fields in which the saved configuration differs from this one, as `field: saved -> now`.

  Args:
    moved: leaves out the place of the data, as if PARANET_DATA_DIR named it.

  Raises:
    UserError: the saved configuration cannot be read.
  """
  saved, place = _load_config(workdir), os.environ.get('PARANET_DATA_DIR')
  moved = moved or bool(place and config.data.data_dir == str(absolute(place)))
  found = differences(_with_defaults(saved, _as_saved(base_config(family=family_of(saved)))), _as_saved(config))
  dtypes = saved['model'].get('dtype'), config.model.dtype
  ignored = ['data.data_dir:'] * moved
  if dtypes[1] == BFLOAT16 or BFLOAT16 in dtypes and INSISTED in dtypes:  # See `runs/dtype.py`.
    ignored.append('model.dtype:')
  return [change for change in found if not change.startswith(tuple(ignored))]


def saved_dtype(workdir: Path) -> str | None:
  """The `model.dtype` that a run has saved; None: there is no run.

  Raises:
    UserError: the saved configuration cannot be read.
  """
  return _load_config(workdir)['model'].get('dtype', 'float32') if os.path.exists(workdir / CONFIG) else None


def check_saved(workdir: Path, config: ConfigDict, accept_changes: bool, moved: bool = False) -> None:
  """Compares the configuration with the one saved in a folder, if any; see `prepare_workdir`."""
  check_utf8(workdir, '--workdir')
  if not os.path.exists(workdir / CONFIG):
    return
  if accept_changes:
    _load_config(workdir)  # What is damaged, or no run's, is not overwritten either.
    return
  changed = changes(workdir, config, moved)
  if changed:
    place = any(change.startswith('data.data_dir:') for change in changed)
    raise UserError(
      f'workdir {workdir} holds a run with a different configuration: {"; ".join(changed)} (saved -> now); '
      f'set --workdir for a new run, {"--data_dir for the same images in another place, " if place else ""}'
      'or --accept_config_changes to train with the new one'
    )


def check_evaluated(workdir: Path, config: ConfigDict) -> None:
  """Raises UserError if a configuration computes or measures a checkpoint of the folder otherwise than its run did."""
  changed = changes(workdir, config, moved=True) if os.path.exists(workdir / CONFIG) else []
  # A checkpoint may be measured in another dtype than it was trained in.
  other = [change for change in changed if change.startswith(_MEASURED_BY) and not change.startswith('model.dtype:')]
  if other:
    raise UserError(
      f'workdir {workdir} holds a run with a different configuration: {"; ".join(other)} (saved -> now); leave out '
      '--config, or set these fields as the run has them'
    )


def _with_defaults(saved: dict, defaults: dict) -> dict:
  """A saved configuration with the fields that were added later."""
  sections = {key for key, value in saved.items() if isinstance(value, dict) and isinstance(defaults.get(key), dict)}
  return defaults | saved | {key: _with_defaults(saved[key], defaults[key]) for key in sections}


def _as_saved(config: ConfigDict) -> dict:
  return json.loads(config.to_json())


def _load_config(workdir: Path) -> dict:
  path, fix = workdir / CONFIG, 'restore it, or set --workdir for a new run'
  saved = read_object(path, fix)
  if saved is None:
    found = 'a dangling link' if workdir.is_symlink() and not os.path.exists(workdir) else 'none'
    raise UserError(f'expected a run with a {CONFIG} in {workdir}, found {found}; set --workdir')
  if missing := [name for name in _ALWAYS if name not in field_names(saved)]:
    raise UserError(f'{path} is not the configuration of a run (it lacks the field {missing[0]}); {fix}')
  return _present_names(saved)


def _present_names(saved: dict) -> dict:
  """The same configuration with the present names of fields."""
  for old, new in RENAMED.items():
    section, name = old.split('.')
    if name in (fields := saved[section]):
      fields[new.removeprefix(f'{section}.')] = fields.pop(name)
  return saved
