"""Images are scaled as a network's training images were, which may be more than the side of its input."""

import numpy as np
import pytest
from PIL import Image

from paranet_jax.portable.run import TO_SIDE, Scaling, fit_image

RANDOM = np.random.default_rng(0)


def noise(height, width):
  return Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), np.uint8))


def test_the_center_is_cropped():
  image = noise(6, 9)
  found = fit_image(image, 3, 3, Scaling(6))
  # As torchvision rounds: 3 / 2 = 1.5 becomes 2, as does 6 / 2 - 0.5 = 2.5 in a side of 5.
  np.testing.assert_array_equal(found, np.asarray(image)[2:5, 3:6])
  np.testing.assert_array_equal(fit_image(noise(5, 5), 2, 1, Scaling(5)).shape, (2, 2, 1))


@pytest.mark.parametrize(
  ('height', 'width', 'scaled', 'top', 'left'),
  [(30, 47, (25, 16), 2, 7), (47, 30, (16, 25), 7, 2), (12, 12, (16, 16), 2, 2), (9, 41, (72, 16), 2, 30)],
)
def test_the_short_side_is_scaled_as_in_torchvision(height, width, scaled, top, left):
  image = noise(height, width)
  expected = np.asarray(image.resize(scaled, Image.Resampling.BICUBIC))[top : top + 11, left : left + 11]
  np.testing.assert_array_equal(fit_image(image, 11, 3, Scaling(16, 'bicubic')), expected)


def test_interpolation_without_a_crop():
  image = noise(8, 8)
  for scaling in (Scaling(None, 'bicubic'), Scaling(4, 'bicubic')):
    expected = np.asarray(image.resize((4, 4), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(fit_image(image, 4, 3, scaling), expected)
  assert np.any(fit_image(image, 4, 3, TO_SIDE) != expected)


def test_a_long_image_does_not_become_huge():
  image = Image.new('RGB', (200_000, 1), 'red')  # 200,000 x 1,000 pixels if all of it were scaled.
  image.paste('blue', (99_990, 0, 100_010, 1))
  np.testing.assert_array_equal(fit_image(image, 2, 3, Scaling(1000)), np.full((2, 2, 3), (0, 0, 255)))


def test_in_words():
  assert str(TO_SIDE) == 'shorter side to `side` (bilinear, antialiased), center crop'
  assert str(Scaling(256, 'bicubic')) == 'shorter side to 256 (bicubic, antialiased), center crop'
