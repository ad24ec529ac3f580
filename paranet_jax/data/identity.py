"""Which image is which, by content: identities, the splits that follow from them, and what a run recorded of both.

The identity of an image is a 64-bit hash of its encoded content, so neither its name nor its place matters. A split
draws the images whose seeded hash is below a limit, one per class: adding or removing an image moves no other one.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Bool, Int32, Int64, UInt64

from paranet_jax.data.dataset import Images, Labels, Records, Split, quotas
from paranet_jax.host.errors import UserError

SEEDS = {'held_out': 100, 'test': 2017}
"""Independent of a run's seed, so that all runs share their splits."""

Identities = UInt64[np.ndarray, ' N']

_ACCEPT = 'or set --accept_data_changes, which keeps the classes that the run learned'


def identities(contents: Iterable[bytes]) -> Identities:
  """The identity of each content."""
  return np.array(
    [int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), 'little') for content in contents], np.uint64
  )


def read_identified(records: Records, numbers: Sequence[int]) -> tuple[Sequence[Images | None], Labels, Identities]:
  """Reads records with their identities: of the decoded pixels where the records have no `read_identified`."""
  own = getattr(records, 'read_identified', None)
  if own:
    return own(numbers)
  images, labels = records.read(numbers)
  return images, labels, identities(b'' if image is None else image.tobytes() for image in images)


class Limits(NamedTuple):
  """What is drawn of each class: every content with a seeded hash below `bound`, and `copies` of the one at it.

  Copies of one content stay together, unless a class has no other content.

  Attributes:
    asked: what the configuration asked for: `held_out` or `test_fraction`.
  """

  bound: UInt64[np.ndarray, ' classes']
  copies: Int64[np.ndarray, ' classes']
  asked: float


def choose_limits(labels: Labels, ids: Identities, count: int, split: str, asked: float) -> Limits:
  """The limits that draw `count` images, from each class in proportion (see `quotas`).

  Fewer are drawn where copies of one content exceed what is left of a class's quota, and more where those of the first
  content exceed all of it.
  """
  hashes, size = _seeded(ids, split), int(labels.max(initial=-1)) + 1
  bound, copies = np.zeros(size, np.uint64), np.zeros(size, np.int64)
  by_class = np.argsort(labels, kind='stable')
  ends = np.cumsum(np.bincount(labels, minlength=size))
  for label, quota in zip(*quotas(labels, count), strict=True):
    if quota:
      members = by_class[ends[label - 1] if label else 0 : ends[label]]
      values, sizes = np.unique(hashes[members], return_counts=True)
      whole = max(np.searchsorted(np.cumsum(sizes), quota, side='right'), min(len(values) - 1, 1))
      bound[label], copies[label] = values[whole], 0 if whole else quota
  return Limits(bound, copies, asked)


def drawn(limits: Limits, labels: Labels, ids: Identities, split: str) -> Bool[np.ndarray, ' N']:
  """Which images are below the limit of their class, and of every other class that has the same content."""
  hashes, bound = _seeded(ids, split), np.append(limits.bound, np.uint64(0))
  own = bound[np.minimum(labels, len(limits.bound))]
  contents, place = np.unique(ids, return_inverse=True)
  least = np.full(len(contents), np.iinfo(np.uint64).max, np.uint64)
  np.minimum.at(least, place, own)
  chosen = hashes < least[place]
  for label in np.flatnonzero(limits.copies):
    at_limit = np.flatnonzero((labels == label) & (hashes == bound[label]) & (own == least[place]))
    chosen[at_limit[: limits.copies[label]]] = True
  return chosen


def _seeded(ids: Identities, split: str) -> UInt64[np.ndarray, ' N']:
  return _mixed(ids, SEEDS[split])


