"""The dense block against a plain one in NumPy, and its gradients against differences."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest

from paranet_jax.host import kept_programs
from paranet_jax.host.native import missing
from paranet_jax.models.layers import dense_block, native_dense, native_inference
from paranet_jax.models.layers.backend import compiling_for
from paranet_jax.models.layers.dense import DenseBlock, as_features
from paranet_jax.models.layers.dense_block import conv3x3, image_conv3x3
from paranet_jax.models.layers.initial import initial_variables

kernels_only = pytest.mark.skipif(bool(missing(native_dense.FEATURES)), reason=f'{missing(native_dense.FEATURES)}')

SHAPES = {
  # batch, side, channels, layers, growth_rate, bn_size
  'even': (8, 4, 6, 4, 3, 2),
  'one layer': (4, 6, 5, 1, 12, 4),
  'narrow input, odd side': (6, 5, 3, 3, 2, 2),
  'wide input, one pixel': (16, 1, 24, 3, 2, 4),
  'many pixels': (64, 8, 6, 2, 3, 2),
  # A growth rate and a width that have kernels in C++, and channels that fill no vector.
  'kernels': (18, 8, 21, 3, 12, 4),
  'kernels, one image': (1, 8, 21, 3, 12, 4),
  'kernels, threads without images': (3, 4, 21, 3, 12, 4),
  # Batches that fill vectors with images: tiles of every size, more than a panel of channels, and 16 images for which
  # the threads share the rows of pixels.
  'images in vectors': (48, 4, 90, 3, 12, 4),
  'images in vectors, other widths': (32, 8, 5, 2, 5, 8),
  'images in vectors, few': (16, 8, 21, 2, 16, 2),
}


def plain_block(variables, x, train):
  """DenseNet-BC's block in NumPy: its output and the running statistics."""
  net = plain.Plain(variables, train)
  for index in range(1, len(net.params) + 1):
    layer = f'layer_{index}'
    y = net.conv(net.norm_relu(x, layer, 'norm1'), layer, 'conv1')
    x = np.concatenate([x, net.conv(net.norm_relu(y, layer, 'norm2'), layer, 'conv2')], axis=-1)
  return x, net.statistics


@pytest.fixture(autouse=True)
def small_kernels(monkeypatch):
  """Kernels are used for the small blocks here too."""
  monkeypatch.setattr(native_dense, 'MIN_MACS', 0)
  monkeypatch.setattr(native_inference, 'MIN_MACS', 0)


class PlainBlock(nn.Module):
  """The same block of flax's modules, with the same parameter names."""

  num_layers: int
  growth_rate: int
  bn_size: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, train):
    for index in range(1, self.num_layers + 1):
      layer = PlainLayer(self.growth_rate, self.bn_size, self.dtype, name=f'layer_{index}')
      x = jnp.concatenate([x, layer(x, train)], axis=-1)
    return x


class PlainLayer(nn.Module):
  """BN-ReLU-Conv1x1-BN-ReLU-Conv3x3."""

  growth_rate: int
  bn_size: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, train):
    norm = functools.partial(
      nn.BatchNorm,
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype=self.dtype,
    )
    conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
    x = conv(self.bn_size * self.growth_rate, (1, 1), name='conv1')(nn.relu(norm(name='norm1')(x)))
    return conv(self.growth_rate, (3, 3), name='conv2')(nn.relu(norm(name='norm2')(x)))


def problem(shape):
  """A plain block, variables different from their initial values, an input and weights for the outputs."""
  batch, side, channels, layers, growth, bn_size = SHAPES[shape]
  module = PlainBlock(layers, growth, bn_size)
  random = np.random.default_rng(len(shape))
  x = random.normal(1, 2, (batch, side, side, channels)).astype(np.float32)
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, False))
  drawn = initial_variables(shapes, 0)
  variables = jax.tree.map(lambda leaf: (leaf + random.uniform(0.1, 0.4, leaf.shape)).astype(np.float32), drawn)
  weights = random.normal(size=(batch, side, side, channels + layers * growth)).astype(np.float32)
  return module, variables, x, weights


def test_only_variables_that_are_known_are_drawn():
  shape = jax.ShapeDtypeStruct((3,), np.float32)
  with pytest.raises(ValueError, match=r"^no initial value is known for \['head'\]\['gain'\]$"):
    initial_variables({'head': {'bias': shape, 'gain': shape}}, 0)


