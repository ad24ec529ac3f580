"""Which images form which batch, as pure functions of (seed, epoch)."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from paranet_jax.host.errors import UserError

_SHUFFLE_STREAM = 0  # Separates these random numbers from those of augmentation.


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
  """Full batches in an epoch; the remainder is dropped.

  Raises:
    UserError: there is no full batch.
  """
  if batch_size > num_examples:
    raise UserError(
      f'expected at most {num_examples} images per batch (all training images), found {batch_size}: '
      f'lower --config.train.batch_size'
    )
  return num_examples // batch_size


def epoch_order(
  seed: Int[Array, ''] | int, epoch: Int[Array, ''] | int, num_examples: int, batch_size: int
) -> Int32[Array, 'steps batch_size']:
  """The training order of an epoch: shuffled indices, each image at most once.

  seed and epoch may be traced int32; num_examples and batch_size are static.
  """
  steps = steps_per_epoch(num_examples, batch_size)
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _SHUFFLE_STREAM), epoch)
  order = jax.random.permutation(key, np.arange(num_examples, dtype=np.int32))
  return order[: steps * batch_size].reshape(steps, batch_size)


@functools.lru_cache(maxsize=32)  # Runs of the same sizes compile one.
def jitted_order(num_examples: int, batch_size: int) -> jax.stages.Wrapped:
  """`epoch_order` as a function of seed and epoch."""
  return jax.jit(functools.partial(epoch_order, num_examples=num_examples, batch_size=batch_size))


def eval_batches(
  num_examples: int, batch_size: int
) -> tuple[Int32[np.ndarray, 'steps batch_size'], Float32[np.ndarray, 'steps batch_size']]:
  """Indices of all examples in order, and their mask; padding in the last batch has index 0 and mask 0."""
  steps = -(-num_examples // batch_size)
  indices = np.arange(steps * batch_size, dtype=np.int32).reshape(steps, batch_size)
  real = indices < num_examples
  return np.where(real, indices, 0), real.astype(np.float32)
