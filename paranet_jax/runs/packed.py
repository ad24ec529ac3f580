"""A run to share: what it learned at half the precision, its log and its configuration, and no state to train on."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paranet_jax.host.errors import UserError
from paranet_jax.report.metrics import FILE_NAME as METRICS
from paranet_jax.runs.checkpoints import Checkpoints
from paranet_jax.runs.dataset_facts import DATASET, restore_dataset_facts
from paranet_jax.runs.workdir import SUMMARY, prepare_folder, restore_config, save_config

_CARRIED = (SUMMARY, METRICS, DATASET)


def pack(workdir: Path, out: Path, step: int | None = None) -> int:
  """Writes a run's parameters in float16 and its running statistics in float32, as a run in another folder.

  The folder is a run to all that reads one, `init_from` too; it only cannot be trained on. Its exits.json is its own:
  thresholds of the rounded network are not those of the other.

  Args:
    workdir: absolute, of a finished run.
    out: absolute; it must not be there, or be empty.
    step: of the checkpoint; None: the latest.

  Returns:
    The step of the checkpoint.

  Raises:
    UserError: there is no finished run or no such checkpoint, a parameter is too large for float16, or the folder is
      taken.
  """
  config = restore_config(workdir)
  restore_dataset_facts(workdir, channels=config.model.channels)
  if not (workdir / SUMMARY).exists():
    raise UserError(f'expected a finished run, with its {SUMMARY}, and {workdir} has none; train it to its end first')
  with Checkpoints(workdir) as checkpoints:
    step = checkpoints.choose(step)
    variables = _rounded(checkpoints.read_variables(step))
  _check_free(out)
  prepare_folder(out)
  with config.unlocked():
    del config.data.data_dir  # Where the data set lies on this machine is nobody else's.
  save_config(out, config)
  for name in _CARRIED:
    shutil.copyfile(workdir / name, out / name)
  with Checkpoints(out, keep=1) as checkpoints:
    checkpoints.save(step, variables, {'seed': config.seed})
  return step


def _rounded(variables: dict[str, Any]) -> dict[str, Any]:
  largest = np.finfo(np.float16).max
  if any(np.abs(leaf).max(initial=0) > largest for leaf in jax.tree.leaves(variables['params'])):
    raise UserError(f'expected parameters of at most {largest:,.0f}, as float16 holds, found larger; set --step')
  return variables | {'params': jax.tree.map(lambda leaf: leaf.astype(np.float16), variables['params'])}


def _check_free(out: Path) -> None:
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f'expected no folder {out}, or an empty one, found something there; set --out')
