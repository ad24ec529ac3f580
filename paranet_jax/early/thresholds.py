"""Thresholds on the confidence scale: where samples exit, at what cost and accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:  # Both take longer to import than the flags of `calibrate` do without them.
  from jaxtyping import Bool, Float, Int

  from paranet_jax.early.path_costs import PathCosts


class Samples(NamedTuple):
  """The answers of K usable exits to N >= 1 images, and what exiting costs.

  Attributes:
    confidences: see `scores.confidences`.
    score: the score that the confidences come from, one of `SCORES`.
    costs: in the unit of the budget.
    labels: the classes of the images; None: not known.
    reference: other images, from which a sequence of tests may be made; None: there are none.
    classes: those of all images of the data set, without which a class that has none here would not be known.
  """

  confidences: Float[np.ndarray, 'K N']
  predictions: Int[np.ndarray, 'K N']
  correct: Bool[np.ndarray, 'K N']
  score: str
  costs: PathCosts
  labels: Int[np.ndarray, ' N'] | None = None
  reference: Samples | None = None
  classes: Int[np.ndarray, ' M'] | None = None


class OperatingPoint(NamedTuple):
  """Thresholds, and their results on the samples they were evaluated on."""

  thresholds: Float[np.ndarray, ' K']  # confidence scale; the last is -inf
  cost: float  # mean per sample
  accuracy: float
  shares: Float[np.ndarray, ' K']  # of the samples that exit at each exit


def exits_taken(confidences: Float[np.ndarray, 'K N'], thresholds: ArrayLike) -> Int[np.ndarray, ' N']:
  """The first exit, 0-based, whose threshold a sample reaches, else the last.

  Args:
    thresholds: [K]; +inf: no sample exits there.
  """
  thresholds = np.asarray(thresholds, np.float64)
  exits = (confidences >= thresholds[:, None]) & (thresholds[:, None] < np.inf)
  exits[-1] = True
  return np.argmax(exits, axis=0)


def visited(thresholds: Float[np.ndarray, ' K']) -> tuple[int, ...]:
  """The exits that are run, 0-based: those where a sample may exit, and the last."""
  return *np.flatnonzero(thresholds[:-1] < np.inf).tolist(), len(thresholds) - 1


def operating_point(samples: Samples, thresholds: ArrayLike) -> OperatingPoint:
  """The results of thresholds [K]. With patience all exits are run, as it needs the prediction of each."""
  thresholds = np.asarray(thresholds, np.float64)
  path = tuple(range(len(thresholds))) if samples.score == 'patience' else visited(thresholds)
  exit_costs = np.zeros(len(thresholds))
  exit_costs[list(path)] = samples.costs.cumulative(path)
  exits = exits_taken(samples.confidences, thresholds)
  shares = np.bincount(exits, minlength=len(thresholds)) / len(exits)
  accuracy = np.mean(samples.correct[exits, np.arange(len(exits))])
  return OperatingPoint(thresholds, float(shares @ exit_costs), float(accuracy), shares)


def threshold_between(ranked: Float[np.ndarray, ' N'], exiting: int) -> float:
  """The threshold at which the first `exiting` samples exit: halfway to the next, so that rounding does not decide.

  Args:
    ranked: confidences, highest first; ranked[exiting - 1] > ranked[exiting].
    exiting: 0..N; 0 gives +inf, N gives 0.0, which every confidence reaches.
  """
  if exiting == 0:
    return np.inf
  if exiting == len(ranked):
    return 0.0
  exits, stays = ranked[exiting - 1], ranked[exiting]
  middle = stays + (exits - stays) / 2
  return float(middle if middle > stays else exits)  # Adjacent floats have nothing between them.
