"""Convolution, batch normalization and classifier for networks that are not dense: arrays in, arrays out.

Parameters have the names and shapes of `nn.Conv` without bias, `nn.BatchNorm` and `nn.Dense`, whatever computes with
them. Call the functions that take a `name` inside a compact method.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from paranet_jax.models.layers.backend import PLAIN, backend
from paranet_jax.models.layers.dense import as_features, global_average, norm_affine
from paranet_jax.models.layers.dense_block import affine_relu
from paranet_jax.models.layers.initial import kernel_init


def convolve(x: Array, kernel: Array, stride: int = 1) -> Array:
  """Convolution, zero-padded by half the kernel on every side.

  Args:
    x: [B, H, W, C].
    kernel: [h, w, C, K] of odd h and w, cast to x's dtype.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), K].
  """
  kernel = kernel.astype(x.dtype)
  height, width = kernel.shape[:2]
  if height == width == 1 and backend() != PLAIN:
    return x[:, ::stride, ::stride] @ kernel[0, 0]
  padding = [(size // 2, size // 2) for size in (height, width)]
  return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def batch_norm(x: Array, train: bool, axis_name: str | None, name: str) -> Array:
  """Batch normalization of raw features [B, H, W, C], its statistics shared over the device axis in training."""
  features = as_features(x, train, axis_name)
  scale, shift = norm_affine(features, train, name)
  return (features.values.astype(jnp.float32) * scale + shift).astype(x.dtype)


def batch_norm_relu(x: Array, train: bool, axis_name: str | None, name: str) -> Array:
  """`batch_norm`, then ReLU."""
  features = as_features(x, train, axis_name)
  return affine_relu(features.values, *norm_affine(features, train, name))


class Conv(nn.Module):
  """Convolution without bias of a square kernel: [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features]."""

  features: int
  kernel_size: int = 3
  stride: int = 1

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    return convolve(x, self.param('kernel', kernel_init, shape), self.stride)


class ConvNormRelu(nn.Module):
  """Conv-BN-ReLU: [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features]."""

  features: int
  kernel_size: int = 3
  stride: int = 1
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    x = Conv(self.features, self.kernel_size, self.stride, name='conv')(x)
    return batch_norm_relu(x, train, self.axis_name, 'norm')


class Classifier(nn.Module):
  """Global average pool-Linear: [B, H, W, C] -> float32 logits [B, num_classes]."""

  num_classes: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = global_average(x)
    return nn.Dense(self.num_classes, kernel_init=kernel_init, name='classifier')(x)
