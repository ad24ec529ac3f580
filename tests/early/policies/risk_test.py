"""Risk control: by simulation, against a loop over thresholds, and on cases worked out by hand."""

import functools
import math

import numpy as np
import pytest
from early_samples import path_costs

from paranet_jax.early.policies.risk import (
  LTT,
  crc,
  images_needed_crc,
  images_needed_ltt,
  losses_of,
  ltt,
  ltt_by_class,
  ltt_selective,
  selective_path,
)
from paranet_jax.early.policies.shared import shared_thresholds
from paranet_jax.early.thresholds import Samples, exits_taken

DRAWS = 300


def taken(threshold, confidences):
  """The exits with one threshold for all of them."""
  return exits_taken(confidences, shared_thresholds(threshold, len(confidences)))


def losses_at(threshold, confidences, losses):
  exits = taken(threshold, confidences)
  return losses[exits, np.arange(len(exits))]


@functools.cache
def population(seed=0, n=4000, num_exits=4):
  """Exits that are overconfident, the earlier the more; the loss of the last is 0."""
  rng = np.random.default_rng(seed)
  skill = rng.normal(size=n) + np.linspace(1, 3, num_exits)[:, None]
  losses = (rng.random((num_exits, n)) > 1 / (1 + np.exp(-skill))).astype(float)
  losses[-1] = 0
  return np.exp(skill + 0.5 * rng.normal(size=skill.shape)), losses


