"""Layers with PyTorch's arithmetic, whose parameters `tensors.py` maps by their names.

Parameters: `kernel` (HWIO, or [in, out]), `bias`, `scale`, and the running statistics `mean` and `var`; all float32.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from paranet_jax.models.adopted.architecture import Mode
from paranet_jax.models.layers.backend import PLAIN, backend
from paranet_jax.models.layers.conv import convolve
from paranet_jax.models.layers.dense import global_average, overlapping_max_pool, parameter
from paranet_jax.models.layers.dense_block import product
from paranet_jax.models.layers.initial import kernel_init

token_init = nn.initializers.normal(0.02)
"""Initializer of tokens and positions, as in timm."""
LAYER_SCALE = 1e-6
"""Initial value of what scales a block of ConvNeXt, as in torchvision."""


class Conv(nn.Module):
  """Convolution with a square kernel.

  Attributes:
    padding: pixels on each side, or 'SAME', as TensorFlow pads; None: half the kernel.
    groups: of channels; as many as the input has: depthwise.
  """

  features: int
  kernel_size: int = 3
  stride: int = 1
  padding: int | str | None = None
  groups: int = 1
  bias: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B h w features']:
    size = self.kernel_size
    kernel = parameter(self, 'kernel', kernel_init, (size, size, x.shape[-1] // self.groups, self.features))
    x = self._convolve(x, kernel.astype(x.dtype))
    return x + parameter(self, 'bias', nn.initializers.zeros, (self.features,)).astype(x.dtype) if self.bias else x

  def _convolve(self, x, kernel):
    size, stride, depthwise = self.kernel_size, self.stride, self.groups == x.shape[-1] == self.features
    if self.groups == 1 and self.padding in (None, size // 2) and size % 2:
      return convolve(x, kernel, stride)
    if self.groups == 1 and size == stride and self.padding == 0 and backend() != PLAIN:
      return product(_patches(x, size), kernel.reshape(-1, self.features))
    padding = [self._padding(side) for side in x.shape[1:3]]
    if depthwise and backend() == 'cpu':
      return _depthwise(x, kernel[:, :, 0], stride, padding)
    groups = self.groups
    if backend() == 'cpu':  # Several times faster than a convolution in groups, although most weights are 0.
      kernel, groups = _ungrouped(kernel, groups), 1
    dimensions = ('NHWC', 'HWIO', 'NHWC')
    return lax.conv_general_dilated(
      x, kernel, (stride, stride), padding, dimension_numbers=dimensions, feature_group_count=groups
    )

  def _padding(self, side):
    if self.padding == 'SAME':
      total = max((-(-side // self.stride) - 1) * self.stride + self.kernel_size - side, 0)
      return total // 2, total - total // 2
    both = self.kernel_size // 2 if self.padding is None else int(self.padding)
    return both, both


def _patches(x, size):
  """[B, H, W, C] -> [B, H / size, W / size, size size C]; what is left over at the ends is dropped."""
  batch, height, width, channels = x.shape
  rows, columns = height // size, width // size
  x = x[:, : rows * size, : columns * size].reshape(batch, rows, size, columns, size, channels)
  return x.swapaxes(2, 3).reshape(batch, rows, columns, -1)


def _depthwise(x, kernel, stride, padding):
  """A depthwise convolution as a sum of shifted images: 5 to 40 times as fast as XLA's, on 2 cores of an AMD EPYC."""
  wide = jnp.pad(x, ((0, 0), *padding, (0, 0))).astype(jnp.promote_types(x.dtype, jnp.float32))
  kernel, size = kernel.astype(wide.dtype), len(kernel)
  rows, columns = ((side - size) // stride * stride + 1 for side in wide.shape[1:3])
  total = jnp.zeros((), wide.dtype)
  for row in range(size):
    for column in range(size):
      shifted = wide[:, row : row + rows : stride, column : column + columns : stride]
      total = total + shifted * kernel[row, column]
  return total.astype(x.dtype)


def _ungrouped(kernel, groups):
  """The kernel of a convolution without groups, with zeros between the groups."""
  height, width, inputs, features = kernel.shape
  own = kernel.reshape(height, width, inputs, groups, features // groups)
  dense = jnp.einsum('hwigo,gk->hwkigo', own, jnp.eye(groups, dtype=kernel.dtype))
  return dense.reshape(height, width, groups * inputs, features)


class BatchNorm(nn.Module):
  """Batch normalization; in inference one scale and one shift per channel."""

  epsilon: float = 1e-5
  momentum: float = 0.9  # 0.1 in PyTorch's convention.

  @nn.compact
  def __call__(self, x: Float[Array, '*B C'], mode: Mode) -> Float[Array, '*B C']:
    shape = x.shape[-1:]
    scale = parameter(self, 'scale', nn.initializers.ones, shape)
    bias = parameter(self, 'bias', nn.initializers.zeros, shape)
    running = [
      self.variable('batch_stats', 'mean', jnp.zeros, shape),
      self.variable('batch_stats', 'var', jnp.ones, shape),
    ]
    values = x.astype(jnp.float32)
    if not mode.train:
      mean, var = (own.value for own in running)
    else:
      axes = tuple(range(x.ndim - 1))
      mean, square = jnp.mean(values, axes), jnp.mean(jnp.square(values), axes)
      if mode.axis_name:
        mean, square = lax.pmean((mean, square), mode.axis_name)
      var = jnp.maximum(square - jnp.square(mean), 0)
      if not self.is_initializing():
        for own, new in zip(running, (mean, var), strict=True):
          own.value = self.momentum * own.value + (1 - self.momentum) * lax.stop_gradient(new)
    factor = scale * lax.rsqrt(var + self.epsilon)
    return (values * factor + (bias - mean * factor)).astype(x.dtype)


class LayerNorm(nn.Module):
  """Layer normalization over the channels."""

  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Float[Array, '*B C']) -> Float[Array, '*B C']:
    scale = parameter(self, 'scale', nn.initializers.ones, x.shape[-1:])
    bias = parameter(self, 'bias', nn.initializers.zeros, x.shape[-1:])
    values = x.astype(jnp.float32)
    values = values - jnp.mean(values, -1, keepdims=True)
    values *= lax.rsqrt(jnp.mean(jnp.square(values), -1, keepdims=True) + self.epsilon)
    return (values * scale + bias).astype(x.dtype)


class Linear(nn.Module):
  """x W + b."""

  features: int
  bias: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, '*B C']) -> Float[Array, '*B features']:
    kernel = parameter(self, 'kernel', kernel_init, (x.shape[-1], self.features))
    x = product(x, kernel)
    return x + parameter(self, 'bias', nn.initializers.zeros, (self.features,)).astype(x.dtype) if self.bias else x


