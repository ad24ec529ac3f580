import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paranet_jax.data.augment import alternately_mirrored, augment, box_mask, cutmix, image_keys, mixup, normalize

augment = jax.jit(augment, static_argnames=('crop_padding', 'flip', 'cutout'))
mixup = jax.jit(mixup)  # With any alpha.
jitted_keys = jax.jit(image_keys)
MANY = 3600  # Images where every outcome must occur.

IMAGE = np.array([[1, 2], [3, 4]], np.float32)  # One channel.
# Rows of the nine crops of IMAGE with a border of one pixel of zeros, by (row, column) offset.
CROPS = {
  (0, 0): [[0, 0], [0, 1]],
  (0, 1): [[0, 0], [1, 2]],
  (0, 2): [[0, 0], [2, 0]],
  (1, 0): [[0, 1], [0, 3]],
  (1, 1): [[1, 2], [3, 4]],
  (1, 2): [[2, 0], [4, 0]],
  (2, 0): [[0, 3], [0, 0]],
  (2, 1): [[3, 4], [0, 0]],
  (2, 2): [[4, 0], [0, 0]],
}


def keys(count, seed=0, epoch=0, step=0, first=0):
  return jitted_keys(seed, epoch, step, np.arange(first, first + count))


def assert_equally_often(images, expected):
  """Asserts that so many images are the expected outcomes, each within five standard deviations of its mean."""
  found = collections.Counter(tuple(image.ravel().tolist()) for image in np.asarray(images))
  assert found.keys() == expected.keys()
  for outcome, multiplicity in expected.items():
    mean = len(images) * multiplicity / expected.total()
    assert abs(found[outcome] - mean) <= 5 * np.sqrt(mean)


def flat(rows, mirrored=False):
  return tuple(float(value) for row in rows for value in (row[::-1] if mirrored else row))


CASES = {
  'neither': (0, False, [IMAGE.tolist()], []),
  'flip': (0, True, [IMAGE.tolist()], [IMAGE.tolist()]),
  'crop': (1, False, CROPS.values(), []),
  'both': (1, True, CROPS.values(), CROPS.values()),
}


@pytest.mark.parametrize('case', CASES)
def test_all_outcomes_occur_equally_often_and_no_others(case):
  crop_padding, flip, plain, mirrored = CASES[case]
  expected = collections.Counter([flat(crop) for crop in plain] + [flat(crop, mirrored=True) for crop in mirrored])
  images = np.broadcast_to(IMAGE[None, :, :, None], (MANY, 2, 2, 1))
  assert_equally_often(augment(keys(MANY), images, crop_padding=crop_padding, flip=flip), expected)


def test_channels_and_images_stay_apart():
  images = np.random.RandomState(0).randint(1, 256, (16, 5, 4, 3)).astype(np.uint8)
  augmented = augment(keys(16), images, crop_padding=2, flip=True)
  chex.assert_shape(augmented, images.shape)
  assert augmented.dtype == np.uint8
  for image, result in zip(images, np.asarray(augmented), strict=True):
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    crops = [padded[r : r + 5, c : c + 4] for r in range(5) for c in range(5)]
    assert any(np.array_equal(result, crop) or np.array_equal(result, crop[:, ::-1]) for crop in crops)


def test_halves_of_the_batch_equal_the_whole():
  images = np.random.RandomState(0).rand(8, 6, 6, 3).astype(np.float32)

  def augmented(images, first):
    return augment(keys(len(images), seed=3, epoch=2, step=1, first=first), images, crop_padding=2, flip=True)

  halves = np.concatenate([augmented(images[:4], 0), augmented(images[4:], 4)])
  np.testing.assert_array_equal(halves, augmented(images, 0))


def test_keys_depend_on_seed_epoch_step_and_place():
  parts = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
  found = [np.asarray(jax.random.key_data(keys(3, *part))) for part in parts]
  assert len({key.tobytes() for own in found for key in own}) == 12


def test_normalize():
  images = np.array([[[[0, 255]], [[255, 51]]]], np.uint8)
  with jax.numpy_dtype_promotion('strict'):
    found = normalize(images, mean=(0.5, 0.2), std=(0.25, 0.4))
    half = normalize(images, mean=(0.5, 0.2), std=(0.25, 0.4), dtype=jnp.bfloat16)
  assert found.dtype == jnp.float32 and half.dtype == jnp.bfloat16
  expected = [[[[-2, 2]], [[2, 0]]]]
  np.testing.assert_allclose(found, expected, atol=1e-6)
  np.testing.assert_allclose(half.astype(jnp.float32), expected, atol=1e-2)


def test_padding_is_the_mean_color():
  mean = (0.2, 0.4, 0.6)
  images = normalize(np.full((64, 4, 4, 3), 255, np.uint8), mean, std=(1, 1, 1))
  augmented = np.asarray(augment(keys(64), images, crop_padding=1, flip=False))
  pixels = {tuple(pixel) for pixel in np.round(augmented.reshape(-1, 3) + mean, 6).tolist()}
  assert pixels == {mean, (1.0, 1.0, 1.0)}


