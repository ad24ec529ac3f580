"""Saving and restoring the train state: the only file that knows orbax.

It takes a third of a second to import, and a run that begins needs it at its first save, which is in the background.
"""

import asyncio
import contextlib
import errno
import functools
import itertools
import logging as python_logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging

from paranet_jax.host.arguments import check_utf8
from paranet_jax.host.errors import UserError, say
from paranet_jax.host.files import damaged_file, file_checksums, parse_object, read_file, write_json

T = TypeVar('T')

FOLDER = 'checkpoints'
VARIABLES = ('params', 'batch_stats')
"""The parts of a state that evaluation needs."""
DAMAGED = 'damaged_checkpoints'
CHECKSUMS = 'checksums.json'
FORMAT = 1
"""Format 0 has no checksums."""

_UNFINISHED = '*.orbax-checkpoint-tmp*'
_DELETED = 'deleted'
_COMMITTED = 'commit_success.txt'
_OF_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)
"""Errors of the system for files that are missing or not what they were."""


class DamagedError(UserError):
  """A checkpoint cannot be read, or differs from what was saved; `what` says which and why."""

  def __init__(self, folder: Path, reason: str):
    self.what = f'checkpoint {folder} is damaged ({reason})'
    super().__init__(f'{self.what}; move that folder away to continue without it')


@functools.cache
def orbax() -> Any:
  """orbax.checkpoint."""
  import orbax.checkpoint as ocp
  from orbax.checkpoint._src import asyncio_utils

  # orbax has no public way: when one file fails, it leaves the others to be written and read without an event loop,
  # which prints tracebacks and puts files into a folder that is being removed.
  asyncio_utils.run_sync = _wait_for_all(asyncio_utils.run_sync)
  return ocp


def has_checkpoint(workdir: Path, file: str = '') -> bool:
  """Whether a run has saved a checkpoint, with a file of this name in it; '': any."""
  return any(os.path.exists(folder / file) for folder in step_folders(workdir).values())


def step_folders(workdir: Path) -> dict[int, Path]:
  """The folders of a run's checkpoints by their step, without what a kill left unfinished."""
  if not os.path.isdir(workdir / FOLDER):  # Unlike Path.is_dir, also False where the name is too long.
    return {}
  # An unfinished one is `100.orbax-checkpoint-tmp...`.
  return {int(path.name): path for path in (workdir / FOLDER).glob('[0-9]*') if path.name.isdecimal()}


