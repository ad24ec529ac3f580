"""How every test runs jax: on eight pretended CPU devices, quick to compile, with strict promotion."""

import os
import shutil
import signal
from pathlib import Path

import jax
import pytest

jax.config.update('jax_platforms', os.environ.setdefault('JAX_PLATFORMS', 'cpu'))
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_disable_most_optimizations', True)
jax.config.update('jax_numpy_dtype_promotion', 'strict')

signal.signal(signal.SIGINT, signal.default_int_handler)  # Processes of pytest-xdist ignore Control-C.


@pytest.fixture(scope='session', autouse=True)
def cache_dir(tmp_path_factory):
  """Keeps decoded data sets away from the user's own cache."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('PARANET_CACHE_DIR', str(tmp_path_factory.mktemp('cache')))
    yield


@pytest.fixture(scope='module')
def programs():
  """What is built for a run is shared by all runs that it serves (see `running.SharedPrograms`)."""
  from running import PROGRAMS  # It imports the whole program, which most tests do without.

  with pytest.MonkeyPatch.context() as patch:
    PROGRAMS.install(patch)
    yield


@pytest.fixture(scope='session')
def finished_run(cache_dir, tmp_path_factory) -> Path:
  """Workdir of a finished run of 60 steps: PN3-x3d on digits, 300 held-out images, checkpoints at 50 and 60.

  Read-only: a test that writes into a run copies it first. What a test leaves behind fails the session.
  """
  from running import PROGRAMS, TINY, contents, run_main

  folder = tmp_path_factory.mktemp('finished') / 'run'
  flags = (
    '--config.data.held_out=300',
    '--config.train.batch_size=55',
    '--config.train.epochs=3',
    '--config.checkpoint.every_steps=50',
    '--config.eval.batch_size=128',  # The last batch is not full.
  )
  with pytest.MonkeyPatch.context() as patch:
    PROGRAMS.install(patch)
    result = run_main(*TINY, *flags, f'--workdir={folder}')
  assert (result.code, result.err) == (0, ''), result
  before = contents(folder)
  yield folder
  assert contents(folder) == before, 'a test changed the shared run'


@pytest.fixture(scope='session')
def calibrated_run(finished_run, tmp_path_factory) -> Path:
  """A copy of the finished run, calibrated with `--threshold=0.5`: exits 2 and 3 are usable. Read-only too."""
  from running import run_command

  from paranet_jax.calibrate.__main__ import main

  folder = shutil.copytree(finished_run, tmp_path_factory.mktemp('calibrated') / 'run')
  result = run_command(main, f'--workdir={folder}', '--threshold=0.5')
  assert (result.code, result.err) == (0, ''), result
  return folder


@pytest.fixture
def standard_promotion():
  """For what does not run under strict promotion: optax's AdamW and accumulation, flax's normalization in bfloat16."""
  with jax.numpy_dtype_promotion('standard'):
    yield
