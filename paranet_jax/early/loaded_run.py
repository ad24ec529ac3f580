"""A finished run in one line: its model, its variables, its exits."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from paranet_jax import config as config_lib
from paranet_jax.costs import abstract_variables
from paranet_jax.early.exit_plan import (
  EXITS,
  CheckpointId,
  ExitPlan,
  calibrate_command,
  fingerprint,
  load_plan,
  read_plan,
)
from paranet_jax.host.arguments import absolute
from paranet_jax.host.errors import UserError
from paranet_jax.runs.checkpoints import Checkpoints
from paranet_jax.runs.dataset_facts import DatasetFacts, output_names, restore_dataset_facts
from paranet_jax.runs.workdir import restore_config
from paranet_jax.targets import trained_exits


@dataclasses.dataclass(frozen=True)
class LoadedRun:
  """A run, read from its folder.

  Attributes:
    model: with the multi-exit interface: `model.apply(variables, images)` gives one [B, classes] an exit.
    variables: `params` and `batch_stats`.
    exits: what `calibrate` chose; None: the run is not calibrated.
    config: the run's configuration.
    step: of the checkpoint.
    dataset: class names, one an output of the model, and the mean and std that uint8 images are normalized with.
  """

  model: Any
  variables: Any
  exits: ExitPlan | None
  config: ConfigDict
  step: int
  dataset: DatasetFacts

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C)."""
    return config_lib.image_shape(self.config)


def load(workdir: str | Path, step: int | None = None) -> LoadedRun:
  """Reads a run: its data set is not needed.

  Args:
    workdir: of the run.
    step: of the checkpoint; None: the one that exits.json was made for, or else the latest.

  Raises:
    UserError: there is no run, no such checkpoint, or exits.json is damaged or belongs to another checkpoint.
  """
  workdir = absolute(workdir)
  config = restore_config(workdir)
  image_shape, calibrated = config_lib.image_shape(config), (workdir / EXITS).exists()
  dataset = restore_dataset_facts(workdir, channels=image_shape[-1])
  model = config_lib.build_model(config, len(dataset.class_names))
  names = output_names(dataset.class_names, config.model.num_classes or len(dataset.class_names))
  with Checkpoints(workdir) as checkpoints:
    step = _calibrated_step(workdir, checkpoints) if step is None and calibrated else checkpoints.choose(step)
    variables = checkpoints.restore_variables(step, abstract_variables(model, image_shape))
  checkpoint = CheckpointId(config.name, config.data.name, step, fingerprint(variables))
  plan = load_plan(workdir, checkpoint, trained_exits(config_lib.targets(config))) if calibrated else None
  dataset = dataclasses.replace(dataset, class_names=names)
  return LoadedRun(model, jax.device_put(variables), plan, config, step, dataset)


def _calibrated_step(workdir: Path, checkpoints: Checkpoints) -> int:
  step = read_plan(workdir).step
  try:
    return checkpoints.choose(step)
  except UserError as error:
    checkpoints.choose()  # If there is none at all, this reports that instead.
    raise UserError(
      f'{workdir / EXITS} belongs to the checkpoint of step {step}, which is gone; '
      f'{calibrate_command(workdir)} writes it again'
    ) from error
