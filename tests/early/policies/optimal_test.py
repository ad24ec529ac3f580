"""Optimal thresholds against every combination of thresholds, and against the quotas."""

from itertools import product

import numpy as np
import pytest
from early_samples import path_costs, samples, samples_of

from paranet_jax.early.policies.optimal import ExitOutcome, optimal_curve, oracle_curve, sweep_pair, tie_ends
from paranet_jax.early.policies.quota import quota_for_budget
from paranet_jax.early.thresholds import exits_taken, operating_point, visited


def all_points(split):
  """Every combination of thresholds, except those that run an early exit at which no sample exits."""
  choices = [[*np.unique(confidence), np.inf] for confidence in split.confidences[:-1]]
  points = [operating_point(split, [*values, -np.inf]) for values in product(*choices)]
  return [p for p in points if all(p.shares[k] > 0 for k in visited(p.thresholds)[:-1])]


def largest_cost(split):
  return split.costs.cumulative(tuple(range(split.costs.num_exits))).max()


def expected_accuracy(points, split, budget):
  """The rule of the docstring, written out."""
  n = split.correct.shape[1]
  affordable = [p for p in points if p.cost <= budget]
  spending = [p for p in affordable if p.cost >= budget - max(0.01 * budget, largest_cost(split) / n)]
  best = max(affordable, key=lambda p: (p.accuracy, -p.cost))
  if not spending:
    return best.accuracy
  chosen = max(spending, key=lambda p: (p.accuracy, -p.cost))
  taken = [exits_taken(split.confidences, p.thresholds) for p in (best, chosen)]
  right, other = (split.correct[exits, np.arange(n)].astype(float) for exits in taken)
  difference = right - other
  error = np.sqrt(np.mean((difference - difference.mean()) ** 2) / n)
  return best.accuracy if difference.mean() > error else chosen.accuracy


@pytest.mark.parametrize('cut', [False, True])
@pytest.mark.parametrize(
  ('num_exits', 'n', 'levels', 'seed'), [(1, 9, None, 0), (2, 60, None, 0), (3, 20, None, 0), (3, 60, 6, 2)]
)
def test_up_to_three_exits_equal_brute_force(cut, num_exits, n, levels, seed):
  split = samples(num_exits, n, seed, cut, levels)
  points = all_points(split)
  budgets = np.linspace(10, 10 * num_exits, 8)
  for budget, point in zip(budgets, optimal_curve(split, budgets), strict=True):
    assert point.cost <= budget
    expected = max(expected_accuracy(points, split, budget), quota_for_budget(split, budget).accuracy)
    assert point.accuracy == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(('cut', 'seed'), [(False, 0), (True, 1)])
def test_four_exits_are_close_to_brute_force(cut, seed):
  split = samples(4, 10, seed, cut)
  points, budgets = all_points(split), np.linspace(11, 39, 6)
  for budget, point in zip(budgets, optimal_curve(split, budgets), strict=True):
    expected = expected_accuracy(points, split, budget)
    assert point.accuracy >= expected - 1.001 / 10, (budget, expected)


def test_the_first_exit_splits_samples_that_the_second_cannot():
  # Three samples are correct at the first exit and the fourth is at the second, where all four are equally confident.
  correct = np.array([[1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 0]])
  split = samples_of([[4, 3, 2, 1], [1, 1, 1, 1], [0, 0, 0, 0]], correct, path_costs(3, cut=False))
  (point,) = optimal_curve(split, [16])
  assert (point.accuracy, point.cost) == (1, (3 * 10 + 21) / 4)


@pytest.mark.parametrize('cut', [False, True])
@pytest.mark.parametrize('num_exits', [2, 3, 4, 5, 7])
def test_never_below_the_quotas_and_never_above_the_budget(cut, num_exits):
  split, gains = samples(num_exits, 200, 5, cut), []
  budgets = np.linspace(10, 10 * num_exits, 8)
  for budget, point in zip(budgets, optimal_curve(split, budgets), strict=True):
    quota = quota_for_budget(split, budget)
    gains.append(point.accuracy - quota.accuracy)
    assert point.cost <= budget and gains[-1] >= 0
    again = operating_point(split, point.thresholds)
    assert (again.cost, again.accuracy) == (point.cost, point.accuracy)
    if point.cost < budget - max(0.01 * budget, largest_cost(split) / 200):
      assert point.accuracy > quota.accuracy
  assert num_exits == 2 or np.mean(gains) > 0.01  # With two exits there is only one family.


def test_budgets_do_not_affect_each_other():
  split = samples(3, 200, 6)
  (one,), curve = optimal_curve(split, [17]), optimal_curve(split, [17, 25])
  np.testing.assert_array_equal(one.thresholds, curve[0].thresholds)


