"""Thresholds on the confidence scale: who leaves where, and what that costs and gets right."""

from typing import NamedTuple, Protocol

import numpy as np


class Costs(Protocol):
  """What leaving costs, in multiply-adds or milliseconds."""

  num_exits: int

  def cumulative(self, visited: tuple[int, ...]) -> np.ndarray:
    """float64 [len(visited)]: the cost of leaving at each visited exit when exactly these are run in turn."""
    ...


def alone(costs: Costs) -> np.ndarray:
  """What each exit by itself costs: float64 [K]."""
  return np.array([costs.cumulative((k,))[0] for k in range(costs.num_exits)])


class OperatingPoint(NamedTuple):
  """Thresholds, and what they give on the samples they were evaluated on."""

  thresholds: np.ndarray  # float64 [K], confidence scale; the last is -inf
  cost: float  # mean cost of a sample
  accuracy: float
  shares: np.ndarray  # float64 [K], of the samples, that leave at each exit


def exits_taken(confidences: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
  """The first exit whose threshold a sample reaches, else the last.

  Args:
    confidences: [K, N].
    thresholds: [K]; +inf: nobody leaves there.

  Returns:
    int [N], 0-based.
  """
  thresholds = np.asarray(thresholds, np.float64)
  leaves = (confidences >= thresholds[:, None]) & (thresholds[:, None] < np.inf)
  leaves[-1] = True
  return np.argmax(leaves, axis=0)


def visited(thresholds: np.ndarray, keep_all: bool = False) -> tuple[int, ...]:
  """The exits that are run: those at which somebody may leave, and the last.

  Args:
    thresholds: [K].
    keep_all: all exits are run, as patience needs the prediction of each.

  Returns:
    0-based, in rising order.
  """
  last = len(thresholds) - 1
  return tuple(k for k in range(last + 1) if keep_all or k == last or thresholds[k] < np.inf)


def operating_point(
  thresholds: np.ndarray, confidences: np.ndarray, correct: np.ndarray, costs: Costs, keep_all: bool = False
) -> OperatingPoint:
  """What thresholds give on a set of samples.

  Args:
    thresholds: [K].
    confidences: [K, N], N >= 1.
    correct: bool [K, N].
    costs: of the K exits.
    keep_all: see `visited`.
  """
  thresholds = np.asarray(thresholds, np.float64)
  path = list(visited(thresholds, keep_all))
  exit_costs = np.zeros(len(thresholds))
  exit_costs[path] = costs.cumulative(tuple(path))
  exits = exits_taken(confidences, thresholds)
  shares = np.bincount(exits, minlength=len(thresholds)) / len(exits)
  accuracy = np.mean(correct[exits, np.arange(len(exits))])
  return OperatingPoint(thresholds, float(shares @ exit_costs), float(accuracy), shares)


def threshold_between(ranked: np.ndarray, leaving: int) -> float:
  """The threshold at which the first `leaving` samples leave: halfway to the next, so that ties do not decide.

  Args:
    ranked: [N] confidences, highest first; ranked[leaving - 1] > ranked[leaving].
    leaving: 0..N; 0 gives +inf (nobody leaves), N gives 0.0 (everybody does, as confidences are never negative).
  """
  if leaving == 0:
    return np.inf
  if leaving == len(ranked):
    return 0.0
  leaves, stays = ranked[leaving - 1], ranked[leaving]
  middle = stays + (leaves - stays) / 2
  return float(middle if middle > stays else leaves)  # neighbouring floats have nothing between them
