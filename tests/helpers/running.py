"""Runs the program as a user does, but in the test's process and for seconds."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import pytest

from paranet_jax import config as config_lib
from paranet_jax import devices as devices_lib
from paranet_jax import task as task_lib
from paranet_jax import train
from paranet_jax.main import main
from paranet_jax.runs.checkpoints import Checkpoints
from paranet_jax.runs.workdir import restore_config

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
QUICKSTART = f'--config={CONFIGS}/quickstart.py'

# 1,137 training images in batches of 220 are 5 steps an epoch, 10 in all.
TINY = (
  QUICKSTART,
  '--config.name=PN3-x3d',
  '--config.model.layers_per_block=1',
  '--config.model.growth_rate=2',
  '--config.model.image_side=8',
  '--config.train.epochs=2',
  '--config.train.batch_size=220',
  '--config.train.devices=1',
  '--config.eval.every_epochs=1',
  '--config.checkpoint.every_steps=4',
  '--config.log.every_steps=2',
)


class Result(NamedTuple):
  """Exit code, standard output and standard error."""

  code: int
  out: str
  err: str


def run_main(*arguments: Any) -> Result:
  """`python -m paranet_jax.main` with these arguments, in this process."""
  with mock.patch.object(sys, 'argv', ['main', *map(str, arguments)]):
    return run_command(lambda _: main())


def run_command(command: Callable[..., int], *arguments: Any) -> Result:
  """Runs a command with these arguments in this process."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
    share_pictures(patch)
    code = command(list(map(str, arguments)))
  return Result(code, out.getvalue(), err.getvalue())


_DRAW = {'curves.png': train.draw_curves, 'confusion.png': train.draw_confusion}
_PICTURES: dict[str, bytes] = {}


def share_pictures(patch: pytest.MonkeyPatch) -> None:
  """The pictures of the first run serve for all: drawing them takes a second."""
  patch.setattr(train, 'draw_curves', functools.partial(_picture, 'curves.png'))
  patch.setattr(train, 'draw_confusion', _confusion)


def _confusion(workdir: Path, exits: list[dict], summary: dict, labeled: bool = True) -> Path | str:
  if labeled and any(row['confusion'] is not None for row in exits):
    return _picture('confusion.png', workdir, exits, summary)
  return _DRAW['confusion.png'](workdir, exits, summary, labeled)  # It says why there is none.


def _picture(name: str, workdir: Path, *arguments: Any) -> Path:
  path = workdir / name
  if name not in _PICTURES:
    assert _DRAW[name](workdir, *arguments) == path
    _PICTURES[name] = path.read_bytes()
  path.write_bytes(_PICTURES[name])
  return path


def refusal(*arguments: Any, started: bool = False) -> str:
  """The one-line error for these arguments; a run that had `started` has printed its description first."""
  code, out, err = run_main(*arguments)
  assert bool(out) == started, out
  assert code == 2 and err.startswith('error: ') and err.endswith('\n') and err.count('\n') == 1, (code, err)
  return err[len('error: ') : -1]


def contents(folder: Path) -> dict[str, bytes | None]:
  """Every path below a folder, with the bytes of the files."""
  return {str(path.relative_to(folder)): _read(path) for path in folder.rglob('*')}


def _read(path: Path) -> bytes | None:
  return path.read_bytes() if path.is_file() else None


def summary_of(workdir: Path) -> dict[str, Any]:
  """The contents of summary.json without the wall time."""
  return json.loads((workdir / 'summary.json').read_text()) | {'wall_time_s': None}


def saved_state(workdir: Path) -> Any:
  """The state of the latest checkpoint, as NumPy arrays; a checkpoint with the same checksums is read once."""
  with Checkpoints(workdir) as checkpoints:
    step = checkpoints.choose()
    key = _read(workdir / 'checkpoints' / str(step) / 'checksums.json')
    if key is None or key not in _STATES:
      like = task_lib.build_task(restore_config(workdir)).init_state()
      _STATES[key] = jax.tree.map(np.asarray, checkpoints.restore(step, like)[0])
  return _STATES[key]


_STATES: dict[bytes | None, Any] = {}


def before_each_step(monkeypatch: Any, act: Callable[[int, Any], Any]) -> None:
  """Calls act(step, state) before each training step; if it returns a state, training continues from it."""
  run_on = devices_lib.run_on

  def acting_run_on(*arguments):
    train_step = run_on(*arguments)
    return lambda state, *rest: train_step(act(int(state.step), state) or state, *rest)

  monkeypatch.setattr(devices_lib, 'run_on', acting_run_on)


def send(number: int, at_step: int) -> Callable[[int, Any], None]:
  """An act for `before_each_step`: a signal during this step, counted from 1."""
  return lambda step, _: os.kill(os.getpid(), number) if step + 1 == at_step else None


class SharedPrograms:
  """Keeps what is built for a run, so that runs which differ only in their cadence compile programs once.

  Each run has its own state, checkpoints, files and loop.
  """

  def __init__(self):
    self._kept = {}
    self._build = {
      'task': task_lib.build_task,
      'description': train.describe,
      'evaluator': train.Evaluator,
      'step': devices_lib.run_on,
      'state': task_lib.init_state,
    }

  def install(self, patch: Any) -> None:
    """Replaces what builds a run."""
    patch.setattr(task_lib, 'build_task', self._task)
    patch.setattr(train, 'describe', lambda config, *rest: self._keep('description', config, config, *rest))
    patch.setattr(train, 'Evaluator', lambda task, devices: self._keep('evaluator', task.config, task, devices))
    patch.setattr(devices_lib, 'run_on', self._step)
    patch.setattr(task_lib, 'init_state', self._state)
    share_pictures(patch)

  def forget(self) -> None:
    """Lets go of what was built."""
    self._kept.clear()

  def _task(self, config, dataset=None, learned=None):
    task = self._keep('task', config, config, dataset, learned)
    return dataclasses.replace(task, config=config, total_steps=config_lib.total_steps(config, task.steps_per_epoch))

  def _step(self, devices, step, *axes):
    task, phase = step.func.__self__, step.keywords['phase']
    return self._keep('step', task.config, devices, step, *axes, phase=phase.targets)

  def _state(self, *arguments):
    key = 'state', *arguments
    if key not in self._kept:
      state = self._build['state'](*arguments)
      if isinstance(state.step, jax.core.Tracer):  # Only its shapes are wanted.
        return state
      self._kept[key] = jax.tree.map(np.asarray, state)
    return jax.tree.map(np.copy, self._kept[key])

  def _keep(self, kind, config, *arguments, phase=None):
    same = config.copy_and_resolve_references()
    with same.unlocked():
      del same.eval.every_epochs, same.checkpoint, same.log, same.train.max_steps, same.init_from
      if kind != 'description':  # The programs take the seed from the state.
        del same.seed
    key = kind, phase, same.to_json(), *(len(argument) for argument in arguments if isinstance(argument, list))
    if key not in self._kept:
      self._kept[key] = self._build[kind](*arguments)
    return self._kept[key]


PROGRAMS = SharedPrograms()
