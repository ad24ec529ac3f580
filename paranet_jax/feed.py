"""What each training step reads: the whole training set on the devices, or one batch after another."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from paranet_jax import devices as devices_lib
from paranet_jax.task import Task

Feed = Callable[[int], tuple[jax.Array, jax.Array, jax.Array]]
"""From the number of a step to its images, labels and order (see `steps.make_train_step`); steps come in turn."""


@contextlib.contextmanager
def open_feed(
  task: Task, devices: list[jax.Device], order: Callable[[int], jax.Array], first_step: int
) -> Iterator[Feed]:
  """The feed of a run that begins at `first_step`.

  Args:
    order: the placed order of an epoch, of images in memory.
  """
  if not task.dataset.train.streamed:
    yield _whole_set(task, devices, order)
    return
  from paranet_jax.data.stream import Stream, TrainBatches  # grain takes half a second to import.

  config, number, here = task.config, len(devices), len(devices_lib.of_this_process(devices))
  place = devices_lib.replicated(devices) if number == 1 else devices_lib.shared(devices)
  batches = TrainBatches(
    task.dataset.train,
    seed=config.seed,
    batch_size=config.train.batch_size,
    total_steps=task.total_steps,
    first_step=first_step,
    num_devices=None if number == 1 else here,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  # A device's share of a batch is all that it is given, so its order is as it comes.
  size = config.train.batch_size // number
  rows = np.broadcast_to(np.arange(size, dtype=np.int32), (task.steps_per_epoch, size))
  counting = jax.device_put(rows if number == 1 else np.stack([rows] * here), place)
  with Stream(batches, config.data.workers, place) as placed:

    def feed(_: int) -> tuple[jax.Array, jax.Array, jax.Array]:
      batch = next(placed)
      return batch['images'], batch['labels'], counting

    yield feed


def _whole_set(task: Task, devices: list[jax.Device], order: Callable[[int], jax.Array]) -> Feed:
  train = task.dataset.train
  images, labels = jax.device_put((train.images, train.labels), devices_lib.replicated(devices))
  order = functools.lru_cache(maxsize=1)(order)

  def feed(step: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    return images, labels, order(step // task.steps_per_epoch)

  return feed
