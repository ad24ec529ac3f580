"""Independently trained networks as one anytime model (MSDNet: Huang et al. 2018, section 5): exit m averages m."""

from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from paranet_jax.models.initial import initial_variables

Carry = dict[int, Array]
"""The log of the summed probabilities [B, num_classes] of the members run so far, by their number."""


class Ensemble(nn.Module):
  """Exit m is the mean of the softmax probabilities of members 1..m, as logits: its logarithm.

  The members are trained by themselves; `ensemble_variables` puts what they learned together.

  Attributes:
    members: multi-exit models of the same classes, or one several times; the last exit of each is used.

  Raises:
    ValueError: the members have other numbers of classes, or it is to be trained, in one line.
  """

  members: Sequence[nn.Module]

  initial_variables = staticmethod(initial_variables)

  def setup(self):
    classes = sorted({member.num_classes for member in self.members})
    if len(classes) != 1:
      raise ValueError(f'the members of an ensemble must have the same classes, not {classes} of them')
    # A module given twice would be one network; copies have weights of their own.
    self.networks = [member.clone(parent=None, name=None) for member in self.members]

  @property
  def num_exits(self) -> int:
    """One a member."""
    return len(self.members)

  @property
  def num_classes(self) -> int:
    """That of every member."""
    return self.members[0].num_classes

  def __call__(self, images: Array, train: bool = False, exits: Iterable[int] | None = None) -> list[Array | None]:
    """Log-probabilities of the exits asked for.

    Args:
      images: [B, H, W, channels], normalized.
      train: must be False.
      exits: 1-based; None: all.

    Returns:
      One float32 [B, num_classes] an exit; None for those not asked for.
    """
    asked = set(range(1, self.num_exits + 1) if exits is None else exits)
    logits, carry = [], {}
    for number in range(1, self.num_exits + 1):
      found, carry = self.stage(images, carry, number, train) if number in asked else (None, carry)
      logits.append(found)
    return logits

  def stage(self, images: Array, carry: Carry, number: int, train: bool = False) -> tuple[Array, Carry]:
    """Runs the members up to `number` that have not run yet.

    Args:
      images: [B, H, W, channels], normalized; the same at every stage.
      carry: {} at first, then what the stage before returned. Stages may be skipped, not repeated.
      number: 1-based exit.
      train: must be False.

    Returns:
      float32 log-probabilities [B, num_classes] and {members run: log of their summed probabilities}.
    """
    if train:
      raise ValueError('an ensemble is not trained: train each member by itself')
    ((done, total),) = carry.items() or {0: jnp.float32(-jnp.inf)}.items()
    for member in self.networks[done:number]:
      logits = member(images, exits=(member.num_exits,))[-1]
      total = jnp.logaddexp(total, jax.nn.log_softmax(logits))
    return total - jnp.log(jnp.float32(number)), {number: total} if number < self.num_exits else {}


def ensemble_variables(members: Sequence[Any]) -> Any:
  """The variables of an `Ensemble` from those of its members, in the same order.

  Args:
    members: trees of `params` and `batch_stats`.
  """
  collections = sorted({collection for variables in members for collection in variables})
  return {
    collection: {
      f'networks_{index}': variables[collection] for index, variables in enumerate(members) if collection in variables
    }
    for collection in collections
  }
