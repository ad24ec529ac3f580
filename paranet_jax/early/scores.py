"""Confidences: what samples are ranked by at an exit, on a scale that does not saturate."""

import numpy as np
from numpy.typing import ArrayLike

SCORES = ('max_prob', 'entropy', 'margin', 'patience')


def confidence(logits: ArrayLike, score: str, temperature: float = 1.0) -> np.ndarray:
  """-log(1 - s) of a probability score s, from log-sum-exps in float64.

  A softmax in float32 is exactly 1 from a logit gap of about 17, and 1 - p in float64 is 0 from about 37. These keep
  their order to any finite gap.

  Args:
    logits: [..., C], C >= 2, finite.
    score: 'max_prob' (largest probability p1), 'entropy' (1 + sum p log p / log C) or 'margin' (p1 - p2).
    temperature: T > 0, by which the logits are divided.

  Returns:
    float64 [...], >= 0 and finite, higher is surer.
  """
  logits = np.asarray(logits, np.float64) / temperature
  largest = np.argmax(logits, axis=-1, keepdims=True)
  others = logits - np.take_along_axis(logits, largest, axis=-1)
  np.put_along_axis(others, largest, -np.inf, axis=-1)
  log_odds = _log_sum_exp(others)  # log((1 - p1) / p1)
  log_total = np.logaddexp(0.0, log_odds)  # -log p1
  if score == 'max_prob':
    log_unsure = log_odds - log_total
  elif score == 'entropy':
    log_unsure = _log_entropy(others, log_odds, log_total) - np.log(np.log(logits.shape[-1]))
  elif score == 'margin':
    log_unsure = np.logaddexp(log_odds, np.max(others, axis=-1)) - log_total
  else:
    raise ValueError(f'not a probability score: {score}')
  return np.maximum(-log_unsure, 0.0)


def _log_entropy(others: np.ndarray, log_odds: np.ndarray, log_total: np.ndarray) -> np.ndarray:
  """log of -sum p log p, which is itself 0 in float64 from a logit gap of about 750."""
  tiny = log_odds < -40  # here -log p1 = log(1 + exp(log_odds)) = exp(log_odds) to the last bit
  log_surprise = np.where(tiny, log_odds, np.log(np.where(tiny, 1.0, log_total)))
  terms = others + np.log(log_total[..., None] - np.where(np.isinf(others), -1.0, others))
  return np.logaddexp(log_surprise, _log_sum_exp(terms)) - log_total


def _log_sum_exp(x: np.ndarray) -> np.ndarray:
  # The runtime calls this after each stage, for one image too: SciPy's takes longer than all the rest of a confidence.
  largest = np.max(x, axis=-1, keepdims=True)
  return np.log(np.sum(np.exp(x - largest), axis=-1)) + largest[..., 0]


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


def to_confidence(score_value: ArrayLike, score: str) -> np.ndarray:
  """From the human scale (0.9, or 3 predictions) to the confidence scale; probability 1 becomes +inf: nobody leaves."""
  value = np.asarray(score_value, np.float64)
  if score == 'patience':
    return value
  with np.errstate(divide='ignore'):
    return -np.log1p(-value)


def to_score(confidence: ArrayLike, score: str) -> np.ndarray:
  """From the confidence scale to the human scale; 0 and less, -inf too, become 0."""
  value = np.maximum(np.asarray(confidence, np.float64), 0.0)
  return value if score == 'patience' else -np.expm1(-value)
