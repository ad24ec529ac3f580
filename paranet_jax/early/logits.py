"""The logits of every usable exit on a whole split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from paranet_jax.portable import run as runtime

if TYPE_CHECKING:
  from paranet_jax.data.dataset import Split
  from paranet_jax.steps import Preprocessing


class Outputs(NamedTuple):
  """The logits of the usable exits on a split, and its labels."""

  logits: Float[np.ndarray, 'K N C']
  labels: Int[np.ndarray, ' N']

  @classmethod
  def of(cls, logits: Float[np.ndarray, 'K N C'], labels: Any | None) -> Outputs:
    """labels: None: there are none, and the predictions of the last exit take their place."""
    return cls(logits, logits[-1].argmax(-1) if labels is None else np.asarray(labels))

  def take(self, chosen: Int[np.ndarray, ' n']) -> Outputs:
    """The outputs of some samples."""
    return Outputs(self.logits[:, chosen], self.labels[chosen])


def split_logits(
  model: Any, variables: Any, exits: Sequence[int], preprocessing: Preprocessing, split: Split, batch_size: int
) -> Float[np.ndarray, 'K N C']:
  """Logits of the exits on every image of a split, in order.

  Args:
    model: with the multi-exit interface.
    variables: its parameters and statistics.
    exits: 1-based numbers.
    preprocessing: that of evaluation; nothing is augmented.
    batch_size: images at once; affects speed and memory, not the result.
  """
  import jax  # Here: a bundle is calibrated without it.
  import jax.numpy as jnp

  from paranet_jax.data.augment import normalize
  from paranet_jax.data.batches import eval_batches

  exits = tuple(exits)

  @jax.jit
  def forward(variables, images):
    logits = model.apply(variables, normalize(images, preprocessing.mean, preprocessing.std), exits=exits)
    return jnp.stack([logits[number - 1] for number in exits])

  indices, _ = eval_batches(len(split), min(batch_size, len(split)))
  batches = [np.asarray(forward(variables, np.asarray(split.images[chosen]))) for chosen in indices]
  return np.concatenate(batches, axis=1)[:, : len(split)]


def bundle_logits(bundle: runtime.Adaptive, images: UInt8[np.ndarray, 'N H W C']) -> Float[np.ndarray, 'K N C']:
  """Logits of the exits of a bundle, which stages compute in turn."""
  every = bundle.with_thresholds([None] * (len(bundle.exits) - 1) + [0.0])
  waves = []
  for first in range(0, len(images), runtime.WAVE):
    carried, found = every.begin(images[first : first + runtime.WAVE]), []
    for number in every.visited:
      carried, logits = every.stage(number)(carried)
      found.append(logits)
    waves.append(np.stack(found))
  return np.concatenate(waves, axis=1)
