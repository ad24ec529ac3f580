"""Drop-path: which inputs of FractalNet's joins are averaged in a training step (Larsson et al. 2017, section 3.1)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class DropPath(NamedTuple):
  """One step's draw.

  Attributes:
    key: of the local drops.
    rate: with which a join drops an input, locally.
    column: int32, the one column kept in the whole network; 0: drops are local.
  """

  key: Array
  rate: float
  column: Array


def draw(key: Array, num_columns: int, local_rate: float, global_share: float) -> DropPath:
  """Decides for one step: with probability `global_share` one column, any alike; or else local drops."""
  local_key, column_key, share_key = jax.random.split(key, 3)
  column = jax.random.randint(column_key, (), 1, num_columns + 1)
  column = jnp.where(jax.random.bernoulli(share_key, global_share), column, 0)
  return DropPath(local_key, local_rate, column)


def join_weights(drop: DropPath, join: int, columns: Sequence[int]) -> Array:
  """Weights of a join's inputs: the mean of those that are kept.

  Args:
    join: a number of its own.
    columns: the column of each input, 1-based. Where the one column kept is not among them nobody reads the join, and
      its weights are local.

  Returns:
    float32 [inputs], of sum 1. Local drops leave at least one input.
  """
  drop_key, survivor_key = jax.random.split(jax.random.fold_in(drop.key, join))
  kept = jax.random.bernoulli(drop_key, 1 - drop.rate, (len(columns),))
  survivor = jnp.arange(len(columns)) == jax.random.randint(survivor_key, (), 0, len(columns))
  kept = jnp.where(jnp.any(kept), kept, survivor)
  chosen = jnp.array(columns, jnp.int32) == drop.column
  kept = jnp.where(jnp.any(chosen), chosen, kept).astype(jnp.float32)
  return kept / jnp.sum(kept)
