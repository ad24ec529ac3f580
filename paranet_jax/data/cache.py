"""Decoded splits, written to PARANET_CACHE_DIR (default ~/.cache/paranet_jax) once and memory-mapped from there.

An entry is a folder: train.npy and test.npy (uint8 images; train.npy alone where the test split is drawn from it) and
index.npz (what is known of every record, statistics, checksums). The index is written last, and its checksums show
whether the entry is complete.
"""

import hashlib
import io
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Bool, Float64, Int, UInt8

from paranet_jax.data.dataset import Images, Labels, Source, Split, StoredImages
from paranet_jax.data.identity import Identities, choose_limits, drawn, read_identified
from paranet_jax.host.arguments import cache_folder
from paranet_jax.host.files import replacing, sweep

_FORMAT = 3  # Increase it when decoding or this layout changes, so that old entries are not found.
_READ = 512  # Images read at a time.
_CHUNK = 4096  # Images converted to float64 at a time.


class Listing(NamedTuple):
  """What is known of every record, in order; only the readable ones have an image."""

  labels: Labels
  identities: Identities
  readable: Bool[np.ndarray, ' N']


@dataclass(frozen=True)
class Decoded:
  """The readable images and the listing of each of a source's splits.

  Attributes:
    mean, std: of the training images of a new run, for pixel values in 0..1.
  """

  images: Mapping[str, Images | StoredImages]
  listings: Mapping[str, Listing]
  mean: Float64[np.ndarray, ' C']
  std: Float64[np.ndarray, ' C']

  def split(self, name: str) -> Split:
    """The readable examples."""
    labels, identities, readable = self.listings[name]
    return Split(self.images[name], labels[readable], identities[readable])


def load_decoded(source: Source, image_side: int, channels: int) -> Decoded:
  """The source's splits, memory-mapped from its cache entry, which is written if it does not exist or is damaged.

  If the entry cannot be written (read-only folder, full disk), a warning is logged and the images stay in memory.

  Raises:
    UserError: an image is damaged and must not be skipped, or all images of a class are.
  """
  image_shape = (image_side, image_side, channels)
  if source.fingerprint is None:
    return _decode_to_memory(source, image_shape)
  sweep_cache()
  entry = entry_folder(source, image_shape)
  found = _open_entry(entry, image_shape)
  if found is None:
    logging.info('Decoding %s into %s', source.name, entry)
    try:
      _write_entry(entry, source, image_shape)
    except OSError as error:
      logging.warning('Continuing without a cache of decoded images in %s: %s', entry.parent, error)
  return found or _open_entry(entry, image_shape) or _decode_to_memory(source, image_shape)


def fingerprint(root: Path, files: Iterable[Path], *settings: object) -> str:
  """Hash of a folder's path, its files' names, sizes, times and inodes, and the settings that affect decoding.

  The inode and the time of the last change of status show that a file was replaced by one of the same size and time.
  """
  digest = hashlib.sha256(repr((str(root.resolve()), settings)).encode())
  for file in files:
    stat = file.stat()
    facts = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
    digest.update(repr((str(file.relative_to(root)), *facts)).encode())
  return digest.hexdigest()[:16]


def channel_statistics(
  images: Images | StoredImages, chosen: Int[np.ndarray, ' n'] | None = None
) -> tuple[Float64[np.ndarray, ' C'], Float64[np.ndarray, ' C']]:
  """Mean and standard deviation of each channel of the chosen images (None: all), for pixel values in 0..1.

  Integers are summed exactly, so the order does not matter. The deviation of a constant channel is set to 1.
  """
  total, squares = np.zeros((2, images.shape[-1]))
  count = len(images) if chosen is None else len(chosen)
  for start in range(0, count, _CHUNK):
    part = slice(start, start + _CHUNK)
    pixels = images[part if chosen is None else chosen[part]].reshape(-1, images.shape[-1]).astype(np.float64)
    total += pixels.sum(axis=0)
    squares += np.square(pixels).sum(axis=0)
  return statistics_of_sums(total, squares, count * images.shape[1] * images.shape[2])


def statistics_of_sums(
  total: Float64[np.ndarray, ' C'], squares: Float64[np.ndarray, ' C'], count: int
) -> tuple[Float64[np.ndarray, ' C'], Float64[np.ndarray, ' C']]:
  """`channel_statistics` from the sums of `count` pixel values in 0..255 and of their squares; of none: 0 and 1."""
  count = max(count, 1)
  mean = total / count
  std = np.sqrt(np.maximum(squares / count - mean**2, 0))
  return mean / 255, np.where(std > 0, std / 255, 1.0)


def entry_folder(source: Source, image_shape: tuple[int, ...]) -> Path:
  """The cache folder of a source."""
  shape = 'x'.join(map(str, image_shape))
  name = f'{source.name}-{source.version}-{shape}-{source.fingerprint}-v{_FORMAT}'
  return cache_folder() / re.sub(r'[^\w.-]+', '_', name)


def sweep_cache() -> None:
  """Removes what killed processes left in the cache, of any source."""
  if os.path.isdir(cache := cache_folder()):  # Where it may not be entered, Path.glob raises.
    for folder in cache.glob('*'):
      sweep(folder)


def trained_indices(source: Source, listing: Listing) -> Int[np.ndarray, ' n']:
  """Which readable images of 'train' a new run does not test on."""
  if source.test_count is None:  # The test split has records of its own.
    return np.arange(listing.readable.sum())
  limits = choose_limits(listing.labels, listing.identities, source.test_count, 'test', source.test_share)
  return np.flatnonzero(~drawn(limits, listing.labels, listing.identities, 'test')[listing.readable])


