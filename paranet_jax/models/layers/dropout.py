"""Dropout (Srivastava et al. 2014) that does not depend on how many devices a batch is spread over."""

import jax
import jax.numpy as jnp
from jax import Array, lax


def dropout(x: Array, rate: float, key: Array, axis_name: str | None) -> Array:
  """Each value is 0 with probability `rate`, or else 1 / (1 - rate) times itself.

  Args:
    x: [B, H, W, C], all of a batch, or this device's part of one that is spread in order.
    rate: 0 to less than 1.
    key: the same on every device; what is dropped of an image follows from it and the image's place in the batch.
    axis_name: device axis over which the batch is spread.
  """
  first = lax.axis_index(axis_name) * len(x) if axis_name else 0
  keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, first + jnp.arange(len(x)))
  kept = jax.vmap(lambda own: jax.random.bernoulli(own, 1 - rate, x.shape[1:]))(keys)
  return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))
