"""Thresholds from quotas: MSDNet's one-parameter family (Huang et al. 2018, section 5, budgeted batch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from paranet_jax.early.policies.policy import RANKING, Choice, Policy
from paranet_jax.early.thresholds import OperatingPoint, Samples, operating_point, threshold_between

if TYPE_CHECKING:
  from jaxtyping import Float

QS = tuple(j / 20 for j in range(1, 40))


def quota_thresholds(confidences: Float[np.ndarray, 'K N'], q: float) -> Float[np.ndarray, ' K']:
  """Exit k takes the floor(N p_k) most confident of the remaining samples, p_k = q^k / sum_m q^m.

  Ties exit too. An exit whose quota is 0, or more than the remaining samples, takes none.

  Args:
    q: >= 0, finite; below 1 favors early exits, 1 gives all exits the same quota, 0 everything to the first.
  """
  num_exits, n = confidences.shape
  weights = np.power(float(q), np.arange(num_exits))
  # 1e-9: rounding must not make a whole quota one less.
  quotas = np.floor(n * weights / weights.sum() + 1e-9).astype(int)
  thresholds = np.full(num_exits, np.inf)
  thresholds[-1] = -np.inf
  alive = np.arange(n)
  for k, quota in enumerate(quotas[:-1]):
    if 0 < quota <= len(alive):
      confidence = confidences[k, alive]
      ranked = np.sort(confidence)[::-1]
      exiting = int(np.sum(ranked >= ranked[quota - 1]))
      thresholds[k] = threshold_between(ranked, exiting)
      alive = alive[confidence < thresholds[k]]
  return thresholds


def quota_for_budget(samples: Samples, budget: float) -> OperatingPoint:
  """The member of the family that spends the budget, by bisection on q.

  A larger q moves samples to later exits, one at a time where confidences are not tied, so its cost rises in steps of
  at most one sample. It falls only where an exit's quota reaches 0 and the exit is skipped. Between a q within the
  budget and a larger one above it there is thus always a step that crosses the budget upwards: bisection finds it.

  Args:
    budget: mean cost per sample.

  Returns:
    A point whose cost is not above the budget, and, where confidences are not tied, within one sample's largest cost
    divided by N of it, or equal to the last exit's alone.

  Raises:
    ValueError: the budget is below the first exit's cost.
  """
  num_exits, n = samples.confidences.shape
  step = max(samples.costs.cumulative(tuple(range(num_exits)))) / n

  def point(q: float) -> OperatingPoint:
    return operating_point(samples, quota_thresholds(samples.confidences, q))

  best, highest = point(0.0), point(4.0 * n)
  if best.cost > budget:
    raise ValueError(f'a budget of at least {best.cost} is needed, got {budget}')
  if highest.cost <= budget:
    return highest
  low, high = -np.log(4 * n), np.log(4 * n)
  while high - low > 1e-12 and best.cost < budget - step:
    middle = (low + high) / 2
    found = point(np.exp(middle))
    if found.cost <= budget:
      best, low = found, middle
    else:
      high = middle
  return best


def envelope(points: list[OperatingPoint]) -> list[OperatingPoint]:
  """The points that are more accurate than all cheaper ones, by rising cost: later exits can also do harm."""
  kept: list[OperatingPoint] = []
  for point in sorted(points, key=lambda point: (point.cost, -point.accuracy)):
    if not kept or point.accuracy > kept[-1].accuracy:
      kept.append(point)
  return kept


def _choose(samples: Samples, target: Mapping[str, Any]) -> Choice:
  return Choice(quota_for_budget(samples, target['budget']).thresholds)


QUOTA = Policy('quota', 'thresholds from quotas', {'budget': RANKING}, _choose)
