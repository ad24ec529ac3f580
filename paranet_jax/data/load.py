"""From the `data` part of a config to a decoded data set."""

import difflib
import re

import numpy as np
from ml_collections import ConfigDict

from paranet_jax.data.cache import Decoded, load_decoded
from paranet_jax.data.dataset import Dataset, Source, Split
from paranet_jax.data.sources.digits import digits_source
from paranet_jax.data.sources.folder import folder_source
from paranet_jax.data.sources.tfds import dataset_names, tfds_source
from paranet_jax.data.splits import max_drawable, stratified_indices
from paranet_jax.host.errors import UserError

_NUM_CLASSES = {'cifar100': 100, 'cifar10': 10, 'digits': 10, 'imagenet2012': 1000}
# A mirrored character is another character, or none.
_NOT_MIRRORED = ('digits', 'mnist', 'emnist', 'kmnist', 'svhn_cropped', 'omniglot', 'binary_alpha_digits')
_HELD_OUT_SEED = 100

STREAM_ABOVE = 2 * 10**9
"""Bytes of decoded images, of both splits, from which they are streamed: in memory they lie on every device."""


def known_num_classes(name: str) -> int | None:
  """The number of classes of the data set `name`; None where it has to be read first."""
  return _NUM_CLASSES.get(re.split('[/:]', name)[0])


def load_dataset(data_config: ConfigDict, *, image_side: int, channels: int, num_classes: int | None = None) -> Dataset:
  """Finds, decodes (or takes from the cache) and splits the data set a config names.

  Args:
    data_config: the fields of `config.data`, see paranet_jax/base_config.py. Where crop_padding is None, it is
      image_side // 8 pixels (4 at 32, as for CIFAR in DenseNet's code), image_side // 32 for the digits (of 0 to 4 at
      32, 1 was best on held-out digits); where flip is None, images are mirrored unless they are characters.
    image_side: pixels; images of another size are resized.
    channels: 1 or 3.
    num_classes: of the model, where it is not the data set's own.

  Raises:
    UserError: the config, the data or a label does not fit.
  """
  if channels not in (1, 3):
    raise UserError(f'expected 1 (grey) or 3 (RGB) channels, found {channels}: set --config.model.channels=3')
  source = _find_source(data_config, image_side, channels)
  if _streams(data_config.streaming, source, image_side**2 * channels):
    from paranet_jax.data.scan import load_stored  # grain takes half a second to import.

    decoded = load_stored(source, image_side, channels, data_config.workers)
  else:
    decoded = load_decoded(source, image_side, channels)
  for split in (decoded.train, decoded.test):
    _check_labels(split, source, num_classes)
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
    crop_padding=crop_padding_of(data_config, image_side),
    flip=flips(data_config),
    skipped=_count_skipped(source, decoded),
  )


def _find_source(data_config: ConfigDict, image_side: int, channels: int) -> Source:
  name, data_dir = data_config.name, data_config.data_dir
  if name == 'digits':
    return digits_source(image_side, channels)
  if name == 'folder':
    fraction, on_corrupt = data_config.test_fraction, data_config.on_corrupt
    return folder_source(data_dir, image_side, channels, test_fraction=fraction, on_corrupt=on_corrupt)
  source = tfds_source(name, data_dir, image_side, channels)
  if source is None:
    known = ['cifar100', 'cifar10', 'digits', 'folder']
    near = difflib.get_close_matches(name, dict.fromkeys([*known, *dataset_names()])) or known
    raise UserError(f'unknown data set {name!r}; nearest: {", ".join(near)}; set --config.data.name=...')
  return source


def _streams(asked: bool | None, source: Source, image_size: int) -> bool:
  return sum(source.counts.values()) * image_size > STREAM_ABOVE if asked is None else asked


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


def crop_padding_of(data_config: ConfigDict, image_side: int) -> int:
  """Pixels of padding before the random crop, derived if the config does not say."""
  padding = data_config.crop_padding
  if padding is None:
    return image_side // (32 if data_config.name == 'digits' else 8)
  if padding < 0:
    raise UserError(f'expected 0 pixels of padding or more, found {padding}: set --config.data.crop_padding=0')
  return padding


def flips(data_config: ConfigDict) -> bool:
  """Whether images are mirrored at random, derived if the config does not say."""
  if data_config.flip is None:
    return re.split('[/:]', data_config.name)[0] not in _NOT_MIRRORED  # Without tfds's /config and :version.
  return data_config.flip


def _count_skipped(source: Source, decoded: Decoded) -> int:
  return sum(source.counts.values()) - len(decoded.train) - len(decoded.test)
