"""Tests of the sweep over two thresholds, against all pairs one by one."""

import numpy as np
import pytest

from paranet_jax.early.policies.sweep import Leaving, sweep_pair, tie_ends


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
