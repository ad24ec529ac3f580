"""Fine-tuning: a new run takes its backbone from a finished one, and its exits are new."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from paranet_jax.config import build_model, image_shape
from paranet_jax.costs import abstract_variables
from paranet_jax.host.errors import UserError, say
from paranet_jax.runs.checkpoints import FOLDER, VARIABLES, Checkpoints, shape_difference, shapes_by_path
from paranet_jax.runs.workdir import CONFIG, SUMMARY
from paranet_jax.steps import TrainState

EXIT = 'exit'
"""Prefix of the modules of an exit in every model; no module of the backbone has it."""


def check_backbone(config: ConfigDict, workdir: Path) -> None:
  """Checks, before a run's folder is made, that `init_from` is a finished run whose backbone fits.

  Args:
    workdir: of the new run; one that has a checkpoint does not need `init_from` any more.

  Raises:
    UserError: there is no finished run in the folder, or its backbone has a different architecture.
  """
  if not config.init_from or any((workdir / FOLDER).glob('[0-9]*')):
    return
  run = Path(config.init_from)
  for name in (CONFIG, SUMMARY, FOLDER):
    if not os.path.exists(run / name):
      raise UserError(
        f'init_from must be the folder of a finished run, and {run} has no {name}; set --config.init_from'
      )
  with Checkpoints(run) as checkpoints:
    _, saved = checkpoints.read_chosen(Checkpoints.choose, checkpoints.shapes)
  wanted = shapes_by_path(abstract_variables(build_model(config, num_classes=2), image_shape(config)))
  if difference := shape_difference(_backbone_paths(saved), _backbone_paths(wanted)):
    raise UserError(
      f'the backbone of init_from {run} does not fit: {difference}; '
      f'set --config to the network of {run / CONFIG}, or --config.init_from'
    )


def take_backbone(state: TrainState, run: Path) -> TrainState:
  """Returns a fresh state with the backbone's parameters and running statistics of a finished run.

  The exits are new even if the number of classes is the same. Images are normalized with the new data set's own mean
  and deviation, so that the backbone reads inputs of mean 0 and deviation 1, as before.

  Args:
    state: at step 0.
    run: absolute folder, see `check_backbone`.
  """
  with Checkpoints(run) as checkpoints:
    step, variables = checkpoints.read_chosen(Checkpoints.choose, checkpoints.read_variables)
  saved = _backbone(variables)
  fresh = {'params': state.params, 'batch_stats': state.batch_stats}
  say(f'backbone from {run} at step {step}, new exits')
  exits = {part: {name: own for name, own in fresh[part].items() if name.startswith(EXIT)} for part in fresh}
  return dataclasses.replace(state, **{part: saved[part] | exits[part] for part in fresh})


def _backbone_paths(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
  def kept(part: str, module: str = EXIT) -> bool:
    return part in VARIABLES and not module.startswith(EXIT)

  return {path: shape for path, shape in shapes.items() if kept(*path.split('/')[:2])}


def _backbone(variables: dict[str, Any]) -> dict[str, Any]:
  """The variables outside the exits."""
  return {
    part: {name: own for name, own in modules.items() if not name.startswith(EXIT)}
    for part, modules in variables.items()
  }
