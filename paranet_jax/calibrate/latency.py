"""Measured latency of each stage on this machine, and from it the cost of any path in milliseconds an image."""

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

from paranet_jax.description import cpu_name
from paranet_jax.early.chunks import cover, default_sizes
from paranet_jax.early.path_costs import PathCosts, Stages
from paranet_jax.early.scores import confidence

RUNS = 30
_WARM_UP = 3


class LatencyCosts(PathCosts):
  """Milliseconds an image along any path at one batch size; what is asked for is measured once, then kept.

  Args:
    model: with the multi-exit interface.
    variables: its parameters and statistics.
    image_shape: (H, W, C).
    exits: numbers of the usable exits, 1-based and increasing.
    batch_size: images that enter each stage together, in the fixed sizes that the runtime computes.
    score: computed on the host after every stage but the last, as the runtime does before the next one.
    runs: timed runs of each stage, of which the median counts.
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
    # As the runtime does: a batch is covered by a few fixed sizes.
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
      total += times * median_seconds(partial(_run, stage, arguments, score), self.runs)
    return total * 1e3 / self.batch_size


def _run(stage: Callable, arguments: tuple[Any, Any], score: str | None) -> Any:
  """What the runtime does at a stage: compute, wait for the logits, and rank them."""
  logits, carry = stage(*arguments)
  logits = np.asarray(logits)
  if score == 'patience':
    logits.argmax(-1)
  elif score is not None:
    confidence(logits, score)
  return carry


def compiled_stage(stages: Stages, index: int) -> Callable[[Any, Any], tuple[Any, Any]]:
  """(uint8 images, carry) -> (logits, carry), with the variables as constants of the program, as in the runtime."""
  stage = stages.function(index)
  return jax.jit(lambda images, carry: stage(stages.variables, images.astype(jnp.float32), carry))


def _ones(size: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
  return jnp.ones((size, *leaf.shape[1:]), leaf.dtype)


def median_seconds(function: Callable[[], Any], runs: int = RUNS) -> float:
  """The median time until the result of a call is there, after a few calls that are not timed."""
  for _ in range(_WARM_UP):
    jax.block_until_ready(function())
  seconds = []
  for _ in range(runs):
    started = time.perf_counter()
    jax.block_until_ready(function())
    seconds.append(time.perf_counter() - started)
  return statistics.median(seconds)


def latency_record(costs: Sequence[LatencyCosts]) -> dict[str, Any]:
  """What was measured and where, as exits.json keeps it.

  Args:
    costs: of one model, one for each batch size.

  Returns:
    `device`, `cpu`, `date`, `runs` and `batch_sizes`: for each `batch_size`, `ms_stages` (of each stage in turn) and
    `ms_alone` (of each exit by itself), in milliseconds an image.
  """
  every = tuple(range(costs[0].num_exits))
  rows = []
  for cost in costs:
    cumulative = cost.cumulative(every)
    stages = [float(last - first) for first, last in zip([0.0, *cumulative[:-1]], cumulative, strict=True)]
    rows.append({'batch_size': cost.batch_size, 'ms_stages': stages, 'ms_alone': cost.alone().tolist()})
  return {
    'device': jax.local_devices()[0].device_kind,
    'cpu': cpu_name(),
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'runs': costs[0].runs,
    'batch_sizes': rows,
  }
