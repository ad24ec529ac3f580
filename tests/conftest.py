"""How every test runs jax: on eight pretended CPU devices, quick to compile, with strict promotion."""

import os
import signal

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


@pytest.fixture
def standard_promotion():
  """For what does not run under strict promotion: optax's AdamW and accumulation, flax's normalization in bfloat16."""
  with jax.numpy_dtype_promotion('standard'):
    yield
