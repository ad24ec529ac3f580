"""RandAugment and TrivialAugment on uint8 images, as pure functions that run inside the jitted step.

The operations, their order and their ranges are those of torchvision (`RandAugment` and `TrivialAugmentWide`, nearest
pixel, black where an image was shifted away). dm_pix defines brightness and contrast otherwise, and has no shear,
sharpness, posterize, auto-contrast or equalize.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

Image = UInt8[Array, 'H W C']

GEOMETRIC = ('shear_x', 'shear_y', 'translate_x', 'translate_y', 'rotate')
SIGNED = (*GEOMETRIC, 'brightness', 'color', 'contrast', 'sharpness')
OPERATIONS = ('identity', *SIGNED, 'posterize', 'solarize', 'autocontrast', 'equalize')
BINS = 31
"""Magnitudes of an operation, from 0."""

_GRAY = (0.2989, 0.587, 0.114)


def magnitudes(kind: str, image_shape: tuple[int, ...]) -> Float[np.ndarray, 'operations bins']:
  """The magnitude of every operation in every bin.

  Args:
    kind: 'rand' or 'trivial'.
    image_shape: (H, W).

  Returns:
    Shears in pixels a pixel, translations in pixels, rotations in degrees, changes of factors, bits that posterize
    keeps, the least value that solarize inverts.
  """
  rand, (height, width) = kind == 'rand', image_shape
  bins = np.arange(BINS)

  def most(value: float) -> np.ndarray:
    return np.linspace(0.0, value, BINS)

  shear, factor, bits = (0.3, 0.9, 4) if rand else (0.99, 0.99, 6)
  table = {
    'identity': most(0),
    'shear_x': most(shear),
    'shear_y': most(shear),
    'translate_x': np.trunc(most(150 / 331 * width if rand else 32)),
    'translate_y': np.trunc(most(150 / 331 * height if rand else 32)),
    'rotate': most(30 if rand else 135),
    **dict.fromkeys(('brightness', 'color', 'contrast', 'sharpness'), most(factor)),
    'posterize': 8 - np.round(bins / ((BINS - 1) / bits)),
    'solarize': 255 - most(255),
    'autocontrast': most(0),
    'equalize': most(0),
  }
  return np.stack([table[name] for name in OPERATIONS]).astype(np.float32)


def auto_augment(
  keys: Key[Array, ' B'], images: UInt8[Array, 'B H W C'], *, kind: str, operations: int = 2, magnitude: int = 9
) -> UInt8[Array, 'B H W C']:
  """Applies random operations to each image.

  Args:
    keys: one per image.
    kind: 'trivial': one operation of a random bin (Müller and Hutter 2021); 'rand': `operations` of one bin (Cubuk et
      al. 2020).
    magnitude: bin of 'rand', from 0 to 30.
  """
  table = jnp.asarray(magnitudes(kind, images.shape[1:3]))
  signed = jnp.asarray([name in SIGNED for name in OPERATIONS])

  @jax.jit  # Traced once for all operations.
  def one(key: jax.Array, image: jax.Array) -> jax.Array:
    chosen_key, bin_key, sign_key = jax.random.split(key, 3)
    chosen = jax.random.randint(chosen_key, (), 0, len(OPERATIONS))
    number = jax.random.randint(bin_key, (), 0, BINS) if kind == 'trivial' else magnitude
    flipped = signed[chosen] & jax.random.bernoulli(sign_key)
    value = table[chosen, number]
    return apply_operation(image, chosen, jnp.where(flipped, -value, value))

  for number in range(1 if kind == 'trivial' else operations):
    images = jax.vmap(one)(jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number), images)
  return images


def apply_operation(image: Image, chosen: Int[Array, ''] | int, value: Float[Array, ''] | float) -> Image:
  """Applies one operation.

  Args:
    chosen: index in OPERATIONS.
    value: its magnitude, negative for the other direction.
  """
  value = jnp.asarray(value, jnp.float32)
  colored: list[Callable[[], jax.Array]] = [
    lambda: _blend(image, jnp.zeros_like(image, jnp.float32), 1 + value),
    lambda: _blend(image, _gray(image), 1 + value),
    lambda: _blend(image, jnp.mean(_gray(image)), 1 + value),
    lambda: _blend(image, _blurred(image), 1 + value),
    lambda: _posterized(image, value),
    lambda: jnp.where(image.astype(jnp.float32) >= value, 255 - image, image),
    lambda: _autocontrast(image),
    lambda: jax.vmap(_equalized, in_axes=-1, out_axes=-1)(image),
  ]
  # vmap turns a switch over one index for each image into a selection among all results, which this one is.
  geometry = len(GEOMETRIC) + 1
  result = _moved(image, chosen, value)
  for number, operation in enumerate(colored, geometry):
    result = jnp.where(jnp.asarray(chosen) == number, operation(), result)
  return result


def _moved(image: Image, chosen: Int[Array, ''] | int, value: Float[Array, '']) -> Image:
  """The nearest pixels of a shear about the corner, a translation or a rotation about the center; 0 outside."""
  height, width, _ = image.shape
  is_one = {name: (jnp.asarray(chosen) == OPERATIONS.index(name)).astype(jnp.float32) for name in GEOMETRIC}
  angle = is_one['rotate'] * value * (math.pi / 180)
  # Pixel centers; of a rotation relative to the center of the image.
  x, y = jnp.arange(width, dtype=jnp.float32) + 0.5, (jnp.arange(height, dtype=jnp.float32) + 0.5)[:, None]
  center = is_one['rotate'] * width / 2, is_one['rotate'] * height / 2
  x, y = x - center[0], y - center[1]
  cosine, sine = jnp.cos(angle), jnp.sin(angle)
  source_x = cosine * x + (is_one['shear_x'] * value - sine) * y - is_one['translate_x'] * value + center[0]
  source_y = cosine * y + (is_one['shear_y'] * value + sine) * x - is_one['translate_y'] * value + center[1]
  column, row = (jnp.round(source - 0.5).astype(jnp.int32) for source in (source_x, source_y))
  inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
  taken = image[jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]
  return jnp.where(inside[..., None], taken, jnp.zeros_like(taken))


def _blend(image: Image, other: Float[Array, '...'], factor: Float[Array, '']) -> Image:
  blended = factor * image.astype(jnp.float32) + (1 - factor) * other
  return jnp.clip(blended, 0, 255).astype(jnp.uint8)


def _gray(image: Image) -> Float[Array, 'H W 1']:
  """Luminance, whole numbers."""
  if image.shape[-1] != 3:
    return image.astype(jnp.float32)
  return jnp.floor(jnp.sum(image.astype(jnp.float32) * jnp.asarray(_GRAY, jnp.float32), axis=-1, keepdims=True))


def _blurred(image: Image) -> Float[Array, 'H W C']:
  """The mean of 3 x 3 pixels, the middle one five times, in whole numbers; the border stays."""
  height, width, _ = image.shape
  plain = image.astype(jnp.float32)
  if height < 3 or width < 3:
    return plain
  parts = [plain[row : row + height - 2, column : column + width - 2] for row in range(3) for column in range(3)]
  inner = jnp.round((sum(parts) + 4 * plain[1:-1, 1:-1]) / 13)
  return plain.at[1:-1, 1:-1].set(inner)


def _posterized(image: Image, bits: Float[Array, '']) -> Image:
  step = jnp.exp2(8 - bits)
  return (jnp.floor(image.astype(jnp.float32) / step) * step).astype(jnp.uint8)


def _autocontrast(image: Image) -> Image:
  plain = image.astype(jnp.float32)
  low, high = jnp.min(plain, axis=(0, 1)), jnp.max(plain, axis=(0, 1))
  spread = high > low
  low, scale = jnp.where(spread, low, 0.0), jnp.where(spread, 255 / jnp.where(spread, high - low, 1.0), 1.0)
  return jnp.clip((plain - low) * scale, 0, 255).astype(jnp.uint8)


def _equalized(channel: UInt8[Array, 'H W']) -> UInt8[Array, 'H W']:
  """Spreads the values so that all are about equally frequent, as Pillow does."""
  histogram = jnp.zeros(256, jnp.int32).at[channel.astype(jnp.int32)].add(1)
  last = histogram[jnp.max(channel).astype(jnp.int32)]
  step = (channel.size - last) // 255
  table = (jnp.cumsum(histogram) - histogram + step // 2) // jnp.maximum(step, 1)
  return jnp.where(step == 0, channel, jnp.clip(table, 0, 255)[channel.astype(jnp.int32)].astype(jnp.uint8))
