"""Exits with channels of their own, for any chain or graph of layers: Deep Feature Surgery (DFS, Gong et al. 2024)."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from paranet_jax.models.multi_exit import Chain, Graph, MultiExit, field_values, named_after


def with_own_channels(model: MultiExit, share: float) -> MultiExit:
  """The same function as the model, in which a part of the channels at each exit learns from that exit alone.

  Feature partitioning: the channels that an exit reads are divided, in order, into shared ones and the exit's own.
  Feature referencing: the exit reads all of them, and so do the layers after it, but these read the exit's own ones
  without a gradient, so that no other exit's gradient conflicts there (Gong et al., ECCV 2024, arXiv 2407.13986). The
  paper can also be read so that the shared channels get no gradient from the exit; here, as in the authors' code, they
  get those of all exits.

  Args:
    share: of the channels, those that are an exit's own: 1 - beta of the paper; 0.5 in the authors' networks.
  """
  return _referencing_class(type(model))(**field_values(model), own_channels=share)


def hands_on_features(model: Any) -> bool:
  """Whether a network can have such exits."""
  return isinstance(model, Chain | Graph)


@functools.cache  # Models of equal fields are equal.
def _referencing_class(base: type[MultiExit]) -> Callable[..., MultiExit]:
  class Referencing(base):
    own_channels: float = 0.0

    @nn.nowrap
    def handed_on(self, x):
      return jax.tree.map(functools.partial(_referenced, share=self.own_channels), x)

  return named_after(Referencing, base)


def _referenced(x: jax.Array, share: float) -> jax.Array:
  """The values of x, where the last channels, this share of them, have no gradient."""
  shared = round(x.shape[-1] * (1 - share))
  if shared == x.shape[-1]:
    return x
  return jnp.concatenate([x[..., :shared], jax.lax.stop_gradient(x[..., shared:])], axis=-1)
