"""Tests of risk control: by simulation, against a loop over thresholds, and on cases worked out by hand."""

import functools

import numpy as np
import pytest
from scipy.stats import binom

from paranet_jax.early.policies.risk import (
  crc,
  disagreement,
  images_needed_crc,
  images_needed_ltt,
  ltt,
  performance_gap,
)
from paranet_jax.early.policies.shared import shared_thresholds
from paranet_jax.early.thresholds import exits_taken

DRAWS = 1000


def losses_at(threshold, confidences, losses):
  """[N], with one threshold for all exits."""
  exits = exits_taken(confidences, shared_thresholds(threshold, len(confidences)))
  return losses[exits, np.arange(len(exits))]


@functools.cache
def population(seed=0, n=4000, num_exits=4):
  """Exits that are surer than they should be, the earlier the more; the loss of the last is 0."""
  rng = np.random.default_rng(seed)
  skill = rng.normal(size=n) + np.linspace(1, 3, num_exits)[:, None]
  losses = (rng.random((num_exits, n)) > 1 / (1 + np.exp(-skill))).astype(float)
  losses[-1] = 0
  return np.exp(skill + 0.5 * rng.normal(size=skill.shape)), losses


def lines(confidences):
  """A threshold in each interval between neighbouring confidences, from above the largest down to below the least."""
  levels = np.unique(confidences[:-1])[::-1]
  return [levels[0] + 1, *((levels[:-1] + levels[1:]) / 2), 0.0]


