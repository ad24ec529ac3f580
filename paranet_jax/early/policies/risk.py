"""Thresholds whose risk against the full network is controlled (Jazbec et al. 2024).

Samples exit at the first exit whose confidence reaches lambda. As lambda falls from +inf (the full network, no loss),
the risk measured on N samples changes only where lambda passes a confidence, so the search visits these, not a grid.

The risk is that of all images (`marginal`), of each class (`class`), or of the images that leave at each early exit
(`selective`). All are controlled by Learn then Test (Angelopoulos, Bates, Candès, Jordan and Lei, "Learn then Test:
Calibrating Predictive Algorithms to Achieve Risk Control", 2021): thresholds are tested in an order that was fixed
before, each with a p-value of "the risk is above epsilon", until one is not rejected (fixed-sequence testing). Losses
are 0 or 1, so the p-value is the exact binomial tail, which is never above that of Hoeffding and Bentkus. Thresholds
that have to keep several risks are rejected only if the p-value of each is at most delta (an intersection-union test,
Berger 1982), which costs no correction: all risks are kept together with probability 1 - delta.

What is assumed: the held-out images and later ones are exchangeable, and fitted neither the network nor the
temperatures nor the sequence. The probability is over the draw of the held-out images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from paranet_jax.early.policies.policy import RANKING, Choice, Flag, Policy
from paranet_jax.early.policies.shared import shared_thresholds
from paranet_jax.early.thresholds import Samples, exits_taken, threshold_between
from paranet_jax.host.arguments import fraction

if TYPE_CHECKING:
  from jaxtyping import Float, Int


KINDS = ('marginal', 'selective', 'class')
"""Of which images the risk is controlled: all, those that leave at each early exit, those of each class."""
LOSSES = {'gap': 'wrong where the last exit is right', 'disagreement': 'answer differs from the last exit'}
"""What is lost where a sample exits early."""
MANY = 10**12
"""More images than anybody has: larger numbers are not distinguished."""


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


def ltt_by_class(
  confidences: Float[np.ndarray, 'K N'],
  losses: Float[np.ndarray, 'K N'],
  classes: Int[np.ndarray, ' N'],
  epsilon: float,
  delta: float,
  known: Int[np.ndarray, ' M'] | None = None,
) -> tuple[float, list[int]]:
  """Learn then test: with probability 1 - delta, the overall risk and that of each class are at most epsilon.

  The sequence is that of `ltt`, and goes on while the p-values of all classes and the overall one are at most delta.
  Given its label, whether a sample has a loss does not depend on how many others have that label, so the binomial tail
  is exact in each class too. Assumptions: see this module.

  Args:
    classes: of the samples.
    known: classes of the data set, of which some may have no sample; None: those of the samples.

  Returns:
    lambda on the confidence scale, +inf if nothing qualifies; and the classes that have fewer samples than
    `images_needed_ltt`, so that nothing could be promised for them: they count only in the overall risk.
  """
  found = np.unique(classes if known is None else np.concatenate([classes, known]))
  counts = np.bincount(np.searchsorted(found, classes), minlength=len(found))
  needed = images_needed_ltt(epsilon, delta)
  groups = [np.ones(len(classes), bool), *(classes == each for each in found[counts >= needed])]
  return (
    max(ltt(confidences[:, group], losses[:, group], epsilon, delta) for group in groups),
    found[counts < needed].tolist(),
  )


def ltt_selective(
  confidences: Float[np.ndarray, 'K N'],
  losses: Float[np.ndarray, 'K N'],
  path: Float[np.ndarray, 'J K'],
  epsilon: float,
  delta: float,
) -> Float[np.ndarray, ' K']:
  """Learn then test: with probability 1 - delta, the risk among those that leave at each early exit is at most epsilon.

  Given how many samples leave at an exit, the number of their losses is binomial, so the tail is exact for each exit.
  An exit where no sample can leave keeps every promise. Assumptions: see this module.

  Args:
    path: thresholds in the order of testing, of `selective_path`, which must not depend on these samples.

  Returns:
    The last thresholds before the first that are not rejected; +inf at all early exits if the first ones are not.
  """
  from scipy.special import bdtr

  num_exits, n = confidences.shape
  chosen = shared_thresholds(math.inf, num_exits)
  for thresholds in path:
    taken = exits_taken(confidences, thresholds)
    counts = np.bincount(taken, minlength=num_exits)
    lost = np.bincount(taken, losses[taken, np.arange(n)], minlength=num_exits)
    used = np.isfinite(thresholds)  # The last is -inf.
    if not (bdtr(lost[used], counts[used], epsilon) <= delta).all():
      break
    chosen = thresholds
  return chosen


LEVELS = np.geomspace(1e-9, 2.0, 60)
"""P-values on the reference images, as multiples of delta, by which `selective_path` orders thresholds."""


def selective_path(
  confidences: Float[np.ndarray, 'K N'], losses: Float[np.ndarray, 'K N'], epsilon: float, delta: float
) -> Float[np.ndarray, 'J K']:
  """Thresholds in the order in which `ltt_selective` should test them: the surest first, then ever cheaper ones.

  For each level of p-values, exit after exit takes as many of the remaining samples as it can with a p-value of at most
  that level, or none. Only the order matters for the guarantee, and any would do; this one has found on other samples
  which thresholds are likely to be rejected.

  Args:
    confidences: of reference samples, which are not tested.
    losses: 0 or 1.

  Returns:
    Different thresholds on the confidence scale, the last -inf.
  """
  from scipy.special import bdtr

  num_exits, n = confidences.shape
  path = []
  for level in delta * LEVELS:
    thresholds, alive = shared_thresholds(math.inf, num_exits), np.arange(n)
    for k in range(num_exits - 1):
      order = np.argsort(-confidences[k, alive], kind='stable')
      ranked = confidences[k, alive][order]
      ends = np.flatnonzero(np.diff(ranked, append=-np.inf)) + 1  # Those that do not split a tie.
      lost = np.cumsum(losses[k, alive][order])[ends - 1]
      fits = ends[bdtr(lost, ends, epsilon) <= level]
      if len(fits):
        thresholds[k] = threshold_between(ranked, int(fits[-1]))
        alive = alive[confidences[k, alive] < thresholds[k]]
    if not path or not np.array_equal(path[-1], thresholds):
      path.append(thresholds)
  return np.stack(path)


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
  kind, facts = target.get('of', 'marginal'), {}
  num_exits, images = samples.correct.shape
  needed = images_needed_crc(epsilon) if delta is None else images_needed_ltt(epsilon, delta)
  if delta is None:
    thresholds = shared_thresholds(crc(samples.confidences, losses, epsilon), num_exits)
  elif kind == 'selective':
    thresholds = _selective(samples, losses, target)
  elif kind == 'class':
    if samples.labels is None:
      raise ValueError('expected samples with labels for the risk of each class')
    confidence, few = ltt_by_class(samples.confidences, losses, samples.labels, epsilon, delta, samples.classes)
    thresholds, facts = shared_thresholds(confidence, num_exits), {'too_few': few, 'needed': needed}
  else:
    thresholds = shared_thresholds(ltt(samples.confidences, losses, epsilon, delta), num_exits)
  if (thresholds[:-1] < math.inf).any() or num_exits == 1:
    return Choice(thresholds, facts=facts)
  lost = 'would do if the most confident images lost nothing, and they do'
  many = f'{needed:,}' if needed < MANY - 1 else f'more than {MANY:,}'
  why = f'it would need {many}' if images < needed else f'{needed:,} {lost}'
  return Choice(
    thresholds,
    f'risk {epsilon} cannot be promised from {images:,} held-out images: {why}; exits.json keeps the full network; '
    'raise --risk, or hold out more images in a new run',
    facts,
  )


def _selective(samples: Samples, losses: np.ndarray, target: Mapping[str, Any]) -> Float[np.ndarray, ' K']:
  other, limits = samples.reference, (target['risk'], target['delta'])
  if other is None:
    raise ValueError('expected samples with a reference for the risk of those that leave early')
  path = selective_path(other.confidences, losses_of(other, target['loss']), *limits)
  return ltt_selective(samples.confidences, losses, path, *limits)


def _one_of(names: Iterable[str]) -> Callable[[str], str]:
  def parse(text: str) -> str:
    if text not in names:
      raise ValueError(f'must be one of {", ".join(names)}')
    return text

  return parse


_LOSS = Flag(
  'risk-loss',
  'loss',
  _one_of(LOSSES),
  'gap',
  'of --risk: gap (default): wrong where the full network is right; disagreement (default without labels): a different '
  'answer',
)
_OF = Flag(
  'risk-of',
  'of',
  _one_of(KINDS),
  None,
  'of --policy=ltt: marginal (default): of all images; selective: of those that leave at each early exit; class: of '
  'each class',
)
_DELTA = Flag(
  'delta', 'delta', fraction, 0.1, 'of --policy=ltt and of --reject: how often the promise may be missed (default: 0.1)'
)

LTT = Policy('ltt', 'one threshold for all exits', {'risk': RANKING}, _choose, (_DELTA, _LOSS, _OF))
CRC = Policy('crc', 'one threshold for all exits', {'risk': RANKING}, _choose, (_LOSS,))
