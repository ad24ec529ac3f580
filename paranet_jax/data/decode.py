"""Encoded image -> uint8 [side, side, channels]."""

import io
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps


def decode_image(encoded: bytes | BinaryIO, side: int, channels: int) -> np.ndarray:
  """Decodes the bytes of an image, or an open file, turned upright as its EXIF orientation says.

  Any format and mode that Pillow opens; of an animation, the first frame.

  Returns:
    uint8 [side, side, channels], see `fit_image`.

  Raises:
    Exception: whatever Pillow raises for bytes that are not a whole image.
  """
  with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
    return fit_image(ImageOps.exif_transpose(image), side, channels)


def fit_image(image: Image.Image, side: int, channels: int) -> np.ndarray:
  """Scales the short side to `side` (bilinear, antialiased) and crops the centre: uint8 [side, side, channels].

  channels: 1 (luminance) or 3 (RGB; transparency is dropped). An image that has the size already is not resampled.
  """
  if image.mode[0] in 'IF':
    image = _to_8_bit(image)
  if 'transparency' in image.info:  # Without this step Pillow warns of palettes that are partly transparent.
    image = image.convert('RGBA')
  image = image.convert('L' if channels == 1 else 'RGB')
  fitted = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
  return np.asarray(fitted).reshape(side, side, channels)


def _to_8_bit(image: Image.Image) -> Image.Image:
  """Scales 16 and 32-bit grey, which Pillow's convert() clips at 255, to 0..255.

  Full white is 65535; of floating-point pixels the least of 1, 255 and 65535 that none exceeds. Where pixels exceed
  65535, it is their largest. What is negative or not finite becomes black.
  """
  grey = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0, posinf=0, neginf=0)
  largest = grey.max()
  white = next((scale for scale in ((1, 255, 65535) if image.mode == 'F' else (65535,)) if largest <= scale), largest)
  return Image.fromarray(np.rint(np.maximum(grey, 0) * (255 / white)).astype(np.uint8))
