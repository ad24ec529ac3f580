"""The parts of DenseNet-BC (Huang et al. 2017): dense layer, dense block, transition, and the exit.

All take and return features [B, H, W, C]. `train=True` normalizes with the batch's statistics and updates the running
ones; otherwise the running ones are used. With `axis_name` the batch is the one of all devices of that axis.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

# He et al. (2015) by fan-out and a uniform classifier: what the DenseNet authors' code does.
conv_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
classifier_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def norm_relu(x: Array, train: bool, name: str, dtype: Any, axis_name: str | None) -> Array:
  """Batch normalization `name`, then ReLU: [B, H, W, C] -> [B, H, W, C]. Statistics are float32 whatever the dtype."""
  norm = nn.BatchNorm(
    use_running_average=not train,
    momentum=0.9,  # PyTorch's 0.1, with which DenseNet was trained.
    epsilon=1e-5,
    dtype=dtype,
    axis_name=axis_name,
    name=name,
  )
  return nn.relu(norm(x))


def average_pool(x: Array) -> Array:
  """2x2 average pooling: [B, H, W, C] -> [B, H / 2, W / 2, C]."""
  # Several times as fast on a CPU as a window reduction, forward and backward.
  return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


class DenseLayer(nn.Module):
  """BN-ReLU-Conv1x1(bn_size k)-BN-ReLU-Conv3x3(k): [B, H, W, C] -> the k new features [B, H, W, k].

  Attributes:
    growth_rate: k, new channels.
    bn_size: bottleneck width, in multiples of k.
  """

  growth_rate: int
  bn_size: int = 4
  dtype: Any = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    width = self.bn_size * self.growth_rate
    x = norm_relu(x, train, 'norm1', self.dtype, self.axis_name)
    x = nn.Conv(width, (1, 1), use_bias=False, dtype=self.dtype, kernel_init=conv_init, name='conv1')(x)
    x = norm_relu(x, train, 'norm2', self.dtype, self.axis_name)
    return nn.Conv(self.growth_rate, (3, 3), use_bias=False, dtype=self.dtype, kernel_init=conv_init, name='conv2')(x)


class DenseBlock(nn.Module):
  """`num_layers` dense layers, each reading all features before it: [B, H, W, C] -> [B, H, W, C + num_layers k]."""

  num_layers: int
  growth_rate: int
  bn_size: int = 4
  dtype: Any = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    for index in range(1, self.num_layers + 1):
      layer = DenseLayer(self.growth_rate, self.bn_size, self.dtype, self.axis_name, name=f'layer_{index}')
      x = jnp.concatenate([x, layer(x, train)], axis=-1)
    return x


class Transition(nn.Module):
  """BN-ReLU-Conv1x1(C -> C)-AvgPool2x2: [B, H, W, C] -> [B, H / 2, W / 2, C]; no compression (paper, section 4)."""

  dtype: Any = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    channels = x.shape[-1]
    x = norm_relu(x, train, 'norm', self.dtype, self.axis_name)
    # A 1x1 convolution and an average pool commute: pooling first is the same function at a quarter of the work.
    x = average_pool(x)
    return nn.Conv(channels, (1, 1), use_bias=False, dtype=self.dtype, kernel_init=conv_init, name='conv')(x)


class Exit(nn.Module):
  """BN-ReLU-global average pool-Linear: [B, H, W, C] -> float32 logits [B, num_classes]."""

  num_classes: int
  dtype: Any = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    x = norm_relu(x, train, 'norm', self.dtype, self.axis_name)
    x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
    return nn.Dense(self.num_classes, kernel_init=classifier_init, name='classifier')(x)
