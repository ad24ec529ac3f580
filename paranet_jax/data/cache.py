"""Decoded splits, memory-mapped from PARANET_CACHE_DIR (default ~/.cache/paranet_jax) after the first time.

An entry is a folder: train.npy and test.npy (uint8 images) and index.npz (labels, statistics, checksums). The index is
written last, and its checksums decide whether the entry is whole.
"""

import hashlib
import io
import os
import re
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from absl import logging

from paranet_jax.data.dataset import Source, Split
from paranet_jax.host.files import replacing

_FORMAT = 1  # To be raised when decoding or this layout changes: old entries are then not found.
_CHUNK = 4096  # Images converted to float64 at a time.
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Decoded:
  """Both splits, and the training split's mean and std: float64 [C], in 0..1 units."""

  train: Split
  test: Split
  mean: np.ndarray
  std: np.ndarray


def load_decoded(source: Source, image_side: int, channels: int) -> Decoded:
  """The source's splits as memory maps of its cache entry, decoding and writing the entry where there is none.

  A damaged entry is written again. Where no entry can be written (folder not writable, disk full), a warning is logged
  and the images stay in memory.
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
      logging.warning('Going on without a cache of decoded images in %s: %s', entry.parent, error)
  return found or _open_entry(entry, image_shape) or _decode_to_memory(source, image_shape)


def fingerprint(root: Path, files: Iterable[Path], *settings: object) -> str:
  """Hash of an absolute folder, its files' names, sizes and modification times, and what else decides the decoding."""
  digest = hashlib.sha256(repr((str(root.resolve()), settings)).encode())
  for file in files:
    stat = file.stat()
    digest.update(repr((str(file.relative_to(root)), stat.st_size, stat.st_mtime_ns)).encode())
  return digest.hexdigest()[:16]


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and std of each channel of uint8 [N, H, W, C], in 0..1 units: float64 [C] each.

  Exact sums of integers, so the result does not depend on the order. A constant channel gets std 1.
  """
  total, squares = np.zeros((2, images.shape[-1]))
  for start in range(0, len(images), _CHUNK):
    pixels = images[start : start + _CHUNK].reshape(-1, images.shape[-1]).astype(np.float64)
    total += pixels.sum(axis=0)
    squares += np.square(pixels).sum(axis=0)
  return statistics_of_sums(total, squares, images.size // images.shape[-1])


def statistics_of_sums(total: np.ndarray, squares: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """`channel_statistics` from sums over `count` pixels in 0..255 and over their squares: float64 [C] each."""
  mean = total / count
  std = np.sqrt(np.maximum(squares / count - mean**2, 0))
  return mean / 255, np.where(std > 0, std / 255, 1.0)


def entry_folder(source: Source, image_shape: tuple[int, ...]) -> Path:
  """Where what is kept of a source lies."""
  root = os.environ.get('PARANET_CACHE_DIR') or Path.home() / '.cache' / 'paranet_jax'
  shape = 'x'.join(map(str, image_shape))
  name = f'{source.name}-{source.version}-{shape}-{source.fingerprint}-v{_FORMAT}'
  return Path(root).expanduser() / re.sub(r'[^\w.-]+', '_', name)


def _write_entry(entry: Path, source: Source, image_shape: tuple[int, ...]) -> None:
  # Two processes may do this at once: they write the same bytes, and each file is replaced whole.
  entry.mkdir(parents=True, exist_ok=True)
  index = {}
  for split in ('train', 'test'):
    with replacing(entry / f'{split}.npy', 'wb') as file:
      index[f'{split}_labels'], index[f'{split}_crc'] = _write_images(file, source, split, image_shape)
  index['mean'], index['std'] = channel_statistics(np.load(entry / 'train.npy', mmap_mode='r'))
  with replacing(entry / 'index.npz', 'wb') as file:
    np.savez(file, **index)


def _write_images(file: BinaryIO, source: Source, split: str, image_shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
  """Writes a .npy file chunk by chunk; returns the labels (int32 [N]) and the images' CRC-32."""
  # Plain writes rather than a writable memory map: on a full disk that one dies of SIGBUS instead of an OSError.
  _write_header(file, source.counts[split], image_shape)
  labels, crc = [np.zeros(0, np.int32)], 0
  for chunk, chunk_labels in source.read(split):
    file.write(chunk)
    crc = zlib.crc32(chunk, crc)
    labels.append(chunk_labels)
  labels = np.concatenate(labels)
  file.seek(0)
  _write_header(file, len(labels), image_shape)  # Same length: the format pads for a first axis that changes.
  return labels, crc


def _write_header(file: BinaryIO, count: int, image_shape: tuple[int, ...]) -> None:
  header = {'descr': '|u1', 'fortran_order': False, 'shape': (count, *image_shape)}
  np.lib.format.write_array_header_1_0(file, header)


def _open_entry(entry: Path, image_shape: tuple[int, ...]) -> Decoded | None:
  """The entry's memory maps, or None if it is missing, cut short or otherwise damaged."""
  try:
    # Read whole first: closing is then certain, and the archive's own checksums are verified.
    with np.load(io.BytesIO((entry / 'index.npz').read_bytes())) as archive:
      index = dict(archive)
    splits = {split: _open_split(entry, split, index, image_shape) for split in ('train', 'test')}
    return Decoded(**splits, mean=index['mean'], std=index['std'])
  except _DAMAGE as error:
    if not isinstance(error, OSError):  # Those mean that it is not there, or that writing will fail as well.
      logging.warning('Decoded images in %s are damaged and will be written again: %s', entry, error)
    return None


def _open_split(entry: Path, split: str, index: dict[str, np.ndarray], image_shape: tuple[int, ...]) -> Split:
  images, labels = np.load(entry / f'{split}.npy', mmap_mode='r'), index[f'{split}_labels']
  if images.dtype != np.uint8 or images.shape != (len(labels), *image_shape):
    raise ValueError(f'{split}.npy holds {images.dtype} {images.shape}')
  if zlib.crc32(images) != index[f'{split}_crc']:
    raise ValueError(f'the checksum of {split}.npy differs')
  return Split(images, labels)


def _decode_to_memory(source: Source, image_shape: tuple[int, ...]) -> Decoded:
  splits = {}
  for split in ('train', 'test'):
    images = np.empty((source.counts[split], *image_shape), np.uint8)
    labels = np.empty(len(images), np.int32)
    filled = 0
    for chunk, chunk_labels in source.read(split):
      images[filled : filled + len(chunk)], labels[filled : filled + len(chunk)] = chunk, chunk_labels
      filled += len(chunk)
    splits[split] = Split(images[:filled], labels[:filled])
  mean, std = channel_statistics(splits['train'].images)
  return Decoded(**splits, mean=mean, std=std)
