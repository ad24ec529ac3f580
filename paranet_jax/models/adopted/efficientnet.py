"""EfficientNet-B0 (Tan and Le 2019) with torchvision's names; timm's, for the same network, are read too."""

import flax.linen as nn

from paranet_jax.models.adopted.architecture import Architecture, Parts, Preprocessing, Stage
from paranet_jax.models.adopted.inverted_residual import InvertedResidual
from paranet_jax.models.adopted.layers import ConvNorm, Linear, pooled

ROWS = (
  *((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3)),
  *((6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1)),
)
"""Table 1 of the paper: expansion of the channels, side of the kernel, stride of the first block, channels, blocks."""

_OF_TIMM = (
  (r'^conv_stem\.', 'features.0.0.'),
  (r'^bn1\.', 'features.0.1.'),
  (r'^conv_head\.', 'features.8.0.'),
  (r'^bn2\.', 'features.8.1.'),
  (r'^classifier\.(weight|bias)$', r'classifier.1.\1'),
  *((rf'^blocks\.{stage}\.', f'features.{stage + 1}.') for stage in range(7)),
  (r'^(features\.1\.\d+)\.conv_dw\.', r'\1.block.0.0.'),
  (r'^(features\.1\.\d+)\.bn1\.', r'\1.block.0.1.'),
  (r'^(features\.1\.\d+)\.se\.', r'\1.block.1.'),
  (r'^(features\.1\.\d+)\.conv_pw\.', r'\1.block.2.0.'),
  (r'^(features\.1\.\d+)\.bn2\.', r'\1.block.2.1.'),
  (r'^(features\.\d\.\d+)\.conv_pw\.', r'\1.block.0.0.'),
  (r'^(features\.\d\.\d+)\.bn1\.', r'\1.block.0.1.'),
  (r'^(features\.\d\.\d+)\.conv_dw\.', r'\1.block.1.0.'),
  (r'^(features\.\d\.\d+)\.bn2\.', r'\1.block.1.1.'),
  (r'^(features\.\d\.\d+)\.se\.', r'\1.block.2.'),
  (r'^(features\.\d\.\d+)\.conv_pwl\.', r'\1.block.3.0.'),
  (r'^(features\.\d\.\d+)\.bn3\.', r'\1.block.3.1.'),
  (r'\.conv_reduce\.', '.fc1.'),
  (r'\.conv_expand\.', '.fc2.'),
)


def architecture(name: str) -> Architecture:
  """`efficientnet_b0`."""
  preprocessing = Preprocessing(interpolation='bicubic')
  return Architecture(name, lambda classes: parts(ROWS, classes), preprocessing, renames=_OF_TIMM)


def parts(rows: tuple[tuple[int, int, int, int, int], ...], num_classes: int) -> Parts:
  """The network of a table."""

  def stem(x, mode):
    return nn.silu(ConvNorm(32, 3, 2, name='features.0')(x, mode))

  def stage(place: str, expansion: int, kernel_size: int, stride: int, features: int) -> tuple[str, Stage]:
    def block(x, mode):
      channels = x.shape[-1]
      shape = channels * expansion, features, kernel_size, stride, channels // 4
      return InvertedResidual(*shape, nn.silu, (nn.silu, nn.sigmoid), name=place)(x, mode)

    return place, block

  def classifier(x, mode):
    x = nn.silu(ConvNorm(4 * x.shape[-1], 1, name=f'features.{len(rows) + 1}')(x, mode))
    return Linear(num_classes, name='classifier.1')(pooled(x))

  blocks = [
    stage(f'features.{group}.{number}', expansion, kernel_size, stride if number == 0 else 1, features)
    for group, (expansion, kernel_size, stride, features, size) in enumerate(rows, 1)
    for number in range(size)
  ]
  return Parts((('features.0', stem), *blocks), classifier)
