"""How every test runs jax: on eight pretended CPU devices, quick to compile, with strict promotion."""

import ctypes
import gc
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import jax
import pytest

from paranet_jax.host.machine import use_compilation_cache

TESTS = Path(__file__).resolve().parent

# The dearest files, which start first so that no process is left with one in the end. Those of the first line start
# training from a server of processes or share small programs (see `programs`), and so one process runs them. Another
# one runs those that export: to import the converter takes seconds.
TOGETHER = (
  *('host/processes_test.py', 'resume_test.py', 'faults_test.py', 'stream_train_test.py', 'models/numerics_test.py'),
  *('runs/retention_test.py', 'host/lock_test.py', 'host/signals_test.py', 'host/machine_test.py'),
  'data/stream_test.py',
)
EXPORTING = (
  *('export/export_test.py', 'export/families_test.py', 'export/bundle_test.py', 'export/state_dict_test.py'),
  'plugins_test.py',
)
DEAREST = (
  *TOGETHER,
  *EXPORTING,
  *('models/layers/dense_block_test.py', 'examples/scripts_test.py'),
  *(f'models/{name}_test.py' for name in ('fractalnet', 'resnet', 'paranet', 'msdnet', 'densenet', 'families_train')),
  *('task_test.py', 'experiments/experiments_test.py', 'costs_test.py', 'seeds_test.py'),
  *('fields_test.py', 'train_test.py', 'steps_test.py', 'host/joining_test.py'),
)

ENOUGH = 1_500_000_000
"""Bytes of memory from which a process gives back what jax keeps."""

FULL = 500_000_000
"""Bytes of compiled programs after which they are compiled again."""

if jax.__version_info__ < (0, 11):  # XLA aborts if a later version does not know a flag; it compiles four times faster.
  quick = '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
  if quick not in (given := os.environ.get('XLA_FLAGS', '')):  # A process of pytest-xdist inherits them.
    os.environ['XLA_FLAGS'] = f'{quick} {given}'
jax.config.update('jax_platforms', os.environ.setdefault('JAX_PLATFORMS', 'cpu'))
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_disable_most_optimizations', True)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.05)
jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')  # Or a program's key would depend on the folder.
jax.config.update('jax_numpy_dtype_promotion', 'strict')

gc.set_threshold(100_000, 20, 20)  # Garbage collection was a twelfth of the time of a trace.
signal.signal(signal.SIGINT, signal.default_int_handler)  # Processes of pytest-xdist ignore Control-C.


def pytest_sessionstart(session):
  """Empties the cache of compiled programs when most of it must be old."""
  if 'PYTEST_XDIST_WORKER' not in os.environ and session.config.pluginmanager.has_plugin('cacheprovider'):
    folder = session.config.cache.mkdir('compiled')
    if sum(path.stat().st_size for path in folder.rglob('*-cache')) > FULL:
      shutil.rmtree(folder)


def pytest_collection_finish():
  _exempt_from_collection()


def pytest_runtest_setup():
  if gc.get_count()[1]:  # The tests before have left 100,000 objects or more.
    _exempt_from_collection()


def _exempt_from_collection():
  """A full collection, as at a stream's end, would take half a second with what is imported and compiled by now."""
  gc.collect()
  gc.freeze()


def pytest_collection_modifyitems(items):
  places = {TESTS / name: place for place, name in enumerate(DEAREST)}
  items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Gives each process a file at a time, in the order above."""
  from xdist.scheduler import LoadScopeScheduling

  class Scheduling(LoadScopeScheduling):
    def _split_scope(self, nodeid):
      file = nodeid.split('::')[0]
      return next((own[0] for own in (TOGETHER, EXPORTING) if file.removeprefix('tests/') in own), file)

  config.option.loadscopereorder = False
  return Scheduling(config, log)


@pytest.fixture(scope='module', autouse=True)
def memory():
  """Gives back memory after a file: jax keeps every program that a process has compiled."""
  kept = jax.config.jax_enable_compilation_cache
  yield
  assert jax.config.jax_enable_compilation_cache == kept, 'a test turned the cache of compiled programs off or on'
  if _resident() > ENOUGH:
    if 'running' in sys.modules:
      sys.modules['running'].PROGRAMS.forget()
    gc.unfreeze()
    jax.clear_caches()
    _exempt_from_collection()
    if hasattr(libc := ctypes.CDLL(None), 'malloc_trim'):  # Of glibc, which keeps what is freed.
      libc.malloc_trim(0)


def _resident() -> int:
  """Bytes of memory of this process; 0 where Linux does not tell."""
  statm = Path('/proc/self/statm')
  return int(statm.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') if statm.exists() else 0


@pytest.fixture(scope='session', autouse=True)
def cache_dir(tmp_path_factory, pytestconfig):
  """Keeps decoded data sets away from the user's own cache, and what is compiled for the next run of the suite."""
  folder = tmp_path_factory.mktemp('cache')
  if pytestconfig.pluginmanager.has_plugin('cacheprovider'):
    for kept in ('compiled', 'native'):
      (folder / kept).symlink_to(pytestconfig.cache.mkdir(kept))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('PARANET_CACHE_DIR', str(folder))
    patch.setenv('JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES', 'none')
    use_compilation_cache()
    yield


@pytest.fixture(scope='session', autouse=True)
def no_numerics_check():
  """The suite compares with references anyway; a check for each small network's shapes takes seconds."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('paranet_jax.models.numerics.check_once', lambda *_, **__: None)
    yield


@pytest.fixture(scope='session', autouse=True)
def digits_once():
  """The digits, which hundreds of tests load, are decoded once for each size."""
  from paranet_jax.data import cache

  decode, kept = cache._decode_to_memory, {}

  def once(source, image_shape):
    if source.name != 'digits':
      return decode(source, image_shape)
    if image_shape not in kept:
      kept[image_shape] = decode(source, image_shape)
      for images in kept[image_shape].images.values():
        images.flags.writeable = False
    return kept[image_shape]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(cache, '_decode_to_memory', once)
    yield


@pytest.fixture(scope='session', autouse=True)
def no_kept_programs():
  """What a test loads does not turn on a cache for all tests after it."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('paranet_jax.host.machine.keep_programs', lambda: None)
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
