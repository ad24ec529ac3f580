"""An adopted architecture as a multi-exit network: exits at some of its places, and the one that it came with."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from paranet_jax.host.errors import UserError
from paranet_jax.models.adopted.architecture import Architecture, Mode, Parts
from paranet_jax.models.adopted.heads import HEADS, BlocksHead, Head
from paranet_jax.models.adopted.layers import LAYER_SCALE
from paranet_jax.models.adopted.registry import find_architecture, place_of
from paranet_jax.models.layers.initial import ONES, ZEROS, draw, generator
from paranet_jax.models.multi_exit import Chain, Logits


class AdoptedNetwork(Chain):
  """A trained network with exits.

  Attributes:
    arch: name of the architecture.
    exits: ascending places of the exits before the last one.
    head: kind of head of these exits (see `heads.py`); None: the architecture's default.
    copies: blocks of each shape in a head 'blocks'; None: as few as possible.
    last: 'own': the last exit is the network's own classifier; 'new': it is replaced by pool-linear.

  Raises:
    ValueError: the architecture has no such place, or the exits are not in ascending order; the message is one line.
    UserError: there is no such architecture.
  """

  num_classes: int = 10
  image_side: int = 32
  channels: int = 3
  dtype: Any = jnp.float32
  axis_name: str | None = None
  arch: str = 'cifar_resnet20'
  exits: tuple[str, ...] = ()
  head: str | None = None
  copies: int | None = None
  last: str = 'own'

  exits_apart = True

  def __post_init__(self):
    positions = self.exit_positions
    if list(positions) != sorted(set(positions)):
      places = self.architecture.places
      raise ValueError(
        f'exits must be places of {self.arch} in the order of its layers, before the last, {places[-1]}, '
        f'found {",".join(self.exits)}'
      )
    super().__post_init__()

  def initial_variables(self, shapes: Any, seed: int) -> Any:
    """Draws variables as NumPy arrays (see `initial.initial_variables`); what PyTorch alone names, as it does there."""

    def drawn(path, leaf):
      name = path[-1].key
      if name in (*ONES, *ZEROS, 'kernel'):
        return draw(path, leaf, seed)
      if name.endswith('bias') or name == 'layer_scale':  # `attn.qkv.bias`, `self_attention.in_proj_bias`.
        return np.full(leaf.shape, LAYER_SCALE if name == 'layer_scale' else 0, leaf.dtype)
      return generator(path, seed).normal(0, 0.02, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(drawn, shapes)

  @property
  def architecture(self) -> Architecture:
    """What is adopted."""
    return find_architecture(self.arch)

  @property
  def code_of_others(self) -> str:
    """Where the architecture's code is (see `kept_programs.described`)."""
    return place_of(self.arch)

  @property
  def parts(self) -> Parts:
    """Its stages and its classifier."""
    return self.architecture.build(self.num_classes)

  @property
  def exit_positions(self) -> tuple[int, ...]:
    """The stages that the exits follow."""
    found = self.architecture
    return (*map(found.position, self.exits), len(found.places))

  def segment(self, x: Any, start: int, end: int, train: bool) -> Any:
    """Stages start + 1 to end."""
    for _, stage in self.parts.stages[start:end]:
      x = stage(x, Mode(train, self.axis_name))
    return x

  def exit_logits(self, x: Array, number: int, train: bool) -> Logits:
    """An added head, or the network's own classifier."""
    mode, name = Mode(train, self.axis_name), f'exit_{number}'
    if (head := self._head(number)) is BlocksHead:
      after = self.exit_positions[number - 1]
      return BlocksHead(self.num_classes, self.arch, after, self.copies, name=name)(x, mode)
    if head:
      return head(self.num_classes, name=name)(x, mode)
    return self.parts.classifier(x, mode).astype(jnp.float32)

  @nn.nowrap
  def exit_features(self, x: Any, number: int) -> Any:
    """What its head reads."""
    head = self._head(number)
    return head.read(x) if head else x

  @nn.nowrap
  def _head(self, number: int) -> type[Head] | None:
    """The kind of head of an exit; None: the network's own classifier."""
    own = self.architecture.head
    if number < self.num_exits:
      return HEADS[self.head or own]
    return HEADS['class_token' if own == 'class_token' else 'linear'] if self.last == 'new' else None


def from_fields(name: str, fields: dict[str, Any]) -> AdoptedNetwork:
  """Builds the network from a run's configuration fields.

  Raises:
    UserError: the architecture cannot read images of this side, or there is no such architecture.
  """
  arch, side = fields['arch'], fields['image_side']
  found = find_architecture(arch)
  if side % found.patch:
    raise UserError(
      f'model.image_side must be a multiple of {found.patch} for {arch}, found {side}; set --config.model.image_side'
    )
  if side < found.least_side:
    raise UserError(
      f'model.image_side must be {found.least_side} or more for {arch}, found {side}; set --config.model.image_side'
    )
  fields['exits'] = tuple(place.strip() for place in fields['exits'].split(',') if place.strip())
  return AdoptedNetwork(**fields)
