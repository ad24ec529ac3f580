"""Packing a run to share it: parameters at half precision, the log and the configuration, without optimizer state."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from paranet_jax.config import without_paths
from paranet_jax.display.metrics import FILE_NAME as METRICS
from paranet_jax.display.metrics import drop_after, read_metrics
from paranet_jax.evaluation import AGREEMENT, MEASURES
from paranet_jax.host.errors import UserError
from paranet_jax.host.files import read_object, write_json
from paranet_jax.host.new_folder import moved_there
from paranet_jax.runs.checkpoints import FOLDER, Checkpoints
from paranet_jax.runs.dataset_facts import DATASET, restore_dataset_facts
from paranet_jax.runs.learned import IDENTITY
from paranet_jax.runs.workdir import AVERAGE, CONFUSION, SUMMARY, prepare_folder, restore_config, save_config

_CARRIED = (SUMMARY, DATASET)
_MEASURED = (*MEASURES, AGREEMENT, 'class_accuracy', 'confusion')
_OPTIONAL = (METRICS, IDENTITY, CONFUSION)  # Averaged weights have no log of their own.


def pack(workdir: Path, out: Path, asked: int | None = None) -> int:
  """Writes a run's parameters in float16 and its running statistics in float32 to another folder.

  Every command, and `init_from`, reads that folder as a run, but it cannot be trained further. It gets no exits.json:
  the thresholds of the original do not hold for the rounded network.

  Args:
    workdir: absolute, of a finished run.
    out: absolute; must not exist, or be empty.
    asked: the checkpoint's step; None: the latest.

  Returns:
    The step of the checkpoint.

  Raises:
    UserError: there is no finished run or no such checkpoint, a parameter is too large for float16, or `out` is not
      empty.
  """
  config = restore_config(workdir)
  restore_dataset_facts(workdir, channels=config.model.channels)
  for name in _CARRIED:
    if not (workdir / name).exists():
      raise UserError(f'expected a finished run, and {workdir} has no {name}; train it to its end first')
  with Checkpoints(workdir) as checkpoints:
    step, variables = checkpoints.read_chosen(lambda found: found.choose(asked), checkpoints.read_variables)
    variables = _rounded(variables)
  _check_free(out)
  with _whole_or_nothing(out) as folder:
    save_config(folder, without_paths(config))
    for name in (*_CARRIED, *(name for name in _OPTIONAL if (workdir / name).exists())):
      shutil.copyfile(workdir / name, folder / name)
    _tell_of_step(folder, step)
    with Checkpoints(folder, keep=1) as checkpoints:
      checkpoints.save(step, variables, {'seed': config.seed})
  return step


def _tell_of_step(out: Path, step: int) -> None:
  """Makes the summary and the log those of an earlier step: what was not measured there is None."""
  summary = read_object(out / SUMMARY, 'train the run to its end first') or {}
  if summary['steps'] == step:
    return
  drop_after(out / METRICS, step)
  lines = {line['split']: line for line in read_metrics(out) if line['step'] == step}
  summary['steps'] = step
  for key, split in (('exits', 'test'), ('held_out', 'held_out')):
    for number, row in enumerate(summary.get(key, ()), 1):
      row.update({name: lines.get(split, {}).get(f'exit_{number}/{name}') for name in _MEASURED if name in row})
  for other in (AVERAGE, 'confusion_file'):
    summary.pop(other, None)
  (out / CONFUSION).unlink(missing_ok=True)
  write_json(out / SUMMARY, summary)


@contextlib.contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
  """As `moved_there`, where an empty folder may be.

  A kill leaves `out` missing or empty, and nothing that another process writes there is touched.

  Raises:
    UserError: it cannot be made, or something is there by then.
  """
  made = not out.exists()
  prepare_folder(out, '--out')
  place = Path(os.path.realpath(out))
  try:
    with moved_there(place, lambda: _check_free(out)) as folder:
      yield folder
  except BaseException:
    if made:
      with contextlib.suppress(OSError):  # Another process has written there.
        place.rmdir()
    raise


def save_average(workdir: Path, config: ConfigDict, variables: Any, summary: dict[str, Any]) -> Path:
  """Writes the averaged weights of a run to its folder `average`, which commands read as a run.

  Weights that are there already stay, with what was calibrated for them; others are replaced.

  Args:
    workdir: absolute.
    variables: parameters and running statistics.
    summary: of the run, with the measures of the averaged weights.

  Returns:
    The folder.
  """
  out = workdir / AVERAGE
  prepare_folder(out)
  save_config(out, config)
  measured = summary[AVERAGE]
  own = {key: value for key, value in summary.items() if key not in (AVERAGE, 'confusion_file')}
  own['exits'] = [row | new for row, new in zip(summary['exits'], measured['test'], strict=True)]
  if 'held_out' in measured:
    own['held_out'] = measured['held_out']
  for name in (DATASET, IDENTITY):
    if (workdir / name).exists():
      shutil.copyfile(workdir / name, out / name)
  if not _holds(out, summary['steps'], variables):
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    with Checkpoints(out, keep=1) as checkpoints:
      checkpoints.save(summary['steps'], variables, {'seed': config.seed})
  write_json(out / SUMMARY, own)
  return out


def _holds(run: Path, step: int, variables: Any) -> bool:
  """Whether the only checkpoint of a run is an intact one of this step with these weights."""
  try:
    with Checkpoints(run) as checkpoints:
      saved = checkpoints.read_variables(step) if checkpoints.steps() == [step] else None
  except UserError:
    return False
  wanted = {name: variables.get(name, {}) for name in saved or ()}
  return saved is not None and bool(jax.tree.all(jax.tree.map(np.array_equal, saved, jax.device_get(wanted))))


def _rounded(variables: dict[str, Any]) -> dict[str, Any]:
  largest = np.finfo(np.float16).max
  if any(np.abs(leaf).max(initial=0) > largest for leaf in jax.tree.leaves(variables['params'])):
    raise UserError(f'expected parameters of at most {largest:,.0f}, as float16 holds, found larger; set --step')
  return variables | {'params': jax.tree.map(lambda leaf: leaf.astype(np.float16), variables['params'])}


def _check_free(out: Path) -> None:
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f'expected {out} to be missing or an empty folder, found something there; set --out')
