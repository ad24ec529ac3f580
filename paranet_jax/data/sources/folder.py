"""A folder of the user's own images, one folder per class."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Int32, UInt8
from ml_collections import ConfigDict
from PIL import UnidentifiedImageError

from paranet_jax.data.cache import fingerprint
from paranet_jax.data.dataset import Source, max_drawable
from paranet_jax.data.identity import Identities, identities
from paranet_jax.host.errors import UserError
from paranet_jax.portable.run import SUFFIXES, decode_image

_SUFFIXES = SUFFIXES[:4]  # Prediction also reads .gif, .bmp and .tif.

_ByClass = dict[str, list[Path]]


def folder_source(data_config: ConfigDict, image_side: int, channels: int) -> Source:
  """Images in `data_dir`/train/<class>/ and `data_dir`/test/<class>/, or only in `data_dir`/<class>/.

  In the second form `test_fraction` of the images, stratified by class, become the test split, chosen by their content.
  Suffixes are .png, .jpg, .jpeg and .webp in any case; hidden files are ignored; class names are sorted. Images are
  scaled so that the short side is `image_side`, then center-cropped (see `fit_image`). An image that cannot be decoded
  is an error if `on_corrupt` is 'refuse', and is left out if it is 'skip'.

  Raises:
    UserError: the folder, its images or its classes are missing or do not fit.
  """
  on_corrupt = data_config.on_corrupt
  if on_corrupt not in ('refuse', 'skip'):
    raise UserError(f"expected 'refuse' or 'skip', found {on_corrupt!r}: set --config.data.on_corrupt=skip")
  if not data_config.data_dir:
    raise UserError('expected a folder of images, found none given: name it with --config.data.data_dir=...')
  root = Path(data_config.data_dir).expanduser()
  if not root.is_dir():
    raise UserError(f'expected a folder of images, found no folder {root}: name it with --config.data.data_dir=...')
  splits, test_count = _find_splits(root), None
  if splits is None:
    splits = {'train': _find_classes(root)}
    test_count = _count_tested(root, splits['train'], data_config.test_fraction)
  class_names = sorted(splits['train'])
  if len(class_names) < 2:
    raise UserError(f'expected 2 class folders or more, found only {class_names[0]!r} in {root}: add another class')
  listed = {split: _flatten(by_class, class_names) for split, by_class in splits.items()}

  def records(split: str) -> _FolderRecords:
    files, labels = listed[split]
    return _FolderRecords(list(map(str, files)), labels, image_side, channels, skip_corrupt=on_corrupt == 'skip')

  all_files = [file for files, _ in listed.values() for file in files]
  return Source(
    name='folder',
    version='',
    class_names=tuple(class_names),
    records=records,
    fingerprint=fingerprint(root, all_files, data_config.test_fraction, on_corrupt),
    test_count=test_count,
    test_share=data_config.test_fraction,
  )


def _find_splits(root: Path) -> dict[str, _ByClass] | None:
  """The images in train/ and test/; None if neither exists."""
  present = [split for split in ('train', 'test') if (root / split).is_dir()]
  if not present:
    return None
  if len(present) == 1:
    raise UserError(
      f'expected both train/ and test/ in {root}, found only {present[0]}/: add the other, or name one folder of '
      f'class folders with --config.data.data_dir=... and a share of it with --config.data.test_fraction=0.2'
    )
  splits = {split: _find_classes(root / split) for split in present}
  if unknown := sorted(splits['test'].keys() - splits['train'].keys()):
    raise UserError(f'expected the classes of {root}/train, found {", ".join(unknown)} in {root}/test only: move them')
  return splits


def _find_classes(folder: Path) -> _ByClass:
  """The images of each class folder; there is at least one per class."""
  by_class = {
    entry.name: sorted(f for f in entry.iterdir() if f.suffix.lower() in _SUFFIXES and not f.name.startswith('.'))
    for entry in folder.iterdir()
    if entry.is_dir() and not entry.name.startswith('.')
  }
  expected = f'expected <class>/*{"|".join(_SUFFIXES)} in {folder}'
  if not any(by_class.values()):
    raise UserError(f'{expected}, found no images there: name another folder with --config.data.data_dir=...')
  if empty := sorted(name for name, files in by_class.items() if not files):
    raise UserError(f'{expected}, found no images of class {empty[0]!r}: add some or remove {folder / empty[0]}')
  return by_class


def _count_tested(root: Path, by_class: _ByClass, test_fraction: float) -> int:
  """How many images of one folder of class folders are drawn for the test split."""
  files, labels = _flatten(by_class, sorted(by_class))
  count = round(test_fraction * len(files))
  if not 1 <= count <= max_drawable(labels):
    raise UserError(
      f'expected a share that leaves each of {len(by_class)} classes an image to train on and at least one to test on, '
      f'found {test_fraction} of {len(files)} images in {root}: set --config.data.test_fraction=0.2'
    )
  return count


def _flatten(by_class: _ByClass, class_names: Sequence[str]) -> tuple[list[Path], Int32[np.ndarray, ' N']]:
  """All files, ordered by class, and their labels."""
  by_label = [by_class.get(name, []) for name in class_names]
  labels = np.repeat(np.arange(len(class_names), dtype=np.int32), [len(files) for files in by_label])
  return [file for files in by_label for file in files], labels


@dataclass(frozen=True)
class _FolderRecords:
  files: list[str]  # Paths would take many times the memory, in each worker.
  labels: Int32[np.ndarray, ' N']
  image_side: int
  channels: int
  skip_corrupt: bool

  def __len__(self) -> int:
    return len(self.files)

  def read(self, numbers: Sequence[int]) -> tuple[list[UInt8[np.ndarray, 'H W C'] | None], Int32[np.ndarray, ' n']]:
    return [self._decode(file, _encoded(file)) for file in self._chosen(numbers)], self.labels[list(numbers)]

  def read_identified(
    self, numbers: Sequence[int]
  ) -> tuple[list[UInt8[np.ndarray, 'H W C'] | None], Int32[np.ndarray, ' n'], Identities]:
    files = self._chosen(numbers)
    contents = [_encoded(file) for file in files]
    images = [self._decode(file, encoded) for file, encoded in zip(files, contents, strict=True)]
    return images, self.labels[list(numbers)], identities(contents)

  def _chosen(self, numbers: Sequence[int]) -> list[str]:
    return [self.files[number] for number in numbers]

  def _decode(self, file: str, encoded: bytes) -> UInt8[np.ndarray, 'H W C'] | None:
    try:
      return decode_image(encoded, self.image_side, self.channels)
    except Exception as error:  # Damaged bytes make Pillow raise nearly anything, not only OSError.
      unknown = isinstance(error, UnidentifiedImageError)  # Its message names an object in memory, not the file.
      reason = 'no known image format' if unknown else ' '.join(str(error).split()) or type(error).__name__
      if self.skip_corrupt:
        logging.warning('Skipping corrupt image %s: %s', file, reason)
        return None
      raise UserError(
        f'expected an image, found a corrupt file {file} ({reason}): fix or remove it, or set '
        f'--config.data.on_corrupt=skip'
      ) from error


def _encoded(file: str) -> bytes:
  try:
    return Path(file).read_bytes()
  except OSError as error:
    raise UserError(f'expected a readable image, found {error.strerror} at {file}: change its permissions') from error
