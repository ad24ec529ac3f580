"""Dropout (Srivastava et al. 2014) that does not depend on the number of devices a batch is sharded over."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float


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
