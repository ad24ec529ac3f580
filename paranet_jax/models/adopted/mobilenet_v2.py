"""torchvision's MobileNetV2 (Sandler et al. 2018)."""

import flax.linen as nn
from jax import Array
from jaxtyping import Float

from paranet_jax.models.adopted.architecture import Architecture, Mode, Parts, Preprocessing, Stage
from paranet_jax.models.adopted.layers import BatchNorm, Conv, ConvNorm, Linear, pooled

ROWS = (
  *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
  *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)
"""Table 2 of the paper: expansion of the channels, output channels, blocks, and stride of the first."""


class InvertedResidual(nn.Module):
  """Conv1x1-Depthwise3x3-Conv1x1, each with a norm, the first two with ReLU6; x is added if the shape is kept."""

  features: int
  expansion: int
  stride: int

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C'], mode: Mode) -> Float[Array, 'B h w features']:
    width, y = x.shape[-1] * self.expansion, x
    names = (f'conv.{number}' for number in range(4))
    if self.expansion > 1:
      y = nn.relu6(ConvNorm(width, 1, name=next(names))(y, mode))
    y = nn.relu6(ConvNorm(width, 3, self.stride, width, name=next(names))(y, mode))
    y = Conv(self.features, 1, name=next(names))(y)
    y = BatchNorm(name=next(names))(y, mode)
    return x + y if x.shape == y.shape else y


def architecture(name: str) -> Architecture:
  """`mobilenet_v2`."""
  return Architecture(name, lambda classes: parts(ROWS, classes), Preprocessing(resize=232))


def parts(rows: tuple[tuple[int, int, int, int], ...], num_classes: int) -> Parts:
  """The network of a table."""

  def stem(x, mode):
    return nn.relu6(ConvNorm(32, 3, 2, name='features.0')(x, mode))

  def stage(number: int, features: int, expansion: int, stride: int) -> tuple[str, Stage]:
    place = f'features.{number}'
    return place, lambda x, mode: InvertedResidual(features, expansion, stride, name=place)(x, mode)

  def classifier(x, mode):
    x = nn.relu6(ConvNorm(1280, 1, name=f'features.{len(blocks) + 1}')(x, mode))
    return Linear(num_classes, name='classifier.1')(pooled(x))

  each = [
    (features, expansion, stride if block == 0 else 1)
    for expansion, features, size, stride in rows
    for block in range(size)
  ]
  blocks = [stage(number, *block) for number, block in enumerate(each, 1)]
  return Parts((('features.0', stem), *blocks), classifier)
