"""A data set as large as the one that a configuration names, so that planning needs no data."""

import re
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from paranet_jax.data.dataset import Dataset, Split
from paranet_jax.data.load import crop_padding_of, flips, known_num_classes, load_dataset

_SIZES = {'cifar100': (50_000, 10_000), 'cifar10': (50_000, 10_000), 'digits': (1437, 360)}
"""Images to train and to test on."""


def dataset_like(config: ConfigDict) -> Dataset:
  """Noise in the place of a known data set; another one is read.

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
  return Dataset(
    name=name,
    version='',
    train=_noise(max(train - data.held_out, 1), shape, classes),
    held_out=None,
    test=_noise(test, shape, classes),
    class_names=tuple(map(str, range(classes))),
    mean=(0.5,) * model.channels,
    std=(0.25,) * model.channels,
    crop_padding=crop_padding_of(data, model.image_side),
    flip=flips(data),
  )


def _noise(number: int, shape: Sequence[int], classes: int) -> Split:
  """One image of noise, as often as asked for, which takes the memory of one."""
  rng = np.random.default_rng(0)
  images = np.broadcast_to(rng.integers(0, 256, shape, np.uint8), (number, *shape))
  return Split(images, rng.integers(0, classes, number, np.int32))
