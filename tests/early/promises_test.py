"""Answers that are rejected and sets of classes: by hand, and by simulation where exits depend on the images."""

import functools

import numpy as np
import pytest

from paranet_jax.early.policies.shared import shared_thresholds
from paranet_jax.early.promises import (
  Labeled,
  Leaving,
  choose_rejection,
  choose_sets,
  conformal_limit,
  exit_groups,
  images_needed,
)
from paranet_jax.early.scores import confidences
from paranet_jax.early.thresholds import exits_taken
from paranet_jax.portable.run import set_scores, softmax

DRAWS = 300


def leaving(early, confidence, wrong):
  return Leaving(np.array(early, bool), np.array(confidence, float), np.array(wrong, bool))


def test_a_rejection_by_hand():
  # At the last exit, four right answers are surer than a wrong one, and one more right answer is the least sure.
  right, wrong = [False] * 4, [True, False]
  images = leaving([False] * 6, [6, 5, 4, 3, 2, 1], right + wrong)
  # No error among four: 0.5^4 = 0.06. One among five: 6 / 32 = 0.19; among six: 7 / 64 = 0.11.
  assert choose_rejection(images, images, 0.5, 0.1) == 2.5
  assert choose_rejection(images, images, 0.5, 0.05) is None
  assert choose_rejection(images, images, 0.5, 0.12) == 2.5  # What is tested in between fails.
  assert choose_rejection(images, images, 0.5, 0.19) == 0.0
  # Four that leave early, all right, and two at the last exit that are wrong: no image is answered there.
  images = leaving([True] * 4 + [False] * 2, [0, 0, 0, 0, 2, 1], right + [True, True])
  assert choose_rejection(images, images, 0.5, 0.1) == np.inf
  # The sequence starts where the reference is surest, at 3.5.
  reference = leaving([False] * 4, [5, 4, 3, 2], [False, False, True, True])
  tested = leaving([False] * 6, [9, 8, 7, 6, 5, 1], [False] * 5 + [True])
  assert choose_rejection(reference, tested, 0.5, 0.1) == 2.5  # At 0, one error of six: p = 7 / 64.


@functools.cache
def population(at, n=4000, num_exits=3, classes=6):
  """Logits that get surer with the exits, labels, confidences, and the exits that images take from a confidence on."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, classes, n)
  signal = np.eye(classes)[labels] * np.linspace(1.0, 3.0, num_exits)[:, None, None] * rng.exponential(1, (n, 1))
  logits = 2 * (signal + 0.6 * rng.normal(size=(num_exits, n, classes)))
  ranks = confidences(logits, 'max_prob', np.ones(num_exits))
  return logits, labels, ranks, exits_taken(ranks, shared_thresholds(at, num_exits))


def images_at(drawn):
  logits, labels, ranks, taken = population(3.0)
  wrong = logits[taken, np.arange(len(taken))].argmax(-1) != labels
  return Leaving(taken[drawn] < 2, ranks[-1, drawn], wrong[drawn])


def test_few_draws_answer_with_more_errors():
  everything, reference = images_at(np.arange(4000)), images_at(np.arange(0, 4000, 10))
  rng, exceeds, answered = np.random.default_rng(1), 0, []
  for _ in range(DRAWS):
    at = choose_rejection(reference, images_at(rng.integers(0, 4000, 300)), 0.1, 0.1)
    given = everything.early | (everything.confidence >= (np.inf if at is None else at))
    answered.append(0 if at is None else given.mean())
    exceeds += at is not None and everything.wrong[given].mean() > 0.1
  assert exceeds / DRAWS <= 0.1 + 3 * np.sqrt(0.09 / DRAWS)
  assert exceeds and np.mean(answered) > np.mean(everything.early)


def labeled(drawn):
  logits, labels, _, taken = population(0.7)  # A quarter is wrong at the first exit.
  return Labeled(np.stack([softmax(each[drawn], 1.0) for each in logits]), labels[drawn], taken[drawn])


def test_sets_cover_at_every_exit():
  everything, rng = labeled(np.arange(4000)), np.random.default_rng(2)
  rows, covered, sizes, all_exits = np.arange(4000), [], [], []
  # Every draw: the share of the whole population that its sets cover, whose mean is the probability that is promised.
  for _ in range(40):
    draw = rng.permutation(4000)
    sets = choose_sets(labeled(draw[:400]), labeled(draw[400:700]), 0.9)
    scores = np.stack([set_scores(each, sets['penalty'], sets['free']) for each in everything.probabilities])
    limits = np.array([np.inf if limit is None else limit for limit in sets['limits']])
    held = scores[everything.taken, rows] <= limits[everything.taken][:, None]
    hits = held[rows, everything.labels]
    covered.append([hits[everything.taken == k].mean() for k in range(3)])
    sizes.append(held.sum(-1).mean())
    all_exits.append((scores[:, rows, everything.labels] <= sets['anytime']).all(axis=0).mean())
  assert (np.mean(covered, axis=0) >= 0.9 - 3 * np.std(covered, axis=0) / np.sqrt(40)).all()
  assert np.mean(all_exits) >= 0.9 - 3 * np.std(all_exits) / np.sqrt(40)
  assert np.mean(sizes) < 3 and np.max(np.mean(covered, axis=0)) < 0.99 and np.mean(all_exits) < 0.95


def test_scores_of_a_set():
  # Each class has the probability of those before it, and 0.1 for each class from the third on.
  scores = set_scores(np.array([[0.2, 0.5, 0.05, 0.25]]), 0.1, 2)
  np.testing.assert_allclose(scores, [[0.75 + 0.1, 0.0, 0.95 + 0.2, 0.5]])
  np.testing.assert_allclose(set_scores(np.array([[0.5, 0.5]]), 0.0, 1), [[0.0, 0.5]])


@pytest.mark.parametrize(
  ('count', 'coverage', 'place'),
  [
    (9, 0.9, 9),
    (8, 0.9, None),
    (19, 0.9, 18),
    (3, 0.5, 2),
    (4, 0.5, 3),
    (99, 0.9, 90),
    (3, 1e-12, 1),
    (0, 1e-12, None),
  ],
)
def test_the_limit_of_a_set(count, coverage, place):
  # ceil(coverage (n + 1)): of 20 equally likely places for the next of 19 scores, 18 are at most the 18th.
  assert conformal_limit(np.arange(count, 0.0, -1), coverage) == place
  assert (count >= images_needed(coverage)) == (place is not None)


@pytest.mark.parametrize(
  ('counts', 'groups'),
  [
    ([50, 60, 70], [[0], [1], [2]]),
    ([10, 39, 70], [[0, 1, 2]]),
    ([0, 300, 20], [[0, 1, 2]]),
    ([60, 0, 0, 51], [[0], [1, 2, 3]]),
    ([3, 4], [[0, 1]]),
  ],
)
def test_exits_that_share_a_limit(counts, groups):
  assert exit_groups(counts) == groups


def test_the_exits_of_a_group_share_their_limit():
  sets = choose_sets(labeled(np.arange(100)), labeled(np.arange(100, 108)), 0.9)
  assert sets['limits'] == [None] * 3 and sets['anytime'] is None  # Eight images are too few.
