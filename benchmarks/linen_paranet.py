"""PN3 in Flax linen as one writes it at first: BatchNorm, Conv, concatenate. Parameters are named as the package's."""

from collections.abc import Iterable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array


class Layer(nn.Module):
  """A dense layer: [B, H, W, C] -> [B, H, W, C + k]."""

  growth_rate: int
  axis_name: str | None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    y = norm_relu(x, train, self.axis_name, 'norm1')
    y = nn.Conv(4 * self.growth_rate, (1, 1), use_bias=False, name='conv1')(y)
    y = norm_relu(y, train, self.axis_name, 'norm2')
    y = nn.Conv(self.growth_rate, (3, 3), use_bias=False, name='conv2')(y)
    return jnp.concatenate([x, y], axis=-1)


class Block(nn.Module):
  """A dense block."""

  layers: int
  growth_rate: int
  axis_name: str | None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    for index in range(1, self.layers + 1):
      x = Layer(self.growth_rate, self.axis_name, name=f'layer_{index}')(x, train)
    return x


class Transition(nn.Module):
  """Halves the side; pools first, which is the same function at less work."""

  axis_name: str | None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    x = nn.avg_pool(norm_relu(x, train, self.axis_name, 'norm'), (2, 2), (2, 2))
    return nn.Conv(x.shape[-1], (1, 1), use_bias=False, name='conv')(x)


class Exit(nn.Module):
  """Logits [B, num_classes]."""

  num_classes: int
  axis_name: str | None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    x = norm_relu(x, train, self.axis_name, 'norm').mean(axis=(1, 2))
    return nn.Dense(self.num_classes, name='classifier')(x)


class LinenParaNet(nn.Module):
  """PN<P> with the cascade. Takes normalized images [B, S, S, C]; gives a list of logits, None where not asked for."""

  num_pipelines: int
  num_classes: int
  layers: int
  growth_rate: int
  axis_name: str | None = None

  @nn.compact
  def __call__(self, images: Array, train: bool = False, exits: Iterable[int] | None = None) -> list[Array | None]:
    exits = range(1, self.num_pipelines + 1) if exits is None else tuple(exits)
    features = {}
    for pipeline in range(1, max(exits) + 1):
      x = nn.Conv(2 * self.growth_rate, (3, 3), use_bias=False, name=f'pipeline_{pipeline}_stem')(images)
      for _ in range(self.num_pipelines + 1 - pipeline):
        x = nn.max_pool(x, (2, 2), (2, 2))
      for block in range(1, pipeline + 1):
        if block > 1:
          own = Transition(self.axis_name, name=f'pipeline_{pipeline}_transition_{block - 1}')(x, train)
          x = jnp.concatenate([own, features[pipeline - 1, block - 1]], axis=-1)
        x = Block(self.layers, self.growth_rate, self.axis_name, name=f'pipeline_{pipeline}_block_{block}')(x, train)
        features[pipeline, block] = x
    logits = [None] * self.num_pipelines
    for number in exits:
      head = Exit(self.num_classes, self.axis_name, name=f'exit_{number}')
      logits[number - 1] = head(features[number, number], train)
    return logits


def norm_relu(x: Array, train: bool, axis_name: str | None, name: str) -> Array:
  """Batch normalization `name` of the calling module, and ReLU."""
  return nn.relu(nn.BatchNorm(not train, momentum=0.9, axis_name=axis_name, name=name)(x))
