"""Normalization, random crop and mirroring, to be run inside the jitted step."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

_AUGMENT_STREAM = 1  # Keeps these random numbers apart from the shuffling's.


def normalize(
  images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: jnp.dtype = jnp.float32
) -> jax.Array:
  """uint8 [B, H, W, C] -> (images / 255 - mean) / std a channel, computed in float32, returned in `dtype`."""
  mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
  return ((images.astype(jnp.float32) / 255 - mean) / std).astype(dtype)


def image_keys(seed: jax.Array | int, epoch: jax.Array | int, step: jax.Array | int, places: jax.Array) -> jax.Array:
  """One random key for each image of a batch, whatever the number of devices the batch is spread over.

  Args:
    seed, epoch, step: of the run; may be traced int32.
    places: int32 [B], the images' places in the global batch.

  Returns:
    Random keys [B].
  """
  key = jax.random.key(seed)
  for part in (_AUGMENT_STREAM, epoch, step):
    key = jax.random.fold_in(key, part)
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, places)


def augment(keys: jax.Array, images: jax.Array, *, crop_padding: int, flip: bool) -> jax.Array:
  """Shifts each image by up to crop_padding pixels each way and mirrors every other one, at random.

  Runs on normalized images: the border that a shift uncovers is 0, which there is the training set's mean colour
  (as in DenseNet's code, where padding follows normalization).

  Args:
    keys: random keys [B], of `image_keys`.
    images: [B, H, W, C], any dtype.
    crop_padding: pixels added on each side before cropping to H x W again; 0 for no crop.
    flip: whether to mirror left and right with probability 1/2.

  Returns:
    [B, H, W, C] of the same dtype.
  """

  def augment_one(key: jax.Array, image: jax.Array) -> jax.Array:
    crop_key, flip_key = jax.random.split(key)
    if crop_padding:
      row, column = jax.random.randint(crop_key, (2,), 0, 2 * crop_padding + 1)
      padded = jnp.pad(image, ((crop_padding, crop_padding), (crop_padding, crop_padding), (0, 0)))
      image = jax.lax.dynamic_slice(padded, (row, column, jnp.zeros_like(row)), image.shape)
    if flip:
      image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    return image

  return jax.vmap(augment_one)(keys, images)
