"""A finished run whose logits another run learns from."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from paranet_jax.config import build_model, image_shape, targets, teachers
from paranet_jax.costs import abstract_variables
from paranet_jax.data.dataset import Dataset
from paranet_jax.host.errors import UserError
from paranet_jax.models.layers.backend import plain_operations
from paranet_jax.runs.checkpoints import Checkpoints, has_checkpoint
from paranet_jax.runs.dataset_facts import restore_dataset_facts
from paranet_jax.runs.init_from import backbone_difference, check_finished, other_function
from paranet_jax.runs.workdir import CONFIG, restore_config
from paranet_jax.steps import Beside, Objective, TrainState, teaching_exits
from paranet_jax.targets import trained_exits

_SAME_ANSWERS = (
  'dtype',
  'num_classes',
  'last',
  'scan_layers',
  'dropout',
  'block_dropout',
  'local_drop_path',
  'global_drop_path',
)
"""Fields of `model` in which a teacher may differ: it answers the same, or the shapes of its parameters tell."""


def check_teacher(config: ConfigDict, workdir: Path) -> None:
  """Checks, before a run's folder is made, that `loss.teacher_run` is a finished run of the same network and data.

  Its exits from which the new run learns have learned.

  Args:
    workdir: of the new run; one that has a checkpoint has its teacher in it.

  Raises:
    UserError: it is not.
  """
  run = Path(config.loss.teacher_run)
  if config.loss.teacher != 'run' or has_checkpoint(workdir):
    return
  check_finished(run, 'loss.teacher_run')
  there = restore_config(run)
  data = there.data.name
  if data != config.data.name:
    raise UserError(
      f'loss.teacher_run {run} learned from data.name {data}, found {config.data.name}; set --config.loss.teacher_run'
    )
  # Its exits may read another place, or images of another size, with parameters of the same shapes.
  answering = [name for name in config.model if name not in _SAME_ANSWERS]
  difference = backbone_difference(config, run)
  if not difference and (difference := other_function(there.model, config.model, answering)):
    derived = [name for name in answering if config.model[name] is None or there.model.get(name) is None]
    if _program(config) == _program(_with_fields(config, there, derived)):  # One of both spells them out.
      difference = other_function(there.model, config.model, [name for name in answering if name not in derived])
  if difference:
    raise UserError(
      f'loss.teacher_run {run} is another network: {difference}; set --config to the one of {run / CONFIG}, or '
      '--config.loss.teacher_run'
    )
  learned = trained_exits(targets(there))
  for number in teaching_exits(Objective(targets(config), (), teachers=teachers(config))):
    if number not in learned:
      raise UserError(
        f'loss.teacher_run {run} must have trained exit {number}, from which {config.name} learns, found '
        f'{there.name}, which did not; set --config.loss.teacher_run'
      )


def _with_fields(config: ConfigDict, other: ConfigDict, names: Sequence[str]) -> ConfigDict:
  """A copy with these fields of `model` as another configuration has them."""
  config = config.copy_and_resolve_references()
  config.model.update({name: other.model[name] for name in names if name in other.model})
  return config


def _program(config: ConfigDict) -> str:
  """What a network computes in inference."""
  model, shape = build_model(config, num_classes=2), image_shape(config)
  images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  with plain_operations():
    return jax.jit(model.apply).lower(abstract_variables(model, shape), images).as_text()


def check_normalization(run: Path, dataset: Dataset) -> None:
  """Checks that a finished run reads images as it learned to: as a new run normalizes them.

  Other splits of a data set have nearly the same mean and deviation; those that came with weights may be far from them.

  Raises:
    UserError: means differ by more than 5 % of the deviation, or deviations by more than 5 %.
  """
  there = restore_dataset_facts(run, channels=len(dataset.mean))
  most = 0.05 * np.array(dataset.std)
  if any((np.abs(np.subtract(*both)) > most).any() for both in ((there.mean, dataset.mean), (there.std, dataset.std))):
    theirs, ours = (
      ' and '.join(','.join(f'{value:.3f}' for value in values) for values in (own.mean, own.std))
      for own in (there, dataset)
    )
    raise UserError(
      f'loss.teacher_run {run} learned from images of mean and deviation {theirs}, found {ours}; set '
      '--config.loss.teacher_run'
    )


def take_teacher(state: TrainState, run: Path) -> TrainState:
  """Returns a fresh state with the parameters and running statistics of a finished run as its teacher.

  Raises:
    UserError: they do not fit.
  """
  beside: Beside = state.opt_state
  with Checkpoints(run) as checkpoints:
    _, teacher = checkpoints.read_chosen(
      Checkpoints.choose, lambda step: checkpoints.restore_variables(step, beside.teacher)
    )
  return dataclasses.replace(state, opt_state=beside._replace(teacher=jax.device_put(teacher)))
