"""Decoded splits, written to PARANET_CACHE_DIR (default ~/.cache/paranet_jax) once and memory-mapped from there.

An entry is a folder: train.npy and test.npy (uint8 images) and index.npz (labels, statistics, checksums). The index is
written last, and its checksums show whether the entry is complete.
"""

import hashlib
import io
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from absl import logging
from jaxtyping import Bool, Float64, Int32, UInt8

from paranet_jax.data.dataset import Source, Split
from paranet_jax.host.errors import UserError
from paranet_jax.host.files import replacing

_FORMAT = 1  # Increase it when decoding or this layout changes, so that old entries are not found.
_READ = 512  # Images read at a time.
_CHUNK = 4096  # Images converted to float64 at a time.
DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Decoded:
  """Both splits, and the training split's mean and standard deviation for pixel values in 0..1."""

  train: Split
  test: Split
  mean: Float64[np.ndarray, ' C']
  std: Float64[np.ndarray, ' C']


def load_decoded(source: Source, image_side: int, channels: int) -> Decoded:
  """The source's splits, memory-mapped from its cache entry, which is written if it does not exist or is damaged.

  If the entry cannot be written (read-only folder, full disk), a warning is logged and the images stay in memory.

  Raises:
    UserError: an image is damaged and must not be skipped, or all images of a class are.
  """
  image_shape = (image_side, image_side, channels)
  if source.fingerprint is None:
    return _decode_to_memory(source, image_shape)
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
  """Hash of a folder's path, its files' names, sizes and modification times, and the settings that affect decoding."""
  digest = hashlib.sha256(repr((str(root.resolve()), settings)).encode())
  for file in files:
    stat = file.stat()
    digest.update(repr((str(file.relative_to(root)), stat.st_size, stat.st_mtime_ns)).encode())
  return digest.hexdigest()[:16]


