"""All that a configuration and its data set determine: built once, then only read."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from ml_collections import ConfigDict

from paranet_jax import config as config_lib
from paranet_jax.costs import parameter_sizes
from paranet_jax.data.batches import steps_per_epoch
from paranet_jax.data.dataset import Dataset
from paranet_jax.data.load import load_dataset
from paranet_jax.optim import Schedule, decay_mask, make_optimizer, make_schedule
from paranet_jax.steps import Objective, Preprocessing, TrainState, init_state, make_train_step
from paranet_jax.targets import Targets, trained_exits


@dataclasses.dataclass(frozen=True)
class Task:
  """A model, its data, its objective and its optimiser.

  Attributes:
    steps_per_epoch: full batches.
    total_steps: length of the run.
    schedule: learning rate by optimiser update; `updates(step)` counts them.
  """

  config: ConfigDict
  dataset: Dataset
  model: Any
  targets: Targets
  objective: Objective
  preprocessing: Preprocessing
  optimizer: optax.GradientTransformation
  schedule: Schedule
  steps_per_epoch: int
  total_steps: int

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C)."""
    return config_lib.image_shape(self.config)

  def learning_rate(self, step: int) -> float:
    """Learning rate of the update that step number `step` (from 0) is part of."""
    return float(self.schedule(step // self.config.train.accumulate_steps))

  def init_state(self) -> TrainState:
    """The state at step 0."""
    return init_state(self.model, self.optimizer, self.config.seed, self.image_shape)

  def train_step(self, axis_name: str | None = None) -> Callable:
    """The body of the training step (see `steps.make_train_step`)."""
    return make_train_step(self.model, self.optimizer, self.objective, self.preprocessing, axis_name)


def build_task(config: ConfigDict) -> Task:
  """Reads the data set and builds everything that training and evaluation need.

  Raises:
    UserError: whatever of the configuration or the data does not fit.
  """
  config_lib.validate(config)
  dataset = load_dataset(
    config.data,
    image_side=config.model.image_side,
    channels=config.model.channels,
    num_classes=config.model.num_classes,
  )
  model = config_lib.build_model(config, len(dataset.class_names))
  targets = config_lib.targets(config)
  steps = steps_per_epoch(len(dataset.train), config.train.batch_size)
  schedule = _schedule(config, steps)
  return Task(
    config=config,
    dataset=dataset,
    model=model,
    targets=targets,
    objective=Objective(targets, config_lib.exit_weights(config), **_matching(config)),
    preprocessing=Preprocessing(dataset.mean, dataset.std, dataset.crop_padding, dataset.flip),
    optimizer=_optimizer(config, schedule, model, targets),
    schedule=schedule,
    steps_per_epoch=steps,
    total_steps=config_lib.total_steps(config, steps),
  )


def _matching(config: ConfigDict) -> dict[str, Any]:
  return {
    'matching': config.loss.matching,
    'temperature': config.loss.temperature,
    'hard_label_weight': config.loss.hard_label_weight,
    'label_smoothing': config.loss.label_smoothing,
  }


def _schedule(config: ConfigDict, steps: int) -> Schedule:
  train = config.train
  return make_schedule(
    train.schedule,
    train.learning_rate,
    epochs=train.epochs,
    updates_per_epoch=steps / train.accumulate_steps,
    drop_epochs=train.drop_epochs,
    drop_factor=train.drop_factor,
    warmup_epochs=train.warmup_epochs,
  )


def _optimizer(config: ConfigDict, schedule: Schedule, model: Any, targets: Targets) -> optax.GradientTransformation:
  train = config.train
  reached = set(parameter_sizes(model, config_lib.image_shape(config), *trained_exits(targets)))
  return make_optimizer(
    train.optimizer,
    schedule,
    momentum=train.momentum,
    nesterov=train.nesterov,
    weight_decay=train.weight_decay,
    decay_mask=lambda params: decay_mask(params, reached, train.decay),
    clip_norm=train.clip_norm,
    accumulate_steps=train.accumulate_steps,
  )
