"""Image files of every format and mode, decoded to the size and the channels of a network."""

import io

import numpy as np
import pytest
from PIL import Image

from paranet_jax.portable.run import decode_image

SQUARE = [[10, 20], [30, 40]]
WIDE = np.array([[0, 257], [32896, 65535]])  # 257 times NARROW.
NARROW = [[0, 1], [128, 255]]
FLOATS = np.array([[0, 0.25], [np.nan, 1]], np.float32)


def encoded(pixels, format='PNG', **options):
  image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels, np.uint8))
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def orientation(value):
  exif = Image.Exif()
  exif[0x0112] = value
  return exif


def mode(name, pixels=SQUARE):
  return Image.fromarray(np.array(pixels, np.uint8)).convert(name)


def tiff(pixels, **options):
  return encoded(pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels), 'TIFF', **options)


def animation(format):
  frames = [Image.new('RGB', (2, 2), (value,) * 3) for value in (50, 200)]
  return encoded(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)


BIG_ENDIAN = Image.frombytes('I;16B', (2, 2), WIDE.astype('>u2').tobytes())
TRANSPARENT = Image.merge('LA', (mode('L'), Image.new('L', (2, 2), 0)))
# Name: (encoded file, channels, expected values of every channel).
GRAY = {
  'unchanged': (encoded(SQUARE), 1, SQUARE),
  'upside down by EXIF': (encoded(SQUARE, exif=orientation(3)), 1, [[40, 30], [20, 10]]),
  'rotated by EXIF': (encoded(SQUARE, exif=orientation(6)), 1, [[30, 10], [40, 20]]),
  'wide: center columns': (encoded([[0, 50, 100, 150]] * 2), 1, [[50, 100]] * 2),
  'tall: center row': (encoded([[0], [50], [100]]), 1, [[50]]),
  'gray to RGB': (encoded(SQUARE), 3, SQUARE),
  '1 bit': (encoded(mode('1', [[0, 255], [255, 0]])), 3, [[0, 255], [255, 0]]),
  'gray with transparency': (encoded(TRANSPARENT), 3, SQUARE),
  'transparent gray': (encoded(SQUARE, transparency=10), 3, SQUARE),
  'partly transparent palette': (encoded(mode('RGB').quantize(4), transparency=bytes([0, 128, 255, 255])), 3, SQUARE),
  'CMYK': (tiff(mode('RGB').convert('CMYK')), 3, SQUARE),
  'YCbCr': (tiff(mode('RGB').convert('YCbCr')), 3, SQUARE),
  'RGBA to gray': (encoded(mode('RGBA')), 1, SQUARE),
  'GIF': (encoded(mode('L'), 'GIF', transparency=1), 3, SQUARE),
  'BMP': (encoded(mode('L'), 'BMP'), 3, SQUARE),
  'first frame of a GIF': (animation('GIF'), 3, [[50, 50]] * 2),
  'first frame of a WebP': (animation('WEBP'), 3, [[50, 50]] * 2),
  '16-bit gray': (encoded(Image.fromarray(WIDE.astype(np.uint16))), 1, NARROW),
  '16-bit gray, big-endian, rotated': (tiff(BIG_ENDIAN, tiffinfo={0x0112: 6}), 1, [[128, 0], [255, 1]]),
  '32-bit gray in 16 bits': (tiff(WIDE.astype(np.int32)), 1, NARROW),
  '32-bit gray': (tiff(WIDE.astype(np.int32) * 30_000), 1, NARROW),
  'negative gray': (tiff(-WIDE.astype(np.int32)), 1, [[0, 0]] * 2),
  'floating point to 1': (tiff(FLOATS), 1, [[0, 64], [0, 255]]),
  'floating point to 255': (tiff(np.float32(SQUARE)), 1, SQUARE),
}


@pytest.mark.parametrize(('file', 'channels', 'expected'), GRAY.values(), ids=GRAY)
def test_gray(file, channels, expected):
  image = decode_image(file, len(expected), channels)
  assert image.dtype == np.uint8
  np.testing.assert_array_equal(image, np.repeat(np.array(expected)[:, :, None], channels, axis=2))


def test_scaling_averages():
  image = decode_image(encoded(np.tile([[0, 0, 0, 0, 100, 100, 100, 100]], (8, 1))), 2, 1)
  # Triangle filter, four pixels each way from 2: of six weights that add to 3.5, 0.375 and 0.125 fall on 100.
  np.testing.assert_array_equal(image, np.array([[[14], [86]]] * 2))


COLOR = {
  'RGB': (encoded([[[255, 0, 7]]]), [255, 0, 7]),
  'RGBA drops transparency': (encoded([[[255, 0, 7, 0]]]), [255, 0, 7]),
  'palette': (encoded(Image.fromarray(np.array([[[9, 8, 7]]], np.uint8)).convert('P', palette=1)), [9, 8, 7]),
  'cyan in CMYK': (encoded(Image.new('CMYK', (16, 16), (255, 0, 0, 0)), 'JPEG', quality=100), [0, 255, 255]),
  'luminance': (encoded([[[255, 0, 0]]]), [76]),  # 0.299 x 255
  'WebP': (encoded([[[255, 0, 7]]], 'WEBP', lossless=True), [255, 0, 7]),
}


@pytest.mark.parametrize(('file', 'expected'), COLOR.values(), ids=COLOR)
def test_color(file, expected):
  np.testing.assert_array_equal(decode_image(file, 1, len(expected)), [[expected]])


@pytest.mark.parametrize('format', ['PNG', 'JPEG', 'WEBP'])
def test_a_truncated_file(format):
  file = encoded(np.random.RandomState(0).randint(0, 256, (64, 64, 3)), format)
  for damaged in (file[: len(file) // 2], b'not an image'):
    with pytest.raises(Exception, match='.'):
      decode_image(damaged, 8, 3)


def test_an_open_file():
  np.testing.assert_array_equal(decode_image(io.BytesIO(encoded(SQUARE)), 2, 1)[..., 0], SQUARE)
