"""From the `data` section of a configuration to a decoded data set."""

import difflib
import math
import os

import numpy as np
from absl import logging
from jaxtyping import Bool, Int64
from ml_collections import ConfigDict

from paranet_jax.data.cache import Decoded, Listing, channel_statistics, load_decoded
from paranet_jax.data.dataset import Dataset, Labels, Source, Split, max_drawable, stratified_indices
from paranet_jax.data.identity import (
  SEEDS,
  Identities,
  Known,
  Learned,
  Limits,
  choose_limits,
  compare,
  drawn,
  known_of,
  label_map,
)
from paranet_jax.data.known import known_dataset, registered_names
from paranet_jax.host.arguments import absolute
from paranet_jax.host.errors import UserError

STREAM_ABOVE = 2 * 10**9
"""Bytes of decoded images, both splits together, above which they are streamed: in memory, each device holds them."""


def load_dataset(
  data_config: ConfigDict,
  *,
  image_side: int,
  channels: int,
  num_classes: int | None = None,
  learned: Learned | None = None,
) -> Dataset:
  """Finds, decodes (or takes from the cache) and splits the data set that a configuration names.

  Args:
    data_config: `config.data`, see paranet_jax/base_config.py; crop_padding and flip are the data set's own where they
      are None, see paranet_jax/data/known.py.
    image_side: pixels; images of another size are resized.
    channels: 1 or 3.
    num_classes: outputs of the model; None: the data set's number of classes.
    learned: what a run recorded of the data when it read them first. Its classes, mean, std and limits hold, the images
      are compared with it, and those that it was trained on are left out of the other splits. None: a new run.

  Raises:
    UserError: the configuration, the data or a label does not fit, or not what the run learned.
  """
  if channels not in (1, 3):
    raise UserError(f'expected 1 (gray) or 3 (RGB) channels, found {channels}: set --config.model.channels=3')
  if learned is None:
    return _load(data_config, image_side, channels, num_classes, None)
  try:
    return _load(_at_present_place(data_config, learned), image_side, channels, num_classes, learned)
  except UserError as error:  # Every command that reads a run's data has this flag, but not all have --config.
    raise UserError(str(error).replace('--config.data.data_dir', '--data_dir')) from error


def _at_present_place(data_config: ConfigDict, learned: Learned) -> ConfigDict:
  """The same data set in PARANET_DATA_DIR, if the run's own folder does not exist."""
  place, own = os.environ.get('PARANET_DATA_DIR'), data_config.data_dir
  if not place or (own and absolute(own).exists()):
    return data_config
  if own and known_dataset(data_config.name).in_data_dir:
    learned.log('%s does not exist: reading %s, which PARANET_DATA_DIR names', own, absolute(place))
  data_config = data_config.copy_and_resolve_references()
  data_config.data_dir = str(absolute(place))
  return data_config


