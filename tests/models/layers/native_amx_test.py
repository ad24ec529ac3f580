"""A dense block in inference with AMX, against the same operations in NumPy, rounded to bfloat16 at the same places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paranet_jax.host import kept_programs
from paranet_jax.host.native import missing
from paranet_jax.models.layers import dense_block, native_inference
from paranet_jax.models.layers.dense_block import Layer, dense_block_inference, inference_kernels
from paranet_jax.models.numerics import drawn_layers
from tests.models.layers.dense_block_test import distance, kernels_only

amx_only = pytest.mark.skipif(
  bool(missing(native_inference.AMX_FEATURES)), reason=f'{missing(native_inference.AMX_FEATURES)}'
)

SHAPES = {
  # batch, height, width, channels, layers, growth_rate, bn_size
  'whole panels': (16, 4, 4, 64, 1, 12, 4),
  'a part of a panel, several groups': (48, 8, 8, 24, 3, 12, 4),
  'more height than width': (32, 6, 4, 30, 2, 8, 4),
  'a tile of new channels and a part': (16, 4, 8, 20, 2, 24, 4),
  'two tiles at once': (16, 4, 4, 36, 2, 16, 4),
  'one tile, half a panel for three pixels': (16, 4, 4, 24, 2, 4, 4),
  'tiles in several turns': (32, 4, 4, 200, 2, 40, 4),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(native_inference, 'MIN_MACS', 0)


def problem(shape):
  batch, height, width, channels, layers, growth, bn_size = SHAPES[shape]
  random = np.random.default_rng(len(shape))
  x = random.normal(size=(batch, height, width, channels)).astype(np.float32)
  return rounded(x), [Layer(*layer) for layer in drawn_layers(random, channels, layers, growth, bn_size)]


def rounded(values):
  return np.asarray(values, np.float32).astype(jnp.bfloat16).astype(np.float32)


def run(x, layers):
  return jax.jit(dense_block_inference)(x.astype(jnp.bfloat16), layers)


def reference(x, layers):
  for layer in layers:
    activation = rounded(np.maximum(x * layer.scale1 + layer.shift1, 0))
    z = rounded(np.maximum(activation @ rounded(layer.kernel1) + layer.shift2, 0))
    padded = np.pad(z, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    new = np.einsum('bhwcij,ijck->bhwk', windows, rounded(layer.kernel2))
    x = np.concatenate([x, rounded(new)], axis=-1)
  return x


@amx_only
@pytest.mark.parametrize('shape', SHAPES)
def test_equals_the_same_operations_in_numpy(shape):
  x, layers = problem(shape)
  batch, height, width, channels, number, growth, bn_size = SHAPES[shape]
  chosen = inference_kernels((batch, height, width, channels), number, bn_size * growth, growth, jnp.bfloat16)
  assert chosen is not None and chosen.prefix.endswith('amx')
  found, expected = run(x, layers), reference(x, layers)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found[..., :channels], x)
  for index in range(channels, found.shape[-1]):
    # A sum in another order rounds some of the numbers to their other neighbor.
    assert distance(found[..., index], expected[..., index]) < 2e-3


@amx_only
@pytest.mark.parametrize('place', [(0, 0, 0, 0), (17, 2, 3, 21), (47, 7, 7, 23)])
def test_a_nan_stays_in_its_image(place):
  x, layers = problem('a part of a panel, several groups')
  x[place] = np.nan
  found = np.isnan(np.asarray(run(x, layers), np.float32))
  np.testing.assert_array_equal(found, np.isnan(reference(x, layers)))
  assert found.any((1, 2, 3)).sum() == 1


@amx_only
def test_an_image_has_the_same_bits_in_every_batch():
  """Also where threads share images, instead of taking some each."""
  x, layers = problem('a part of a panel, several groups')
  np.testing.assert_array_equal(run(x, layers)[16:32], run(x[16:32], layers))


@amx_only
def test_gradients_are_those_of_the_plain_block():
  x, layers = problem('whole panels')
  half = x.astype(jnp.bfloat16)

  def gradient(block):
    return jax.jit(jax.grad(lambda x: jnp.sum(block(x, layers).astype(jnp.float32) ** 2)))(half)

  assert distance(gradient(dense_block_inference), gradient(dense_block._inference)) < 5e-3


@kernels_only
@pytest.mark.parametrize(
  'shape, num_layers, width, growth',
  [((16, 4, 4, 24), 2, 40, 10), ((16, 4, 4, 25), 2, 48, 12), ((16, 4, 4, 24), 2, 16, 3)],
  ids=['no whole tiles', 'odd channels', 'odd growth rate'],
)
def test_other_blocks_are_computed_without(shape, num_layers, width, growth):
  chosen = native_inference.block_kernels(shape, num_layers, width, growth, jnp.bfloat16)
  assert chosen is not None and chosen.prefix.endswith('bfloat16')


def without_amx(compiled):
  return lambda source, *rest: None if source == native_inference.AMX_SOURCE else compiled(source, *rest)


@kernels_only
@pytest.mark.parametrize('why', ['another processor', 'not granted', 'not compiled'])
def test_where_it_cannot_be_used_other_kernels_are(why, monkeypatch):
  if why == 'not granted' and missing(native_inference.AVX512):
    pytest.skip(f'{missing(native_inference.AVX512)}, and so no library that could ask')
  monkeypatch.setattr(kept_programs, '_asked', {})
  monkeypatch.setattr(native_inference, '_registered', native_inference._registered.__wrapped__)
  if why == 'another processor':
    monkeypatch.setattr(native_inference, 'AMX_FEATURES', ('no_such_feature',))
  else:
    monkeypatch.setattr(native_inference, 'AMX_FEATURES', native_inference.FEATURES)
    monkeypatch.setattr(native_inference, '_granted', lambda _: False)
  if why == 'not compiled':
    monkeypatch.setattr(native_inference, 'shared_library', without_amx(native_inference.shared_library))
  chosen = native_inference.block_kernels((16, 4, 4, 24), 2, 48, 12, jnp.bfloat16)
  assert chosen is not None and chosen.prefix.endswith('bfloat16')