def readers(features):
  """The scale, shift and ReLU with which a layer reads normalized features."""
  return nn.relu(features * 1.1 + 0.1)


def module_loss(module, params, stats, x, weights):
  out, updated = module.apply({'params': params, 'batch_stats': stats}, x, True, mutable=['batch_stats'])
  out = normalized(out)
  return jnp.sum(readers(out) * weights), (out, updated['batch_stats'])


def plain_loss(variables, weights, params_and_x):
  params, x = params_and_x
  out, _ = plain_block(variables | {'params': params}, x, True)
  return np.sum(np.maximum(normalized(out) * 1.1 + 0.1, 0) * weights)


def normalized(x):
  return (x - x.mean((0, 1, 2))) / (x.var((0, 1, 2)) + 1e-5) ** 0.5


def block_of(module, scan_layers, axis_name=None):
  return DenseBlock(module.num_layers, module.growth_rate, module.bn_size, scan_layers, axis_name)


def block_loss(block, params, stats, x, weights):
  features = as_features(x, True, block.axis_name)
  variables = {'params': params, 'batch_stats': stats}
  out, updated = block.apply(variables, features, True, mutable=['batch_stats'])
  return jnp.sum(readers(out.values) * weights), (out.values, updated['batch_stats'])


def gradients(loss, variables, x, weights):
  """(output, running statistics), and the gradients of every parameter and of the input."""
  run = jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True))
  found, outputs = run(variables['params'], variables['batch_stats'], x, weights)
  return outputs, found


def assert_plain(outputs, found, variables, x, weights):
  """Compares the output and running statistics, and the gradients of every parameter and of the input."""
  out, statistics = plain_block(variables, x, True)
  close(outputs, (normalized(out), statistics))
  loss = functools.partial(plain_loss, variables, weights)
  plain.assert_gradient(found, loss, (variables['params'], x))


@pytest.mark.parametrize(
  'shape, backend, scan_layers',
  [
    ('even', 'cpu', 1),
    ('even', 'cpu', 3),
    ('even', 'tpu', 2),
    ('one layer', 'cpu', 2),
    ('narrow input, odd side', 'cpu', 2),
    ('wide input, one pixel', 'cpu', 8),
    ('many pixels', 'cpu', 1),
    ('kernels', 'cpu', 1),
  ],
)
def test_training_equals_the_plain_block(shape, backend, scan_layers):
  module, variables, x, weights = problem(shape)
  with compiling_for(backend):
    outputs, found = gradients(functools.partial(block_loss, block_of(module, scan_layers)), variables, x, weights)
  assert_plain(outputs, found, variables, x, weights)


@pytest.mark.parametrize('shape', SHAPES)
def test_inference_equals_the_plain_block(shape):
  module, variables, x, _ = problem(shape)
  out = jax.jit(lambda: block_of(module, None).apply(variables, as_features(x, False, None), False).values)()
  close(out, plain_block(variables, x, False)[0])


@pytest.mark.parametrize('shape, devices', [('even', 4), ('kernels', 2)])
def test_devices_share_their_statistics(shape, devices):
  """Devices with a part of the batch each sum to one device with all of it."""
  module, variables, x, weights = problem(shape)
  block = block_of(module, 3, 'devices')  # One segment is a loop, the other unrolled.

  def local(params, stats, x, weights):
    loss = functools.partial(block_loss, block)
    found, (out, updated) = jax.grad(loss, argnums=(0, 2), has_aux=True)(params, stats, x, weights)
    return (out, updated), (jax.lax.psum(found[0], 'devices'), found[1])

  split = [leaf.reshape(devices, -1, *leaf.shape[1:]) for leaf in (x, weights)]
  run = jax.pmap(
    local, 'devices', in_axes=(None, None, 0, 0), out_axes=((0, None), (None, 0)), devices=jax.devices()[:devices]
  )
  (out, stats), (found, dx) = run(variables['params'], variables['batch_stats'], *split)
  outputs = np.reshape(out, (len(x), *out.shape[2:])), stats
  assert_plain(outputs, (found, np.reshape(dx, x.shape)), variables, x, weights)


