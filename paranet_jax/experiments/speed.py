"""What `--dry-run` prints: the state of every run, and how long the rest takes, estimated from a few steps."""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from paranet_jax import devices as devices_lib
from paranet_jax.data.dataset import Dataset, Split
from paranet_jax.display.progress import human_duration
from paranet_jax.display.tables import ABSENT, align, rounded
from paranet_jax.evaluation import Evaluator
from paranet_jax.experiments.planned_runs import PlannedRun, status
from paranet_jax.feed import images_axis, time_steps
from paranet_jax.host.machine import Device
from paranet_jax.steps import TrainState
from paranet_jax.task import Task, build_task

_IMAGES = 500  # Images of each split that are evaluated.


class Speed(NamedTuple):
  """Seconds: `start` until the first step and evaluation are compiled, then per `step` and `evaluation`."""

  start: float
  step: float
  evaluation: float
  total_steps: int
  evaluation_steps: int

  def seconds_left(self, step: int) -> float:
    """Seconds until the end of a run that has completed `step` steps."""
    if step >= self.total_steps:
      return self.start
    evaluations = math.ceil(self.total_steps / self.evaluation_steps) - step // self.evaluation_steps
    return self.start + (self.total_steps - step) * self.step + evaluations * self.evaluation


def dry_run(runs: Sequence[PlannedRun]) -> str:
  """Lists the runs, and times a few steps of each network that has unfinished runs; writes nothing.

  Raises:
    UserError: a run's folder, the data or the devices do not fit.
  """
  found = [status(run) for run in runs]
  unfinished = {run.name: run.config for run, state in zip(runs, found, strict=True) if not state.summary}
  speeds = {name: measure(config) for name, config in unfinished.items()}
  lefts = [
    0.0 if state.summary else speeds[run.name].seconds_left(state.step or 0)
    for run, state in zip(runs, found, strict=True)
  ]
  rows = [
    (str(run), str(state), human_duration(left) if left else ABSENT)
    for run, state, left in zip(runs, found, lefts, strict=True)
  ]
  lines = align(('run', 'state', 'time left'), rows, left=(0, 1))
  return '\n'.join([*lines, *map(_speed, speeds.items()), f'total: {human_duration(sum(lefts))}'])


def _speed(measured: tuple[str, Speed]) -> str:
  name, speed = measured
  return (
    f'{name}: {speed.total_steps:,} steps of {rounded(1000 * speed.step)} ms, an evaluation of '
    f'{rounded(speed.evaluation)} s every {speed.evaluation_steps:,}, {rounded(speed.start)} s to start (measured now)'
  )


def measure(config: ConfigDict) -> Speed:
  """Trains a few steps and evaluates a few images, and discards the result.

  Raises:
    UserError: the configuration, the data or the devices do not fit.
  """
  started = time.monotonic()
  devices = devices_lib.pick_devices(config.train.devices)
  devices_lib.check_fits(config, devices)
  task = build_task(config)
  phase = task.phase(0)
  train_step = devices_lib.run_on(devices, functools.partial(task.train_step, phase=phase), images_axis(task))
  built = time.monotonic() - started
  first_step, step, state = time_steps(train_step, task, devices, phase)
  first_evaluation, evaluation = _time_evaluation(task, devices, state)
  return Speed(
    start=built + first_step + first_evaluation,
    step=step,
    evaluation=evaluation,
    total_steps=task.total_steps,
    evaluation_steps=task.evaluation_steps,
  )


def _time_evaluation(task: Task, devices: list[Device], state: TrainState) -> tuple[float, float]:
  """Seconds of a first evaluation on part of the splits, and of a later one on all of them."""
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
