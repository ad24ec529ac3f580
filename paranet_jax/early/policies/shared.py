"""One threshold for all exits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from paranet_jax.early.policies.policy import Choice, Policy
from paranet_jax.early.thresholds import OperatingPoint, Samples, operating_point
from paranet_jax.portable.run import SCORES, to_confidence

if TYPE_CHECKING:
  from jaxtyping import Float


def shared_thresholds(confidence_threshold: float, num_exits: int) -> Float[np.ndarray, ' K']:
  """The same threshold, on the confidence scale, at every exit but the last."""
  return np.append(np.full(num_exits - 1, float(confidence_threshold)), -np.inf)


def patience_for_budget(samples: Samples, budget: float) -> OperatingPoint:
  """The most accurate patience within a budget; the cheapest on ties.

  Args:
    budget: mean cost per sample. There are only K patiences, so up to one exit's cost may be left over.

  Returns:
    The point, whose thresholds are the patience t = 1..K: that many equal predictions in a row.

  Raises:
    ValueError: the budget is below the first exit's cost.
  """
  num_exits = samples.costs.num_exits
  points = [operating_point(samples, shared_thresholds(t, num_exits)) for t in range(1, num_exits + 1)]
  within = [point for point in points if point.cost <= budget]
  if not within:
    raise ValueError(f'a budget of at least {points[0].cost} is needed, got {budget}')
  return max(within, key=lambda point: (point.accuracy, -point.cost))


def _choose(samples: Samples, target: Mapping[str, Any]) -> Choice:
  if 'budget' in target:
    return Choice(patience_for_budget(samples, target['budget']).thresholds)
  confidence = float(to_confidence(target['threshold'], samples.score))
  return Choice(shared_thresholds(confidence, samples.costs.num_exits))


SHARED = Policy('shared', 'one threshold for all exits', {'threshold': SCORES, 'budget': ('patience',)}, _choose)
