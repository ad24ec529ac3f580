"""What a data set is before decoding (`Source`) and after (`Split`, `Dataset`)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from paranet_jax.data.records import Records, StoredImages


@dataclass(frozen=True)
class Split:
  """Images and their labels.

  images: uint8 [N, H, W, C], possibly a read-only memory map, or read anew from their files whenever they are indexed.
  labels: int32 [N], indices into the data set's class names.
  """

  images: np.ndarray | StoredImages
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  @property
  def streamed(self) -> bool:
    """Whether the images stay in their files."""
    return isinstance(self.images, StoredImages)

  def take(self, indices: np.ndarray) -> 'Split':
    """These of the images; stored ones are not read."""
    images = self.images.subset(indices) if self.streamed else self.images[indices]
    return Split(images, self.labels[indices])


@dataclass(frozen=True)
class Dataset:
  """A decoded image classification data set.

  mean, std: one value a channel, in units of 0..1 pixel values, of the whole training split (`held_out` included).
  crop_padding: pixels of padding on each side before the random crop, 0 for no crop. flip: mirror at random.
  skipped: corrupt files left out of all splits together.
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


@dataclass(frozen=True)
class Source:
  """A data set that was found and checked, and can be decoded.

  counts: images in 'train' and in 'test', corrupt ones included.
  read: maps 'train' or 'test' to chunks of images (uint8 [n, H, W, C]) and labels (int32 [n]).
  records: the same images for 'train' or 'test' in any order, one by one.
  fingerprint: changes with the files; None where decoding is too cheap to be worth a cache.
  """

  name: str
  version: str
  class_names: tuple[str, ...]
  counts: dict[str, int]
  read: Callable[[str], Iterator[tuple[np.ndarray, np.ndarray]]]
  records: Callable[[str], Records]
  fingerprint: str | None
