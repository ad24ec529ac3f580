"""Which images make which batch, as pure functions of (seed, epoch)."""

import jax
import numpy as np

from paranet_jax.host.errors import UserError

_SHUFFLE_STREAM = 0  # Keeps these random numbers apart from the augmentation's.


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
  """Full batches in an epoch; the remainder is dropped.

  Raises:
    UserError: there is not one full batch.
  """
  if batch_size > num_examples:
    raise UserError(
      f'expected at most {num_examples} images a batch (the training images there are), found {batch_size}: '
      f'lower --config.train.batch_size'
    )
  return num_examples // batch_size


def epoch_order(seed: jax.Array | int, epoch: jax.Array | int, num_examples: int, batch_size: int) -> jax.Array:
  """The shuffled training order: int32 [steps, batch_size] indices, each image at most once, anew every epoch.

  seed and epoch may be traced int32; num_examples and batch_size are static.
  """
  steps = steps_per_epoch(num_examples, batch_size)
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _SHUFFLE_STREAM), epoch)
  order = jax.random.permutation(key, np.arange(num_examples, dtype=np.int32))
  return order[: steps * batch_size].reshape(steps, batch_size)


def eval_batches(num_examples: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
  """Every example once, in order, the last batch padded.

  Returns:
    (indices, mask): int32 and float32 [ceil(num_examples / batch_size), batch_size]; padding has index 0 and mask 0.
  """
  steps = -(-num_examples // batch_size)
  indices = np.arange(steps * batch_size, dtype=np.int32).reshape(steps, batch_size)
  real = indices < num_examples
  return np.where(real, indices, 0), real.astype(np.float32)
