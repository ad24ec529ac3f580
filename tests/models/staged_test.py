"""Tests of `StagedModel`: the documented example, stages, heads and errors."""

import functools
import textwrap

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paranet_jax.costs import exit_costs
from paranet_jax.models import staged
from paranet_jax.models.staged import StagedModel

IMAGES = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)


class Scale(nn.Module):
  """A stage without a `train` argument."""

  factor: int

  @nn.compact
  def __call__(self, x):
    return nn.Dense(x.shape[-1] * self.factor, use_bias=False)(x)


class Norm(nn.Module):
  """A stage that can share its batch statistics."""

  @nn.compact
  def __call__(self, x, train, axis_name=None):
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=axis_name)(x)


class Unshared(nn.Module):
  """A stage that cannot share its batch statistics."""

  @nn.compact
  def __call__(self, x, train):
    return nn.BatchNorm(use_running_average=not train)(x)


class Head(nn.Module):
  """A custom head."""

  @nn.compact
  def __call__(self, x, train):
    return nn.Dense(3)(jnp.max(x, axis=(1, 2)) * (2 if train else 1))


model = StagedModel([Norm(), Scale(2), Norm(), Scale(2)], (1, 3, 4), 3)


def test_the_documented_example():
  example = textwrap.dedent(staged.__doc__.split('stage:\n\n')[1])
  assert len(example.splitlines()) <= 25
  names = {'jax': jax, 'images': IMAGES}

  @jax.jit  # One program instead of dozens.
  def run():
    exec(example, names)
    return (names['early'], names['late']), names['model'].apply(names['variables'], IMAGES)

  staged_logits, whole = run()
  assert [logits.shape for logits in staged_logits] == [(16, 10), (16, 10)]
  chex.assert_trees_all_close(staged_logits, tuple(whole), rtol=1e-6)
  convolutions = [4 * 4 * 9 * 3 * 16, 2 * 2 * 9 * 16 * 32 + 9 * 32 * 64]
  expected = [convolutions[0] + 16 * 10, convolutions[1] + 64 * 10]
  assert [cost['own_macs'] for cost in exit_costs(names['model'], (8, 8, 3))] == expected


def plain(variables, train=False):
  """The logits of `model`, written out."""
  params, statistics = variables['params'], variables['batch_stats']

  def norm(x, index):
    name = f'stages_{index}'
    mean, var = (statistics[name]['BatchNorm_0'][moment] for moment in ('mean', 'var'))
    if train:
      mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    affine = params[name]['BatchNorm_0']
    return (x - mean) / np.sqrt(var + 1e-5) * affine['scale'] + affine['bias']

  def head(x, index):
    classifier = params[f'default_heads_{index}']['classifier']
    return x.mean((1, 2)) @ classifier['kernel'] + classifier['bias']

  first = norm(IMAGES, 0)
  third = norm(first @ params['stages_1']['Dense_0']['kernel'], 2)
  fourth = third @ params['stages_3']['Dense_0']['kernel']
  return [head(x, index) for index, x in enumerate((first, third, fourth))]


def variables_of(model):
  sized = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), sized)


@pytest.mark.parametrize('train', [False, True])
def test_all_exits(train):
  variables = variables_of(model)
  apply = functools.partial(model.apply, train=train, mutable=['batch_stats'])
  logits, updated = jax.jit(apply)(variables, IMAGES)
  chex.assert_trees_all_close(logits, plain(variables, train), rtol=1e-4, atol=1e-4)
  mean = variables['batch_stats']['stages_0']['BatchNorm_0']['mean']
  expected = 0.9 * mean + 0.1 * IMAGES.mean((0, 1, 2)) if train else mean
  np.testing.assert_allclose(updated['batch_stats']['stages_0']['BatchNorm_0']['mean'], expected, rtol=1e-5)


