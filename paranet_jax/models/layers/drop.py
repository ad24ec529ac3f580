"""Dropout (Srivastava et al. 2014) and FractalNet's drop-path (Larsson et al. 2017, section 3.1).

What is dropped does not depend on the number of devices that a batch is sharded over.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int


def dropout(x: Float[Array, 'B H W C'], rate: float, key: Array, axis_name: str | None) -> Float[Array, 'B H W C']:
  """Zeroes each value with probability `rate` and divides the others by 1 - rate.

  Args:
    x: a whole batch, or this device's shard of a batch sharded in order.
    rate: 0 to less than 1.
    key: the same on every device; with an image's position in the batch it determines what is dropped.
    axis_name: device axis over which the batch is sharded.
  """
  first = lax.axis_index(axis_name) * len(x) if axis_name else 0
  keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, first + jnp.arange(len(x)))
  kept = jax.vmap(lambda own: jax.random.bernoulli(own, 1 - rate, x.shape[1:]))(keys)
  return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


class DropPath(NamedTuple):
  """What drop-path drops in one training step."""

  key: Array
  rate: float  # Probability that a join drops an input in local drop-path.
  column: Int[Array, '']  # The only column kept, network-wide; 0: local drop-path.


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