@kernels_only
@pytest.mark.parametrize('shape', ['kernels', 'images in vectors'])
def test_inference_by_kernels_has_a_gradient(shape, monkeypatch):
  module, variables, x, weights = problem(shape)

  def loss(x):
    return jnp.sum(block_of(module, None).apply(variables, as_features(x, False, None), False).values * weights)

  found = jax.jit(jax.grad(loss))(x)
  monkeypatch.setenv('PARANET_NATIVE', 'off')
  close(found, jax.jit(jax.grad(lambda x: loss(x)))(x))


@kernels_only
@pytest.mark.parametrize('shape', ['kernels', 'images in vectors'])
def test_parameters_that_were_cast_are_not_read_as_float32(shape, standard_promotion):
  """The statistics stay float32, as where only a network's parameters are cast; of a layer, its second kernel then."""
  module, variables, x, _ = problem(shape)
  cast = variables | {'params': jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), variables['params'])}

  @jax.jit
  def block(variables):
    return block_of(module, None).apply(variables, as_features(x, False, None), False).values

  assert distance(block(cast), block(variables)) < 0.02


@kernels_only
@pytest.mark.parametrize('shape', ['kernels', 'images in vectors'])
@pytest.mark.parametrize('train', [False, True])
def test_kernels_hide_no_nan(shape, train):
  """A ReLU that made them 0 would let a diverged network train on, and answer."""
  module, variables, x, _ = problem(shape)
  x = np.array(x)
  x[3, 1, 2, 0] = np.nan

  @jax.jit
  def run(x):
    features = as_features(x, train, None)
    return block_of(module, None).apply(variables, features, train, mutable=['batch_stats'])[0].values

  new = np.s_[..., x.shape[-1] :]
  found = np.isnan(run(x))[new]
  assert found[3, 1, 2].all()
  np.testing.assert_array_equal(found, np.isnan(plain_block(variables, x, train)[0])[new])


@kernels_only
def test_an_image_has_the_same_bits_in_every_batch():
  """Also where threads share images, instead of taking some each; only whole vectors of images differ in their bits."""
  module, variables, x, _ = problem('images in vectors')
  run = jax.jit(lambda x: block_of(module, None).apply(variables, as_features(x, False, None), False).values)
  np.testing.assert_array_equal(run(x)[16:32], run(x[16:32]))
  np.testing.assert_array_equal(run(x[:7])[4:5], run(x[4:5]))


@kernels_only
@pytest.mark.parametrize(
  'shape, used',
  [((48, 4, 4, 90), True), ((50, 4, 4, 90), False), ((48, 4, 6, 90), False), ((48, 64, 64, 90), False)],
  ids=['as they are', 'vectors not full', 'odd width', 'too large for the caches'],
)
def test_kernels_with_images_in_vectors_are_used_where_they_fit(shape, used):
  chosen = dense_block.inference_kernels(shape, 3, 48, 12, np.float32)
  assert isinstance(chosen, native_inference.Kernels) == used


@kernels_only
def test_all_batches_of_a_network_use_kernels_in_inference(monkeypatch):
  layer = 16 * (48 * (24 + 9 * 12))  # Multiply-adds for one image.
  monkeypatch.setattr(native_inference, 'MIN_MACS', 64 * layer)
  for batch in (1, 16, 64):
    assert dense_block.inference_kernels((batch, 4, 4, 24), 1, 48, 12, np.float32)
  monkeypatch.setattr(native_inference, 'MIN_MACS', 64 * layer + 1)
  assert dense_block.inference_kernels((64, 4, 4, 24), 1, 48, 12, np.float32) is None


@kernels_only
def test_vmapped_runs_use_the_kernels_one_after_the_other():
  module, variables, x, weights = problem('kernels')
  run = functools.partial(gradients, functools.partial(block_loss, block_of(module, 1)))
  arguments = variables, x, weights
  twice = functools.partial(jax.tree.map, lambda leaf: np.stack([leaf, leaf]))
  close(jax.jit(jax.vmap(run))(*twice(arguments)), twice(run(*arguments)))


