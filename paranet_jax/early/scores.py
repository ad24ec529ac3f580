"""Confidences, which rank samples at an exit, on a scale that does not saturate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from paranet_jax.portable.run import SCORES, confidence, to_confidence

if TYPE_CHECKING:
  from jaxtyping import Float

__all__ = ['SCORES', 'confidence', 'confidences', 'patience', 'to_confidence', 'to_score']


def patience(predictions: ArrayLike) -> Float[np.ndarray, 'K N']:
  """The number of equal consecutive predictions up to and including each exit (Zhou et al. 2020, PABEE).

  Args:
    predictions: int [K, N].
  """
  predictions = np.asarray(predictions)
  counts = np.ones(predictions.shape)
  for k in range(1, len(predictions)):
    counts[k] += counts[k - 1] * (predictions[k] == predictions[k - 1])
  return counts


def confidences(
  logits: Float[np.ndarray, 'K N C'], score: str, temperatures: Sequence[float] | Float[np.ndarray, ' K']
) -> Float[np.ndarray, 'K N']:
  """The confidence of every exit in every sample, by one of `SCORES`."""
  if score == 'patience':
    return patience([np.argmax(exit_logits, axis=-1) for exit_logits in logits])
  return np.stack([confidence(z, score, t) for z, t in zip(logits, temperatures, strict=True)])


def to_score(confidence: ArrayLike, score: str) -> np.ndarray:
  """From the confidence scale to the scale of the score; 0 and less become 0."""
  value = np.maximum(np.asarray(confidence, np.float64), 0.0)
  return value if score == 'patience' else -np.expm1(-value)
