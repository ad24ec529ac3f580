"""How good probabilities and confidences are: ECE, negative log-likelihood, Brier score, AUROC. None of no samples."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax
from scipy.stats import rankdata


def reliability(
  confidence_prob: ArrayLike, correct: ArrayLike, bins: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The reliability diagram in equal bins ((b - 1) / bins, b / bins] (Guo et al. 2017, section 2).

  Args:
    confidence_prob: [N], probability given to the predicted class.
    correct: bool [N].
    bins: how many.

  Returns:
    Counts int [bins], mean confidence and accuracy float64 [bins], both 0 where the count is 0.
  """
  confidence_prob = np.asarray(confidence_prob, np.float64)
  bin_of = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence_prob)
  counts = np.bincount(bin_of, minlength=bins)
  divisor = np.maximum(counts, 1)
  mean_confidence = np.bincount(bin_of, confidence_prob, minlength=bins) / divisor
  return counts, mean_confidence, np.bincount(bin_of, np.asarray(correct, np.float64), minlength=bins) / divisor


def ece(confidence_prob: ArrayLike, correct: ArrayLike, bins: int = 15) -> float | None:
  """Expected calibration error, 0..1: |accuracy - confidence| of each bin of `reliability`, weighted by its count."""
  counts, mean_confidence, accuracy = reliability(confidence_prob, correct, bins)
  return float(np.average(np.abs(accuracy - mean_confidence), weights=counts)) if counts.any() else None


def nll(logits: ArrayLike, labels: ArrayLike, temperature: float = 1.0) -> float | None:
  """Mean negative log-likelihood of int labels [N] under softmax(logits [N, C] / temperature), nats."""
  log_probabilities = log_softmax(np.asarray(logits, np.float64) / temperature, axis=-1)
  return -float(np.mean(log_probabilities[np.arange(len(labels)), labels])) if len(labels) else None


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float | None:
  """Mean over samples of sum over classes (p - onehot)^2, 0..2; probabilities [N, C], int labels [N]."""
  probabilities = np.asarray(probabilities, np.float64)
  of_label = probabilities[np.arange(len(labels)), labels]
  return float(np.mean(np.sum(probabilities**2, axis=-1) - 2 * of_label + 1)) if len(labels) else None


def auroc(confidence: ArrayLike, correct: ArrayLike) -> float | None:
  """Probability that a right prediction is surer than a wrong one, ties counting half; None without one of each."""
  correct = np.asarray(correct, bool)
  right = int(correct.sum())
  wrong = len(correct) - right
  if not right or not wrong:
    return None
  return float((rankdata(confidence)[correct].sum() - right * (right + 1) / 2) / (right * wrong))