@pytest.mark.parametrize('numbers, kept', [((1, 2, 3), [[1], [2], []]), ((1, 3), [[1], []]), ((3,), [[]])])
def test_stages_match_the_full_pass_and_carry_the_last_features(numbers, kept):
  variables, carry = variables_of(model), {}
  for number, stages in zip(numbers, kept, strict=True):
    logits, carry = stage(variables, carry, number)
    np.testing.assert_allclose(logits, plain(variables)[number - 1], rtol=1e-4)
    assert list(carry) == stages


@functools.partial(jax.jit, static_argnums=2)
def stage(variables, carry, number):
  return model.apply(variables, IMAGES, carry, number, method='stage')


def test_requested_exits_only():
  variables = variables_of(model)
  first, second, third = jax.jit(lambda: model.apply(variables, IMAGES, exits=(2,)))()
  assert first is None and third is None
  np.testing.assert_allclose(second, plain(variables)[1], rtol=1e-4)
  costs = exit_costs(model, (8, 8, 3))
  product, wider = 64 * 3 * 6, 64 * 6 * 12
  assert [cost['own_macs'] for cost in costs] == [3 * 3, product + 6 * 3, wider + 12 * 3]
  assert [cost['macs_alone'] for cost in costs] == [3 * 3, product + 6 * 3, product + wider + 12 * 3]


def test_custom_heads():
  own = StagedModel([Scale(1), Scale(1)], (1, 2), 3, heads=[Head(), Head()])
  variables = variables_of(own)
  logits, trained = jax.jit(
    lambda: [own.apply(variables, IMAGES, train=train, exits=(1,))[0] for train in (False, True)]
  )()
  kernel, head = variables['params']['stages_0']['Dense_0']['kernel'], variables['params']['heads_0']['Dense_0']
  np.testing.assert_allclose(logits, (IMAGES @ kernel).max((1, 2)) @ head['kernel'] + head['bias'], rtol=1e-4)
  np.testing.assert_allclose(trained - head['bias'], 2 * (logits - head['bias']), rtol=1e-4)


def test_statistics_are_shared_over_the_device_axis():
  variables = variables_of(model)
  parallel = model.clone(axis_name='devices')
  apply = functools.partial(parallel.apply, variables, train=True, mutable=['batch_stats'])
  halves, statistics = jax.jit(jax.vmap(apply, axis_name='devices'))(IMAGES.reshape(2, 8, 8, 8, 3))
  logits = plain(variables, train=True)
  chex.assert_trees_all_close([half.reshape(16, 3) for half in halves], logits, rtol=1e-4, atol=1e-4)
  means = statistics['batch_stats']['stages_0']['BatchNorm_0']['mean']
  expected = 0.9 * variables['batch_stats']['stages_0']['BatchNorm_0']['mean'] + 0.1 * IMAGES.mean((0, 1, 2))
  np.testing.assert_allclose(means, [expected, expected], rtol=1e-5)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'exits': ()}, r'exits must be ascending stage numbers that end with the last stage, 2, found \(\)'),
    ({'exits': (2, 1)}, r'exits must be ascending stage numbers that end with the last stage, 2, found \(2, 1\)'),
    ({'exits': (0, 2)}, r'found \(0, 2\)'),
    ({'exits': (1,)}, r'found \(1,\)'),
    ({'exits': (1, 2), 'heads': [Head()]}, 'expected 2 heads, one per exit, found 1; or set heads=None'),
  ],
)
def test_invalid_exits_and_heads_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    variables_of(StagedModel([Scale(1), Scale(1)], num_classes=3, **fields))


def test_statistics_that_devices_cannot_share_are_refused():
  own = StagedModel([Unshared()], (1,), 3)
  variables = variables_of(own)
  jax.eval_shape(lambda: own.apply(variables, IMAGES, train=True, mutable=['batch_stats']))
  message = 'Unshared has batch statistics: to train on several devices its __call__ must take axis_name'
  with pytest.raises(ValueError, match=message):
    own.clone(axis_name='devices').apply(variables, IMAGES, train=True, mutable=['batch_stats'])
