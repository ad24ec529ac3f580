"""The quota family against a slow loop written from the paper's text."""

from math import floor, inf

import numpy as np
import pytest
from early_samples import samples

from paranet_jax.early.policies.quota import QS, envelope, quota_for_budget, quota_thresholds
from paranet_jax.early.thresholds import OperatingPoint, exits_taken


def slow_exits(confidences, q):
  num_exits, n = confidences.shape
  shares = [q**k / sum(q**m for m in range(1, num_exits + 1)) for k in range(1, num_exits + 1)]
  exits, alive = [num_exits - 1] * n, list(range(n))
  for k in range(num_exits - 1):
    quota = floor(n * shares[k])
    if quota == 0 or quota > len(alive):
      continue
    threshold = sorted((confidences[k, i] for i in alive), reverse=True)[quota - 1]
    for i in list(alive):
      if confidences[k, i] >= threshold:
        exits[i] = k
        alive.remove(i)
  return exits


@pytest.mark.parametrize(('num_exits', 'n', 'levels'), [(1, 5, None), (3, 97, None), (5, 60, None), (4, 60, 5)])
def test_quotas_equal_the_loop(num_exits, n, levels):
  confidences = samples(num_exits, n, 0, levels=levels).confidences
  for q in (*QS[::3], 0.01, 7.3, 500.0):
    found = exits_taken(confidences, quota_thresholds(confidences, q))
    np.testing.assert_array_equal(found, slow_exits(confidences, q))


def test_quotas_by_hand():
  # With q = 1, two exits and four samples, two exit at the first: the threshold is halfway between 3 and 2.
  np.testing.assert_array_equal(quota_thresholds(np.array([[1.0, 3, 2, 4], [0, 0, 0, 0]]), 1.0), [2.5, -inf])
  # A tie takes three; one remains for a quota of one.
  tied = np.array([[3.0, 3, 3, 2], [1, 1, 1, 5], [0, 0, 0, 0]])
  np.testing.assert_array_equal(quota_thresholds(tied, 1.0), [2.5, 0.0, -inf])


def test_msdnet_tries_39_shapes():
  assert QS[0] == 0.05 and QS[-1] == 1.95 and len(QS) == 39


@pytest.mark.parametrize('cut', [False, True])
@pytest.mark.parametrize(('num_exits', 'n'), [(2, 50), (3, 200), (5, 500)])
def test_budget_is_met(cut, num_exits, n):
  split = samples(num_exits, n, 1, cut)
  step = max(split.costs.cumulative(tuple(range(num_exits)))) / n
  for budget in np.linspace(10, 10 * num_exits, 15):
    cost = quota_for_budget(split, budget).cost
    assert budget - max(step, 0.01 * budget) <= cost <= budget


def test_the_whole_budget_is_the_last_exit_alone():
  point = quota_for_budget(samples(3, 50, 2, cut=True), 30)
  np.testing.assert_array_equal(point.thresholds, [inf, inf, -inf])
  assert point.cost == 30


def test_ties_may_leave_budget_unspent_but_never_exceed_it():
  split = samples(3, 60, 3, levels=3)
  for budget in np.linspace(10, 30, 21):
    assert quota_for_budget(split, budget).cost <= budget


def test_budget_below_the_first_exit():
  with pytest.raises(ValueError, match='a budget of at least 10.0 is needed, got 9.9'):
    quota_for_budget(samples(3, 50, 2), 9.9)


def test_envelope():
  given = [(3, 0.5), (1, 0.4), (4, 0.7), (2, 0.4), (5, 0.6), (3, 0.6), (6, 0.71)]
  points = [OperatingPoint(None, cost, accuracy, None) for cost, accuracy in given]
  assert [(p.cost, p.accuracy) for p in envelope(points)] == [(1, 0.4), (3, 0.6), (4, 0.7), (6, 0.71)]
