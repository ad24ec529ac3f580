"""A limit on each image: against every choice of thresholds that keeps it, and by the costs of the way."""

import numpy as np
import pytest
from early_samples import path_costs, samples

from paranet_jax.early.policies import find_policy
from paranet_jax.early.policies.cap import choose_within
from paranet_jax.early.thresholds import exits_taken, operating_point, visited

POLICIES = {
  'optimal': {'budget': 22.0, 'unit': 'macs'},
  'quota': {'budget': 22.0, 'unit': 'macs'},
  'shared': {'threshold': 0.9},
}


@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('cut', [False, True])
@pytest.mark.parametrize('most', [10, 21, 30, 32, 1e9])
def test_no_image_costs_more(policy, cut, most):
  given = samples(4, 60, seed=1, cut=cut)
  found = choose_within(find_policy(policy), given, POLICIES[policy], most, given.costs)
  path, taken = visited(found.thresholds), exits_taken(given.confidences, found.thresholds)
  spent = np.zeros(4)
  spent[list(path)] = given.costs.cumulative(path)
  if cut and most < 30 and policy != 'shared':
    assert taken.max() <= 1  # Exit 3 costs 30 however it is reached, and exit 2 20.
  assert spent[taken].max() <= most and found.thresholds[-1] == -np.inf
  if most == 1e9:
    np.testing.assert_array_equal(found.thresholds, find_policy(policy).choose(given, POLICIES[policy]).thresholds)
  if 'budget' in POLICIES[policy]:
    assert operating_point(given, found.thresholds).cost <= 22


def test_the_best_way_within_the_limit():
  # Exits 1 to 3 in turn cost 10, 21 and 32; exit 3 alone costs 30. No budget is short, so all images go to the deepest
  # exit that the limit allows on some way.
  given, policy = samples(4, 60, seed=2), find_policy('optimal')
  found = choose_within(policy, given, {'budget': 1000.0, 'unit': 'macs'}, 30.0, given.costs)
  taken = exits_taken(given.confidences, found.thresholds)
  correct = given.correct[taken, np.arange(60)].mean()
  assert visited(found.thresholds) == (2, 3) and set(taken) == {2} and correct == given.correct[2].mean()


def test_patience_counts_all_exits_in_turn():
  # Exits 1 to 3 in turn cost 32: with patience, no image may reach exit 3, which alone would cost 30.
  given = samples(4, 60, seed=1)
  streaks = np.random.default_rng(0).integers(1, [[2], [3], [4], [5]], given.correct.shape).astype(float)
  given = given._replace(score='patience', confidences=streaks)
  found = choose_within(find_policy('shared'), given, {'threshold': 2.0}, 30.0, given.costs)
  assert visited(found.thresholds) == (0, 1, 3) and set(exits_taken(streaks, found.thresholds)) == {1}
  deeper = choose_within(find_policy('shared'), given, {'threshold': 2.0}, 32.0, given.costs)
  assert visited(deeper.thresholds) == (0, 1, 2, 3) and set(exits_taken(streaks, deeper.thresholds)) == {1, 2}


def test_a_limit_below_the_first_exit():
  given = samples(3, 9, seed=3)
  with pytest.raises(ValueError, match='^a limit of at least 10.0 is needed, got 9'):
    choose_within(find_policy('quota'), given, {'budget': 10.0, 'unit': 'macs'}, 9, path_costs(3, cut=False))
