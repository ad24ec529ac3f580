"""A data set of another package: images in memory whose class is their brightness, found by an entry point."""

from dataclasses import dataclass

import numpy as np
import plugin

from paranet_jax.data.dataset import Source
from paranet_jax.data.known import DATASETS, KnownDataset

COUNTS = {'train': 60, 'test': 20}
CLASSES = ('dark', 'gray', 'bright')


@dataclass(frozen=True)
class _Records:
  count: int
  shape: tuple[int, int, int]

  def __len__(self):
    return self.count

  def read(self, numbers):
    labels = np.array(numbers, np.int32) % len(CLASSES)
    values = (100 * labels + numbers).astype(np.uint8)
    return [np.full(self.shape, value) for value in values], labels


def open_shapes(data_config, image_side, channels):
  shape = (image_side, image_side, channels)
  return Source('shapes', '2.0', CLASSES, lambda split: _Records(COUNTS[split], shape))


SHAPES = KnownDataset(
  open_shapes,
  num_classes=len(CLASSES),
  counts=tuple(COUNTS.values()),
  mirrored=False,
  padding_share=4,
  in_data_dir=True,
  license='public domain',
)


def install(folder, monkeypatch):
  """Makes `shapes` look like the data set of an installed package."""
  plugin.install(folder, monkeypatch, DATASETS, 'shapes', ['shapes = shapes:SHAPES'])
