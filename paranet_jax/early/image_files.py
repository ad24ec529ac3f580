"""Image files: found in folders, and decoded ahead in threads, in order and in bounded memory."""

import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import UnidentifiedImageError

from paranet_jax.data.decode import decode_image
from paranet_jax.errors import UserError

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp', '.tif', '.tiff')
_BATCHES_AHEAD = 2  # Decoded, or being decoded, while one is in use.
_THREADS = min(8, os.cpu_count() or 1)  # Each may hold an image at its full size.


class Batch(NamedTuple):
  """Consecutive files, decoded.

  files: those that could be read, as they were named.
  images: uint8 [len(files), side, side, channels].
  unreadable: (file, reason) of the others.
  """

  files: list[str]
  images: np.ndarray
  unreadable: list[tuple[str, str]]


def list_images(paths: Sequence[str]) -> list[str]:
  """Files to read: those named, whatever their suffix, and the images below the folders named, sorted.

  In folders the files with one of SUFFIXES, in any case, are images; what is hidden is ignored, links are followed. A
  folder that cannot be listed is listed itself, so that reading it tells why.

  Args:
    paths: files and folders, in the order wanted.

  Raises:
    UserError: nothing is named, or a folder has no images.
  """
  if not paths:
    raise UserError('expected image files or folders of images, found none; name them after the flags')
  files = []
  for path in paths:
    found = _walk(path) if os.path.isdir(path) else [path]
    if not found:
      raise UserError(f'expected images ({" ".join(SUFFIXES)}) in {path}, found none; name another folder, or files')
    files += found
  return files


def _walk(folder: str) -> list[str]:
  found, seen = [], set()
  for place, folders, names in os.walk(folder, onerror=lambda error: found.append(error.filename), followlinks=True):
    real = os.path.realpath(place)
    if real in seen:  # A link to a folder above would never end.
      folders.clear()
      continue
    seen.add(real)
    folders[:] = [name for name in folders if not name.startswith('.')]
    images = (name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith('.'))
    found.extend(os.path.join(place, name) for name in images)
  return sorted(found)


def read_batches(files: Sequence[str], side: int, channels: int, batch_size: int) -> Iterator[Batch]:
  """Yields files in order, `batch_size` at a time; the next batches are decoded meanwhile.

  Args:
    files: paths.
    side, channels: of the images, see `fit_image`.
    batch_size: files a batch, of which the unreadable have no image.
  """
  decode = partial(_decode, side=side, channels=channels)
  chunks = (files[start : start + batch_size] for start in range(0, len(files), batch_size))
  pool, ahead = ThreadPoolExecutor(_THREADS), deque()
  try:
    for chunk in chunks:
      ahead.append((chunk, [pool.submit(decode, file) for file in chunk]))
      if len(ahead) > _BATCHES_AHEAD:
        yield _collect(*ahead.popleft(), side, channels)
    while ahead:
      yield _collect(*ahead.popleft(), side, channels)
  finally:
    pool.shutdown(cancel_futures=True)


def _collect(chunk, futures, side, channels) -> Batch:
  decoded = [(file, future.result()) for file, future in zip(chunk, futures, strict=True)]
  files = [file for file, image in decoded if not isinstance(image, str)]
  images = [image for _, image in decoded if not isinstance(image, str)]
  unreadable = [(file, reason) for file, reason in decoded if isinstance(reason, str)]
  return Batch(files, np.array(images, np.uint8).reshape(len(files), side, side, channels), unreadable)


def _decode(file: str, side: int, channels: int) -> np.ndarray | str:
  """uint8 [side, side, channels], or the reason why the file cannot be read."""
  try:
    mode = os.stat(file).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # Opening a pipe would wait for its writer.
      return 'not a regular file'
    with open(file, 'rb') as stream:
      return decode_image(stream, side, channels)
  except UnidentifiedImageError:  # Whose message names an object in memory, not the file.
    return 'not an image in a known format'
  except Exception as error:  # Damaged bytes make Pillow raise nearly anything, not only OSError.
    return getattr(error, 'strerror', None) or ' '.join(str(error).split()) or type(error).__name__