@pytest.mark.parametrize(
  ('right_first', 'right_last', 'spends'),
  [
    # The last exit is wrong on every second sample.
    ('1' * 200, '01' * 100, False),
    # It is as accurate, so the budget is spent.
    ('1' * 200, '1' * 200, True),
    # It harms the four least confident samples and helps the next three: 1/200 less, but one standard error is
    # sqrt(7 / 200 - 1 / 200^2) / sqrt(200) = 2.64 / 200.
    ('1111000' + '1' * 193, '0000111' + '1' * 193, True),
  ],
)
def test_budget_is_left_unspent_only_where_later_exits_do_harm(right_first, right_last, spends):
  correct = np.array([list(right_first), list(right_last)]) == '1'
  split = samples_of([np.arange(1.0, 201), np.zeros(200)], correct, path_costs(2, cut=False))
  (point,) = optimal_curve(split, [19.95])
  assert point.cost >= 0.99 * 19.95 if spends else point.cost == 10


def test_oracle_by_hand():
  correct = [[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]]
  cost, accuracy = oracle_curve(samples_of(np.zeros((3, 4)), correct, path_costs(3, cut=True)))
  # All at 10; then the second sample to 20; then the third to 30.
  np.testing.assert_allclose(cost, [10, 12.5, 17.5])
  np.testing.assert_allclose(accuracy, [0.25, 0.5, 0.75])


@pytest.mark.parametrize('cut', [False, True])
def test_oracle_is_a_bound(cut):
  split = samples(3, 100, 7, cut)
  for point in optimal_curve(split, np.linspace(10, 30, 9)):
    assert point.accuracy <= np.interp(point.cost, *oracle_curve(split)) + 1e-12


def test_a_stage_at_which_no_sample_exits_is_skipped():
  split = samples(3, 100, 8, cut=True)
  split.correct[0] = False  # Running the first exit is waste.
  (point,) = optimal_curve(split, [29])
  assert visited(point.thresholds) == (1, 2)


@pytest.mark.parametrize(('cut', 'seed'), [(False, 15), (True, 9)])
def test_no_single_threshold_of_many_exits_can_be_improved(cut, seed):
  n, budget, split = 200, 30.0, samples(7, 200, seed, cut)
  (point,) = optimal_curve(split, [budget])
  path = visited(point.thresholds)
  low = budget - max(0.01 * budget, largest_cost(split) / n)
  assert point.cost >= low and len(path) > 3
  for k in path[1:-1]:
    for threshold in np.unique(split.confidences[k])[::2]:
      moved = point.thresholds.copy()
      moved[k] = threshold
      other = operating_point(split, moved)
      assert not low <= other.cost <= budget or other.accuracy <= point.accuracy


def all_pairs(confidences, correct, costs, later_correct, later_cost):
  """For every pair of thresholds: correct samples, total cost, and the samples that exit at the second exit."""
  for first, second in product(*([*np.unique(confidence), np.inf] for confidence in confidences)):
    at_first = confidences[0] >= first
    at_second = ~at_first & (confidences[1] >= second)
    right = np.where(at_first, correct[0], np.where(at_second, correct[1], later_correct)).sum()
    cost = np.where(at_first, costs[0], np.where(at_second, costs[1], later_cost)).sum()
    yield right, cost, at_second.sum()


@pytest.mark.parametrize('levels', [4, 1000])
@pytest.mark.parametrize('seed', range(4))
def test_a_sweep_equals_all_pairs(seed, levels):
  rng = np.random.default_rng(seed)
  confidences, correct = rng.integers(0, levels, (2, 15)) * 1.0, rng.random((2, 15)) < 0.5
  later_correct, later_cost = rng.random(15) < 0.6, rng.integers(20, 40, 15) * 1.0
  costs, price = (10.0, 20.0), 1e-4
  # The first three ranges include that no sample exits at either exit, which only `fewest` 0 allows.
  whole = later_cost.sum()
  ranges = np.array([(whole, whole), (whole - 3, whole + 3), (0, 1e9), (200, 210), (160, 300), (0, 100)])
  first_counts = tie_ends(np.sort(confidences[0])[::-1])
  exits = [ExitOutcome(*each) for each in zip(confidences, correct, costs, strict=True)]
  pairs = list(all_pairs(confidences, correct, costs, later_correct, later_cost))
  for fewest in (0, 1):
    found = sweep_pair(*exits, later_correct * 1.0, later_cost, ranges, first_counts, fewest, price)
    for best, (low, high) in zip(found, ranges, strict=True):
      # The most correct samples within the range, and the least cost that reaches so many.
      within = [(right, -cost) for right, cost, second in pairs if low <= cost <= high and second >= fewest]
      assert (best is None) == (not within)
      if best:
        right, cost = max(within)
        assert best.value == pytest.approx(right + price * cost)
        at_first = confidences[0] >= best.first
        at_second = ~at_first & (confidences[1] >= best.second)
        assert np.where(at_first, correct[0], np.where(at_second, correct[1], later_correct)).sum() == right


@pytest.mark.parametrize(('ranked', 'expected'), [([3, 2, 2, 1], [0, 1, 3, 4]), ([1, 1], [0, 2]), ([], [0])])
def test_tie_ends(ranked, expected):
  np.testing.assert_array_equal(tie_ends(np.array(ranked, float)), expected)
