"""A data set as large as the one that a configuration names, so that planning needs no data."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from paranet_jax.data.dataset import Dataset, Split
from paranet_jax.data.load import STREAM_ABOVE, crop_padding_of, flips, known_num_classes, load_dataset
from paranet_jax.data.records import StoredImages

_SIZES = {
  'cifar100': (50_000, 10_000),
  'cifar10': (50_000, 10_000),
  'digits': (1437, 360),
  'imagenet2012': (1_281_167, 50_000),
}
"""Images to train and to test on."""


def dataset_like(config: ConfigDict) -> Dataset:
  """Noise in the place of a known data set, streamed where that one would be; another one is read.

  Raises:
    UserError: a data set that is not known cannot be read.
  """
  data, model = config.data, config.model
  name = re.split('[/:]', data.name)[0]
  if name not in _SIZES:
    return load_dataset(data, image_side=model.image_side, channels=model.channels, num_classes=model.num_classes)
  train, test = _SIZES[name]
  shape = (model.image_side, model.image_side, model.channels)
  classes = known_num_classes(name)
  streamed = data.streaming if data.streaming is not None else (train + test) * math.prod(shape) > STREAM_ABOVE
  return Dataset(
    name=name,
    version='',
    train=_noise(max(train - data.held_out, 1), shape, classes, streamed),
    held_out=None,
    test=_noise(test, shape, classes, streamed),
    class_names=tuple(map(str, range(classes))),
    mean=(0.5,) * model.channels,
    std=(0.25,) * model.channels,
    crop_padding=crop_padding_of(data, model.image_side),
    flip=flips(data),
  )


@dataclass(frozen=True)
class _Copies:
  """Records that are all of the same image."""

  image: np.ndarray
  number: int

  def __len__(self) -> int:
    return self.number

  def read(self, numbers: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
    return [self.image] * len(numbers), np.zeros(len(numbers), np.int32)


def _noise(number: int, shape: tuple[int, int, int], classes: int, streamed: bool) -> Split:
  """One image of noise, as often as asked for, which takes the memory of one."""
  rng = np.random.default_rng(0)
  image, labels = rng.integers(0, 256, shape, np.uint8), rng.integers(0, classes, number, np.int32)
  if streamed:
    return Split(StoredImages(_Copies(image, number), np.arange(number), shape), labels)
  return Split(np.broadcast_to(image, (number, *shape)), labels)
