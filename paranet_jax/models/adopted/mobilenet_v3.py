"""torchvision's MobileNetV3-Large and -Small (Howard et al. 2019)."""

from typing import NamedTuple

import flax.linen as nn

from paranet_jax.models.adopted.architecture import Architecture, Parts, Preprocessing, Stage
from paranet_jax.models.adopted.inverted_residual import InvertedResidual
from paranet_jax.models.adopted.layers import ConvNorm, Linear, pooled, relu

EPSILON = 1e-3
"""Of every norm."""


class Row(NamedTuple):
  """A block, as in Tables 1 and 2 of the paper."""

  kernel_size: int
  width: int  # Channels inside the block.
  features: int  # Output channels.
  squeeze: bool  # Whether channels are weighed by their means.
  swish: bool  # Hard swish; otherwise ReLU.
  stride: int


LARGE = (
  Row(3, 16, 16, False, False, 1),
  Row(3, 64, 24, False, False, 2),
  Row(3, 72, 24, False, False, 1),
  Row(5, 72, 40, True, False, 2),
  *(Row(5, 120, 40, True, False, 1),) * 2,
  Row(3, 240, 80, False, True, 2),
  Row(3, 200, 80, False, True, 1),
  *(Row(3, 184, 80, False, True, 1),) * 2,
  Row(3, 480, 112, True, True, 1),
  Row(3, 672, 112, True, True, 1),
  Row(5, 672, 160, True, True, 2),
  *(Row(5, 960, 160, True, True, 1),) * 2,
)
SMALL = (
  Row(3, 16, 16, True, False, 2),
  Row(3, 72, 24, False, False, 2),
  Row(3, 88, 24, False, False, 1),
  Row(5, 96, 40, True, True, 2),
  *(Row(5, 240, 40, True, True, 1),) * 2,
  Row(5, 120, 48, True, True, 1),
  Row(5, 144, 48, True, True, 1),
  Row(5, 288, 96, True, True, 2),
  *(Row(5, 576, 96, True, True, 1),) * 2,
)

_NETWORKS = {'mobilenet_v3_large': (LARGE, 1280, 232), 'mobilenet_v3_small': (SMALL, 1024, 256)}
"""Blocks, channels before the classifier, and the resize of the newest weights."""


def architecture(name: str) -> Architecture:
  """`mobilenet_v3_large` or `mobilenet_v3_small`."""
  rows, hidden, resize = _NETWORKS[name]
  return Architecture(name, lambda classes: parts(rows, hidden, classes), Preprocessing(resize=resize))


def parts(rows: tuple[Row, ...], hidden: int, num_classes: int) -> Parts:
  """The network of a table, with this many channels before the classifier."""

  def stem(x, mode):
    return nn.hard_swish(ConvNorm(16, 3, 2, epsilon=EPSILON, name='features.0')(x, mode))

  def stage(number: int, row: Row) -> tuple[str, Stage]:
    place = f'features.{number}'
    squeeze = _eighths(row.width // 4) if row.squeeze else 0
    activation = nn.hard_swish if row.swish else relu

    def block(x, mode):
      shape = row.width, row.features, row.kernel_size, row.stride, squeeze
      return InvertedResidual(*shape, activation, (relu, nn.hard_sigmoid), EPSILON, name=place)(x, mode)

    return place, block

  def classifier(x, mode):
    last = ConvNorm(6 * x.shape[-1], 1, epsilon=EPSILON, name=f'features.{len(rows) + 1}')
    x = nn.hard_swish(Linear(hidden, name='classifier.0')(pooled(nn.hard_swish(last(x, mode)))))
    return Linear(num_classes, name='classifier.3')(x)

  return Parts((('features.0', stem), *(stage(number, row) for number, row in enumerate(rows, 1))), classifier)


def _eighths(channels: int) -> int:
  """The nearest multiple of 8 that is at least 8 and 90 % of the channels."""
  rounded = max(8, (channels + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * channels else rounded