def test_losses():
  correct = np.array([[0, 1, 0, 1], [1, 1, 0, 0], [1, 0, 0, 1]], bool)
  predictions = np.array([[1, 2, 3, 3], [1, 3, 3, 3], [2, 3, 3, 3]])
  samples = Samples(np.zeros((3, 4)), predictions, correct, 'max_prob', None)
  np.testing.assert_array_equal(losses_of(samples, 'gap'), [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
  np.testing.assert_array_equal(losses_of(samples, 'disagreement'), [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])


def tail(count):
  """Probability of at most so many losses among 150 if each has probability 0.1."""
  return sum(math.comb(150, lost) * 0.1**lost * 0.9 ** (150 - lost) for lost in range(count + 1))


@pytest.mark.parametrize('method', ['ltt', 'crc'])
@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('ties', [False, True])
def test_equals_the_loop(method, seed, ties):
  confidences, losses = population(seed, n=150)
  confidences = np.ceil(confidences / 8) if ties else confidences
  levels = np.unique(confidences[:-1])[::-1]
  expected, worst = np.inf, np.zeros(150)
  # A threshold between every two adjacent confidences, from above the largest down to below the least.
  for threshold in [levels[0] + 1, *((levels[:-1] + levels[1:]) / 2), 0.0]:
    lost = losses_at(threshold, confidences, losses)
    worst = np.maximum(worst, lost)
    if method == 'ltt' and tail(int(lost.sum())) > 0.1:
      break
    if method == 'crc' and worst.mean() > (151 * 0.1 - 1) / 150:
      break
    expected = threshold
  found = ltt(confidences, losses, 0.1, 0.1) if method == 'ltt' else crc(confidences, losses, 0.1)
  assert np.isfinite(found)
  np.testing.assert_array_equal(taken(found, confidences), taken(expected, confidences))


def risks_of_draws(choose, n, num_exits=4):
  """The true risks of the thresholds chosen on random draws from the population."""
  confidences, losses = population(num_exits=num_exits)
  rng = np.random.default_rng(1)
  for _ in range(DRAWS):
    drawn = rng.integers(0, confidences.shape[1], n)
    yield losses_at(choose(confidences[:, drawn], losses[:, drawn]), confidences, losses).mean()


@pytest.mark.parametrize(('n', 'epsilon', 'delta'), [(200, 0.05, 0.1), (60, 0.1, 0.3)])
def test_ltt_exceeds_the_risk_in_few_draws(n, epsilon, delta):
  risks = np.array(list(risks_of_draws(lambda *drawn: ltt(*drawn, epsilon, delta), n)))
  exceeds = np.mean(risks > epsilon)
  assert exceeds <= delta + 3 * np.sqrt(delta * (1 - delta) / DRAWS)
  assert exceeds > delta / 4 and risks.mean() > epsilon / 4  # It uses the risk it may take.


@pytest.mark.parametrize(('n', 'epsilon', 'num_exits'), [(200, 0.05, 4), (30, 0.1, 2)])
def test_crc_keeps_the_mean_risk(n, epsilon, num_exits):
  risks = np.array(list(risks_of_draws(lambda *drawn: crc(*drawn, epsilon), n, num_exits)))
  assert epsilon / 2 < risks.mean() <= epsilon + 3 * risks.std() / np.sqrt(DRAWS)


# Losses of three exchangeable samples at six lambdas, going down. Whichever two calibrate, the mean of the two first
# exceeds a half just after the third has a loss of 1.
CURVES = np.array([[0, 1, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 1]], float)


def test_crc_where_losses_are_not_monotone():
  confidences = np.repeat(np.arange(1.0, 8)[:, None], 3, axis=1)  # Exit 6 of 7, at confidence 6, comes first.
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


def test_the_threshold_before_the_one_that_fails():
  # 30 samples of rising confidence; only the two least confident ones have a loss. At epsilon 0.1, no loss among 30 has
  # p = 0.9^30 = 0.042 and one has 0.184.
  confidences = np.stack([np.arange(1.0, 31), np.zeros(30)])
  losses = np.zeros((2, 30))
  losses[0, :2] = 1
  # Sample 2, with confidence 3, may exit; with sample 1, with confidence 2, the test fails.
  assert ltt(confidences, losses, 0.1, 0.05) == 2.5
  assert ltt(confidences, losses, 0.1, 0.183) == 2.5
  assert ltt(confidences, losses, 0.1, 0.185) == 1.5
  assert crc(confidences, losses, 1.5 / 31) == 2.5
  assert crc(confidences, losses, 2 / 31) == 1.5
  assert crc(confidences, losses, 3 / 31) == 0.0


@pytest.mark.parametrize(
  ('confidences', 'losses', 'expected'),
  [
    # The most confident sample has a loss, so the full network remains.
    ([[5.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]], np.inf),
    # One exit has nothing to choose.
    (np.ones((1, 9)), np.zeros((1, 9)), np.inf),
    # No sample exits where it is less confident than before, so the second exit's loss cannot occur.
    ([[5.0] * 9, [4.0] * 9, [0.0] * 9], [[0.0] * 9, [1.0] * 9, [0.0] * 9], 0.0),
  ],
)
def test_limits(confidences, losses, expected):
  given = np.array(confidences), np.array(losses)
  assert ltt(*given, 0.5, 0.1) == crc(*given, 0.5) == expected


def qualifies(choose, size):
  return size > 0 and choose(np.ones((2, size)), np.zeros((2, size))) == 0.0


@pytest.mark.parametrize(
  ('epsilon', 'delta'), [(0.02, 0.1), (0.5, 0.25), (0.5, 0.24), (0.1, 0.05), (0.9, 0.5), (0.01, 0.01)]
)
def test_images_needed_ltt(epsilon, delta):
  n = images_needed_ltt(epsilon, delta)
  assert [qualifies(lambda *given: ltt(*given, epsilon, delta), size) for size in (n - 1, n)] == [False, True]
  if (epsilon, delta) == (0.02, 0.1):
    assert n == 114  # 0.98^113 = 0.1020, 0.98^114 = 0.0999


@pytest.mark.parametrize('epsilon', [1e-13, 1e-300, 5e-324])
@pytest.mark.parametrize('target', [{}, {'delta': 0.1}, {'delta': 5e-324}])
def test_a_risk_that_no_number_of_images_can_promise(epsilon, target):
  samples = Samples(np.ones((2, 3)), np.zeros((2, 3), int), np.ones((2, 3), bool), 'max_prob', path_costs(2, cut=False))
  problem = LTT.choose(samples, {'risk': epsilon, 'loss': 'gap', **target}).problem
  assert problem is not None
  start = f'risk {epsilon} cannot be promised from 3 held-out images: it would need more than 1,000,000,000,000; '
  assert problem.startswith(start)


@pytest.mark.parametrize(
  ('epsilon', 'expected'), [(0.02, 49), (0.05, 19), (0.1, 9), (0.3, 3), (0.5, 1), (0.9, 1), (0.07, 14)]
)
def test_images_needed_crc(epsilon, expected):
  assert images_needed_crc(epsilon) == expected
  found = [qualifies(lambda *given: crc(*given, epsilon), size) for size in (expected - 1, expected)]
  assert found == [False, True]


@functools.cache
def steep(seed=3, n=4000, num_exits=4):
  """Exits whose most confident samples hardly lose, so that each exit has some that may leave."""
  rng = np.random.default_rng(seed)
  skill = rng.normal(size=n) + np.linspace(0, 2, num_exits)[:, None]
  losses = (rng.random((num_exits, n)) > 1 / (1 + np.exp(-3 * skill))).astype(float)
  losses[-1] = 0
  return np.exp(skill + 0.2 * rng.normal(size=skill.shape)), losses


@functools.cache
def reference(seed=5):
  """The order in which thresholds are tested, from images that nothing is tested on."""
  confidences, losses = steep()
  drawn = np.random.default_rng(seed).integers(0, confidences.shape[1], 600)
  return selective_path(confidences[:, drawn], losses[:, drawn], 0.1, 0.1)


def test_the_order_of_the_tests_goes_from_sure_to_cheap():
  path = reference()
  first = [np.mean(exits_taken(steep()[0], thresholds) == 0) for thresholds in path]
  assert first == sorted(first) and first[0] < first[-1] and (path[:, -1] == -np.inf).all()


def test_few_draws_have_an_exit_whose_risk_is_higher():
  confidences, losses = steep()
  rng, exceeds, early = np.random.default_rng(2), 0, []
  for _ in range(DRAWS):
    drawn = rng.integers(0, confidences.shape[1], 400)
    exits = exits_taken(confidences, ltt_selective(confidences[:, drawn], losses[:, drawn], reference(), 0.1, 0.1))
    lost = losses[exits, np.arange(len(exits))]
    exceeds += any(lost[exits == k].mean() > 0.1 for k in range(3) if (exits == k).any())
    early.append(np.mean(exits < 3))
  assert exceeds / DRAWS <= 0.1 + 3 * np.sqrt(0.09 / DRAWS)
  assert exceeds and np.mean(early) > 0.5  # It uses the risk it may take.


def test_the_thresholds_before_those_that_fail():
  # Of ten images the two most confident leave, then five, then all; the seventh has a loss. 0.5^2 is above a tenth,
  # 0.5^5 = 0.03 is not, and one loss of ten has p = 11 / 1024.
  confidences, losses = np.stack([np.arange(10.0)[::-1], np.zeros(10)]), np.zeros((2, 10))
  losses[0, 6] = 1
  two, five, whole, none = ([at, -np.inf] for at in (7.5, 4.5, 0.0, np.inf))
  found = [ltt_selective(confidences, losses, np.array(path), 0.5, 0.1)[0] for path in ([two], [five], [five, whole])]
  assert found == [np.inf, 4.5, 0.0]
  assert ltt_selective(confidences, losses, np.array([none, five, two, whole]), 0.5, 0.1)[0] == 4.5
  assert ltt_selective(confidences, losses, np.array([five, whole]), 0.5, 0.01)[0] == np.inf


def test_the_risk_of_each_class():
  # Ten images of class 0 without a loss; of class 3 only one of ten, at confidence 3, has one; class 7 has two images.
  classes = np.repeat([0, 3, 7], [10, 10, 2])
  confidences, losses = np.stack([np.arange(22.0), np.zeros(22)]), np.zeros((2, 22))
  confidences[0, 10:20], losses[0, 10] = np.arange(3.0, 13), 1
  # Eight without a loss are needed: 0.75^8 = 0.1. All classes together could afford the loss.
  found, few = ltt_by_class(confidences, losses, classes, 0.25, 0.11)
  assert (found, few) == (3.5, [7])
  assert ltt(confidences, losses, 0.25, 0.11) == 0.0
  samples = Samples(confidences, np.ones((2, 22), int), losses == 0, 'max_prob', path_costs(2, cut=False), classes)
  choice = LTT.choose(samples, {'risk': 0.25, 'delta': 0.11, 'loss': 'gap', 'of': 'class'})
  assert choice.thresholds.tolist() == [3.5, -np.inf] and choice.facts == {'too_few': [7], 'needed': 8}
  # Class 5 has images, and none of them is tested; no image has class 4.
  samples = samples._replace(classes=np.array([0, 3, 5, 7]))
  choice = LTT.choose(samples, {'risk': 0.25, 'delta': 0.11, 'loss': 'gap', 'of': 'class'})
  assert choice.thresholds.tolist() == [3.5, -np.inf] and choice.facts == {'too_few': [5, 7], 'needed': 8}


@pytest.mark.parametrize(('kind', 'missing'), [('class', 'labels'), ('selective', 'a reference')])
def test_what_a_kind_of_risk_needs(kind, missing):
  samples = Samples(np.ones((2, 3)), np.zeros((2, 3), int), np.ones((2, 3), bool), 'max_prob', path_costs(2, cut=False))
  with pytest.raises(ValueError, match=missing):
    LTT.choose(samples, {'risk': 0.1, 'delta': 0.1, 'loss': 'gap', 'of': kind})
