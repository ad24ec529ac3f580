"""The kernels around a dense block in inference, against the operations that they replace."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from paranet_jax.host import kept_programs
from paranet_jax.models.layers import native_dense, native_inference
from paranet_jax.models.layers.dense import averaged_activation, max_pooled_stem, pooled_activation
from tests.models.layers.dense_block_test import close, kernels_only

pytestmark = kernels_only


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(native_inference, 'MIN_MACS', 0)
  monkeypatch.setattr(native_inference, 'MIN_VALUES', 0)


def drawn(*shape):
  return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=2)
def stem(images, kernel, halvings):
  return max_pooled_stem(images, kernel, halvings, train=False)


@pytest.mark.parametrize(
  'batch, side, channels, features, halvings',
  [(16, 8, 3, 24, 1), (32, 16, 3, 24, 2), (48, 8, 1, 24, 3), (16, 24, 3, 8, 3), (16, 10, 2, 4, 1), (16, 32, 3, 12, 4)],
)
def test_stem_equals_a_convolution_and_pools(batch, side, channels, features, halvings):
  images, kernel = drawn(batch, side, side, channels), drawn(3, 3, channels, features)
  assert native_inference.entry_kernels(images.shape, features, halvings, images.dtype)
  padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
  expected = np.einsum('bhwcij,ijck->bhwk', windows, kernel)
  small, window = side >> halvings, 1 << halvings
  expected = expected.reshape(batch, small, window, small, window, features).max((2, 4))
  close(stem(images, kernel, halvings), expected)


@pytest.mark.parametrize(
  'shape, features, halvings',
  [((18, 8, 8, 3), 24, 1), ((16, 8, 8, 3), 24, 0), ((16, 8, 8, 3), 6, 1), ((16, 10, 10, 3), 24, 2)],
  ids=['vectors not full', 'no pool', 'odd features', 'odd side'],
)
def test_other_stems_have_no_kernel(shape, features, halvings):
  assert native_inference.entry_kernels(shape, features, halvings, np.float32) is None


def test_a_batch_of_any_size_has_no_kernel():
  """What is exported runs where there are none."""
  (batch,) = jax.export.symbolic_shape('batch')
  shape = (16 * batch, 8, 8, 16)
  assert native_inference.entry_kernels(shape, 24, 1, np.float32) is None
  assert native_inference.pooling_kernels(shape, np.float32) is None
  assert native_inference.block_kernels(shape, 2, 48, 12, np.float32) is None
  assert native_inference.block_kernels((16, *shape[1:]), 2, 48, 12, np.float32)


def activation(x, scale, shift):
  return np.maximum(x * scale + shift, 0)


@pytest.mark.parametrize('batch, side, channels', [(2, 4, 21), (1, 8, 16), (3, 2, 5)])
def test_pools_equal_means_of_activations(batch, side, channels):
  x, scale, shift = drawn(batch, side, side, channels), drawn(channels), drawn(channels) + 0.1
  small = side // 2
  expected = activation(x, scale, shift).reshape(batch, small, 2, small, 2, channels).mean((2, 4))
  close(jax.jit(functools.partial(pooled_activation, train=False))(x, scale, shift), expected)
  expected = activation(x, scale, shift).mean((1, 2))
  close(jax.jit(functools.partial(averaged_activation, train=False))(x, scale, shift), expected)


@pytest.mark.parametrize('place', [(3, 0, 0), (5, 2, 3), (5, 7, 7)])
def test_a_nan_stays_one(place):
  images, kernel, scale = drawn(16, 8, 8, 3), drawn(3, 3, 3, 24), drawn(3)
  images[(*place, 1)] = np.nan
  for halvings in (1, 2, 3):
    found = np.isnan(stem(images, kernel, halvings))
    np.testing.assert_array_equal(found, np.isnan(max_pooled_stem(images, kernel, halvings, train=True)))
    assert found[place[0]].any()
  for pooled in (pooled_activation, averaged_activation):
    found = np.isnan(pooled(images, scale, scale, train=False))
    np.testing.assert_array_equal(found, np.isnan(pooled(images, scale, scale, train=True)))
    assert found.sum() == 1


def test_bfloat16():
  images, kernel, scale = drawn(16, 8, 8, 3), drawn(3, 3, 3, 24), drawn(3)
  half = jnp.asarray(images, jnp.bfloat16)
  found = stem(half, kernel, 1)
  assert found.dtype == jnp.bfloat16
  close(found, stem(images, kernel, 1), 0.02)
  found = pooled_activation(half, scale, scale, train=False)
  assert found.dtype == jnp.bfloat16
  close(found, pooled_activation(images, scale, scale, train=False), 0.02)
  found = averaged_activation(half, scale, scale, train=False)
  assert found.dtype == jnp.float32
  close(found, averaged_activation(images, scale, scale, train=False), 0.02)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_parameters_of_another_type_are_not_read_as_float32(dtype, standard_promotion):
  images, kernel, scale = drawn(16, 8, 8, 3), jnp.asarray(drawn(3, 3, 3, 24), dtype), jnp.asarray(drawn(3), dtype)
  close(stem(images, kernel, 1), stem(images, kernel.astype(jnp.float32), 1), 0.02)
  for function in (pooled_activation, averaged_activation):
    found = jax.jit(functools.partial(function, train=False))(images, scale, scale)
    close(found, function(images, scale.astype(jnp.float32), scale.astype(jnp.float32), train=True))


@pytest.mark.parametrize('function', [pooled_activation, averaged_activation])
def test_gradients_of_pools(function):
  arguments = drawn(2, 4, 4, 5), drawn(5), drawn(5) + 0.1

  def gradients(train):
    return jax.jit(jax.grad(lambda *args: jnp.sum(jnp.square(function(*args, train=train))), (0, 1, 2)))(*arguments)

  close(gradients(False), gradients(True))


def test_gradient_of_the_stem():
  arguments = drawn(16, 8, 8, 3), drawn(3, 3, 3, 24)

  def gradients(train):
    loss = lambda *args: jnp.sum(jnp.square(max_pooled_stem(*args, 2, train=train)))  # noqa: E731
    return jax.jit(jax.grad(loss, (0, 1)))(*arguments)

  close(gradients(False), gradients(True))


def test_training_uses_none_of_them(monkeypatch):
  monkeypatch.setattr(native_inference.Kernels, '_call', None)
  averaged_activation(drawn(2, 4, 4, 5), drawn(5), drawn(5), train=True)
  max_pooled_stem(drawn(16, 8, 8, 3), drawn(3, 3, 3, 24), 1, train=True)


def test_without_a_library_that_loads_there_are_none(monkeypatch, tmp_path):
  (tmp_path / 'damaged.so').write_bytes(b'\x7fELF')
  monkeypatch.setattr(kept_programs, '_asked', {})
  for module, remembers in ((native_inference, '_registered'), (native_dense, '_compiled')):
    monkeypatch.setattr(module, remembers, getattr(module, remembers).__wrapped__)
    monkeypatch.setattr(module, 'shared_library', lambda *_: tmp_path / 'damaged.so')
  assert native_inference.pooling_kernels((2, 4, 4, 5), np.float32) is None
  assert native_dense.passes(48, 12, np.float32) is None
