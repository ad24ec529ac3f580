"""Batches of stored images, read ahead by worker processes. The only file that imports grain.

A batch depends on its index only, so a stream that starts at a later batch continues exactly where another one stopped,
for any number of workers.
"""

import ast
import functools
import gc
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, TypeGuard

import grain
import jax
import numpy as np
from absl import flags

from paranet_jax.data.batches import eval_batches, jitted_order, steps_per_epoch
from paranet_jax.data.dataset import Split, StoredImages
from paranet_jax.host.errors import LostWorkersError, UserError, prepare_output
from paranet_jax.host.machine import usable_cores
from paranet_jax.host.signals import seconds_since_request

_MAX_WORKERS = 16  # Unless the configuration says otherwise: each takes about 300 MB.
_PATIENCE = 5.0
"""Seconds after a signal to stop, or of an evaluation that goes on after it, in which a batch is still waited for."""
_STARTING = 20.0
"""The same for the first batch of workers, which start and import jax before."""
_POLL = 0.5  # Seconds between looks at the workers, while no batch comes.
READ_AHEAD = 2
"""Batches that each worker holds ready or is reading, and batches on the device."""


class TrainBatches:
  """One process's share of the batches of a run, with the same images in the same order as training in memory.

  Batch i is {'images': uint8 [b, H, W, C], 'labels': int32 [b]} of step `first_step + i`, with an axis of `num_devices`
  before b if that is given. Process p has the p-th part of every batch.
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
      first_step: where the stream starts.
      num_devices: of this process; None: no axis for them.
      process_index, process_count: which share.
    """
    self._split, self._images, self._seed, self._batch_size = split, _stored(split), seed, batch_size
    self._first_step, self._total_steps = first_step, total_steps
    self._steps_per_epoch = steps_per_epoch(len(split), batch_size)
    self._share = process_index, process_count
    self._devices = () if num_devices is None else (num_devices,)

  def __len__(self) -> int:
    return max(self._total_steps - self._first_step, 0)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    epoch, step = divmod(self._first_step + int(index), self._steps_per_epoch)
    order = _order(self._seed, epoch, len(self._split), self._batch_size)[step]
    process, count = self._share
    chosen = order.reshape(count, *self._devices, -1)[process]
    images = self._images.read(chosen.ravel())
    return {'images': images.reshape(*chosen.shape, *images.shape[1:]), 'labels': self._split.labels[chosen]}


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_examples: int, batch_size: int) -> np.ndarray:
  with jax.default_device(jax.local_devices(backend='cpu')[0]):
    return np.asarray(jitted_order(num_examples, batch_size)(seed, epoch))


class EvalBatches:
  """Each image once, in order: {'images', 'labels', 'mask': float32 [b], 0 for padding in the last batch}.

  With P processes, process p has the batches p, p + P, ...
  """

  def __init__(self, split: Split, batch_size: int, process_index: int = 0, process_count: int = 1):
    self._split, self._images = split, _stored(split)
    self._indices, self._mask = (every[process_index::process_count] for every in eval_batches(len(split), batch_size))

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    chosen = self._indices[index]
    return {'images': self._images.read(chosen), 'labels': self._split.labels[chosen], 'mask': self._mask[index]}


def _stored(split: Split) -> StoredImages:
  assert isinstance(split.images, StoredImages)
  return split.images


