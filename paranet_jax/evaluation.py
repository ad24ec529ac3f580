"""Accuracy and loss of every exit on a whole split, exact for any number of images."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from paranet_jax import devices as devices_lib
from paranet_jax.data.batches import eval_batches
from paranet_jax.data.dataset import Split
from paranet_jax.steps import make_eval_step
from paranet_jax.targets import trained_exits
from paranet_jax.task import Task

MEASURES = ('accuracy', 'top5', 'loss', 'nll')


class Evaluator:
  """Evaluates the exits of a task, each with its own jitted function; splits are placed on the devices once."""

  def __init__(self, task: Task, devices: list[jax.Device]):
    self._task = task
    self._devices = devices
    self._steps = {
      number: jax.jit(make_eval_step(task.model, number, task.preprocessing, task.config.loss.label_smoothing))
      for number in trained_exits(task.targets)
    }
    named = {'held_out': task.dataset.held_out, 'test': task.dataset.test}
    self._splits = {name: self._place(split) for name, split in named.items() if split is not None}

  def evaluate(self, params: Any, batch_stats: Any) -> dict[str, list[dict]]:
    """Evaluates every split.

    Returns:
      {'held_out' (if there is one), 'test': one dict an exit: `exit`, `trained`, and `accuracy`, `top5` (fractions),
      `loss`, `nll` (nats), None where the exit is not trained}.
    """
    return {name: list(self._exits(params, batch_stats, split)) for name, split in self._splits.items()}

  def _exits(self, params: Any, batch_stats: Any, split: tuple) -> Iterator[dict]:
    for number in range(1, self._task.model.num_exits + 1):
      step = self._steps.get(number)
      measured = dict.fromkeys(MEASURES) if step is None else _means(step, params, batch_stats, *split)
      yield {'exit': number, 'trained': step is not None, **measured}

  def _place(self, split: Split) -> tuple[jax.Array, jax.Array, list[tuple[jax.Array, jax.Array]]]:
    whole = devices_lib.replicated(self._devices)
    shared = devices_lib.shared(self._devices)
    each = len(self._devices)
    batch_size = -(-min(self._task.config.eval.batch_size, len(split)) // each) * each
    indices, mask = eval_batches(len(split), batch_size)
    batches = [jax.device_put(batch, shared) for batch in zip(indices, mask, strict=True)]
    images, labels = np.asarray(split.images), np.asarray(split.labels)
    return jax.device_put(images, whole), jax.device_put(labels, whole), batches


def _means(step: Any, params: Any, batch_stats: Any, images: Any, labels: Any, batches: list) -> dict[str, float]:
  sums = [step(params, batch_stats, images, labels, indices, mask) for indices, mask in batches]
  # Summed on the host in float64: a count of images in float32 is exact only up to 2^24.
  totals = {name: float(sum(np.float64(batch[name]) for batch in jax.device_get(sums))) for name in sums[0]}
  return {name: totals[name] / totals['count'] for name in MEASURES}


def as_metrics(exits: list[dict]) -> dict[str, float]:
  """One split's evaluation as values of a metrics line: `exit_1/accuracy`, ..."""
  return {f'exit_{row["exit"]}/{name}': row[name] for row in exits if row['trained'] for name in MEASURES}
