"""As ../host/processes_test.py: groups of three, deaths of either end, and a resume by the launcher."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import chex
import pytest
from groups import (
  LONGER,
  RUN,
  THREE,
  assert_alike,
  ended,
  is_gone,
  measured,
  read_until,
  start,
  train_alone,
  train_and_stop,
)
from running import saved_state, summary_of

REPO = Path(__file__).resolve().parents[2]
STREAMED = ('--config.data.streaming=True', '--config.data.workers=0')


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
  train_and_stop(folder, [*THREE, *STREAMED, f'--workdir={folder}/streamed'])
  return folder


@pytest.mark.parametrize('kind', ['memory', 'streamed'])
def test_two_processes_of_two_devices_equal_one(stopped, alone, kind):
  assert_alike(stopped / kind, alone, 2, 2)


def test_stopped_and_resumed(stopped):
  step = int(saved_state(stopped / 'stopped').step)
  command = [REPO / 'launch' / 'local.sh', *LONGER, f'--workdir={stopped}/stopped']
  env = {'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'DEVICES': '2', 'PYTHON': sys.executable}
  done = subprocess.run(command, cwd=REPO, env=os.environ | env, capture_output=True, text=True, timeout=240)
  assert (done.returncode, done.stderr) == (0, '')
  assert f'resuming from the checkpoint at step {step} of 40\n' in done.stdout
  chex.assert_trees_all_equal(saved_state(stopped / 'stopped'), saved_state(stopped / 'whole'), strict=True)
  assert measured(stopped / 'stopped') == measured(stopped / 'whole')
  assert summary_of(stopped / 'stopped') == summary_of(stopped / 'whole')


def test_three_processes_equal_one_and_end_when_one_dies(tmp_path, alone):
  processes = start(
    *(3, 1),
    [*THREE, *STREAMED, f'--workdir={tmp_path}/whole', '--heartbeat_timeout=10'],
    [*RUN, *STREAMED, f'--workdir={tmp_path}/killed'],
  )
  read_until(processes[0], f'workdir: {tmp_path}/killed', 'epoch')
  processes[2].kill()
  codes, _, errs = ended(processes)
  assert codes == (1, 1, -signal.SIGKILL), errs
  for err in errs[:2]:
    assert err.splitlines() == [is_gone(processes[2], 2, 3)]
  assert_alike(tmp_path / 'whole', alone, 3, 1)


def test_the_others_end_without_process_0(tmp_path):
  processes = start(2, 1, [*RUN, f'--workdir={tmp_path}'])
  read_until(processes[0], 'epoch')
  processes[0].kill()
  codes, _, errs = ended(processes)
  assert codes == (-signal.SIGKILL, 1), errs
  assert errs[1].splitlines()[-1] == is_gone(processes[0], 0, 2)  # Above it is jax's own.
