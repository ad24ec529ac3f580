"""A real queue that is killed, stopped and updated ends with the parameters of runs that nothing happened to."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import pytest
from killing import REPO
from running import saved_state

from paranet_jax.experiments.queue.state import run_state
from paranet_jax.host.lock import lock_holder

QUEUE = """
[set]
'data.name' = 'digits'
'model.layers_per_block' = 1
'model.growth_rate' = 2
'model.image_side' = 8
'train.batch_size' = 100
'train.epochs' = 400
'train.devices' = 1
'checkpoint.every_steps' = 20
'eval.every_epochs' = 100
[[runs]]
config = 'paranet_jax:paranet:PN1-d'
seeds = [0, 1]
"""

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='processes are tied to their parent on Linux')


class Program:
  """The queue's program, of a copy of the package that a test may change."""

  def __init__(self, folder: Path):
    self.folder = folder
    self.workdir = folder / 'work'
    shutil.copytree(REPO / 'paranet_jax', folder / 'paranet_jax', ignore=shutil.ignore_patterns('__pycache__'))
    (folder / 'queue.toml').write_text(QUEUE)

  def start(self, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, '-m', 'paranet_jax.experiments', 'run', 'queue.toml', '--workdir=work', *arguments]
    environment = os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
    return subprocess.Popen(
      command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

  def wait_for(self, what, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not what():
      assert process.poll() is None and time.monotonic() < end, process.communicate()
      time.sleep(0.02)

  def saved(self, step: int) -> bool:
    """Whether the first run has a checkpoint of this step or a later one."""
    return run_state(self.workdir, 'PN1-d-s0').checkpoint >= step

  def holder(self, name: str) -> int:
    """Process of the run."""
    found = re.match(r'process (\d+) ', (self.workdir / 'runs' / name / 'lock').read_text())
    return int(found[1]) if found else 0


def test_kills_stops_and_an_update(tmp_path):
  for name in ('whole', 'disturbed'):
    (tmp_path / name).mkdir()
  whole = Program(tmp_path / 'whole').start()
  disturbed = Program(tmp_path / 'disturbed')

  # The queue is killed: its run saves and stops.
  first = disturbed.start()
  disturbed.wait_for(lambda: disturbed.saved(20), first)
  first.kill()
  first.communicate()
  end = time.monotonic() + 60
  while lock_holder(disturbed.workdir / 'runs' / 'PN1-d-s0'):
    assert time.monotonic() < end
    time.sleep(0.02)
  assert not (disturbed.workdir / 'runs' / 'PN1-d-s0' / 'summary.json').exists()

  # The code is updated, and broken.
  (disturbed.folder / 'paranet_jax' / 'steps.py').write_text('raise ImportError("broken")')

  # Then the run is killed, and started again; meanwhile no second queue works there.
  second = disturbed.start()
  disturbed.wait_for(lambda: disturbed.saved(100), second)
  killed = disturbed.holder('PN1-d-s0')
  os.kill(killed, signal.SIGKILL)
  disturbed.wait_for(lambda: disturbed.holder('PN1-d-s0') != killed, second)
  other = disturbed.start()
  assert other.communicate()[1].startswith(f'error: workdir {disturbed.workdir} is in use by process {second.pid} on ')
  assert other.returncode == 2
  second.send_signal(signal.SIGTERM)
  out, err = second.communicate()
  assert (second.returncode, err) == (130, ''), (out, err)
  assert 'PN1-d-s0 was killed by signal 9 after step ' in out and 'PN1-d-s0 stopped after step ' in out
  assert out.endswith('stopped by SIGTERM; the same command goes on\n')

  # What has not begun begins with the new code, which is broken, and is named; then it is repaired.
  third = disturbed.start()
  out, err = third.communicate()
  assert (third.returncode, err) == (1, ''), (out, err)
  assert 'PN1-d-s0 finished' in out and 'PN1-d-s1 failed: ImportError: broken' in out
  shutil.copyfile(REPO / 'paranet_jax' / 'steps.py', disturbed.folder / 'paranet_jax' / 'steps.py')
  out, err = disturbed.start('--at-once=1', f'--cores={len(os.sched_getaffinity(0))}').communicate()
  assert 'PN1-d-s1 finished' in out and not err

  out, err = whole.communicate()
  assert (whole.returncode, err) == (0, ''), (out, err)
  for seed in (0, 1):
    runs = [tmp_path / name / 'work' / 'runs' / f'PN1-d-s{seed}' for name in ('whole', 'disturbed')]
    chex.assert_trees_all_equal(*map(saved_state, runs), strict=True)
  rows = [
    [row['each_seed'] for row in json.loads((tmp_path / name / 'work' / 'results.json').read_text())['rows']]
    for name in ('whole', 'disturbed')
  ]
  assert rows[0] == rows[1] and len(rows[0][0]) == 2
