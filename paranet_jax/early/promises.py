"""What a plan promises about its answers besides their cost: few errors among those it gives, and sets of classes.

Both are calibrated on held-out images of their own, by the exit rule that the plan uses, so that it does not matter how
temperatures and thresholds were chosen on others. What is assumed: these images and later ones are exchangeable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from paranet_jax.portable.run import set_scores

if TYPE_CHECKING:
  from jaxtyping import Bool, Float, Int

PENALTIES, FREE = (0.0, 0.001, 0.01, 0.1), (1, 2, 5)
"""Regularization of RAPS: what each further class costs, and how many classes cost nothing."""
_LEAST_GROUP = 50  # Reference images that leave at exits which share a limit, so that it is not decided by a few.


class Leaving(NamedTuple):
  """N images, by the rule of a plan.

  Attributes:
    early: leaves before the last exit.
    confidence: at the last exit.
    wrong: its answer is, where it leaves.
  """

  early: Bool[np.ndarray, ' N']
  confidence: Float[np.ndarray, ' N']
  wrong: Bool[np.ndarray, ' N']


def choose_rejection(reference: Leaving, tested: Leaving, epsilon: float, delta: float) -> float | None:
  """Learn then test: with probability 1 - delta, at most a share epsilon of the answered images is answered wrongly.

  An image is answered if it leaves early, or if its confidence at the last exit reaches the threshold; all others are
  unknown. Thresholds are tested from the one that looks surest on the reference images downwards, until the first whose
  p-value is above delta (fixed-sequence testing: Angelopoulos et al. 2021, "Learn then Test"). The p-value is the exact
  binomial tail: given how many of the tested images are answered, the number of errors is binomial. The probability is
  over the draw of the tested images; they and later images are exchangeable, and chose neither the exit rule nor the
  sequence.

  Args:
    reference: images on which anything may have been chosen.
    tested: other images.
    epsilon: in (0, 1).
    delta: in (0, 1).

  Returns:
    The threshold on the confidence scale; +inf: no image is answered at the last exit; None: nothing can be promised.
  """
  from scipy.special import bdtr

  ranked = np.unique(reference.confidence[~reference.early])[::-1]
  levels = np.concatenate([[np.inf], (ranked[:-1] + ranked[1:]) / 2, [0.0]])
  surest = int(np.argmin(bdtr(*_answered(reference, levels), epsilon)))
  p_values = bdtr(*_answered(tested, levels[surest:]), epsilon)
  accepted = int(np.argmax(np.append(p_values, np.inf) > delta))
  return float(levels[surest + accepted - 1]) if accepted else None


def _answered(images: Leaving, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The number of wrong answers and of answers at each threshold, which fall."""
  last = ~images.early
  order = np.argsort(-images.confidence[last], kind='stable')
  counts = np.searchsorted(-images.confidence[last][order], -levels, side='right')
  wrong = np.concatenate([[0], np.cumsum(images.wrong[last][order])])
  return (images.wrong & images.early).sum() + wrong[counts], images.early.sum() + counts


class Labeled(NamedTuple):
  """N images, by the rule of a plan with K exits.

  Attributes:
    probabilities: of each exit, calibrated by its temperature.
    labels: the right classes.
    taken: the exit that each image takes, 0-based.
  """

  probabilities: Float[np.ndarray, 'K N C']
  labels: Int[np.ndarray, ' N']
  taken: Int[np.ndarray, ' N']


def choose_sets(reference: Labeled, tested: Labeled, coverage: float) -> dict[str, Any]:
  """Limits of conformal prediction sets: the set holds the right class with at least this probability.

  A set holds the classes whose score is within a limit. Scores are those of RAPS (Angelopoulos, Bates, Malik and
  Jordan, "Uncertainty Sets for Image Classifiers using Conformal Prediction", 2021) without the random term, see
  `run.set_scores`; the regularization that makes the sets of the reference images smallest is taken. The limit is the
  ceil((n + 1) coverage)-th smallest score of the right class among n tested images.

  Which exit an image takes depends on the image. So each exit has a limit from the tested images that take it, and its
  sets keep the coverage among the images that leave there (class-conditional conformal prediction, with the exit as the
  class: Vovk, "Conditional validity of inductive conformal predictors", 2012); they then keep it among all images.
  Exits that few reference images take share a limit with their neighbors, and keep it together.

  `anytime` is the limit of the largest score over all exits: all sets of an image hold the right class at once with at
  least this probability, whichever exit a deadline or a budget stops at; a set that holds what all exits until then
  allow only shrinks (compare Jazbec et al., "Early-Exit Neural Networks with Nested Prediction Sets", 2024).

  The probability is over the draw of the tested images and of the new one, which are exchangeable.

  Args:
    reference: images on which anything may have been chosen.
    tested: other images, at least `images_needed`.
    coverage: in (0, 1).

  Returns:
    `sets` of exits.json: `coverage`, `penalty`, `free`, `limits` [K] (None: all classes) and `anytime`.
  """
  penalty, free = _regularization(reference, coverage)
  scores = _true_scores(tested, penalty, free)
  groups = exit_groups(np.bincount(reference.taken, minlength=len(reference.probabilities)).tolist())
  limits: list[float | None] = [None] * len(tested.probabilities)
  for group in groups:
    member = np.isin(tested.taken, group)
    limit = conformal_limit(scores[tested.taken[member], np.flatnonzero(member)], coverage)
    for k in group:
      limits[k] = limit
  return {
    'coverage': coverage,
    'penalty': penalty,
    'free': free,
    'limits': limits,
    'anytime': conformal_limit(scores.max(axis=0), coverage),
  }


def conformal_limit(scores: Float[np.ndarray, ' n'], coverage: float) -> float | None:
  """The limit that the score of one more, exchangeable image keeps with at least this probability; None: +inf."""
  place = max(math.ceil((len(scores) + 1) * coverage - 1e-9), 1)
  return None if place > len(scores) else float(np.sort(scores)[place - 1])


def images_needed(coverage: float) -> int:
  """The fewest images with which `conformal_limit` is finite."""
  return max(math.ceil(coverage / (1 - coverage) - 1e-9), 1)


def exit_groups(counts: Sequence[int]) -> list[list[int]]:
  """Exits that share a limit: adjacent ones, so that each group has enough images, if all together have.

  Args:
    counts: reference images that take each exit.
  """
  groups, current = [], []
  for k in range(len(counts)):
    current.append(k)
    if sum(counts[each] for each in current) >= _LEAST_GROUP:
      groups.append(current)
      current = []
  if current and groups:
    groups[-1] += current
  elif current:
    groups.append(current)
  return groups


def _regularization(reference: Labeled, coverage: float) -> tuple[float, int]:
  """Those with the smallest sets on the reference images, where they leave."""
  here = reference.taken, np.arange(len(reference.taken))
  probabilities = reference.probabilities[here]
  best, least = (PENALTIES[0], FREE[0]), math.inf
  for penalty in PENALTIES:
    for free in FREE:
      scores = set_scores(probabilities, penalty, free)
      limit = conformal_limit(scores[np.arange(len(scores)), reference.labels], coverage)
      size = math.inf if limit is None else float((scores <= limit).sum(-1).mean())
      if size < least:
        best, least = (penalty, free), size
  return best


def _true_scores(images: Labeled, penalty: float, free: int) -> Float[np.ndarray, 'K N']:
  rows = np.arange(len(images.labels))
  return np.stack([set_scores(each, penalty, free)[rows, images.labels] for each in images.probabilities])