# What is left of 2 x 3 pixels of value 1 by a square of this side around each pixel.
CUTOUTS = {
  1: ['011 111', '101 111', '110 111', '111 011', '111 101', '111 110'],
  # From one pixel up and left of the middle to the middle, as far as there are any.
  2: ['011 111', '001 111', '100 111', '011 011', '001 001', '100 100'],
  3: ['001 001', '000 000', '100 100'] * 2,
}


@pytest.mark.parametrize('side', CUTOUTS)
def test_cutout(side):
  expected = collections.Counter(tuple(float(pixel) for pixel in text if pixel != ' ') for text in CUTOUTS[side])
  images = np.ones((MANY, 2, 3, 1), np.float32)
  assert_equally_often(augment(keys(MANY), images, crop_padding=0, flip=False, cutout=side), expected)


def test_cutout_leaves_the_crop_and_the_flip_as_they_are():
  images = np.random.RandomState(0).rand(16, 6, 6, 3).astype(np.float32) + 1
  plain, cut = (augment(keys(16), images, crop_padding=2, flip=True, cutout=side) for side in (0, 3))
  kept = np.asarray(cut) != 0
  np.testing.assert_array_equal(np.asarray(cut)[kept], np.asarray(plain)[kept])
  assert not kept.all()


@pytest.mark.parametrize('alpha', [0.2, 2.0])
def test_mixup_shares(alpha):
  """Labels show the shares: draws from Beta(alpha, alpha), with mean 1/2 and variance 1 / (8 alpha + 4)."""
  number = MANY + 1  # The image in the middle has no partner.
  images = np.arange(number, dtype=np.float32).reshape(-1, 1, 1, 1)
  one_hot = np.eye(2, dtype=np.float32)[np.arange(number) * 2 // number]  # The first half is class 0, its partners 1.
  mixed, labels = mixup(keys(number), images, one_hot, alpha=alpha)
  share = np.where(np.arange(number) < number // 2, labels[:, 0], labels[:, 1]).astype(np.float64)
  partner = np.arange(number)[::-1]
  np.testing.assert_allclose(np.ravel(mixed), share * np.arange(number) + (1 - share) * partner, rtol=1e-4, atol=0.01)
  np.testing.assert_allclose(np.sum(labels, axis=1), 1, rtol=1e-6)
  variance = 1 / (8 * alpha + 4)
  assert abs(share.mean() - 0.5) < 5 * np.sqrt(variance / number)
  assert abs(share.var() - variance) < 0.1 * variance
  # Each place has its own share, and a pair's two are not tied.
  assert len(np.unique(share)) > 0.9 * number and abs(np.corrcoef(share, share[::-1])[0, 1]) < 0.1


def test_images_are_mirrored_in_every_other_epoch():
  indices = np.arange(2000)
  first, second, third = (np.asarray(alternately_mirrored(3, epoch, indices)) for epoch in range(3))
  np.testing.assert_array_equal(second, ~first)
  np.testing.assert_array_equal(third, first)
  assert abs(first.sum() - 1000) < 5 * np.sqrt(500)
  # By image, wherever it is in a batch, and by seed.
  np.testing.assert_array_equal(alternately_mirrored(3, 0, indices[::-1]), first[::-1])
  assert not np.array_equal(alternately_mirrored(4, 0, indices), first)
  images = np.broadcast_to(IMAGE[None, :, :, None], (2000, 2, 2, 1))
  found = augment(keys(2000), images, crop_padding=0, flip=True, mirrored=first)
  np.testing.assert_array_equal(np.asarray(found)[:, 0, 0, 0] == 2, first)


@pytest.mark.parametrize(
  ('center', 'side', 'expected'),
  [
    # Boxes of 2 x 2 pixels in 4 x 4, from one before the center to before it.
    ((2, 2), 0.5, ['0000', '0110', '0110', '0000']),
    ((0, 3), 0.5, ['0011', '0000', '0000', '0000']),
    ((1, 1), 0.2, ['0000'] * 4),
    ((0, 0), 1.0, ['1100', '1100', '0000', '0000']),
    ((2, 2), 1.0, ['1111'] * 4),
  ],
)
def test_boxes(center, side, expected):
  found = box_mask((4, 4), np.array(center), np.float32(side))
  assert [''.join(str(int(pixel)) for pixel in row) for row in found] == expected


def test_cutmix():
  """Every image has a box of its partner, and the labels have its share; the batch of two devices is the same."""
  images = np.broadcast_to(np.arange(64, dtype=np.float32)[:, None, None, None], (64, 8, 8, 1))
  labels = np.eye(64, dtype=np.float32)
  found, shares = jax.jit(cutmix, static_argnames='alpha')(keys(64), images, labels, alpha=1.0)
  own = np.mean(np.asarray(found) == images, axis=(1, 2, 3))
  assert np.all((found == images) | (found == images[::-1]))
  assert own.min() < 0.5 and own.max() > 0.9
  np.testing.assert_allclose(shares, own[:, None] * labels + (1 - own[:, None]) * labels[::-1], atol=1e-6)
  halves = jax.pmap(functools.partial(cutmix, alpha=1.0, axis_name='devices'), axis_name='devices')
  parts = (values.reshape(2, 32, *values.shape[1:]) for values in (keys(64), images, labels))
  for part, whole in zip(halves(*parts), (found, shares), strict=True):
    np.testing.assert_allclose(part.reshape(whole.shape), whole, atol=1e-6)
