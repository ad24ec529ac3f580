"""The training command in a process of its own, which tests kill, and what a run must hold in the end all the same."""

import os
import subprocess
import sys
from pathlib import Path

import chex
from running import QUICKSTART, saved_state, summary_of

from paranet_jax.report.metrics import read_metrics

HELPERS = Path(__file__).resolve().parent

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
