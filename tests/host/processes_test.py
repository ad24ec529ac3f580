"""Several processes train as one: real processes on this machine, each with its own CPU devices."""

import signal

import chex
import pytest
from groups import LONGER, RUN, assert_alike, ended, is_gone, measured, read_until, start, train_alone, train_and_stop
from running import saved_state, summary_of


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """The folder of the run in one process, on one device."""
  workdir = tmp_path_factory.mktemp('alone')
  train_alone(workdir)
  return workdir


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
  """Folder of the runs of two processes with two devices each; a signal to one of them has stopped the last run."""
  folder = tmp_path_factory.mktemp('group')
  train_and_stop(folder)
  return folder


def test_two_processes_of_two_devices_equal_one(stopped, alone):
  """Images that are streamed are tested in tests/slow, and the shares of the processes in data/stream_test.py."""
  assert_alike(stopped / 'memory', alone, 2, 2)


def test_stopped_and_resumed_and_ended_when_one_dies(stopped):
  step = int(saved_state(stopped / 'stopped').step)
  processes = start(2, 2, [*LONGER, f'--workdir={stopped}/stopped'], [*RUN, f'--workdir={stopped}/killed'])
  out = read_until(processes[0], f'workdir: {stopped}/killed', 'epoch')
  assert f'resuming from the checkpoint at step {step} of 40\n' in out
  processes[0].kill()
  codes, _, errs = ended(processes)
  assert codes == (-signal.SIGKILL, 1), errs
  assert errs[1].splitlines()[-1] == is_gone(processes[0], 0, 2)
  chex.assert_trees_all_equal(saved_state(stopped / 'stopped'), saved_state(stopped / 'whole'), strict=True)
  assert measured(stopped / 'stopped') == measured(stopped / 'whole')
  assert summary_of(stopped / 'stopped') == summary_of(stopped / 'whole')
