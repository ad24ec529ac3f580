"""Drop-path: draws the inputs that FractalNet's joins average in a training step (Larsson et al. 2017, section 3.1)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


class DropPath(NamedTuple):
  """The draw for one step.

  Attributes:
    key: random key for local drops.
    rate: probability that a join drops an input in local drop-path.
    column: the only column kept, network-wide; 0: local drop-path.
  """

  key: Array
  rate: float
  column: Int[Array, '']


def draw(key: Array, num_columns: int, local_rate: float, global_share: float) -> DropPath:
  """Draws one step: with probability `global_share` a single column, uniformly; otherwise local drop-path."""
  local_key, column_key, share_key = jax.random.split(key, 3)
  column = jax.random.randint(column_key, (), 1, num_columns + 1)
  column = jnp.where(jax.random.bernoulli(share_key, global_share), column, 0)
  return DropPath(local_key, local_rate, column)


def join_weights(drop: DropPath, join: int, columns: Sequence[int]) -> Float[Array, ' inputs']:
  """Weights of a join's inputs, which average those kept and sum to 1; at least one input is kept.

  Args:
    join: a unique number.
    columns: 1-based column of each input. If the single column kept is not among them, no layer reads the join, and its
      weights are those of local drop-path.
  """
  drop_key, survivor_key = jax.random.split(jax.random.fold_in(drop.key, join))
  kept = jax.random.bernoulli(drop_key, 1 - drop.rate, (len(columns),))
  survivor = jnp.arange(len(columns)) == jax.random.randint(survivor_key, (), 0, len(columns))
  kept = jnp.where(jnp.any(kept), kept, survivor)
  chosen = jnp.array(columns, jnp.int32) == drop.column
  kept = jnp.where(jnp.any(chosen), chosen, kept).astype(jnp.float32)
  return kept / jnp.sum(kept)
