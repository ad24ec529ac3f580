"""Measures each stage on this machine, for the cost of any path in milliseconds or joules per image."""

import collections
import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paranet_jax.early.chunks import cover, default_sizes
from paranet_jax.early.path_costs import PathCosts, Stages
from paranet_jax.early.scores import confidence
from paranet_jax.host.energy import Energy
from paranet_jax.host.machine import cpu_name

RUNS = 30
ENERGY_SECONDS = 0.5
"""How long a stage is repeated to measure its energy."""
_WARM_UP = 3


class LatencyCosts(PathCosts):
  """Milliseconds per image along any path at one batch size; each stage is measured once, when first needed.

  Args:
    model: with the multi-exit interface.
    variables: `params` and `batch_stats`.
    image_shape: (H, W, C).
    exits: numbers of the usable exits, 1-based and increasing.
    batch_size: images that enter each stage together, in the fixed sizes that the runtime computes.
    score: computed on the host after every stage but the last, as in the runtime.
    runs: timed runs of each stage; the median counts.
  """

  def __init__(
    self,
    model: Any,
    variables: Any,
    image_shape: tuple[int, ...],
    exits: Sequence[int],
    batch_size: int,
    score: str = 'max_prob',
    runs: int = RUNS,
  ):
    # As in the runtime, a few fixed sizes cover a batch.
    self._sizes = collections.Counter(cover(batch_size, default_sizes()))
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    self._stages = Stages(model, variables, exits, image)
    self._score = score
    self.runs = runs
    self.batch_size = batch_size
    super().__init__(len(self._stages.exits), self._stages.by_carry(self._measure))

  def _measure(self, index: int, carry: Any) -> float:
    stage = compiled_stage(self._stages, index)
    score = None if index == self.num_exits - 1 else self._score
    total = 0.0
    for size, times in self._sizes.items():
      images = np.ones((size, *self._stages.images.shape[1:]), np.uint8)
      arguments = images, jax.tree.map(partial(_ones, size), carry)
      total += times * self._of_call(partial(_run, stage, arguments, score))
    return total / self.batch_size

  def _of_call(self, function: Callable[[], Any]) -> float:
    return 1e3 * median_seconds(function, self.runs)


class EnergyCosts(LatencyCosts):
  """Joules per image along any path, measured stage by stage: all that the machine uses meanwhile, also when idle.

  Args:
    energy: what tells it.
  """

  def __init__(self, energy: Energy, *arguments: Any):
    self.energy = energy
    super().__init__(*arguments)

  def _of_call(self, function: Callable[[], Any]) -> float:
    return self.energy.a_call(lambda: jax.block_until_ready(function()), ENERGY_SECONDS)


def _run(stage: Callable, arguments: tuple[Any, Any], score: str | None) -> Any:
  """Runs a stage as the runtime does: compute, wait for the logits, and rank them."""
  logits, carry = stage(*arguments)
  logits = np.asarray(logits)
  if score == 'patience':
    logits.argmax(-1)
  elif score is not None:
    confidence(logits, score)
  return carry


def compiled_stage(stages: Stages, index: int) -> Callable[[Any, Any], tuple[Any, Any]]:
  """Compiles (uint8 images, carry) -> (logits, carry), with the variables as constants, as in the runtime."""
  stage = stages.function(index)
  return jax.jit(lambda images, carry: stage(stages.variables, images.astype(jnp.float32), carry))


def _ones(size: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
  return jnp.ones((size, *leaf.shape[1:]), leaf.dtype)


def median_seconds(function: Callable[[], Any], runs: int = RUNS) -> float:
  """The median time of a call until its result is ready, after a few warm-up calls."""
  for _ in range(_WARM_UP):
    jax.block_until_ready(function())
  seconds = []
  for _ in range(runs):
    started = time.perf_counter()
    jax.block_until_ready(function())
    seconds.append(time.perf_counter() - started)
  return statistics.median(seconds)


def latency_record(costs: LatencyCosts, joules: EnergyCosts | None = None) -> dict[str, Any]:
  """What was measured and where, as exits.json keeps it.

  Returns:
    `device`, `cpu`, `date`, `runs` and `batch_sizes`, a list of one: `batch_size`, `ms_stages` (each stage in turn) and
    `ms_alone` (each exit alone), in milliseconds per image. With energy, there are also `joules_stages` and
    `joules_alone`, and `energy`, the names of what measured it.
  """
  measured = {'ms': costs} | ({} if joules is None else {'joules': joules})
  found: dict[str, Any] = {'batch_size': costs.batch_size}
  for unit, each in measured.items():
    cumulative = each.cumulative(tuple(range(each.num_exits))).tolist()
    stages = [last - first for first, last in zip([0.0, *cumulative[:-1]], cumulative, strict=True)]
    found |= {f'{unit}_stages': stages, f'{unit}_alone': each.alone().tolist()}
  return {
    'device': jax.local_devices()[0].device_kind,
    'cpu': cpu_name(),
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'runs': costs.runs,
    'batch_sizes': [found],
    **({} if joules is None else {'energy': list(joules.energy.sources)}),
  }
