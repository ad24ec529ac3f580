"""Tests that a run stopped at any step ends like one that was not stopped."""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from forking import Forked
from killing import train
from running import TINY, before_each_step, run_main, saved_state, send, summary_of

from paranet_jax import devices as devices_lib
from paranet_jax.display.metrics import read_metrics
from paranet_jax.evaluation import Evaluator
from paranet_jax.runs.checkpoints import Checkpoints

RUN = (*TINY, '--config.name=PN1-d')

pytestmark = pytest.mark.usefixtures('programs')

NUM_STEPS = 10


class Killed(BaseException):
  """Stands for the end of the process."""


@pytest.fixture(scope='module')
def whole(programs, tmp_path_factory):
  """The folder of a run that was not stopped."""
  workdir = tmp_path_factory.mktemp('whole')
  assert run_main(*RUN, f'--workdir={workdir}').code == 0
  return workdir


def assert_ends_as(workdir, whole):
  """Trains to the end, which must be that of the whole run."""
  assert run_main(*RUN, f'--workdir={workdir}').code == 0
  assert_alike(workdir, whole)


def assert_alike(workdir, whole):
  """Compares every leaf of the state, every measurement and the summary."""
  chex.assert_trees_all_equal(saved_state(workdir), saved_state(whole), strict=True)
  lines, expected = read_metrics(workdir), read_metrics(whole)
  assert [(line['step'], line['split']) for line in lines] == [(line['step'], line['split']) for line in expected]
  assert [line for line in lines if line['split'] != 'train'] == [line for line in expected if line['split'] != 'train']
  assert summary_of(workdir) == summary_of(whole)


def kill(at_step):
  """An act for `before_each_step`: the end of the process before this step, counted from 1, is done."""

  def act(step, state):
    if step + 1 == at_step:
      raise Killed

  return act


def assert_stopped(result, workdir, name, step):
  assert (result.code, result.err) == (0, '')
  assert result.out.splitlines()[-1] == f'stopped by {name} after step {step}, saved; the same command resumes'
  assert saved_state(workdir).step == step
  assert not (workdir / 'summary.json').exists()


@contextlib.contextmanager
def before_the_first_step():
  """A signal when the step is about to be compiled."""
  run_on = devices_lib.run_on
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(devices_lib, 'run_on', lambda *rest: os.kill(os.getpid(), signal.SIGTERM) or run_on(*rest))
    yield


@contextlib.contextmanager
def in_an_evaluation(act):
  """Calls act() as an evaluation begins."""
  evaluate = Evaluator.evaluate
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Evaluator, 'evaluate', lambda *rest: act() or evaluate(*rest))
    yield


@contextlib.contextmanager
def during_step(act):
  """See `before_each_step`."""
  with pytest.MonkeyPatch.context() as patch:
    before_each_step(patch, act)
    yield


def two_signals(step, _):
  """The second one during step 6."""
  if step == 5:
    os.kill(os.getpid(), signal.SIGTERM)
    # Signals sent in one moment may be handled in any order, so the second waits for the first.
    deadline = time.monotonic() + 60
    while signal.getsignal(signal.SIGINT) is not signal.default_int_handler and time.monotonic() < deadline:
      time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)  # Cut short by the signal.


def test_stopped_again_and_again(tmp_path, whole):
  """Step 4 has a checkpoint of its own, and step 5 ends an epoch and is evaluated."""
  terminate = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
  before = None
  for stopped, name, step in (
    (before_the_first_step(), 'SIGTERM', 0),
    (during_step(send(signal.SIGINT, 1)), 'SIGINT', 1),
    (during_step(send(signal.SIGTERM, 2)), 'SIGTERM', 2),
    (during_step(send(signal.SIGINT, 4)), 'SIGINT', 4),
    (in_an_evaluation(terminate), 'SIGTERM', 5),
  ):
    with stopped:
      result = run_main(*RUN, f'--workdir={tmp_path}')
    assert_stopped(result, tmp_path, name, step)
    if before is not None:
      assert f'resuming from the checkpoint at step {before} of {NUM_STEPS}' in result.out.splitlines()
    before = step

  # Another test, or a library that one has imported, may have left a handler of its own.
  left = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with during_step(two_signals):
      result = run_main(*RUN, f'--workdir={tmp_path}')
  finally:
    signal.signal(signal.SIGINT, left)
  assert (result.code, result.err) == (130, 'stopped at once\n')

  with during_step(send(signal.SIGTERM, NUM_STEPS)):  # Nothing is left to stop.
    result = run_main(*RUN, f'--workdir={tmp_path}')
  assert result.code == 0 and result.out.splitlines()[-1] == f'summary: {tmp_path}/summary.json'
  assert_alike(tmp_path, whole)


