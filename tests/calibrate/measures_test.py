"""Temperature scaling and the calibration measures, against hand-computed numbers."""

from math import log, sqrt

import numpy as np
import pytest
from scipy.special import softmax

from paranet_jax.calibrate.measures import (
  auroc,
  brier,
  ece,
  fit_ece_temperature,
  fit_temperature,
  nll,
  raised,
  reliability,
  summarize,
  top_probability,
)
from paranet_jax.early.path_costs import PathCosts
from paranet_jax.early.thresholds import Samples

# In four bins (0, 0.25], (0.25, 0.5], (0.5, 0.75], (0.75, 1]: 2, 0, 1 and 3 samples.
CONFIDENCE = np.array([0.25, 0.05, 0.75, 0.8, 0.9, 1.0])
CORRECT = np.array([True, False, False, True, True, False])


def test_reliability_and_ece():
  counts, mean_confidence, accuracy = reliability(CONFIDENCE, CORRECT, bins=4)
  np.testing.assert_array_equal(counts, [2, 0, 1, 3])
  np.testing.assert_allclose(mean_confidence, [0.15, 0, 0.75, 0.9])
  np.testing.assert_allclose(accuracy, [0.5, 0, 0, 2 / 3])
  expected = (2 * abs(0.5 - 0.15) + 1 * abs(0 - 0.75) + 3 * abs(2 / 3 - 0.9)) / 6
  np.testing.assert_allclose(ece(CONFIDENCE, CORRECT, bins=4), expected)
  # A probability of zero is in the first bin.
  np.testing.assert_array_equal(reliability(np.array([0.0, 1.0]), np.array([True, True]), bins=3)[0], [1, 0, 1])
  # 0.34 and 0.39 both fall into bin 6 of 15 = (5/15, 6/15]; 16 bins would separate them.
  np.testing.assert_allclose(ece(np.array([0.34, 0.39]), np.array([True, False])), abs(0.5 - 0.365))


def test_nll_and_brier():
  probabilities = np.array([[1 / 8, 2 / 8, 5 / 8], [0.0, 0.0, 1.0]])
  np.testing.assert_allclose(nll(np.log([[1.0, 2.0, 5.0], [3.0, 3.0, 6.0]]), [2, 0]), (log(8 / 5) + log(4)) / 2)
  np.testing.assert_allclose(nll(2 * np.log([[1.0, 2.0, 5.0]]), [2], temperature=2.0), log(8 / 5))
  np.testing.assert_allclose(brier(probabilities, [2, 0]), ((1 + 4 + 9) / 64 + 2) / 2)


def test_auroc_counts_pairs_and_ties_half():
  rng = np.random.default_rng(0)
  confidence, correct = rng.integers(0, 6, 40), rng.random(40) < 0.6
  pairs = [(a > b) + (a == b) / 2 for a in confidence[correct] for b in confidence[~correct]]
  np.testing.assert_allclose(auroc(confidence, correct), np.mean(pairs))
  for same in (True, False):
    assert auroc(np.array([0.1, 0.2]), np.array([same, same])) is None


def test_summary_of_four_images():
  labels = np.array([5, 6, 5, 9])
  predictions = np.array([[5, 5, 5, 5], [5, 5, 6, 8], [7, 6, 5, 8]])
  confidences = np.array([[3, 1, 1, 0], [0, 2, 0, 0.5], [0, 0, 0, 0]])  # They exit at exits 1, 2, 3 and 3.
  costs = PathCosts(3, lambda before, index: 1.0)
  samples = Samples(confidences, predictions, predictions == labels, 'max_prob', costs)
  thresholds, macs, ms = np.array([2, 1, -np.inf]), np.array([10.0, 20, 40]), np.array([1.0, 2, 5])
  expected = {
    'images': 4,
    'cost_macs': (10 + 20 + 40 + 40) / 4,
    'cost_ms': (1 + 2 + 5 + 5) / 4,
    'accuracy': 2 / 4,  # The first and the third.
    'shares': [1 / 4, 1 / 4, 2 / 4],
    'exit_accuracy': [2 / 4, 1 / 4, 2 / 4],
    'gap': 1 / 4,  # Only the second would be correct at the last exit.
    'disagreement': 2 / 4,  # The first and the second.
  }
  assert summarize(samples, thresholds, macs, ms) == expected
  assert summarize(samples, thresholds, macs, None) == expected | {'cost_ms': None}
  joules = summarize(samples, thresholds, macs, ms, np.array([0.5, 1.0, 2.0]))
  assert joules == expected | {'cost_joules': (0.5 + 1 + 2 + 2) / 4}


def sampled(n, classes, true_temperature, seed):
  """Logits, and labels drawn from softmax(logits / true_temperature)."""
  rng = np.random.default_rng(seed)
  logits = 4 * rng.normal(size=(n, classes))
  return logits, np.argmax(logits / true_temperature + rng.gumbel(size=logits.shape), axis=-1)


@pytest.mark.parametrize(('true_temperature', 'seed'), [(0.3, 0), (1.0, 1), (2.5, 2)])
def test_within_three_standard_errors_of_the_truth(true_temperature, seed):
  logits, labels = sampled(4000, 10, true_temperature, seed)
  p = softmax(logits / true_temperature, axis=-1)
  # The Fisher information about 1 / T is the variance of the logits under p.
  information = np.sum(np.sum(p * logits**2, axis=-1) - np.sum(p * logits, axis=-1) ** 2)
  standard_error = true_temperature**2 / np.sqrt(information)
  assert abs(fit_temperature(logits, labels) - true_temperature) < 3 * standard_error


