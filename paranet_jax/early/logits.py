"""The logits of every usable exit on a whole split, as evaluation computes them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paranet_jax.data.augment import normalize
from paranet_jax.data.batches import eval_batches
from paranet_jax.data.dataset import Split
from paranet_jax.steps import Preprocessing


class Outputs(NamedTuple):
  """What the usable exits say of a split: logits float32 [K, N, C], and labels int [N]."""

  logits: np.ndarray
  labels: np.ndarray

  def take(self, chosen: np.ndarray) -> 'Outputs':
    """The outputs of these samples."""
    return Outputs(self.logits[:, chosen], self.labels[chosen])


def split_logits(
  model: Any, variables: Any, exits: Sequence[int], preprocessing: Preprocessing, split: Split, batch_size: int
) -> np.ndarray:
  """Logits of the exits on every image, in order.

  Args:
    model: with the multi-exit interface.
    variables: its parameters and statistics.
    exits: 1-based numbers, K of them.
    preprocessing: as in evaluation; nothing is augmented.
    split: N images.
    batch_size: images at once; changes speed and memory, not the result.

  Returns:
    float32 [K, N, C].
  """
  exits = tuple(exits)

  @jax.jit
  def forward(variables, images):
    logits = model.apply(variables, normalize(images, preprocessing.mean, preprocessing.std), exits=exits)
    return jnp.stack([logits[number - 1] for number in exits])

  indices, _ = eval_batches(len(split), min(batch_size, len(split)))
  batches = [np.asarray(forward(variables, np.asarray(split.images[chosen]))) for chosen in indices]
  return np.concatenate(batches, axis=1)[:, : len(split)]