def _write_entry(entry: Path, source: Source, image_shape: tuple[int, ...]) -> None:
  # Two processes may do this at once: they write the same bytes, and replace each file atomically.
  entry.mkdir(parents=True, exist_ok=True)
  index: dict[str, Any] = {}
  for split in source.splits:
    with replacing(entry / f'{split}.npy', 'wb') as file:
      listing, index[f'{split}_crc'] = _write_images(file, source, split, image_shape)
      if split == 'train':  # Of this file: the other process may have skipped an image that could not be read.
        file.flush()
        images = np.load(file.name, mmap_mode='r')
        index['mean'], index['std'] = channel_statistics(images, trained_indices(source, listing))
    index |= {f'{split}_{name}': values for name, values in listing._asdict().items()}
  write_arrays(entry / 'index.npz', index)


def write_arrays(path: Path, arrays: dict[str, Any], compressed: bool = False) -> None:
  """Writes named arrays atomically."""
  with replacing(path, 'wb') as file:
    (np.savez_compressed if compressed else np.savez)(file, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
  """Reads named arrays and verifies their checksums; damage makes zipfile and NumPy raise nearly anything."""
  with np.load(io.BytesIO(path.read_bytes())) as archive:  # Read into memory first, so that the file is closed.
    return dict(archive)


def _write_images(file: IO[bytes], source: Source, split: str, image_shape: tuple[int, ...]) -> tuple[Listing, int]:
  """Writes a .npy file chunk by chunk; returns what is known of the records and the images' CRC-32."""
  # Plain writes, not a writable memory map: on a full disk, a map dies of SIGBUS instead of raising OSError.
  _write_header(file, len(source.records(split)), image_shape)
  listings, crc = [], 0
  for images, listing in _chunks(source, split):
    if len(images):
      file.write(images.data)
      crc = zlib.crc32(images.data, crc)
    listings.append(listing)
  listing = _joined(listings)
  file.seek(0)
  _write_header(file, int(listing.readable.sum()), image_shape)  # As long: the format pads for an axis that changes.
  return listing, crc


def _joined(listings: list[Listing]) -> Listing:
  nothing = Listing(np.zeros(0, np.int32), np.zeros(0, np.uint64), np.zeros(0, bool))
  return Listing(*map(np.concatenate, zip(nothing, *listings, strict=True)))


def _chunks(source: Source, split: str) -> Iterator[tuple[UInt8[np.ndarray, 'n H W C'], Listing]]:
  """The readable images and what is known of the records, in order, read in threads."""
  records = source.records(split)
  threads = os.cpu_count() or 1
  with ThreadPoolExecutor(threads) as pool:
    for start in range(0, len(records), _READ):
      numbers = range(start, min(start + _READ, len(records)))
      share = -(-len(numbers) // threads)
      parts = [numbers[i : i + share] for i in range(0, len(numbers), share)]
      for images, labels, ids in pool.map(lambda part: read_identified(records, part), parts):
        kept = [image for image in images if image is not None]
        readable = np.array([image is not None for image in images], bool)
        yield np.stack(kept) if kept else np.zeros(0, np.uint8), Listing(labels, ids, readable)


def _write_header(file: IO[bytes], count: int, image_shape: tuple[int, ...]) -> None:
  header = {'descr': '|u1', 'fortran_order': False, 'shape': (count, *image_shape)}
  np.lib.format.write_array_header_1_0(file, header)


def _open_entry(entry: Path, image_shape: tuple[int, ...]) -> Decoded | None:
  """The entry's memory maps, or None if it is missing or damaged."""
  try:
    index = read_arrays(entry / 'index.npz')
    listings = {
      split: Listing(*(index[f'{split}_{name}'] for name in Listing._fields))
      for split in ('train', 'test')
      if f'{split}_crc' in index
    }
    images = {split: _open_images(entry, split, index, image_shape) for split in listings}
    return Decoded(images, listings, mean=index['mean'], std=index['std'])
  except Exception as error:
    if not isinstance(error, OSError):  # An OSError means that there is no entry, or that writing will fail too.
      logging.warning('Decoded images in %s are damaged and will be written again: %s', entry, error)
    return None


def _open_images(entry: Path, split: str, index: dict[str, np.ndarray], image_shape: tuple[int, ...]) -> Images:
  images = np.load(entry / f'{split}.npy', mmap_mode='r')
  if images.dtype != np.uint8 or images.shape != (index[f'{split}_readable'].sum(), *image_shape):
    raise ValueError(f'{split}.npy holds {images.dtype} {images.shape}')
  if zlib.crc32(images) != index[f'{split}_crc']:
    raise ValueError(f'{split}.npy has a different checksum')
  return images


def _decode_to_memory(source: Source, image_shape: tuple[int, ...]) -> Decoded:
  images, listings = {}, {}
  for split in source.splits:
    # Filled chunk by chunk, so that the images are in memory once.
    found, filled, parts = np.empty((len(source.records(split)), *image_shape), np.uint8), 0, []
    for chunk, listing in _chunks(source, split):
      if len(chunk):
        found[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
      parts.append(listing)
    images[split], listings[split] = found[:filled], _joined(parts)
  mean, std = channel_statistics(images['train'], trained_indices(source, listings['train']))
  return Decoded(images, listings, mean=mean, std=std)
