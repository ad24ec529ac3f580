"""Tests of the optimal thresholds, against all thresholds one by one and against the quotas."""

from itertools import product

import numpy as np
import pytest
from early_samples import path_costs, samples

from paranet_jax.early.policies.optimal import (
  Leaving,
  optimal_curve,
  optimal_for_budget,
  oracle_curve,
  sweep_pair,
  tie_ends,
)
from paranet_jax.early.policies.quota import quota_for_budget
from paranet_jax.early.thresholds import exits_taken, operating_point, visited


def all_points(confidences, correct, costs):
  """Of every combination of thresholds, less those that run an early exit at which nobody leaves."""
  choices = [[*np.unique(confidence), np.inf] for confidence in confidences[:-1]]
  points = [operating_point([*values, -np.inf], confidences, correct, costs) for values in product(*choices)]
  return [p for p in points if all(p.shares[k] > 0 for k in visited(p.thresholds)[:-1])]


def right_where_taken(point, confidences, correct):
  return np.array([correct[e, i] for i, e in enumerate(exits_taken(confidences, point.thresholds))], float)


def expected_accuracy(points, confidences, correct, costs, budget):
  """The rule of the docstring, written out."""
  n = confidences.shape[1]
  largest = costs.cumulative(tuple(range(costs.num_exits))).max()
  affordable = [p for p in points if p.cost <= budget]
  spending = [p for p in affordable if p.cost >= budget - max(0.01 * budget, largest / n)]
  best = max(affordable, key=lambda p: (p.accuracy, -p.cost))
  if not spending:
    return best.accuracy
  chosen = max(spending, key=lambda p: (p.accuracy, -p.cost))
  difference = right_where_taken(best, confidences, correct) - right_where_taken(chosen, confidences, correct)
  error = np.sqrt(np.mean((difference - difference.mean()) ** 2) / n)
  return best.accuracy if difference.mean() > error else chosen.accuracy


@pytest.mark.parametrize('cut', [False, True])
@pytest.mark.parametrize(
  'num_exits, n, levels, seed', [(1, 9, None, 0), (2, 60, None, 0), (3, 30, None, 0), (3, 30, None, 1), (3, 60, 6, 2)]
)
def test_up_to_three_exits_equal_brute_force(cut, num_exits, n, levels, seed):
  confidences, correct = samples(num_exits, n, seed, levels)
  costs = path_costs(num_exits, cut)
  points = all_points(confidences, correct, costs)
  budgets = np.linspace(10, 10 * num_exits, 8)
  for budget, point in zip(budgets, optimal_curve(confidences, correct, costs, budgets), strict=True):
    assert point.cost <= budget
    quota = quota_for_budget(confidences, correct, costs, budget)
    expected = expected_accuracy(points, confidences, correct, costs, budget)
    assert point.accuracy == pytest.approx(max(expected, quota.accuracy), abs=1e-12)


@pytest.mark.parametrize('cut', [False, True])
@pytest.mark.parametrize('seed', [0, 1])
def test_four_exits_are_close_to_brute_force(cut, seed):
  confidences, correct = samples(4, 14, seed)
  costs = path_costs(4, cut)
  points = all_points(confidences, correct, costs)
  budgets = np.linspace(11, 39, 6)
  found = optimal_curve(confidences, correct, costs, budgets)
  for budget, point in zip(budgets, found, strict=True):
    expected = expected_accuracy(points, confidences, correct, costs, budget)
    assert point.accuracy >= expected - 1.001 / 14, (budget, expected)


@pytest.mark.parametrize('cut', [False, True])
@pytest.mark.parametrize('num_exits', [2, 3, 4, 5, 7])
def test_never_below_the_quotas_and_never_above_the_budget(cut, num_exits):
  n = 300
  confidences, correct = samples(num_exits, n, 5)
  costs = path_costs(num_exits, cut)
  largest = costs.cumulative(tuple(range(num_exits))).max()
  budgets = np.linspace(10, 10 * num_exits, 15)
  gains = []
  for budget, point in zip(budgets, optimal_curve(confidences, correct, costs, budgets), strict=True):
    quota = quota_for_budget(confidences, correct, costs, budget)
    gains.append(point.accuracy - quota.accuracy)
    assert point.cost <= budget and gains[-1] >= 0
    again = operating_point(point.thresholds, confidences, correct, costs)
    assert (again.cost, again.accuracy) == (point.cost, point.accuracy)
    if point.cost < budget - max(0.01 * budget, largest / n):
      assert point.accuracy > quota.accuracy
  assert num_exits == 2 or np.mean(gains) > 0.01  # of two exits there is only one family


def test_one_budget_is_the_curve_at_one_budget():
  confidences, correct = samples(3, 200, 6)
  costs = path_costs(3, cut=False)
  one, curve = optimal_for_budget(confidences, correct, costs, 17), optimal_curve(confidences, correct, costs, [17, 25])
  np.testing.assert_array_equal(one.thresholds, curve[0].thresholds)


