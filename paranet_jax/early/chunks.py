"""Batches of a few fixed sizes, so that nothing recompiles: splitting a wave, and packing the rows that remain."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from paranet_jax.portable.run import GONE, Batch, Carried, Packing


class Sizes(NamedTuple):
  """The batch sizes that stages are compiled for.

  Attributes:
    sizes: increasing.
    split: rows may be spread over several batches; otherwise one batch, padded to the next size, holds them all.
    wave: rows that go through the stages together; bounds the memory.
    on_host: NumPy packs rows, in memory that the host shares with the device; otherwise the device does, which needs a
      wave that is one batch.
  """

  sizes: tuple[int, ...]
  split: bool
  wave: int
  on_host: bool


# PN3-ddd on 2 cores of an AMD EPYC, ms per image in all three stages, one run: 4.2 at batch 1, 2.2 at 4, 1.6 at 16 and
# 1.4 at 64.
CPU = Sizes((1, 4, 16, 64), split=True, wave=256, on_host=True)
# Not measured: an accelerator is assumed to gain from large batches, and to lose by calls and by copies to the host.
ACCELERATOR = Sizes((1, 16, 64, 128, 256), split=False, wave=256, on_host=False)

_CALL_ROWS = 2
"""What a call costs in addition to its rows, in rows (from the figures above)."""


def default_sizes() -> Sizes:
  """The sizes for the device that jax uses."""
  return CPU if jax.default_backend() == 'cpu' else ACCELERATOR


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


class FixedSizes(Packing):
  """Packs rows into batches of the fixed sizes.

  Args:
    take: (tree, int rows [size]) -> the tree of these rows, on the device.
  """

  def __init__(self, sizes: Sizes, take: Callable[[Any, np.ndarray], Any]):
    self.wave, self.sizes = sizes.wave, sizes.sizes
    self._sizes, self._take = sizes, take

  def split(self, carried: Carried) -> list[Batch]:
    """The batches of a wave of one image or more, padded with zeros."""
    wave = Batch(np.arange(len(carried['images'])), carried)
    parts = cover(len(wave.rows), self._sizes)
    if parts == (len(wave.rows),):  # Copying the images would take as long as reading the answers.
      return [wave]
    return self._regroup([wave], wave.rows, parts, self._on_host)

  def pack(self, batches: Sequence[Batch]) -> list[Batch]:
    """The batches without the rows that are GONE, unless that would not save any cost."""
    batches = [batch for batch in batches if (batch.rows != GONE).any()]
    places = np.concatenate([batch.rows[batch.rows != GONE] for batch in batches]) if batches else np.zeros(0, int)
    parts = cover(len(places), self._sizes) if len(places) else ()
    if cost(parts) >= cost([len(batch.rows) for batch in batches]):
      return batches
    return self._regroup(batches, places, parts, self._on_host if self._sizes.on_host else self._on_device)

  def warm_up(self, carried: Carried) -> None:
    """Compiles the packing into every smaller size."""
    for size in () if self._sizes.on_host else self.sizes:
      if size < len(carried['images']):
        self._take(_of_network(carried), np.zeros(size, np.int32))

  def _regroup(
    self, batches: Sequence[Batch], places: np.ndarray, parts: Sequence[int], take: Callable[..., Batch]
  ) -> list[Batch]:
    starts = np.cumsum((0, *parts[:-1])).tolist()
    return [take(batches, start, places[start : start + size], size) for start, size in zip(starts, parts, strict=True)]

  def _on_device(self, batches: Sequence[Batch], start: int, places: np.ndarray, size: int) -> Batch:
    (batch,) = batches
    here = np.zeros(size, np.int32)
    here[: len(places)] = np.flatnonzero(batch.rows != GONE)
    own = {name: values[here] for name, values in batch.carried.items() if name.startswith('_')}
    return Batch(_padded(places, size), self._take(_of_network(batch.carried), here) | own)

  def _on_host(self, batches: Sequence[Batch], start: int, places: np.ndarray, size: int) -> Batch:
    """The rows from the start-th remaining one on, padded with zeros."""
    sources, chosen, stop = [], [], start + len(places)
    for batch in batches:
      here = np.flatnonzero(batch.rows != GONE)
      mine = here[max(start, 0) : max(stop, 0)]
      start, stop = start - len(here), stop - len(here)
      if len(mine):
        sources.append(batch.carried)
        chosen.append(mine)

    def fill(*leaves):
      out = np.empty((size, *leaves[0].shape[1:]), leaves[0].dtype)
      first = 0
      for leaf, rows in zip(leaves, chosen, strict=True):
        np.take(np.asarray(leaf), rows, axis=0, out=out[first : first + len(rows)], mode='clip')
        first += len(rows)
      out[first:] = 0
      return out

    return Batch(_padded(places, size), jax.tree.map(fill, *sources))


def _of_network(carried: Carried) -> Carried:
  return {name: values for name, values in carried.items() if not name.startswith('_')}


def _padded(places: np.ndarray, size: int) -> np.ndarray:
  rows = np.full(size, GONE)
  rows[: len(places)] = places
  return rows