def channel_statistics(
  images: UInt8[np.ndarray, 'N H W C'],
) -> tuple[Float64[np.ndarray, ' C'], Float64[np.ndarray, ' C']]:
  """Mean and standard deviation of each channel, for pixel values in 0..1.

  Integers are summed exactly, so the order does not matter. The deviation of a constant channel is set to 1.
  """
  total, squares = np.zeros((2, images.shape[-1]))
  for start in range(0, len(images), _CHUNK):
    pixels = images[start : start + _CHUNK].reshape(-1, images.shape[-1]).astype(np.float64)
    total += pixels.sum(axis=0)
    squares += np.square(pixels).sum(axis=0)
  return statistics_of_sums(total, squares, images.size // images.shape[-1])


def statistics_of_sums(
  total: Float64[np.ndarray, ' C'], squares: Float64[np.ndarray, ' C'], count: int
) -> tuple[Float64[np.ndarray, ' C'], Float64[np.ndarray, ' C']]:
  """`channel_statistics` from the sums of `count` pixel values in 0..255 and of their squares."""
  mean = total / count
  std = np.sqrt(np.maximum(squares / count - mean**2, 0))
  return mean / 255, np.where(std > 0, std / 255, 1.0)


def entry_folder(source: Source, image_shape: tuple[int, ...]) -> Path:
  """The cache folder of a source."""
  root = os.environ.get('PARANET_CACHE_DIR') or Path.home() / '.cache' / 'paranet_jax'
  shape = 'x'.join(map(str, image_shape))
  name = f'{source.name}-{source.version}-{shape}-{source.fingerprint}-v{_FORMAT}'
  return Path(root).expanduser() / re.sub(r'[^\w.-]+', '_', name)


def _write_entry(entry: Path, source: Source, image_shape: tuple[int, ...]) -> None:
  # Two processes may do this at once: they write the same bytes, and replace each file atomically.
  entry.mkdir(parents=True, exist_ok=True)
  index: dict[str, Any] = {}
  for split in ('train', 'test'):
    with replacing(entry / f'{split}.npy', 'wb', shared=True) as file:
      index[f'{split}_labels'], index[f'{split}_crc'] = _write_images(file, source, split, image_shape)
  index['mean'], index['std'] = channel_statistics(np.load(entry / 'train.npy', mmap_mode='r'))
  write_arrays(entry / 'index.npz', index)


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
  """Writes named arrays atomically."""
  with replacing(path, 'wb', shared=True) as file:
    np.savez(file, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
  """Reads named arrays and verifies their checksums; raises one of `DAMAGE`."""
  with np.load(io.BytesIO(path.read_bytes())) as archive:  # Read into memory first, so that the file is closed.
    return dict(archive)


def _write_images(
  file: IO[bytes], source: Source, split: str, image_shape: tuple[int, ...]
) -> tuple[Int32[np.ndarray, ' N'], int]:
  """Writes a .npy file chunk by chunk; returns the labels and the images' CRC-32."""
  # Plain writes, not a writable memory map: on a full disk, a map dies of SIGBUS instead of raising OSError.
  _write_header(file, len(source.records(split)), image_shape)
  labels, crc = [np.zeros(0, np.int32)], 0
  for images, chunk_labels in _chunks(source, split):
    file.write(images.data)
    crc = zlib.crc32(images.data, crc)
    labels.append(chunk_labels)
  labels = np.concatenate(labels)
  file.seek(0)
  _write_header(file, len(labels), image_shape)  # Same length: the format pads for a first axis that changes.
  return labels, crc


def _chunks(source: Source, split: str) -> Iterator[tuple[UInt8[np.ndarray, 'n H W C'], Int32[np.ndarray, ' n']]]:
  """The readable images and their labels, in order, read in threads."""
  records = source.records(split)
  found, readable = [np.zeros(0, np.int32)], [np.zeros(0, bool)]
  threads = os.cpu_count() or 1
  with ThreadPoolExecutor(threads) as pool:
    for start in range(0, len(records), _READ):
      numbers = range(start, min(start + _READ, len(records)))
      share = -(-len(numbers) // threads)
      for images, labels in pool.map(records.read, [numbers[i : i + share] for i in range(0, len(numbers), share)]):
        found.append(labels)
        readable.append(np.array([image is not None for image in images]))
        kept = [image for image in images if image is not None]
        if kept:
          yield np.stack(kept), labels[readable[-1]]
  check_readable(source, split, np.concatenate(found), np.concatenate(readable))


def check_readable(
  source: Source, split: str, labels: Int32[np.ndarray, ' N'], readable: Bool[np.ndarray, ' N']
) -> None:
  """Raises UserError if all images of a class are corrupt."""
  lost = np.setdiff1d(labels, labels[readable])
  if len(lost):
    raise UserError(
      f'expected images of class {source.class_names[lost[0]]!r} in {split}, found only corrupt files: '
      f'fix or remove them'
    )


def _write_header(file: IO[bytes], count: int, image_shape: tuple[int, ...]) -> None:
  header = {'descr': '|u1', 'fortran_order': False, 'shape': (count, *image_shape)}
  np.lib.format.write_array_header_1_0(file, header)


def _open_entry(entry: Path, image_shape: tuple[int, ...]) -> Decoded | None:
  """The entry's memory maps, or None if it is missing or damaged."""
  try:
    index = read_arrays(entry / 'index.npz')
    splits = {split: _open_split(entry, split, index, image_shape) for split in ('train', 'test')}
    return Decoded(**splits, mean=index['mean'], std=index['std'])
  except DAMAGE as error:
    if not isinstance(error, OSError):  # An OSError means that there is no entry, or that writing will fail too.
      logging.warning('Decoded images in %s are damaged and will be written again: %s', entry, error)
    return None


def _open_split(entry: Path, split: str, index: dict[str, np.ndarray], image_shape: tuple[int, ...]) -> Split:
  images, labels = np.load(entry / f'{split}.npy', mmap_mode='r'), index[f'{split}_labels']
  if images.dtype != np.uint8 or images.shape != (len(labels), *image_shape):
    raise ValueError(f'{split}.npy holds {images.dtype} {images.shape}')
  if zlib.crc32(images) != index[f'{split}_crc']:
    raise ValueError(f'{split}.npy has a different checksum')
  return Split(images, labels)


def _decode_to_memory(source: Source, image_shape: tuple[int, ...]) -> Decoded:
  splits = {}
  for split in ('train', 'test'):
    # Filled chunk by chunk, so that the images are in memory once.
    images = np.empty((len(source.records(split)), *image_shape), np.uint8)
    labels = np.empty(len(images), np.int32)
    filled = 0
    for chunk, chunk_labels in _chunks(source, split):
      images[filled : filled + len(chunk)], labels[filled : filled + len(chunk)] = chunk, chunk_labels
      filled += len(chunk)
    splits[split] = Split(images[:filled], labels[:filled])
  mean, std = channel_statistics(splits['train'].images)
  return Decoded(**splits, mean=mean, std=std)
