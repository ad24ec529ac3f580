"""Exits that read the logits of the exit before them, for any multi-exit model: BoostNet's sums and IMTA's transfer.

A linked model has the parameters of the model that it is made from, under the same names, and computes all exits up to
the one that is asked for.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from paranet_jax.models.layers.conv import batch_norm_relu
from paranet_jax.models.layers.initial import kernel_init
from paranet_jax.models.multi_exit import Carry, Logits, MultiExit, field_values, named_after

FEATURES, LINK = 'features', 'logits'
"""Keys of a carry: the carry of the model itself, and what the next exit reads of the last one run, by its number."""


def boosted(model: MultiExit, temperature: float) -> MultiExit:
  """Exit n adds what the exits before it have not explained: BoostNet (Yu et al. 2023, arXiv 2211.16726).

  F_n = f_n + t stop_gradient(F_(n-1)), where f_n are the logits of the model's exit n (section "Prediction Reweighting
  with Temperature"). F_n is what exit n answers and what its loss reads, so that the loss trains f_n alone, on what is
  left to learn. The paper's gradient rescaling is gradient equilibrium, which this module does not do (see
  `steps.make_train_step`).

  Args:
    temperature: t, the paper's t_n, the same for all exits; the authors train CIFAR-100 with 0.5.
  """
  return _boosted_class(type(model))(**field_values(model), boost=temperature)


def with_transfer(model: MultiExit, width: int) -> MultiExit:
  """Exit n also reads the logits of exit n - 1: inline subnetwork collaboration, of IMTA (Li et al. 2019, section 3.2).

  The paper concatenates ReLU(BN(linear(logits of exit n - 1))) to the features that the classifier of exit n reads. A
  linear layer of concatenated features is a sum of two, so the classifier itself stays as it is and the second one is
  added. Gradients pass through the logits, as in the authors' code, which however trains the exits on a backbone that
  is finished and frozen.

  Args:
    width: features between both linear layers; 128 on CIFAR in the authors' code, as many as their exits have.
  """
  return _transfer_class(type(model))(**field_values(model), transfer=width)


def trained_by_its_exits(model: Any) -> Any:
  """A model whose exit n has the parameters that the loss of this model's exit n trains: of a boosted one, fewer."""
  return model.unlinked() if hasattr(model, 'unlinked') else model


@functools.cache  # Models of equal fields are equal.
def _boosted_class(base: type[MultiExit]) -> Callable[..., MultiExit]:
  class Boosted(base):
    boost: float = 0.0

    exits_apart = False

    @nn.nowrap
    def unlinked(self) -> MultiExit:
      """The model without the sums."""
      return base(**{name: value for name, value in field_values(self).items() if name != 'boost'})

    def _evaluate(self, images, carry, exits, train):
      def handed_on(logits):
        return self.boost * (jax.lax.stop_gradient(logits) if train else logits)

      evaluate = functools.partial(super()._evaluate, images)
      return _linked(evaluate, carry, exits, train, handed_on, lambda number, before: before)

    def _carried(self, features, number):
      return {**features, FEATURES: super()._carried(features[FEATURES], number)}

  return named_after(Boosted, base)


@functools.cache
def _transfer_class(base: type[MultiExit]) -> Callable[..., MultiExit]:
  class Transferring(base):
    transfer: int = 0

    exits_apart = False

    @nn.compact
    def _evaluate(self, images, carry, exits, train):
      exits = tuple(exits)
      options = self.transfer, self.num_classes, self.axis_name
      # Made first: after a call of another compact method, no module can be added.
      transfers = {
        number: Transfer(*options, name=f'exit_{number}_transfer') for number in range(2, max(exits, default=0) + 1)
      }

      # Not the logits themselves: the stages of a bundle give every value under one name.
      def handed_on(logits):
        return -logits

      def added(number, before):
        return transfers[number](-before, train)

      evaluate = functools.partial(super()._evaluate, images)
      return _linked(evaluate, carry, exits, train, handed_on, added)

    def _carried(self, features, number):
      return {**features, FEATURES: super()._carried(features[FEATURES], number)}

  return named_after(Transferring, base)


def _linked(
  evaluate: Callable,
  carry: Carry,
  exits: Iterable[int],
  train: bool,
  handed_on: Callable[[Logits], Array],
  added: Callable[[int, Array], Logits],
) -> tuple[dict[int, Logits], Carry]:
  """What `_evaluate` returns, where the logits of an exit depend on those of the exit before it.

  Args:
    evaluate: `_evaluate` of the model itself, from the carry on.
    handed_on: what the next exit reads of an exit's logits.
    added: to the logits of an exit, by its number, from what it reads of the exit before.
  """
  exits = tuple(exits)
  ((done, before),) = carry[LINK].items() if carry else {0: None}.items()
  numbers = range(done + 1, max(exits, default=done) + 1)
  logits, features = evaluate(carry.get(FEATURES, {}), numbers, train)
  linked = {}
  for number in numbers:
    linked[number] = logits[number] if before is None else logits[number] + added(number, before)
    done, before = number, handed_on(linked[number])
  return {number: linked[number] for number in exits}, {FEATURES: features, LINK: {done: before}}


class Transfer(nn.Module):
  """Linear-BN-ReLU-linear, from the logits of one exit to a part of those of the next."""

  width: int
  num_classes: int
  axis_name: str | None = None

  @nn.compact
  def __call__(self, logits: Float[Array, 'B classes'], train: bool) -> Float[Array, 'B classes']:
    hidden = nn.Dense(self.width, kernel_init=kernel_init, name='hidden')(logits)
    hidden = batch_norm_relu(hidden[:, None, None], train, self.axis_name, 'norm')[:, 0, 0]
    return nn.Dense(self.num_classes, False, kernel_init=kernel_init, name='classifier')(jnp.asarray(hidden))
