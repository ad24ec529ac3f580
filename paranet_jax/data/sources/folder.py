"""A folder of the user's own images, one folder per class."""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Int32
from ml_collections import ConfigDict

from paranet_jax.data.cache import fingerprint
from paranet_jax.data.dataset import Source, max_drawable
from paranet_jax.data.scaling import scaling_of, scaling_settings
from paranet_jax.data.sources.image_files import ImageFiles, Rest, image_folder, report
from paranet_jax.host.errors import UserError
from paranet_jax.portable.run import SUFFIXES, find_images, is_hidden, is_run, left_out_line, printable

_TRAINS = ('train', 'training')
_TESTS = ('test', 'testing', 'val', 'valid', 'validation')  # The first that exists is the test split.

_ByClass = dict[str, list[Path]]


def folder_source(data_config: ConfigDict, image_side: int, channels: int) -> Source:
  """Images in `data_dir`/train/<class>/ and `data_dir`/test/<class>/, or only in `data_dir`/<class>/.

  The folders may also be called training, and testing, val, valid or validation, in any case. In the second form
  `test_fraction` of the images, stratified by class, become the test split, chosen by their content; a class may be
  called train there. Images also lie in folders below those of their class; which files are images, `run.find_images`
  decides, and what is left out is counted and named in one line. Class names are sorted. Images are scaled so that the
  short side is `short_side` or `image_side`, then center-cropped (see `fit_image`). An image that cannot be decoded, a
  dangling link and what is no regular file are an error if `on_corrupt` is 'refuse', and are left out if it is 'skip'.

  Raises:
    UserError: the folder, its images or its classes are missing or do not fit.
  """
  root, on_corrupt = image_folder(data_config), data_config.on_corrupt
  rest, test_count = Rest(), None
  splits = _find_splits(root, rest)
  if splits is None:
    splits = {'train': _find_classes(root, rest)}
    test_count = _count_tested(root, splits['train'], data_config.test_fraction)
  class_names = sorted(splits['train'])
  if len(class_names) < 2:
    raise UserError(f'expected 2 class folders or more, found only {class_names[0]!r} in {root}: add another class')
  report(rest, on_corrupt)
  listed = {split: _flatten(by_class, class_names) for split, by_class in splits.items()}

  def records(split: str) -> ImageFiles:
    files, labels = listed[split]
    skip, scaling = on_corrupt == 'skip', scaling_of(data_config)
    return ImageFiles(list(map(str, files)), labels, image_side, channels, skip, scaling)

  all_files = [file for files, _ in listed.values() for file in files]
  return Source(
    name='folder',
    version='',
    class_names=tuple(class_names),
    records=records,
    fingerprint=fingerprint(root, all_files, data_config.test_fraction, on_corrupt, *scaling_settings(data_config)),
    test_count=test_count,
    test_share=data_config.test_fraction,
    left_out=len(rest.left_out) + len(rest.beside) + len(rest.unreadable),
  )


def _find_splits(root: Path, rest: Rest) -> dict[str, _ByClass] | None:
  """The images in train/ and test/; None if root holds class folders, of which train may be one."""
  folders = {entry.name.casefold(): entry.name for entry in reversed(_entries(root)) if entry.is_dir()}
  present = [folders[split] for split in (*_TRAINS, *_TESTS) if split in folders]
  splits = [split for split in present if _visible_folders(root / split)]
  train = next((split for split in splits if split.casefold() in _TRAINS), None)
  test = next((split for split in splits if split.casefold() in _TESTS), None)
  if train is None or test is None:
    lone = [split for split in present if not _holds_images(root / split)]
    if not lone:
      _check_class_folders(root, present)
      return None
    found = f'only {splits[0]}/' if splits else f'none in {lone[0]}/'
    raise UserError(
      f'expected both train/ and test/ (or val/) in {root}, with class folders, found {found}: add the other, or name '
      f'one folder of class folders with --config.data.data_dir=... and a share of it with '
      f'--config.data.test_fraction=0.2'
    )
  for entry in _entries(root):
    if entry.name not in (train, test):
      (rest.beside if entry.is_dir() and not is_hidden(entry.name) else rest.left_out).extend(_all_files(entry))
  if rest.beside:
    logging.warning('%s', printable(left_out_line(rest.beside, f'beside {train}/ and {test}/')))
  by_class = {'train': _find_classes(root / train, rest), 'test': _find_classes(root / test, rest)}
  _check_forms([*by_class['train'], *by_class['test']], root)
  _check_apart(by_class['train'], by_class['test'])
  if unknown := sorted(by_class['test'].keys() - by_class['train'].keys()):
    raise UserError(
      f'expected the classes of {root}/{train}, found {", ".join(unknown)} in {root}/{test} only: move them'
    )
  return by_class


def _check_class_folders(root: Path, present: Sequence[str]) -> None:
  """Raises UserError if the only folders are splits whose images are in no class."""
  if len(present) > 1 and {entry.name for entry in _visible_folders(root)} == set(present):
    raise UserError(
      f'expected a folder for each class in {present[0]}/ and {present[1]}/ of {root}, found images directly there: '
      f'move them to folders of their classes'
    )