@pytest.mark.parametrize(
  'right_first, right_last, spends',
  [
    # The last exit is wrong on every second sample: it harms whomever it gets.
    ('1' * 200, '01' * 100, False),
    # It is as good: the budget is spent.
    ('1' * 200, '1' * 200, True),
    # It harms the four least sure samples and helps the next three: 1/200 less, but one standard error is
    # sqrt(7 / 200 - 1 / 200^2) / sqrt(200) = 2.64 / 200.
    ('1111000' + '1' * 193, '0000111' + '1' * 193, True),
  ],
)
def test_budget_is_left_over_only_where_later_exits_harm(right_first, right_last, spends):
  correct = np.array([list(right_first), list(right_last)]) == '1'
  confidences = np.stack([np.arange(1.0, 201), np.zeros(200)])
  point = optimal_for_budget(confidences, correct, path_costs(2, cut=False), 19.95)
  assert point.cost >= 0.99 * 19.95 if spends else point.cost == 10


def test_oracle_by_hand():
  correct = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]], bool)
  cost, accuracy = oracle_curve(correct, path_costs(3, cut=True))
  # All at 10; then the second sample to 20; then the third to 30.
  np.testing.assert_allclose(cost, [10, 12.5, 17.5])
  np.testing.assert_allclose(accuracy, [0.25, 0.5, 0.75])


@pytest.mark.parametrize('cut', [False, True])
def test_oracle_is_a_bound(cut):
  confidences, correct = samples(3, 100, 7)
  costs = path_costs(3, cut)
  cost, accuracy = oracle_curve(correct, costs)
  for point in optimal_curve(confidences, correct, costs, np.linspace(10, 30, 9)):
    assert point.accuracy <= np.interp(point.cost, cost, accuracy) + 1e-12


def test_a_stage_at_which_nobody_leaves_is_skipped():
  # The first exit is never right: to run it is waste.
  confidences, correct = samples(3, 100, 8)
  correct[0] = False
  point = optimal_for_budget(confidences, correct, path_costs(3, cut=True), 29)
  assert visited(point.thresholds) == (1, 2)


@pytest.mark.parametrize('cut, seed', [(False, 15), (True, 9)])
def test_of_many_exits_no_single_threshold_can_be_improved(cut, seed):
  n, budget = 200, 30.0
  confidences, correct = samples(7, n, seed)
  costs = path_costs(7, cut)
  point = optimal_for_budget(confidences, correct, costs, budget)
  path = visited(point.thresholds)
  low = budget - max(0.01 * budget, costs.cumulative(tuple(range(7))).max() / n)
  assert point.cost >= low and len(path) > 3
  for k in path[1:-1]:
    for threshold in np.unique(confidences[k]):
      moved = point.thresholds.copy()
      moved[k] = threshold
      other = operating_point(moved, confidences, correct, costs)
      assert not low <= other.cost <= budget or other.accuracy <= point.accuracy


def slow_best(confidences, correct, costs, later_correct, later_cost, low, high, fewest):
  """The most right samples within a range of total costs, and the least cost of so many."""
  found = []
  for first in [*np.unique(confidences[0]), np.inf]:
    for second in [*np.unique(confidences[1]), np.inf]:
      right = total = leaving = 0
      for i in range(confidences.shape[1]):
        if confidences[0, i] >= first:
          right, total = right + correct[0, i], total + costs[0]
        elif confidences[1, i] >= second:
          right, total, leaving = right + correct[1, i], total + costs[1], leaving + 1
        else:
          right, total = right + later_correct[i], total + later_cost[i]
      if low <= total <= high and leaving >= fewest:
        found.append((right, -total))
  return max(found, default=None)


@pytest.mark.parametrize('fewest', [0, 1])
@pytest.mark.parametrize('levels', [4, 1000])
@pytest.mark.parametrize('seed', range(4))
def test_equals_all_pairs(seed, levels, fewest):
  rng = np.random.default_rng(seed)
  confidences, correct = rng.integers(0, levels, (2, 15)) * 1.0, rng.random((2, 15)) < 0.5
  later_correct, later_cost = rng.random(15) < 0.6, rng.integers(20, 40, 15) * 1.0
  costs = (10.0, 20.0)
  # The first three ranges include all samples leaving at neither, which only `fewest` 0 allows.
  whole = later_cost.sum()
  ranges = np.array([(whole, whole), (whole - 3, whole + 3), (0, 1e9), (200, 210), (160, 300), (0, 100)])
  leave_first = tie_ends(np.sort(confidences[0])[::-1])
  exits = [Leaving(*each) for each in zip(confidences, correct, costs, strict=True)]
  price = 1e-4
  found = sweep_pair(*exits, later_correct * 1.0, later_cost, ranges, leave_first, fewest, price)
  for best, (low, high) in zip(found, ranges, strict=True):
    expected = slow_best(confidences, correct, costs, later_correct, later_cost, low, high, fewest)
    assert (best is None) == (expected is None)
    if best:
      assert best.value == pytest.approx(expected[0] + price * expected[1])
      thresholds = (best.first, best.second)
      at_first = confidences[0] >= thresholds[0]
      at_second = ~at_first & (confidences[1] >= thresholds[1])
      right = np.where(at_first, correct[0], np.where(at_second, correct[1], later_correct)).sum()
      assert right == expected[0]


@pytest.mark.parametrize('ranked, expected', [([3, 2, 2, 1], [0, 1, 3, 4]), ([1, 1], [0, 2]), ([], [0])])
def test_tie_ends(ranked, expected):
  np.testing.assert_array_equal(tie_ends(np.array(ranked, float)), expected)
