"""Faults in the real training process: after each, the same command resumes and ends where it would have ended."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import chex
import pytest
from running import QUICKSTART, saved_state, summary_of

from paranet_jax.report.metrics import read_metrics

HELPERS = Path(__file__).resolve().parent / 'helpers'

# 1,137 training images in batches of 100 are 11 steps an epoch; the last checkpoint is of step 330.
LONG = (
  QUICKSTART,
  '--config.name=PN1-d',
  '--config.model.layers_per_block=1',
  '--config.model.growth_rate=2',
  '--config.model.image_side=8',
  '--config.train.epochs=30',
  '--config.train.batch_size=100',
  '--config.train.devices=1',
  '--config.eval.every_epochs=5',
  '--config.checkpoint.every_steps=60',
  '--config.log.every_steps=10',
)


def start(*arguments, workdir, fault=()):
  """The training program in a process of its own, with a fault (see fault.py) or without."""
  program = [str(HELPERS / 'fault.py'), *fault] if fault else ['-m', 'paranet_jax.main']
  return subprocess.Popen(
    [sys.executable, *program, *arguments, f'--workdir={workdir}'],
    cwd=HELPERS.parents[1],
    env=os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'PYTHONPATH': str(HELPERS.parents[1])},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(*arguments, workdir, fault=()):
  """Exit code and standard error of that process."""
  with start(*arguments, workdir=workdir, fault=fault) as process:
    _, err = process.communicate()
  return process.returncode, err


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The folder of a run to which nothing happened."""
  workdir = tmp_path_factory.mktemp('whole')
  assert run(*LONG, workdir=workdir) == (0, '')
  return workdir


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


KILLED_WHILE = {
  'the first file is written': ('os.rename .*/config.json ', 1),
  'a checkpoint is written': (r'open .*/60\.orbax-checkpoint-tmp/state.*/_METADATA w', 1),
  'a checkpoint is saved and its step not yet followed by a log line': ('shutil.rmtree .*/deleted', 2),
  'a log line is written and its step not yet saved': (r'os.mkdir .*/120\.orbax-checkpoint-tmp ', 1),
  'at random': None,
  'an old checkpoint is deleted': ('os.rename .*/deleted/', 1),
  'summary.json is written': ('os.rename .*/summary.json ', 1),
}


def test_killed_again_and_again(tmp_path, whole):
  chance = random.Random(6)
  for name, event in KILLED_WHILE.items():
    if event is None:
      with start(*LONG, workdir=tmp_path) as process:
        for _ in range(chance.randint(1, 6)):
          next(line for line in process.stdout if line.startswith('epoch'))
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
      code = process.returncode
    else:
      code, _ = run(*LONG, workdir=tmp_path, fault=('kill', event[0], str(event[1])))
    assert code == -9, f'not killed while {name}'
    assert not (tmp_path / 'summary.json').exists()
  assert run(*LONG, workdir=tmp_path) == (0, '')
  assert_ends_as(tmp_path, whole)


def test_a_checkpoint_that_is_cut_off(tmp_path, whole):
  workdir = tmp_path / 'copy'
  shutil.copytree(whole, workdir)
  (workdir / 'summary.json').unlink()
  folder = workdir / 'checkpoints' / '330'
  for values in folder.rglob('d/*'):
    values.write_bytes(values.read_bytes()[:-1])
  with start(*LONG, workdir=workdir) as process:
    out, err = process.communicate()
  assert (process.returncode, err) == (0, '')
  named, resumed = (line for line in out.splitlines() if line.startswith(('checkpoint', 'resuming')))
  assert named.startswith(f'checkpoint {folder} is damaged (')
  assert named.endswith(f'); moved to {workdir}/damaged_checkpoints/330')
  assert resumed == 'resuming from the checkpoint at step 300 of 330'
  shutil.rmtree(workdir / 'damaged_checkpoints')
  assert_ends_as(workdir, whole)


def test_a_full_disk(tmp_path, whole):
  # Nothing but checkpoints is written on the way, so that they are what there is no room for.
  silent = *LONG, '--config.log.every_steps=1000', '--config.eval.every_epochs=1000'
  code, err = run(*silent, workdir=tmp_path, fault=('full', r'os.mkdir .*/120\.orbax-checkpoint-tmp ', '1'))
  assert (code, err) == (
    2,
    f'error: the checkpoint of step 120 cannot be written to {tmp_path}/checkpoints (File too large), '
    'and the one of step 60 is intact; fix that or make room, and the same command resumes\n',
  )
  assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['60']
  code, err = run(*silent, workdir=tmp_path, fault=('full', 'open .*/events.out', '1'))
  assert (code, err) == (
    2,
    f'error: {tmp_path} cannot be written (File too large), and its checkpoints are intact; '
    'make room, and the same command resumes\n',
  )
  code, err = run(*silent, workdir=tmp_path, fault=('full', 'open .*/config.json.tmp', '1'))
  assert code == 2 and err.startswith(f'error: {tmp_path} cannot be written (File too large)')
  assert not list(tmp_path.glob('*.tmp'))
  assert run(*silent, workdir=tmp_path) == (0, '')
  chex.assert_trees_all_equal(saved_state(tmp_path), saved_state(whole), strict=True)
