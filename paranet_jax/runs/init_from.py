"""Fine-tuning: a new run takes its backbone from a finished one, and its exits are new."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from paranet_jax.host.errors import UserError
from paranet_jax.runs.checkpoints import FOLDER, Checkpoints
from paranet_jax.runs.workdir import CONFIG, SUMMARY
from paranet_jax.steps import TrainState

EXIT = 'exit'
"""Prefix of the modules of an exit in every model; no module of the backbone has it."""


def take_backbone(state: TrainState, run: Path) -> TrainState:
  """Returns a fresh state with the backbone's parameters and running statistics of a finished run.

  The exits are new even if the number of classes is the same. Images are normalized with the new data set's own mean
  and deviation, so that the backbone reads inputs of mean 0 and deviation 1, as before.

  Args:
    state: at step 0.
    run: absolute folder.

  Raises:
    UserError: there is no finished run in the folder, or its backbone has a different architecture.
  """
  for name in (CONFIG, SUMMARY, FOLDER):
    if not (run / name).exists():
      raise UserError(
        f'init_from must be the folder of a finished run, and {run} has no {name}; set --config.init_from'
      )
  with Checkpoints(run) as checkpoints:
    step = checkpoints.choose()
    saved = _backbone(checkpoints.read_variables(step))
  fresh = {'params': state.params, 'batch_stats': state.batch_stats}
  _check_same_shapes(run, saved, _backbone(fresh))
  print(f'backbone from {run} at step {step}, new exits', flush=True)
  taken = jax.tree_util.tree_map_with_path(lambda path, leaf: saved.get(_name(path), leaf), fresh)
  return dataclasses.replace(state, **taken)


def _backbone(variables: Any) -> dict[str, Any]:
  """The variables outside the exits, by path."""
  leaves = jax.tree_util.tree_leaves_with_path(variables)
  return {_name(path): leaf for path, leaf in leaves if not path[1].key.startswith(EXIT)}


def _name(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _check_same_shapes(run: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
  for name in [*wanted, *saved]:
    there, here = (list(found[name].shape) if name in found else 'absent' for found in (saved, wanted))
    if there != here:
      raise UserError(
        f'the backbone of init_from {run} does not fit: {name} is {there} there and {here} in this configuration; '
        f'set --config to the network of {run / CONFIG}, or --config.init_from'
      )
