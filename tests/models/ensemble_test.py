"""Tests of ensembles: mean probabilities, one member per stage, cumulative costs."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny

from paranet_jax.costs import abstract_variables, exit_costs, multiply_adds
from paranet_jax.models.ensemble import Ensemble, ensemble_variables
from paranet_jax.models.staged import StagedModel

SHAPE = (tiny.SIDE, tiny.SIDE, 3)
IMAGES = np.random.default_rng(0).normal(size=(8, *SHAPE)).astype(np.float32)
MEMBERS = (tiny.network(1), tiny.network(1, growth_rate=1), tiny.network(1))
VARIABLES = tuple(tiny.variables(member, seed) for seed, member in enumerate(MEMBERS))
MODEL = Ensemble(MEMBERS)


@functools.cache
def member_probabilities():
  """Of each member, in float64."""
  apply = [member.apply for member in MEMBERS]
  logits = jax.jit(lambda: [own(variables, IMAGES)[-1] for own, variables in zip(apply, VARIABLES, strict=True)])()
  exponentials = np.exp(np.float64(logits))
  return exponentials / exponentials.sum(axis=-1, keepdims=True)


def expected(number):
  """Mean probabilities of the first `number` members."""
  return member_probabilities()[:number].mean(0)


def test_exits_average_the_probabilities():
  joined = ensemble_variables(VARIABLES)
  logits, asked = jax.jit(lambda: (MODEL.apply(joined, IMAGES), MODEL.apply(joined, IMAGES, exits=(2,))))()
  for number, found in enumerate(logits, 1):
    np.testing.assert_allclose(np.exp(found), expected(number), rtol=1e-4, atol=1e-7)
  assert asked[0] is None and asked[2] is None
  np.testing.assert_allclose(np.exp(asked[1]), expected(2), rtol=1e-4, atol=1e-7)


@functools.partial(jax.jit, static_argnums=1)
def stage(carry, number):
  return MODEL.apply(ensemble_variables(VARIABLES), IMAGES, carry, number, method='stage')


@pytest.mark.parametrize('numbers, kept', [((1, 2, 3), [[1], [2], []]), ((2, 3), [[2], []])])
def test_stages_match_the_full_pass_and_run_one_member_each(numbers, kept):
  carry = {}
  for number, members in zip(numbers, kept, strict=True):
    logits, carry = stage(carry, number)
    np.testing.assert_allclose(np.exp(logits), expected(number), rtol=1e-4, atol=1e-7)
    assert list(carry) == members


def test_probabilities_far_apart_stay_finite():
  """Two copies of a module, each with its own weights: the log of 0 does not occur."""
  ensemble = Ensemble([StagedModel([nn.Dense(3, use_bias=False)], (1,), 3)] * 2)
  shapes = jax.eval_shape(ensemble.init, jax.random.key(0), IMAGES)
  variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  for index, value in enumerate((0.0, 1000.0)):
    variables['params'][f'networks_{index}']['default_heads_0']['classifier']['bias'] = np.float32([value, 0, 0])
  logits = jax.jit(ensemble.apply)(variables, IMAGES)[1]
  np.testing.assert_allclose(np.exp(logits[0]), [2 / 3, 1 / 6, 1 / 6], rtol=1e-5)


def test_costs_add_up():
  single = [exit_costs(member, SHAPE)[-1] for member in MEMBERS]
  costs = exit_costs(MODEL, SHAPE)
  assert [cost['own_macs'] for cost in costs] == [cost['macs_alone'] for cost in single]
  assert [cost['macs'] for cost in costs] == list(np.cumsum([cost['macs_alone'] for cost in single]))
  variables = abstract_variables(MODEL, SHAPE)
  asked, _ = multiply_adds(lambda variables: MODEL.apply(variables, IMAGES[:1], exits=(2,)), variables)
  assert asked == costs[1]['macs'] == costs[1]['macs_alone']


def test_training_is_refused():
  with pytest.raises(ValueError, match='an ensemble cannot be trained: train each member alone'):
    MODEL.apply(ensemble_variables(VARIABLES), IMAGES, train=True)


def test_members_with_different_classes_are_refused():
  members = [tiny.network(1), tiny.network(1, num_classes=5)]
  with pytest.raises(ValueError, match=r'must have the same number of classes, found \[3, 5\]'):
    abstract_variables(Ensemble(members), SHAPE)
