"""Compiled programs that are kept whole: found again without tracing, and only where nothing has changed."""

import functools
import math
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from paranet_jax import devices as devices_lib
from paranet_jax.host import kept_programs, machine
from paranet_jax.host.kept_programs import Kept, UnknownError, asked, described, remembered
from paranet_jax.models.adopted import cifar_resnet
from paranet_jax.models.adopted.network import AdoptedNetwork
from paranet_jax.models.adopted.registry import ARCHITECTURES, register_architecture
from paranet_jax.models.densenet import DenseNet
from paranet_jax.models.linked import boosted, with_transfer
from paranet_jax.models.own_channels import with_own_channels
from paranet_jax.models.paranet import ParaNet
from paranet_jax.targets import Phase

SETTING = {'answer': 1}
X = np.arange(3, dtype=np.float32)


def answer() -> int:
  """What tracing asks this machine."""
  return SETTING['answer']


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The folder of kept programs of a command."""
  names = 'jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs'
  before = {name: getattr(jax.config, name) for name in names}
  monkeypatch.setitem(machine._state, 'whole', True)
  monkeypatch.setattr(kept_programs, '_asked', {})
  monkeypatch.setattr(kept_programs, 'BEGAN', math.inf)  # Whoever edits this package while its tests run.
  jax.config.update('jax_compilation_cache_dir', str(tmp_path))
  jax.config.update(
    'jax_persistent_cache_min_compile_time_secs', math.inf
  )  # Or one that compiled slowly is found there.
  compilation_cache.reset_cache()  # Or jax goes on with the suite's: what it reads there cannot be kept.
  yield tmp_path / 'programs'
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def scaled(traces, by=2.0, determines=('scaled', 2.0)):
  """A function that notes when it is traced."""

  def function(x):
    traces.append(by)
    return x * jnp.float32(by) * jnp.float32(asked(answer))

  return Kept('scaled', lambda: jax.jit(function), lambda: determines)


def written():
  """Waits until what was compiled is kept."""
  for thread in threading.enumerate():
    if thread.name == 'keeps a program':
      thread.join()


def test_a_kept_program_is_not_traced_again(folder):
  first, second = [], []
  np.testing.assert_array_equal(scaled(first)(X), 2 * X)
  written()
  again = scaled(second)
  for _ in range(2):
    np.testing.assert_array_equal(again(X), 2 * X)
  assert (len(first), second, len(list(folder.iterdir()))) == (1, [], 1)


def test_what_lies_on_several_devices_is_not_kept(folder):
  first, traces = [], []
  both = jax.device_put(np.arange(4, dtype=np.float32), devices_lib.replicated(jax.devices()[:2]))
  np.testing.assert_array_equal(scaled(first)(both), [0, 2, 4, 6])
  np.testing.assert_array_equal(scaled(traces)(both), [0, 2, 4, 6])
  written()
  assert first == traces == [2.0] and not folder.exists()


def test_a_mistake_of_the_caller_is_raised_once():
  """Where nothing is kept; a kept program is followed by the function, which knows what it takes."""
  calls = []

  def fails(x):
    calls.append(x)
    raise TypeError('takes no arrays')

  with pytest.raises(TypeError, match='^takes no arrays$'):
    Kept('fails', lambda: fails, lambda: 'fails')(X)
  assert len(calls) == 1


def test_another_program_or_shape_or_source_is_traced(folder, monkeypatch):
  traces = []
  scaled(traces)(X)
  written()
  np.testing.assert_array_equal(scaled(traces, 3.0, ('scaled', 3.0))(X), 3 * X)
  scaled(traces)(X[:2])
  monkeypatch.setattr(kept_programs, '_source', lambda: 'edited')
  scaled(traces)(X)
  assert traces == [2.0, 3.0, 2.0, 2.0]


def test_a_setting_of_jax_belongs_to_the_program(folder):
  traces = []
  scaled(traces)(X)
  written()
  jax.config.update('jax_default_matmul_precision', 'highest')
  try:
    scaled(traces)(X)
  finally:
    jax.config.update('jax_default_matmul_precision', None)
  assert len(traces) == 2


def test_a_setting_of_a_context_belongs_to_the_program(folder):
  traces = []
  scaled(traces)(X)
  written()
  with jax.default_matmul_precision('highest'):
    scaled(traces)(X)
  written()
  assert len(traces) == len(list(folder.iterdir())) == 2


def test_a_package_edited_under_a_process_is_not_kept(folder, monkeypatch):
  traces = []
  monkeypatch.setattr(kept_programs, 'BEGAN', 0)
  np.testing.assert_array_equal(scaled(traces)(X), 2 * X)
  assert remembered('value', lambda: 1, 'same') == 1
  written()
  assert not folder.exists()


def test_a_package_edited_after_its_source_was_read_is_not_kept(folder, monkeypatch):
  def edits():
    monkeypatch.setattr(kept_programs, 'BEGAN', 0)
    return 1

  assert remembered('value', edits, 'same') == 1
  assert not folder.exists()


def test_a_program_is_not_found_under_the_name_of_another(folder):
  traces = []
  scaled(traces)(X)
  written()
  (own,) = folder.iterdir()
  scaled(traces, 3.0, ('scaled', 3.0))(X)
  written()
  (other,) = set(folder.iterdir()) - {own}
  other.write_bytes(own.read_bytes())
  np.testing.assert_array_equal(scaled(traces, 3.0, ('scaled', 3.0))(X), 3 * X)
  assert traces == [2.0, 3.0, 3.0]


def test_only_the_user_can_write_a_kept_program(folder):
  before = os.umask(0)
  try:
    scaled([])(X)
    written()
  finally:
    os.umask(before)
  (file,) = folder.iterdir()
  assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize('who', ['every user', 'the group', 'another user'])
def test_what_another_user_may_have_written_is_not_read(folder, monkeypatch, who):
  traces = []
  scaled(traces)(X)
  written()
  (file,) = folder.iterdir()
  if who == 'every user':
    file.chmod(0o646)
  elif who == 'the group':
    file.chmod(0o664)
  elif os.geteuid() == 0:
    os.chown(file, 12345, -1)
  else:
    monkeypatch.setattr(os, 'geteuid', lambda: 12345)
  scaled(traces)(X)
  assert len(traces) == 2


def test_a_folder_that_can_only_be_read_is_used(folder, monkeypatch):
  traces = []
  scaled(traces)(X)
  written()

  def refused(*_):
    raise PermissionError

  monkeypatch.setattr(os, 'utime', refused)
  np.testing.assert_array_equal(scaled(traces)(X), 2 * X)
  assert len(traces) == 1


def test_a_damaged_file_is_compiled_again(folder):
  traces = []
  scaled(traces)(X)
  written()
  (file,) = folder.iterdir()
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)
  np.testing.assert_array_equal(scaled(traces)(X), 2 * X)
  assert len(traces) == 2


def test_another_answer_of_the_machine_is_traced(folder, monkeypatch):
  traces = []
  scaled(traces)(X)
  written()
  monkeypatch.setitem(SETTING, 'answer', 5)
  np.testing.assert_array_equal(scaled(traces)(X), 10 * X)
  assert len(traces) == 2


def test_what_jax_has_kept_is_not_written_again(folder, monkeypatch):
  traces = []
  hits = iter(range(10))  # One more whenever they are counted.
  monkeypatch.setattr(kept_programs, '_hits', lambda: next(hits))
  np.testing.assert_array_equal(scaled(traces)(X), 2 * X)
  written()
  assert not folder.exists()


def test_other_arguments_than_the_first_are_computed_too(folder):
  traces = []
  kept = scaled(traces)
  kept(X)
  np.testing.assert_array_equal(kept(X[:2]), 2 * X[:2])
  assert len(traces) == 2


def test_without_a_command_or_a_cache_nothing_is_kept(folder, monkeypatch):
  traces = []
  monkeypatch.setitem(machine._state, 'whole', False)
  np.testing.assert_array_equal(scaled(traces)(X), 2 * X)
  monkeypatch.setitem(machine._state, 'whole', True)
  jax.config.update('jax_compilation_cache_dir', None)
  np.testing.assert_array_equal(scaled(traces)(X), 2 * X)
  assert len(traces) == 2 and not folder.exists()


def test_the_oldest_make_room(folder, monkeypatch):
  monkeypatch.setattr(kept_programs, 'MOST', 2)
  for number in range(4):
    assert remembered('value', lambda number=number: {'it is': number}, number) == {'it is': number}
  assert len(list(folder.iterdir())) == 2
  assert remembered('value', lambda: 'another', 3) == {'it is': 3}


def test_code_of_others_is_not_known(folder):
  class Own:
    pass

  for value in (Own(), lambda: 0, functools.partial(answer), {'a': [Own()]}):
    with pytest.raises(UnknownError):
      described(value)
  traces = []
  np.testing.assert_array_equal(scaled(traces, determines=Own())(X), 2 * X)
  assert not folder.exists()


def test_code_of_others_behind_a_class_of_ours_is_not_known(monkeypatch):
  """Neither a class that is derived from another package's, nor a network that a name of its registry builds."""

  class Foreign(ParaNet):
    pass

  foreign = Foreign(2, 10, layers_per_block=2, growth_rate=4, image_side=16)
  monkeypatch.setattr(ARCHITECTURES, 'known', dict(ARCHITECTURES.known))
  register_architecture('mine', lambda name: cifar_resnet.architecture('cifar_resnet20'))
  derived = boosted(foreign, 0.5), with_transfer(foreign, 4), with_own_channels(foreign, 0.5)
  for value in (*derived, AdoptedNetwork(arch='mine')):
    assert type(value).__module__.startswith('paranet_jax.')
    with pytest.raises(UnknownError):
      described(value)
    with pytest.raises(UnknownError):
      described((value, 1))
  described(AdoptedNetwork(arch='cifar_resnet20'))


