"""NNX modules as stages compute what they compute alone, with variables that start as theirs."""

import textwrap

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paranet_jax.costs import exit_costs
from paranet_jax.models import nnx_stage
from paranet_jax.models.nnx_stage import NNXStage
from paranet_jax.models.staged import StagedModel

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.normal(size=(16, 4, 4, 3)).astype(np.float32)


class Block(nnx.Module):
  """A list with a kernel, then a norm or dropout."""

  def __init__(self, inputs, features, rate=0.0):
    self.kernels = nnx.List([nnx.Param(jnp.asarray(RANDOM.normal(size=(inputs, features)), jnp.float32))])
    rngs = nnx.Rngs(0)
    self.last = nnx.Dropout(rate, rngs=rngs) if rate else nnx.BatchNorm(features, momentum=0.9, rngs=rngs)

  def __call__(self, x):
    return self.last(x @ self.kernels[0][...])


class Dense(nn.Module):
  """A linen stage."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(2, use_bias=False)(x)


def normalized(x, params, mean, var):
  x = x @ params['kernels.0']
  return (x - mean) / np.sqrt(var + 1e-5) * params['last.scale'] + params['last.bias']


def test_the_documented_example():
  example = textwrap.dedent(nnx_stage.__doc__.split('returns:\n\n')[1])
  names = {'jax': jax, 'images': IMAGES, 'blocks': [Block(3, 16), Block(16, 32)]}

  @jax.jit  # One program instead of dozens.
  def run():
    exec(example, names)
    return names['early'], names['late'], names['variables']['params']['stages_1']['kernels.0']

  early, late, kernel = run()
  assert [early.shape, late.shape] == [(16, 10), (16, 10)]
  assert [cost['own_macs'] for cost in exit_costs(names['model'], (4, 4, 3))] == [
    *(16 * 3 * 16 + 16 * 10, 16 * 16 * 32 + 32 * 10)
  ]
  np.testing.assert_array_equal(kernel, names['blocks'][1].kernels[0][...])


def test_mixed_with_linen_and_trained():
  block = Block(3, 5)
  model = StagedModel([NNXStage(block), Dense()], (1, 2), 2)
  variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
  params, statistics = variables['params']['stages_0'], variables['batch_stats']['stages_0']
  assert params.keys() == {'kernels.0', 'last.scale', 'last.bias'}

  def logits(x, variables, index):
    own = variables['params'][f'default_heads_{index}']['classifier']
    return x.mean((1, 2)) @ own['kernel'] + own['bias']

  features = normalized(IMAGES, params, 0, 1)
  kernel = variables['params']['stages_1']['Dense_0']['kernel']
  expected = [logits(features, variables, 0), logits(features @ kernel, variables, 1)]
  chex.assert_trees_all_close(jax.jit(model.apply)(variables, IMAGES), expected, rtol=1e-4, atol=1e-5)

  doubled = jax.tree.map(lambda leaf: 2 * np.asarray(leaf), variables)
  raw = IMAGES @ doubled['params']['stages_0']['kernels.0']
  moments = raw.mean((0, 1, 2)), raw.var((0, 1, 2))
  found, updated = jax.jit(lambda: model.apply(doubled, IMAGES, train=True, exits=(1,), mutable=['batch_stats']))()
  features = normalized(IMAGES, doubled['params']['stages_0'], *moments)
  np.testing.assert_allclose(found[0], logits(features, doubled, 0), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(updated['batch_stats']['stages_0']['last.mean'], 0.1 * moments[0], rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(block.last.mean[...], statistics['last.mean'])


def test_dropout_needs_a_key_in_training():
  stage = NNXStage(Block(3, 5, rate=0.5))
  variables = stage.init(jax.random.key(0), IMAGES, False)
  kept = stage.apply(variables, IMAGES, False)
  np.testing.assert_allclose(kept, IMAGES @ variables['params']['kernels.0'], rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match='^Block draws random numbers in training: give a dropout key'):
    stage.apply(variables, IMAGES, True)
  first, second = (stage.apply(variables, IMAGES, True, rngs={'dropout': jax.random.key(seed)}) for seed in (0, 1))
  assert 0.3 < jnp.mean(first == 0) < 0.7 and jnp.any((first == 0) != (second == 0))
  np.testing.assert_allclose(first, jnp.where(first == 0, 0, 2 * kept), rtol=1e-6)


class Counted(nnx.Variable):
  """Neither a parameter nor a statistic."""


class Counting(Block):
  """Writes a variable of its own in each call."""

  def __init__(self, rate):
    super().__init__(3, 5, rate)
    self.calls = Counted(jnp.zeros((), jnp.int32))

  def __call__(self, x):
    self.calls[...] += 1
    return super().__call__(x)


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('rate', [0.0, 0.5])
def test_the_module_itself_is_never_changed(rate, train):
  block = Counting(rate)
  model = StagedModel([NNXStage(block)], (1,), 10)
  variables = model.init(jax.random.key(0), IMAGES)
  before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(block, nnx.Not(nnx.RngKey))))
  state = {'mutable': ['batch_stats']} if rate == 0.0 and train else {}

  def run(key):
    return model.apply(variables, IMAGES, train=train, rngs={'dropout': key}, **state)

  keys = jax.random.key(1), jax.random.key(2)
  eager, jitted, other = run(keys[0]), jax.jit(run)(keys[0]), jax.jit(run)(keys[1])
  chex.assert_trees_all_close(eager, jitted, rtol=1e-4, atol=1e-5)
  assert bool(rate and train) == any(np.any(a != b) for a, b in zip(jitted, other, strict=True) if rate)
  after = nnx.to_pure_dict(nnx.state(block, nnx.Not(nnx.RngKey)))
  chex.assert_trees_all_equal(jax.tree.map(np.array, after), before)
