"""The best thresholds of two exits that follow each other, all others fixed, by sorting and cumulative sums."""

from typing import NamedTuple

import numpy as np

from paranet_jax.early.thresholds import threshold_between


class Leaving(NamedTuple):
  """What leaving at an exit means for A samples."""

  confidence: np.ndarray  # [A]
  correct: np.ndarray  # bool [A]
  cost: float  # of one sample


class Best(NamedTuple):
  """The most accurate pair of thresholds whose total cost lies in a range."""

  value: float  # how many samples are right, less price times total cost
  first: float  # threshold
  second: float  # threshold


def tie_ends(ranked: np.ndarray) -> np.ndarray:
  """How many of the samples [A], ranked highest first, can leave without a tie being split: int, 0 and A included."""
  return np.flatnonzero(np.diff(ranked, prepend=np.inf, append=-np.inf))


def sweep_pair(
  first: Leaving,
  second: Leaving,
  later_correct: np.ndarray,
  later_cost: np.ndarray,
  ranges: np.ndarray,
  leave_first: np.ndarray,
  fewest: int,
  price: float,
) -> list[Best | None]:
  """Tries each number of samples that leave at the first exit with all that may leave at the second.

  Args:
    first: the earlier exit, for the A samples that reach it.
    second: the later exit, for the same.
    later_correct: [A], whether a sample that leaves at neither is right where it leaves.
    later_cost: [A], its cost there, at least the second exit's.
    ranges: [R, 2], lowest and highest total cost of the A samples.
    leave_first: int, how many may leave at the first exit, each one of its `tie_ends`.
    fewest: how many leave at the second at least.
    price: what a unit of cost is worth in right samples; below 1 / total cost it only decides between equals.

  Returns:
    The best of each range, None where no pair lies in it.
  """
  by_first, by_second = np.argsort(-first.confidence), np.argsort(-second.confidence)
  position = np.empty_like(by_first)
  position[by_first] = np.arange(len(by_first))
  position = position[by_second]
  ranked_first, ranked_second = first.confidence[by_first], second.confidence[by_second]
  start_correct = _cumulative((first.correct * 1.0 - later_correct)[by_first], later_correct.sum())
  start_cost = _cumulative((first.cost - later_cost)[by_first], later_cost.sum())
  gain, saving = (second.correct * 1.0 - later_correct)[by_second], (second.cost - later_cost)[by_second]
  best: list[Best | None] = [None] * len(ranges)
  most = np.full(len(ranges), -np.inf)
  for leaving in leave_first:
    alive = np.flatnonzero(position >= leaving)
    ranked = ranked_second[alive]
    ends = tie_ends(ranked)
    ends = ends[ends >= fewest]
    falling = -_cumulative(saving[alive], start_cost[leaving])[ends]
    value = _cumulative(gain[alive], start_correct[leaving])[ends] + price * falling
    begin, end = np.searchsorted(falling, -ranges[:, 1], 'left'), np.searchsorted(falling, -ranges[:, 0], 'right')
    within = np.stack([begin, end], axis=1).ravel()
    found = np.maximum.reduceat(np.append(value, -np.inf), within)[::2]
    for r in np.flatnonzero((begin < end) & (found > most)):
      most[r] = found[r]
      leaving_second = ends[begin[r] + np.argmax(value[begin[r] : end[r]])]
      thresholds = threshold_between(ranked_first, leaving), threshold_between(ranked, leaving_second)
      best[r] = Best(float(most[r]), *thresholds)
  return best


def _cumulative(steps: np.ndarray, start: float) -> np.ndarray:
  """start, start + steps[0], ...: [len(steps) + 1]."""
  return np.cumsum(np.concatenate([[start], steps]))
