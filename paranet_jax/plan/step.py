"""The real training step, compiled for devices that this machine may lack, and what its program needs."""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax

from paranet_jax import devices as devices_lib
from paranet_jax.costs import multiply_adds
from paranet_jax.feed import images_axis, step_data_shapes
from paranet_jax.frozen import bytes_of, on_disk
from paranet_jax.host.machine import Device
from paranet_jax.models.layers.backend import compiling_for
from paranet_jax.plan import hlo
from paranet_jax.plan.hlo import Collectives, collectives, memory_traffic
from paranet_jax.steps import zero_totals
from paranet_jax.task import Task

_CYCLES = re.compile(r'estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class StepFacts:
  """One training step on one device.

  Attributes:
    batch_size: images of the global batch.
    arguments: bytes of the state, the order, and the data set, with what is held out and tested on (if streamed: the
      batch and those read ahead); the results reuse them.
    temporary: peak bytes of all other arrays.
    code: bytes of the program; 0: the backend does not report it.
    flops: floating-point operations of convolutions and matrix products, two per multiply-add.
    traffic: bytes to and from main memory (see `hlo.memory_traffic`).
    collectives: of the step.
    cycles: the compiler's estimates for all instructions, added up; None: it gives none.
    compile_seconds: of the program, without tracing.
  """

  batch_size: int
  arguments: int
  temporary: int
  code: int
  flops: int
  traffic: int
  collectives: Collectives
  cycles: int | None
  compile_seconds: float

  @property
  def memory(self) -> int:
    """Bytes that the step needs on a device."""
    return self.arguments + self.temporary + self.code


def step_arguments(task: Task, devices: Sequence[Device]) -> tuple[Any, ...]:
  """Shapes of a step's arguments: state, totals, images, labels and order."""
  shapes = (
    jax.eval_shape(task.init_state),
    jax.eval_shape(functools.partial(zero_totals, task.phases[-1].targets, task.labeled)),
    *step_data_shapes(task, len(devices)),
  )
  if len(devices) > 1:
    return shapes  # The step knows its devices.
  place = devices_lib.replicated(list(devices))
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)


def _read_ahead(task: Task, count: int) -> int:
  """Bytes of the batches that a streamed run holds on a device in addition to the current one."""
  if not task.dataset.train.streamed:
    return 0
  from paranet_jax.data.stream import READ_AHEAD  # grain takes half a second to import.

  return READ_AHEAD * task.config.train.batch_size // count * (math.prod(task.dataset.train.images.shape[1:]) + 4)


def _evaluated(task: Task) -> int:
  """Bytes of the held-out and test images, or of their kept features, which stay on a device for the evaluations."""
  size = 0
  for split in filter(None, (task.dataset.held_out, task.dataset.test)):
    if task.frozen:
      features = task.feature_shapes(split)
      size += 0 if on_disk(features) else bytes_of(features) + 4 * len(split)
    elif not split.streamed:
      size += len(split) * (math.prod(split.images.shape[1:]) + 4)
  return size


def compile_step(task: Task, devices: Sequence[Device]) -> tuple[jax.stages.Compiled, StepFacts]:
  """Compiles the step of a run's last phase, in which all its exits train.

  Raises:
    jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED if the step does not fit.
  """
  step = devices_lib.run_on(list(devices), functools.partial(task.train_step, phase=task.phases[-1]), images_axis(task))
  arguments = step_arguments(task, devices)
  with compiling_for(devices[0].platform):
    flops = 2 * multiply_adds(step, *arguments)[0]
    lowered = step.lower(*arguments)
    started = time.perf_counter()
    compiled = lowered.compile()
  seconds = time.perf_counter() - started
  program = hlo.parse(compiled.as_text() or '')
  memory: Any = compiled.memory_analysis()  # jax's types allow for backends that have none.
  cycles = [times * int(found[1]) for _, one, times in program.executed() if (found := _CYCLES.search(one.attributes))]
  return compiled, StepFacts(
    batch_size=task.config.train.batch_size,
    arguments=memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + _read_ahead(task, len(devices))
    + _evaluated(task),
    temporary=memory.temp_size_in_bytes,
    code=memory.generated_code_size_in_bytes,
    flops=flops,
    traffic=memory_traffic(program),
    collectives=collectives(program),
    cycles=sum(cycles) or None,
    compile_seconds=seconds,
  )
