"""torchvision's ResNets and ResNeXt (He et al. 2016a; Xie et al. 2017), whose names and shapes timm shares.

A bottleneck has its stride in the 3x3 convolution, not in the first 1x1 as in the paper.
"""

import flax.linen as nn
from jax import Array
from jaxtyping import Float

from paranet_jax.models.adopted.architecture import Architecture, Mode, Parts, Preprocessing, Stage
from paranet_jax.models.adopted.layers import BatchNorm, Conv, Linear, max_pool, pooled, relu


class _Block(nn.Module):
  """relu(x + branch(x)); a 1x1 convolution and a norm replace x where the shape changes."""

  width: int
  stride: int = 1
  groups: int = 1
  group_width: int = 64

  @property
  def features(self) -> int:
    """Output channels."""
    raise NotImplementedError

  def branch(self, x: Array, mode: Mode) -> Array:
    """Convolutions and norms."""
    raise NotImplementedError

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C'], mode: Mode) -> Float[Array, 'B h w features']:
    y = self.branch(x, mode)
    if self.stride > 1 or x.shape[-1] != self.features:
      x = Conv(self.features, 1, self.stride, name='downsample.0')(x)
      x = BatchNorm(name='downsample.1')(x, mode)
    return relu(x + y)


class BasicBlock(_Block):
  """Two 3x3 convolutions."""

  @property
  def features(self) -> int:
    """Output channels."""
    return self.width

  def branch(self, x: Array, mode: Mode) -> Array:
    """Conv3x3-BN-ReLU-Conv3x3-BN."""
    x = relu(BatchNorm(name='bn1')(Conv(self.width, stride=self.stride, name='conv1')(x), mode))
    return BatchNorm(name='bn2')(Conv(self.width, name='conv2')(x), mode)


class Bottleneck(_Block):
  """A 3x3 convolution, possibly in groups, between two 1x1 convolutions."""

  @property
  def features(self) -> int:
    """Output channels."""
    return 4 * self.width

  def branch(self, x: Array, mode: Mode) -> Array:
    """Conv1x1-BN-ReLU-Conv3x3-BN-ReLU-Conv1x1-BN."""
    width = self.width * self.group_width // 64 * self.groups
    x = relu(BatchNorm(name='bn1')(Conv(width, 1, name='conv1')(x), mode))
    x = Conv(width, stride=self.stride, groups=self.groups, name='conv2')(x)
    x = relu(BatchNorm(name='bn2')(x, mode))
    return BatchNorm(name='bn3')(Conv(self.features, 1, name='conv3')(x), mode)


_NETWORKS = {
  'resnet18': (BasicBlock, (2, 2, 2, 2), {}),
  'resnet34': (BasicBlock, (3, 4, 6, 3), {}),
  'resnet50': (Bottleneck, (3, 4, 6, 3), {}),
  'resnet101': (Bottleneck, (3, 4, 23, 3), {}),
  'resnext50_32x4d': (Bottleneck, (3, 4, 6, 3), {'groups': 32, 'group_width': 4}),
}
"""Kind of block, blocks in each of the four stages, and what is different in a block."""


def architecture(name: str) -> Architecture:
  """The network of a name in torchvision; preprocessing is that of its newest weights."""
  block, sizes, options = _NETWORKS[name]
  resize = 256 if block is BasicBlock else 232
  return Architecture(name, lambda classes: parts(block, sizes, classes, **options), Preprocessing(resize=resize))


def parts(
  block: type[_Block], sizes: tuple[int, ...], num_classes: int, groups: int = 1, group_width: int = 64
) -> Parts:
  """The network with this many blocks in each stage."""

  def stem(x, mode):
    return max_pool(relu(BatchNorm(name='bn1')(Conv(64, 7, 2, name='conv1')(x), mode)))

  def stage(place: str, width: int, stride: int) -> tuple[str, Stage]:
    return place, lambda x, mode: block(width, stride, groups, group_width, name=place)(x, mode)

  blocks = [
    stage(f'layer{group}.{number}', 32 * 2**group, 2 if number == 0 and group > 1 else 1)
    for group, size in enumerate(sizes, 1)
    for number in range(size)
  ]
  return Parts((('maxpool', stem), *blocks), lambda x, mode: Linear(num_classes, name='fc')(pooled(x)))