def test_losses():
  correct = np.array([[0, 1, 0, 1], [1, 1, 0, 0], [1, 0, 0, 1]], bool)
  np.testing.assert_array_equal(performance_gap(correct), [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
  predictions = np.array([[1, 2, 3], [1, 3, 3], [2, 3, 3]])
  np.testing.assert_array_equal(disagreement(predictions), [[1, 1, 0], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('ties', [False, True])
def test_ltt_equals_the_loop(seed, ties):
  confidences, losses = population(seed, n=150)
  confidences = np.ceil(confidences / 8) if ties else confidences
  expected = np.inf
  for threshold in lines(confidences):
    count = losses_at(threshold, confidences, losses).sum()
    if sum(binom.pmf(i, 150, 0.1) for i in range(int(count) + 1)) > 0.1:
      break
    expected = threshold
  found = ltt(confidences, losses, 0.1, 0.1)
  assert np.isfinite(found)
  np.testing.assert_array_equal(
    exits_taken(confidences, shared_thresholds(found, 4)), exits_taken(confidences, shared_thresholds(expected, 4))
  )


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('ties', [False, True])
def test_crc_equals_the_loop(seed, ties):
  confidences, losses = population(seed, n=150)
  confidences = np.ceil(confidences / 8) if ties else confidences
  worst, expected = np.zeros(150), np.inf
  for threshold in lines(confidences):
    worst = np.maximum(worst, losses_at(threshold, confidences, losses))
    if worst.mean() > (151 * 0.1 - 1) / 150:
      break
    expected = threshold
  found = crc(confidences, losses, 0.1)
  assert np.isfinite(found)
  np.testing.assert_array_equal(
    exits_taken(confidences, shared_thresholds(found, 4)), exits_taken(confidences, shared_thresholds(expected, 4))
  )


def draws(n, num_exits):
  confidences, losses = population(num_exits=num_exits)
  rng = np.random.default_rng(1)
  for _ in range(DRAWS):
    chosen = rng.integers(0, confidences.shape[1], n)
    yield confidences[:, chosen], losses[:, chosen]


def true_risk(threshold, num_exits):
  return losses_at(threshold, *population(num_exits=num_exits)).mean()


@pytest.mark.parametrize('n, epsilon, delta', [(200, 0.05, 0.1), (60, 0.1, 0.3)])
def test_ltt_keeps_the_risk_in_a_share_of_draws(n, epsilon, delta):
  risks = np.array([true_risk(ltt(*draw, epsilon, delta), 4) for draw in draws(n, 4)])
  exceeds = np.mean(risks > epsilon)
  assert exceeds <= delta + 3 * np.sqrt(delta * (1 - delta) / DRAWS)
  # Not by being idle.
  assert exceeds > delta / 4 and risks.mean() > epsilon / 4


@pytest.mark.parametrize('n, epsilon, num_exits', [(200, 0.05, 4), (30, 0.1, 2)])
def test_crc_keeps_the_mean_risk(n, epsilon, num_exits):
  risks = np.array([true_risk(crc(*draw, epsilon), num_exits) for draw in draws(n, num_exits)])
  assert risks.mean() <= epsilon + 3 * risks.std() / np.sqrt(DRAWS)
  assert risks.mean() > epsilon / 2


# Losses of three exchangeable samples at six lambdas, going down. Whichever two calibrate, the mean of the two first
# exceeds a half just after the third has a loss of 1.
CURVES = np.array([[0, 1, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 1]], float)


def test_crc_where_losses_are_not_monotone():
  confidences = np.repeat(np.arange(1.0, 8)[:, None], 3, axis=1)  # exit 6 of 7, at confidence 6, comes first
  losses = np.concatenate([CURVES.T[::-1], np.zeros((1, 3))])
  risks, risks_of_the_mean = [], []
  for test in range(3):
    pair = [i for i in range(3) if i != test]
    found = crc(confidences[:, pair], losses[:, pair], 0.667)
    risks.append(losses_at(found, confidences, losses)[test])
    allowed = np.maximum.accumulate(CURVES[pair].mean(axis=0)) <= (3 * 0.667 - 1) / 2
    risks_of_the_mean.append(CURVES[test, np.sum(allowed) - 1])
  assert np.mean(risks_of_the_mean) == 1.0
  assert np.mean(risks) <= 0.667


def test_ltt_returns_the_threshold_before_the_one_that_fails():
  # 30 samples, surer and surer; only the two least sure ones have a loss. At epsilon 0.1, no loss among 30 has
  # p = 0.9^30 = 0.042 and one has 0.184.
  confidences = np.stack([np.arange(1.0, 31), np.zeros(30)])
  losses = np.zeros((2, 30))
  losses[0, :2] = 1
  # Sample 2, of confidence 3, may leave; with sample 1, of confidence 2, the test fails.
  assert ltt(confidences, losses, 0.1, 0.05) == 2.5
  assert ltt(confidences, losses, 0.1, 0.183) == 2.5
  assert ltt(confidences, losses, 0.1, 0.185) == 1.5
  assert crc(confidences, losses, 1.5 / 31) == 2.5
  assert crc(confidences, losses, 2 / 31) == 1.5
  assert crc(confidences, losses, 3 / 31) == 0.0


def test_the_full_network_where_the_surest_sample_has_a_loss():
  confidences, losses = np.array([[5.0, 1.0], [0.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 0.0]])
  assert ltt(confidences, losses, 0.9, 0.1) == np.inf
  assert crc(confidences, losses, 0.5) == np.inf


def test_one_exit_has_nothing_to_choose():
  assert ltt(np.ones((1, 9)), np.zeros((1, 9)), 0.9, 0.1) == np.inf
  assert crc(np.ones((1, 9)), np.zeros((1, 9)), 0.9) == np.inf


def test_exits_that_are_no_surer_than_an_earlier_one_are_never_taken():
  # The second exit's loss cannot occur.
  confidences, losses = np.array([[5.0] * 9, [4.0] * 9, [0.0] * 9]), np.array([[0.0] * 9, [1.0] * 9, [0.0] * 9])
  assert crc(confidences, losses, 0.5) == ltt(confidences, losses, 0.5, 0.1) == 0.0


@pytest.mark.parametrize(
  'epsilon, delta', [(0.02, 0.1), (0.5, 0.25), (0.5, 0.24), (0.1, 0.05), (0.9, 0.5), (0.01, 0.01)]
)
def test_images_needed_ltt(epsilon, delta):
  n = images_needed_ltt(epsilon, delta)
  for size, qualifies in ((n, True), (n - 1, False)):
    if size:
      found = ltt(np.ones((2, size)), np.zeros((2, size)), epsilon, delta)
      assert (found == 0.0) == qualifies
  if (epsilon, delta) == (0.02, 0.1):
    assert n == 114  # 0.98^113 = 0.1020, 0.98^114 = 0.0999


@pytest.mark.parametrize(
  'epsilon, expected', [(0.02, 49), (0.05, 19), (0.1, 9), (0.3, 3), (0.5, 1), (0.9, 1), (0.07, 14)]
)
def test_images_needed_crc(epsilon, expected):
  assert images_needed_crc(epsilon) == expected
  for size in (expected - 1, expected):
    if size:
      found = crc(np.ones((2, size)), np.zeros((2, size)), epsilon)
      assert (found == 0.0) == (size == expected)