def test_a_method_is_not_known_by_its_name():
  with pytest.raises(UnknownError):
    described(ParaNet(2, 10, layers_per_block=2, growth_rate=4, image_side=16).stage)


def test_a_description_tells_values_apart():
  network = ParaNet(2, 10, layers_per_block=2, growth_rate=4, image_side=16)
  values = [
    *(
      ParaNet,
      DenseNet,
      boosted(network, 0.5),
      network,
      network.clone(growth_rate=8),
      Phase(3, (0, 0)),
      Phase(3, (0, None)),
      np.float32(1),
      np.int32(1),
    ),
    *(1, 1.0, True, '1', (1,), [1], {'a': 1}, {'a': 2}, jnp.bfloat16, jnp.float32, np.ones(2), np.ones((2, 1)), None),
  ]
  found = [repr(described(value)) for value in values]
  assert len(set(found)) == len(found)
  assert repr(described(network.clone())) == found[3]


@pytest.mark.parametrize(('guess', 'traced'), [(1, 1), (7, 2)])
def test_a_guess_is_checked_before_anything_is_compiled(folder, guess, traced):
  traces = []

  def function(x):
    traces.append(None)
    return x * jnp.float32(asked(answer, guess=guess))

  kept = Kept('guessed', lambda: jax.jit(function), lambda: guess)
  np.testing.assert_array_equal(kept(X), X)
  assert len(traces) == traced
