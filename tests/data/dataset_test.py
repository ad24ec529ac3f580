import numpy as np
import pytest

from paranet_jax.data.dataset import max_drawable, stratified_indices

# Class sizes, how many to draw, and how many come from each class by the largest remainder, worked out by hand.
DRAWS = [
  ([6, 3, 1], 0, [0, 0, 0]),
  ([4, 4], 3, [2, 1]),  # Shares 1.5 and 1.5: the tie goes to the first.
  ([10, 5], 3, [2, 1]),  # Shares 2 and 1.
  ([6, 3, 1], 5, [3, 2, 0]),  # Shares 3, 1.5 and 0.5, but the last class keeps its only example.
  ([6, 3, 1], 7, [5, 2, 0]),  # Shares 4.2, 2.1 and 0.7: only the first class can still give one.
]


@pytest.mark.parametrize('sizes, count, expected', DRAWS)
def test_draws_by_largest_remainder(sizes, count, expected):
  labels = np.random.RandomState(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
  kept, drawn = stratified_indices(labels, count, seed=1)
  np.testing.assert_array_equal(np.bincount(labels[drawn], minlength=len(sizes)), expected)
  np.testing.assert_array_equal(np.sort(np.concatenate([kept, drawn])), np.arange(len(labels)))
  for indices in (kept, drawn):
    np.testing.assert_array_equal(indices, np.sort(indices))


def test_draw_depends_on_the_seed_only():
  labels = np.arange(200) % 4
  first, again, other = (stratified_indices(labels, 20, seed)[1] for seed in (3, 3, 4))
  np.testing.assert_array_equal(first, again)
  assert set(first) != set(other)


def test_classes_may_be_absent():
  kept, drawn = stratified_indices(np.array([7, 7, 2, 2]), 2, seed=0)
  assert len(kept) == len(drawn) == 2


@pytest.mark.parametrize('count', [-1, 8, 10])
def test_refuses_what_would_empty_a_class(count):
  labels = np.repeat([0, 1, 2], [6, 3, 1])
  assert max_drawable(labels) == 7
  with pytest.raises(ValueError, match=f'cannot draw {count} of 10 examples in 3 classes'):
    stratified_indices(labels, count, seed=0)
