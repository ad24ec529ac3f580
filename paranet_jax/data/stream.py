"""Batches of stored images, read ahead by worker processes. The only file that knows grain.

A batch is a function of its number alone, so a stream that begins at a later batch goes on exactly where another one
stopped, whatever the number of workers.
"""

import functools
import gc
import multiprocessing
import os
import signal
import threading
from typing import Any, Protocol

import grain
import jax
import numpy as np
from absl import flags

from paranet_jax.data.batches import epoch_order, eval_batches, steps_per_epoch
from paranet_jax.data.dataset import Split

_MOST_WORKERS = 16  # Unless the configuration says otherwise: each takes about 300 MB.
READ_AHEAD = 2
"""Batches ready or in the making in each worker, and as many on the device."""


class Batches(Protocol):
  """Trees of arrays by their number."""

  def __len__(self) -> int: ...

  def __getitem__(self, number: int) -> Any: ...


class TrainBatches:
  """A process's share of the batches of a run, from a step on: the images and order of training in memory.

  Batch i is {'images': uint8 [b, H, W, C], 'labels': int32 [b]} of step `first_step + i`, with a first axis of
  `num_devices` before b where that is given. Process p has the p-th part of every batch.
  """

  def __init__(
    self,
    split: Split,
    *,
    seed: int,
    batch_size: int,
    total_steps: int,
    first_step: int = 0,
    num_devices: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
  ):
    """
    Args:
      split: with stored images.
      batch_size: over all devices of all processes together.
      total_steps: of the run.
      first_step: where the stream begins.
      num_devices: of this process, to have an axis for them.
      process_index, process_count: which share.
    """
    self._split, self._seed, self._batch_size = split, seed, batch_size
    self._first_step, self._total_steps = first_step, total_steps
    self._steps_per_epoch = steps_per_epoch(len(split), batch_size)
    self._share = process_index, process_count
    self._devices = () if num_devices is None else (num_devices,)

  def __len__(self) -> int:
    return max(self._total_steps - self._first_step, 0)

  def __getitem__(self, number: int) -> dict[str, np.ndarray]:
    epoch, step = divmod(self._first_step + int(number), self._steps_per_epoch)
    order = _order(self._seed, epoch, len(self._split), self._batch_size)[step]
    index, count = self._share
    chosen = order.reshape(count, *self._devices, -1)[index]
    images = self._split.images.read(chosen.ravel())
    return {'images': images.reshape(*chosen.shape, *images.shape[1:]), 'labels': self._split.labels[chosen]}


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_examples: int, batch_size: int) -> np.ndarray:
  with jax.default_device(jax.local_devices(backend='cpu')[0]):
    return np.asarray(epoch_order(seed, epoch, num_examples, batch_size))


class EvalBatches:
  """Every image once, in order: {'images', 'labels', 'mask': float32 [b], 0 where the last batch is filled up}.

  Of P processes, process p has the batches p, p + P, ...
  """

  def __init__(self, split: Split, batch_size: int, process_index: int = 0, process_count: int = 1):
    self._split = split
    self._indices, self._mask = (every[process_index::process_count] for every in eval_batches(len(split), batch_size))

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, number: int) -> dict[str, np.ndarray]:
    chosen = self._indices[number]
    labels = self._split.labels[chosen]
    return {'images': self._split.images.read(chosen), 'labels': labels, 'mask': self._mask[number]}


class Stream:
  """Batches in order, read ahead: an iterator, and a context that ends its workers.

  What a worker raises, the iterator raises.
  """

  def __init__(self, batches: Batches, workers: int | None, place: jax.sharding.Sharding | jax.Device | None = None):
    """
    Args:
      batches: picklable.
      workers: processes that read them; 0: threads of this process; None: one a core, at most 16.
      place: where arrays are put ahead of their use; None: they stay NumPy's.
    """
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # grain reads absl's global flags; a command of ours parses flags of its own.
    grain.config.update('py_traceback_filtering', 'off')  # It would add lines to the message of what a worker raises.
    workers = min(num_workers(workers), len(batches))
    read = grain.ReadOptions(num_threads=READ_AHEAD, prefetch_buffer_size=READ_AHEAD)
    processes = grain.multiprocessing.MultiprocessingOptions(workers, per_worker_buffer_size=READ_AHEAD)
    dataset = grain.MapDataset.source(batches).to_iter_dataset(read)
    dataset = dataset.mp_prefetch(processes, worker_init_fn=_prepare_worker)
    if place is not None:
      dataset = grain.experimental.device_put(dataset, place, cpu_buffer_size=1, device_buffer_size=READ_AHEAD)
    self._placed, self._batches = place is not None, iter(dataset)

  def __enter__(self) -> 'Stream':
    return self

  def __exit__(self, *unused) -> None:
    self._batches.close()
    self._batches = iter(())
    gc.collect()  # grain's iterators refer to each other, and to memory shared with the workers, which is then freed.

  def __iter__(self) -> 'Stream':
    return self

  def __next__(self) -> Any:
    batch = next(self._batches)
    # What a worker sends lies in memory that it shares; a placed array keeps that alive by itself.
    return batch if self._placed else jax.tree.map(np.array, batch)


def num_workers(workers: int | None) -> int:
  """Of a stream: those asked for, or one for each core that this process may use, at most 16."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  return min(cores, _MOST_WORKERS) if workers is None else workers


def _prepare_worker(_: int, __: int) -> None:
  # Control-C, and what a cluster sends, reach the whole group: the run, which may read on, ends its workers itself.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  jax.config.update('jax_platforms', 'cpu')  # The accelerator is the run's.
  threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
  """Ends this process with its parent, which may have been killed."""
  parent.join()
  os._exit(1)