@kernels_only
@pytest.mark.parametrize(
  'change, used',
  [(None, True), *((why, False) for why in ('off', 'another type', 'half kernels', 'few pixels', 'no compiler'))],
)
def test_kernels_are_used_where_they_exist(change, used, monkeypatch):
  module, variables, x, _ = problem('kernels')
  if change == 'off':
    monkeypatch.setenv('PARANET_NATIVE', 'off')
  if change == 'few pixels':
    monkeypatch.setattr(native_dense, 'MIN_MACS', 10**9)
  if change == 'no compiler':
    monkeypatch.setattr(kept_programs, '_asked', {})
    monkeypatch.setattr(native_dense, '_compiled', native_dense._compiled.__wrapped__)
    monkeypatch.setattr(native_dense, 'shared_library', lambda *_: None)
  if change == 'half kernels':
    variables = jax.tree.map(lambda leaf: leaf.astype(np.float16) if leaf.ndim > 1 else leaf, variables)
  x = x.astype(np.float16) if change == 'another type' else x
  block = block_of(module, 1)
  features = jax.eval_shape(lambda: as_features(x, True, None))
  program = jax.make_jaxpr(lambda features: block.apply(variables, features, True, mutable=['batch_stats']))(features)
  assert ('ffi_call' in str(program)) == used


def test_half_precision(standard_promotion):
  """As close to float32 as the plain block in bfloat16; parameter gradients and statistics are float32."""
  module, variables, x, weights = problem('many pixels')
  half = x.astype(jnp.bfloat16), weights.astype(jnp.bfloat16)
  outputs, found = gradients(functools.partial(block_loss, block_of(module, 2)), variables, *half)
  assert outputs[0].dtype == found[1].dtype == jnp.bfloat16
  chex.assert_trees_all_equal_dtypes((outputs[1], found[0]), jax.tree.map(jnp.float32, (outputs[1], found[0])))
  exact_outputs, exact = gradients(functools.partial(module_loss, module), variables, x, weights)
  _, theirs = gradients(functools.partial(module_loss, module.clone(dtype=jnp.bfloat16)), variables, *half)
  assert distance(outputs[0], exact_outputs[0]) < 0.01
  # Rounding turns some units on or off, so single gradients differ by tenths; overall they agree.
  errors, their_errors = jax.tree.map(distance, found, exact), jax.tree.map(distance, theirs, exact)
  assert np.median(jax.tree.leaves(errors)) < 1.5 * np.median(jax.tree.leaves(their_errors)) < 0.2


def distance(found, wanted):
  found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
  return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def test_one_buffer_is_kept_for_the_backward_pass():
  """The features and the bottlenecks are kept once, not the inputs of every layer."""
  module, variables, x, _ = problem('even')
  layers = module.num_layers
  block = block_of(module, 1)

  def forward(params):
    features = as_features(x, True, None)
    variables_ = {'params': params, 'batch_stats': variables['batch_stats']}
    return block.apply(variables_, features, True, mutable=['batch_stats'])[0].values

  out, backward = jax.eval_shape(lambda: jax.vjp(forward, variables['params']))
  kept = sum(leaf.size for leaf in jax.tree.leaves(backward) if leaf.size >= x[..., :1].size)
  bottlenecks = layers * module.bn_size * module.growth_rate * x[..., 0].size
  assert kept <= out.size + bottlenecks + x.size


def close(found, wanted, tolerance=1e-5):
  """Compares leaves, with a tolerance relative to the largest value of each."""

  def check(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(np.abs(wanted).max(), 1e-3))

  jax.tree.map(check, found, wanted)


@pytest.mark.parametrize('convolve, channels', [(image_conv3x3, 3), (conv3x3, 1)])
@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
def test_convolutions(convolve, backend, channels, monkeypatch):
  """A matrix product on one backend and a convolution on others give the same values and gradients."""
  random = np.random.default_rng(0)
  image = random.normal(size=(2, 6, 5, channels)).astype(np.float32)
  kernel = random.normal(size=(3, 3, channels, 4)).astype(np.float32)
  monkeypatch.setattr(dense_block, 'MANY_PIXELS', 60)
  weights = random.normal(size=(2, 6, 5, 4)).astype(np.float32)

  def both(image, kernel, weights):
    out, backward = jax.vjp(convolve, image, kernel)
    return out, backward(weights)[1]

  with compiling_for(backend):
    program = str(jax.make_jaxpr(lambda *arguments: convolve(*arguments))(image, kernel))
    out, gradient = jax.jit(both)(image, kernel, weights)
  assert ('conv_general_dilated' in program) == (backend == 'gpu')
  padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
  close(out, np.einsum('bhwcij,ijck->bhwk', windows, kernel))
  close(gradient, np.einsum('bhwcij,bhwk->ijck', windows, weights))
