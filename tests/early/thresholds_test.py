"""Which samples exit where at given thresholds, worked out by hand."""

from math import inf, nextafter
from types import SimpleNamespace

import numpy as np
import pytest
from early_samples import samples_of

from paranet_jax.early.policies import find_policy
from paranet_jax.early.policies.shared import patience_for_budget, shared_thresholds
from paranet_jax.early.thresholds import exits_taken, operating_point, threshold_between, visited

CONFIDENCES = np.array([[0.1, 0.5, 0.9, 0.2], [0.3, 0.9, 0.1, 0.7], [0.5, 0.5, 0.5, 0.0]])
TABLE = {(0, 1, 2): [10, 20, 30], (0, 2): [10, 25]}
COSTS = SimpleNamespace(num_exits=3, cumulative=lambda path: np.array(TABLE[path], float))


@pytest.mark.parametrize(
  ('confidences', 'thresholds', 'expected'),
  [
    (CONFIDENCES, [0.5, 0.7, -inf], [2, 0, 0, 1]),
    (CONFIDENCES, [inf, 0.3, -inf], [1, 1, 2, 1]),
    (CONFIDENCES, [inf, inf, -inf], [2, 2, 2, 2]),
    (CONFIDENCES, [0.0, 0.0, -inf], [0, 0, 0, 0]),
    (np.full((2, 1), inf), [inf, -inf], [1]),  # However confident, no sample exits at infinity.
  ],
)
def test_exits_taken(confidences, thresholds, expected):
  np.testing.assert_array_equal(exits_taken(confidences, thresholds), expected)


@pytest.mark.parametrize(
  ('thresholds', 'expected'), [([1.0, inf, -inf], (0, 2)), ([inf, inf, -inf], (2,)), ([-inf], (0,))]
)
def test_visited(thresholds, expected):
  assert visited(np.array(thresholds)) == expected


@pytest.mark.parametrize(
  ('thresholds', 'score', 'cost', 'shares'),
  [
    # Samples exit at 2, 0, 0, 1.
    ([0.5, 0.7, -inf], 'max_prob', (30 + 10 + 10 + 20) / 4, [0.5, 0.25, 0.25]),
    # The middle exit is skipped, except with patience.
    ([0.5, inf, -inf], 'max_prob', (10 + 10 + 25 + 25) / 4, [0.5, 0, 0.5]),
    ([0.5, inf, -inf], 'patience', (10 + 10 + 30 + 30) / 4, [0.5, 0, 0.5]),
  ],
)
def test_operating_point(thresholds, score, cost, shares):
  correct = [[0, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]]
  point = operating_point(samples_of(CONFIDENCES, correct, COSTS, score), thresholds)
  np.testing.assert_allclose(point.cost, cost)
  np.testing.assert_allclose(point.shares, shares)
  # Sample 0 is right at the last exit, 1 at the first, 3 at the middle one only.
  assert point.accuracy == (0.75 if shares[1] else 0.5)


@pytest.mark.parametrize(('exiting', 'expected'), [(0, inf), (1, 0.75), (3, 0.3125), (4, 0.0)])
def test_a_threshold_is_halfway_between_confidences(exiting, expected):
  assert threshold_between(np.array([1.0, 0.5, 0.5, 0.125]), exiting) == expected


def test_a_threshold_between_adjacent_floats():
  ranked = np.array([nextafter(1, 2), 1.0])
  assert 1.0 < threshold_between(ranked, 1) <= ranked[0]


def test_shared_thresholds():
  np.testing.assert_array_equal(shared_thresholds(2.5, 3), [2.5, 2.5, -inf])


# Equal predictions in a row of three samples. With patience 1 they exit at 0, with 2 at (1, 2, 2), with 3 at the last.
# They are right at all exits; at all but the first; only at the last.
PATIENT = samples_of([[1, 1, 1], [2, 1, 1], [3, 2, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]], COSTS, 'patience')


@pytest.mark.parametrize(
  ('budget', 'patience', 'cost', 'accuracy'),
  [(10, 1, 10, 1 / 3), (26, 1, 10, 1 / 3), (27, 2, 80 / 3, 1.0), (40, 2, 80 / 3, 1.0)],
)
def test_patience_for_budget(budget, patience, cost, accuracy):
  point = patience_for_budget(PATIENT, budget)
  np.testing.assert_array_equal(point.thresholds, [patience, patience, -inf])
  np.testing.assert_allclose((point.cost, point.accuracy), (cost, accuracy))
  chosen = find_policy('shared').choose(PATIENT, {'budget': budget, 'unit': 'macs'})
  np.testing.assert_array_equal(chosen.thresholds, point.thresholds)


def test_patience_needs_the_first_exit():
  with pytest.raises(ValueError, match='a budget of at least 10.0 is needed, got 9'):
    patience_for_budget(PATIENT, 9)
