"""Reading a trained run: its configuration, its model and the variables of a checkpoint."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from paranet_jax import config as config_lib
from paranet_jax import devices as devices_lib
from paranet_jax.costs import abstract_variables
from paranet_jax.data.dataset import Dataset
from paranet_jax.data.load import load_dataset
from paranet_jax.host.errors import UserError
from paranet_jax.host.machine import Device
from paranet_jax.host.processes import Coordinator
from paranet_jax.models.numerics import check_inference
from paranet_jax.runs.checkpoints import Checkpoints
from paranet_jax.runs.dataset_facts import DatasetFacts, output_names, restore_dataset_facts
from paranet_jax.runs.dtype import in_dtype, with_saved_dtype
from paranet_jax.runs.learned import restore_learned
from paranet_jax.runs.workdir import CONFIG, restore_config
from paranet_jax.task import Task, agreed_task


@dataclasses.dataclass(frozen=True)
class TrainedRun:
  """A run, read from its folder without its data set.

  Attributes:
    model: with the multi-exit interface: `model.apply(variables, images)` returns one [B, classes] per exit.
    variables: `params` and `batch_stats`.
    config: the run's configuration.
    step: the checkpoint's.
    dataset: class names, one per output of the model, and the mean and std that normalize uint8 images.
    workdir: absolute; None: not read from a folder.
  """

  model: Any
  variables: Any
  config: ConfigDict
  step: int
  dataset: DatasetFacts
  workdir: Path | None = None

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C)."""
    return config_lib.image_shape(self.config)

  def load_dataset(self, data_dir: Path | None = None, accept_data_changes: bool = False) -> Dataset:
    """The data set that it was trained on, split as it was then.

    Args:
      data_dir: folder of the data set; None: as the run says.
      accept_data_changes: the data may have other classes or labels than the run learned.

    Raises:
      UserError: the data set cannot be read.
    """
    config = config_lib.with_data_dir(self.config, data_dir)
    fields = config.model
    return load_dataset(
      config.data,
      image_side=fields.image_side,
      channels=fields.channels,
      num_classes=fields.num_classes,
      learned=self.workdir and restore_learned(self.workdir, fields.channels, accept_data_changes),
    )


def read_run(
  workdir: Path, choose: Callable[[Checkpoints], int] = Checkpoints.choose, dtype: str | None = None
) -> TrainedRun:
  """Reads a run.

  Args:
    workdir: absolute.
    choose: the checkpoint's step.
    dtype: in which the model computes, see `in_dtype`.

  Raises:
    UserError: there is no run or no such checkpoint, or it does not fit the configuration.
  """
  config = restore_config(workdir)
  try:
    config_lib.validate(config)
  except UserError as error:
    raise UserError(f'{workdir / CONFIG} does not fit: {error}') from error
  image_shape = config_lib.image_shape(config)
  dataset = restore_dataset_facts(workdir, channels=image_shape[-1])
  num_classes = len(dataset.class_names)
  model = in_dtype(config_lib.build_model(config, num_classes), dtype)
  with Checkpoints(workdir) as checkpoints:
    like = abstract_variables(model, image_shape)
    step, variables = checkpoints.read_chosen(choose, lambda step: checkpoints.restore_variables(step, like))
  check_inference(model, image_shape, config.eval.batch_size)
  names = output_names(dataset.class_names, config.model.num_classes or num_classes)
  dataset = dataclasses.replace(dataset, class_names=names)
  return TrainedRun(model, jax.device_put(variables), config, step, dataset, workdir)


class TrainedTask(NamedTuple):
  """A task built from its data set, a checkpoint's step, and that checkpoint's `params` and `batch_stats`."""

  task: Task
  step: int
  variables: dict[str, Any]


def read_task(
  config: ConfigDict,
  workdir: Path,
  step: int | None,
  devices: list[Device],
  accept_data_changes: bool = False,
  dtype: str | None = None,
) -> TrainedTask:
  """Builds a task, reading its data set, and restores the variables of a checkpoint.

  Args:
    workdir: absolute.
    step: the checkpoint's; None: the latest.
    devices: where the variables are replicated.
    accept_data_changes: the data may have other classes or labels than the run learned.
    dtype: in which the model computes, see `in_dtype`.

  Raises:
    UserError: there is no such checkpoint, or it or the data does not fit the configuration.
  """
  processes = Coordinator()
  config = with_saved_dtype(config, workdir)
  devices_lib.check_fits(config, devices, training=False)
  with processes.once_within(Checkpoints, workdir) as checkpoints:
    processes.once(lambda: checkpoints.choose(step))  # Before the data is read.
    learned = processes.once(restore_learned, workdir, config.model.channels, accept_data_changes)
    task = agreed_task(config, processes, learned)
    if dtype:  # A new task computes again what it has kept.
      task = dataclasses.replace(task, model=in_dtype(task.model, dtype))
    like = abstract_variables(task.model, task.image_shape)
    chosen, variables = processes.once(
      lambda: checkpoints.read_chosen(
        lambda found: found.choose(step), lambda step: checkpoints.restore_variables(step, like)
      )
    ) or (None, None)
    chosen = processes.from_first(chosen)
  check_inference(task.model, task.image_shape, config.eval.batch_size)
  variables = processes.arrays_from_first(variables or like)
  return TrainedTask(task, chosen, jax.device_put(variables, devices_lib.replicated(devices)))
