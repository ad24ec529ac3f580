import numpy as np
import pytest
from ml_collections import ConfigDict
from odd_images import encoded
from sklearn.datasets import load_digits

from paranet_jax.data.sources.digits import digits_source
from paranet_jax.portable.run import Scaling, decode_image


def read(side, channels, **data):
  source = digits_source(ConfigDict(data), side, channels)
  splits = [source.records(split) for split in ('train', 'test')]
  return [(np.stack(images), labels) for images, labels in (records.read(range(len(records))) for records in splits)]


def test_fixed_stratified_split():
  (_, train_labels), (test_images, test_labels) = read(8, 1)
  assert (len(train_labels), len(test_labels)) == (1437, 360)
  sizes = np.bincount(load_digits().target)
  np.testing.assert_array_equal(np.bincount(train_labels) + np.bincount(test_labels), sizes)
  assert np.abs(np.bincount(test_labels) - sizes * 360 / 1797).max() < 1
  assert test_labels[:12].tolist() == [4, 6, 0, 6, 9, 5, 6, 9, 3, 1, 0, 6]
  assert test_images[:3].sum(axis=(1, 2, 3)).tolist() == [4114, 4877, 5132]


def test_every_digit_once_with_its_own_label():
  found = [(images[..., 0], labels) for images, labels in read(8, 1)]
  images, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
  digits = load_digits()
  pixels = np.rint(digits.images / 16 * 255).astype(np.uint8)

  def pairs(images, labels):
    return {(int(label), image.tobytes()) for image, label in zip(images, labels, strict=True)}

  assert pairs(images, labels) == pairs(pixels, digits.target)
  assert images.dtype == np.uint8 and labels.dtype == np.int32 and images.max() == 255


@pytest.mark.parametrize('data', [{'interpolation': 'bicubic'}, {'short_side': 40, 'interpolation': 'bilinear'}])
def test_scaled_as_prediction_scales_files(data):
  _, (images, _) = read(32, 1, **data)
  _, (small, _) = read(8, 1)
  scaling = Scaling(data.get('short_side'), data['interpolation'])
  for image, digit in zip(images[:5], small, strict=False):
    np.testing.assert_array_equal(image, decode_image(encoded(digit[..., 0]), 32, 1, scaling=scaling))


@pytest.mark.parametrize('channels', [1, 3])
def test_upsampling(channels):
  _, (images, _) = read(32, channels)
  _, (small, _) = read(8, 1)
  assert images.shape == (360, 32, 32, channels)
  for channel in range(channels):
    np.testing.assert_array_equal(images[..., channel], images[..., 0])
  # Bilinear keeps the average of each 4 x 4 cell near the pixel it came from, corners exactly equal.
  np.testing.assert_array_equal(images[:, 0, 0, 0], small[:, 0, 0, 0])
  cells = images[..., 0].reshape(360, 8, 4, 8, 4).mean(axis=(2, 4))
  assert np.abs(cells - small[..., 0]).mean() < 0.1 * 255
  assert np.corrcoef(cells.ravel(), small.ravel())[0, 1] > 0.97
