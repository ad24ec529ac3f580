"""Tests of convolution against a loop, and of statistics shared over devices."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from paranet_jax.models.layers.conv import Classifier, ConvNormRelu, batch_norm, convolve


def convolution(x, kernel, stride):
  """One output pixel at a time, in float64, zero-padded."""
  size, reach = kernel.shape[0], kernel.shape[0] // 2
  padded = np.pad(np.float64(x), ((0, 0), (reach, reach), (reach, reach), (0, 0)))
  rows = [
    [
      np.einsum('bhwc,hwck->bk', padded[:, row : row + size, column : column + size], np.float64(kernel))
      for column in range(0, x.shape[2], stride)
    ]
    for row in range(0, x.shape[1], stride)
  ]
  return np.stack([np.stack(row, axis=1) for row in rows], axis=1)


@pytest.mark.parametrize('size, stride, side', [(1, 1, 4), (1, 2, 5), (3, 1, 4), (3, 2, 4), (3, 2, 5), (5, 3, 7)])
def test_convolve_is_the_padded_convolution(size, stride, side):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, side, side, 3)).astype(np.float32)
  kernel = rng.normal(size=(size, size, 3, 4)).astype(np.float32)
  found = jax.jit(convolve, static_argnums=2)(x, kernel, stride)
  np.testing.assert_allclose(found, convolution(x, kernel, stride), rtol=1e-4, atol=1e-5)


class Small(nn.Module):
  """Conv-BN-ReLU, a second normalization without ReLU, and a classifier."""

  axis_name: str | None = None

  @nn.compact
  def __call__(self, x, train):
    x = ConvNormRelu(4, stride=2, axis_name=self.axis_name)(x, train)
    return Classifier(3)(batch_norm(x, train, self.axis_name, 'norm'))


def test_statistics_are_shared_over_the_axis():
  """Two halves of a batch on an axis train like the whole batch."""
  images = np.random.default_rng(0).normal(size=(6, 4, 4, 2)).astype(np.float32)
  images[3:] += 1  # So that neither half has the whole batch's statistics.
  variables = tiny.filled(jax.eval_shape(lambda: Small().init(jax.random.key(0), images, False)))

  def step(model, images):
    def loss(params):
      logits, updated = model.apply(variables | {'params': params}, images, True, mutable=['batch_stats'])
      return jnp.mean(jnp.square(logits - 1)), (logits, updated['batch_stats'])

    return jax.grad(loss, has_aux=True)(variables['params'])

  gradients, (logits, statistics) = jax.jit(lambda: step(Small(), images))()
  halves = jax.jit(jax.vmap(lambda half: step(Small('half'), half), axis_name='half'))(images.reshape(2, 3, 4, 4, 2))
  half_gradients, (half_logits, half_statistics) = halves
  chex.assert_trees_all_close(half_logits.reshape(6, 3), logits, rtol=1e-5, atol=1e-5)
  chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf.mean(0), half_gradients), gradients, rtol=1e-5, atol=1e-6)
  both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), statistics)
  chex.assert_trees_all_close(half_statistics, both, rtol=1e-5)


def test_half_precision_keeps_float32_statistics_and_logits():
  images = np.random.default_rng(0).normal(size=(6, 4, 4, 2)).astype(np.float32)
  variables = tiny.filled(jax.eval_shape(lambda: Small().init(jax.random.key(0), images, False)))
  half = jnp.bfloat16(images)
  (logits, updated), wanted = jax.jit(
    lambda: [Small().apply(variables, x, True, mutable=['batch_stats']) for x in (half, images)]
  )()
  chex.assert_trees_all_equal_dtypes((logits, updated), wanted)
  chex.assert_trees_all_close((logits, updated), wanted, rtol=0.05, atol=0.05)
  out, _ = jax.eval_shape(lambda: ConvNormRelu(4).init_with_output(jax.random.key(0), half, True))
  assert out.dtype == jnp.bfloat16
