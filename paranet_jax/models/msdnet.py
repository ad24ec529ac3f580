"""MSDNet: features at several scales, dense within a scale, and exits that read the coarsest (Huang et al. 2018).

Evaluated lazily, as its section 5 proposes: an exit needs only the coarsest scale of its own layer, the two coarsest of
the layer before, and so on; a finer scale is computed by the first stage that needs it.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from paranet_jax.models import msdnet_geometry as geo
from paranet_jax.models.layers.conv import Classifier, ConvNormRelu
from paranet_jax.models.layers.initial import initial_variables
from paranet_jax.models.multi_exit import Carry, Graph, Images, Logits, Node

EXIT_CHANNELS = 128


class MSDNet(Graph):
  """An MSDNet. Images are normalized floats [B, image_side, image_side, channels].

  The defaults are the authors' network for CIFAR-100 with 7 exits for anytime prediction; theirs for budgeted batches
  has 5 blocks, 'lin_grow', step 1, base 1.

  Attributes:
    num_classes: width of every exit.
    num_blocks: an exit follows each.
    step_mode: 'even' or 'lin_grow': how many layers the blocks after the first have (see `block_layers`).
    step: layers of those blocks, or by how many they grow.
    base: layers of the first block.
    initial_channels: of layer 0, times a scale's growth factor.
    growth_rate: channels that a layer adds, times a scale's growth factor.
    growth_factors: one a scale, finest first.
    bottleneck_factors: one a scale: width of a 1x1 convolution that reads it, in multiples of what its path adds.
    reduction: share of the channels that a transition leaves.
    image_side: S, pixels.
    channels: of the images.
    dtype: of the computation; parameters, statistics and logits are float32.
    axis_name: device axis over which batch statistics are shared in training.

  Raises:
    ValueError: the fields do not fit, in one line.
  """

  num_classes: int = 100
  num_blocks: int = 7
  step_mode: str = 'even'
  step: int = 2
  base: int = 4
  initial_channels: int = 16
  growth_rate: int = 6
  growth_factors: tuple[int, ...] = (1, 2, 4)
  bottleneck_factors: tuple[int, ...] = (1, 2, 4)
  reduction: float = 0.5
  image_side: int = 32
  channels: int = 3
  dtype: Any = jnp.float32
  axis_name: str | None = None

  initial_variables = staticmethod(initial_variables)

  def __post_init__(self):
    super().__post_init__()
    if len(self.growth_factors) != len(self.bottleneck_factors):
      raise ValueError(
        f'growth_factors {self.growth_factors} and bottleneck_factors {self.bottleneck_factors} must have one entry a '
        'scale each'
      )
    if any(self.growth_rate * factor % 2 for factor in self.growth_factors[1:]):
      raise ValueError(
        f'growth_rate {self.growth_rate} times growth_factors {self.growth_factors} must be even after the first '
        'scale: half comes from the finer one'
      )
    if not 0 < self.reduction <= 1:
      raise ValueError(f'reduction {self.reduction} must be above 0 and at most 1')
    _ = self.geometry  # Refuses what does not fit.

  @property
  def geometry(self) -> geo.Geometry:
    """Which layer reads which, at which scale."""
    layers = geo.block_layers(self.num_blocks, self.step_mode, self.step, self.base)
    return geo.Geometry(self.image_side, len(self.growth_factors), layers)

  @property
  def num_exits(self) -> int:
    """One a block."""
    return self.num_blocks

  def node_features(self, node: Node, images: Images, features: Carry, train: bool) -> Array:
    """All features of a scale after a layer, those of the layers before it included."""
    layer, scale = node
    factor, sources = self.growth_factors[scale - 1], self.geometry.reads(node)
    name = f'layer_{layer}_scale_{scale}'
    if layer == 0:
      x, stride = (features[sources[0]], 2) if sources else (images.astype(self.dtype), 1)
      return ConvNormRelu(self.initial_channels * factor, 3, stride, self.axis_name, name=name)(x, train)
    bottleneck_factors = tuple(self.bottleneck_factors[source - 1] for _, source in sources)
    add = Layer(self.growth_rate * factor, bottleneck_factors, self.axis_name, name=name)
    x = add([features[source] for source in sources], train)
    if not self.geometry.drops(layer):
      return x
    channels = math.floor(self.reduction * (x.shape[-1] // factor)) * factor
    return ConvNormRelu(channels, 1, 1, self.axis_name, name=f'transition_{layer}_scale_{scale}')(x, train)

  def exit_logits(self, x: Array, number: int, train: bool) -> Logits:
    """Two convolutions, pool, linear."""
    return Exit(self.num_classes, self.axis_name, name=f'exit_{number}')(x, train)


def from_fields(name: str, fields: dict[str, Any]) -> MSDNet:
  """The network of a run's configuration fields."""
  return MSDNet(**fields)


class Layer(nn.Module):
  """A layer at one scale: adds channels made from the scale itself and, where there is one, the finer scale, in halves.

  Each path is Conv1x1-BN-ReLU-Conv3x3-BN-ReLU, of stride 2 from the finer scale (paper, Figure 3 and section 4).

  Attributes:
    features: channels it adds.
    bottleneck_factors: of the scale itself and of the finer one.
  """

  features: int
  bottleneck_factors: tuple[int, ...]
  axis_name: str | None = None

  @nn.compact
  def __call__(self, inputs: list[Array], train: bool) -> Array:
    """[B, H, W, C] and perhaps [B, 2 H, 2 W, D] -> [B, H, W, C + features]."""
    features = self.features // len(inputs)
    parts = []
    for stride, (x, factor) in enumerate(zip(inputs, self.bottleneck_factors, strict=True), 1):
      name, width = ('same', 'down')[stride - 1], min(x.shape[-1], factor * features)
      x = ConvNormRelu(width, 1, 1, self.axis_name, name=f'{name}_bottleneck')(x, train)
      parts.append(ConvNormRelu(features, 3, stride, self.axis_name, name=name)(x, train))
    return jnp.concatenate([inputs[0], *parts[::-1]], axis=-1)


class Exit(nn.Module):
  """Two Conv3x3(128, stride 2)-BN-ReLU, average pool, linear: float32 logits [B, num_classes].

  The pool takes the mean of all that is left, which at 32 x 32 is the authors' 2x2.
  """

  num_classes: int
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    for index in (1, 2):
      x = ConvNormRelu(EXIT_CHANNELS, 3, 2, self.axis_name, name=f'conv{index}')(x, train)
    return Classifier(self.num_classes, name='head')(x)
