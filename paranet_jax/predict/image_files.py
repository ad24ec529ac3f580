"""Decodes image files in threads ahead of their use: in order, in bounded memory."""

import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from paranet_jax.portable.run import MAX_MEMORY, MAX_PIXELS, TO_SIDE, Scaling, read_image

_BATCHES_AHEAD = 2  # Decoded, or being decoded, while one is in use.
_THREADS = min(8, os.cpu_count() or 1)  # Each may hold an image at full size.


class Batch(NamedTuple):
  """Consecutive files, decoded.

  Attributes:
    files: the readable ones.
    images: uint8 [len(files), side, side, channels].
    unreadable: (file, reason) of the others.
  """

  files: list[str]
  images: np.ndarray
  unreadable: list[tuple[str, str]]


def read_batches(
  files: Sequence[str],
  side: int,
  channels: int,
  batch_size: int,
  max_pixels: int = MAX_PIXELS,
  max_memory: int = MAX_MEMORY,
  scaling: Scaling = TO_SIDE,
) -> Generator[Batch, None, None]:
  """Yields files in order, `batch_size` at a time, while the next batches are decoded.

  Args:
    side, channels, scaling: of the decoded images, see `run.fit_image`.
    max_pixels, max_memory: images that have more, or take more bytes to decode, are unreadable.
  """
  limits = {'max_pixels': max_pixels, 'max_memory': max_memory}
  decode = partial(read_image, side=side, channels=channels, scaling=scaling, **limits)

  def collect(chunk: Sequence[str], futures: list[Future]) -> Batch:
    decoded = {True: [], False: []}
    for file, future in zip(chunk, futures, strict=True):
      image = future.result()
      decoded[isinstance(image, str)].append((file, image))
    images = np.array([image for _, image in decoded[False]], np.uint8).reshape(-1, side, side, channels)
    return Batch([file for file, _ in decoded[False]], images, decoded[True])

  chunks = (files[start : start + batch_size] for start in range(0, len(files), batch_size))
  pool, ahead = ThreadPoolExecutor(_THREADS), deque()
  try:
    for chunk in chunks:
      ahead.append((chunk, [pool.submit(decode, file) for file in chunk]))
      if len(ahead) > _BATCHES_AHEAD:
        yield collect(*ahead.popleft())
    while ahead:
      yield collect(*ahead.popleft())
  finally:
    pool.shutdown(cancel_futures=True)
