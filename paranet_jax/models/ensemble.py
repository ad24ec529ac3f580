"""Independently trained networks as one anytime model (MSDNet: Huang et al. 2018, section 5): exit m averages m."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from paranet_jax.models.layers.initial import initial_variables
from paranet_jax.models.multi_exit import MultiExit

Carry = dict[int, Array]
"""The log of the summed probabilities [B, num_classes] of the members run so far, by their number."""


class Ensemble(MultiExit):
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
    # A module given twice would be one network; copies, of a member's own modules too, have weights of their own.
    self.networks = [member.clone(parent=None, name=None, _deep_clone=True) for member in self.members]

  @property
  def num_exits(self) -> int:
    """One a member."""
    return len(self.members)

  @property
  def num_classes(self) -> int:
    """That of every member."""
    return self.members[0].num_classes

  def _evaluate(self, images, carry, exits, train):
    if train:
      raise ValueError('an ensemble is not trained: train each member by itself')
    ((done, total),) = carry.items() or {0: jnp.float32(-jnp.inf)}.items()
    logits = {}
    for number in sorted(set(exits)):
      for member in self.networks[done:number]:
        total = jnp.logaddexp(total, jax.nn.log_softmax(member(images, exits=(member.num_exits,))[-1]))
      done = number
      logits[number] = total - jnp.log(jnp.float32(number))
    return logits, {done: total}


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
