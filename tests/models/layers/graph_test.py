"""Tests of lazy evaluation on a small graph: 1 <- 2 <- 4 and 1 <- 3 <- 4 <- 5, and 6 by itself."""

import pytest

from paranet_jax.models.layers.graph import kept, needed

READS = {(1,): [], (2,): [(1,)], (3,): [(1,)], (4,): [(2,), (3,)], (5,): [(4,)], (6,): []}


def nodes(*numbers):
  return [(number,) for number in numbers]


@pytest.mark.parametrize(
  'targets, given, expected',
  [
    ([], [], []),
    ([1], [], [1]),
    ([3], [], [1, 3]),
    ([5], [], [1, 2, 3, 4, 5]),
    ([5], [2], [1, 3, 4, 5]),
    ([5], [2, 3], [4, 5]),
    ([5], [1, 4], [5]),
    ([5], [5], []),
    ([6, 2], [], [1, 2, 6]),
  ],
)
def test_needed(targets, given, expected):
  assert needed(nodes(*targets), READS.get, nodes(*given)) == nodes(*expected)


@pytest.mark.parametrize(
  'targets, given, expected',
  [
    ([], [1, 2], []),
    ([5], [1, 2], [1, 2]),
    ([5], [1, 2, 3], [2, 3]),
    ([5], [1, 2, 3, 4], [4]),
    ([5], [1, 5, 6], [5]),
    ([2, 6], [1, 6], [1, 6]),
    ([6], [1, 2], []),
  ],
)
def test_kept(targets, given, expected):
  assert kept(nodes(*targets), READS.get, nodes(*given)) == nodes(*expected)