def _entries(folder: Path) -> list[os.DirEntry]:
  with os.scandir(folder) as entries:
    return sorted(entries, key=lambda entry: entry.name)


def _visible_folders(folder: Path) -> list[os.DirEntry]:
  return [entry for entry in _entries(folder) if entry.is_dir() and not is_hidden(entry.name)]


def _holds_images(folder: Path) -> bool:
  return any(entry.is_file() and entry.name.lower().endswith(SUFFIXES) for entry in _entries(folder))


def _all_files(entry: os.DirEntry) -> list[str]:
  """The file, or all files below the folder."""
  if not entry.is_dir():
    return [entry.path]
  found = find_images(entry.path)
  return [*found.images, *(path for path, _ in found.unreadable), *found.left_out]


def _check_forms(names: Sequence[str], root: Path) -> None:
  """Raises UserError if two names of classes look the same."""
  seen: dict[str, str] = {}
  for name in names:
    other = seen.setdefault(unicodedata.normalize('NFC', name), name)
    if other != name:
      raise UserError(
        f'expected class folders with different names in {root}, found {ascii(other)} and {ascii(name)}, which differ '
        f'only in their Unicode form: rename one to the other'
      )


def _check_shared(by_class: _ByClass) -> None:
  """Raises UserError if images of two classes lie in one folder, as with a link to the folder above both."""
  seen: dict[str, tuple[str, Path]] = {}
  for name, files in by_class.items():
    for folder in dict.fromkeys(file.parent for file in files):
      other, place = seen.setdefault(os.path.realpath(folder), (name, folder))
      if other != name:
        raise UserError(
          f'expected each folder of images in one class, found {place} of class {other!r} and {folder} of class '
          f'{name!r} to be the same: remove the link to it'
        )


def _check_apart(train: _ByClass, test: _ByClass) -> None:
  """Raises UserError if a folder is in both splits, as with a link from one to the other."""
  folders = [dict.fromkeys(file.parent for files in by_class.values() for file in files) for by_class in (train, test)]
  seen = {os.path.realpath(folder): folder for folder in folders[0]}
  for folder in folders[1]:
    if other := seen.get(os.path.realpath(folder)):
      raise UserError(
        f'expected other images to test on than to train on, found {folder} and {other} to be the same folder: '
        f'remove the link to it'
      )


def _find_classes(folder: Path, rest: Rest) -> _ByClass:
  """The images of each class folder, including those in folders below it; there is at least one per class."""
  by_class: _ByClass = {}
  visible = {entry.name for entry in _visible_folders(folder)}
  for entry in _entries(folder):
    if entry.name not in visible:
      rest.left_out += _all_files(entry)
      continue
    found = find_images(entry.path)
    places = set(map(os.path.dirname, found.left_out))
    if found.images or found.unreadable or not any(is_run(os.listdir(place)) for place in places):
      by_class[entry.name] = list(map(Path, found.images))
    rest.unreadable += found.unreadable
    rest.left_out += found.left_out
  _check_forms(sorted(by_class), folder)
  _check_shared(by_class)
  expected = f'expected <class>/*{"|".join(SUFFIXES)} in {folder}'
  if rest.unreadable and not all(by_class.values()):
    path, reason = rest.unreadable[0]
    raise UserError(f'{expected}, found {reason} at {path}: make it readable or remove it')
  if not any(by_class.values()):
    found = 'images but no class folders' if _holds_images(folder) else 'no images'
    raise UserError(f'{expected}, found {found} there: name another folder with --config.data.data_dir=...')
  if empty := sorted(name for name, files in by_class.items() if not files):
    raise UserError(f'{expected}, found no images of class {empty[0]!r}: add some or remove {folder / empty[0]}')
  return by_class


def _count_tested(root: Path, by_class: _ByClass, test_fraction: float) -> int:
  """How many images of one folder of class folders are drawn for the test split."""
  files, labels = _flatten(by_class, sorted(by_class))
  count, most = round(test_fraction * len(files)), max_drawable(labels)
  if not 1 <= count <= most:
    fits = 0.2 if 1 <= round(0.2 * len(files)) <= most else float(f'{1 / len(files):.2g}')
    fix = f'set --config.data.test_fraction={fits}' if most else 'add images: one class at least needs two'
    raise UserError(
      f'expected a share that leaves each of {len(by_class)} classes an image to train on and at least one to test on, '
      f'found {test_fraction} of {len(files)} images in {root}: {fix}'
    )
  return count


def _flatten(by_class: _ByClass, class_names: Sequence[str]) -> tuple[list[Path], Int32[np.ndarray, ' N']]:
  """All files, ordered by class, and their labels."""
  by_label = [by_class.get(name, []) for name in class_names]
  labels = np.repeat(np.arange(len(class_names), dtype=np.int32), [len(files) for files in by_label])
  return [file for files in by_label for file in files], labels
