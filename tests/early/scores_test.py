"""Confidences against the plain formulas and numbers worked out by hand."""

from math import log

import numpy as np
import pytest
from early_samples import confidence_of

from paranet_jax.early.scores import SCORES, confidence, confidences, patience, to_confidence, to_score

# Softmax gives 1/8, 2/8, 5/8.
LOGITS = np.log([1.0, 2.0, 5.0])
ENTROPY = -(1 / 8 * log(1 / 8) + 2 / 8 * log(2 / 8) + 5 / 8 * log(5 / 8))


@pytest.mark.parametrize('temperature', [1.0, 2.5])
@pytest.mark.parametrize(
  ('score', 'uncertainty'), [('max_prob', 3 / 8), ('entropy', ENTROPY / log(3)), ('margin', 1 - 5 / 8 + 2 / 8)]
)
def test_confidence_by_hand(score, uncertainty, temperature):
  np.testing.assert_allclose(confidence(LOGITS * temperature, score, temperature), -log(uncertainty), rtol=1e-14)


@pytest.mark.parametrize('score', SCORES[:3])
def test_equals_the_plain_formula(score):
  logits = 3 * np.random.default_rng(0).normal(size=(4, 5, 7))
  logits[0, :, 2] += 10
  expected = [[confidence_of(row, score, 1.0) for row in rows] for rows in logits]
  np.testing.assert_allclose(confidence(logits, score), expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
  ('score', 'of_gap'),
  [
    # With two others a gap g below, 1 - p1 = 2 e^-g, p2 = e^-g and the entropy is 2 e^-g (g + 1), for large g.
    ('max_prob', lambda gap: gap - log(2)),
    ('margin', lambda gap: gap - log(3)),
    ('entropy', lambda gap: gap - log(2 * (gap + 1)) + log(log(3))),
  ],
)
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_does_not_saturate(score, of_gap, dtype):
  # Up to the smallest powers that float64 holds (about 667 to 745), and beyond.
  gaps = np.array([38.0, 39.9, 40.5, 100.0, 667.0, 668.0, 700.0, 744.0, 746.0, 1e4, 1e30], dtype)
  logits = np.stack([np.zeros_like(gaps), gaps, np.zeros_like(gaps)], axis=-1)
  expected = [of_gap(float(gap)) for gap in gaps]
  np.testing.assert_allclose(confidence(logits, score), expected, rtol=1e-13)
  for row, value in zip(logits, expected, strict=True):
    np.testing.assert_allclose(confidence(row, score), value, rtol=1e-13)


@pytest.mark.parametrize(('score', 'expected'), [('max_prob', -log(0.75)), ('entropy', 0.0), ('margin', 0.0)])
def test_equal_logits(score, expected):
  found = confidence(np.full((2, 4), 1.7), score)
  np.testing.assert_allclose(found, [expected] * 2, atol=1e-15)
  assert np.all(found >= 0)


def test_patience_counts_equal_predictions_in_a_row():
  predictions = [[1, 1, 1, 1], [1, 2, 1, 2], [1, 2, 2, 1], [1, 2, 2, 1]]
  np.testing.assert_array_equal(patience(predictions), [[1, 1, 1, 1], [2, 1, 2, 1], [3, 2, 1, 1], [4, 3, 2, 2]])


def test_confidences_of_all_exits():
  logits = np.random.default_rng(1).normal(size=(3, 6, 4)).astype(np.float32)
  found = confidences(logits, 'margin', [1.0, 2.0, 3.0])
  assert found.dtype == np.float64
  np.testing.assert_array_equal(found, [confidence(z, 'margin', t) for z, t in zip(logits, (1, 2, 3), strict=True)])
  np.testing.assert_array_equal(confidences(logits, 'patience', [1.0, 2.0, 3.0]), patience(logits.argmax(-1)))


@pytest.mark.parametrize(
  ('score', 'value', 'expected'),
  [
    ('max_prob', 0.9, log(10)),
    ('entropy', 0.0, 0.0),
    ('margin', 0.75, log(4)),
    ('max_prob', 1.0, np.inf),
    ('patience', 3, 3.0),
  ],
)
def test_the_scale_of_the_score(score, value, expected):
  np.testing.assert_allclose(to_confidence(value, score), expected, rtol=1e-14)
  np.testing.assert_allclose(to_score(expected, score), value, rtol=1e-14)
  assert to_score(-np.inf, score) == 0  # The last threshold.


def test_patience_is_not_a_probability_score():
  with pytest.raises(ValueError, match='not a probability score: patience'):
    confidence(LOGITS, 'patience')
