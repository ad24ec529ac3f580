"""Several processes that train one model: how they join, what the first does alone, and what they tell each other."""

import contextlib
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from paranet_jax.host.errors import UserError, exit_code
from paranet_jax.host.place import Place
from paranet_jax.host.watch import Watch

JOIN_SECONDS = 300
"""How long a process waits for the others to come."""

_CLUSTERS = ('slurm', 'ompi', 'gcetpu', 'gketpu')
_MESSAGE = 4096  # Bytes of what `from_first` tells: one size, so that it is compiled once.


def cluster() -> tuple[str, int] | None:
  """The cluster that started this process, as jax calls it, and how many processes it started; None: there is none."""
  try:
    # jax detects clusters when it joins, and has no public way to ask before: one process alone should not join.
    from jax._src.clusters import ClusterEnv

    kinds = [kind for kind in ClusterEnv._cluster_types if kind.name in _CLUSTERS]
    found = next((kind for kind in kinds if kind.is_env_present()), None)
    return None if found is None else (found.name, found.get_process_count())
  except (ImportError, AttributeError):
    return None


def refuse_several(what: str) -> None:
  """Refuses a command that is of one process, where a cluster has started several of it.

  Raises:
    UserError: it has.
  """
  name, number = cluster() or ('', 1)
  if number > 1:
    raise UserError(f'{what} runs in one process, found {number} started by {name}; start one, with one task')


@contextlib.contextmanager
def joined(place: Place, heartbeat_timeout: int) -> Iterator[None]:
  """Joins the other processes, if there are any. What fails then ends this process, and the watch ends the others.

  It comes before anything that uses a device. Of what is printed to standard output, only the first process's is seen.

  Args:
    place: None for each field: the cluster's environment says, and without one this process is alone.
    heartbeat_timeout: seconds without a sign of life after which a process counts as dead.

  Raises:
    UserError: the others cannot be joined.
  """
  by_flags = place.num_processes is not None
  if (place.num_processes if by_flags else (cluster() or ('', 1))[1]) == 1:
    yield
    return
  _initialize(place, heartbeat_timeout)
  _print_for_the_first_only()
  watch = _watch(place.coordinator, heartbeat_timeout)
  try:
    yield
    from_first(None)  # However long the first one still saves: what comes next waits for minutes alone.
    jax.distributed.shutdown()
  except BaseException as error:
    _end(error, watch)
  watch.leave(done=True)  # Not before: until here the others are waited for.


def _initialize(place: Place, heartbeat_timeout: int) -> None:
  by_flags = {'cluster_detection_method': 'deactivate'} if place.coordinator else {}
  late = threading.Timer(JOIN_SECONDS - 1, _nobody_came, (place,))  # A moment before jax aborts.
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(
      *place, heartbeat_timeout_seconds=heartbeat_timeout, initialization_timeout=JOIN_SECONDS, **by_flags
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f'the processes cannot join ({" ".join(str(error).split())[:200]}); set --coordinator, --num_processes and '
      '--process_id, or --num_processes=1 to train alone'
    ) from error
  finally:
    late.cancel()


def _nobody_came(place: Place) -> NoReturn:
  at = f' at {place.coordinator}' if place.coordinator else ''
  print(
    f'error: the other processes did not come{at} within {JOIN_SECONDS} s; start all of them with the same '
    '--coordinator, which process 0 must be reached at, or set --num_processes=1 to train alone',
    file=sys.stderr,
    flush=True,
  )
  os._exit(2)


def _print_for_the_first_only() -> None:
  sys.stdout.flush()
  # Not of sys.stdout alone: gloo prints of its connections from C++, and only Python's lines are to be seen.
  silent = os.open(os.devnull, os.O_WRONLY)
  own = os.dup(1) if is_first() else os.dup(silent)
  sys.stdout = os.fdopen(own, 'w', buffering=1)
  os.dup2(silent, 1)
  os.close(silent)


