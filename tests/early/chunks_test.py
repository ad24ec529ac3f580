"""Batches of fixed sizes: how many rows are covered, split and packed."""

import itertools

import numpy as np
import pytest

from paranet_jax.early import chunks
from paranet_jax.early.chunks import NOBODY, Chunk, Sizes, cost, cover

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


def _rows(chunk):
  return {int(place): chunk.images[row].item() for row, place in enumerate(chunk.rows) if place != NOBODY}


@pytest.mark.parametrize('sizes', [SPLIT, WHOLE])
@pytest.mark.parametrize('count', [1, 3, 15, 16])
def test_split(sizes, count):
  images = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1)
  parts = chunks.split(images, sizes)
  assert [len(part.images) for part in parts] == list(cover(count, sizes))
  assert {key: value for part in parts for key, value in _rows(part).items()} == {i: i for i in range(count)}
  assert all(part.carry == {} for part in parts)


def _chunk(places, first):
  """A chunk whose images and carry tell the place of each row."""
  values = np.arange(first, first + len(places), dtype=np.float32)
  return Chunk(np.array(places), values.reshape(-1, 1, 1, 1), {'block': values.reshape(-1, 1) * 10})


@pytest.mark.parametrize('on_host', [True, False])
def test_pack(on_host):
  sizes = Sizes((1, 4, 8), split=on_host, wave=8, on_host=on_host)
  taken = []

  def take(tree, rows):
    taken.append(len(rows))
    return tuple(part[rows] if isinstance(part, np.ndarray) else {'block': part['block'][rows]} for part in tree)

  (packed,) = chunks.pack([_chunk([NOBODY, 1, NOBODY, 3, NOBODY, NOBODY, 6, NOBODY], 0)], sizes, take)
  assert packed.rows.tolist() == [1, 3, 6, NOBODY]
  assert packed.images.ravel()[:3].tolist() == [1, 3, 6]
  assert packed.carry['block'].ravel()[:3].tolist() == [10, 30, 60]
  assert taken == ([] if on_host else [4])


def test_pack_joins_chunks():
  first = _chunk([0, NOBODY, NOBODY, 3], 0)
  second = _chunk([NOBODY, 5, NOBODY, NOBODY], 4)
  (packed,) = chunks.pack([first, second], SPLIT, None)
  assert packed.rows.tolist() == [0, 3, 5, NOBODY]
  assert packed.images.ravel().tolist() == [0, 3, 5, 0]
  assert packed.carry['block'].ravel().tolist() == [0, 30, 50, 0]


def test_pack_moves_nothing_in_vain():
  nearly_full = _chunk([0, 1, NOBODY, 3], 0)
  gone = _chunk([NOBODY] * 4, 4)
  (kept,) = chunks.pack([gone, nearly_full], SPLIT, None)
  assert kept is nearly_full
  assert chunks.pack([gone], SPLIT, None) == []
