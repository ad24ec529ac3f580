"""Tests of who leaves where at given thresholds, worked out by hand."""

from math import inf, nextafter

import numpy as np
import pytest

from paranet_jax.early.policies.shared import patience_for_budget, shared_thresholds
from paranet_jax.early.thresholds import exits_taken, operating_point, threshold_between, visited

CONFIDENCES = np.array([[0.1, 0.5, 0.9, 0.2], [0.3, 0.9, 0.1, 0.7], [0.5, 0.5, 0.5, 0.0]])


class TableCosts:
  """Costs by path."""

  num_exits = 3

  def __init__(self, table):
    self.table = table

  def cumulative(self, path):
    return np.array(self.table[path], float)


@pytest.mark.parametrize(
  'thresholds, expected',
  [
    ([0.5, 0.7, -inf], [2, 0, 0, 1]),
    ([inf, 0.3, -inf], [1, 1, 2, 1]),
    ([inf, inf, -inf], [2, 2, 2, 2]),
    ([0.0, 0.0, -inf], [0, 0, 0, 0]),
  ],
)
def test_exits_taken(thresholds, expected):
  np.testing.assert_array_equal(exits_taken(CONFIDENCES, thresholds), expected)


def test_nobody_leaves_at_infinity_however_sure():
  np.testing.assert_array_equal(exits_taken(np.full((2, 1), inf), [inf, -inf]), [1])


@pytest.mark.parametrize(
  'thresholds, keep_all, expected',
  [([1.0, inf, -inf], False, (0, 2)), ([inf, inf, -inf], False, (2,)), ([1.0, inf, -inf], True, (0, 1, 2))],
)
def test_visited(thresholds, keep_all, expected):
  assert visited(thresholds, keep_all) == expected


@pytest.mark.parametrize(
  'thresholds, keep_all, cost, shares',
  [
    # Samples leave at 2, 0, 0, 1.
    ([0.5, 0.7, -inf], False, (30 + 10 + 10 + 20) / 4, [0.5, 0.25, 0.25]),
    # The middle exit is skipped, unless it is kept.
    ([0.5, inf, -inf], False, (10 + 10 + 25 + 25) / 4, [0.5, 0, 0.5]),
    ([0.5, inf, -inf], True, (10 + 10 + 30 + 30) / 4, [0.5, 0, 0.5]),
  ],
)
def test_operating_point(thresholds, keep_all, cost, shares):
  correct = np.array([[0, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]], bool)
  costs = TableCosts({(0, 1, 2): [10, 20, 30], (0, 2): [10, 25]})
  point = operating_point(thresholds, CONFIDENCES, correct, costs, keep_all)
  np.testing.assert_allclose(point.cost, cost)
  np.testing.assert_allclose(point.shares, shares)
  # Right: sample 0 at the last exit, 1 at the first, 3 at the middle one only.
  assert point.accuracy == (0.75 if shares[1] else 0.5)


@pytest.mark.parametrize('leaving, expected', [(0, inf), (1, 0.75), (3, 0.3125), (4, 0.0)])
def test_threshold_is_halfway(leaving, expected):
  assert threshold_between(np.array([1.0, 0.5, 0.5, 0.125]), leaving) == expected


def test_threshold_between_neighbouring_floats():
  ranked = np.array([nextafter(1, 2), 1.0])
  assert 1.0 < threshold_between(ranked, 1) <= ranked[0]


def test_shared_thresholds():
  np.testing.assert_array_equal(shared_thresholds(2.5, 3), [2.5, 2.5, -inf])


# Predictions in a row of three samples; patience 1 leaves at 0, 2 at (1, 2, 2), 3 at the last.
ROWS = np.array([[1, 1, 1], [2, 1, 1], [3, 2, 1]], float)
# Right at: all exits; all but the first; only at the last.
RIGHT = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1]], bool)


@pytest.mark.parametrize(
  'budget, patience, cost, accuracy',
  [(10, 1, 10, 1 / 3), (26, 1, 10, 1 / 3), (27, 2, 80 / 3, 1.0), (40, 2, 80 / 3, 1.0)],
)
def test_patience_for_budget(budget, patience, cost, accuracy):
  point = patience_for_budget(ROWS, RIGHT, TableCosts({(0, 1, 2): [10, 20, 30]}), budget)
  np.testing.assert_array_equal(point.thresholds, [patience, patience, -inf])
  np.testing.assert_allclose((point.cost, point.accuracy), (cost, accuracy))


def test_patience_needs_the_first_exit():
  with pytest.raises(ValueError, match='a budget of at least 10.0 is needed, got 9'):
    patience_for_budget(ROWS, RIGHT, TableCosts({(0, 1, 2): [10, 20, 30]}), 9)
