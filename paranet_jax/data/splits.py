"""Stratified draws: which images are held out or become the test split."""

import numpy as np


def stratified_indices(labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws exactly `count` of the N examples, from each class in proportion (largest remainder).

  Every class keeps at least one example.

  Args:
    labels: int [N].
    count: how many to draw, 0 <= count <= N - number of classes present.
    seed: of the draw; independent of a run's seed, so that all runs share one split.

  Returns:
    (kept, drawn): sorted int64 indices, [N - count] and [count], disjoint and together 0..N-1.

  Raises:
    ValueError: count is out of range. Callers check before, and name the flag.
  """
  classes, sizes = np.unique(labels, return_counts=True)
  if not 0 <= count <= max_drawable(labels):
    raise ValueError(f'cannot draw {count} of {len(labels)} examples of {len(classes)} classes')
  share = count * sizes / max(len(labels), 1)
  quota = np.floor(share).astype(np.int64)
  while quota.sum() < count:
    quota[np.argmax(np.where(quota < sizes - 1, share - quota, -np.inf))] += 1
  # RandomState, not default_rng: only its stream is promised to be the same in every NumPy version.
  random = np.random.RandomState(seed)
  drawn = [random.permutation(np.flatnonzero(labels == c))[:q] for c, q in zip(classes, quota, strict=True)]
  drawn = np.sort(np.concatenate([*drawn, np.zeros(0, np.int64)]))
  return np.setdiff1d(np.arange(len(labels)), drawn, assume_unique=True), drawn


def max_drawable(labels: np.ndarray) -> int:
  """The most examples that can be drawn while each class keeps one."""
  return len(labels) - len(np.unique(labels))
