"""Thresholds for the highest held-out accuracy within a budget, over all thresholds and sets of exits that are run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from paranet_jax.early.policies.policy import RANKING, Choice, Policy
from paranet_jax.early.policies.quota import quota_for_budget
from paranet_jax.early.thresholds import (
  OperatingPoint,
  Samples,
  exits_taken,
  operating_point,
  threshold_between,
  visited,
)

if TYPE_CHECKING:
  from jaxtyping import Bool, Float, Int

_MOST_EXITS = 4  # All sets of so many exits are tried.
_MOST_FIRST = 5000  # Thresholds of a first exit that are tried: all of them on up to that many samples.
_ROUNDS = 10
_ROUNDING = 1e-12


def optimal_curve(samples: Samples, budgets: Sequence[float] | Float[np.ndarray, ' R']) -> list[OperatingPoint]:
  """The most accurate thresholds on these samples at each budget.

  With up to four exits every set of exits to run is tried; with more, all exits and then without those where no sample
  exits. Up to three exits are solved exactly (on up to 5,000 samples; on more, with 5,000 evenly spaced first
  thresholds). More are solved by ascent from the quotas, two adjacent exits at a time, which finds a local optimum.

  Accuracy on a held-out split is noisy, and a budget left unspent because of noise is wasted. So the search takes the
  most accurate point that spends the budget: all but 1 % of it, or all but one sample's largest cost divided by N. It
  takes a point that spends less only if that is more accurate by over one standard error of the paired difference,
  since later exits can do real harm, or if none spends the budget. The point is never less accurate than the quotas'.

  Args:
    budgets: mean costs per sample.

  Returns:
    A point for each budget, whose cost is not above it.

  Raises:
    ValueError: a budget is below the first exit's cost.
  """
  search = _Search(samples)
  quotas = [quota_for_budget(samples, budget) for budget in budgets]
  slacks = [max(0.01 * budget, search.largest_step) for budget in budgets]
  ranges = np.array([(low, b) for b, slack in zip(budgets, slacks, strict=True) for low in (b - slack, 0.0)])
  ranges[:, 1] *= 1 + _ROUNDING
  points = search.run(ranges, [quota for quota in quotas for _ in range(2)])
  return [search.choose(points, *each) for each in zip(budgets, slacks, quotas, strict=True)]


def oracle_curve(samples: Samples) -> tuple[Float[np.ndarray, ' M'], Float[np.ndarray, ' M']]:
  """The bound with perfect knowledge: a sample goes straight to its cheapest right exit, or else to the cheapest exit.

  Samples for which that costs least come first; between the points the bound is a straight line.

  Returns:
    Mean cost and accuracy at M <= K points, both rising.
  """
  exit_costs = samples.costs.alone()
  least = exit_costs.min()
  cheapest = np.min(np.where(samples.correct, exit_costs[:, None], np.inf), axis=0)
  levels, counts = np.unique(np.append(least, cheapest[cheapest < np.inf]), return_counts=True)
  counts[0] -= 1
  n = samples.correct.shape[1]
  return least + np.cumsum((levels - least) * counts) / n, np.cumsum(counts) / n


class ExitOutcome(NamedTuple):
  """The outcome of exiting at an exit for A samples."""

  confidence: Float[np.ndarray, ' A']
  correct: Bool[np.ndarray, ' A']
  cost: float  # per sample


class Best(NamedTuple):
  """The most accurate pair of thresholds whose total cost lies in a range."""

  value: float  # number of right samples, less price times total cost
  first: float  # threshold
  second: float  # threshold


def tie_ends(ranked: Float[np.ndarray, ' A']) -> Int[np.ndarray, ' ends']:
  """How many samples, ranked highest first, can exit without splitting a tie, 0 and A included."""
  return np.flatnonzero(np.diff(ranked, prepend=np.inf, append=-np.inf))


def sweep_pair(
  first: ExitOutcome,
  second: ExitOutcome,
  later_correct: Float[np.ndarray, ' A'],
  later_cost: Float[np.ndarray, ' A'],
  ranges: Float[np.ndarray, 'R 2'],
  first_counts: Int[np.ndarray, ' L'],
  fewest: int,
  price: float,
) -> list[Best | None]:
  """The best thresholds of two consecutive exits, all others fixed, by sorting and cumulative sums.

  Args:
    first: the earlier exit, for the A samples that reach it.
    second: the later exit, for the same samples.
    later_correct: whether a sample that passes both is right where it exits.
    later_cost: its cost there, at least the second exit's.
    ranges: lowest and highest total cost of the A samples.
    first_counts: how many samples may exit at the first exit, each one of its `tie_ends`.
    fewest: how many samples exit at the second at least.
    price: of a unit of cost, in right samples; below 1 / total cost it only breaks ties.

  Returns:
    The best of each range; None: no pair lies in it.
  """
  by_first, by_second = np.argsort(-first.confidence), np.argsort(-second.confidence)
  position = np.empty_like(by_first)
  position[by_first] = np.arange(len(by_first))
  position = position[by_second]
  ranked_first, ranked_second = first.confidence[by_first], second.confidence[by_second]
  start_correct = _cumulative((first.correct * 1.0 - later_correct)[by_first], later_correct.sum())
  start_cost = _cumulative((first.cost - later_cost)[by_first], later_cost.sum())
  gain, saving = (second.correct * 1.0 - later_correct)[by_second], (second.cost - later_cost)[by_second]
  best: list[Best | None] = [None] * len(ranges)
  most = np.full(len(ranges), -np.inf)
  for exiting in first_counts:
    alive = np.flatnonzero(position >= exiting)
    ranked = ranked_second[alive]
    ends = tie_ends(ranked)
    ends = ends[ends >= fewest]
    falling = -_cumulative(saving[alive], start_cost[exiting])[ends]
    value = _cumulative(gain[alive], start_correct[exiting])[ends] + price * falling
    begin, end = np.searchsorted(falling, -ranges[:, 1], 'left'), np.searchsorted(falling, -ranges[:, 0], 'right')
    within = np.stack([begin, end], axis=1).ravel()
    found = np.maximum.reduceat(np.append(value, -np.inf), within)[::2]
    for r in np.flatnonzero((begin < end) & (found > most)):
      most[r] = found[r]
      exiting_second = int(ends[begin[r] + np.argmax(value[begin[r] : end[r]])])
      thresholds = threshold_between(ranked_first, int(exiting)), threshold_between(ranked, exiting_second)
      best[r] = Best(float(most[r]), *thresholds)
  return best


def _cumulative(steps: np.ndarray, start: Any) -> np.ndarray:
  """start, start + steps[0], ...: [len(steps) + 1]."""
  return np.cumsum(np.concatenate([[start], steps]))


class _Search:
  """Finds points whose costs lie in given ranges."""

  def __init__(self, samples: Samples):
    self.samples, self.costs = samples, samples.costs
    self.confidences, self.correct = samples.confidences, samples.correct
    self.num_exits, self.n = samples.confidences.shape
    self.largest_step = max(self.costs.cumulative(tuple(range(self.num_exits)))) / self.n
    self.price = 0.5 / (self.largest_step * self.n**2)  # The cheapest of equally accurate points wins.

  def run(self, ranges: np.ndarray, starts: list[OperatingPoint]) -> list[OperatingPoint]:
    """Points for each range of mean costs [R, 2], from one start each."""
    last = self.num_exits - 1
    points = [*starts, self.point({})]
    if self.num_exits <= _MOST_EXITS:
      points += [
        point
        for exits in range(1, 3)
        for path in combinations(range(last), exits)
        for point in self.solve((*path, last), ranges)
      ]
    if self.num_exits > 3:
      points += [self.ascend(start, each) for start, each in zip(starts, ranges, strict=True)]
    return points

  def point(self, thresholds: dict[int, float]) -> OperatingPoint:
    """The point with these thresholds by exit; no sample exits at the others but the last."""
    values = [thresholds.get(k, np.inf) for k in range(self.num_exits - 1)]
    return operating_point(self.samples, [*values, -np.inf])

  def solve(self, path: tuple[int, ...], ranges: np.ndarray) -> list[OperatingPoint]:
    """The best points that run the two or three exits of a path."""
    *early, last = path
    path_costs = self.costs.cumulative(path)
    exits = [ExitOutcome(self.confidences[k], self.correct[k], path_costs[i]) for i, k in enumerate(early)]
    counts = np.zeros(1, int)
    if len(early) == 2:
      counts = tie_ends(np.sort(exits[0].confidence)[::-1])[1:]
      counts = counts[np.unique(np.linspace(0, len(counts) - 1, _MOST_FIRST).astype(int))]
    later_cost = np.full(self.n, path_costs[-1])
    found = sweep_pair(exits[0], exits[-1], self.correct[last], later_cost, ranges * self.n, counts, 1, self.price)
    return [self.point(dict(zip(early, best[-len(early) :], strict=True))) for best in found if best]

  def ascend(self, start: OperatingPoint, cost_range: np.ndarray) -> OperatingPoint:
    """Improves thresholds two adjacent exits at a time, and again without the exits that this leaves unused."""
    point, path = start, ()
    while visited(point.thresholds) != path and len(visited(point.thresholds)) > 2:
      path = visited(point.thresholds)
      exit_costs = np.zeros(self.num_exits)
      exit_costs[list(path)] = self.costs.cumulative(path)
      thresholds, most = point.thresholds.copy(), -np.inf
      for _ in range(_ROUNDS):
        before = most
        for pair in pairwise(path[:-1]):
          most = self.improve(thresholds, most, pair, exit_costs, cost_range)
        if most == before:
          break
      point = operating_point(self.samples, thresholds)
    return point

  def improve(
    self, thresholds: np.ndarray, most: float, pair: tuple[int, int], exit_costs: np.ndarray, cost_range: np.ndarray
  ) -> float:
    """Improves the thresholds of a pair in place if their value can exceed `most`; returns the value."""
    exits = exits_taken(self.confidences, thresholds)
    alive = np.flatnonzero(exits >= pair[0])
    gone = np.flatnonzero(exits < pair[0])
    gone_correct, gone_cost = self.correct[exits[gone], gone].sum(), exit_costs[exits[gone]].sum()
    first, second = (ExitOutcome(self.confidences[k, alive], self.correct[k, alive], exit_costs[k]) for k in pair)
    after = np.where(np.arange(self.num_exits) <= pair[1], np.inf, thresholds)
    later = exits_taken(self.confidences[:, alive], after)
    ends = tie_ends(np.sort(first.confidence)[::-1])
    now = np.searchsorted(ends, np.sum(first.confidence >= thresholds[pair[0]]))
    steps = 2 ** np.arange(max(1, len(ends).bit_length()))
    near = np.clip(np.concatenate([now - steps, [now], now + steps]), 0, len(ends) - 1)
    (best,) = sweep_pair(
      first,
      second,
      self.correct[later, alive] * 1.0,
      exit_costs[later],
      (cost_range * self.n - gone_cost)[None],
      ends[np.unique(near)],
      0,
      self.price,
    )
    value = best.value + gone_correct - self.price * gone_cost if best else -np.inf
    if not best or value <= most + _ROUNDING * self.n:
      return most
    thresholds[list(pair)] = best.first, best.second
    return value

  def choose(self, points: list[OperatingPoint], budget: float, slack: float, quota: OperatingPoint) -> OperatingPoint:
    """The point to take at a budget: see `optimal_curve`."""
    by_accuracy = sorted((p for p in points if p.cost <= budget * (1 + _ROUNDING)), key=lambda p: (-p.accuracy, p.cost))
    spending = [point for point in by_accuracy if point.cost >= budget - slack]
    best = by_accuracy[0]
    if not spending or best.accuracy - spending[0].accuracy > self.standard_error(best, spending[0]):
      return best
    return max(spending[0], quota, key=lambda point: point.accuracy)

  def standard_error(self, a: OperatingPoint, b: OperatingPoint) -> float:
    """The standard error of the difference of two accuracies on the same samples."""
    right = [self.correct[exits_taken(self.confidences, p.thresholds), np.arange(self.n)] * 1.0 for p in (a, b)]
    return float(np.std(right[0] - right[1]) / np.sqrt(self.n))


def _choose(samples: Samples, target: Mapping[str, Any]) -> Choice:
  return Choice(optimal_curve(samples, [target['budget']])[0].thresholds)


OPTIMAL = Policy('optimal', 'the most accurate thresholds', {'budget': RANKING}, _choose)