class ConvNorm(nn.Module):
  """Convolution and batch normalization, called 0 and 1 as in torchvision's Conv2dNormActivation."""

  features: int
  kernel_size: int = 3
  stride: int = 1
  groups: int = 1
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C'], mode: Mode) -> Float[Array, 'B h w features']:
    x = Conv(self.features, self.kernel_size, self.stride, groups=self.groups, name='0')(x)
    return BatchNorm(self.epsilon, name='1')(x, mode)


class SqueezeExcitation(nn.Module):
  """x times one weight per channel, computed from the channels' means (Hu et al. 2018), as in torchvision.

  Attributes:
    squeezed: channels to which the means are reduced.
    activation: of these.
    gate: maps the weights to 0..1.
  """

  squeezed: int
  activation: Callable[[Any], Any]
  gate: Callable[[Any], Any]

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
    means = global_average(x).astype(x.dtype)[:, None, None]
    weights = self.activation(Conv(self.squeezed, 1, bias=True, name='fc1')(means))
    return x * self.gate(Conv(x.shape[-1], 1, bias=True, name='fc2')(weights))


def max_pool(x: Float[Array, 'B H W C']) -> Float[Array, 'B h w C']:
  """3x3 max pooling with stride 2, padded by one; output sides round up."""
  odd = [(0, 0), *((0, side % 2) for side in x.shape[1:3]), (0, 0)]
  return overlapping_max_pool(jnp.pad(x, odd, constant_values=-jnp.inf) if any(map(any, odd)) else x)


def pooled(x: Float[Array, 'B *places C']) -> Float[Array, 'B C']:
  """Mean over height and width, or over all tokens, in float32."""
  return global_average(x) if x.ndim == 4 else jnp.mean(x, axis=1, dtype=jnp.float32)


def relu(x: Any) -> Any:
  """max(x, 0)."""
  return jax.nn.relu(x)


def gelu(x: Any) -> Any:
  """x times the normal distribution at x, not its approximation."""
  return x * (lax.erf(x / jnp.sqrt(jnp.asarray(2, x.dtype))) + 1) / 2  # ONNX has Gelu only from opset 20.
