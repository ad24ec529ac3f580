"""The parts of DenseNet-BC (Huang et al. 2017) as linen modules: dense block, transition, exit.

They exchange `Features`: raw channels in inference, normalized channels with their moments in training, so that each
channel's batch statistics are computed once (see `dense_block.py`). Parameters have the names and shapes of a plain
DenseNet built from `nn.BatchNorm` and `nn.Conv`.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from paranet_jax.models.layers.backend import PLAIN, SHAPES, backend
from paranet_jax.models.layers.dense_block import (
  EPSILON,
  SCAN_LAYERS,
  Layer,
  Moments,
  affine_relu,
  conv1x1,
  conv3x3,
  dense_block_inference,
  dense_block_training,
  image_conv3x3,
  normalize,
  product,
)
from paranet_jax.models.layers.drop import dropout
from paranet_jax.models.layers.initial import kernel_init
from paranet_jax.models.layers.native_inference import (
  Kernels,
  differentiable,
  entry_kernels,
  in_float32,
  pooling_kernels,
)

MOMENTUM = 0.9  # 0.1 in PyTorch's convention, as in DenseNet's original training.


class Features(NamedTuple):
  """Raw features with no moments in inference; normalized features and their moments in training."""

  values: Float[Array, 'B H W C']
  moments: Moments | None = None


def as_features(x: Float[Array, 'B H W C'], train: bool, axis_name: str | None) -> Features:
  """Wraps raw features, normalizing them in training."""
  if not train:
    return Features(x)
  values, moments = normalize(x, axis_name)
  # Otherwise jax would trace a gradient for every running statistic.
  return Features(values, lax.stop_gradient(moments))


def concatenate(first: Features, second: Features) -> Features:
  """Concatenates the channels of both."""
  values = jnp.concatenate([first.values, second.values], axis=-1)
  if first.moments is None or second.moments is None:
    return Features(values)
  pairs = zip(first.moments, second.moments, strict=True)
  return Features(values, Moments(*(jnp.concatenate(pair) for pair in pairs)))


def parameter(module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> Array:
  """`module.param`, except that flax does not trace `init` to check the shape of an existing parameter.

  Where only shapes are wanted, neither a random key nor an initial value is traced.
  """
  if backend() == SHAPES and module.is_mutable_collection('params'):
    module.put_variable('params', name, np.broadcast_to(np.float32(0), shape))
  if module.has_variable('params', name):
    return module.get_variable('params', name)
  return module.param(name, init, shape)


class BatchNorm(nn.Module):
  """Batch normalization as a scale and a shift, of normalized features in training and raw ones in inference."""

  channels: int

  def setup(self):
    shape = (self.channels,)
    self.scale = parameter(self, 'scale', nn.initializers.ones, shape)
    self.bias = parameter(self, 'bias', nn.initializers.zeros, shape)
    # NumPy's, because they are constants that need not be traced.
    self.mean = self.variable('batch_stats', 'mean', np.zeros, shape, np.float32)
    self.var = self.variable('batch_stats', 'var', np.ones, shape, np.float32)

  def __call__(self, train: bool) -> tuple[Float[Array, ' C'], Float[Array, ' C']]:
    """Scale and shift; in inference they include the running statistics."""
    if train:
      return self.scale, self.bias
    scale = self.scale * lax.rsqrt(self.var.value + EPSILON)
    return scale, self.bias - self.mean.value * scale

  def update(self, moments: Moments) -> None:
    """Updates the running statistics."""
    self.mean.value = MOMENTUM * self.mean.value + (1 - MOMENTUM) * moments.mean
    self.var.value = MOMENTUM * self.var.value + (1 - MOMENTUM) * moments.var


def average_pool(x: Float[Array, 'B H W C']) -> Float[Array, 'B H/2 W/2 C']:
  """2x2 average pooling."""
  if backend() == PLAIN:
    return nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
  # Several times faster on a CPU than a window reduction, forward and backward.
  return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def global_average(x: Float[Array, 'B H W C']) -> Float[Array, 'B C']:
  """Mean over height and width, in float32."""
  if backend() == PLAIN:
    return jnp.squeeze(nn.avg_pool(x.astype(jnp.float32), window_shape=x.shape[1:3]), (1, 2))
  return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


def max_pool(x: Float[Array, 'B H W C']) -> Float[Array, 'B H/2 W/2 C']:
  """2x2 max pooling; equal maxima share the gradient."""
  if backend() == PLAIN:
    return nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
  # The gradient of a window reduction is tens of times slower on a CPU.
  rows = jnp.maximum(x[:, ::2], x[:, 1::2])
  return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])


def overlapping_max_pool(x: Float[Array, 'B H W C']) -> Float[Array, 'B H/2 W/2 C']:
  """3x3 max pooling with stride 2, padded by one; H and W are even."""
  if backend() == PLAIN:
    padded = jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)), constant_values=-jnp.inf)
    return nn.max_pool(padded, window_shape=(3, 3), strides=(2, 2))
  return _overlapping_max(_overlapping_max(x).swapaxes(1, 2)).swapaxes(1, 2)


def _overlapping_max(x: Array) -> Array:
  even, odd = x[:, ::2], x[:, 1::2]
  before = jnp.concatenate([even[:, :1], odd[:, :-1]], axis=1)  # Repeating a row gives the same maximum as padding.
  return jnp.maximum(jnp.maximum(even, odd), before)


def pooled_activation(
  x: Float[Array, 'B H W C'], scale: Float[Array, ' C'], shift: Float[Array, ' C'], train: bool
) -> Float[Array, 'B H/2 W/2 C']:
  """The 2x2 averages of relu(scale x + shift)."""
  return _reduced_activation(average_pool, Kernels.pooled, train, x, scale, shift)


def averaged_activation(
  x: Float[Array, 'B H W C'], scale: Float[Array, ' C'], shift: Float[Array, ' C'], train: bool
) -> Float[Array, 'B C']:
  """The mean of relu(scale x + shift) over height and width, in float32."""
  return _reduced_activation(global_average, Kernels.averaged, train, x, scale, shift)


def _reduced_activation(reduce, kernel, train, x, scale, shift):
  def plain(x, scale, shift):
    return reduce(affine_relu(x, scale, shift))

  kernels = None if train or not in_float32((scale, shift)) else pooling_kernels(x.shape, x.dtype)
  if kernels is None:
    return plain(x, scale, shift)
  return differentiable(functools.partial(kernel, kernels), plain, x, scale, shift)


def max_pooled_stem(
  images: Float[Array, 'B S S C'], kernel: Float[Array, '3 3 C K'], halvings: int, train: bool
) -> Float[Array, 'B side side K']:
  """The 3x3 convolution of images, halved by 2x2 max pools."""

  def plain(images, kernel):
    x = image_conv3x3(images, kernel)
    for _ in range(halvings):
      x = max_pool(x)
    return x

  kernels = None
  if not train and in_float32([kernel]):
    kernels = entry_kernels(images.shape, kernel.shape[-1], halvings, images.dtype)
  if kernels is None:
    return plain(images, kernel)
  return differentiable(functools.partial(kernels.entry, halvings=halvings), plain, images, kernel)


def norm_affine(x: Features, train: bool, name: str) -> tuple[Float[Array, ' C'], Float[Array, ' C']]:
  """Scale and shift of a batch normalization that reads these features; call it inside a compact method."""
  norm = BatchNorm(x.values.shape[-1], name=name)
  if x.moments is not None:
    norm.update(x.moments)
  return norm(train)


class Kernel(nn.Module):
  """The kernel of a convolution without bias."""

  shape: tuple[int, int, int, int]

  @nn.compact
  def __call__(self) -> Float[Array, 'height width C features']:
    return parameter(self, 'kernel', kernel_init, self.shape)


class DenseLayer(nn.Module):
  """The parameters of BN-ReLU-Conv1x1(bn_size k)-BN-ReLU-Conv3x3(k)."""

  channels: int
  growth_rate: int
  bn_size: int

  def setup(self):
    width = self.bn_size * self.growth_rate
    self.norm1 = BatchNorm(self.channels)
    self.conv1 = Kernel((1, 1, self.channels, width))
    self.norm2 = BatchNorm(width)
    self.conv2 = Kernel((3, 3, width, self.growth_rate))

  def __call__(self, train: bool) -> Layer:
    scale2, shift2 = self.norm2(train)
    kernel1 = self.conv1()[0, 0]
    # In inference the second normalization's scale folds into the 1x1 convolution before it.
    return Layer(*self.norm1(train), kernel1 if train else kernel1 * scale2, scale2, shift2, self.conv2())

  def update(self, features: Moments, bottleneck: Moments) -> None:
    """Updates the running statistics of both normalizations."""
    self.norm1.update(features)
    self.norm2.update(bottleneck)


class DenseBlock(nn.Module):
  """`num_layers` dense layers, each reading all features before it: C -> C + num_layers k channels.

  Attributes:
    growth_rate: k, channels that a layer adds.
    bn_size: bottleneck width, in multiples of k.
    scan_layers: layers per segment (see `dense_block.py`), which changes speed, memory and compile time but not the
      result; None: the backend's default.
    dropout: rate after each convolution in training (Huang et al. 2017, section 4.2), which needs a `dropout` key.
  """

  num_layers: int
  growth_rate: int
  bn_size: int = 4
  scan_layers: int | None = None
  axis_name: str | None = None
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: Features, train: bool) -> Features:
    channels = [x.values.shape[-1] + i * self.growth_rate for i in range(self.num_layers)]
    modules = [
      DenseLayer(width, self.growth_rate, self.bn_size, name=f'layer_{i}') for i, width in enumerate(channels, 1)
    ]
    if train and self.dropout:
      return self._train_with_dropout(x, modules)
    layers = [module(train or backend() == SHAPES) for module in modules]
    if backend() == SHAPES:
      return Features(jnp.zeros((*x.values.shape[:-1], channels[-1] + self.growth_rate), x.values.dtype))
    if x.moments is None:
      return Features(dense_block_inference(x.values, layers))
    scan_layers = self.scan_layers or SCAN_LAYERS.get(backend(), 1)
    values, *added = dense_block_training(x.values, layers, scan_layers, self.axis_name)
    new, bottlenecks = lax.stop_gradient(added)
    moments = Moments(*(jnp.concatenate([old, part.ravel()]) for old, part in zip(x.moments, new, strict=True)))
    for i, (module, width) in enumerate(zip(modules, channels, strict=True)):
      module.update(
        Moments(*(lax.slice_in_dim(moment, 0, width) for moment in moments)),
        Moments(*(lax.index_in_dim(moment, i, keepdims=False) for moment in bottlenecks)),
      )
    return Features(values, moments)

  def _train_with_dropout(self, x: Features, modules: list[DenseLayer]) -> Features:
    """The same block, layer by layer, differentiated by jax."""
    for module in modules:
      layer = module(True)
      values = affine_relu(x.values, layer.scale1, layer.shift1)
      values = product(values, layer.kernel1)
      values = dropout(values, self.dropout, self.make_rng('dropout'), self.axis_name)
      bottleneck = as_features(values, True, self.axis_name)
      values = conv3x3(affine_relu(bottleneck.values, layer.scale2, layer.shift2), layer.kernel2)
      values = dropout(values, self.dropout, self.make_rng('dropout'), self.axis_name)
      assert x.moments and bottleneck.moments
      module.update(x.moments, bottleneck.moments)
      x = concatenate(x, as_features(values, True, self.axis_name))
    return x


def kept_channels(share: float, channels: int) -> int:
  """Channels that a transition keeps: this share of them, rounded down, but at least one."""
  return max(math.floor(share * channels), 1)


class Transition(nn.Module):
  """BN-ReLU-Conv1x1-AvgPool2x2, which halves the side: C -> floor(compression C) channels, but at least one.

  Attributes:
    compression: theta of DenseNet-BC; ParaNet does not compress (paper, section 4).
    dropout: rate after the convolution in training, which needs a `dropout` key.
  """

  axis_name: str | None = None
  compression: float = 1.0
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: Features, train: bool) -> Features:
    channels = x.values.shape[-1]
    norm = norm_affine(x, train, 'norm')
    kernel = Kernel((1, 1, channels, kept_channels(self.compression, channels)), name='conv')()[0, 0]
    if train and self.dropout:
      values = conv1x1(affine_relu(x.values, *norm), kernel)
      values = average_pool(dropout(values, self.dropout, self.make_rng('dropout'), self.axis_name))
    else:
      # A 1x1 convolution and an average pool commute, so pooling first does the same with a quarter of the work.
      values = conv1x1(pooled_activation(x.values, *norm, train), kernel)
    return as_features(values, train, self.axis_name)


class Exit(nn.Module):
  """BN-ReLU-global average pool-Linear, to float32 logits."""

  num_classes: int

  @nn.compact
  def __call__(self, x: Features, train: bool) -> Float[Array, 'B classes']:
    values = averaged_activation(x.values, *norm_affine(x, train, 'norm'), train)
    return nn.Dense(self.num_classes, kernel_init=kernel_init, name='classifier')(values)
