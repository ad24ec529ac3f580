"""Corruptions of images, by hand."""

import numpy as np
import pytest

from paranet_jax.data.corruptions import CORRUPTIONS, blur, brightness, contrast, dead_pixels, noise, pixelate

IMAGES = np.arange(32, dtype=np.uint8).reshape(2, 4, 4, 1) * 8


def corrupted(corrupt, images=IMAGES):
  return corrupt(images, np.random.default_rng(0))


@pytest.mark.parametrize('name', CORRUPTIONS)
@pytest.mark.parametrize('channels', [1, 3])
def test_every_corruption_gives_images(name, channels):
  images = np.random.default_rng(1).integers(0, 256, (2, 8, 6, channels), np.uint8)
  before = images.copy()
  found = corrupted(CORRUPTIONS[name], images)
  assert (found.shape, found.dtype) == (images.shape, np.uint8) and (found != images).any()
  np.testing.assert_array_equal(images, before)


def test_pixels():
  np.testing.assert_array_equal(corrupted(brightness(0.5)), IMAGES // 2)
  assert corrupted(brightness(3.0)).max() == 255
  # The mean of the first image is 60.
  np.testing.assert_array_equal(corrupted(contrast(0.5))[0].ravel(), 30 + IMAGES[0].ravel() // 2)
  np.testing.assert_array_equal(corrupted(pixelate(2))[0, :, :, 0], IMAGES[0, [0, 0, 2, 2]][:, [0, 0, 2, 2], 0])
  # Rows differ by 32 and columns by 8; a border is repeated.
  assert corrupted(blur(3))[0, 1, 1, 0] == IMAGES[0, 1, 1, 0] and corrupted(blur(3))[0, 0, 0, 0] == round(40 / 3)


def test_chance():
  gray = np.full((1, 100, 100, 3), 128, np.uint8)
  found = corrupted(noise(20), gray).astype(float)
  assert abs(found.mean() - 128) < 1 and abs(found.std() - 20) < 0.5
  dead = corrupted(dead_pixels(0.1), gray)
  assert set(np.unique(dead)) == {0, 128, 255} and abs((dead != 128).mean() - 0.1) < 0.02
  assert (dead.min(-1) == dead.max(-1)).all()  # All colors of a pixel.