def killed():
  raise Killed


@contextlib.contextmanager
def before_the_last_save():
  """The end of the process between the last evaluation and its checkpoint."""
  save = Checkpoints.save
  with pytest.MonkeyPatch.context() as patch:
    act = {NUM_STEPS: killed}
    patch.setattr(Checkpoints, 'save', lambda self, step, *rest: act.get(step, lambda: save(self, step, *rest))())
    yield


def test_killed_again_and_again(tmp_path, whole):
  """Checkpoints are of steps 4, 8 and 10."""
  for death, saved in (
    (during_step(kill(3)), None),
    (in_an_evaluation(killed), 4),
    (during_step(kill(7)), 4),
    (during_step(kill(10)), 8),
    (before_the_last_save(), 8),
  ):
    with death, pytest.raises(Killed):
      run_main(*RUN, f'--workdir={tmp_path}')
    with Checkpoints(tmp_path) as checkpoints:
      assert checkpoints.latest_step() == saved
  assert [line['split'] for line in read_metrics(tmp_path) if line['step'] == 10] == ['train', 'held_out', 'test']
  assert_ends_as(tmp_path, whole)


@pytest.mark.parametrize('step', [5, NUM_STEPS])
def test_killed_in_an_evaluation_that_goes_on_after_a_signal(tmp_path, whole, step):
  """What sends a signal, such as a scheduler, kills a while later."""
  evaluate = Evaluator.evaluate

  def killed_later(*rest):
    os.kill(os.getpid(), signal.SIGTERM)
    evaluate(*rest)
    raise Killed

  if step > 5:
    stop_at(6, tmp_path)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Evaluator, 'evaluate', killed_later)
    with pytest.raises(Killed):
      run_main(*RUN, f'--workdir={tmp_path}')
  assert saved_state(tmp_path).step == step
  assert_ends_as(tmp_path, whole)


def stop_at(step, workdir, *arguments):
  with pytest.MonkeyPatch.context() as patch:
    before_each_step(patch, send(signal.SIGTERM, step))
    assert_stopped(run_main(*RUN, *arguments, f'--workdir={workdir}'), workdir, 'SIGTERM', step)


def evaluations(workdir):
  return {(line['step'], line['split']): line for line in read_metrics(workdir) if line['split'] != 'train'}


def test_another_cadence_of_evaluation_and_logging(tmp_path, whole):
  stop_at(3, tmp_path, '--config.eval.every_epochs=0.2', '--config.log.every_steps=1')
  other = '--config.eval.every_epochs=0.8', '--config.log.every_steps=3', '--config.checkpoint.every_steps=7'
  assert run_main(*RUN, *other, f'--workdir={tmp_path}', '--accept_config_changes').code == 0
  chex.assert_trees_all_equal(saved_state(tmp_path), saved_state(whole), strict=True)
  found, expected = evaluations(tmp_path), evaluations(whole)
  assert sorted({step for step, _ in found}) == [1, 2, 3, 4, 8, 10]
  assert all(found[10, split] == expected[10, split] for split in ('held_out', 'test'))


