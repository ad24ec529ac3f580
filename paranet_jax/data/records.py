"""Images that stay encoded in their files, read in any order and from any process."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from paranet_jax.host.errors import UserError


class Records(Protocol):
  """The encoded images of a split, with their labels. Pickled for the processes that read them."""

  def __len__(self) -> int:
    """Records, corrupt ones included."""

  def read(self, numbers: Sequence[int]) -> tuple[list[np.ndarray | None], np.ndarray]:
    """Images uint8 [S, S, C], None for a corrupt one that is to be skipped, and labels int32 [n].

    Raises:
      UserError: a record is damaged and not to be skipped.
    """


@dataclass(frozen=True)
class StoredImages:
  """Indexed like an array uint8 [N, H, W, C], by a number, a slice or numbers, and decoded anew every time.

  Attributes:
    records: where they are.
    numbers: int64 [N], which of the records.
    image_shape: (H, W, C).
  """

  records: Records
  numbers: np.ndarray
  image_shape: tuple[int, int, int]

  def __len__(self) -> int:
    return len(self.numbers)

  @property
  def shape(self) -> tuple[int, ...]:
    """(N, H, W, C)."""
    return (len(self), *self.image_shape)

  def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
    chosen = np.arange(len(self))[index]
    parts = np.array_split(np.atleast_1d(chosen), min(max(chosen.size, 1), os.cpu_count() or 1))
    with ThreadPoolExecutor(len(parts)) as pool:
      images = np.concatenate(list(pool.map(self.read, parts)))
    return images if np.ndim(chosen) else images[0]

  def subset(self, indices: np.ndarray) -> 'StoredImages':
    """These of the images, none of them read."""
    return StoredImages(self.records, self.numbers[indices], self.image_shape)

  def read(self, indices: np.ndarray) -> np.ndarray:
    """uint8 [n, H, W, C] in one thread.

    Raises:
      UserError: an image is damaged, or became so since it was first read.
    """
    images, _ = self.records.read(self.numbers[indices].tolist())
    damaged = sum(image is None for image in images)
    if damaged:
      raise UserError(
        f'expected the images that could be read when the run began, found {damaged} of {len(images)} corrupt since: '
        f'start again'
      )
    return np.stack(images) if images else np.zeros((0, *self.image_shape), np.uint8)
