"""Processes that train one model together: how they join, what process 0 does alone, and what they exchange."""

import contextlib
import hashlib
import json
import os
import pickle
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from paranet_jax.host.errors import UserError, exit_code, names_file, say
from paranet_jax.host.watch import Place, Watch

JOIN_SECONDS = 300
"""How long a process waits for the others to join."""

_CLUSTERS = ('slurm', 'ompi', 'gcetpu', 'gketpu')
_MESSAGE = 4096  # Bytes broadcast by `Coordinator.from_first`: a fixed size, so that it is compiled once.


def cluster() -> tuple[str, int] | None:
  """The cluster that started this process, by jax's name, and how many processes it started; None: no cluster."""
  try:
    # jax has no public way to ask before joining, which a single process should not do. Environment variables would
    # answer for SLURM and Open MPI, but a TPU VM knows its neighbors only from a metadata server, which jax asks.
    from jax._src.clusters import ClusterEnv

    kinds = [kind for kind in ClusterEnv._cluster_types if kind.name in _CLUSTERS]
    found = next((kind for kind in kinds if kind.is_env_present()), None)
    return None if found is None else (found.name, found.get_process_count())
  except (ImportError, AttributeError):
    return None


def refuse_several(what: str) -> None:
  """Refuses to run a single-process command when a cluster has started several copies of it.

  Raises:
    UserError: it has.
  """
  name, number = cluster() or ('', 1)
  if number > 1:
    raise UserError(f'{what} runs in one process, found {number} started by {name}; start one, with one task')


@contextlib.contextmanager
def joined(place: Place, heartbeat_timeout: int) -> Iterator[None]:
  """Joins the other processes, if any. An error inside ends this process, and the watch ends the others.

  Must precede anything that uses a device. Only process 0's standard output is shown.

  Args:
    place: with every field None, the cluster's environment decides; without a cluster this process runs alone.
    heartbeat_timeout: seconds without a heartbeat after which a process counts as dead.

  Raises:
    UserError: the processes cannot join.
  """
  by_flags = place.num_processes is not None
  if (place.num_processes if by_flags else (cluster() or ('', 1))[1]) == 1:
    yield
    return
  _initialize(place, heartbeat_timeout)
  coordinator = Coordinator()
  _silence_all_but(coordinator.is_first)
  watch = _watch(coordinator, place.coordinator, heartbeat_timeout)
  try:
    yield
    coordinator.from_first(None)  # However long process 0 still saves: what follows waits for minutes only.
    jax.distributed.shutdown()
  except BaseException as error:
    _end(error, watch, coordinator)
  watch.leave(done=True)  # Not earlier: until here this process waits for the others.


def _initialize(place: Place, heartbeat_timeout: int) -> None:
  late = threading.Timer(JOIN_SECONDS - 1, _no_process_came, (place,))  # A moment before jax aborts.
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(
      *place,
      cluster_detection_method='deactivate' if place.coordinator else None,
      heartbeat_timeout_seconds=heartbeat_timeout,
      initialization_timeout=JOIN_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f'the processes cannot join ({" ".join(str(error).split())[:200]}); set --coordinator, --num_processes and '
      '--process_id, or --num_processes=1 to train alone'
    ) from error
  finally:
    late.cancel()


def _no_process_came(place: Place) -> NoReturn:
  at = f' at {place.coordinator}' if place.coordinator else ''
  say(
    f'error: the other processes did not join{at} within {JOIN_SECONDS} s; start all of them with the same '
    '--coordinator, where process 0 must be reachable, or set --num_processes=1 to train alone',
    to_stderr=True,
  )
  os._exit(2)


def _silence_all_but(first: bool) -> None:
  sys.stdout.flush()
  # Not sys.stdout alone: gloo prints about its connections from C++, and only Python's lines should show.
  silent = os.open(os.devnull, os.O_WRONLY)
  own = os.dup(1) if first else os.dup(silent)
  sys.stdout = os.fdopen(own, 'w', buffering=1, errors='backslashreplace')
  os.dup2(silent, 1)
  os.close(silent)


def _watch(coordinator: 'Coordinator', address: str | None, heartbeat_timeout: int) -> Watch:
  watch = Watch(coordinator.index, coordinator.count, heartbeat_timeout)
  if coordinator.is_first:
    coordinator.from_first([socket.gethostname(), watch.listen()])
    return watch
  host, port = coordinator.from_first(None)
  hosts = [address.rpartition(':')[0].strip('[]')] if address else []
  if not watch.connect([*hosts, host], port):
    say(
      f'process {coordinator.index} cannot reach {host}:{port}, where process 0 watches the others: '
      "only jax's own log will report a process that dies",
      to_stderr=True,
    )
  return watch


