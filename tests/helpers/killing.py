"""The training command in a process of its own, which tests kill, and what a run must hold in the end all the same."""

import contextlib
import functools
import gc
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import chex
from forking import Forked
from running import QUICKSTART, saved_state, summary_of

from paranet_jax.display.metrics import read_metrics
from paranet_jax.main import main

REPO = Path(__file__).resolve().parents[2]

# 1,137 training images in batches of 100 are 11 steps an epoch; the last checkpoint is of step 66.
RUN = (
  QUICKSTART,
  '--config.name=PN1-d',
  '--config.model.layers_per_block=1',
  '--config.model.growth_rate=2',
  '--config.model.image_side=8',
  '--config.train.epochs=6',
  '--config.train.batch_size=100',
  '--config.train.devices=1',
  '--config.eval.every_epochs=1',
  '--config.checkpoint.every_steps=12',
  '--config.log.every_steps=2',
)


def start(*arguments, workdir):
  """The training program in a process of its own."""
  return subprocess.Popen(
    [sys.executable, '-m', 'paranet_jax.main', *arguments, f'--workdir={workdir}'],
    cwd=REPO,
    env=os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


_EVENTS = ('open', 'os.rename', 'os.mkdir', 'os.remove', 'shutil.rmtree')


def _kill() -> None:
  os.kill(os.getpid(), signal.SIGKILL)


def _fill() -> None:
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class _Plan:
  """Calls `act` before the numberth event that matches takes effect."""

  def __init__(self, act: Callable[[], None], event: str, number: int):
    self._act, self._pattern, self._left = act, re.compile(event), number

  def see(self, event: str) -> None:
    if self._pattern.search(event):
      self._left -= 1
      if self._left == 0:
        self._act()


_plans: list[_Plan] = []


@functools.cache
def _watch() -> None:
  """Starts to look at the audit events of this process; Python has no way to stop that."""

  def hook(name, arguments):
    if _plans and name in _EVENTS:
      event = ' '.join([name, *map(str, arguments)])
      for plan in tuple(_plans):
        plan.see(event)

  sys.addaudithook(hook)


def _plan(fault: str, event: str, number: int) -> None:
  """Plans `kill` or `full` for the numberth Python audit event (an open, a rename, ...) that matches.

  `kill` sends SIGKILL before that call takes effect, and `full` makes the file system one on which no file can grow
  from then on. The event is a regular expression for `name path...`.
  """
  _watch()
  _plans.append(_Plan({'kill': _kill, 'full': _fill}[fault], event, number))


@contextlib.contextmanager
def fault_here(*fault: Any) -> Iterator[None]:
  """Plans a fault (see `_plan`) in this process, which the disk is no longer full for in the end."""
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)
  _plan(*fault)
  try:
    yield
  finally:
    gc.collect()  # What a file still holds is lost with a process.
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    _plans.clear()


@contextlib.contextmanager
def copied_at(workdir: Path, events: dict[str, tuple[str, int]], into: Path) -> Iterator[None]:
  """Copies a workdir to into/name as a kill at the event of this name would leave it; for events, see `_plan`."""

  def copy(name: str) -> None:
    for path in sorted(workdir.rglob('*')):
      target = into / name / path.relative_to(workdir)
      target.parent.mkdir(parents=True, exist_ok=True)
      with contextlib.suppress(FileNotFoundError):  # Another thread may delete what is being copied.
        if path.is_dir():
          target.mkdir(exist_ok=True)
        else:
          target.write_bytes(path.read_bytes())

  _watch()
  _plans.extend(_Plan(functools.partial(copy, name), *event) for name, event in events.items())
  try:
    yield
  finally:
    _plans.clear()


def run(*arguments, workdir, fault=(), env=()):
  """Exit code, output and error of the same program in a forked process, with a fault (see `_plan`) or without."""
  return Forked(train, [*arguments, f'--workdir={workdir}'], fault, dict(env)).ended()


def train(arguments, fault=(), env=()):
  """The same program in this process, which it ends; jax has computed nothing in it and reads `env`."""
  os.environ.update(env)
  if fault:
    _plan(*fault)
  with mock.patch.object(sys, 'argv', ['main', *arguments]):
    sys.exit(main())


def names(workdir):
  """Every file and folder but TensorBoard's, whose files are one a start, and orbax's, named at random."""
  paths = (path.relative_to(workdir) for path in workdir.rglob('*'))
  return {str(path) for path in paths if not path.parts[0] == 'tensorboard' and not path.parts[3:]}


def assert_ends_as(workdir, whole):
  chex.assert_trees_all_equal(saved_state(workdir), saved_state(whole), strict=True)
  found, expected = ([line for line in read_metrics(folder) if line['split'] != 'train'] for folder in (workdir, whole))
  assert found == expected and len(found) == 12
  assert summary_of(workdir) == summary_of(whole)
  assert names(workdir) == names(whole)
