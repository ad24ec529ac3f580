"""RANet: sub-networks of rising resolution, each of which reads the features of the one before it (Yang et al. 2020).

Sub-network 1 works at the lowest resolution. A later one begins at a higher resolution, fuses the features of the
blocks of the one before, and halves its own on the way, so that all exits read the lowest resolution (section 3).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from paranet_jax.models.layers.conv import ConvNormRelu
from paranet_jax.models.layers.dense import kept_channels
from paranet_jax.models.layers.initial import initial_variables
from paranet_jax.models.msdnet import Exit
from paranet_jax.models.multi_exit import Carry, Graph, Images, Logits, Node, check_halvings

BASE = 0
"""First number of the nodes of the initial layer, whose second number counts from the finest one, 0."""


@dataclasses.dataclass(frozen=True)
class Geometry:
  """The graph of a RANet (Yang et al. 2020, section 3.2; where it is silent, the authors' code).

  Node (p, n) is block n of sub-network p, both from 1; node (0, k) makes the base features of sub-network P - k. Block
  n of sub-network p reads the block before it or the base features, and, if sub-network p - 1 has a block n, that one:
  it is then a fusion block. Exit n follows the first block n that is no fusion block.

  Attributes:
    image_side: S, in pixels, the side of the finest base features.
    scales: of each sub-network: scale 1 has the least side, and each other one twice that of the one before.
    base_blocks: blocks of sub-network 1.
    block_step: blocks that each sub-network has more than the one before.

  Raises:
    ValueError: the shapes do not fit together; the message is one line.
  """

  image_side: int
  scales: tuple[int, ...]
  base_blocks: int
  block_step: int

  def __post_init__(self):
    rises = [after - before for before, after in zip(self.scales, self.scales[1:], strict=False)]
    if self.scales[:1] != (1,) or not set(rises) <= {0, 1}:
      raise ValueError(f'scales must begin with 1 and rise by 0 or 1 from one to the next, found {self.scales}')
    check_halvings(self.image_side, self.scales[-1] - 1)

  def blocks(self, network: int) -> int:
    """Blocks of a sub-network; none of sub-network 0."""
    return self.base_blocks + self.block_step * (network - 1) if network else 0

  def network(self, number: int) -> int:
    """The sub-network of an exit."""
    return next(p for p in range(1, len(self.scales) + 1) if self.blocks(p) >= number)

  def fuses(self, node: Node) -> bool:
    """Whether a block is a fusion block."""
    network, index = node
    return index <= self.blocks(network - 1)

  def halves(self, node: Node) -> bool:
    """Whether the last layer of a block has stride 2: in the last fusion blocks that end with a sub-network before."""
    network, index = node
    times = self.scales[network - 1] - 1
    return index in [self.blocks(other) for other in range(network - times, network)]

  def compresses(self, node: Node) -> bool:
    """Whether a transition ends a block: as often as the sub-network halves, after equal shares of its blocks."""
    network, index = node
    scale, blocks = self.scales[network - 1], self.blocks(network)
    return index in [part * blocks // scale for part in range(1, scale)]

  def reads(self, node: Node) -> tuple[Node, ...]:
    """The nodes that a node reads: first the one of its own sub-network."""
    network, index = node
    if network == BASE:
      return ((BASE, index - 1),) if index else ()
    own = (network, index - 1) if index > 1 else (BASE, len(self.scales) - network)
    return (own, (network - 1, index)) if self.fuses(node) else (own,)

  def exit_node(self, number: int) -> Node:
    """The block that exit `number` (1-based) reads."""
    return (self.network(number), number)


class Block(NamedTuple):
  """What others read of a block.

  Attributes:
    layers: the channels before its first layer and those that each layer added; if the last one has stride 2, as two
      arrays: before the last layer, and after it.
    out: what the next block and the exit read; None: the last of `layers`.
  """

  layers: tuple[Float[Array, 'B H W C'], ...]
  out: Float[Array, 'B h w c'] | None = None

  @property
  def output(self) -> Float[Array, 'B h w c']:
    """What the next block and the exit read."""
    return self.layers[-1] if self.out is None else self.out

  def before_each_layer(self, count: int, growth: int) -> list[Array]:
    """What each of `count` layers, which add `growth` channels each, reads, and what the last one leaves."""
    first = self.layers[0].shape[-1] - growth * (count - len(self.layers) + 1)
    return [*(self.layers[0][..., : first + growth * index] for index in range(count)), self.layers[-1]]


class RANet(Graph):
  """A RANet.

  The defaults are the authors' network for anytime prediction on CIFAR-100, with 8 exits. Those for budgeted batches
  have 'lin_grow', step 2 and scales 1-2-3, 1-2-2-3 or 1-2-3-3.

  Attributes:
    scales: of each sub-network, the coarsest first.
    growth_factors: one per sub-network.
    bottleneck_factors: one per sub-network: width of a 1x1 convolution that reads it, in multiples of what it adds.
    base_blocks: blocks of sub-network 1.
    block_step: blocks that each sub-network has more than the one before.
    step_mode: 'even': every block has `step` layers; 'lin_grow': block n has n times as many.
    step: layers.
    initial_channels: channels of the base features, times the growth factor.
    growth_rate: channels that a layer adds, times the growth factor.
    fusion: share of the channels of a fusion block's layers that come from the sub-network before.
    reduction: share of the channels that a transition keeps (see `kept_channels`).

  Raises:
    ValueError: the fields do not fit together; the message is one line.
  """

  num_classes: int = 100
  scales: tuple[int, ...] = (1, 2, 3, 3)
  growth_factors: tuple[int, ...] = (4, 2, 1, 1)
  bottleneck_factors: tuple[int, ...] = (4, 2, 1, 1)
  base_blocks: int = 2
  block_step: int = 2
  step_mode: str = 'even'
  step: int = 4
  initial_channels: int = 16
  growth_rate: int = 6
  fusion: float = 0.25
  reduction: float = 0.5
  image_side: int = 32
  channels: int = 3
  dtype: Any = jnp.float32
  axis_name: str | None = None

  initial_variables = staticmethod(initial_variables)

  def __post_init__(self):
    super().__post_init__()
    if not len(self.scales) == len(self.growth_factors) == len(self.bottleneck_factors):
      raise ValueError(
        f'scales {self.scales}, growth_factors {self.growth_factors} and bottleneck_factors {self.bottleneck_factors} '
        'must have one entry for each sub-network'
      )
    if self.step_mode not in ('even', 'lin_grow'):
      raise ValueError(f"step_mode {self.step_mode!r} must be 'even' or 'lin_grow'")
    if any(not 0 < self._fused(network) < self._growth(network) for network in range(2, len(self.scales) + 1)):
      raise ValueError(
        f'fusion {self.fusion} of growth_rate {self.growth_rate} times growth_factors {self.growth_factors} must leave '
        'one channel or more from each of both sub-networks'
      )
    _ = self.geometry  # Raises ValueError if the shapes do not fit.

  @property
  def geometry(self) -> Geometry:
    """The graph of blocks."""
    return Geometry(self.image_side, self.scales, self.base_blocks, self.block_step)

  @property
  def num_exits(self) -> int:
    """As many as the last sub-network has blocks."""
    return self.geometry.blocks(len(self.scales))

  def node_features(self, node: Node, images: Images, features: Carry, train: bool) -> Any:
    """Base features, or a `Block`."""
    geometry, (network, index) = self.geometry, node
    sources = geometry.reads(node)
    if network == BASE:
      return self._base(len(self.scales) - index, features[sources[0]] if sources else images.astype(self.dtype), train)
    before = features[sources[0]]
    layers = self._layers(index)
    lower = features[sources[1]].before_each_layer(layers, self._growth(network - 1)) if len(sources) > 1 else ()
    block = DenseLayers(
      layers=layers,
      growth=self._growth(network),
      fused=self._fused(network) if lower else 0,
      bottleneck_factors=self.bottleneck_factors[max(network - 2, 0) : network],
      stride=2 if geometry.halves(node) else 1,
      axis_name=self.axis_name,
      name=f'network_{network}_block_{index}',
    )
    x, kept = block(before.output if isinstance(before, Block) else before, lower, train)
    out = None
    if lower:
      width = math.floor(self.fusion * x.shape[-1])
      name = f'network_{network}_fusion_{index}'
      fused = ConvNormRelu(width, 1, 1, self.axis_name, name=name)(lower[-1], train)
      out = x = jnp.concatenate([x, resize(fused, x.shape[1])], axis=-1)
    if geometry.compresses(node):
      width, name = kept_channels(self.reduction, x.shape[-1]), f'network_{network}_transition_{index}'
      out = ConvNormRelu(width, 1, 1, self.axis_name, name=name)(x, train)
    return Block(kept, out)

  def exit_logits(self, x: Block, number: int, train: bool) -> Logits:
    """Two convolutions, pool, linear, as in MSDNet."""
    return Exit(self.num_classes, self.axis_name, name=f'exit_{number}')(x.output, train)

  def _base(self, network: int, x: Array, train: bool) -> Array:
    """The initial layer: a convolution for each sub-network, from the finest one to the coarsest one."""
    finest = network == len(self.scales)
    stride = 1 if finest or self.scales[network] == self.scales[network - 1] else 2
    channels = self.initial_channels * self.growth_factors[network - 1]
    return ConvNormRelu(channels, 3, stride, self.axis_name, name=f'network_{network}_base')(x, train)

  def _layers(self, index: int) -> int:
    return self.step if self.step_mode == 'even' else self.step * index

  def _growth(self, network: int) -> int:
    return self.growth_rate * self.growth_factors[network - 1]

  def _fused(self, network: int) -> int:
    """Channels of a layer that come from the sub-network before."""
    return math.floor(self.fusion * self._growth(network))


def from_fields(name: str, fields: dict[str, Any]) -> RANet:
  """Builds the network from a run's configuration fields."""
  return RANet(**fields)


class DenseLayers(nn.Module):
  """The layers of a block: each adds `growth` channels, in a fusion block `fused` of them from the sub-network before.

  Both parts are Conv1x1-BN-ReLU-Conv3x3-BN-ReLU. The last layer may have stride 2; what it reads is then resized.

  Attributes:
    bottleneck_factors: of the sub-network before, if there is one, and of its own.
  """

  layers: int
  growth: int
  fused: int
  bottleneck_factors: tuple[int, ...]
  stride: int
  axis_name: str | None = None

  @nn.compact
  def __call__(
    self, x: Float[Array, 'B H W C'], lower: Sequence[Array], train: bool
  ) -> tuple[Float[Array, 'B h w K'], tuple[Array, ...]]:
    """Returns the features after the last layer, and the `layers` of a `Block`."""
    kept = ()
    for index in range(self.layers):
      stride = self.stride if index == self.layers - 1 else 1
      if stride == 2:
        kept = (x,)
      name = f'layer_{index + 1}'
      parts = [self._path(x, self.growth - self.fused, self.bottleneck_factors[-1], stride, name, train)]
      side = parts[0].shape[1]
      if self.fused:
        fused = self._path(lower[index], self.fused, self.bottleneck_factors[0], 1, f'{name}_fused', train)
        parts.insert(0, resize(fused, side))
      x = jnp.concatenate([resize(x, side), *parts], axis=-1)
    return x, (*kept, x)

  def _path(self, x: Array, features: int, factor: int, stride: int, name: str, train: bool) -> Array:
    width = min(x.shape[-1], factor * features)
    x = ConvNormRelu(width, 1, 1, self.axis_name, name=f'{name}_bottleneck')(x, train)
    return ConvNormRelu(features, 3, stride, self.axis_name, name=name)(x, train)


def resize(x: Float[Array, 'B H W C'], side: int) -> Float[Array, 'B side side C']:
  """Bilinear interpolation that maps corners to corners, as PyTorch's with align_corners=True; squares only."""
  if x.shape[1] == side:
    return x
  places = np.linspace(0, x.shape[1] - 1, side)
  low = np.floor(places).astype(np.int32)
  high, share = np.minimum(low + 1, x.shape[1] - 1), jnp.asarray(places - low, x.dtype)
  for axis in (1, 2):
    weights = share.reshape([side if axis == other else 1 for other in range(4)])
    first, second = (jnp.take(x, index, axis=axis, mode='clip') for index in (low, high))
    x = first + weights * (second - first)
  return x
