"""The cache of compiled programs, and the description of the machine."""

import math
import platform
from types import SimpleNamespace

import jax
import pytest
from forking import Forked, execute

from paranet_jax.host.machine import (
  container_memory,
  container_used,
  device_memory,
  environment,
  keep_programs,
  machine_key,
  use_compilation_cache,
)

PROGRAM = """
import sys, jax
from paranet_jax.host.machine import use_compilation_cache
print(use_compilation_cache(*sys.argv[1:]))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
print(jax.jit(lambda x: x * 2 + 1)(3.0))
"""


@pytest.fixture
def restored_settings():
  """Leaves jax's settings as they were."""
  names = ('jax_enable_compilation_cache', 'jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  values = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in values.items():
    jax.config.update(name, value)


def run(folder):
  code, out, err = Forked(execute, PROGRAM, str(folder)).ended()
  assert code == 0, err
  return out.split()


def test_a_broken_entry_is_compiled_again(tmp_path):
  folder = tmp_path / machine_key()
  assert run(tmp_path) == [str(folder), '7.0']
  entries = [path for path in folder.rglob('*') if path.is_file() and path.name.endswith('-cache')]
  assert entries
  for path in entries:
    path.write_bytes(b'broken')
  assert run(tmp_path) == [str(folder), '7.0']


def test_folder(tmp_path, monkeypatch, restored_settings):
  monkeypatch.setenv('PARANET_CACHE_DIR', str(tmp_path))
  for before, after in ((1.0, 0.1), (5.0, 5.0)):  # The default of jax, and a user's own.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', before)
    assert use_compilation_cache() == tmp_path / 'compiled' / machine_key()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == after
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'compiled' / machine_key())
  assert use_compilation_cache(str(tmp_path / 'other')) == tmp_path / 'other' / machine_key()
  assert use_compilation_cache('off') is None
  assert not jax.config.jax_enable_compilation_cache


def test_a_program_of_the_user_keeps_its_own_settings(tmp_path, monkeypatch, restored_settings):
  monkeypatch.setenv('PARANET_CACHE_DIR', str(tmp_path))
  own = tmp_path / 'own'
  for enabled, before, after in (
    (True, None, tmp_path / 'compiled' / machine_key()),
    (True, own, own),
    (False, None, None),
  ):
    jax.config.update('jax_enable_compilation_cache', enabled)
    jax.config.update('jax_compilation_cache_dir', before and str(before))
    keep_programs()
    assert jax.config.jax_compilation_cache_dir == (after and str(after))


def test_continues_without_a_writable_folder(tmp_path, restored_settings):
  (tmp_path / 'file').touch()
  assert use_compilation_cache(str(tmp_path / 'file' / 'cache')) is None


@pytest.mark.parametrize(
  ('other', 'same'),
  [
    ('model name : A\nflags : sse avx avx512\ncpu MHz : 3000\n', False),
    ('model name : B\nflags : sse avx\ncpu MHz : 3000\n', False),
    ('model name : A\nflags : sse avx\ncpu MHz : 1234\n', True),
  ],
)
def test_another_machine_has_another_key(tmp_path, other, same):
  (tmp_path / 'one').write_text('model name : A\nflags : sse avx\ncpu MHz : 3000\n')
  (tmp_path / 'other').write_text(other)
  assert (machine_key(tmp_path / 'one') == machine_key(tmp_path / 'other')) == same
  assert machine_key(tmp_path / 'missing') != machine_key(tmp_path / 'one')


def test_environment():
  found = environment(jax.devices()[:3])
  assert found['device'] == {'platform': 'cpu', 'kind': 'cpu', 'count': 3}
  assert found['versions']['python'] == platform.python_version() and found['versions']['jax'] == jax.__version__


@pytest.mark.parametrize(('text', 'bytes_'), [('max\n', math.inf), ('2147483648\n', 2**31), (None, math.inf)])
def test_the_memory_of_a_container(tmp_path, text, bytes_):
  if text:
    (tmp_path / 'memory.max').write_text(text)
  assert container_memory(tmp_path / 'memory.max') == bytes_


@pytest.mark.parametrize(
  ('current', 'stat', 'used'),
  [
    ('9000\n', 'anon 5000\ninactive_file 3000\nactive_file 1000\n', 6000),
    ('9000\n', None, 9000),
    ('9000\n', 'inactive_file 9500\n', 0),  # They are not read at the same moment.
    (None, None, 0),
  ],
)
def test_memory_that_a_container_uses(tmp_path, current, stat, used):
  for name, text in (('memory.current', current), ('memory.stat', stat)):
    if text is not None:
      (tmp_path / name).write_text(text)
  assert container_used(tmp_path) == used


def test_a_device_has_no_more_memory_than_its_container(monkeypatch):
  monkeypatch.setattr('paranet_jax.host.machine.container_memory', lambda: 5)
  assert device_memory(SimpleNamespace(platform='cpu')) == 5


@pytest.mark.parametrize(('stats', 'bytes_'), [({'bytes_limit': 7}, 7), ({}, math.inf), (None, math.inf)])
def test_the_memory_of_an_accelerator(stats, bytes_):
  assert device_memory(SimpleNamespace(platform='gpu', memory_stats=lambda: stats)) == bytes_
