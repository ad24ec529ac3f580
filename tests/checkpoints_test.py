"""Tests of saving and restoring. How a run uses them is tested in train_test.py and resume_test.py."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paranet_jax.checkpoints import Checkpoints
from paranet_jax.errors import UserError


def tree(scale: float = 1.0):
  """A state of several types, a scalar among them."""
  return {
    'params': {
      'kernel': jnp.arange(6, dtype=jnp.float32).reshape(2, 3) * scale,
      'bias': jnp.float32([np.pi, -0.0, 1e-40]),
    },
    'half': jnp.bfloat16([0.1, 3]),
    'step': jnp.int32(7),
    'opt_state': (jnp.zeros(()), {'trace': jnp.ones(4)}),
  }


def save(workdir, *steps, keep=9, value=tree):
  with Checkpoints(workdir, keep) as checkpoints:
    for step in steps:
      checkpoints.save(step, value(step), {'seed': step})


def test_what_is_saved_is_restored(tmp_path):
  save(tmp_path, 3, 12)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 12
    assert checkpoints.choose() == 12 and checkpoints.choose(3) == 3
    for step in (3, 12):
      state, meta = checkpoints.restore(step, jax.tree.map(jnp.zeros_like, tree()))
      chex.assert_trees_all_equal(state, tree(step), strict=True)
      assert meta == {'seed': step}


def test_each_array_goes_where_the_one_it_is_like_lies(tmp_path):
  save(tmp_path, 1)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), 'x')
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), tree())
  with Checkpoints(tmp_path) as checkpoints:
    state, _ = checkpoints.restore(1, like)
  assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(state))
  chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(tree(1)))


def test_the_state_may_be_given_away_at_once(tmp_path):
  replace = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    state = {'x': jnp.arange(100_000, dtype=jnp.float32)}
    checkpoints.save(1, state, {})
    jax.block_until_ready(replace(state))
    assert state['x'].is_deleted()
  with Checkpoints(tmp_path) as checkpoints:
    restored, _ = checkpoints.restore(1, {'x': jnp.zeros(100_000)})
  np.testing.assert_array_equal(restored['x'], np.arange(100_000, dtype=np.float32))


@pytest.mark.parametrize(('keep', 'kept'), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_latest_are_kept(tmp_path, keep, kept):
  save(tmp_path, 1, 2, 3, 4, 5, keep=keep)
  assert sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir()) == kept


def test_what_a_kill_left_half_written_is_not_a_checkpoint(tmp_path):
  save(tmp_path, 4)
  half = tmp_path / 'checkpoints' / '8.orbax-checkpoint-tmp-0'
  (half / 'state').mkdir(parents=True)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.choose() == 4
  save(tmp_path, 8)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.choose() == 8


def test_reading_makes_nothing(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() is None
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('empty', [False, True])
def test_there_is_none(tmp_path, empty):
  if empty:
    (tmp_path / 'checkpoints').mkdir()
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError) as error:
    checkpoints.choose()
  assert str(error.value) == (
    f'expected a checkpoint in {tmp_path}/checkpoints, found none; train first, or set --workdir'
  )


def test_there_is_none_of_this_step(tmp_path):
  save(tmp_path, 3, 12)
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError) as error:
    checkpoints.choose(4)
  assert str(error.value) == f'no checkpoint of step 4 in {tmp_path}/checkpoints, found [3, 12]; set --step'


def without(state, key):
  return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
  ('like', 'difference'),
  [
    (tree() | {'half': jnp.zeros(3)}, 'half is [2] there and [3] in this configuration'),
    (without(tree(), 'half'), 'half is [2] there and absent in this configuration'),
    (tree() | {'more': jnp.zeros(3)}, 'more is absent there and [3] in this configuration'),
    (tree() | {'step': jnp.zeros(1)}, 'step is [] there and [1] in this configuration'),
    (tree() | {'opt_state': (jnp.zeros(()), {})}, 'opt_state/1/trace is [4] there and absent in this configuration'),
  ],
)
def test_another_architecture_is_refused(tmp_path, like, difference):
  save(tmp_path, 12)
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError) as error:
    checkpoints.restore(12, like)
  assert str(error.value) == (
    f'checkpoint {tmp_path}/checkpoints/12 is of another architecture or optimizer: {difference}; '
    'set --config to the one it was trained with, or --workdir'
  )


def test_only_one_file_knows_orbax():
  package = Path(__file__).resolve().parents[1] / 'paranet_jax'
  assert [path.name for path in package.rglob('*.py') if 'import orbax' in path.read_text()] == ['checkpoints.py']