@pytest.mark.parametrize('seed', range(3))
def test_is_the_minimum(seed):
  logits, labels = sampled(60, 5, 2.0, seed)
  found = fit_temperature(logits, labels)
  grid = found * np.exp(np.linspace(-5, 5, 501))
  losses = [nll(logits, labels, temperature) for temperature in grid]
  np.testing.assert_allclose(grid[np.argmin(losses)], found, rtol=1e-12)
  assert nll(logits, labels, found) < min(nll(logits, labels, found * factor) for factor in (1 - 1e-6, 1 + 1e-6))


def test_temperature_follows_the_scale_of_the_logits_and_ignores_constants():
  logits, labels = sampled(500, 10, 1.5, 3)
  found = fit_temperature(logits, labels)
  for scale in (1e-6, 0.1, 7.0, 1e6):
    np.testing.assert_allclose(fit_temperature(scale * logits, labels), scale * found, rtol=1e-8)
  np.testing.assert_allclose(fit_temperature(logits + 100 * np.arange(500.0)[:, None], labels), found, rtol=1e-8)


@pytest.mark.parametrize(
  ('logits', 'labels', 'expected'),
  [
    # All correct: the loss decreases towards T = 0.
    ([[3.0, 0.0], [0.0, 1.0]], [0, 1], 1.0),
    ([[2.0, 0.0]], [0], 1.0),
    # All wrong: it decreases towards infinity; the scale is 1.
    ([[2.0, 0.0], [0.0, 2.0]], [1, 0], 1e4),
    ([[2.0, 0.0]], [1], 1e4),
    # Half correct, which is chance.
    ([[2.0, 0.0], [2.0, 0.0]], [0, 1], 1e4),
    ([[1.0, 1.0], [1.0, 1.0]], [0, 1], 1.0),
    # So nearly equal that T = 1 is closer to uniform than 10,000 times the scale.
    ([[1e-9, 0.0]], [1], 1.0),
  ],
)
def test_a_loss_without_a_minimum(logits, labels, expected):
  assert fit_temperature(np.array(logits), np.array(labels)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize('scale', [1.0, 3.0, 1e-3])
def test_the_temperature_of_the_least_nll_can_raise_ece(scale):
  """Seven of ten samples have the first of three classes and the others the last, but all the same logits (2a, a, 0).

  With x = exp(a / T), the top probability x^2 / (x^2 + x + 1) is 0.7 where 3 x^2 - 7 x - 7 = 0. NLL is least where
  the mean logit is that of the labels: (2 x^2 + x) / (x^2 + x + 1) = 1.4, or 3 x^2 - 2 x - 7 = 0.
  """
  calibrated, likeliest = (7 + sqrt(133)) / 6, (2 + sqrt(88)) / 6
  logits = scale * log(calibrated) * np.tile([2.0, 1.0, 0.0], (10, 1))
  labels = np.array([0] * 7 + [2] * 3)
  by_nll, by_ece = fit_temperature(logits, labels), fit_ece_temperature(logits, labels)
  assert by_nll == pytest.approx(scale * log(calibrated) / log(likeliest), rel=1e-8)
  assert by_ece == pytest.approx(scale, rel=1e-3)
  gaps = [ece(top_probability(logits, temperature), labels == 0) for temperature in (by_ece, by_nll)]
  assert gaps[0] == pytest.approx(0, abs=1e-3)
  assert gaps[1] == pytest.approx(0.7 - likeliest**2 / (likeliest**2 + likeliest + 1), rel=1e-6)


def test_the_temperature_of_the_least_ece():
  logits, labels = sampled(500, 10, 2.5, 4)
  correct = logits.argmax(-1) == labels
  gaps = [
    ece(top_probability(logits, temperature), correct)
    for temperature in (fit_ece_temperature(logits, labels), fit_temperature(logits, labels), 1.0)
  ]
  assert gaps[0] == min(gaps) < gaps[2]
  # All correct, and logits that are all equal: the samples do not say how far to go.
  assert fit_ece_temperature(np.array([[3.0, 0.0], [0.0, 1.0]]), np.array([0, 1])) == 1
  assert fit_ece_temperature(np.ones((2, 2)), np.array([0, 1])) == 1


def test_what_a_temperature_raises():
  rows = [
    {'exit': number, 'calibration': {'all': {'ece': pair, 'nll': pair[::-1]}}}
    for number, pair in ((1, [0.1, 0.2]), (2, [0.1, 0.1]), (4, [0.2, 0.1]))
  ]
  assert raised(rows) == {'ece': [1], 'nll': [4]}


def test_never_raises_the_loss_nor_changes_a_prediction():
  rng = np.random.default_rng(0)
  for _ in range(20):
    n, classes = rng.integers(1, 30), rng.integers(2, 6)
    logits = (10 ** rng.uniform(-3, 3) * rng.normal(size=(n, classes))).astype(np.float32)
    labels = np.where(rng.random(n) < rng.random(), logits.argmax(-1), rng.integers(0, classes, n))
    found = fit_temperature(logits, labels)
    assert 0 < found < np.inf
    assert nll(logits, labels, found) <= nll(logits, labels)
    np.testing.assert_array_equal((logits.astype(np.float64) / found).argmax(-1), logits.argmax(-1))
