"""Convolution, batch normalization and classifier for networks without dense blocks: arrays in, arrays out.

Parameters have the names and shapes of `nn.Conv` without bias, `nn.BatchNorm` and `nn.Dense`. Call the functions that
take a `name` inside a compact method.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from paranet_jax.models.layers.backend import PLAIN, backend
from paranet_jax.models.layers.dense import as_features, global_average, norm_affine, parameter
from paranet_jax.models.layers.dense_block import affine_relu, product
from paranet_jax.models.layers.initial import kernel_init


def convolve(
  x: Float[Array, 'B H W C'], kernel: Float[Array, 'h w C K'], stride: int = 1
) -> Float[Array, 'B H/stride W/stride K']:
  """Convolution with a kernel of odd height and width, zero-padded by half the kernel; output sides round up."""
  kernel = kernel.astype(x.dtype)
  height, width = kernel.shape[:2]
  if height == width == 1 and backend() != PLAIN:
    return product(x[:, ::stride, ::stride], kernel[0, 0])
  padding = [(size // 2, size // 2) for size in (height, width)]
  return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def batch_norm(x: Float[Array, 'B H W C'], train: bool, axis_name: str | None, name: str) -> Float[Array, 'B H W C']:
  """Batch normalization of raw features; in training, statistics are shared over the device axis."""
  features = as_features(x, train, axis_name)
  scale, shift = norm_affine(features, train, name)
  return (features.values.astype(jnp.float32) * scale + shift).astype(x.dtype)


def batch_norm_relu(
  x: Float[Array, 'B H W C'], train: bool, axis_name: str | None, name: str
) -> Float[Array, 'B H W C']:
  """`batch_norm`, then ReLU."""
  features = as_features(x, train, axis_name)
  return affine_relu(features.values, *norm_affine(features, train, name))


class Conv(nn.Module):
  """Convolution with a square kernel and no bias."""

  features: int
  kernel_size: int = 3
  stride: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H/stride W/stride features']:
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    return convolve(x, parameter(self, 'kernel', kernel_init, shape), self.stride)


class ConvNormRelu(nn.Module):
  """Conv-BN-ReLU."""

  features: int
  kernel_size: int = 3
  stride: int = 1
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C'], train: bool) -> Float[Array, 'B H/stride W/stride features']:
    x = Conv(self.features, self.kernel_size, self.stride, name='conv')(x)
    return batch_norm_relu(x, train, self.axis_name, 'norm')


class Classifier(nn.Module):
  """Global average pool-Linear, to float32 logits."""

  num_classes: int

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B classes']:
    return nn.Dense(self.num_classes, kernel_init=kernel_init, name='classifier')(global_average(x))
