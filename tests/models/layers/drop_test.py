"""Tests of dropout: what it drops, independence of the devices, and its places in dense networks."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from paranet_jax.models import densenet
from paranet_jax.models.densenet import DenseNet
from paranet_jax.models.layers import dense
from paranet_jax.models.layers.drop import dropout

KEY = jax.random.key(0)
NEVER = 1e-12
DENSENET = functools.partial(DenseNet, tiny.NUM_CLASSES, growth_rate=2, image_side=tiny.SIDE)
NETWORKS = {
  'paranet': functools.partial(tiny.network, 2),
  'densenet': functools.partial(DENSENET, depth=10, bn_size=None),
  'densenet_bc': functools.partial(DENSENET, depth=10),
}


def test_values_are_dropped_or_scaled():
  x = jnp.full((8, 10, 10, 10), 3.0)
  found = np.asarray(dropout(x, 0.25, KEY, None))
  assert np.unique(found).tolist() == [0, 4]
  assert (found == 0).mean() == pytest.approx(0.25, abs=0.02)
  # Each image drops different values.
  assert len({image.tobytes() for image in found}) == 8


@pytest.mark.skipif(len(jax.devices()) < 4, reason=f'needs 4 devices, found {len(jax.devices())}')
def test_the_devices_do_not_change_what_is_dropped():
  x = jnp.ones((8, 2, 3, 4))
  shared = jax.pmap(lambda part: dropout(part, 0.5, KEY, 'devices'), axis_name='devices')(x.reshape(4, 2, 2, 3, 4))
  np.testing.assert_array_equal(shared.reshape(x.shape), dropout(x, 0.5, KEY, None))


class Small(nn.Module):
  """A dense block of two layers and a transition."""

  dropout: float

  @nn.compact
  def __call__(self, x):
    x = dense.DenseBlock(2, 2, 2, dropout=self.dropout)(dense.as_features(x, True, None), True)
    return dense.Transition(dropout=self.dropout)(x, True).values


def test_a_rate_of_almost_zero_changes_nothing():
  """Dropout computes a dense block layer by layer instead of as one function."""
  images = np.random.default_rng(1).normal(size=(8, 4, 4, 3)).astype(np.float32)
  variables = tiny.filled(jax.eval_shape(Small(0.0).init, KEY, images))

  def loss(params, rate):
    rngs = {'dropout': KEY} if rate else {}
    out, updated = Small(rate).apply(variables | {'params': params}, images, mutable=['batch_stats'], rngs=rngs)
    return jnp.sum(jnp.sin(out)), (out, updated)

  found = jax.jit(lambda params: [jax.grad(loss, has_aux=True)(params, rate) for rate in (NEVER, 0.0)])
  chex.assert_trees_all_close(*found(variables['params']), rtol=1e-4, atol=1e-4)


def test_training_depends_on_the_key():
  model = NETWORKS['paranet'](dropout=0.5)
  variables, images = tiny.variables(model), np.ones((2, tiny.SIDE, tiny.SIDE, 3), np.float32)

  @jax.jit
  def logits(key):
    return model.apply(variables, images, True, (1,), mutable=['batch_stats'], rngs={'dropout': key})[0][0]

  first, again, other = (logits(jax.random.key(seed)) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 1e-3


# Two per layer with a bottleneck, one without, and one per transition, for 3 blocks of 1 or 2 layers.
@pytest.mark.parametrize('name, times', [('paranet', 3 * 2 + 1), ('densenet_bc', 3 * 2 + 2), ('densenet', 3 * 2 + 2)])
def test_dropout_follows_every_convolution_but_the_first(name, times, monkeypatch):
  rates = []
  for module in (dense, densenet):
    monkeypatch.setattr(module, 'dropout', lambda x, rate, *_: rates.append(rate) or x)
  model = NETWORKS[name](dropout=0.5)
  assert (model.rng_names, NETWORKS[name]().rng_names) == (('dropout',), ())
  variables, images = tiny.variables(model), np.zeros((2, tiny.SIDE, tiny.SIDE, 3), np.float32)
  jax.eval_shape(lambda: model.apply(variables, images))
  assert rates == []
  jax.eval_shape(lambda: model.apply(variables, images, train=True, mutable=['batch_stats'], rngs={'dropout': KEY}))
  assert rates == [0.5] * times
