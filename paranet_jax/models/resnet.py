"""Residual networks for small images (He et al. 2016a, section 4.2; pre-activation: He et al. 2016b).

With exits along its stages it becomes ResNet-MC, a baseline of MSDNet (Huang et al. 2018, section 5 and appendix).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from paranet_jax.models.layers.conv import Classifier, Conv, ConvNormRelu, batch_norm, batch_norm_relu
from paranet_jax.models.layers.dense import Exit, as_features
from paranet_jax.models.layers.initial import initial_variables
from paranet_jax.models.multi_exit import Chain, Logits, check_halvings, exit_positions, parse_exits

WIDTHS = (16, 32, 64)
"""Channels of the 3x3 convolutions of each stage, at sides S, S / 2 and S / 4."""


class _Block(nn.Module):
  width: int
  stride: int
  first: bool  # Of its stage.
  axis_name: str | None = None
  shortcut_padding: str = 'behind'

  def subsample(self, x: Array) -> Array:
    """Option A: every `stride`-th pixel, with zeros for the new channels, which has no parameters."""
    new = self.width - x.shape[-1]
    before = new // 2 if self.shortcut_padding == 'both_sides' else 0
    return jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (before, new - before)))


class BasicBlock(_Block):
  """relu(x + Conv3x3-BN-ReLU-Conv3x3-BN), with a parameter-free shortcut where the shape changes (option A)."""

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    y = ConvNormRelu(self.width, 3, self.stride, self.axis_name, name='conv1')(x, train)
    y = Conv(self.width, name='conv2')(y)
    y = batch_norm(y, train, self.axis_name, 'norm2')
    return jax.nn.relu(self.subsample(x) + y)


class PreActivationBlock(_Block):
  """x + BN-ReLU-Conv3x3-BN-ReLU-Conv3x3; the shortcut of a stage's first block also starts after BN-ReLU."""

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    y = batch_norm_relu(x, train, self.axis_name, 'norm1')
    shortcut = self.subsample(y if self.first else x)
    y = Conv(self.width, stride=self.stride, name='conv1')(y)
    y = batch_norm_relu(y, train, self.axis_name, 'norm2')
    return shortcut + Conv(self.width, name='conv2')(y)


class BottleneckBlock(_Block):
  """x + BN-ReLU-Conv1x1(width)-BN-ReLU-Conv3x3(width)-BN-ReLU-Conv1x1(4 width).

  In a stage's first block, a 1x1 projection after BN-ReLU replaces x.
  """

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    y = batch_norm_relu(x, train, self.axis_name, 'norm1')
    shortcut = Conv(4 * self.width, 1, self.stride, name='shortcut')(y) if self.first else x
    y = Conv(self.width, 1, self.stride, name='conv1')(y)
    y = batch_norm_relu(y, train, self.axis_name, 'norm2')
    y = Conv(self.width, name='conv2')(y)
    y = batch_norm_relu(y, train, self.axis_name, 'norm3')
    return shortcut + Conv(4 * self.width, 1, name='conv3')(y)


BLOCKS = {'basic': (BasicBlock, 2), 'preactivation': (PreActivationBlock, 2), 'bottleneck': (BottleneckBlock, 3)}
"""The kinds of block and the number of layers in each."""

PADDINGS = ('behind', 'both_sides')
"""Where a parameter-free shortcut has the zeros that stand for new channels."""


class ResNet(Chain):
  """A convolution, three stages of n residual blocks with 16, 32 and 64 channels, and exits.

  Attributes:
    depth: layers with weights: 6 n + 2, or 9 n + 2 with bottlenecks.
    block: 'basic' (He et al. 2016a), 'preactivation' or 'bottleneck' (He et al. 2016b; also pre-activation, for 164 and
      1001 layers).
    exits: 'last', 'stages' (after each stage), or the blocks of every stage that an exit follows in addition to the
      last exit, such as (4, 8) at depth 62 for the ResNet-MC of Huang et al. (2018).
    shortcut_padding: 'behind': the zeros of a parameter-free shortcut follow its channels; 'both_sides': half precede
      them, as in the networks for CIFAR that are widely used with PyTorch.

  Raises:
    ValueError: the shapes do not fit together; the message is one line.
  """

  num_classes: int = 100
  image_side: int = 32
  channels: int = 3
  dtype: Any = jnp.float32
  axis_name: str | None = None
  depth: int = 110
  block: str = 'basic'
  exits: str | tuple[int, ...] = 'last'
  shortcut_padding: str = 'behind'

  exits_apart = True
  initial_variables = staticmethod(initial_variables)

  def __post_init__(self):
    if self.block not in BLOCKS:
      raise ValueError(f'block must be one of {", ".join(BLOCKS)}, found {self.block!r}')
    convolutions = len(WIDTHS) * BLOCKS[self.block][1]
    if self.depth <= 2 or (self.depth - 2) % convolutions:
      raise ValueError(f'depth must be {convolutions} n + 2 for n {self.block} blocks a stage, found {self.depth}')
    if self.shortcut_padding not in PADDINGS:
      raise ValueError(f'shortcut_padding must be one of {", ".join(PADDINGS)}, found {self.shortcut_padding!r}')
    if self.block == 'bottleneck' and self.shortcut_padding != 'behind':
      raise ValueError(
        f"shortcut_padding must be 'behind' for bottleneck blocks, whose shortcuts are projections, "
        f'found {self.shortcut_padding!r}'
      )
    check_halvings(self.image_side, len(WIDTHS) - 1)
    exit_positions(self.exits, 'stages', len(WIDTHS), self.blocks_per_stage)
    super().__post_init__()

  @property
  def blocks_per_stage(self) -> int:
    """n, residual blocks in each stage."""
    return (self.depth - 2) // (len(WIDTHS) * BLOCKS[self.block][1])

  @property
  def exit_positions(self) -> tuple[int, ...]:
    """The residual blocks, counted over all stages, that the exits follow."""
    return exit_positions(self.exits, 'stages', len(WIDTHS), self.blocks_per_stage)

  def segment(self, x: Float[Array, 'B H W C'], start: int, end: int, train: bool) -> Float[Array, 'B h w c']:
    """Residual blocks start + 1 to end, with the stem before the first."""
    if start == 0:
      if self.block == 'basic':
        x = ConvNormRelu(WIDTHS[0], axis_name=self.axis_name, name='stem')(x, train)
      else:
        x = Conv(WIDTHS[0], name='stem')(x)
    block_class, _ = BLOCKS[self.block]
    for index in range(start, end):
      stage, place = divmod(index, self.blocks_per_stage)
      first, name = place == 0, f'stage_{stage + 1}_block_{place + 1}'
      stride = 2 if first and stage else 1
      x = block_class(WIDTHS[stage], stride, first, self.axis_name, self.shortcut_padding, name=name)(x, train)
    return x

  def exit_logits(self, x: Array, number: int, train: bool) -> Logits:
    """Pool-linear, preceded by BN-ReLU with pre-activation blocks."""
    name = f'exit_{number}'
    if self.block == 'basic':
      return Classifier(self.num_classes, name=name)(x)
    return Exit(self.num_classes, name=name)(as_features(x, train, self.axis_name), train)


def from_fields(name: str, fields: dict[str, Any]) -> ResNet:
  """Builds the network from a run's configuration fields."""
  fields['exits'] = parse_exits(fields['exits'])
  return ResNet(**fields)
