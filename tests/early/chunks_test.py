"""Batches of fixed sizes: how rows are covered, split and packed."""

import itertools

import numpy as np
import pytest

from paranet_jax.early.chunks import FixedSizes, Sizes, cost, cover
from paranet_jax.portable.run import GONE, Batch

SPLIT = Sizes((1, 4, 16, 64), split=True, wave=256, on_host=True)
WHOLE = Sizes((1, 4, 16), split=False, wave=16, on_host=False)


@pytest.mark.parametrize(
  ('count', 'sizes', 'parts'),
  [
    (1, SPLIT, (1,)),
    (2, SPLIT, (4,)),  # 4 + 4 rows, where two of one are 2 + 8.
    (6, SPLIT, (4, 4)),  # 8 + 8 rows, where 16 are 16 + 4 and 4, 1, 1 are 6 + 12.
    (13, SPLIT, (16,)),
    (22, SPLIT, (16, 4, 4)),
    (40, SPLIT, (16, 16, 4, 4)),
    (60, SPLIT, (64,)),
    (150, SPLIT, (64, 64, 16, 4, 4)),
    (256, SPLIT, (64,) * 4),
    (100_001, SPLIT, (64,) * 1562 + (16, 16, 1)),
    (33, WHOLE, (16, 16, 1)),
    (2, WHOLE, (4,)),
    (5, WHOLE, (16,)),
    (16, WHOLE, (16,)),
  ],
)
def test_cover(count, sizes, parts):
  assert cover(count, sizes) == parts


def test_cover_costs_the_least():
  # All ways to hold up to 20 rows, written out.
  ways = [parts for length in range(1, 6) for parts in itertools.combinations_with_replacement((16, 4, 1), length)]
  for count in range(1, 17):
    assert cost(cover(count, SPLIT)) == min(cost(parts) for parts in ways if sum(parts) >= count)


def _rows(batch):
  return {int(place): batch.carried['images'][row].item() for row, place in enumerate(batch.rows) if place != GONE}


@pytest.mark.parametrize('sizes', [SPLIT, WHOLE])
@pytest.mark.parametrize('count', [1, 3, 15, 16])
def test_split(sizes, count):
  images = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1)
  parts = FixedSizes(sizes, None).split({'images': images, 'carry': {}, '_streak': np.ones(count)})
  assert [len(part.carried['images']) for part in parts] == list(cover(count, sizes))
  assert {key: value for part in parts for key, value in _rows(part).items()} == {i: i for i in range(count)}
  assert all(part.carried['carry'] == {} and part.carried['_streak'].sum() == len(_rows(part)) for part in parts)


def test_a_wave_of_a_fixed_size_is_not_copied():
  carried = {'images': np.zeros((16, 1, 1, 1), np.uint8), 'carry': {}}
  (part,) = FixedSizes(SPLIT, None).split(carried)
  assert part.carried is carried
  np.testing.assert_array_equal(part.rows, np.arange(16))


def _batch(places, first):
  """A batch whose arrays say which row of the wave each row is."""
  values = np.arange(first, first + len(places), dtype=np.float32)
  carried = {'images': values.reshape(-1, 1, 1, 1), 'carry': {'block': values.reshape(-1, 1) * 10}, '_label': values}
  return Batch(np.array(places), carried)


@pytest.mark.parametrize('on_host', [True, False])
def test_pack(on_host):
  sizes = Sizes((1, 4, 8), split=on_host, wave=8, on_host=on_host)
  taken = []

  def take(tree, rows):
    taken.append((set(tree), len(rows)))
    return {'images': tree['images'][rows], 'carry': {'block': tree['carry']['block'][rows]}}

  (packed,) = FixedSizes(sizes, take).pack([_batch([GONE, 1, GONE, 3, GONE, GONE, 6, GONE], 0)])
  assert packed.rows.tolist() == [1, 3, 6, GONE]
  assert packed.carried['images'].ravel()[:3].tolist() == [1, 3, 6]
  assert packed.carried['carry']['block'].ravel()[:3].tolist() == [10, 30, 60]
  assert packed.carried['_label'][:3].tolist() == [1, 3, 6]
  assert taken == ([] if on_host else [({'images', 'carry'}, 4)])


def test_pack_joins_batches():
  places = [0, GONE, GONE, 3], [GONE, 5, GONE, GONE], [GONE, 9, 10, GONE]
  packed = FixedSizes(Sizes((1, 4), split=True, wave=12, on_host=True), None).pack(
    [_batch(rows, 4 * index) for index, rows in enumerate(places)]
  )
  assert [batch.rows.tolist() for batch in packed] == [[0, 3, 5, 9], [10]]
  assert [batch.carried['images'].ravel().tolist() for batch in packed] == [[0, 3, 5, 9], [10]]
  assert [batch.carried['carry']['block'].ravel().tolist() for batch in packed] == [[0, 30, 50, 90], [100]]
  (padded,) = FixedSizes(SPLIT, None).pack([_batch(rows, 4 * index) for index, rows in enumerate(places[:2])])
  assert padded.rows.tolist() == [0, 3, 5, GONE] and padded.carried['images'].ravel().tolist() == [0, 3, 5, 0]


def test_pack_keeps_batches_that_it_cannot_shrink():
  nearly_full, gone = _batch([0, 1, GONE, 3], 0), _batch([GONE] * 4, 4)
  (kept,) = FixedSizes(SPLIT, None).pack([gone, nearly_full])
  assert kept is nearly_full
  assert FixedSizes(SPLIT, None).pack([gone]) == []
