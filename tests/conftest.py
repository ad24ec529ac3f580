"""How every test runs jax: on eight pretended CPU devices, quick to compile, with strict promotion."""

import gc
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import pytest

if jax.__version_info__ < (0, 11):  # XLA aborts if a later version does not know a flag; it compiles four times faster.
  quick = '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
  os.environ['XLA_FLAGS'] = f'{quick} {os.environ.get("XLA_FLAGS", "")}'
jax.config.update('jax_platforms', os.environ.setdefault('JAX_PLATFORMS', 'cpu'))
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_disable_most_optimizations', True)
jax.config.update('jax_numpy_dtype_promotion', 'strict')

signal.signal(signal.SIGINT, signal.default_int_handler)  # Processes of pytest-xdist ignore Control-C.


def pytest_collection_finish():
  """Makes garbage collection rare: it was a twelfth of the time of a trace."""
  gc.set_threshold(20_000, 20, 20)
  _exempt_from_collection()


def pytest_runtest_setup():
  if gc.get_count()[1]:  # The test before has left 20,000 objects or more.
    _exempt_from_collection()


def _exempt_from_collection():
  """A full collection, as at a stream's end, would take half a second with what is imported and compiled by now."""
  gc.collect()
  gc.freeze()


@pytest.fixture(scope='session', autouse=True)
def cache_dir(tmp_path_factory):
  """Keeps decoded data sets away from the user's own cache."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('PARANET_CACHE_DIR', str(tmp_path_factory.mktemp('cache')))
    yield


@pytest.fixture(scope='session', autouse=True)
def no_numerics_check():
  """The suite compares with references anyway; a check for each small network's shapes takes seconds."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('paranet_jax.numerics.check_once', lambda *_, **__: None)
    yield


@pytest.fixture(scope='module')
def programs():
  """What is built for a run is shared by all runs that it serves (see `running.SharedPrograms`)."""
  from running import PROGRAMS  # It imports the whole program, which most tests do without.

  with pytest.MonkeyPatch.context() as patch:
    PROGRAMS.install(patch)
    yield


@pytest.fixture(scope='session')
def finished_run(tmp_path_factory) -> Path:
  """Workdir of a finished run: PN3-x3d on digits, 300 held-out images, checkpoints at steps 47 and 140.

  Version 0.1.0 trained it as PN3-ddd, which has the same parameters; no test trains it again. Read-only: a test that
  writes into a run copies it first, and what a test leaves behind fails the session.
  """
  from running import contents

  source = Path(__file__).resolve().parent / 'fixtures/v0_1_0'
  folder = tmp_path_factory.mktemp('finished') / 'run'
  shutil.copytree(source / 'run', folder, ignore=shutil.ignore_patterns('exits.json'))
  shutil.copytree(source / 'stopped/checkpoints/47', folder / 'checkpoints/47')
  for name, changes in (('config.json', {'eval': {'every_epochs': 2.0, 'batch_size': 128}}), ('summary.json', {})):
    saved = json.loads((folder / name).read_text())  # 128 leaves the last batch of a split partly empty.
    (folder / name).write_text(json.dumps(saved | changes | {'name': 'PN3-x3d'}))
  before = contents(folder)
  yield folder
  assert contents(folder) == before, 'a test changed the shared run'


@pytest.fixture
def standard_promotion():
  """For what does not run under strict promotion: optax's AdamW and accumulation, flax's normalization in bfloat16."""
  with jax.numpy_dtype_promotion('standard'):
    yield
