import io

import numpy as np
import pytest
from PIL import Image

from paranet_jax.data.decode import decode_image


def encoded(pixels, mode=None, format='PNG', **options):
  image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels, np.uint8), mode)
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def orientation(value):
  exif = Image.Exif()
  exif[0x0112] = value
  return exif


SQUARE = [[10, 20], [30, 40]]
# Name: (encoded file, side, channels, expected values of the one distinct channel).
GREY_CASES = {
  'as it is': (encoded(SQUARE), 2, 1, SQUARE),
  'upside down by EXIF': (encoded(SQUARE, exif=orientation(3)), 2, 1, [[40, 30], [20, 10]]),
  'turned by EXIF': (encoded(SQUARE, exif=orientation(6)), 2, 1, [[30, 10], [40, 20]]),
  'wide: centre columns': (encoded([[0, 50, 100, 150]] * 2), 2, 1, [[50, 100]] * 2),
  'tall: centre rows': (encoded([[0], [50], [100]]), 1, 1, [[50]]),
  '16 bit grey': (
    encoded(Image.fromarray(np.array([[0, 257], [32896, 65535]], np.uint16))),
    2,
    1,
    [[0, 1], [128, 255]],
  ),
  'grey to RGB': (encoded(SQUARE), 2, 3, SQUARE),
}


@pytest.mark.parametrize('case', GREY_CASES)
def test_grey(case):
  file, side, channels, expected = GREY_CASES[case]
  image = decode_image(file, side, channels)
  assert image.dtype == np.uint8
  np.testing.assert_array_equal(image, np.repeat(np.array(expected)[:, :, None], channels, axis=2))


def test_scaling_averages():
  image = decode_image(encoded(np.tile([[0, 0, 0, 0, 100, 100, 100, 100]], (8, 1))), 2, 1)
  assert image.shape == (2, 2, 1)
  # Triangle filter, four pixels each way from 2: of six weights that add to 3.5, 0.375 and 0.125 fall on 100.
  np.testing.assert_array_equal(image[..., 0], [[14, 86]] * 2)


COLOUR_CASES = {
  'RGB': (encoded([[[255, 0, 7]]]), 3, [255, 0, 7]),
  'RGBA drops transparency': (encoded([[[255, 0, 7, 0]]]), 3, [255, 0, 7]),
  'palette': (encoded(Image.fromarray(np.array([[[9, 8, 7]]], np.uint8)).convert('P', palette=1)), 3, [9, 8, 7]),
  'luminance': (encoded([[[255, 0, 0]]]), 1, [76]),  # 0.299 x 255
  'WebP': (encoded([[[255, 0, 7]]], format='WEBP', lossless=True), 3, [255, 0, 7]),
}


@pytest.mark.parametrize('case', COLOUR_CASES)
def test_colour(case):
  file, channels, expected = COLOUR_CASES[case]
  np.testing.assert_array_equal(decode_image(file, 1, channels), [[expected]])


@pytest.mark.parametrize('damage', [lambda file: file[: len(file) // 2], lambda file: b'not an image'])
def test_damaged_files_raise(damage):
  noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3))
  for format in ('PNG', 'JPEG', 'WEBP'):
    with pytest.raises(Exception, match='.'):
      decode_image(damage(encoded(noise, format=format)), 8, 3)
