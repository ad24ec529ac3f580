import io

import numpy as np
import pytest
from PIL import Image

from paranet_jax.portable.run import decode_image


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


def big_endian(pixels):
  return Image.frombytes('I;16B', (2, 2), np.array(pixels, '>u2').tobytes())


def mode(name, pixels=SQUARE):
  return Image.fromarray(np.array(pixels, np.uint8)).convert(name)


def animation(format):
  frames = [Image.new('RGB', (2, 2), (value,) * 3) for value in (50, 200)]
  return encoded(frames[0], format=format, save_all=True, append_images=frames[1:], lossless=True)


WIDE = [[0, 257], [32896, 65535]]  # 257 x each of NARROW.
NARROW = [[0, 1], [128, 255]]
FLOATS = np.array([[0, 0.25], [np.nan, 1]], np.float32)
GREY_CASES |= {
  '1 bit': (encoded(mode('1', [[0, 255], [255, 0]])), 2, 3, [[0, 255], [255, 0]]),
  'grey with transparency': (encoded(Image.merge('LA', (mode('L'), Image.new('L', (2, 2), 0)))), 2, 3, SQUARE),
  'a grey that is transparent': (encoded(SQUARE, transparency=10), 2, 3, SQUARE),
  'palette, partly transparent': (
    encoded(mode('RGB').quantize(4), transparency=bytes([0, 128, 255, 255])),
    2,
    3,
    SQUARE,
  ),
  'CMYK': (encoded(mode('RGB').convert('CMYK'), format='TIFF'), 2, 3, SQUARE),
  'YCbCr': (encoded(mode('RGB').convert('YCbCr'), format='TIFF'), 2, 3, SQUARE),
  'RGBA to grey': (encoded(mode('RGBA')), 2, 1, SQUARE),
  'GIF': (encoded(mode('L'), format='GIF', transparency=1), 2, 3, SQUARE),
  'BMP': (encoded(mode('L'), format='BMP'), 2, 3, SQUARE),
  'first frame of a GIF': (animation('GIF'), 2, 3, [[50, 50]] * 2),
  'first frame of a WebP': (animation('WEBP'), 2, 3, [[50, 50]] * 2),
  '16 bit grey, big-endian, turned': (
    encoded(big_endian(WIDE), format='TIFF', tiffinfo={0x0112: 6}),
    2,
    1,
    [[128, 0], [255, 1]],
  ),
  '32 bit grey in 16 bits': (encoded(Image.fromarray(np.array(WIDE, np.int32)), format='TIFF'), 2, 1, NARROW),
  '32 bit grey': (encoded(Image.fromarray(np.array(WIDE, np.int32) * 30_000), format='TIFF'), 2, 1, NARROW),
  'negative grey': (encoded(Image.fromarray(-np.array(WIDE, np.int32)), format='TIFF'), 2, 1, [[0, 0]] * 2),
  'floating point to 1': (encoded(Image.fromarray(FLOATS), format='TIFF'), 2, 1, [[0, 64], [0, 255]]),
  'floating point to 255': (encoded(Image.fromarray(np.float32(SQUARE)), format='TIFF'), 2, 1, SQUARE),
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
  'cyan in CMYK': (encoded(Image.new('CMYK', (16, 16), (255, 0, 0, 0)), format='JPEG', quality=100), 3, [0, 255, 255]),
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


def test_an_open_file(tmp_path):
  (tmp_path / 'image.png').write_bytes(encoded(SQUARE))
  with (tmp_path / 'image.png').open('rb') as file:
    np.testing.assert_array_equal(decode_image(file, 2, 1)[..., 0], SQUARE)
