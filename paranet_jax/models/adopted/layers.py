"""Layers with PyTorch's arithmetic, whose parameters `tensors.py` maps by their names.

Parameters: `kernel` (HWIO, or [in, out]), `bias`, `scale`, and the running statistics `mean` and `var`; all float32.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from paranet_jax.models.adopted.architecture import Mode
from paranet_jax.models.layers.conv import convolve
from paranet_jax.models.layers.dense import global_average, parameter
from paranet_jax.models.layers.initial import kernel_init

token_init = nn.initializers.normal(0.02)
"""Initializer of tokens and positions, as in timm."""


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
    if self.groups == 1 and self.padding in (None, size // 2) and size % 2:
      x = convolve(x, kernel, self.stride)
    else:
      half = size // 2 if self.padding is None else self.padding
      x = lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (self.stride, self.stride),
        half if isinstance(half, str) else [(half, half)] * 2,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=self.groups,
      )
    return x + parameter(self, 'bias', nn.initializers.zeros, (self.features,)).astype(x.dtype) if self.bias else x


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
    x = jnp.dot(x, kernel.astype(x.dtype))
    return x + parameter(self, 'bias', nn.initializers.zeros, (self.features,)).astype(x.dtype) if self.bias else x


def pooled(x: Float[Array, 'B *places C']) -> Float[Array, 'B C']:
  """Mean over height and width, or over all tokens, in float32."""
  return global_average(x) if x.ndim == 4 else jnp.mean(x, axis=1, dtype=jnp.float32)


def relu(x: Any) -> Any:
  """max(x, 0)."""
  return jax.nn.relu(x)
