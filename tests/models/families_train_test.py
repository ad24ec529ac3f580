"""A family of random steps trains, stops, resumes, is evaluated and exits early; tests/slow trains the others."""

import json

import chex
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
import tiny
from families import RUNS, arguments
from running import run_command, run_main, saved_state

from paranet_jax.calibrate import __main__ as calibrate
from paranet_jax.devices import pick_devices, place_order, replicated, run_on
from paranet_jax.display.metrics import read_metrics
from paranet_jax.early.runtime import EarlyExit
from paranet_jax.models.fractalnet import FractalNet
from paranet_jax.models.staged import StagedModel
from paranet_jax.steps import init_state, make_train_step, model_rngs, zero_totals

pytestmark = pytest.mark.usefixtures('programs')

FILE = 'fractalnet_20'
ONE_BLOCK = ('model.widths=(8,)', 'model.block_dropout=(0.1,)', 'train.learning_rate=0.4')


@pytest.fixture(scope='module')
def finished(programs, tmp_path_factory):
  """The workdir of a run of one epoch."""
  workdir = tmp_path_factory.mktemp('run')
  assert run_main(*arguments(FILE, workdir, *ONE_BLOCK)).code == 0
  return workdir


def test_one_epoch_lowers_the_loss_at_every_exit(finished):
  lines = [line for line in read_metrics(finished) if line['split'] == 'train']
  exits = json.loads((finished / 'summary.json').read_text())['exits']
  assert [row['learns_from'] for row in exits] == ['labels'] * RUNS[FILE][1]
  for number, row in enumerate(exits, 1):
    assert lines[-1][f'exit_{number}/loss'] < 0.95 * lines[0][f'exit_{number}/loss']
    assert 0 <= row['accuracy'] <= 1


def test_a_stopped_run_ends_like_an_uninterrupted_one(finished, tmp_path):
  """Every step of this family draws random numbers."""
  assert run_main(*arguments(FILE, tmp_path, *ONE_BLOCK, 'train.max_steps=6')).code == 0
  assert run_main(*arguments(FILE, tmp_path, *ONE_BLOCK), '--accept_config_changes').code == 0
  chex.assert_trees_all_equal(saved_state(tmp_path), saved_state(finished), strict=True)


def test_a_run_is_evaluated_and_exits_early(finished):
  result = run_main(f'--workdir={finished}', '--mode=eval', '--json')
  summary = json.loads((finished / 'summary.json').read_text())
  for row, known in zip(json.loads(result.out)['splits']['test'], summary['exits'], strict=True):
    assert row.items() <= known.items()
  assert run_command(calibrate.main, f'--workdir={finished}', '--threshold=0.3').code == 0
  found = EarlyExit.load(finished).predict(np.zeros((3, 8, 8, 3), np.uint8))
  assert found.probabilities.shape == (3, 10) and set(found.exits.tolist()) <= set(range(1, RUNS[FILE][1] + 1))


class Plain(nn.Module):
  """A stage without batch statistics."""

  @nn.compact
  def __call__(self, x):
    return nn.relu(nn.Conv(4, (3, 3), strides=2)(x))


def network():
  """Three exits, with drop-path and dropout in every step."""
  return FractalNet(tiny.NUM_CLASSES, 2, (4,), (0.2,), 0.3, 0.5, image_side=tiny.SIDE)


def staged():
  return StagedModel((Plain(), Plain()), (1, 2), tiny.NUM_CLASSES)


def trained(make, count, name):
  """The state after two steps on `count` devices, and the sums of their metrics."""
  model, devices, optimizer = make(), pick_devices(count), optax.sgd(0.05, 0.9, True)
  objective, shape = tiny.objective(name), (tiny.SIDE, tiny.SIDE, 3)
  state = init_state(model, optimizer, 0, shape)
  images = np.random.default_rng(0).integers(0, 256, (32, *shape), dtype=np.uint8)
  whole = replicated(devices)
  images, labels = jax.device_put((images, tiny.labels(32)), whole)
  state, totals = jax.device_put((state, zero_totals(objective.targets)), whole)
  step = run_on(devices, lambda axis: make_train_step(model, optimizer, objective, tiny.PLAIN, axis))
  order = np.random.default_rng(1).permutation(32).astype(np.int32).reshape(2, 16)
  for _ in range(2):
    state, totals = step(state, totals, images, labels, place_order(jax.numpy.asarray(order), devices))
  return jax.device_get((state, totals))


@pytest.mark.skipif(len(jax.devices()) < 2, reason=f'needs 2 devices, found {len(jax.devices())}')
def test_two_devices_equal_one():
  """An image drops the same values on any device."""
  chex.assert_trees_all_close(*(trained(network, count, 'PN3-ddd') for count in (2, 1)), rtol=1e-5, atol=1e-5)


def test_a_model_without_batch_statistics_that_draws_its_own_variables_trains():
  state, totals = trained(staged, 1, 'PN2-dd')
  assert state.batch_stats == {} and state.step == 2
  assert np.isfinite(totals['loss']) and totals['exit_1/loss'] != totals['exit_2/loss']


@pytest.mark.parametrize('seed, step, same', [(0, 0, True), (1, 0, False), (-1, 0, False), (0, 1, False)])
def test_random_keys_depend_on_seed_and_step(seed, step, same):
  keys, others = (model_rngs(network(), *map(np.int32, of)) for of in ((0, 0), (seed, step)))
  assert keys.keys() == {'drop_path', 'dropout'}
  for name in keys:
    assert (jax.random.key_data(keys[name]) == jax.random.key_data(others[name])).all() == same
  assert (jax.random.key_data(keys['drop_path']) != jax.random.key_data(keys['dropout'])).any()
  assert model_rngs(tiny.network(1), np.int32(0), np.int32(0)) == {}
