"""MSDNet: features at several scales, dense within each scale, with exits on the coarsest (Huang et al. 2018).

It is evaluated lazily, as proposed in section 5: an exit needs only the coarsest scale of its own layer, the two
coarsest of the layer before, and so on. The first stage that needs a finer scale computes it.
"""

import dataclasses
import itertools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from paranet_jax.models.layers.conv import Classifier, ConvNormRelu
from paranet_jax.models.layers.dense import kept_channels
from paranet_jax.models.layers.initial import initial_variables
from paranet_jax.models.multi_exit import Carry, Graph, Images, Logits, Node, check_halvings

EXIT_CHANNELS = 128


@dataclasses.dataclass(frozen=True)
class Geometry:
  """The graph of an MSDNet (Huang et al. 2018, sections 4 and 5).

  A node is (layer, scale): scale 1 is the finest, layer 0 makes every scale from the image, and the layers after it
  count from 1. A node's features include those of the layers before it at the same scale.

  Attributes:
    image_side: S, in pixels.
    num_scales: number of scales, each with half the side of the one before.
    block_layers: layers of each block; an exit follows each block.

  Raises:
    ValueError: the shapes do not fit together; the message is one line.
  """

  image_side: int
  num_scales: int
  block_layers: tuple[int, ...]

  def __post_init__(self):
    if not self.block_layers or min(self.block_layers) < 1:
      raise ValueError(f'an MSDNet needs 1 or more blocks of 1 or more layers, found blocks of {self.block_layers}')
    if self.num_scales < 1:
      raise ValueError(f'an MSDNet needs 1 or more scales, each with a growth factor, found {self.num_scales}')
    check_halvings(self.image_side, self.num_scales - 1)

  @property
  def exit_layers(self) -> tuple[int, ...]:
    """The layer that each exit follows."""
    return tuple(itertools.accumulate(self.block_layers))

  def finest(self, layer: int) -> int:
    """The finest scale left at a layer; network reduction drops one after each equal share of the layers."""
    layers_per_scale = -(-sum(self.block_layers) // self.num_scales)
    return 1 + max(layer - 1, 0) // layers_per_scale

  def drops(self, layer: int) -> bool:
    """Whether a layer drops the finest scale of the layer before; a transition then follows it."""
    return self.finest(layer) > self.finest(layer - 1)

  def reads(self, node: Node) -> tuple[Node, ...]:
    """The nodes that a node reads: first the one at its own scale, then the finer one, where they exist."""
    layer, scale = node
    if layer == 0:
      return ((0, scale - 1),) if scale > 1 else ()
    finer = ((layer - 1, scale - 1),) if scale > self.finest(layer - 1) else ()
    return ((layer - 1, scale), *finer)

  def exit_node(self, number: int) -> Node:
    """The node that exit `number` (1-based) reads: the coarsest scale after its block."""
    return (self.exit_layers[number - 1], self.num_scales)


def block_layers(num_blocks: int, step_mode: str, step: int, base: int) -> tuple[int, ...]:
  """Layers of each block: `base` first, then `step` ('even'), or `step` i + 1 in block i + 1 ('lin_grow').

  Raises:
    ValueError: `step_mode` is neither of them.
  """
  if step_mode not in ('even', 'lin_grow'):
    raise ValueError(f"step_mode {step_mode!r} must be 'even' or 'lin_grow'")
  later = [step if step_mode == 'even' else step * i + 1 for i in range(1, num_blocks)]
  return (base, *later)[:num_blocks]


class MSDNet(Graph):
  """An MSDNet.

  The defaults are the authors' CIFAR-100 network with 7 exits for anytime prediction. Their network for budgeted
  batches has 5 blocks, 'lin_grow', step 1 and base 1.

  Attributes:
    num_blocks: number of blocks; an exit follows each.
    step_mode: 'even' or 'lin_grow', which sets the layers of the blocks after the first (see `block_layers`).
    step: layers of those blocks, or the layers that each adds to the one before.
    base: layers of the first block.
    initial_channels: channels of layer 0, times the scale's growth factor.
    growth_rate: channels that a layer adds, times the scale's growth factor.
    growth_factors: one per scale, finest first.
    bottleneck_factors: one per scale: width of a 1x1 convolution that reads it, in multiples of what its path adds.
    reduction: share of the channels that a transition keeps (see `kept_channels`).

  Raises:
    ValueError: the fields do not fit together; the message is one line.
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
        f'growth_factors {self.growth_factors} and bottleneck_factors {self.bottleneck_factors} must have one entry '
        'for each scale'
      )
    if any(self.growth_rate * factor % 2 for factor in self.growth_factors[1:]):
      raise ValueError(
        f'growth_rate {self.growth_rate} times growth_factors {self.growth_factors} must be even after the first '
        'scale: half comes from the finer one'
      )
    if not 0 < self.reduction <= 1:
      raise ValueError(f'reduction {self.reduction} must be above 0 and at most 1')
    _ = self.geometry  # Raises ValueError if the shapes do not fit.

  @property
  def geometry(self) -> Geometry:
    """The graph of layers and scales."""
    layers = block_layers(self.num_blocks, self.step_mode, self.step, self.base)
    return Geometry(self.image_side, len(self.growth_factors), layers)

  @property
  def num_exits(self) -> int:
    """One per block."""
    return self.num_blocks

  def node_features(self, node: Node, images: Images, features: Carry, train: bool) -> Array:
    """All features of a scale after a layer, including those of earlier layers."""
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
    channels = kept_channels(self.reduction, x.shape[-1] // factor) * factor
    return ConvNormRelu(channels, 1, 1, self.axis_name, name=f'transition_{layer}_scale_{scale}')(x, train)

  def exit_logits(self, x: Array, number: int, train: bool) -> Logits:
    """Two convolutions, pool, linear."""
    return Exit(self.num_classes, self.axis_name, name=f'exit_{number}')(x, train)


def from_fields(name: str, fields: dict[str, Any]) -> MSDNet:
  """Builds the network from a run's configuration fields."""
  return MSDNet(**fields)


class Layer(nn.Module):
  """A layer at one scale: adds channels computed from that scale and, half each, from the finer scale if there is one.

  Each path is Conv1x1-BN-ReLU-Conv3x3-BN-ReLU, with stride 2 from the finer scale (paper, Figure 3 and section 4).

  Attributes:
    features: channels that the layer adds.
    bottleneck_factors: those of its own scale and of the finer one.
  """

  features: int
  bottleneck_factors: tuple[int, ...]
  axis_name: str | None = None

  @nn.compact
  def __call__(self, inputs: list[Array], train: bool) -> Float[Array, 'B H W C+features']:
    """Takes features [B, H, W, C] and, if there is a finer scale, [B, 2 H, 2 W, D]."""
    features = self.features // len(inputs)
    parts = []
    for stride, (x, factor) in enumerate(zip(inputs, self.bottleneck_factors, strict=True), 1):
      name, width = ('same', 'down')[stride - 1], min(x.shape[-1], factor * features)
      x = ConvNormRelu(width, 1, 1, self.axis_name, name=f'{name}_bottleneck')(x, train)
      parts.append(ConvNormRelu(features, 3, stride, self.axis_name, name=name)(x, train))
    return jnp.concatenate([inputs[0], *parts[::-1]], axis=-1)


class Exit(nn.Module):
  """Two Conv3x3(128, stride 2)-BN-ReLU, average pool, linear, to float32 logits.

  The pool is global, which for 32 x 32 images equals the authors' 2x2 pool.
  """

  num_classes: int
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C'], train: bool) -> Logits:
    for index in (1, 2):
      x = ConvNormRelu(EXIT_CHANNELS, 3, 2, self.axis_name, name=f'conv{index}')(x, train)
    return Classifier(self.num_classes, name='head')(x)
