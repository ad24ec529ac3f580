"""CIFAR ResNets with parameter-free shortcuts (He et al. 2016a, section 4.2, option A), with PyTorch's usual names.

The names are those of akamaster/pytorch_resnet_cifar10 and its many descendants, where shortcuts put half of the new
zero channels on each side. Some of them call the classifier `fc`.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from paranet_jax.models.adopted.architecture import Architecture, Mode, Parts, Preprocessing
from paranet_jax.models.adopted.layers import BatchNorm, Conv, Linear, pooled, relu

LONG = 56
"""Layers from which the blocks that a head 'blocks' copies are at most about a fifth of the multiply-adds."""
COPIES = 3
"""Blocks of each shape in such a head: on held-out images, one of each shape answered fewer within the same budget."""


class Block(nn.Module):
  """relu(shortcut + Conv3x3-BN-ReLU-Conv3x3-BN)."""

  width: int
  stride: int

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C'], mode: Mode) -> Float[Array, 'B h w width']:
    y = Conv(self.width, stride=self.stride, name='conv1')(x)
    y = relu(BatchNorm(name='bn1')(y, mode))
    y = BatchNorm(name='bn2')(Conv(self.width, name='conv2')(y), mode)
    new = self.width - x.shape[-1]
    shortcut = x[:, :: self.stride, :: self.stride]
    return relu(jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2))) + y)


def architecture(name: str) -> Architecture:
  """`cifar_resnet20` to `cifar_resnet110`."""
  depth = int(name.removeprefix('cifar_resnet'))

  def stem(x, mode):
    return relu(BatchNorm(name='bn1')(Conv(16, name='conv1')(x), mode))

  def block(place: str, width: int, stride: int):
    return place, lambda x, mode: Block(width, stride, name=place)(x, mode)

  def build(num_classes: int) -> Parts:
    blocks = [
      block(f'layer{group}.{number}', width, 2 if number == 0 and group > 1 else 1)
      for group, width in enumerate((16, 32, 64), 1)
      for number in range((depth - 2) // 6)
    ]
    return Parts((('bn1', stem), *blocks), lambda x, mode: Linear(num_classes, name='linear')(pooled(x)))

  return Architecture(
    name,
    build,
    Preprocessing(side=32, resize=None),
    num_classes=10,
    class_names='cifar10',
    adopt_head='blocks' if depth >= LONG else None,
    adopt_copies=COPIES if depth >= LONG else None,
    renames=((r'^fc\.', 'linear.'),),
  )
