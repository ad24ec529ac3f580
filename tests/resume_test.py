"""Tests that a run which was stopped, at whatever step, ends where the one that was not stopped does."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import chex
import pytest
from running import CONFIGS, PROGRAMS, TINY, before_each_step, run_main, saved_state

from paranet_jax import devices as devices_lib
from paranet_jax.checkpoints import Checkpoints
from paranet_jax.metrics import read_metrics

NUM_STEPS = 10


class Killed(BaseException):
  """The end of the process, as far as one can have it in a test."""


@pytest.fixture(scope='module', autouse=True)
def _programs():
  with pytest.MonkeyPatch.context() as patch:
    PROGRAMS.install(patch)
    yield


@pytest.fixture(scope='module')
def whole(_programs, tmp_path_factory):
  """The folder of a run that was not stopped."""
  workdir = tmp_path_factory.mktemp('whole')
  assert run_main(*TINY, f'--workdir={workdir}').code == 0
  return workdir


def assert_ends_as(workdir, whole):
  """Trains to the end, and compares every leaf of the state, every measurement and the summary."""
  assert run_main(*TINY, f'--workdir={workdir}').code == 0
  chex.assert_trees_all_equal(saved_state(workdir), saved_state(whole), strict=True)
  lines, expected = read_metrics(workdir), read_metrics(whole)
  assert [(line['step'], line['split']) for line in lines] == [(line['step'], line['split']) for line in expected]
  assert [line for line in lines if line['split'] != 'train'] == [line for line in expected if line['split'] != 'train']
  summary, expected = (json.loads((folder / 'summary.json').read_text()) for folder in (workdir, whole))
  assert summary | {'wall_time_s': None} == expected | {'wall_time_s': None}


def send(number, at_step):
  """An act for `before_each_step`: a signal while this step, counted from 1, is under way."""
  return lambda step, state: os.kill(os.getpid(), number) if step + 1 == at_step else None


def kill(at_step):
  """An act for `before_each_step`: the end of the process before this step, counted from 1, is done."""

  def act(step, state):
    if step + 1 == at_step:
      raise Killed

  return act


def assert_stopped(result, workdir, name, step):
  assert (result.code, result.err) == (0, '')
  assert result.out.splitlines()[-1] == f'stopped by {name} after step {step}, saved; the same command goes on'
  assert saved_state(workdir).step == step
  assert not (workdir / 'summary.json').exists()


# Before the first log line, at a checkpoint, at the end of an epoch (and evaluation), within the next one.
@pytest.mark.parametrize('step', [1, 4, 5, 7])
def test_stopped_once(tmp_path, whole, step):
  with pytest.MonkeyPatch.context() as patch:
    before_each_step(patch, send(signal.SIGTERM, step))
    result = run_main(*TINY, f'--workdir={tmp_path}')
  assert_stopped(result, tmp_path, 'SIGTERM', step)
  assert_ends_as(tmp_path, whole)


def test_stopped_after_every_step(tmp_path, whole):
  for step in range(1, NUM_STEPS):
    with pytest.MonkeyPatch.context() as patch:
      before_each_step(patch, send(signal.SIGINT, step))
      result = run_main(*TINY, f'--workdir={tmp_path}')
    assert_stopped(result, tmp_path, 'SIGINT', step)
    if step > 1:
      assert f'going on from the checkpoint of step {step - 1} of {NUM_STEPS}' in result.out.splitlines()
  assert_ends_as(tmp_path, whole)


def test_stopped_before_the_first_step(tmp_path, whole):
  with pytest.MonkeyPatch.context() as patch:
    run_on = devices_lib.run_on
    patch.setattr(devices_lib, 'run_on', lambda *rest: os.kill(os.getpid(), signal.SIGTERM) or run_on(*rest))
    result = run_main(*TINY, f'--workdir={tmp_path}')
  assert_stopped(result, tmp_path, 'SIGTERM', 0)
  assert_ends_as(tmp_path, whole)


def test_a_signal_during_the_last_step_stops_nothing(tmp_path, whole):
  with pytest.MonkeyPatch.context() as patch:
    before_each_step(patch, send(signal.SIGTERM, NUM_STEPS))
    result = run_main(*TINY, f'--workdir={tmp_path}')
  assert result.code == 0 and result.out.splitlines()[-1] == f'summary: {tmp_path}/summary.json'
  assert_ends_as(tmp_path, whole)


# Checkpoints are of steps 4, 8 and 10.
@pytest.mark.parametrize(('step', 'saved'), [(3, None), (7, 4), (10, 8)])
def test_killed(tmp_path, whole, step, saved):
  with pytest.MonkeyPatch.context() as patch:
    before_each_step(patch, kill(step))
    with pytest.raises(Killed):
      run_main(*TINY, f'--workdir={tmp_path}')
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == saved
  assert_ends_as(tmp_path, whole)


def test_killed_between_the_last_evaluation_and_its_checkpoint(tmp_path, whole):
  save = Checkpoints.save

  def killed_save(self, step, *rest):
    if step == NUM_STEPS:
      raise Killed
    save(self, step, *rest)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Checkpoints, 'save', killed_save)
    with pytest.raises(Killed):
      run_main(*TINY, f'--workdir={tmp_path}')
  assert [line['split'] for line in read_metrics(tmp_path) if line['step'] == 10] == ['train', 'held_out', 'test']
  assert_ends_as(tmp_path, whole)


def test_the_second_signal_ends_at_once(tmp_path, whole):
  def act(step, state):
    if step == 5:
      os.kill(os.getpid(), signal.SIGTERM)
      # Signals sent in one moment may be handled in any order, so the second waits for the first.
      deadline = time.monotonic() + 60
      while signal.getsignal(signal.SIGINT) is not signal.default_int_handler and time.monotonic() < deadline:
        time.sleep(0.001)
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(10)  # Cut short by the signal.

  # Another test, or a library that one has imported, may have left a handler of its own.
  left = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with pytest.MonkeyPatch.context() as patch:
      before_each_step(patch, act)
      result = run_main(*TINY, f'--workdir={tmp_path}')
  finally:
    signal.signal(signal.SIGINT, left)
  assert (result.code, result.err) == (130, 'stopped at once\n')
  assert_ends_as(tmp_path, whole)


def test_signals_to_a_process_of_its_own(tmp_path):
  arguments = [*TINY, f'--workdir={tmp_path}', '--config.name=PN1-d', '--config.log.every_steps=1']
  step = 0
  for number in (signal.SIGTERM, signal.SIGINT):
    with subprocess.Popen(
      [sys.executable, '-m', 'paranet_jax.main', *arguments, '--config.train.epochs=10000'],
      cwd=CONFIGS.parent,
      env=os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    ) as process:
      next(line for line in process.stdout if line.startswith('epoch'))
      process.send_signal(number)
      out, err = process.communicate()
    assert (process.returncode, err) == (0, '')
    last = re.fullmatch(rf'stopped by {number.name} after step (\d+), saved; .*', out.splitlines()[-1])
    assert last and int(last[1]) > step
    step = int(last[1])
  end = f'--config.train.max_steps={step + 2}'
  result = run_main(*arguments, '--config.train.epochs=10000', end, '--accept_config_changes')
  assert result.code == 0 and json.loads((tmp_path / 'summary.json').read_text())['steps'] == step + 2
