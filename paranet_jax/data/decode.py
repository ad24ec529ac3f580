"""Encoded image -> uint8 [side, side, channels]."""

import io

import numpy as np
from PIL import Image, ImageOps


def decode_image(encoded: bytes, side: int, channels: int) -> np.ndarray:
  """Decodes a PNG, JPEG or WebP file, turned upright as its EXIF orientation says, to uint8 [side, side, channels].

  Raises whatever Pillow raises for bytes that are not a whole image.
  """
  with Image.open(io.BytesIO(encoded)) as image:
    return fit_image(ImageOps.exif_transpose(image), side, channels)


def fit_image(image: Image.Image, side: int, channels: int) -> np.ndarray:
  """Scales the short side to `side` (bilinear, antialiased) and crops the centre: uint8 [side, side, channels].

  channels: 1 (luminance) or 3 (RGB; transparency is dropped). An image that has the size already is not resampled.
  """
  if image.mode.startswith('I'):  # Pillow's convert() clips 16-bit grey at 255 instead of scaling it.
    grey = np.asarray(image).astype(np.float64)
    image = Image.fromarray(np.rint(grey * (255 / 65535)).astype(np.uint8))
  image = image.convert('L' if channels == 1 else 'RGB')
  fitted = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
  return np.asarray(fitted).reshape(side, side, channels)
