"""Normalization, random crop, mirroring, cutout and mixup, to be run inside the jitted step."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

_AUGMENT_STREAM = 1  # Keeps these random numbers apart from the shuffling's.
# Of an image's key, beside the crop's and the flip's, which are 0 and 1.
_CUTOUT, _MIXUP = 2, 3


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


def augment(keys: jax.Array, images: jax.Array, *, crop_padding: int, flip: bool, cutout: int = 0) -> jax.Array:
  """Shifts each image by up to crop_padding pixels each way, mirrors every other one and cuts a square out, at random.

  Runs on normalized images: the border that a shift uncovers and the square are 0, which there is the training set's
  mean colour (as in DenseNet's code, where padding follows normalization).

  Args:
    keys: random keys [B], of `image_keys`.
    images: [B, H, W, C], any dtype.
    crop_padding: pixels added on each side before cropping to H x W again; 0 for no crop.
    flip: whether to mirror left and right with probability 1/2.
    cutout: side in pixels of the square, whose middle is anywhere in the image (DeVries and Taylor 2017); 0 for none.

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
    return _cut_out(jax.random.fold_in(key, _CUTOUT), image, cutout) if cutout else image

  return jax.vmap(augment_one)(keys, images)


def _cut_out(key: jax.Array, image: jax.Array, side: int) -> jax.Array:
  middle = jax.random.randint(key, (2,), 0, jnp.asarray(image.shape[:2]))
  rows, columns = (
    (jnp.arange(size) >= place - side // 2) & (jnp.arange(size) < place - side // 2 + side)
    for size, place in zip(image.shape, middle, strict=False)
  )
  return jnp.where((rows[:, None] & columns)[..., None], jnp.zeros_like(image), image)


def mixup(
  keys: jax.Array, images: jax.Array, labels: jax.Array, *, alpha: float, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
  """Blends each image and its label with those at the mirrored place of the global batch (Zhang et al. 2018).

  Place p of B gets m x[p] + (1 - m) x[B - 1 - p], with m from Beta(alpha, alpha), drawn for each image. The order of
  a batch is random, and so the partner is; on several devices each one's partners are all on one other.

  Args:
    keys: random keys [B], of `image_keys`.
    images: [B, H, W, C], float, augmented.
    labels: float [B, classes], one-hot.
    alpha: above 0; the higher, the more even the blend.
    axis_name: device axis over which the batch is spread, in order.

  Returns:
    Images and labels of the same shapes.
  """
  share = jax.vmap(lambda key: jax.random.beta(jax.random.fold_in(key, _MIXUP), alpha, alpha))(keys)

  def blend(values: jax.Array) -> jax.Array:
    own = share.reshape(-1, *[1] * (values.ndim - 1)).astype(values.dtype)
    return own * values + (1 - own) * _mirrored(values, axis_name)

  return blend(images), blend(labels)


def _mirrored(values: jax.Array, axis_name: str | None) -> jax.Array:
  if axis_name:
    last = jax.lax.axis_size(axis_name) - 1
    values = jax.lax.ppermute(values, axis_name, [(device, last - device) for device in range(last + 1)])
  return values[::-1]
