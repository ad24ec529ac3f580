"""Normalization, crop, mirroring, cutout, mixup and CutMix, as pure functions that run inside the jitted step."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Num, UInt8

_AUGMENT_STREAM = 1  # Separates these random numbers from those of shuffling.
_MIRROR_STREAM = 4
# Folded into an image's key; crop and flip use the two halves of its split.
_CUTOUT, _MIXUP, _CUTMIX = 2, 3, 4


def normalize(
  images: UInt8[Array, 'B H W C'] | UInt8[np.ndarray, 'B H W C'],
  mean: Sequence[float],
  std: Sequence[float],
  dtype: jnp.dtype = jnp.float32,
) -> Float[Array, 'B H W C']:
  """(images / 255 - mean) / std per channel, computed in float32 and returned in `dtype`."""
  scaled: Any = images.astype(jnp.float32) / 255
  return ((scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)).astype(dtype)


def image_keys(
  seed: Int[Array, ''] | int, epoch: Int[Array, ''] | int, step: Int[Array, ''] | int, places: Int[Array, ' B']
) -> Key[Array, ' B']:
  """One random key per image, independent of the number of devices that share the batch.

  Args:
    seed, epoch, step: of the run; may be traced int32.
    places: the images' places in the global batch.
  """
  key = jax.random.key(seed)
  for part in (_AUGMENT_STREAM, epoch, step):
    key = jax.random.fold_in(key, part)
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, places)


def alternately_mirrored(
  seed: Int[Array, ''] | int, epoch: Int[Array, ''] | int, indices: Int[Array, ' B']
) -> Bool[Array, ' B']:
  """Whether each image is mirrored in this epoch: at random in epoch 0, then in every other one (Jordan 2024).

  Args:
    indices: the images' places in the training set.
  """
  key = jax.random.fold_in(jax.random.key(seed), _MIRROR_STREAM)
  first = jax.vmap(lambda index: jax.random.bernoulli(jax.random.fold_in(key, index)))(indices)
  return first ^ (epoch % 2 == 1)


def augment(
  keys: Key[Array, ' B'],
  images: Num[Array, 'B H W C'],
  *,
  crop_padding: int,
  flip: bool,
  cutout: int = 0,
  mirrored: Bool[Array, ' B'] | None = None,
) -> Num[Array, 'B H W C']:
  """Randomly shifts images by up to crop_padding pixels, mirrors half of them, and cuts a square out of each.

  Runs on normalized images: the border that a shift uncovers and the square are 0, which is the training set's mean
  color (as in DenseNet's code, which pads after normalization).

  Args:
    keys: of `image_keys`.
    crop_padding: pixels added on each side before cropping to H x W again; 0: no crop.
    flip: whether to mirror left and right with probability 1/2.
    cutout: side of the square in pixels, centered anywhere in the image (DeVries and Taylor 2017); 0: no square.
    mirrored: which images to mirror instead.
  """

  def augment_one(key: jax.Array, image: jax.Array, mirror: jax.Array | None) -> jax.Array:
    crop_key, flip_key = jax.random.split(key)
    if crop_padding:
      row, column = jax.random.randint(crop_key, (2,), 0, 2 * crop_padding + 1)
      padded = jnp.pad(image, ((crop_padding, crop_padding), (crop_padding, crop_padding), (0, 0)))
      image = jax.lax.dynamic_slice(padded, (row, column, jnp.zeros_like(row)), image.shape)
    if flip:
      image = jnp.where(jax.random.bernoulli(flip_key) if mirror is None else mirror, image[:, ::-1], image)
    return _cut_out(jax.random.fold_in(key, _CUTOUT), image, cutout) if cutout else image

  return jax.vmap(augment_one, in_axes=(0, 0, None if mirrored is None else 0))(keys, images, mirrored)


def _cut_out(key: jax.Array, image: Num[Array, 'H W C'], side: int) -> Num[Array, 'H W C']:
  center = jax.random.randint(key, (2,), 0, jnp.asarray(image.shape[:2]))
  rows, columns = (
    (jnp.arange(size) >= place - side // 2) & (jnp.arange(size) < place - side // 2 + side)
    for size, place in zip(image.shape, center, strict=False)
  )
  return jnp.where((rows[:, None] & columns)[..., None], jnp.zeros_like(image), image)


def mixup(
  keys: Key[Array, ' B'],
  images: Float[Array, 'B H W C'],
  labels: Float[Array, 'B classes'],
  *,
  alpha: float,
  axis_name: str | None = None,
) -> tuple[Float[Array, 'B H W C'], Float[Array, 'B classes']]:
  """Blends each augmented image and its one-hot label with those at the mirrored place of the global batch.

  Place p of B gets m x[p] + (1 - m) x[B - 1 - p], with m drawn from Beta(alpha, alpha) for each image (Zhang et al.
  2018). The order of a batch is random, so the partner is too; on several devices, all partners of one device's images
  are on one other device.

  Args:
    keys: of `image_keys`.
    alpha: above 0; the higher, the more even the blend.
    axis_name: device axis that the batch is split over, in order.
  """
  share = jax.vmap(lambda key: jax.random.beta(jax.random.fold_in(key, _MIXUP), alpha, alpha))(keys)

  def blend(values: jax.Array) -> jax.Array:
    own = share.reshape(-1, *[1] * (values.ndim - 1)).astype(values.dtype)
    return own * values + (1 - own) * _mirrored(values, axis_name)

  return blend(images), blend(labels)


def cutmix(
  keys: Key[Array, ' B'],
  images: Float[Array, 'B H W C'],
  labels: Float[Array, 'B classes'],
  *,
  alpha: float,
  axis_name: str | None = None,
) -> tuple[Float[Array, 'B H W C'], Float[Array, 'B classes']]:
  """Puts a box of the image at the mirrored place of the global batch into each image (Yun et al. 2019).

  The box has the sides of the image times sqrt(1 - m), with m drawn from Beta(alpha, alpha), and its center anywhere in
  the image. Labels are shared by area, as far as the box lies in the image. Partners are those of `mixup`.

  Args:
    keys: of `image_keys`.
    alpha: above 0.
    axis_name: device axis that the batch is split over, in order.
  """

  def box(key: jax.Array) -> jax.Array:
    share_key, center_key = jax.random.split(jax.random.fold_in(key, _CUTMIX))
    side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha))
    centers = jax.random.randint(center_key, (2,), 0, jnp.asarray(images.shape[1:3]))
    return box_mask(images.shape[1:3], centers, side)

  inside = jax.vmap(box)(keys)
  own = 1 - jnp.mean(inside.astype(labels.dtype), axis=(1, 2))[:, None]
  mixed = jnp.where(inside[..., None], _mirrored(images, axis_name), images)
  return mixed, own * labels + (1 - own) * _mirrored(labels, axis_name)


def box_mask(shape: tuple[int, ...], center: Int[Array, '2'], side: Float[Array, '']) -> Bool[Array, 'H W']:
  """The pixels of a box, as far as it lies in an image.

  Args:
    shape: (H, W).
    center: row and column.
    side: of the box, as a share of the image's sides.
  """
  ranges = []
  for size, place in zip(shape, center, strict=False):
    length = jnp.floor(size * side).astype(jnp.int32)
    first = place - length // 2
    ranges.append((jnp.arange(size) >= first) & (jnp.arange(size) < place + length // 2))
  rows, columns = ranges
  return rows[:, None] & columns


def _mirrored(values: jax.Array, axis_name: str | None) -> jax.Array:
  if axis_name:
    last = jax.lax.axis_size(axis_name) - 1
    values = jax.lax.ppermute(values, axis_name, [(device, last - device) for device in range(last + 1)])
  return values[::-1]