def _load(
  data_config: ConfigDict, image_side: int, channels: int, num_classes: int | None, learned: Learned | None
) -> Dataset:
  source = _open(data_config, image_side, channels)
  count = sum(len(source.records(split)) for split in source.splits)
  if streams(data_config, count, (image_side, image_side, channels)):
    from paranet_jax.data.scan import load_stored  # grain takes half a second to import.

    decoded = load_stored(source, image_side, channels, data_config.workers)
  else:
    decoded = load_decoded(source, image_side, channels)
  known = known_dataset(data_config.name)
  if known.labeled:
    _check_labels(decoded, source, None if learned else num_classes)
  crop_padding, flip = augmentation(data_config, image_side)
  place = str(data_config.data_dir) if known.in_data_dir else source.name
  if learned and known.labeled:
    decoded = _with_learned_labels(decoded, source, learned, place)
    _check_labels(decoded, source, num_classes or len(learned.class_names or source.class_names))
  names = learned.class_names if learned and learned.class_names else source.class_names
  if not known.labeled:
    names = names or _numbered(num_classes, place)
  splits, limits, untested = _split(decoded, source, names if known.labeled else (), data_config, learned)
  lost = _leave_out_trained(splits, names, learned, place) if learned else ()
  _check_filled(splits, learned, place)
  if learned is None and not source.by_position:
    _report_shared(splits, place)
  mean, std = decoded.mean, decoded.std
  if learned and learned.mean is None:
    learned.log('No mean and deviation are recorded in %s: taking those of %s', learned.workdir, place)
    if source.test_count is not None:  # A new run would test on other images.
      mean, std = channel_statistics(decoded.images['train'], untested)
  return Dataset(
    name=source.name,
    version=source.version,
    train=splits['train'],
    held_out=splits.get('held_out'),
    test=splits['test'],
    class_names=names,
    mean=learned.mean if learned and learned.mean else tuple(mean.tolist()),
    std=learned.std if learned and learned.std else tuple(std.tolist()),
    crop_padding=crop_padding,
    flip=flip,
    skipped=sum(int((~listing.readable).sum()) for listing in decoded.listings.values()),
    limits=limits,
    lost=lost,
    labeled=known.labeled,
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
  is_url = '://' in name  # No place of a folder: data_dir refuses it.
  if not name or name[0] in '/.~' or is_url:
    raise UserError(
      f'expected the name of a data set, found {name!r}; for a folder of images set --config.data.name=folder '
      f'--config.data.data_dir={"..." if is_url or not name else name}'
    )
  if source := known_dataset(name).open(data_config, image_side, channels):
    return source
  from paranet_jax.data.sources.tfds import dataset_names, unknown_place

  known, (prepared, or_place) = registered_names(), unknown_place(data_config.data_dir)
  near = difflib.get_close_matches(name, dict.fromkeys([*known, *prepared, *dataset_names()])) or known
  raise UserError(f'unknown data set {name!r}; nearest: {", ".join(near)}; set --config.data.name=...{or_place}')


def _numbered(num_classes: int | None, place: str) -> tuple[str, ...]:
  """Names of outputs that nothing names."""
  if num_classes is None:
    raise UserError(
      f'expected the number of classes, which the images without labels in {place} do not tell: set '
      '--config.model.num_classes'
    )
  return tuple(map(unnamed, range(num_classes)))


def unnamed(number: int) -> str:
  """The name of an output that nothing names."""
  return f'class {number}'


def _check_labels(decoded: Decoded, source: Source, num_classes: int | None) -> None:
  limit = len(source.class_names) if num_classes is None else num_classes
  for name in source.splits:
    labels = decoded.split(name).labels
    outside = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(outside):
      raise UserError(
        f'expected labels 0 to {limit - 1} ({limit} classes), found label {labels[outside[0]]} at image '
        f'{outside[0]} of {source.name}: set --config.model.num_classes={len(source.class_names)}'
      )


def _with_learned_labels(decoded: Decoded, source: Source, learned: Learned, place: str) -> Decoded:
  """The images of the classes that the run knows, with the labels that it gives them."""
  every = Known(
    np.concatenate([listing.identities for listing in decoded.listings.values()]),
    np.concatenate([listing.labels for listing in decoded.listings.values()]),
  )
  labels = label_map(source.class_names, every, learned, place)
  if labels is None:
    return decoded
  images, listings = {}, {}
  for name, listing in decoded.listings.items():
    known = labels[listing.labels] >= 0
    images[name] = decoded.split(name).take(np.flatnonzero(known[listing.readable])).images
    own, ids, readable = (values[known] for values in listing)
    listings[name] = Listing(labels[own], ids, readable)
  if left_out := [name for name, label in zip(source.class_names, labels, strict=True) if label < 0]:
    learned.log('Leaving out the images of %s in %s, unknown to the run', ', '.join(left_out), place)
  return Decoded(images, listings, decoded.mean, decoded.std)


def _split(
  decoded: Decoded, source: Source, names: tuple[str, ...], data_config: ConfigDict, learned: Learned | None
) -> tuple[dict[str, Split], dict[str, Limits], Int64[np.ndarray, ' n']]:
  """Draws the splits.

  Args:
    names: of the classes; empty if labels mean nothing.

  Returns:
    'train', 'test' and, if the configuration asks for it, 'held_out'; the limits that drew them; and which images are
    not tested on.
  """
  splits, limits, listing = {}, {}, decoded.listings['train']
  pool, tested = decoded.split('train'), np.zeros(len(listing.labels), bool)
  if source.test_count is None:
    listings = {'train': (listing, ~tested), 'test': (other := decoded.listings['test'], other.labels >= 0)}
    splits['test'] = decoded.split('test')
  else:
    tested, limits['test'] = _draw(
      'test', listing.labels, listing.identities, source.test_count, source.test_share, learned
    )
    listings = {'train': (listing, ~tested), 'test': (listing, tested)}
    splits['test'] = pool.take(np.flatnonzero(tested[listing.readable]))
  for split, (records, members) in listings.items():
    _check_readable(names, split, records, members)
  rest = untested = np.flatnonzero(~tested[listing.readable])
  if count := data_config.held_out:
    labels, ids = listing.labels[listing.readable][rest], listing.identities[listing.readable][rest]
    held_out, limits['held_out'] = _draw('held_out', labels, ids, count, count, learned, source.by_position)
    splits['held_out'] = pool.take(rest[held_out])
    rest = rest[~held_out]
  splits['train'] = pool if len(rest) == len(pool) else pool.take(rest)
  return splits, {name: found for name, found in limits.items() if found}, untested


def _draw(
  split: str,
  labels: Labels,
  ids: Identities,
  count: int,
  asked: float,
  learned: Learned | None,
  by_position: bool = False,
) -> tuple[Bool[np.ndarray, ' N'], Limits | None]:
  """Which images a split has, and the limits that drew it; None: it was drawn by position, as in version 0.1.0."""
  limits = learned.limits.get(split) if learned else None
  if limits and limits.asked == asked:
    return drawn(limits, labels, ids, split), limits
  most = max_drawable(labels)
  if not 0 < count <= most:
    raise UserError(
      f'expected to hold out 0 to {most} of {len(labels)} training images (each class keeps one), found {count}: '
      f'set --config.data.held_out=0'
    )
  if by_position or (learned and learned.by_position):
    chosen = np.zeros(len(labels), bool)
    chosen[stratified_indices(labels, count, SEEDS[split])[1]] = True
    return chosen, None
  limits = choose_limits(labels, ids, count, split, asked)
  return drawn(limits, labels, ids, split), limits


def _check_readable(names: tuple[str, ...], split: str, listing: Listing, members: Bool[np.ndarray, ' N']) -> None:
  """Raises UserError if all images of a class, or of a split without labels, are corrupt."""
  lost = np.setdiff1d(listing.labels[members], listing.labels[members & listing.readable])
  if len(lost):
    of_class = f' of class {names[lost[0]]!r}' if names else ''
    raise UserError(f'expected images{of_class} in {split}, found only corrupt files: fix or remove them')


def _check_filled(splits: dict[str, Split], learned: Learned | None, place: str) -> None:
  """Raises UserError if a split to test on has no images: those drawn are in other classes too, or have gone."""
  for name, flag in (('test', 'test_fraction'), ('held_out', 'held_out')):
    if name in splits and not len(splits[name]):
      fix = f'add images that are in one class only, or raise --config.data.{flag}'
      if learned:
        fix = f'restore those of the run in {learned.workdir}, or train a new run with another --workdir'
      raise UserError(f'expected images in {name} of {place}, found no image drawn for it: {fix}')


def _report_shared(splits: dict[str, Split], place: str) -> None:
  """Says how many test and held-out images of a new run it will be trained on."""
  ids = {name: known_of(split).ids for name, split in splits.items()}
  others = {'test': np.concatenate([own for name, own in ids.items() if name != 'test']), 'held_out': ids['train']}
  for name in splits.keys() & others.keys():
    if shared := np.isin(ids[name], others[name]).sum():
      text = '%s has %d images that are also in train of %s: they do not tell how new ones fare'
      logging.warning(text, name, shared, place)


def _leave_out_trained(
  splits: dict[str, Split], names: tuple[str, ...], learned: Learned, place: str
) -> tuple[str, ...]:
  """Compares the splits with what the run learned from, and drops from 'held_out' and 'test' what it was trained on.

  Returns:
    The classes of which a split has no other images.

  Raises:
    UserError: a split has no other images.
  """
  known = {name: known_of(split) for name, split in splits.items()}
  for line in compare(learned, known, place):
    learned.log('%s', line)
  lost = set()
  for name in splits.keys() - {'train'}:
    if (trained := learned.trained_on(name, known[name].ids)).any():
      splits[name] = splits[name].take(np.flatnonzero(~trained))
      lost |= set(known[name].labels.tolist()) - set(splits[name].labels.tolist())
      if trained.all():
        raise UserError(
          f'expected images in {name} of {place} that the run in {learned.workdir} was not trained on, found none '
          f'({trained.sum():,} left out): restore the splits, or train a new run with another --workdir'
        )
      text = '%s leaves out %d images that the run in %s was trained on; %d stay in'
      learned.log(text, name, trained.sum(), learned.workdir, len(splits[name]))
  for name in learned.splits.keys() - {'train'}:
    if count := learned.kept_from_training(name, known['train'].ids).sum():
      text = 'train has %d images that were in %s of the run in %s: a resumed training learns them'
      learned.log(text, count, name, learned.workdir)
  return tuple(names[label] for label in sorted(lost))