class Checkpoints:
  """The checkpoints of a run in `workdir/checkpoints`, one folder a step. A context manager.

  Args:
    workdir: absolute. Only one process at a time may open it to save there.
    keep: number of latest checkpoints to keep; None: read only, so that nothing is created or removed.

  Attributes:
    also_keep: given the steps of the checkpoints, returns those to keep in addition to the latest.
  """

  def __init__(self, workdir: Path, keep: int | None = None):
    self.also_keep: Callable[[Sequence[int]], Iterable[int]] = lambda steps: ()
    check_utf8(workdir, '--workdir')
    self._keep = keep
    self._folder = workdir / FOLDER
    self._there = bool(keep) or self._folder.exists()
    if keep:
      self._folder.mkdir(parents=True, exist_ok=True)
    # Not orbax's own thread: before orbax returns it prepares every array, which takes ten times as long as a copy.
    self._background = ThreadPoolExecutor(1)
    self._saving: Future | None = None
    if keep:
      self._tidy()

  @functools.cached_property
  def _manager(self) -> Any:
    assert self._there, f'there is no {self._folder}'
    ocp = orbax()

    class Manager(ocp.CheckpointManager):
      def reached_preemption(self, step: int) -> bool:
        """Never: `StopRequest` asks jax, and asking about a past step would agree on one that no process reaches."""
        return False

    options = ocp.CheckpointManagerOptions(
      create=False,
      preservation_policy=self if self._keep else None,
      # A rename is atomic: a kill during deletion leaves nothing that looks like a checkpoint.
      todelete_subdir=_DELETED,
      enable_async_checkpointing=False,
      # Only process 0 saves: every process has the full state.
      multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0}),
    )
    return Manager(self._folder, options=options)

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Says which checkpoints stay; orbax calls this as its preservation policy.

    Not orbax's `BestN`, which ranks by metrics stored inside each checkpoint: those of 0.1.0 have none.
    """
    steps = [checkpoint.step for checkpoint in checkpoints]
    kept = {*(steps[-self._keep :] if self._keep else steps), *self.also_keep(steps)}
    return [step in kept for step in steps]

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: type | None, *unused) -> None:
    try:
      self.wait()
    except UserError:
      if kind is None:  # Otherwise an earlier error is on its way.
        raise
    finally:
      self._background.shutdown()
      if self._is_open:
        self._manager.close()

  def steps(self) -> list[int]:
    """Steps of the checkpoints, in increasing order."""
    self.wait()
    if not self._is_open and not step_folders(self._folder.parent):
      return []
    return sorted(self._manager.all_steps())

  @property
  def _is_open(self) -> bool:
    return '_manager' in vars(self)

  def latest_step(self) -> int | None:
    """Step of the latest checkpoint, if any."""
    return max(self.steps(), default=None)

  def choose(self, step: int | None = None) -> int:
    """Returns the requested step, or the latest.

    Raises:
      UserError: there is no such checkpoint.
    """
    steps = self.steps()
    if not steps:
      raise UserError(f'expected a checkpoint in {self._folder}, found none; train first, or set --workdir')
    if step is not None and step not in steps:
      raise UserError(f'no checkpoint of step {step} in {self._folder}, found {steps}; set --step')
    return steps[-1] if step is None else step

  def read_chosen(self, choose: Callable[['Checkpoints'], int], read: Callable[[int], T]) -> tuple[int, T]:
    """The step that `choose` names and what `read` returns for it.

    Chooses again if a training that goes on elsewhere deletes the checkpoint before it is read.

    Raises:
      UserError: as `choose` and `read`.
    """
    while True:
      step = choose(self)
      try:
        return step, read(step)
      except DamagedError:
        if (self._folder / str(step)).exists():
          raise
      self._manager.reload()

  def shapes(self, step: int) -> dict[str, list[int]]:
    """The shapes of a checkpoint's arrays by path, see `shapes_by_path`.

    Raises:
      UserError: the checkpoint is damaged.
    """
    return self._read_meta(step)['shapes']

  def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Copies a state to the host, then saves it in the background.

    Waits for the previous save first.

    Args:
      step: steps done.
      state: a tree of arrays.
      meta: JSON values saved with it.

    Raises:
      UserError: the previous save failed (see `wait`).
    """
    self.wait()
    self._saving = self._background.submit(self._write, step, _host_copy(state), meta)

  def check(self) -> None:
    """Raises what `wait` would raise, if the save has finished."""
    if self._saving is not None and self._saving.done():
      self.wait()

  def wait(self) -> None:
    """Waits for the save in progress, if any.

    Raises:
      UserError: the state was not finite, and is not saved; or the disk was full.
    """
    saving, self._saving = self._saving, None
    if saving is not None:
      saving.result()

  def _write(self, step: int, state: Any, meta: dict[str, Any]) -> None:
    saved_step = self._manager.latest_step()
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)):
      raise not_finite('the state', step, saved_step)
    meta = meta | {'format': FORMAT, 'shapes': shapes_by_path(state)}
    ocp = orbax()
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    try:
      with _raised_not_logged():
        saved = self._manager.save(step, args=args)
      if not saved and step not in self._manager.all_steps():
        raise ValueError('there is a later one')
      folder = self._folder / str(step)
      if saved:  # Otherwise there was one of this step, with its checksums.
        for marker in folder.rglob(_COMMITTED):
          marker.write_text('')  # Only its existence counts; orbax wrote the name of a folder on this machine.
        write_json(folder / CHECKSUMS, file_checksums(folder))
    except (OSError, ValueError) as error:
      self._tidy()
      self._manager.reload()
      intact = self._manager.latest_step()
      what = 'the checksums of the checkpoint' if intact == step else 'the checkpoint'
      last = 'there is none before it' if intact is None else f'the one of step {intact} is intact'
      raise UserError(
        f'{what} of step {step} cannot be written to {self._folder} ({_reason(error)}), and {last}; '
        'fix that or make room, and the same command resumes'
      ) from error
    self._tidy()

  def _tidy(self) -> None:
    """Removes checkpoints that a kill or a full disk left half written or half deleted."""
    for path in (*self._folder.glob(_UNFINISHED), self._folder / _DELETED):
      shutil.rmtree(path, ignore_errors=True)

  def restore_latest(self, like: Any) -> tuple[int, Any, dict[str, Any]]:
    """Restores the latest intact checkpoint; damaged ones after it are reported and moved away.

    Args:
      like: see `restore`.

    Returns:
      Its step, its state and its meta.

    Raises:
      UserError: there is none, or it has a different architecture or optimizer.
    """
    while True:
      step = self.choose()
      try:
        return step, *self.restore(step, like)
      except DamagedError as error:
        if len(self.steps()) == 1:
          raise
        say(f'{error.what}; moved to {self._move_away(step)}')

  def _move_away(self, step: int) -> Path:
    folder = self._folder.parent / DAMAGED
    folder.mkdir(exist_ok=True)
    names = itertools.chain([str(step)], (f'{step}.{number}' for number in itertools.count(1)))
    target = next(folder / name for name in names if not os.path.lexists(folder / name))
    (self._folder / str(step)).rename(target)
    self._manager.reload()
    return target

  def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """Restores a state and its meta.

    Args:
      step: an existing one (see `choose`).
      like: a state of the same structure; each array is placed like the one here.

    Raises:
      UserError: the checkpoint is damaged, has a different architecture or optimizer, or holds weights only.
    """
    meta = self._read_meta(step)
    saved = meta.pop('shapes')
    self._check_whole(step, saved)
    self._check_shapes(step, saved, shapes_by_path(like))
    ocp = orbax()
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return self._read(step, state=ocp.args.StandardRestore(abstract)).state, meta

  def read_variables(self, step: int) -> dict[str, Any]:
    """Reads the parameters and running statistics of any model, as trees of float32 NumPy arrays.

    Args:
      step: an existing one (see `choose`).

    Raises:
      UserError: the checkpoint is damaged.
    """
    self._read_meta(step)
    return self._read_variables(step)

  def restore_variables(self, step: int, like: Any) -> Any:
    """Restores parameters and running statistics without the rest of the state, as NumPy arrays.

    Args:
      step: an existing one (see `choose`).
      like: {'params', 'batch_stats'}, a tree of the same structure.

    Raises:
      UserError: the checkpoint is damaged, or has a different architecture.
    """
    saved = {path: shape for path, shape in self.shapes(step).items() if path.split('/')[0] in like}
    self._check_shapes(step, saved, shapes_by_path(like))
    variables = self._read_variables(step)
    return {name: variables[name] for name in like}

  def _read_variables(self, step: int) -> dict[str, Any]:
    state = self._read(step, state=orbax().args.StandardRestore()).state
    # A packed run has parameters in float16.
    return jax.tree.map(partial(np.asarray, dtype=np.float32), {name: state.get(name) or {} for name in VARIABLES})

  def _read_meta(self, step: int) -> dict[str, Any]:
    """Reads the meta after verifying the files, since orbax does not notice every kind of damage."""
    self._check_files(step)
    meta = self._read(step, meta=orbax().args.JsonRestore()).meta
    shapes = meta.get('shapes') if isinstance(meta, dict) else None
    if not isinstance(shapes, dict) or not isinstance(found := meta.pop('format', 0), int):
      raise self._damaged(step, 'meta')
    if found > FORMAT:
      raise UserError(
        f'checkpoint {self._folder / str(step)} has format {found}, and this version reads up to {FORMAT}; '
        'update paranet_jax, or set --workdir'
      )
    return meta

  def _read(self, step: int, **items: Any) -> Any:
    try:
      with _raised_not_logged():
        return self._manager.restore(step, args=orbax().args.Composite(**items))
    except (MemoryError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:  # orbax raises many kinds of errors for damage, plain Exception among them.
      refused, reason = _refused(error), type(error).__name__
    if refused:
      raise UserError(
        f'checkpoint {self._folder / str(step)} may be intact, and cannot be read ({refused}); fix that, or move that '
        'folder away to continue without it'
      )
    raise self._damaged(step, reason)

  def _check_files(self, step: int) -> None:
    folder = self._folder / str(step)
    content = read_file(folder / CHECKSUMS, f'make it readable, or move {folder} away to continue without it')
    if content is None:  # Format 0, or the run was killed before it wrote them.
      return
    try:
      saved = parse_object(content)
    except ValueError:
      raise self._damaged(step, CHECKSUMS) from None
    if damaged := damaged_file(folder, saved):
      raise self._damaged(step, damaged)

  def _damaged(self, step: int, reason: str) -> DamagedError:
    return DamagedError(self._folder / str(step), reason)

  def _check_whole(self, step: int, saved: dict[str, list[int]]) -> None:
    if all(path.split('/')[0] in VARIABLES for path in saved):
      raise UserError(
        f'checkpoint {self._folder / str(step)} holds weights only, which cannot be trained further; '
        'start another run from them with --config.init_from, and another --workdir'
      )

  def _check_shapes(self, step: int, saved: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    if difference := shape_difference(saved, wanted):
      raise UserError(
        f'checkpoint {self._folder / str(step)} has a different architecture or optimizer: {difference}; '
        'set --config to the one it was trained with, or --workdir'
      )


def not_finite(what: str, step: int, saved_step: int | None) -> UserError:
  """The error of a run whose loss or state is not finite.

  Args:
    step: where it was found.
    saved_step: the latest checkpoint's; None: there is none.
  """
  saved = 'nothing is saved' if saved_step is None else f'the last checkpoint is of step {saved_step}'
  return UserError(
    f'{what} is no longer finite at step {step}, and {saved}; '
    'lower --config.train.learning_rate or set --config.train.clip_norm, in a new --workdir'
  )


def _host_copy(state: Any) -> Any:
  arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
  # All transfers at once; on a CPU there is none, and asking takes as long as the copy.
  if any(device.platform != 'cpu' for array in arrays[:1] for device in array.devices()):
    for array in arrays:
      array.copy_to_host_async()
  # A real copy: the next step reuses the state's buffers (donation), which on a CPU the host shares.
  return jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)


def shapes_by_path(tree: Any) -> dict[str, list[int]]:
  """The shapes of a tree's leaves, by their path such as `params/exit_1/classifier/kernel`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): list(leaf.shape) for path, leaf in leaves}


def shape_difference(saved: dict[str, list[int]], wanted: dict[str, list[int]]) -> str | None:
  """The first leaf whose shape differs, in words."""
  for path in [*wanted, *saved]:
    there, here = (shapes.get(path, 'absent') for shapes in (saved, wanted))
    if there != here:
      return f'{path} is {there} there and {here} in this configuration'
  return None


async def _to_the_end(work: Coroutine[Any, Any, Any]) -> Any:
  try:
    return await work
  finally:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)


def _wait_for_all(run_sync: Callable[[Coroutine], Any]) -> Callable[[Coroutine], Any]:
  return lambda work: run_sync(_to_the_end(work))


class _NotOfOrbax(python_logging.Filter):
  def filter(self, record: python_logging.LogRecord) -> bool:
    return '/orbax/checkpoint/' not in record.pathname


@contextlib.contextmanager
def _raised_not_logged() -> Iterator[None]:
  """Keeps orbax from also logging its errors, with the tracebacks of its threads.

  Several threads may be in here at once, so each has a filter of its own, and the verbosity of the process stays.
  """
  own, logger = _NotOfOrbax(), logging.get_absl_logger()
  logger.addFilter(own)
  try:
    yield
  finally:
    # It reports the first error while its other threads still write, or log theirs.
    for thread in threading.enumerate():
      while type(thread).__module__.startswith('orbax.') and thread in threading.enumerate():
        with contextlib.suppress(RuntimeError):  # One that `start` has not started yet.
          threading.Thread.join(thread)  # Their own `join` raises what they raised.
    logger.removeFilter(own)


def _reason(error: Exception) -> str:
  """The reason in short, such as `No space left on device`, in whichever form orbax gives it."""
  code = _system_code(error)
  return os.strerror(code) if code else ' '.join(str(error).split())[:200]


def _refused(error: BaseException) -> str | None:
  """Why the system, for the moment, does not let files be read that may be intact; None: it does."""
  met, waiting = [], [error]
  while waiting:
    each = waiting.pop()
    if each in met:
      continue
    code = _system_code(each)
    if code and code not in _OF_DAMAGE:
      return os.strerror(code)
    met.append(each)
    waiting += [other for other in (each.__cause__, each.__context__) if other]
  return None


def _system_code(error: BaseException) -> int | None:
  """The number of the system's error, which TensorStore gives in the text of another one."""
  found = re.search(r"os_error_code='(\d+)'", str(error))
  return int(found[1]) if found else getattr(error, 'errno', None)