class Stream:
  """Batches in order, read ahead: an iterator that raises what its workers raise, and a context that ends them."""

  def __init__(
    self,
    batches: grain.sources.RandomAccessDataSource[Any],
    workers: int | None,
    place: jax.sharding.Sharding | None = None,
  ):
    """
    Args:
      batches: trees of arrays, by index; picklable.
      workers: processes that read them; 0: threads of this process; None: one per core, at most 16.
      place: where arrays are put before they are needed; None: they stay in NumPy.
    """
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # grain reads absl's global flags, which our commands do not parse.
    grain.config.update('py_traceback_filtering', 'off')  # It would add lines to the message of a worker's error.
    workers = min(num_workers(workers), len(batches))
    if workers:
      _check_main_guard()
    read = grain.ReadOptions(num_threads=READ_AHEAD, prefetch_buffer_size=READ_AHEAD)
    processes = grain.multiprocessing.MultiprocessingOptions(workers, per_worker_buffer_size=READ_AHEAD)
    dataset: Any = grain.MapDataset.source(batches).to_iter_dataset(read)
    dataset = dataset.mp_prefetch(processes, worker_init_fn=_prepare_worker)
    if place is not None:
      dataset = grain.experimental.device_put(dataset, place, cpu_buffer_size=1, device_buffer_size=READ_AHEAD)
    self._placed = place is not None
    self._batches: Any = iter(dataset)
    self._count, self._others = workers, set(multiprocessing.active_children())
    self._workers: set[Any] = set()
    self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
    self._found: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    self._started = not workers  # Whether a batch has come, for which workers start and threads do not.
    self._server = threading.Thread(target=_serve, args=(self._batches, self._wanted, self._found), daemon=True)
    self._server.start()

  def __enter__(self) -> 'Stream':
    return self

  def __exit__(self, kind: type | None, *unused) -> None:
    self._wanted.put(False)
    if kind is None or not issubclass(kind, LostWorkersError) or self._count:  # Threads that hang cannot be ended.
      self._batches.close()
    self._batches = iter(())
    self._server.join(_POLL)
    gc.collect()  # grain's iterators form cycles that hold memory shared with the workers.

  def __iter__(self) -> 'Stream':
    return self

  def __next__(self) -> Any:
    self._wanted.put(True)
    batch, error = self._wait()
    if error is not None:
      if not isinstance(error, StopIteration | UserError):
        self._check_workers()
      raise error
    self._started = True
    if len(self._workers) < self._count:
      self._note_workers()
    # A worker's arrays are in shared memory, which only a placed array keeps alive.
    return batch if self._placed else jax.tree.map(np.array, batch)

  def _wait(self) -> tuple[Any, BaseException | None]:
    """Waits for the batch or the error; not in grain, which a signal cannot interrupt, nor always a worker's death."""
    deaths, began = 0, time.monotonic()
    while True:
      try:
        return self._found.get(timeout=_POLL)
      except queue.Empty:
        self._note_workers()
        deaths += any(worker.exitcode for worker in self._workers)
        if deaths > 4:  # grain should have reported it.
          self._check_workers()
        patience = _PATIENCE if self._started else _STARTING
        waited = seconds_since_request()
        if waited is not None and min(waited, time.monotonic() - began) > patience:
          self._end_workers()
          raise LostWorkersError(
            f'a signal to stop came, and {self._names()} had no batch ready within {patience:.0f} s: '
            'look whether the disk or network that holds the images still answers'
          ) from None

  def _note_workers(self) -> None:
    children = set(multiprocessing.active_children()) - self._others
    self._workers |= {child for child in children if child.name.startswith('grain-')}  # The program may start others.

  def _check_workers(self) -> None:
    """Raises an error that names a worker that was killed or has crashed, if any."""
    dead = next((worker for worker in self._workers if worker.exitcode), None)
    if dead is None:
      return
    how = f'ended with exit code {dead.exitcode}'
    if dead.exitcode < 0:
      how = f'was killed by {signal.Signals(-dead.exitcode).name}'
      how += ', probably because memory ran out' if dead.exitcode == -signal.SIGKILL else ''
    self._end_workers()
    raise LostWorkersError(
      f'worker {dead.pid} of {self._count} that read the images {how}: free memory, or set '
      f'--config.data.workers={self._count // 2}'
    )

  def _end_workers(self) -> None:
    for worker in self._workers:  # They may hang, or wait for one that has died.
      worker.kill()

  def _names(self) -> str:
    pids = ', '.join(str(pid) for pid in sorted(worker.pid for worker in self._workers))
    return f'the workers that read the images (pid {pids})' if pids else 'the threads that read the images'


def _serve(batches: Any, wanted: 'queue.SimpleQueue[bool]', found: queue.SimpleQueue) -> None:
  """Puts the next batch, or the error, for each True."""
  while wanted.get():
    try:
      found.put((next(batches), None))
    except BaseException as error:
      found.put((None, error))


def _check_main_guard() -> None:
  """Refuses a script whose present line its worker processes, which import it again, would run again."""
  frame, script = sys._current_frames().get(threading.main_thread().ident or 0), sys.modules['__main__']
  while frame is not None and (frame.f_globals is not vars(script) or frame.f_code.co_name != '<module>'):
    frame = frame.f_back
  path, spec = getattr(script, '__file__', None), getattr(script, '__spec__', None)
  if frame is None or path is None or not os.path.exists(frame.f_code.co_filename):  # Interactive.
    return
  if spec and spec.name.rpartition('.')[2] == '__main__':  # Of a package, a folder or an archive: not imported again.
    return
  try:
    tree = ast.parse(Path(path).read_bytes())
  except (OSError, SyntaxError, ValueError):
    return
  if any(node.lineno <= frame.f_lineno <= (node.end_lineno or 0) for node in ast.walk(tree) if _is_guard(node)):
    return
  raise UserError(
    f"expected `if __name__ == '__main__':` around line {frame.f_lineno} of {path}, because the worker processes that "
    'read the images import it again; or set --config.data.workers=0'
  )


def _is_guard(node: ast.AST) -> TypeGuard[ast.stmt | ast.expr]:
  """Whether a part of a script depends on the name under which it runs."""
  match node:
    case ast.If(test=condition) | ast.IfExp(test=condition) | ast.Match(subject=condition):
      conditions = [condition]
    case ast.BoolOp(values=[*conditions, _]):
      pass
    case _:
      return False
  names = (name for condition in conditions for name in ast.walk(condition) if isinstance(name, ast.Name))
  return any(name.id == '__name__' for name in names)


def num_workers(workers: int | None) -> int:
  """The number of workers of a stream: as configured, or one per core that this process may use, at most 16."""
  return min(usable_cores(), _MAX_WORKERS) if workers is None else workers


def _prepare_worker(_: int, __: int) -> None:
  prepare_output()
  # Control-C and a cluster's signals reach the whole process group, but the run may still read: it ends its workers.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  jax.config.update('jax_platforms', 'cpu')  # The accelerator belongs to the run.
  threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
  """Ends this process when its parent ends, even if that was killed."""
  parent.join()
  os._exit(1)
