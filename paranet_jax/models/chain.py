"""The multi-exit interface of a network that is one chain of layers with exits along it."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from paranet_jax.models.layers.initial import initial_variables
from paranet_jax.models.multi_exit import MultiExit

Carry = dict[int, Any]
"""The features that the last exit run reads, by its number."""


class Chain(MultiExit):
  """Base of the networks that give `exit_positions`, `segment` and `exit_logits`.

  Attributes:
    num_classes: width of every exit.
    image_side: S, pixels.
    channels: of the images.
    dtype: of the computation; parameters, statistics and logits are float32.
    axis_name: device axis over which batch statistics are shared in training.
  """

  num_classes: int = 100
  image_side: int = 32
  channels: int = 3
  dtype: Any = jnp.float32
  axis_name: str | None = None

  initial_variables = staticmethod(initial_variables)

  @property
  def exit_positions(self) -> tuple[int, ...]:
    """The place in the chain, from 1, after which each exit hangs; the last one is the end."""
    raise NotImplementedError

  def segment(self, x: Any, start: int, end: int, train: bool) -> Any:
    """Features after place `end` from those after place `start`; at 0 they are the images in `dtype`."""
    raise NotImplementedError

  def exit_logits(self, x: Any, number: int, train: bool) -> Array:
    """Float32 logits [B, num_classes] of exit `number` from the features where it hangs."""
    raise NotImplementedError

  @property
  def num_exits(self) -> int:
    """Exits along the chain, the one at its end included."""
    return len(self.exit_positions)

  @nn.compact
  def _evaluate(self, images, carry, exits, train):
    positions = (0, *self.exit_positions)
    done, x = next(iter(carry.items()), (0, images.astype(self.dtype)))
    logits = {}
    for number in range(done + 1, max(exits, default=0) + 1):
      x = self.segment(x, positions[number - 1], positions[number], train)
      if number in exits:
        logits[number] = self.exit_logits(x, number, train)
    return logits, {max(exits, default=done): x}


def check_halvings(image_side: int, times: int) -> None:
  """Raises ValueError unless a side can be halved that often."""
  if image_side < 1 or image_side % 2**times:
    raise ValueError(f'image_side must be a multiple of {2**times}, to be halved {times} times, found {image_side}')


def positions_of(exits: str | tuple[int, ...], each: str, groups: int, size: int) -> tuple[int, ...]:
  """Where exits hang in a chain of equal groups.

  Args:
    exits: 'last': one at the end; the word `each`: one after each group; or the places, ascending from 1, in every
      group after which one hangs, besides the one at the end.
    groups: of `size` places each.

  Raises:
    ValueError: anything else, in one line.
  """
  inner = {'last': (), each: (size,)}.get(exits, exits)
  if isinstance(inner, str) or list(inner) != sorted(set(inner) & set(range(1, size + 1))):
    raise ValueError(f"exits must be 'last', '{each}' or ascending numbers from 1 to {size}, found {exits!r}")
  positions = {group * size + place for group in range(groups) for place in inner}
  return tuple(sorted(positions | {groups * size}))
