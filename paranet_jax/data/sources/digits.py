"""scikit-learn's handwritten digits: 1,797 grey 8x8 images bundled with the library, so no network is needed.

Source: the test part of UCI's Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from paranet_jax.data.dataset import Source
from paranet_jax.data.decode import fit_image
from paranet_jax.data.splits import stratified_indices

_TEST_COUNT = 360
_TEST_SEED = 1797


def digits_source(image_side: int, channels: int) -> Source:
  """1,437 training and 360 test digits, upsampled (bilinear) to image_side, grey repeated over the channels."""
  from sklearn.datasets import load_digits  # Imported here: it takes a second, and only this data set needs it.

  digits = load_digits()
  pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # Values are 0..16.
  labels = digits.target.astype(np.int32)
  indices = dict(zip(('train', 'test'), stratified_indices(labels, _TEST_COUNT, _TEST_SEED), strict=True))

  def read(split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    images, split_labels = records(split).read(range(len(indices[split])))
    yield np.stack(images), split_labels

  def records(split: str) -> '_Digits':
    chosen = indices[split]
    return _Digits(pixels[chosen], labels[chosen], image_side, channels)

  return Source(
    name='digits',
    version='1.0.0',
    class_names=tuple(str(digit) for digit in range(10)),
    counts={split: len(chosen) for split, chosen in indices.items()},
    read=read,
    records=records,
    fingerprint=None,
  )


@dataclass(frozen=True)
class _Digits:
  pixels: np.ndarray
  labels: np.ndarray
  image_side: int
  channels: int

  def __len__(self) -> int:
    return len(self.labels)

  def read(self, numbers: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
    images = [fit_image(Image.fromarray(self.pixels[number]), self.image_side, self.channels) for number in numbers]
    return images, self.labels[list(numbers)]