def _end(error: BaseException, watch: Watch, coordinator: 'Coordinator') -> NoReturn:
  """Ends this process at once: an orderly shutdown would wait for the others, which wait for this one."""
  if isinstance(error, _ReportedOnce) and not coordinator.is_first:
    code = 2
  elif isinstance(error, UserError | KeyboardInterrupt) or names_file(error):
    code = exit_code(lambda: _raise(error, coordinator))
  else:
    watch.wait()  # A collective fails when another process dies, which the watch reports better.
    traceback.print_exception(error)
    code = 1
  watch.leave(done=False)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _raise(error: BaseException, coordinator: 'Coordinator') -> NoReturn:
  if isinstance(error, UserError) and not coordinator.is_first:
    raise error.saying(f'process {coordinator.index} of {coordinator.count}: {error}')
  raise error


class _ReportedOnce(UserError):
  """Raised in all processes and printed by process 0."""


def reported_once(error: UserError) -> UserError:
  """The same error, to be raised when every process finds it: only process 0 prints it."""
  return _ReportedOnce(*error.args)


class Coordinator:
  """The processes of a run: what process 0 does alone, and what the others get from it.

  Create it after `joined`. In a run of one process, every method is the trivial case.

  Attributes:
    count: processes of the run.
    index: of this process.
  """

  def __init__(self):
    together = jax.distributed.is_initialized()
    self.count = jax.process_count() if together else 1
    self.index = jax.process_index() if together else 0

  @property
  def is_first(self) -> bool:
    """Whether this is process 0, the one that reads and writes the workdir."""
    return self.index == 0

  def once(self, act: Callable[..., Any], *arguments: Any) -> Any:
    """Calls act(*arguments) in process 0; the others do nothing and get None."""
    return act(*arguments) if self.is_first else None

  def once_within(self, context: Callable[..., Any], *arguments: Any) -> Any:
    """Enters the context manager context(*arguments) in process 0; the others enter an empty one."""
    return context(*arguments) if self.is_first else contextlib.nullcontext()

  def first_then_others(self, act: Callable[[], Any]) -> Any:
    """Calls act() in process 0 and then in the others, which find what it downloaded or decoded."""
    if not self.is_first:
      self.from_first(None)
    result = act()
    if self.is_first:
      self.from_first(None)
    return result

  def from_first(self, value: Any) -> Any:
    """Returns process 0's value in every process: JSON of up to 4 kB; the others' own value is ignored."""
    if self.count == 1:
      return value
    message = json.dumps(value).encode() if self.is_first else b''
    received = _broadcast(np.frombuffer(message.ljust(_MESSAGE), np.uint8))
    return json.loads(received.tobytes())

  def object_from_first(self, value: Any) -> Any:
    """Returns process 0's value, which can be pickled, in every process; the others' own value is ignored."""
    if self.count == 1:
      return value
    content = pickle.dumps(value) if self.is_first else b''
    size = self.from_first(len(content))
    return pickle.loads(self.arrays_from_first(np.frombuffer(content or bytes(size), np.uint8)).tobytes())

  def arrays_from_first(self, tree: Any) -> Any:
    """Returns process 0's tree of arrays in every process, as NumPy arrays, bit for bit; one process gets its own back.

    Args:
      tree: in the other processes, one of the same structure, shapes and types.
    """
    if self.count == 1:
      return tree
    leaves, structure = jax.tree.flatten(tree)
    ends = np.cumsum([leaf.size * leaf.dtype.itemsize for leaf in leaves])
    if self.is_first:
      joined_bytes = np.concatenate([np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) for leaf in leaves])
    else:
      joined_bytes = np.zeros(ends[-1], np.uint8)
    parts = np.split(_broadcast(joined_bytes), ends[:-1])
    received = [part.view(leaf.dtype).reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, received)

  def summed(self, values: np.ndarray) -> np.ndarray:
    """The sum over all processes of a float64 array, which has the same shape in each."""
    if self.count == 1:
      return values
    # As bits: on a device, float64 would be rounded to float32.
    every = np.asarray(multihost_utils.process_allgather(np.ascontiguousarray(values).view(np.uint32)))
    return every.view(np.float64).sum(axis=0)

  def check_same(self, facts: Mapping[str, str]) -> None:
    """Compares what determines the training with process 0's; every process calls it.

    Raises:
      UserError: in every process, naming the first fact that differs anywhere.
    """
    if self.count == 1:
      return
    own = {name: hashlib.sha256(fact.encode(errors='backslashreplace')).hexdigest()[:8] for name, fact in facts.items()}
    first = self.from_first(own)
    places = np.zeros(self.count)
    places[self.index] = next((place for place, name in enumerate(first, 1) if own.get(name) != first[name]), 0)
    places = self.summed(places)
    if places.any():
      other = int(np.flatnonzero(places)[0])
      name = list(first)[int(places[other]) - 1]
      raise UserError(
        f'all processes must train the same, found a difference between process {other} and process 0 in {name} '
        f'(here {facts.get(name, "none")[:80]}); start all of them with the same flags and data'
      )


def _broadcast(values: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(multihost_utils.broadcast_one_to_all(values))
