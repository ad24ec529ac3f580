"""Tests of the measures, against numbers worked out by hand and a count over pairs."""

from math import log

import numpy as np
import pytest

from paranet_jax.calibrate.measures import auroc, brier, ece, nll, reliability

# In four bins (0, 0.25], (0.25, 0.5], (0.5, 0.75], (0.75, 1]: 2, 0, 1 and 3 samples.
CONFIDENCE = [0.25, 0.05, 0.75, 0.8, 0.9, 1.0]
CORRECT = [True, False, False, True, True, False]


def test_reliability():
  counts, mean_confidence, accuracy = reliability(CONFIDENCE, CORRECT, bins=4)
  np.testing.assert_array_equal(counts, [2, 0, 1, 3])
  np.testing.assert_allclose(mean_confidence, [0.15, 0, 0.75, 0.9])
  np.testing.assert_allclose(accuracy, [0.5, 0, 0, 2 / 3])


def test_ece():
  expected = (2 * abs(0.5 - 0.15) + 1 * abs(0 - 0.75) + 3 * abs(2 / 3 - 0.9)) / 6
  np.testing.assert_allclose(ece(CONFIDENCE, CORRECT, bins=4), expected)


def test_ece_uses_15_bins():
  # 0.34 and 0.39 fall into bins 6 = (5/15, 6/15] both; with 16 bins they would be apart.
  np.testing.assert_allclose(ece([0.34, 0.39], [True, False]), abs(0.5 - 0.365))


def test_a_probability_of_zero_is_in_the_first_bin():
  np.testing.assert_array_equal(reliability([0.0, 1.0], [True, True], bins=3)[0], [1, 0, 1])


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


@pytest.mark.parametrize('correct', [[True, True], [False, False]])
def test_auroc_needs_right_and_wrong(correct):
  assert auroc([0.1, 0.2], correct) is None


def test_of_nobody():
  nobody = np.zeros((0, 3))
  none = np.zeros(0, int)
  assert [ece(none, none), auroc(none, none), nll(nobody, none), brier(nobody, none)] == [None] * 4
