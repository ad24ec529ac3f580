"""Splits whose images stay in their files, after one pass over all of them.

The pass reads every image once, in worker processes, and finds labels, identities, which images are readable, and the
mean and standard deviation of the training images. The result is kept in PARANET_CACHE_DIR (default
~/.cache/paranet_jax) until the files or the image size change.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from paranet_jax.data.cache import (
  Decoded,
  Listing,
  entry_folder,
  read_arrays,
  statistics_of_sums,
  sweep_cache,
  trained_indices,
  write_arrays,
)
from paranet_jax.data.dataset import Records, Source, StoredImages
from paranet_jax.data.identity import read_identified
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
  path = None
  if source.fingerprint is not None:
    sweep_cache()
    path = entry_folder(source, image_shape) / _FILE
  facts = path and _restore(path)
  if not facts:
    facts = _scan(source, image_shape, workers)
    if path:
      _save(path, facts)
  listings = {split: Listing(*(facts[f'{split}_{name}'] for name in Listing._fields)) for split in source.splits}
  images = {
    split: StoredImages(source.records(split), np.flatnonzero(listing.readable), image_shape)
    for split, listing in listings.items()
  }
  return Decoded(images, listings, mean=facts['mean'], std=facts['std'])


@dataclass(frozen=True)
class _Chunks:
  """Chunks of the listing, with the sums of each image's pixel values and of their squares, uint64 [n, 2, C]."""

  records: Records
  channels: int

  def __len__(self) -> int:
    return -(-len(self.records) // _CHUNK)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    chosen = range(index * _CHUNK, min((index + 1) * _CHUNK, len(self.records)))
    images, labels, ids = read_identified(self.records, chosen)
    sums = np.zeros((len(images), 2, self.channels), np.uint64)
    for number, image in enumerate(images):
      if image is not None:
        pixels = image.reshape(-1, self.channels).astype(np.uint64)
        sums[number] = pixels.sum(axis=0), np.square(pixels).sum(axis=0)
    readable = np.array([image is not None for image in images], bool)
    return {**Listing(labels, ids, readable)._asdict(), 'sums': sums}


def _scan(source: Source, image_shape: tuple[int, int, int], workers: int | None) -> dict[str, Any]:
  facts = {}
  for split in source.splits:
    records = source.records(split)
    logging.info('Reading the %d %s images of %s once', len(records), split, source.name)
    with Stream(_Chunks(records, image_shape[-1]), workers) as chunks:
      found = list(chunks)
    listing = Listing(*(np.concatenate([chunk[name] for chunk in found]) for name in Listing._fields))
    facts |= {f'{split}_{name}': values for name, values in listing._asdict().items()}
    if split == 'train':
      chosen = trained_indices(source, listing)
      sums = np.concatenate([chunk['sums'] for chunk in found])[listing.readable][chosen].sum(axis=0)
      total, squares = sums.astype(np.float64)
      facts['mean'], facts['std'] = statistics_of_sums(total, squares, len(chosen) * image_shape[0] * image_shape[1])
  return facts


def _restore(path: Path) -> dict[str, np.ndarray] | None:
  try:
    return read_arrays(path)
  except Exception as error:
    if os.path.exists(path):  # Unlike Path.exists, also False where its folder may not be entered.
      logging.warning('%s is damaged and will be written again: %s', path, error)
    return None


def _save(path: Path, facts: dict[str, Any]) -> None:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(path, facts)
  except OSError as error:
    logging.warning('Continuing without writing %s: %s', path, error)
