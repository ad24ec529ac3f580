"""Tests of the operations against Pillow, whose they are, and of how RandAugment and TrivialAugment draw them."""

import jax
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from paranet_jax.data.augment import image_keys
from paranet_jax.data.auto_augment import OPERATIONS, apply_operation, auto_augment, magnitudes

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (16, 12, 3)).astype(np.uint8)
# A picture of few, dark colors, for what spreads them.
DARK = (np.add.outer(np.arange(16) * 4, np.arange(12) * 3)[..., None] + np.array([5, 20, 0])).astype(np.uint8)

apply = jax.jit(apply_operation)
augment = jax.jit(auto_augment, static_argnames=('kind', 'operations', 'magnitude'))


def found(image, name, value):
  return np.asarray(apply(image, OPERATIONS.index(name), value))


def affine(image, *coefficients):
  return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST)


@pytest.mark.parametrize('image', [NOISE, DARK], ids=['noise', 'dark'])
@pytest.mark.parametrize(
  ('name', 'value', 'expected'),
  [
    ('identity', 0.0, lambda image: image),
    ('shear_x', 0.3, lambda image: affine(image, 1, 0.3, 0, 0, 1, 0)),
    ('shear_x', -0.99, lambda image: affine(image, 1, -0.99, 0, 0, 1, 0)),
    ('shear_y', 0.41, lambda image: affine(image, 1, 0, 0, 0.41, 1, 0)),
    ('translate_x', 5.0, lambda image: affine(image, 1, 0, -5, 0, 1, 0)),
    ('translate_y', -3.0, lambda image: affine(image, 1, 0, 0, 0, 1, 3)),
    ('translate_y', 32.0, lambda image: Image.new('RGB', image.size)),
    ('rotate', 30.0, lambda image: image.rotate(30)),
    ('rotate', -110.0, lambda image: image.rotate(-110)),
    ('posterize', 2.0, lambda image: ImageOps.posterize(image, 2)),
    ('posterize', 8.0, lambda image: image),
    ('solarize', 100.0, lambda image: ImageOps.solarize(image, 100)),
    ('solarize', 255.0, lambda image: ImageOps.solarize(image, 255)),
    ('autocontrast', 0.0, ImageOps.autocontrast),
    ('equalize', 0.0, ImageOps.equalize),
  ],
)
def test_operations_are_pillows(image, name, value, expected):
  difference = found(image, name, value).astype(int) - np.asarray(expected(Image.fromarray(image)))
  # Autocontrast rounds in another place; a pixel whose source is halfway between two may come from the other one.
  if name == 'autocontrast':
    assert np.abs(difference).max() <= 1
  else:
    assert np.mean(np.any(difference, axis=-1)) <= (0.01 if name in ('rotate', 'shear_x', 'shear_y') else 0)


@pytest.mark.parametrize('value', [-0.9, -0.3, 0.0, 0.5, 0.99])
@pytest.mark.parametrize('image', [NOISE, DARK], ids=['noise', 'dark'])
@pytest.mark.parametrize('name', ['brightness', 'color', 'contrast', 'sharpness'])
def test_enhancements_are_pillows_to_rounding(image, name, value):
  """Pillow rounds gray to the nearest, torchvision and this down: a factor of 2 doubles that."""
  enhance = getattr(ImageEnhance, name.capitalize())(Image.fromarray(image))
  expected = np.asarray(enhance.enhance(1 + value)).astype(int)
  assert np.abs(found(image, name, value).astype(int) - expected).max() <= 2


def test_by_hand():
  image = np.array([[[10, 20, 30], [0, 0, 0]], [[255, 100, 50], [40, 40, 40]]], np.uint8)
  np.testing.assert_array_equal(found(image, 'brightness', 0.5)[:, 0], [[15, 30, 45], [255, 150, 75]])
  # Luminances 18.149, 0, 140.62 and 40, rounded down, whose mean is 49.5.
  np.testing.assert_array_equal(found(image, 'color', -1.0)[..., 0], [[18, 0], [140, 39]])
  np.testing.assert_array_equal(found(image, 'contrast', -1.0), np.full((2, 2, 3), 49))
  gray = np.array([[[0], [1]], [[1], [5]]], np.uint8)
  np.testing.assert_array_equal(found(gray, 'color', 0.9), gray)
  np.testing.assert_array_equal(found(gray, 'autocontrast', 0.0)[..., 0], [[0, 51], [51, 255]])


def test_magnitudes_are_torchvisions():
  """Of `RandAugment` and `TrivialAugmentWide` for 32 pixels: the first, the tenth and the last bin."""
  expected = {
    'rand': {'shear_x': (0, 0.09, 0.3), 'translate_x': (0, 4, 14), 'rotate': (0, 9, 30), 'color': (0, 0.27, 0.9)},
    'trivial': {'shear_x': (0, 0.297, 0.99), 'translate_x': (0, 9, 32), 'rotate': (0, 40.5, 135)},
  }
  expected['rand'] |= {'posterize': (8, 7, 4), 'solarize': (255, 178.5, 0), 'identity': (0, 0, 0)}
  expected['trivial'] |= {'posterize': (8, 6, 2), 'solarize': (255, 178.5, 0), 'color': (0, 0.297, 0.99)}
  for kind, rows in expected.items():
    table = magnitudes(kind, (32, 32))
    for name, values in rows.items():
      np.testing.assert_allclose(table[OPERATIONS.index(name), [0, 9, 30]], values, rtol=1e-6)


def test_operations_are_drawn_equally_often():
  """On a picture in which every operation and sign of the largest magnitude shows."""
  images = np.broadcast_to(DARK, (1400, *DARK.shape))
  results = augment(image_keys(0, 0, 0, np.arange(1400)), images, kind='rand', operations=1, magnitude=30)
  table = magnitudes('rand', DARK.shape[:2])[:, 30]
  outcomes = {}
  for name, value in zip(OPERATIONS, table, strict=True):
    signs = (1, -1) if name in OPERATIONS[1:10] else (1,)
    for sign in signs:
      outcomes.setdefault(found(DARK, name, sign * value).tobytes(), []).append(1 / len(OPERATIONS) / len(signs))
  counts = dict.fromkeys(outcomes, 0)
  for result in np.asarray(results):
    counts[result.tobytes()] += 1
  for outcome, shares in outcomes.items():
    mean = 1400 * sum(shares)
    assert abs(counts[outcome] - mean) < 5 * np.sqrt(mean)


@pytest.mark.parametrize('options', [{'kind': 'trivial'}, {'kind': 'rand', 'operations': 2, 'magnitude': 9}])
def test_images_depend_on_their_own_keys_alone(options):
  keys, images = image_keys(1, 2, 3, np.arange(8)), RNG.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
  whole = np.asarray(augment(keys, images, **options))
  assert whole.dtype == np.uint8 and not np.array_equal(whole, images)
  others = np.where(np.arange(8)[:, None, None, None] < 4, images, 255 - images)[::-1]
  np.testing.assert_array_equal(augment(keys[::-1], others, **options)[4:], whole[:4][::-1])
