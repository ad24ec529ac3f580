"""scikit-learn's handwritten digits: 1,797 gray 8x8 images that come with the library, so no network is needed.

Source: the test part of UCI's Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998).
"""

import gzip
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt8
from ml_collections import ConfigDict
from PIL import Image

from paranet_jax.data.dataset import Labels, Source, stratified_indices
from paranet_jax.data.identity import Identities, identities
from paranet_jax.data.scaling import scaling_of
from paranet_jax.portable.run import Scaling, fit_image

_TEST_COUNT = 360
_TEST_SEED = 1797


def digits_source(data_config: ConfigDict, image_side: int, channels: int) -> Source:
  """1,437 training and 360 test digits, upsampled to image_side, gray repeated over the channels."""
  table = _table()
  pixels = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # Values are 0..16.
  labels = table[:, -1]
  train, test = stratified_indices(labels, _TEST_COUNT, _TEST_SEED)
  indices, scaling = {'train': train, 'test': test}, scaling_of(data_config)
  return Source(
    name='digits',
    version='1.0.0',
    class_names=tuple(str(digit) for digit in range(10)),
    records=lambda split: _Digits(pixels[indices[split]], labels[indices[split]], image_side, channels, scaling),
    by_position=True,
  )


def _table() -> Int32[np.ndarray, '1797 65']:
  """64 pixels and the label of each image, from scikit-learn's file: its import would take 2 s of every start."""
  (package,) = importlib.util.find_spec('sklearn').submodule_search_locations  # pyright: ignore  It is a requirement.
  with gzip.open(Path(package, 'datasets', 'data', 'digits.csv.gz'), 'rt') as lines:
    return np.loadtxt(lines, np.int32, delimiter=',')


@dataclass(frozen=True)
class _Digits:
  pixels: UInt8[np.ndarray, 'N 8 8']
  labels: Int32[np.ndarray, ' N']
  image_side: int
  channels: int
  scaling: Scaling

  def __len__(self) -> int:
    return len(self.labels)

  def read(self, numbers: Sequence[int]) -> tuple[list[UInt8[np.ndarray, 'H W C']], Int32[np.ndarray, ' n']]:
    size = self.image_side, self.channels, self.scaling
    images = [fit_image(Image.fromarray(self.pixels[number]), *size) for number in numbers]
    return images, self.labels[list(numbers)]

  def read_identified(self, numbers: Sequence[int]) -> tuple[list[UInt8[np.ndarray, 'H W C']], Labels, Identities]:
    return *self.read(numbers), identities(self.pixels[number].tobytes() for number in numbers)
