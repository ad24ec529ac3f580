"""Accuracy and loss of every exit on a whole split, exact for any number of images."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from paranet_jax import devices as devices_lib
from paranet_jax.data.batches import eval_batches
from paranet_jax.data.dataset import Split
from paranet_jax.feed import placed
from paranet_jax.host.machine import Device
from paranet_jax.host.processes import Coordinator
from paranet_jax.steps import make_eval_step
from paranet_jax.targets import trained_exits
from paranet_jax.task import Task

MEASURES = ('accuracy', 'top5', 'loss', 'nll')

_AHEAD = 2  # Batches that may be waiting for the device.

Batch = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]
"""Images, labels, indices and mask (see `steps.make_eval_step`)."""


class Evaluator:
  """Evaluates the exits of a task, each with its own jitted function; splits are placed on the devices once.

  In a multi-process run, each process evaluates its share of the batches, and the sums are added up.
  """

  def __init__(self, task: Task, devices: list[Device]):
    self._task = task
    self._devices = devices
    self._processes = Coordinator()
    self._steps = {
      number: jax.jit(make_eval_step(task.model, number, task.preprocessing, task.config.loss.label_smoothing))
      for number in trained_exits(task.targets)
    }
    named = {'held_out': task.dataset.held_out, 'test': task.dataset.test}
    self._splits = {name: self._place(split) for name, split in named.items() if split is not None}

  def evaluate(self, params: Any, batch_stats: Any) -> dict[str, list[dict]]:
    """Evaluates every split.

    Returns:
      {'held_out' (if there is such a split), 'test': one dict per exit: `exit`, `trained`, and `accuracy`, `top5`
      (fractions), `loss`, `nll` (nats), which are None if the exit is not trained}.
    """
    return {name: list(self._exits(params, batch_stats, batches)) for name, batches in self._splits.items()}

  def _exits(self, params: Any, batch_stats: Any, batches: Callable[[], Iterator[Batch]]) -> Iterator[dict]:
    sums = {number: [] for number in self._steps}
    for batch in batches():
      for number, step in self._steps.items():
        sums[number].append(step(params, batch_stats, *batch))
      # A streamed batch holds memory until its turn comes.
      jax.block_until_ready([own[-_AHEAD] for own in sums.values() if len(own) >= _AHEAD])
    totals = dict(zip(sums, self._processes.summed(np.array([_totals(own) for own in sums.values()])), strict=True))
    for number in range(1, self._task.model.num_exits + 1):
      trained = number in totals
      measured = _means(totals[number]) if trained else dict.fromkeys(MEASURES)
      yield {'exit': number, 'trained': trained, **measured}

  def _place(self, split: Split) -> Callable[[], Iterator[Batch]]:
    shared = devices_lib.shared(self._devices)
    each = len(devices_lib.of_this_process(self._devices))
    batch_size = -(-min(self._task.config.eval.batch_size, len(split)) // each) * each
    if split.streamed:
      return functools.partial(_streamed, split, batch_size, self._task.config.data.workers, shared)
    own = slice(self._processes.index, None, self._processes.count)
    indices, mask = (every[own] for every in eval_batches(len(split), batch_size))
    batches = [jax.device_put(batch, shared) for batch in zip(indices, mask, strict=True)]
    whole = placed(split, self._devices)
    return lambda: ((*whole, *batch) for batch in batches)


def _streamed(split: Split, batch_size: int, workers: int | None, place: jax.sharding.Sharding) -> Iterator[Batch]:
  from paranet_jax.data.stream import EvalBatches, Stream  # grain takes half a second to import.

  share = EvalBatches(split, batch_size, jax.process_index(), jax.process_count())
  with Stream(share, workers, place) as batches:
    for batch in batches:
      yield batch['images'], batch['labels'], None, batch['mask']


def _totals(sums: list[dict[str, jax.Array]]) -> list[float]:
  """The number of images, and each measure summed over them."""
  # Summed on the host in float64: a count of images in float32 is exact only up to 2^24.
  found = jax.device_get(sums)
  return [float(sum(np.float64(batch[name]) for batch in found)) for name in ('count', *MEASURES)]


def _means(totals: np.ndarray) -> dict[str, float]:
  return {name: float(total / totals[0]) for name, total in zip(MEASURES, totals[1:], strict=True)}


def as_metrics(exits: list[dict]) -> dict[str, float]:
  """One split's evaluation as the values of a metrics line: `exit_1/accuracy`, ..."""
  return {f'exit_{row["exit"]}/{name}': row[name] for row in exits if row['trained'] for name in MEASURES}
