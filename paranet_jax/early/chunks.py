"""Batches of a few fixed sizes, so that nothing recompiles: splitting, and packing those who are still there."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

NOBODY = -1


class Sizes(NamedTuple):
  """The batch sizes that stages are compiled for.

  Attributes:
    sizes: increasing.
    split: rows may be spread over several batches; else one batch, padded to the next size, holds them all.
    wave: rows that go through the stages together; bounds the memory.
    on_host: rows are packed by NumPy in the memory that the host shares with the device; else on the device, which
      needs a wave that is one batch.
  """

  sizes: tuple[int, ...]
  split: bool
  wave: int
  on_host: bool


# PN3-ddd on 2 cores of an AMD EPYC, ms an image in all three stages, one run: 2.84 at batch 1, 2.07 at 4, 1.40 at 16,
# 1.11 at 64, and 1.62 at 256, where the features no longer fit the cache.
CPU = Sizes((1, 4, 16, 64), split=True, wave=256, on_host=True)
# Not measured: an accelerator is taken to gain from large batches, and to lose by every call and by moving rows to the
# host.
ACCELERATOR = Sizes((1, 16, 64, 128, 256), split=False, wave=256, on_host=False)

_CALL_ROWS = 4
"""What a call costs beside its rows, in rows (from the figures above)."""


def default_sizes() -> Sizes:
  """The sizes for the device that jax uses."""
  return CPU if jax.default_backend() == 'cpu' else ACCELERATOR


class Chunk(NamedTuple):
  """Rows that are computed together.

  rows: int [size], each row's place in the wave; NOBODY where it is padding or has left.
  images: [size, H, W, C]. carry: the model's, of the stage before.
  """

  rows: np.ndarray
  images: Any
  carry: Any


@functools.lru_cache(maxsize=1024)
def cover(count: int, sizes: Sizes) -> tuple[int, ...]:
  """Fixed sizes, largest first, that together hold `count` rows at the least cost."""
  largest = sizes.sizes[-1]
  full = (count - 1) // largest
  if full:
    return (largest,) * full + cover(count - full * largest, sizes)
  fits = next(size for size in sizes.sizes if size >= count)
  smaller = [size for size in sizes.sizes if size < count] if sizes.split else []
  choices = [(fits,), *((size, *cover(count - size, sizes)) for size in smaller[-1:])]
  return min(choices, key=cost)


def cost(parts: Sequence[int]) -> int:
  """What computing these sizes costs, in rows."""
  return sum(parts) + _CALL_ROWS * len(parts)


def split(images: np.ndarray, sizes: Sizes) -> list[Chunk]:
  """A wave of images [n, H, W, C], n >= 1, as chunks with an empty carry."""
  chunks, start = [], 0
  for size in cover(len(images), sizes):
    part = images[start : start + size]
    rows = np.full(size, NOBODY)
    rows[: len(part)] = np.arange(start, start + len(part))
    padding = np.zeros((size - len(part), *images.shape[1:]), images.dtype)
    chunks.append(Chunk(rows, np.concatenate([part, padding]) if len(padding) else part, {}))
    start += size
  return chunks


def pack(chunks: Sequence[Chunk], sizes: Sizes, take: Any) -> list[Chunk]:
  """Drops the rows that have left, unless as much would be computed as before.

  Args:
    take: (tree, int rows [size]) -> tree of those rows, on the device.
  """
  chunks = [chunk for chunk in chunks if (chunk.rows != NOBODY).any()]
  places = np.concatenate([chunk.rows[chunk.rows != NOBODY] for chunk in chunks]) if chunks else np.zeros(0, int)
  parts = cover(len(places), sizes) if len(places) else ()
  if cost(parts) >= cost([len(chunk.rows) for chunk in chunks]):
    return chunks
  packed, start = [], 0
  for size in parts:
    rows = np.full(size, NOBODY)
    part = places[start : start + size]
    rows[: len(part)] = part
    if sizes.on_host:
      images, carry = _take_on_host(chunks, start, len(part), size)
    else:
      (chunk,) = chunks
      chosen = np.zeros(size, np.int32)
      chosen[: len(part)] = np.flatnonzero(chunk.rows != NOBODY)
      images, carry = take((chunk.images, chunk.carry), chosen)
    packed.append(Chunk(rows, images, carry))
    start += size
  return packed


def _take_on_host(chunks: Sequence[Chunk], start: int, count: int, size: int) -> Any:
  """The images and the carry of `count` rows that are still there, from the start-th on, padded to `size`."""
  sources, chosen = [], []
  for chunk in chunks:
    here = np.flatnonzero(chunk.rows != NOBODY)
    mine = here[max(start, 0) : max(start + count, 0)]
    start -= len(here)
    if len(mine):
      sources.append((chunk.images, chunk.carry))
      chosen.append(mine)

  def fill(*leaves):
    out = np.empty((size, *leaves[0].shape[1:]), leaves[0].dtype)
    first = 0
    for leaf, rows in zip(leaves, chosen, strict=True):
      np.take(np.asarray(leaf), rows, axis=0, out=out[first : first + len(rows)], mode='clip')
      first += len(rows)
    out[first:] = 0
    return out

  return jax.tree.map(fill, *sources)
