"""WideResNet-28-10 (Zagoruyko and Komodakis 2016), with the names of xternalz/WideResNet-pytorch and RobustBench."""

import flax.linen as nn
from jax import Array
from jaxtyping import Float

from paranet_jax.models.adopted.architecture import Architecture, Mode, Parts, Preprocessing, Stage
from paranet_jax.models.adopted.layers import BatchNorm, Conv, Linear, pooled, relu


class Block(nn.Module):
  """x + BN-ReLU-Conv3x3-BN-ReLU-Conv3x3; where channels change, a 1x1 convolution after BN-ReLU replaces x."""

  width: int
  stride: int

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C'], mode: Mode) -> Float[Array, 'B h w width']:
    y = relu(BatchNorm(name='bn1')(x, mode))
    if x.shape[-1] != self.width:
      x = Conv(self.width, 1, self.stride, name='convShortcut')(y)
    y = relu(BatchNorm(name='bn2')(Conv(self.width, stride=self.stride, name='conv1')(y), mode))
    return x + Conv(self.width, name='conv2')(y)


def architecture(name: str) -> Architecture:
  """`wide_resnet28_10`."""
  return Architecture(
    name,
    lambda classes: parts(4, 10, classes),
    Preprocessing(32, None, 'bilinear', (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    num_classes=10,
    class_names='cifar10',
  )


def parts(size: int, factor: int, num_classes: int) -> Parts:
  """A network of three groups of `size` blocks, with 16, 32 and 64 channels times a factor."""

  def stem(x: Array, mode: Mode) -> Array:
    return Conv(16, name='conv1')(x)

  def block(group: int, number: int) -> tuple[str, Stage]:
    place, stride = f'block{group}.layer.{number}', 2 if number == 0 and group > 1 else 1
    width = 8 * 2**group * factor
    return place, lambda x, mode: Block(width, stride, name=place)(x, mode)

  def classifier(x: Array, mode: Mode) -> Array:
    return Linear(num_classes, name='fc')(pooled(relu(BatchNorm(name='bn1')(x, mode))))

  blocks = [block(group, number) for group in (1, 2, 3) for number in range(size)]
  return Parts((('conv1', stem), *blocks), classifier)
