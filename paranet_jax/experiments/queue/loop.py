"""Works through a queue: one run after another, or several at a time, until none is left."""

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from paranet_jax.config import real_paths
from paranet_jax.experiments.queue.code import PACKAGE, commit, keep_code, kept_code
from paranet_jax.experiments.queue.file import QueuedRun, QueueFile, read_queue, when_modified
from paranet_jax.experiments.queue.process import RunProcess
from paranet_jax.experiments.queue.record import (
  RunRecord,
  changed,
  environment,
  read_records,
  write_records,
)
from paranet_jax.experiments.queue.state import RUNS, RunState, run_state
from paranet_jax.host.errors import NO_ROOM, UserError, report_no_room, say
from paranet_jax.host.machine import today
from paranet_jax.runs.status import kept_changes
from paranet_jax.runs.workdir import changes, prepare_folder, restore_config

LOGS = 'logs'
ROOM = 200 * 10**6
"""Bytes of free disk without which no run is started: a few checkpoints of the paper's networks."""

_STOPPED = 'stopped'
_LOOK = 0.5  # Seconds between two looks at the runs.


class Stop(Protocol):
  """A `StopRequest`."""

  received: str | None


class Process(Protocol):
  """A `RunProcess`."""

  def ended(self) -> int | None: ...
  def stop(self) -> None: ...
  def reason(self) -> str: ...


@dataclasses.dataclass
class _Running:
  process: Process
  cores: tuple[int, ...]
  checkpoint: int  # Step at its start, -1 if there was none.


