"""The heads of exits that are added to a trained network: features in, logits out."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from paranet_jax.models.adopted.architecture import Mode
from paranet_jax.models.adopted.layers import BatchNorm, Conv, LayerNorm, Linear, pooled, relu
from paranet_jax.models.multi_exit import Logits

CONV_WIDTH = 128
"""Channels of the convolution of a head 'conv'."""


class LinearHead(nn.Module):
  """Pool-Linear."""

  num_classes: int

  @nn.compact
  def __call__(self, x: Float[Array, 'B *places C'], mode: Mode) -> Logits:
    return Linear(self.num_classes, name='classifier')(pooled(x))


class NormHead(nn.Module):
  """BN-ReLU-Pool-Linear, the head of the paper."""

  num_classes: int

  @nn.compact
  def __call__(self, x: Float[Array, 'B *places C'], mode: Mode) -> Logits:
    return Linear(self.num_classes, name='classifier')(pooled(relu(BatchNorm(name='norm')(x, mode))))


class ConvHead(nn.Module):
  """Conv3x3-BN-ReLU-Pool-Linear, the convolution with stride 2."""

  num_classes: int

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C'], mode: Mode) -> Logits:
    if x.ndim != 4:
      raise ValueError("head 'conv' needs features of height and width, found tokens")
    x = relu(BatchNorm(name='norm')(Conv(CONV_WIDTH, stride=2, name='conv')(x), mode))
    return Linear(self.num_classes, name='classifier')(pooled(x))


class ClassTokenHead(nn.Module):
  """LayerNorm-Linear of the first token."""

  num_classes: int

  @nn.compact
  def __call__(self, x: Float[Array, 'B N C'], mode: Mode) -> Logits:
    if x.ndim != 3:
      raise ValueError("head 'class_token' needs tokens, found features of height and width")
    x = LayerNorm(name='norm')(x[:, 0])
    return Linear(self.num_classes, name='classifier')(x.astype(jnp.float32))


HEADS: dict[str, Callable[..., Any]] = {
  'linear': LinearHead,
  'bn_relu': NormHead,
  'conv': ConvHead,
  'class_token': ClassTokenHead,
}
"""The kinds of head, by the value of `model.head`."""
