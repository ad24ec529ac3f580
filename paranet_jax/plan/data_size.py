"""A stand-in for the data set that a configuration names, so that planning needs no data."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, UInt8
from ml_collections import ConfigDict

from paranet_jax.data.dataset import Dataset, Split, StoredImages
from paranet_jax.data.known import known_dataset
from paranet_jax.data.load import augmentation, load_dataset, streams


def dataset_like(config: ConfigDict) -> Dataset:
  """Noise of the size of the data set, streamed if that would be; a data set of unknown size is read.

  Raises:
    UserError: a data set of unknown size cannot be read.
  """
  data, model = config.data, config.model
  known, shape = known_dataset(data.name), (model.image_side, model.image_side, model.channels)
  if known.counts is None or known.num_classes is None:
    return load_dataset(data, image_side=model.image_side, channels=model.channels, num_classes=model.num_classes)
  train, test = known.counts
  streamed = streams(data, train + test, shape)
  crop_padding, flip = augmentation(data, model.image_side)
  held_out = min(data.held_out, train)
  return Dataset(
    name=data.name,
    version='',
    train=_noise(max(train - held_out, 1), shape, known.num_classes, streamed),
    held_out=_noise(held_out, shape, known.num_classes, streamed) if held_out else None,
    test=_noise(test, shape, known.num_classes, streamed),
    class_names=tuple(map(str, range(known.num_classes))),
    mean=(0.5,) * model.channels,
    std=(0.25,) * model.channels,
    crop_padding=crop_padding,
    flip=flip,
  )


@dataclass(frozen=True)
class _Copies:
  """Records that all hold the same image."""

  image: UInt8[np.ndarray, 'H W C']
  number: int

  def __len__(self) -> int:
    return self.number

  def read(self, numbers: Sequence[int]) -> tuple[list[UInt8[np.ndarray, 'H W C']], Int32[np.ndarray, ' n']]:
    return [self.image] * len(numbers), np.zeros(len(numbers), np.int32)


def _noise(number: int, shape: tuple[int, int, int], classes: int, streamed: bool) -> Split:
  """`number` examples that share one image of noise and its memory."""
  rng = np.random.default_rng(0)
  image, labels = rng.integers(0, 256, shape, np.uint8), rng.integers(0, classes, number, np.int32)
  if streamed:
    return Split(StoredImages(_Copies(image, number), np.arange(number), shape), labels)
  return Split(np.broadcast_to(image, (number, *shape)), labels)
