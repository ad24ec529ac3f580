"""How long a run will take on this machine, from a few of its steps."""

import dataclasses
import functools
import math
import time
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from paranet_jax import devices as devices_lib
from paranet_jax.config import check_devices
from paranet_jax.data.batches import epoch_order
from paranet_jax.data.dataset import Dataset, Split
from paranet_jax.evaluation import Evaluator
from paranet_jax.steps import TrainState, zero_totals
from paranet_jax.task import Task, build_task

_SECONDS = 3.0  # Of steps that are timed after the first, which compiles.
_MOST_STEPS = 50
_IMAGES = 500  # Of a split that are evaluated.


class Speed(NamedTuple):
  """Seconds: `start` until the first step and evaluation are compiled, then a `step` and an `evaluation` each."""

  start: float
  step: float
  evaluation: float
  steps_per_epoch: int
  total_steps: int
  evaluation_steps: int

  def seconds_left(self, step: int) -> float:
    """Of a run that has done `step` steps."""
    if step >= self.total_steps:
      return self.start
    evaluations = math.ceil(self.total_steps / self.evaluation_steps) - step // self.evaluation_steps
    return self.start + (self.total_steps - step) * self.step + evaluations * self.evaluation


def measure(config: ConfigDict) -> Speed:
  """Trains a few steps and evaluates a few images, and forgets them.

  Raises:
    UserError: the configuration, the data or the devices do not fit.
  """
  started = time.monotonic()
  devices = devices_lib.pick_devices(config.train.devices)
  check_devices(config, len(devices))
  task = build_task(config)
  state = jax.device_put(task.init_state(), devices_lib.replicated(devices))
  compiled, step, state = _time_steps(task, devices, state)
  first, evaluation = _time_evaluation(task, devices, state)
  return Speed(
    start=compiled - started + first,
    step=step,
    evaluation=evaluation,
    steps_per_epoch=task.steps_per_epoch,
    total_steps=task.total_steps,
    evaluation_steps=task.evaluation_steps,
  )


def _time_steps(task: Task, devices: list[jax.Device], state: TrainState) -> tuple[float, float, TrainState]:
  """When the first step was done, seconds of each later one, and the state after them."""
  config, train = task.config, task.dataset.train
  whole = devices_lib.replicated(devices)
  images, labels = jax.device_put((train.images, train.labels), whole)
  order = devices_lib.place_order(epoch_order(config.seed, 0, len(train), config.train.batch_size), devices)
  phase = task.phase(0)
  train_step = devices_lib.run_on(devices, functools.partial(task.train_step, phase=phase))
  totals = jax.device_put(zero_totals(phase.targets), whole)
  state, totals = jax.block_until_ready(train_step(state, totals, images, labels, order))
  compiled, steps = time.monotonic(), 0
  while steps == 0 or (steps < _MOST_STEPS and time.monotonic() - compiled < _SECONDS):
    state, totals = jax.block_until_ready(train_step(state, totals, images, labels, order))
    steps += 1
  return compiled, (time.monotonic() - compiled) / steps, state


def _time_evaluation(task: Task, devices: list[jax.Device], state: TrainState) -> tuple[float, float]:
  """Seconds of the first evaluation of a part of the splits, and of a later one of the whole."""
  part = dataclasses.replace(task, dataset=_part(task.dataset))
  started = time.monotonic()
  evaluator = Evaluator(part, devices)
  evaluator.evaluate(state.params, state.batch_stats)
  compiled = time.monotonic()
  evaluator.evaluate(state.params, state.batch_stats)
  share = _evaluated(part.dataset) / _evaluated(task.dataset)
  return compiled - started, (time.monotonic() - compiled) / share


def _part(dataset: Dataset) -> Dataset:
  def first(split: Split | None) -> Split | None:
    return split and Split(split.images[:_IMAGES], split.labels[:_IMAGES])

  return dataclasses.replace(dataset, held_out=first(dataset.held_out), test=first(dataset.test))


def _evaluated(dataset: Dataset) -> int:
  return sum(len(split) for split in (dataset.held_out, dataset.test) if split is not None)
