"""What a data set is before decoding (`Source`, `Records`) and after (`Dataset`, `Split`), and how splits are drawn."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt8, UInt64

from paranet_jax.host.errors import UserError

Images = UInt8[np.ndarray, 'N H W C']
Labels = Int32[np.ndarray, ' N']
"""Indices into the data set's class names."""


class Records(Protocol):
  """The encoded images and the labels of a split. Pickled for the worker processes that read them.

  A method `read_identified(numbers)` may return a third array, uint64 [n]: the identity of each image, corrupt or not,
  by its encoded content (see `identity.identities`). Without it, the decoded pixels identify an image.
  """

  def __len__(self) -> int:
    """The number of records, including corrupt ones."""
    ...

  def read(self, numbers: Sequence[int]) -> tuple[Sequence[UInt8[np.ndarray, 'H W C'] | None], Labels]:
    """Returns images, None for a corrupt record that is skipped, and labels.

    Raises:
      UserError: a record is damaged and must not be skipped.
    """
    ...


@dataclass(frozen=True)
class Source:
  """A data set that was found and checked, and can be decoded.

  Attributes:
    records: maps 'train' or 'test' to its images, to be read in any order.
    fingerprint: changes with the files; None where decoding is too cheap to be worth a cache.
    test_count: how many images of 'train' are drawn to be the test split; None: there is a 'test'.
    test_share: the share of the images that this is.
    by_position: the images never change, and held-out ones are drawn by position, as version 0.1.0 did.
    left_out: files in its folder that are no images of a class.
  """

  name: str
  version: str
  class_names: tuple[str, ...]
  records: Callable[[str], Records]
  fingerprint: str | None = None
  test_count: int | None = None
  test_share: float = 0.0
  by_position: bool = False
  left_out: int = 0

  @property
  def splits(self) -> tuple[str, ...]:
    """The splits that have records."""
    return ('train', 'test') if self.test_count is None else ('train',)


@dataclass(frozen=True)
class StoredImages:
  """Images that stay in their files: indexed like an array [N, H, W, C], and decoded each time.

  Attributes:
    records: where the images are.
    numbers: which of the records.
    image_shape: (H, W, C).
  """

  records: Records
  numbers: Int64[np.ndarray, ' N']
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

  def subset(self, indices: Int[np.ndarray, ' n']) -> 'StoredImages':
    """Some of the images, without reading them."""
    return StoredImages(self.records, self.numbers[indices], self.image_shape)

  def read(self, indices: Int[np.ndarray, ' n']) -> UInt8[np.ndarray, 'n H W C']:
    """Decodes images in one thread.

    Raises:
      UserError: an image is damaged, or has been damaged since it was first read.
    """
    images, _ = self.records.read(self.numbers[indices].tolist())
    readable = [image for image in images if image is not None]
    if len(readable) < len(images):
      raise UserError(
        f'expected images that could be read when the run started, found {len(images) - len(readable)} of '
        f'{len(images)} corrupt since then: start again'
      )
    return np.stack(readable) if readable else np.zeros((0, *self.image_shape), np.uint8)


@dataclass(frozen=True)
class Split:
  """Images, in memory, memory-mapped read-only or stored in their files; their labels; and, if known, identities."""

  images: Images | StoredImages
  labels: Labels
  identities: UInt64[np.ndarray, ' N'] | None = None

  def __len__(self) -> int:
    return len(self.labels)

  @property
  def streamed(self) -> bool:
    """Whether the images stay in their files."""
    return isinstance(self.images, StoredImages)

  def take(self, indices: Int[np.ndarray, ' n']) -> 'Split':
    """Some of the examples; stored images are not read."""
    images = self.images.subset(indices) if isinstance(self.images, StoredImages) else self.images[indices]
    return Split(images, self.labels[indices], None if self.identities is None else self.identities[indices])


@dataclass(frozen=True)
class Dataset:
  """A decoded image classification data set.

  Attributes:
    mean: one value per channel, for pixel values in 0..1, over the whole training split (including `held_out`).
    std: the standard deviations over the same.
    crop_padding: pixels of padding on each side before the random crop; 0: no crop.
    flip: whether training images are mirrored at random.
    skipped: corrupt files left out of both splits.
    limits: by split, the `identity.Limits` that drew it.
    labeled: whether labels mean anything; otherwise all are 0.
    lost: classes that have no held-out or no test images but those that the run was trained on.
  """

  name: str
  version: str
  train: Split
  held_out: Split | None
  test: Split
  class_names: tuple[str, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  crop_padding: int
  flip: bool
  skipped: int = 0
  limits: dict[str, Any] = field(default_factory=dict)
  lost: tuple[str, ...] = ()
  labeled: bool = True


def stratified_indices(
  labels: Int[np.ndarray, ' N'], count: int, seed: int
) -> tuple[Int64[np.ndarray, ' kept'], Int64[np.ndarray, ' drawn']]:
  """Draws exactly `count` examples, from each class in proportion to its size (largest remainder).

  Every class keeps at least one example.

  Args:
    labels: class of each example.
    count: how many to draw, from 0 to `max_drawable(labels)`.
    seed: independent of a run's seed, so that all runs share one split.

  Returns:
    The sorted indices that are kept and those that are drawn.

  Raises:
    ValueError: count is out of range. Callers check it first and name the flag.
  """
  classes, quota = quotas(labels, count)
  # RandomState, not default_rng: only its stream is guaranteed to be the same in every NumPy version.
  random = np.random.RandomState(seed)
  drawn = [random.permutation(np.flatnonzero(labels == c))[:q] for c, q in zip(classes, quota, strict=True)]
  drawn = np.sort(np.concatenate([*drawn, np.zeros(0, np.int64)]))
  return np.setdiff1d(np.arange(len(labels)), drawn, assume_unique=True), drawn


def quotas(labels: Int[np.ndarray, ' N'], count: int) -> tuple[Int[np.ndarray, ' C'], Int64[np.ndarray, ' C']]:
  """The classes, and how many of `count` examples are drawn from each: see `stratified_indices`."""
  classes, sizes = np.unique(labels, return_counts=True)
  if not 0 <= count <= max_drawable(labels):
    raise ValueError(f'cannot draw {count} of {len(labels)} examples in {len(classes)} classes')
  share = count * sizes / max(len(labels), 1)
  quota = np.floor(share).astype(np.int64)
  while quota.sum() < count:
    quota[np.argmax(np.where(quota < sizes - 1, share - quota, -np.inf))] += 1
  return classes, quota


def max_drawable(labels: Int[np.ndarray, ' N']) -> int:
  """The largest number of examples that can be drawn if each class keeps one."""
  return len(labels) - len(np.unique(labels))