def _mixed(values: Identities, other: int | np.ndarray) -> UInt64[np.ndarray, ' N']:
  """A hash of each value together with another number: the finalizer of SplitMix64 (Steele et al. 2014)."""
  mixed = values + (np.atleast_1d(other).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
  mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return mixed ^ (mixed >> np.uint64(31))


def fingerprint_of(ids: Identities, labels: Labels) -> str:
  """A hash of the images of a split and their labels, whatever their order."""
  return hashlib.blake2b(np.sort(_mixed(ids, labels)).astype('<u8').tobytes(), digest_size=8).hexdigest()


class Known(NamedTuple):
  """The identity and the label of each image of a split."""

  ids: Identities
  labels: Labels


_NOTHING = Known(np.zeros(0, np.uint64), np.zeros(0, np.int32))


@dataclass(frozen=True)
class Learned:
  """What a run recorded of the data that it learned from.

  Attributes:
    workdir: of the run, for messages.
    class_names, mean, std: None where the record lacks them.
    by_position: version 0.1.0 drew its splits so, and recorded no images.
    count: of its images, in all splits; None: not recorded.
    splits: 'train', 'held_out' and 'test'; empty where the images are not known.
    limits: of the splits that were drawn by identity.
    brought: classes, mean and std came with weights from elsewhere, and nothing has been learned yet: a new run.
    accept_changes: of classes and labels.
    silent: what changed is logged by another process.
  """

  workdir: Path
  class_names: tuple[str, ...] | None = None
  mean: tuple[float, ...] | None = None
  std: tuple[float, ...] | None = None
  by_position: bool = False
  count: int | None = None
  splits: dict[str, Known] = field(default_factory=dict)
  limits: dict[str, Limits] = field(default_factory=dict)
  brought: bool = False
  accept_changes: bool = False
  silent: bool = False

  @property
  def everything(self) -> Known:
    """The images of all splits."""
    return Known(*map(np.concatenate, zip(*self.splits.values(), strict=True)))

  def log(self, text: str, *arguments: object) -> None:
    """Logs how the data differs from what the run learned."""
    if not self.silent:
      logging.warning(text, *arguments)

  def trained_on(self, split: str, ids: Identities) -> Bool[np.ndarray, ' N']:
    """Which of a split's images the run was trained on, but for copies that it had in both."""
    if not self.splits:
      return np.zeros(len(ids), bool)
    return np.isin(ids, self.splits['train'].ids) & ~np.isin(ids, self.splits[split].ids)

  def kept_from_training(self, split: str, ids: Identities) -> Bool[np.ndarray, ' N']:
    """Which of these images were in another split, and not trained on."""
    return np.isin(ids, self.splits[split].ids) & ~np.isin(ids, self.splits['train'].ids)


def together(records: Sequence[Learned | None]) -> Learned | None:
  """The first record, with the training images of all; what any was trained on is no image of another split.

  The first one may be of version 0.1.0, which recorded no images: its splits are drawn as it drew them, and the images
  of the others are still left out.
  """
  first = next(iter(records), None)
  known = [record for record in records if record and record.splits]
  if first is None or not known:
    return first
  splits = dict(first.splits or dict.fromkeys(known[0].splits, _NOTHING))
  for record in known:
    more = ~np.isin(record.splits['train'].ids, splits['train'].ids)
    splits['train'] = Known(
      *(np.concatenate([a, b[more]]) for a, b in zip(splits['train'], record.splits['train'], strict=True))
    )
    for name in splits.keys() - {'train'}:
      kept = ~record.trained_on(name, splits[name].ids)
      splits[name] = Known(*(values[kept] for values in splits[name]))
  return replace(first, splits=splits)


def label_map(names: Sequence[str], known: Known, learned: Learned, place: str) -> Int32[np.ndarray, ' classes'] | None:
  """The learned label of each class of the data; -1: of a class that the run does not know. None: nothing changed.

  A class has its name's label, whatever the order: `compare` finds labels that changed. One with an unknown name has
  the label that most of its images had, and the only one left that of the only class that is gone.

  Args:
    names: the classes of the data.
    known: its images.
    place: of the data, for messages.

  Raises:
    UserError: the classes changed, and that was not accepted.
  """
  own = learned.class_names
  if own is None or tuple(names) == own:
    return None
  recorded = learned.everything.labels if learned.splits else np.zeros(0, np.int32)
  if not learned.by_position and set(names) <= set(own):  # In another order, or without classes that had no images.
    labels = np.array([own.index(name) for name in names], np.int32)
    if np.isin(recorded, labels).all():
      return labels
  if not learned.accept_changes and not learned.splits and not learned.by_position:
    odd = next(name for name in names if name not in own)
    raise UserError(
      f'expected folders named after the {len(own)} classes of the weights, such as {own[0]!r}, found {odd!r} in '
      f'{place}: rename or remove it, or set --classes of adopt, which learns the classes of the folders'
    )
  if not learned.accept_changes:
    with_images = [name for label, name in enumerate(own) if not learned.splits or label in recorded]
    raise UserError(_class_difference(tuple(names), own, with_images, learned.workdir, place))
  labels = [
    own.index(name) if name in own else _majority(known.ids[known.labels == label], learned)
    for label, name in enumerate(names)
  ]
  gone = sorted(set(range(len(own))) - set(labels))
  if labels.count(-1) == len(gone) == 1:
    labels[labels.index(-1)] = gone[0]
  return np.array(labels, np.int32)


def _class_difference(
  names: tuple[str, ...], own: tuple[str, ...], with_images: Sequence[str], workdir: Path, place: str
) -> str:
  added, gone = ([name for name in these if name not in those] for these, those in ((names, own), (with_images, names)))
  expected = f'expected the {len(own)} classes that the run in {workdir} learned'
  if added and not gone:
    return (
      f'{expected}, found class {added[0]!r} added to {place}: remove it, train a new run with another --workdir, or '
      'set --accept_data_changes, which leaves its images out'
    )
  if gone and not added:
    return f'{expected}, found no class {gone[0]!r} in {place}: restore it, {_ACCEPT}'
  for old, new in ((old, new) for old in gone for new in added):
    if unicodedata.normalize('NFC', old) == unicodedata.normalize('NFC', new):  # Printed, they are the same.
      return (
        f'{expected}, found {ascii(new)} in {place}, which was {ascii(old)} (they differ only in their Unicode form): '
        f'restore it, train a new run with another --workdir, {_ACCEPT}'
      )
  number = next(i for i, (name, learned) in enumerate(zip(names, own, strict=False)) if name != learned)
  return (
    f'{expected}, found {names[number]!r} as class {number + 1} of {place}, which was {own[number]!r}: restore it, '
    f'train a new run with another --workdir, {_ACCEPT}'
  )


def _majority(ids: Identities, learned: Learned) -> int:
  if not learned.splits:
    return -1
  every = learned.everything
  votes = np.bincount(every.labels[np.isin(every.ids, ids)])
  return int(votes.argmax()) if len(votes) else -1


def compare(learned: Learned, splits: dict[str, Known], place: str) -> list[str]:
  """Compares the images with what the run recorded; returns a line for each thing that changed.

  Args:
    splits: now, with the learned labels.
    place: of the data, for messages.

  Raises:
    UserError: labels changed, or no image is left that the run was trained on, and that was not accepted.
  """
  if learned.by_position:
    return _compare_count(learned, sum(len(known.ids) for known in splits.values()), place)
  if not learned.splits:
    return []
  recorded = learned.splits.items()
  if all(fingerprint_of(*known) == fingerprint_of(*splits.get(name, _NOTHING)) for name, known in recorded):
    return []
  before, now = learned.everything, Known(*map(np.concatenate, zip(*splits.values(), strict=True)))
  changed = np.isin(now.ids, before.ids) & ~np.isin(_mixed(*now), _mixed(*before))
  if changed.any() and not learned.accept_changes:
    first = int(np.flatnonzero(changed)[0])
    old, new = int(before.labels[before.ids == now.ids[first]][0]), int(now.labels[first])
    old_name, new_name = (_name(learned, label) for label in (old, new))
    raise UserError(
      f'expected the labels that the run in {learned.workdir} learned, found {changed.sum():,} images of {place} with '
      f'another class, the first {new_name!r}, which was {old_name!r}: restore them, train a new run with another '
      f'--workdir, {_ACCEPT}'
    )
  if not np.isin(learned.splits['train'].ids, now.ids).any() and not learned.accept_changes:
    raise UserError(
      f'expected the images that the run in {learned.workdir} was trained on, found none of them in {place}: set '
      f'--data_dir to their place, or --accept_data_changes to use these'
    )
  counts = {name: _added_and_gone(splits[name].ids, known.ids) for name, known in recorded if name in splits}
  if not any(map(any, counts.values())):
    return []
  text = '; '.join(f'{split} {added:,} added, {gone:,} gone' for split, (added, gone) in counts.items())
  what = 'changed' if any(_added_and_gone(now.ids, before.ids)) else 'are in other splits'
  return [f'the images of {place} {what} since the run in {learned.workdir} was trained ({text})']


def _compare_count(learned: Learned, count: int, place: str) -> list[str]:
  if learned.count not in (None, count) and not learned.accept_changes:
    raise UserError(
      f'expected the {learned.count:,} images that the run in {learned.workdir} learned from, found {count:,} in '
      f'{place}: version 0.1.0 drew its splits by position, so images that it was trained on would be held out; '
      'restore them, train a new run with another --workdir, or set --accept_data_changes'
    )
  return [f'the run in {learned.workdir} has no fingerprint of its images (version 0.1.0), so no change is noticed']


def _name(learned: Learned, label: int) -> str:
  names = learned.class_names or ()
  return names[label] if label < len(names) else f'class {label}'


def _added_and_gone(now: Identities, before: Identities) -> tuple[int, int]:
  """How many images, with their copies, are only in the first, and how many only in the second."""
  contents, place = np.unique(np.concatenate([now, before]), return_inverse=True)
  copies = [np.bincount(part, minlength=len(contents)) for part in (place[: len(now)], place[len(now) :])]
  more = copies[0] - copies[1]
  return int(more[more > 0].sum()), int(-more[more < 0].sum())


def known_of(split: Split | None) -> Known:
  """The identities and labels of a split; none where there is no split."""
  if split is None or split.identities is None:
    return _NOTHING
  return Known(split.identities, np.asarray(split.labels))