class Queue:
  """Trains the runs of a queue file in its folder, which the caller has locked.

  Args:
    queue: what it works through; it is read again after it was edited.
    workdir: absolute; an existing folder.
    flags: for every run, such as `--data_dir=...`.
    cores: of each of the runs that train at once (see `process.share_cores`).
    report: called when a run has ended.
    start, free, pause: how a process is started, the free bytes of a disk, and how to wait for some seconds.
    package: code that runs begin with.

  Attributes:
    queue: as last read.
  """

  def __init__(
    self,
    queue: QueueFile,
    workdir: Path,
    *,
    flags: Sequence[str] = (),
    cores: Sequence[tuple[int, ...]] = ((),),
    report: Callable[[QueueFile], Any] = lambda queue: None,
    start: Callable[..., Process] = RunProcess,
    free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    pause: Callable[[float], Any] = time.sleep,
    package: Path = PACKAGE,
  ):
    self.queue, self._workdir, self._flags = queue, workdir, list(flags)
    self._free_cores = list(cores)
    self._report, self._start, self._free, self._pause = report, start, free, pause
    self._package = package
    self._records = read_records(workdir)
    self._running: dict[str, _Running] = {}
    self._left: dict[str, str] = {}  # Runs that are not tried again, and why.
    self._refused: set[str] = set()  # Those of them that were not started, which an edit of the file may change.
    self._killed: dict[str, int] = {}  # Checkpoints at which processes were killed.
    self._modified = queue.modified

  def work(self, stop: Stop) -> dict[str, str]:
    """Trains until no run is left, or until a signal stops it.

    Returns:
      The runs that failed or were stopped by others, and why.

    Raises:
      UserError: there is no room on the disk. Runs that train are stopped first, and save.
    """
    try:
      while not stop.received:
        self._look()
        if self._running:
          self._check_room()
        self._read_again()
        waiting = self._start_next()
        if not self._running and not waiting:
          break
        self._pause(_LOOK)
    finally:
      self._stop_all()
    return {name: why for name, why in self._left.items() if why == _STOPPED or self._records[name].failed}

  def _start_next(self) -> bool:
    """Starts what there are cores for; returns whether a run waits for another program."""
    waiting, readers = False, []
    for run in self.queue.runs:
      if not self._free_cores:
        break
      if run.name in self._running or run.name in self._left:
        continue
      try:
        state = run_state(self._workdir, run.name)
        check_same(run, state, self._records.get(run.name))
      except UserError as error:
        self._refused.add(run.name)
        self._fail(run.name, str(error))
        continue
      if state.finished:
        self._finish(run, state)
      elif state.holder:
        waiting = True  # Such as a run of a queue that was killed, which saves at this moment.
      elif self._reads_unfinished(run):
        readers.append((run, state))
      else:
        self._begin(run, state)
    if readers and not self._running and not waiting:  # They wait for each other: the first says what is wrong.
      self._begin(*readers[0])
    return waiting

  def _finish(self, run: QueuedRun, state: RunState) -> None:
    record = self._records.setdefault(run.name, RunRecord(list(run.arguments), '', None))
    if not record.finished or record.failed:
      record.finished, record.failed = record.finished or (state.summary or {}).get('finished') or today(), ''
      self._save()
    self._left[run.name] = 'finished'

  def _reads_unfinished(self, run: QueuedRun) -> bool:
    """Whether a run reads another one of this queue, such as its teacher, that may still finish."""
    read = [os.path.realpath(place) for place in (run.config.loss.teacher_run, run.config.init_from) if place]
    if not read:
      return False
    # Its averaged weights are a folder below its own.
    above = {folder for place in read for folder in (place, *map(str, Path(place).parents))}
    others = [other.name for other in self.queue.runs if os.path.realpath(self._workdir / RUNS / other.name) in above]
    return any(name in self._refused or name not in self._left for name in others)

  def _check_room(self) -> None:
    room = self._free(self._workdir)
    if room < ROOM:
      raise UserError(
        f'{self._workdir} has {room / 1e6:,.0f} MB of free disk, and a run needs {ROOM / 1e6:,.0f} MB; make room, and '
        'the same command goes on'
      )

  def _begin(self, run: QueuedRun, state: RunState) -> None:
    self._check_room()
    cores = self._free_cores[-1]
    folder, log = self._workdir / RUNS / run.name, self._workdir / LOGS / f'{run.name}.log'
    arguments = [f'--workdir={folder}', *self._flags]
    if not state.begun:  # Afterwards, its own configuration counts, whatever its file says by now.
      arguments = [*run.arguments, *arguments]
    prepare_folder(log.parent)
    try:
      with report_no_room(self._workdir):
        code = self._prepare(run, state, cores)
        process = self._started(arguments, code, log, cores)
    except UserError as error:
      if self._free(self._workdir) < ROOM:
        raise
      self._fail(run.name, str(error))
      return
    self._free_cores.pop()
    self._running[run.name] = _Running(process, cores, state.checkpoint)
    verb = f'goes on after step {state.checkpoint:,}' if state.checkpoint >= 0 else 'begins'
    say(f'{run.name} {verb}: {log}')

  def _started(self, arguments: list[str], code: Path, log: Path, cores: tuple[int, ...]) -> Process:
    try:
      return self._start(arguments, code, log, cores)
    except OSError as error:
      if error.errno in NO_ROOM:
        raise
      # Such as a limit of processes, or something else in the place of its log.
      raise UserError(f'it cannot be started ({error})') from error

  def _prepare(self, run: QueuedRun, state: RunState, cores: tuple[int, ...]) -> Path:
    """Records a start; returns the folder of the run's code."""
    record = self._records.get(run.name)
    if not record or not record.code or not state.begun:
      if state.begun:
        say(f'{run.name} was begun by another command: it goes on with the present code')
      found = keep_code(self._workdir, self._package)
      record = RunRecord(list(run.arguments), found, commit(self._package))
    code = kept_code(self._workdir, record.code, run.name, self._package)
    now = environment(cores)
    if record.starts and (different := changed(record.starts[-1], now)):
      say(f'{run.name} goes on although this changed, so that last bits may: {"; ".join(different)}')
    record.starts.append({'date': today(), **now})
    record.failed = ''
    self._records[run.name] = record
    self._save()
    return code

  def _look(self) -> None:
    """Looks which processes have ended."""
    for name, running in list(self._running.items()):
      code = running.process.ended()
      if code is None:
        continue
      del self._running[name]
      self._free_cores.append(running.cores)
      self._ended(name, running, code)
      self._report(self.queue)

  def _ended(self, name: str, running: _Running, code: int) -> None:
    try:
      state = run_state(self._workdir, name)
    except UserError as error:
      self._fail(name, str(error))
      return
    if state.finished:
      self._records[name].finished = today()
      self._save()
      self._left[name] = 'finished'
      say(f'{name} finished: {state.accuracies()}')
    elif code == 0:  # By a signal that was not ours.
      self._left[name] = _STOPPED
      say(f'{name} was stopped after step {state.saved_step:,}; the next start of the queue resumes it')
    elif code < 0 and self._killed.get(name) != state.checkpoint:
      self._killed[name] = state.checkpoint
      say(f'{name} was killed by signal {-code} after step {state.saved_step:,}; it is started again')
    else:
      why = f'killed by signal {-code} twice after the same step' if code < 0 else running.process.reason()
      self._fail(name, why)

  def _fail(self, name: str, why: str) -> None:
    say(self._failed(name, why))

  def _failed(self, name: str, why: str) -> str:
    self._left[name] = why
    record = self._records.setdefault(name, RunRecord([], '', None))
    record.failed = why
    self._save()
    return f'{name} failed: {why}'

  def _stop_all(self) -> None:
    """Stops every run, which saves first. Nothing is said before all have ended: what prints may have been closed."""
    for running in self._running.values():
      if running.process.ended() is None:
        running.process.stop()
    while any(running.process.ended() is None for running in self._running.values()):
      self._pause(_LOOK)
    names = list(self._running)
    self._running.clear()
    for line in [self._stopped(name) for name in names]:
      say(line)

  def _stopped(self, name: str) -> str:
    """Records what became of a run that was stopped; returns it in a line."""
    try:
      state = run_state(self._workdir, name)
    except UserError as error:
      return self._failed(name, str(error))
    if not state.finished:
      saved = f'after step {state.checkpoint:,}, saved' if state.checkpoint >= 0 else 'unsaved'
      return f'{name} stopped {saved}'
    self._records[name].finished = today()  # The signal came too late to stop it.
    self._save()
    return f'{name} finished'

  def _read_again(self) -> None:
    """Reads the file if it was edited; one that is wrong changes nothing."""
    modified = when_modified(self.queue.path)
    if modified == self._modified:
      return
    self._modified, before = modified, {run.name: run.arguments for run in self.queue.runs}
    try:
      self.queue = read_queue(self.queue.path, self._workdir)
    except UserError as error:
      say(f'the queue goes on as it was: {error}', to_stderr=True)
      return
    say(f'{self.queue.path} was edited: {len(self.queue.runs)} runs')
    edited = {run.name for run in self.queue.runs if run.arguments != before.get(run.name)}
    for name in self._refused | {name for name in edited & self._left.keys() if self._left[name] != 'finished'}:
      del self._left[name]  # The edit may have undone what was wrong.
    self._refused.clear()

  def _save(self) -> None:
    with report_no_room(self._workdir):
      write_records(self._workdir, self._records)


def check_same(run: QueuedRun, state: RunState, record: RunRecord | None) -> None:
  """Checks that a run that has begun is the one that the queue file describes.

  Raises:
    UserError: it is another one.
  """
  if not (state.begun or state.finished):
    return
  if record and record.code:
    before, now = set(record.arguments), set(run.arguments)
    if before != now and state.begun:
      saved, here = real_paths(restore_config(state.folder)), real_paths(run.config)
      same = tuple(f'--config.{field}=' for field, path in here.items() if path == saved[field])
      before, now = ({argument for argument in own if not argument.startswith(same)} for own in (before, now))
    if before != now:
      raise UserError(
        f'it began with {" ".join(sorted(before - now)) or "fewer fields"}, and the file has '
        f'{" ".join(sorted(now - before)) or "fewer"}; give it another name, or undo the change'
      )
  elif different := (
    changes(state.folder, run.config, moved=True) if state.begun else kept_changes(state.folder, run.config)
  ):
    raise UserError(
      f'{state.folder} holds a run with a different configuration: {"; ".join(different)} (saved -> now); give it '
      'another name'
    )
