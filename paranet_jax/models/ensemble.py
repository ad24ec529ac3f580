"""Independently trained networks as one anytime model: exit m averages m of them (Huang et al. 2018, section 5)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paranet_jax.models.layers.initial import initial_variables
from paranet_jax.models.multi_exit import MultiExit


class Ensemble(MultiExit):
  """Exit m returns the log of the mean softmax probabilities of members 1..m as logits.

  Each member is trained alone; `ensemble_variables` joins their variables. A stage carries the log of the summed
  probabilities of the members run so far, by their number.

  Attributes:
    members: multi-exit models with the same classes, possibly one model several times; their last exits are used.

  Raises:
    ValueError: the members have different numbers of classes, or the ensemble is run in training; one line.
  """

  members: Sequence[nn.Module]

  initial_variables = staticmethod(initial_variables)

  def setup(self):
    classes = sorted({member.num_classes for member in self.members})
    if len(classes) != 1:
      raise ValueError(f'the members of an ensemble must have the same number of classes, found {classes}')
    # Without deep copies, a module that occurs twice would share its weights.
    self.networks = [member.clone(parent=None, name=None, _deep_clone=True) for member in self.members]

  @property
  def num_exits(self) -> int:
    """One per member."""
    return len(self.members)

  @property
  def num_classes(self) -> int:
    """Number of classes of every member."""
    return self.members[0].num_classes

  def _evaluate(self, images, carry, exits, train):
    if train:
      raise ValueError('an ensemble cannot be trained: train each member alone')
    ((done, total),) = carry.items() or {0: jnp.float32(-jnp.inf)}.items()
    logits = {}
    for number in sorted(set(exits)):
      for member in self.networks[done:number]:
        total = jnp.logaddexp(total, jax.nn.log_softmax(member(images, exits=(member.num_exits,))[-1]))
      done = number
      logits[number] = total - jnp.log(jnp.float32(number))
    return logits, {done: total}


def ensemble_variables(members: Sequence[Any]) -> Any:
  """The variables of an `Ensemble` from its members' `params` and `batch_stats`, in the order of the members."""
  collections = sorted({collection for variables in members for collection in variables})
  return {
    collection: {
      f'networks_{index}': variables[collection] for index, variables in enumerate(members) if collection in variables
    }
    for collection in collections
  }
