"""The training command in a process of its own, which tests kill, and what a run must hold in the end all the same."""

import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import chex
from forking import Forked
from running import QUICKSTART, saved_state, summary_of

from paranet_jax.main import main
from paranet_jax.report.metrics import read_metrics

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
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _plan(fault: str, event: str, number: int) -> None:
  """Plans `kill` or `full` for the numberth Python audit event (an open, a rename, ...) that matches.

  `kill` sends SIGKILL before that call takes effect, and `full` makes the file system one on which no file can grow
  from then on. The event is a regular expression for `name path...`.
  """
  act = {'kill': _kill, 'full': _fill}[fault]
  pattern, left = re.compile(event), number

  def hook(name, arguments):
    nonlocal left
    if name in _EVENTS and pattern.search(' '.join([name, *map(str, arguments)])):
      left -= 1
      if left == 0:
        act()

  sys.addaudithook(hook)


def run(*arguments, workdir, fault=()):
  """Exit code, output and error of the same program in a forked process, with a fault (see `_plan`) or without."""
  return Forked(_train, [*arguments, f'--workdir={workdir}'], fault).ended()


def _train(arguments, fault):
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
