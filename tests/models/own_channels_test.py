"""Tests of exits with channels of their own: the same function, other gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from running import CONFIGS, refusal

from paranet_jax.base_config import base_config
from paranet_jax.config import validate
from paranet_jax.models.fractalnet import FractalNet
from paranet_jax.models.layers.dense_block import Moments
from paranet_jax.models.msdnet import MSDNet
from paranet_jax.models.own_channels import hands_on_features, with_own_channels
from paranet_jax.models.paranet import ParaNet
from paranet_jax.models.resnet import ResNet

IMAGES = np.random.default_rng(0).normal(size=(4, 1, 1, 2)).astype(np.float32)


def test_only_its_exit_trains_an_exits_own_channels():
  """A chain of dense layers of 4 channels: of the first one, the last exit trains 2, and the first exit all 4."""
  plain = tiny.dense(2)
  model = with_own_channels(plain, 0.5)
  variables = tiny.filled(jax.eval_shape(plain.init, jax.random.key(0), IMAGES))

  @jax.jit
  def outcomes(params):
    def loss(params, model, number):
      return model.apply({'params': params}, IMAGES, train=True)[number].sum()

    gradients = [[jax.grad(loss)(params, own, number) for number in (0, 1)] for own in (plain, model)]
    return [own.apply({'params': params}, IMAGES) for own in (plain, model)], gradients

  (whole, parted), (expected, found) = outcomes(variables['params'])
  np.testing.assert_array_equal(whole, parted)
  first, last = ([own[number]['stages_0']['bias'] for own in (expected, found)] for number in (0, 1))
  np.testing.assert_array_equal(*first)
  np.testing.assert_array_equal(last[1], last[0] * np.float32([1, 1, 0, 0]))
  assert np.all(last[0] != 0)
  for name in ('stages_1', 'default_heads_1'):
    jax.tree.map(np.testing.assert_array_equal, expected[1][name], found[1][name])


def test_a_share_of_less_than_half_a_channel_is_none():
  plain = tiny.dense(2)
  variables = tiny.filled(jax.eval_shape(plain.init, jax.random.key(0), IMAGES))
  few, plainly = (
    str(jax.make_jaxpr(functools.partial(model.apply, variables, train=True))(IMAGES))
    for model in (with_own_channels(plain, 0.1), plain)  # Of 4 channels.
  )
  assert few == plainly


PARTS = 1 + len(Moments._fields)  # Of the features of a ParaNet, at each exit; in other families one.


def stopped(model):
  """The number of values that pass without a gradient in a training pass."""
  variables = tiny.variables(model)
  images = jax.ShapeDtypeStruct((2, model.image_side, model.image_side, model.channels), jnp.float32)
  function = functools.partial(model.apply, variables, train=True, mutable=['batch_stats'])
  return str(jax.make_jaxpr(function)(images)).count('stop_gradient')


@pytest.mark.parametrize(
  ('model', 'stops'),
  [
    (tiny.named('PN3-ddd'), 3 * PARTS),
    (MSDNet(2, 2, 'even', 1, 1, 2, growth_factors=(1, 2), bottleneck_factors=(1, 2), image_side=8), 2),
    (ResNet(3, depth=8, exits='stages', image_side=8), 3),
  ],
)
def test_every_family_of_layers_hands_on_what_an_exit_reads(model, stops):
  assert stopped(with_own_channels(model, 0.5)) - stopped(model) == stops


def test_equal_models_are_equal():
  model = with_own_channels(tiny.named('PN2-dd'), 0.5)
  assert model == with_own_channels(tiny.named('PN2-dd'), 0.5) != with_own_channels(tiny.named('PN2-dd'), 0.25)
  assert isinstance(model, ParaNet) and hands_on_features(model) and not hands_on_features(FractalNet())


@pytest.mark.parametrize(
  ('file', 'fields', 'message'),
  [
    (
      'pn3_ddd',
      ('loss.gradient_equilibrium=True', 'loss.own_channels=0.5'),
      'loss.gradient_equilibrium takes the mean of the gradients that loss.own_channels changes, found both; set '
      '--config.loss.gradient_equilibrium=False, or --config.loss.own_channels=0',
    ),
    (
      'pn3_ddd',
      ('train.regime=disjoint', 'loss.own_channels=0.5'),
      "loss.own_channels is about parameters that exits train together, found train.regime 'disjoint'; set "
      '--config.loss.own_channels=0, or --config.train.regime',
    ),
    (
      'resnet_mc',
      ('train.regime=exits', 'init_from=run', 'loss.conflict_averse=0.4'),
      "loss.conflict_averse is about parameters that exits train together, found train.regime 'exits'; set "
      '--config.loss.conflict_averse=0, or --config.train.regime',
    ),
    (
      'pn3_ddd',
      ('train.regime=disjoint', 'loss.conflict_averse=0.4'),
      "loss.conflict_averse is about parameters that exits train together, found train.regime 'disjoint'; set "
      '--config.loss.conflict_averse=0, or --config.train.regime',
    ),
    (
      'pn3_ddd',
      ('name=PN3-x3d', 'loss.sample_weight=0.3'),
      'loss.sample_weight weighs images between exits that learn from labels, and PN3-x3d has fewer than two; set '
      '--config.loss.sample_weight=0',
    ),
    (
      'pn3_ddd',
      ('loss.distill=last', 'loss.sample_weight=0.3'),
      "loss.sample_weight weighs images between exits that learn from labels, and PN3-ddd with loss.distill 'last' has "
      'fewer than two; set --config.loss.sample_weight=0, or --config.loss.hard_label_weight',
    ),
    (
      'pn3_ddd',
      ('name=PN2-dd', 'train.regime=disjoint', 'loss.sample_weight=0.3'),
      'loss.sample_weight weighs images between exits that learn from labels, and PN2-dd with train.regime '
      "'disjoint' has fewer than two; set --config.loss.sample_weight=0, or --config.train.regime",
    ),
  ],
)
def test_refusals(file, fields, message):
  flags = (f'--config.{field}' for field in fields)
  assert refusal(f'--config={CONFIGS}/{file}.py', *flags, '--mode=describe') == message


def test_networks_that_are_no_graph_are_refused_before_data_is_read():
  flags = '--config.loss.own_channels=0.5', '--mode=describe'
  assert refusal(f'--config={CONFIGS}/fractalnet_20.py', *flags) == (
    "loss.own_channels needs a network whose exits lie along a chain or a graph of layers, found 'fractalnet'; set "
    '--config.loss.own_channels=0, or another --config'
  )


def test_exits_that_train_together_in_the_end_may_have_conflicts():
  config = base_config('PN2-dd')
  config.train.regime, config.loss.conflict_averse = 'mixed', 0.4
  validate(config)
