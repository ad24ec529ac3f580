"""Temperature scaling of one exit (Guo et al. 2017, section 4.2)."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq

from paranet_jax.calibrate.measures import nll

_WIDTH = np.log(1e4)  # T is sought within this factor of the logits' own scale, both ways


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
  """The T > 0 at which softmax(logits / T) has the least mean negative log-likelihood.

  The loss is convex in b = 1 / T, so its derivative mean(E[z] - z_label) rises with b and has one root, found over
  log b. Predictions are those of T = 1, and the loss is never above that of T = 1.

  Where there is no minimum: if every prediction is right the loss falls towards T = 0, the samples do not say how far
  to go, and T stays 1. If the logits know no more than chance it falls towards infinity, and T is 10,000 times their
  scale (mean largest minus mean logit): near uniform. Logits that are all equal keep T = 1.

  Args:
    logits: [N, C], N >= 1, finite.
    labels: int [N].

  Returns:
    T, to a relative 1e-9; finite.
  """
  z = np.asarray(logits, np.float64)
  z = z - z.max(axis=-1, keepdims=True)
  labels = np.asarray(labels)
  of_label = z[np.arange(len(z)), labels]
  scale = -z.mean()
  if scale == 0:
    return 1.0

  def slope(log_b: float) -> float:
    weights = np.exp(np.exp(log_b) / scale * z)
    return np.mean(np.sum(weights * z, axis=-1) / np.sum(weights, axis=-1) - of_label)

  if slope(_WIDTH) <= 0:
    return 1.0
  log_b = -_WIDTH if slope(-_WIDTH) >= 0 else brentq(slope, -_WIDTH, _WIDTH, xtol=1e-10)
  temperature = float(scale / np.exp(log_b))
  return temperature if nll(logits, labels, temperature) < nll(logits, labels, 1.0) else 1.0
