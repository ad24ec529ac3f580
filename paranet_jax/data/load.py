"""From the `data` section of a configuration to a decoded data set."""

import difflib
import math

import numpy as np
from ml_collections import ConfigDict

from paranet_jax.data.cache import load_decoded
from paranet_jax.data.dataset import Dataset, Source, Split, max_drawable, stratified_indices
from paranet_jax.data.known import known_dataset, registered_names
from paranet_jax.host.errors import UserError

_HELD_OUT_SEED = 100

STREAM_ABOVE = 2 * 10**9
"""Bytes of decoded images, both splits together, above which they are streamed: in memory, each device holds them."""


def load_dataset(data_config: ConfigDict, *, image_side: int, channels: int, num_classes: int | None = None) -> Dataset:
  """Finds, decodes (or takes from the cache) and splits the data set that a configuration names.

  Args:
    data_config: `config.data`, see paranet_jax/base_config.py; crop_padding and flip are the data set's own where they
      are None, see paranet_jax/data/known.py.
    image_side: pixels; images of another size are resized.
    channels: 1 or 3.
    num_classes: outputs of the model; None: the data set's number of classes.

  Raises:
    UserError: the configuration, the data or a label does not fit.
  """
  if channels not in (1, 3):
    raise UserError(f'expected 1 (gray) or 3 (RGB) channels, found {channels}: set --config.model.channels=3')
  source = _open(data_config, image_side, channels)
  counts = {split: len(source.records(split)) for split in ('train', 'test')}
  if streams(data_config, sum(counts.values()), (image_side, image_side, channels)):
    from paranet_jax.data.scan import load_stored  # grain takes half a second to import.

    decoded = load_stored(source, image_side, channels, data_config.workers)
  else:
    decoded = load_decoded(source, image_side, channels)
  for split in (decoded.train, decoded.test):
    _check_labels(split, source, num_classes)
  crop_padding, flip = augmentation(data_config, image_side)
  train, held_out = _hold_out(decoded.train, data_config.held_out)
  return Dataset(
    name=source.name,
    version=source.version,
    train=train,
    held_out=held_out,
    test=decoded.test,
    class_names=source.class_names,
    mean=tuple(decoded.mean.tolist()),
    std=tuple(decoded.std.tolist()),
    crop_padding=crop_padding,
    flip=flip,
    skipped=sum(counts.values()) - len(decoded.train) - len(decoded.test),
  )


def streams(data_config: ConfigDict, count: int, image_shape: tuple[int, int, int]) -> bool:
  """Whether so many images stay in their files, to be read batch by batch."""
  asked = data_config.streaming
  return count * math.prod(image_shape) > STREAM_ABOVE if asked is None else asked


def augmentation(data_config: ConfigDict, image_side: int) -> tuple[int, bool]:
  """Pixels of padding before the random crop, and whether images are mirrored at random.

  Raises:
    UserError: the padding is negative.
  """
  known, padding, flip = known_dataset(data_config.name), data_config.crop_padding, data_config.flip
  if padding is None:
    padding = image_side // known.padding_share
  if padding < 0:
    raise UserError(f'expected 0 pixels of padding or more, found {padding}: set --config.data.crop_padding=0')
  return padding, known.mirrored if flip is None else flip


def _open(data_config: ConfigDict, image_side: int, channels: int) -> Source:
  name = data_config.name
  if source := known_dataset(name).open(data_config, image_side, channels):
    return source
  from paranet_jax.data.sources.tfds import dataset_names

  known = registered_names()
  near = difflib.get_close_matches(name, dict.fromkeys([*known, *dataset_names()])) or known
  raise UserError(f'unknown data set {name!r}; nearest: {", ".join(near)}; set --config.data.name=...')


def _check_labels(split: Split, source: Source, num_classes: int | None) -> None:
  limit = len(source.class_names) if num_classes is None else num_classes
  outside = np.flatnonzero((split.labels < 0) | (split.labels >= limit))
  if len(outside):
    raise UserError(
      f'expected labels 0 to {limit - 1} ({limit} classes), found label {split.labels[outside[0]]} at image '
      f'{outside[0]} of {source.name}: set --config.model.num_classes={len(source.class_names)}'
    )


def _hold_out(train: Split, count: int) -> tuple[Split, Split | None]:
  if not count:
    return train, None
  most = max_drawable(train.labels)
  if not 0 < count <= most:
    raise UserError(
      f'expected to hold out 0 to {most} of {len(train)} training images (each class keeps one), found {count}: '
      f'set --config.data.held_out=0'
    )
  kept, drawn = stratified_indices(train.labels, count, _HELD_OUT_SEED)
  return train.take(kept), train.take(drawn)
