"""The plan of a run: its step compiled for the devices it is to have, and what follows from it."""

import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from paranet_jax.host.errors import UserError
from paranet_jax.plan.chips import Chip
from paranet_jax.plan.data_size import dataset_like
from paranet_jax.plan.estimate import Estimate, estimate, largest_batch, second_batch
from paranet_jax.plan.step import StepFacts, compile_step, step_seconds
from paranet_jax.plan.target import Target
from paranet_jax.task import Task, build_task

_TOO_LARGE = 'RESOURCE_EXHAUSTED'

Progress = Callable[[str], None]


class Plan(NamedTuple):
  """What is known of a run before it is paid for.

  Attributes:
    asked: the batch of the configuration.
    task: the run with that batch or, if it does not fit, with the largest of its halves that does.
    facts: of its step.
    other: of the step of another batch; None: there are too few images for one.
    largest: batch that fits, by the line through both.
    measured: seconds of a step that was run; None where the devices are not here.
  """

  asked: int
  target: Target
  chip: Chip
  task: Task
  facts: StepFacts
  estimate: Estimate
  other: StepFacts | None
  largest: int
  measured: float | None
  versions: dict[str, str]


def build_plan(config: ConfigDict, target: Target, progress: Progress) -> Plan:
  """Compiles the step for two batches, and runs it where its devices are here.

  Args:
    progress: is told what is being done.

  Raises:
    UserError: the configuration or the data does not fit, or not even one image a device does.
  """
  count, asked = len(target.devices), config.train.batch_size
  if asked % count:
    raise UserError(
      f'train.batch_size {asked} cannot be shared evenly by {count} devices; set --config.train.batch_size or --devices'
    )
  task, compiled, facts = _compile(build_task(config, dataset_like(config)), target, progress)
  chip = target.chip()
  measured = None
  if target.here:
    progress('running a few steps ...')
    measured = step_seconds(task, target.devices, compiled)
  most = len(task.dataset.train)
  batch, other = second_batch(facts, chip, count, most), None
  if batch <= most:
    other = _compile(_with_batch(task, batch), target, progress)[2]
  return Plan(
    asked=asked,
    target=target,
    chip=chip,
    task=task,
    facts=facts,
    estimate=estimate(facts, chip, count),
    other=other,
    largest=largest_batch(facts, other, chip, count, most) if other else facts.batch_size,
    measured=measured,
    versions={name: importlib.metadata.version(name) for name in ('jax', *(() if target.here else ('libtpu',)))},
  )


def _compile(task: Task, target: Target, progress: Progress) -> tuple[Task, jax.stages.Compiled, StepFacts]:
  """Compiles the step, of half the batch while the compiler finds that it does not fit."""
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
        f'a step of {batch} images does not fit {target.name}, and no smaller batch can be shared by them; '
        'set --topology to a chip with more memory, or fields of --config.model to a smaller network'
      ) from error
    progress(f'{batch:,} images do not fit')
  return _compile(_with_batch(task, half), target, progress)


def _with_batch(task: Task, batch_size: int) -> Task:
  config = task.config.copy_and_resolve_references()
  config.train.batch_size = batch_size
  return build_task(config, task.dataset)
