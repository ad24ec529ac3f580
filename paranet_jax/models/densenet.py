"""DenseNet and DenseNet-BC for small images (Huang et al. 2017), with one exit or several.

With exits along its blocks it becomes DenseNet-MC, a baseline of MSDNet (Huang et al. 2018, section 5 and appendix).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from paranet_jax.models.layers.conv import Conv
from paranet_jax.models.layers.dense import (
  DenseBlock,
  Exit,
  Features,
  Transition,
  as_features,
  concatenate,
  norm_affine,
)
from paranet_jax.models.layers.dense_block import affine_relu
from paranet_jax.models.layers.drop import dropout
from paranet_jax.models.layers.initial import initial_variables
from paranet_jax.models.multi_exit import Chain, Logits, check_halvings, exit_positions, parse_exits

NUM_BLOCKS = 3


class DenseNet(Chain):
  """A convolution, three dense blocks at sides S, S / 2 and S / 4 with transitions between them, and exits.

  Attributes:
    depth: L, layers with weights: 6 n + 4 with bottlenecks, 3 n + 4 without, for n dense layers in each block.
    growth_rate: k.
    compression: theta, the share of the channels that a transition keeps (see `kept_channels`); 0.5 in DenseNet-BC.
    bn_size: bottleneck width in multiples of k; None: no bottleneck, layers are BN-ReLU-Conv3x3(k).
    stem_channels: of the first convolution; None: 2k with bottlenecks, 16 without, as in the paper.
    exits: 'last', 'blocks' (after each block), or the layers of every block that an exit follows in addition to the
      last exit, such as (6, 12) for the DenseNet-MC of Huang et al. (2018).
    dropout: rate after each convolution but the first in training (paper, section 4.2), which needs a `dropout` key.
    scan_layers: dense layers compiled as one loop in training (see `dense_block.py`); None: the backend's default.

  Raises:
    ValueError: the shapes do not fit together; the message is one line.
  """

  num_classes: int = 100
  image_side: int = 32
  channels: int = 3
  dtype: Any = jnp.float32
  axis_name: str | None = None
  depth: int = 100
  growth_rate: int = 12
  compression: float = 0.5
  bn_size: int | None = 4
  exits: str | tuple[int, ...] = 'last'
  dropout: float = 0.0
  scan_layers: int | None = None
  stem_channels: int | None = None

  initial_variables = staticmethod(initial_variables)

  def __post_init__(self):
    convolutions = NUM_BLOCKS * (1 if self.bn_size is None else 2)
    if self.depth <= 4 or (self.depth - 4) % convolutions:
      raise ValueError(f'depth must be {convolutions} n + 4 for n layers a block, found {self.depth}')
    if not 0 < self.compression <= 1:
      raise ValueError(f'compression must be above 0 and at most 1, found {self.compression}')
    check_halvings(self.image_side, NUM_BLOCKS - 1)
    exit_positions(self.exits, 'blocks', NUM_BLOCKS, self.layers_per_block)
    super().__post_init__()

  @property
  def rng_names(self) -> tuple[str, ...]:
    """Random keys that training needs."""
    return ('dropout',) if self.dropout else ()

  @property
  def layers_per_block(self) -> int:
    """n, dense layers in each block."""
    return (self.depth - 4) // (NUM_BLOCKS * (1 if self.bn_size is None else 2))

  @property
  def exit_positions(self) -> tuple[int, ...]:
    """The dense layers, counted over all blocks, that the exits follow."""
    return exit_positions(self.exits, 'blocks', NUM_BLOCKS, self.layers_per_block)

  def segment(self, x: Any, start: int, end: int, train: bool) -> Features:
    """Dense layers start + 1 to end, with the stem and the transitions before them."""
    size = self.layers_per_block
    while start < end:
      block, first = divmod(start, size)
      if start == 0:
        channels = self.stem_channels or (16 if self.bn_size is None else 2 * self.growth_rate)
        x = as_features(Conv(channels, name='stem')(x), train, self.axis_name)
      elif first == 0:
        x = Transition(self.axis_name, self.compression, self.dropout, name=f'transition_{block}')(x, train)
      last = min(size, first + end - start)
      name = f'block_{block + 1}' if last - first == size else f'block_{block + 1}_layers_{first + 1}_to_{last}'
      x = self._layers(last - first, name)(x, train)
      start += last - first
    return x

  def exit_logits(self, x: Features, number: int, train: bool) -> Logits:
    """BN-ReLU-pool-linear."""
    return Exit(self.num_classes, name=f'exit_{number}')(x, train)

  def _layers(self, number, name):
    shared = {'axis_name': self.axis_name, 'dropout': self.dropout, 'name': name}
    if self.bn_size is None:
      return PlainDenseBlock(number, self.growth_rate, **shared)
    return DenseBlock(number, self.growth_rate, self.bn_size, self.scan_layers, **shared)


def from_fields(name: str, fields: dict[str, Any]) -> DenseNet:
  """Builds the network from a run's configuration fields."""
  fields['exits'] = parse_exits(fields['exits'])
  if not fields.pop('bottleneck'):
    fields['bn_size'] = None
  return DenseNet(**fields)


class PlainDenseBlock(nn.Module):
  """`num_layers` layers BN-ReLU-Conv3x3(k), each reading all features before it: C -> C + num_layers k channels."""

  num_layers: int
  growth_rate: int
  axis_name: str | None = None
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: Features, train: bool) -> Features:
    for i in range(1, self.num_layers + 1):
      values = affine_relu(x.values, *norm_affine(x, train, f'layer_{i}_norm'))
      values = Conv(self.growth_rate, name=f'layer_{i}_conv')(values)
      if train and self.dropout:
        values = dropout(values, self.dropout, self.make_rng('dropout'), self.axis_name)
      x = concatenate(x, as_features(values, train, self.axis_name))
    return x
