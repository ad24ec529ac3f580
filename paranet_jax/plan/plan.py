"""The plan of a run: its compiled step, the time that it takes, and the largest batch that fits."""

import importlib.metadata
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from paranet_jax import devices as devices_lib
from paranet_jax.feed import time_steps
from paranet_jax.host.errors import UserError
from paranet_jax.plan.data_size import dataset_like
from paranet_jax.plan.step import StepFacts, compile_step
from paranet_jax.plan.target import Chip, Target
from paranet_jax.task import Task, build_task

_TOO_LARGE = 'RESOURCE_EXHAUSTED'

Progress = Callable[[str], None]


class Estimate(NamedTuple):
  """Seconds per step: the parts of a roofline bound, and the compiler's estimate (None: it gives none)."""

  arithmetic: float
  memory: float
  collectives: float
  compiler: float | None

  @property
  def step(self) -> float:
    """The roofline bound: arithmetic and memory traffic overlap, each at its peak; collectives do not."""
    return max(self.arithmetic, self.memory) + self.collectives


class Plan(NamedTuple):
  """What is known about a run before it starts.

  Attributes:
    asked: the batch size of the configuration.
    task: the run with that batch size, halved until it fits.
    facts: its step.
    other: the step with another batch size; None: there are too few images for one.
    largest: the largest batch that fits, on the line through both; None: the memory of a device is not known.
    measured: seconds per executed step; None where the devices are elsewhere, or have too little memory.
  """

  asked: int
  target: Target
  chip: Chip
  task: Task
  facts: StepFacts
  estimate: Estimate
  other: StepFacts | None
  largest: int | None
  measured: float | None
  versions: dict[str, str]


def build_plan(config: ConfigDict, target: Target, progress: Progress) -> Plan:
  """Compiles the step for two batch sizes, and runs it if the devices are on this machine.

  Args:
    progress: called with a message before each slow operation.

  Raises:
    UserError: the configuration or the data is invalid, or not even one image per device fits.
  """
  count, asked = len(target.devices), config.train.batch_size
  if asked % count:
    raise UserError(
      f'{count} devices cannot share train.batch_size {asked} evenly; set --config.train.batch_size or --devices'
    )
  if target.here:
    smallest = config.copy_and_resolve_references()
    smallest.train.batch_size = smallest.eval.batch_size = count
    devices_lib.check_fits(smallest, target.devices)
  task, compiled, facts = _compile(build_task(config, dataset_like(config)), target, progress)
  chip = target.chip()
  measured = None
  if target.here and facts.memory <= chip.memory:  # A CPU's compiler rejects no batch, but its system may.
    progress('running a few steps ...')
    _, measured, _ = time_steps(compiled, task, target.devices, task.phases[-1])
  most = len(task.dataset.train)
  batch, other = second_batch(facts, chip, count, most), None
  known = chip.memory < math.inf
  if batch <= most and known:
    other = _compile(_with_batch(task, batch), target, progress)[2]
  return Plan(
    asked=asked,
    target=target,
    chip=chip,
    task=task,
    facts=facts,
    estimate=estimate(facts, chip, count),
    other=other,
    largest=largest_batch(facts, other, chip, count, most) if other else facts.batch_size if known else None,
    measured=measured,
    versions={name: importlib.metadata.version(name) for name in ('jax', *(() if target.here else ('libtpu',)))},
  )


def _compile(task: Task, target: Target, progress: Progress) -> tuple[Task, jax.stages.Compiled, StepFacts]:
  """Compiles the step, halving the batch while it does not fit."""
  batch, count = task.config.train.batch_size, len(target.devices)
  progress(f'compiling a step of {batch:,} images for {target.name} ...')
  try:
    return task, *compile_step(task, target.devices)
  except jax.errors.JaxRuntimeError as error:
    if _TOO_LARGE not in str(error):
      raise
    half = batch // 2 // count * count
    if not half:
      raise UserError(
        f'a step of {batch} images does not fit {target.name}, the smallest batch that they can share; '
        'set --topology to a chip with more memory, or --config.model fields to a smaller network'
      ) from error
    progress(f'{batch:,} images do not fit')
  return _compile(_with_batch(task, half), target, progress)


def _with_batch(task: Task, batch_size: int) -> Task:
  config = task.config.copy_and_resolve_references()
  config.train.batch_size = batch_size
  return build_task(config, task.dataset)


def estimate(facts: StepFacts, chip: Chip, count: int) -> Estimate:
  """The time of a step on `count` chips; in a ring all-reduce, each sends 2 (n - 1) / n of the bytes."""
  sent = 2 * (count - 1) / count * facts.collectives.size
  return Estimate(
    arithmetic=facts.flops / chip.flops,
    memory=facts.traffic / chip.bandwidth,
    collectives=sent / chip.links if chip.links else 0.0,
    compiler=facts.cycles / chip.clock if facts.cycles and chip.clock else None,
  )


def second_batch(first: StepFacts, chip: Chip, count: int, most: int) -> int:
  """The second batch to compile: half of what would fit if all temporary memory grew with the batch.

  Args:
    count: devices, which share a batch evenly.
    most: images in the training set.
  """
  free = chip.memory - first.arguments - first.code
  guess = free / max(first.temporary, 1) * first.batch_size / 2
  batch = int(min(guess, most)) // count * count
  if batch > first.batch_size:
    return batch
  smaller = first.batch_size // 2 // count * count
  return smaller or 2 * first.batch_size


def largest_batch(one: StepFacts, other: StepFacts, chip: Chip, count: int, most: int) -> int:
  """The largest batch, from 0 to `most` images, that `count` devices share and that fits.

  Memory is assumed to grow linearly with the batch, on the line through the two compiled steps.
  """
  if one.batch_size == other.batch_size:  # Only this batch was compiled.
    return one.batch_size
  slope = (other.memory - one.memory) / (other.batch_size - one.batch_size)
  if slope <= 0:
    return most // count * count
  batch = one.batch_size + (chip.memory - one.memory) / slope
  return max(int(min(batch, most)) // count * count, 0)