def _watch(coordinator: str | None, heartbeat_timeout: int) -> Watch:
  watch = Watch(jax.process_index(), count(), heartbeat_timeout)
  if is_first():
    from_first([socket.gethostname(), watch.listen()])
    return watch
  host, port = from_first(None)
  hosts = [coordinator.rpartition(':')[0].strip('[]')] if coordinator else []
  if not watch.connect([*hosts, host], port):
    print(
      f'process {jax.process_index()} cannot reach {host}:{port}, where process 0 watches the others: '
      "a process that dies is told by jax's own log alone",
      file=sys.stderr,
      flush=True,
    )
  return watch


def _end(error: BaseException, watch: Watch) -> NoReturn:
  """Ends this process at once: leaving in good order would wait for the others, which wait for this one."""
  if isinstance(error, _ToldOnce) and not is_first():
    code = 2
  elif isinstance(error, UserError | KeyboardInterrupt):
    code = exit_code(lambda: _raise(error))
  else:
    watch.wait()  # A collective fails where another process dies, and the watch says so better.
    traceback.print_exception(error)
    code = 1
  watch.leave(done=False)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _raise(error: BaseException) -> NoReturn:
  if isinstance(error, UserError) and not is_first():
    raise UserError(f'process {jax.process_index()} of {count()}: {error}')
  raise error


class _ToldOnce(UserError):
  """Raised in all processes, and told by the first."""


def told_once(error: UserError) -> UserError:
  """The same error, of which every process finds the same, so that the first alone prints it."""
  return _ToldOnce(*error.args)


def count() -> int:
  """Processes of this run."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
  """Of this process."""
  return jax.process_index() if jax.distributed.is_initialized() else 0


def is_first() -> bool:
  """Whether this process is the one that writes."""
  return index() == 0


def once(act: Callable[..., Any], *arguments: Any) -> Any:
  """What act(*arguments) returns in the first process; in the others nothing is done, and it is None."""
  return act(*arguments) if is_first() else None


def once_within(context: Callable[..., Any], *arguments: Any) -> Any:
  """As `once`, of a context manager."""
  return context(*arguments) if is_first() else contextlib.nullcontext()


def first_then_others(act: Callable[[], Any]) -> Any:
  """What act() returns, which the others call when the first is done: what it downloads or decodes, they find."""
  if not is_first():
    from_first(None)
  result = act()
  if is_first():
    from_first(None)
  return result


def from_first(value: Any) -> Any:
  """A JSON value of the first process, of up to 4 kB, in all of them; the others' own is not looked at."""
  if count() == 1:
    return value
  message = json.dumps(value).encode() if is_first() else b''
  told = _broadcast(np.frombuffer(message.ljust(_MESSAGE), np.uint8))
  return json.loads(told.tobytes())


def arrays_from_first(tree: Any) -> Any:
  """A tree of arrays of the first process in all of them, as NumPy arrays, bit for bit; alone, the tree as it is.

  Args:
    tree: the others' is of the same structure, shapes and types.
  """
  if count() == 1:
    return tree
  leaves, structure = jax.tree.flatten(tree)
  ends = np.cumsum([leaf.size * leaf.dtype.itemsize for leaf in leaves])
  if is_first():
    joined_bytes = np.concatenate([np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) for leaf in leaves])
  else:
    joined_bytes = np.zeros(ends[-1], np.uint8)
  parts = np.split(_broadcast(joined_bytes), ends[:-1])
  told = [part.view(leaf.dtype).reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
  return jax.tree.unflatten(structure, told)


def summed(values: np.ndarray) -> np.ndarray:
  """The sum over all processes of a float64 array of the same shape in each."""
  if count() == 1:
    return values
  # As bits: on a device, float64 would be rounded to float32.
  every = np.asarray(multihost_utils.process_allgather(np.ascontiguousarray(values).view(np.uint32)))
  return every.view(np.float64).sum(axis=0)


def _broadcast(values: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(multihost_utils.broadcast_one_to_all(values))