@pytest.mark.parametrize(('before', 'after'), [(1, 2), (2, 1)])
def test_another_number_of_devices(tmp_path, before, after):
  orders, batches, states, losses = [], [], [], []
  place_order = devices_lib.place_order
  arguments = *TINY, '--config.name=PN1-d'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(devices_lib, 'place_order', lambda *rest: orders.append(place_order(*rest)) or orders[-1])
    for count in (before, after):
      own = *arguments, f'--workdir={tmp_path / str(count)}'
      assert run_main(*own, '--config.train.max_steps=2', f'--config.train.devices={before}').code == 0
      changed = '--config.train.max_steps=5', f'--config.train.devices={count}', '--accept_config_changes'
      assert run_main(*own, *changed).code == 0
      assert summary_of(tmp_path / str(count))['device']['count'] == count
      losses.append([line['exit_1/loss'] for line in read_metrics(tmp_path / str(count))])
      order = np.asarray(orders[-1])
      # [devices, steps, B / devices] to [steps, B]: the images of each step, on whatever device.
      batches.append(order if count == 1 else order.swapaxes(0, 1).reshape(order.shape[1], -1))
      states.append(saved_state(tmp_path / str(count)))
  np.testing.assert_array_equal(*batches)
  np.testing.assert_allclose(*losses, rtol=1e-4)
  for found, expected in zip(*map(jax.tree.leaves, reversed(states)), strict=True):
    # Relative to the largest of an array: sums in another order move the small ones by as much as the large ones.
    assert np.max(np.abs(found - expected), initial=0) <= 1e-5 * np.max(np.abs(expected), initial=0)


def test_moved_and_with_another_clock_and_time_zone(tmp_path, whole, monkeypatch):
  stop_at(7, tmp_path / 'here')
  workdir = tmp_path / 'elsewhere' / 'renamed'
  shutil.move(tmp_path / 'here', workdir)
  events = [path.name for path in (workdir / 'tensorboard').iterdir()]
  last_year = time.time() - 365 * 24 * 3600
  monkeypatch.setattr(time, 'time', lambda: last_year)
  monkeypatch.setattr(time, 'time_ns', lambda: int(last_year * 1e9))
  for name in ('config.json', 'metrics.jsonl', 'checkpoints/7', 'checkpoints/4'):
    os.utime(workdir / name, (2e9, 2e9))
  with monkeypatch.context() as patch:
    patch.setenv('TZ', 'Pacific/Kiritimati')
    time.tzset()
    assert_ends_as(workdir, whole)
  time.tzset()
  assert not (tmp_path / 'here').exists()
  # TensorBoard reads the files in the order of their names.
  assert [path.name for path in sorted((workdir / 'tensorboard').iterdir())][:-1] == events


def test_a_checkpoint_of_format_0(tmp_path):
  # What was written before checkpoints had checksums.
  shutil.unpack_archive(Path(__file__).parent / 'fixtures/run_of_format_0.tar.gz', tmp_path)
  expected = {line['split']: line for line in read_metrics(tmp_path)}
  found = json.loads(run_main(f'--workdir={tmp_path}', '--mode=eval', '--json').out)
  assert found['step'] == 3
  for split in ('held_out', 'test'):
    assert found['splits'][split][0]['nll'] == pytest.approx(expected[split]['exit_1/nll'], rel=1e-5)
  longer = '--config.train.epochs=1', '--config.train.max_steps=0', '--accept_config_changes'
  result = run_main(f'--workdir={tmp_path}', *longer)
  assert result.code == 0 and 'resuming from the checkpoint at step 3 of 5' in result.out.splitlines()
  assert saved_state(tmp_path).step == 5


def test_a_signal_to_its_own_process(tmp_path):
  longer = (*RUN, f'--workdir={tmp_path}', '--config.log.every_steps=1', '--config.train.epochs=10000')
  process = Forked(train, longer)
  next(line for line in process.out if line.startswith('epoch'))
  process.terminate()
  code, out, err = process.ended()
  assert (code, err) == (0, '')
  step = int(re.fullmatch(r'stopped by SIGTERM after step (\d+), saved; .*', out.splitlines()[-1])[1])
  result = run_main(*longer, f'--config.train.max_steps={step + 2}', '--accept_config_changes')
  assert result.code == 0 and json.loads((tmp_path / 'summary.json').read_text())['steps'] == step + 2
