"""Fine-tuning: a new run takes its backbone from a finished one, and its exits are new."""

import dataclasses
from pathlib import Path
from typing import Any

from paranet_jax.host.errors import UserError, say
from paranet_jax.runs.checkpoints import FOLDER, Checkpoints, shape_difference, shapes_by_path
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
  if difference := shape_difference(shapes_by_path(saved), shapes_by_path(_backbone(fresh))):
    raise UserError(
      f'the backbone of init_from {run} does not fit: {difference}; '
      f'set --config to the network of {run / CONFIG}, or --config.init_from'
    )
  say(f'backbone from {run} at step {step}, new exits')
  exits = {part: {name: own for name, own in fresh[part].items() if name.startswith(EXIT)} for part in fresh}
  return dataclasses.replace(state, **{part: saved[part] | exits[part] for part in fresh})


def _backbone(variables: dict[str, Any]) -> dict[str, Any]:
  """The variables outside the exits."""
  return {
    part: {name: own for name, own in modules.items() if not name.startswith(EXIT)}
    for part, modules in variables.items()
  }
