"""Confidences: what samples are ranked by at an exit, on a scale that does not saturate."""

import numpy as np
from numpy.typing import ArrayLike

from paranet_jax.portable.run import SCORES, confidence, to_confidence

__all__ = ['SCORES', 'confidence', 'confidences', 'patience', 'to_confidence', 'to_score']


def patience(predictions: ArrayLike) -> np.ndarray:
  """The number of equal consecutive predictions up to and including each exit (Zhou et al. 2020, PABEE).

  Args:
    predictions: int [K, N].

  Returns:
    float64 [K, N], >= 1.
  """
  predictions = np.asarray(predictions)
  counts = np.ones(predictions.shape)
  for k in range(1, len(predictions)):
    counts[k] += counts[k - 1] * (predictions[k] == predictions[k - 1])
  return counts


def confidences(logits: ArrayLike, score: str, temperatures: ArrayLike) -> np.ndarray:
  """The confidence of every exit in every sample.

  Args:
    logits: [K, N, C].
    score: one of `SCORES`.
    temperatures: [K], > 0.

  Returns:
    float64 [K, N].
  """
  if score == 'patience':
    return patience([np.argmax(exit_logits, axis=-1) for exit_logits in logits])
  return np.stack([confidence(z, score, t) for z, t in zip(logits, temperatures, strict=True)])


def to_score(confidence: ArrayLike, score: str) -> np.ndarray:
  """From the confidence scale to the human scale; 0 and less, -inf too, become 0."""
  value = np.maximum(np.asarray(confidence, np.float64), 0.0)
  return value if score == 'patience' else -np.expm1(-value)
