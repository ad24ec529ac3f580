"""The block of MobileNetV3 and EfficientNet, with torchvision's names."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jax import Array
from jaxtyping import Float

from paranet_jax.models.adopted.architecture import Mode
from paranet_jax.models.adopted.layers import ConvNorm, SqueezeExcitation


class InvertedResidual(nn.Module):
  """Conv1x1-Depthwise-Squeeze-Conv1x1, each convolution with a norm; x is added if the shape is kept.

  Attributes:
    width: channels inside the block; the first convolution is left out if the input has as many.
    features: output channels.
    kernel_size: of the depthwise convolution.
    squeeze: channels to which the means are reduced (see `SqueezeExcitation`); 0: they are not used.
    activation: after the first two convolutions.
    gates: the activations of `SqueezeExcitation`.
    epsilon: of the norms.
  """

  width: int
  features: int
  kernel_size: int
  stride: int
  squeeze: int
  activation: Callable[[Any], Any]
  gates: tuple[Callable[[Any], Any], Callable[[Any], Any]]
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C'], mode: Mode) -> Float[Array, 'B h w features']:
    y, names = x, (f'block.{number}' for number in range(4))
    if self.width != x.shape[-1]:
      y = self.activation(ConvNorm(self.width, 1, epsilon=self.epsilon, name=next(names))(y, mode))
    y = ConvNorm(self.width, self.kernel_size, self.stride, self.width, self.epsilon, name=next(names))(y, mode)
    y = self.activation(y)
    if self.squeeze:
      y = SqueezeExcitation(self.squeeze, *self.gates, name=next(names))(y)
    y = ConvNorm(self.features, 1, epsilon=self.epsilon, name=next(names))(y, mode)
    return x + y if x.shape == y.shape else y
