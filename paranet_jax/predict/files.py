"""Image files: found in folders, and decoded ahead in threads, in order and in bounded memory."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from paranet_jax.host.errors import UserError
from paranet_jax.portable import run
from paranet_jax.portable.run import read_image

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

  See `run.list_images`.

  Raises:
    UserError: nothing is named, or a folder has no images.
  """
  try:
    return run.list_images(paths)
  except run.BundleError as error:
    raise UserError(str(error)) from error


def read_batches(files: Sequence[str], side: int, channels: int, batch_size: int) -> Iterator[Batch]:
  """Yields files in order, `batch_size` at a time; the next batches are decoded meanwhile.

  Args:
    files: paths.
    side, channels: of the images, see `fit_image`.
    batch_size: files a batch, of which the unreadable have no image.
  """
  decode = partial(read_image, side=side, channels=channels)
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
