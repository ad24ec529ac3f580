"""Splits whose images stay in their files, after one pass over all of them.

The pass reads every image once, in worker processes, and finds the labels, which images are readable, and the mean and
standard deviation of the training images. The result is kept in PARANET_CACHE_DIR (default ~/.cache/paranet_jax) until
the files or the image size change.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from paranet_jax.data.cache import (
  DAMAGE,
  Decoded,
  check_readable,
  entry_folder,
  read_arrays,
  statistics_of_sums,
  write_arrays,
)
from paranet_jax.data.dataset import Records, Source, Split, StoredImages
from paranet_jax.data.stream import Stream

_CHUNK = 256  # Images read at a time.
_FILE = 'stored.npz'


def load_stored(source: Source, image_side: int, channels: int, workers: int | None) -> Decoded:
  """The source's splits with stored images, in the same order and with the same statistics as when decoded.

  Args:
    workers: processes for the pass over all images, see `Stream`.

  Raises:
    UserError: an image is damaged and must not be skipped, or all images of a class are.
  """
  image_shape = (image_side, image_side, channels)
  path = None if source.fingerprint is None else entry_folder(source, image_shape) / _FILE
  facts = path and _restore(path)
  if not facts:
    facts = _scan(source, image_shape, workers)
    if path:
      _save(path, facts)
  splits = {}
  for split in ('train', 'test'):
    readable = np.flatnonzero(facts[f'{split}_readable'])
    stored = StoredImages(source.records(split), readable, image_shape)
    splits[split] = Split(stored, facts[f'{split}_labels'][readable])
  return Decoded(**splits, mean=facts['mean'], std=facts['std'])


@dataclass(frozen=True)
class _Chunks:
  """For each chunk of images: labels, which are readable, and the sums of the pixel values and of their squares."""

  records: Records
  channels: int

  def __len__(self) -> int:
    return -(-len(self.records) // _CHUNK)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    chosen = range(index * _CHUNK, min((index + 1) * _CHUNK, len(self.records)))
    images, labels = self.records.read(chosen)
    sums = np.zeros((2, self.channels), np.uint64)
    for image in images:
      if image is not None:
        pixels = image.reshape(-1, self.channels).astype(np.uint64)
        sums += np.stack([pixels.sum(axis=0), np.square(pixels).sum(axis=0)])
    return {'labels': labels, 'readable': np.array([image is not None for image in images]), 'sums': sums}


def _scan(source: Source, image_shape: tuple[int, int, int], workers: int | None) -> dict[str, Any]:
  facts = {}
  for split in ('train', 'test'):
    records = source.records(split)
    logging.info('Reading the %d %s images of %s once', len(records), split, source.name)
    with Stream(_Chunks(records, image_shape[-1]), workers) as chunks:
      found = list(chunks)
    labels, readable = (np.concatenate([chunk[name] for chunk in found]) for name in ('labels', 'readable'))
    check_readable(source, split, labels, readable)
    facts |= {f'{split}_labels': labels, f'{split}_readable': readable}
    if split == 'train':
      total, squares = np.sum([chunk['sums'] for chunk in found], axis=0).astype(np.float64)
      pixels = int(readable.sum()) * image_shape[0] * image_shape[1]
      facts['mean'], facts['std'] = statistics_of_sums(total, squares, pixels)
  return facts


def _restore(path: Path) -> dict[str, np.ndarray] | None:
  try:
    return read_arrays(path)
  except DAMAGE as error:
    if path.exists():
      logging.warning('%s is damaged and will be written again: %s', path, error)
    return None


def _save(path: Path, facts: dict[str, Any]) -> None:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(path, facts)
  except OSError as error:
    logging.warning('Continuing without writing %s: %s', path, error)
