"""One threshold for all exits whose risk against the full network is controlled (Jazbec et al. 2024).

Samples exit at the first exit whose confidence reaches lambda. As lambda falls from +inf (the full network, no loss),
the risk measured on N samples changes only where lambda passes a confidence, so the search visits these, not a grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from paranet_jax.early.policies.policy import RANKING, Choice, Flag, Policy
from paranet_jax.early.policies.shared import shared_thresholds
from paranet_jax.early.thresholds import Samples, threshold_between
from paranet_jax.host.arguments import fraction

if TYPE_CHECKING:
  from jaxtyping import Float


LOSSES = {'gap': 'wrong where the last exit is right', 'disagreement': 'answer differs from the last exit'}
"""What is lost where a sample exits early."""
MANY = 10**12
"""More images than anybody has: larger numbers are not told apart."""


def losses_of(samples: Samples, loss: str) -> Float[np.ndarray, 'K N']:
  """1 where one of `LOSSES` occurs, else 0. 'gap' needs labels, 'disagreement' does not."""
  correct, predictions = samples.correct, samples.predictions
  lost = correct[-1] & ~correct if loss == 'gap' else predictions != predictions[-1]
  return lost.astype(np.float64)


def ltt(confidences: Float[np.ndarray, 'K N'], losses: Float[np.ndarray, 'K N'], epsilon: float, delta: float) -> float:
  """Learn then test: with probability 1 - delta over the samples, the true risk at lambda is at most epsilon.

  Every lambda from +inf down is tested in turn with the exact binomial tail (the probability of so few losses among N
  if each had probability epsilon), as both losses are 0 or 1. The search stops at the first p-value above delta and
  returns the lambda before. The p-value depends only on the number of losses, so testing between adjacent confidences
  tests every real lambda. The tested sequence is thus the whole line, which does not depend on the samples, although
  the points at which it is evaluated do: a lambda whose risk is too high is returned only if the largest such lambda
  was rejected, which has probability delta.

  Args:
    confidences: of samples that fitted neither the network nor the temperatures.
    losses: 0 or 1, of exiting at each exit; 0 in the last row.
    epsilon: risk, in (0, 1).
    delta: in (0, 1).

  Returns:
    lambda on the confidence scale; +inf (the full network) if nothing qualifies, see `images_needed_ltt`.
  """
  from scipy.stats import binom  # A second to import, which `calibrate --help` does not wait for.

  n = confidences.shape[1]
  counts = np.arange(n + 1)
  qualifies = binom.cdf(counts, n, epsilon) <= delta
  return _last_within(confidences, losses, int(np.sum(qualifies)) - 1)


def crc(confidences: Float[np.ndarray, 'K N'], losses: Float[np.ndarray, 'K N'], epsilon: float) -> float:
  """Conformal risk control: the expected risk at lambda is at most epsilon (Angelopoulos et al. 2024, theorem 1).

  The smallest lambda at which the mean loss is at most ((N + 1) epsilon - 1) / N, where each sample's loss is its
  largest over all lambdas above. The mean's running maximum would not do: the guarantee needs the loss of each sample
  to be monotone.

  Args:
    confidences: of samples that fitted neither the network nor the temperatures.
    losses: in [0, 1], of exiting at each exit; 0 in the last row.
    epsilon: risk, in (0, 1).

  Returns:
    lambda on the confidence scale; +inf (the full network) if nothing qualifies, see `images_needed_crc`.
  """
  n = confidences.shape[1]
  peaks = np.maximum.accumulate(confidences[:-1], axis=0)
  # No lambda lets a sample exit where it is no more confident than at an exit before.
  reached = np.diff(peaks, axis=0, prepend=-np.inf) > 0
  possible = np.vstack([np.where(reached, losses[:-1], 0.0), losses[-1:]])
  monotone = np.maximum.accumulate(possible[::-1], axis=0)[::-1]
  return _last_within(confidences, monotone, (n + 1) * epsilon - 1)


def _last_within(confidences: np.ndarray, losses: np.ndarray, allowed: float) -> float:
  """The lambda, going down from +inf, before the total loss first exceeds what is allowed: a `threshold_between`."""
  allowed += 1e-9  # Rounding is not a loss.
  if allowed < 0:
    return np.inf
  # A sample exits at exit k while lambda is at most the largest of its first k confidences and above that of its first
  # k - 1. When lambda falls past the former, the loss of exit k replaces that of exit k + 1.
  peaks = np.maximum.accumulate(confidences[:-1], axis=0).ravel()
  changes = (losses[:-1] - losses[1:]).ravel()
  levels, event = np.unique(-peaks, return_inverse=True)
  totals = np.cumsum(np.bincount(event, changes, minlength=len(levels)))
  excess = np.flatnonzero(totals > allowed)
  return threshold_between(-levels, excess[0] if len(excess) else len(levels))


def images_needed_ltt(epsilon: float, delta: float) -> int:
  """The fewest samples, none with a loss, with which `ltt` can qualify: (1 - epsilon)^n <= delta."""
  from scipy.stats import binom

  n = max(1, math.floor(min(math.log(delta) / math.log1p(-epsilon), MANY)) - 1)
  while n < MANY - 1 and binom.cdf(0, n, epsilon) > delta:
    n += 1
  return n


def images_needed_crc(epsilon: float) -> int:
  """The fewest samples, none with a loss, with which `crc` can qualify: (n + 1) epsilon >= 1."""
  return max(1, math.ceil(min(1 / epsilon - 1e-9, MANY)) - 1)


def _choose(samples: Samples, target: Mapping[str, Any]) -> Choice:
  """Learn then test if the target has a `delta`, else conformal risk control."""
  losses, epsilon, delta = losses_of(samples, target['loss']), target['risk'], target.get('delta')
  if delta is None:
    confidence, needed = crc(samples.confidences, losses, epsilon), images_needed_crc(epsilon)
  else:
    confidence, needed = ltt(samples.confidences, losses, epsilon, delta), images_needed_ltt(epsilon, delta)
  num_exits, images = samples.correct.shape
  thresholds = shared_thresholds(confidence, num_exits)
  if confidence < math.inf or num_exits == 1:
    return Choice(thresholds)
  lost = 'would do if the most confident images lost nothing, and they do'
  many = f'{needed:,}' if needed < MANY - 1 else f'more than {MANY:,}'
  why = f'it would need {many}' if images < needed else f'{needed:,} {lost}'
  return Choice(
    thresholds,
    f'risk {epsilon} cannot be promised from {images:,} held-out images: {why}; exits.json keeps the full network; '
    'raise --risk, or hold out more images in a new run',
  )


def _loss(text: str) -> str:
  if text not in LOSSES:
    raise ValueError(f'must be one of {", ".join(LOSSES)}')
  return text


_LOSS = Flag(
  'risk-loss',
  'loss',
  _loss,
  'gap',
  'of --risk: gap (default): wrong where the full network is right; disagreement (default without labels): a different '
  'answer',
)
_DELTA = Flag('delta', 'delta', fraction, 0.1, 'of --policy=ltt: how often the risk may be missed (default: 0.1)')

LTT = Policy('ltt', 'one threshold for all exits', {'risk': RANKING}, _choose, (_DELTA, _LOSS))
CRC = Policy('crc', 'one threshold for all exits', {'risk': RANKING}, _choose, (_LOSS,))
