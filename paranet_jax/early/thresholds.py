"""Thresholds on the confidence scale: where samples exit, at what cost and accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
  from jaxtyping import Bool, Float, Int


class Costs(Protocol):
  """What exiting costs, in multiply-adds or milliseconds."""

  num_exits: int

  def cumulative(self, visited: tuple[int, ...]) -> Float[np.ndarray, ' visited']:
    """The cost of exiting at each visited exit when exactly these are run in turn."""
    ...


def alone(costs: Costs) -> Float[np.ndarray, ' K']:
  """The cost of each exit alone."""
  return np.array([costs.cumulative((k,))[0] for k in range(costs.num_exits)])


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
  leaves = (confidences >= thresholds[:, None]) & (thresholds[:, None] < np.inf)
  leaves[-1] = True
  return np.argmax(leaves, axis=0)


def visited(thresholds: Float[np.ndarray, ' K'], keep_all: bool = False) -> tuple[int, ...]:
  """The exits that are run, 0-based: those where a sample may exit, and the last.

  Args:
    keep_all: all exits are run, as patience needs the prediction of each.
  """
  last = len(thresholds) - 1
  return tuple(k for k in range(last + 1) if keep_all or k == last or thresholds[k] < np.inf)


def operating_point(
  thresholds: ArrayLike,
  confidences: Float[np.ndarray, 'K N'],
  correct: Bool[np.ndarray, 'K N'],
  costs: Costs,
  keep_all: bool = False,
) -> OperatingPoint:
  """The results of thresholds [K] on N >= 1 samples; keep_all: see `visited`."""
  thresholds = np.asarray(thresholds, np.float64)
  path = list(visited(thresholds, keep_all))
  exit_costs = np.zeros(len(thresholds))
  exit_costs[path] = costs.cumulative(tuple(path))
  exits = exits_taken(confidences, thresholds)
  shares = np.bincount(exits, minlength=len(thresholds)) / len(exits)
  accuracy = np.mean(correct[exits, np.arange(len(exits))])
  return OperatingPoint(thresholds, float(shares @ exit_costs), float(accuracy), shares)


def threshold_between(ranked: Float[np.ndarray, ' N'], leaving: int) -> float:
  """The threshold at which the first `leaving` samples exit: halfway to the next, so that rounding does not decide.

  Args:
    ranked: confidences, highest first; ranked[leaving - 1] > ranked[leaving].
    leaving: 0..N; 0 gives +inf, N gives 0.0, which every confidence reaches.
  """
  if leaving == 0:
    return np.inf
  if leaving == len(ranked):
    return 0.0
  leaves, stays = ranked[leaving - 1], ranked[leaving]
  middle = stays + (leaves - stays) / 2
  return float(middle if middle > stays else leaves)  # Adjacent floats have nothing between them.
