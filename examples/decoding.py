"""Decodes images in threads, so that those that take long do not delay the others, and their waiting time is known."""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

from uploads import Refused, guarded

SMALL = 8_000_000
"""Bytes that decoding takes up to which an image is decoded among the small ones (two million pixels in RGB)."""
TINY_BYTES, TINY_PIXELS = 16_384, 128 * 128
"""Up to which an image is decoded at once: in less time than a change of threads takes while others are busy."""
_TINY_MEMORY = 20 * TINY_PIXELS
_TINY_KINDS = b'\x89PNG', b'\xff\xd8\xff'  # Pillow decodes some others in Python.
_LEAST = 65_536  # Bytes that an image counts as, for what takes time whatever its size.
_PACE = 4e-9  # Seconds a byte, until images have been decoded.
_SLOWEST = 64 * _PACE  # What is learned from an image that takes longer: few do, and others are not refused for them.


class Lane:
  """Threads that decode images in the order of arrival. bytes: of the images that wait or are being decoded."""

  def __init__(self, name: str, threads: int, nice: int = 0, clock: Callable[[], float] = time.perf_counter):
    """nice: added to the niceness of the threads, on Linux."""
    self._pool = ThreadPoolExecutor(threads, name, initializer=_be_nice, initargs=(nice,))
    self._threads, self._pace, self._clock, self.bytes = threads, _PACE, clock, 0
    self._started: dict[object, float] = {}  # Of the images that are being decoded.

  def wait(self) -> float:
    """Seconds until an image that arrives now should be decoded, itself excluded."""
    started = list(self._started.values())
    # What has taken long goes on for long, whatever its size says; a thread that is free takes the next image at once.
    age = self._clock() - max(started) if len(started) >= self._threads else 0.0
    return max(self.bytes * self._pace / self._threads, age)

  async def run(self, size: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function that takes as long as decoding `size` bytes."""
    size = max(size, _LEAST)
    self.bytes += size
    try:
      return await asyncio.get_running_loop().run_in_executor(self._pool, self._timed, size, work, *arguments)
    finally:
      self.bytes -= size

  def _timed(self, size: int, work: Callable[..., Any], *arguments: Any) -> Any:
    running = object()
    self._started[running] = started = self._clock()
    try:
      result = work(*arguments)
    finally:
      del self._started[running]
    self._pace += 0.1 * (min((self._clock() - started) / size, _SLOWEST) - self._pace)
    return result


class Decoders:
  """Decodes images of a bundle: small ones in one lane, the others in a second one, whose threads yield to all else."""

  def __init__(
    self, runtime: ModuleType, image_shape: Sequence[int], max_pixels: int, max_decoding: int, scaling: Any = None
  ):
    """max_decoding: bytes that decoding the images of a request may take; scaling: the bundle's, if it has one."""
    self._runtime, self._shape, self._max_pixels, self._scaling = runtime, image_shape, max_pixels, scaling
    self._max_decoding = max_decoding
    # Pillow decodes without the interpreter lock, but the stages need cores too.
    self.small, self.large = Lane('small', 2), Lane('large', max((os.cpu_count() or 1) // 2, 1), nice=10)

  async def sizes(self, images: Sequence[bytes]) -> list[int]:
    """The bytes that decoding each of a request's images takes, by its header; 0 for what will be refused.

    Raises:
      Refused: 413, they take too many together.
    """
    found = await self.small.run(0, lambda: [self._size(image) for image in images])
    if sum(found) > self._max_decoding:
      raise Refused(
        413,
        f'expected images that take at most {self._max_decoding:,} bytes to decode together, found {sum(found):,}; '
        'send fewer or smaller images',
      )
    return found

  def decode_tiny(self, image: bytes) -> Any:
    """A decoded PNG or JPEG, uint8 [H, W, C], by the thread that calls; None: it is not tiny, or will be refused."""
    if len(image) > TINY_BYTES or not image.startswith(_TINY_KINDS) or self._max_decoding < _TINY_MEMORY:
      return None
    if not hasattr(self._runtime, 'decoding_memory'):  # Of a version without limits on memory.
      return None
    limits, scaled = (
      (min(self._max_pixels, TINY_PIXELS), _TINY_MEMORY),
      {'scaling': self._scaling} if self._scaling else {},
    )
    try:
      return self._runtime.decode_image(image, self._shape[0], self._shape[-1], *limits, **scaled)
    except Exception:  # `decode` says what is wrong, or decodes it.
      return None

  def wait(self, sizes: Sequence[int] = ()) -> float:
    """Seconds until a request with images of these sizes should be decoded, itself excluded."""
    return max(self.small.wait(), self.large.wait() if any(size > SMALL for size in sizes) else 0.0)

  async def decode(self, image: bytes, size: int) -> Any:
    """A decoded image: uint8 [H, W, C].

    Raises:
      Refused: 400 or 413.
    """
    lane = self.large if size > SMALL else self.small
    return await lane.run(size, decode, self._runtime, image, self._shape, self._max_pixels, self._scaling)

  def _size(self, image: bytes) -> int:
    try:
      return guarded(self._runtime, self._max_pixels, lambda *limits: _memory(self._runtime, image, *limits))
    except Refused:
      return 0


def decode(
  runtime: ModuleType, encoded: bytes, image_shape: Sequence[int], max_pixels: int, scaling: Any = None
) -> Any:
  """Decodes an image for the bundle as its run.py does, within limits: uint8 [H, W, C].

  Raises:
    Refused: 400, it is not an image; 413, it has too many pixels, which is checked before they are decoded.
  """
  if not encoded:
    raise Refused(400, 'expected an image, found an empty file')
  side, channels = image_shape[0], image_shape[-1]
  scaled = {'scaling': scaling} if scaling else {}
  return guarded(runtime, max_pixels, lambda *limits: runtime.decode_image(encoded, side, channels, *limits, **scaled))


def _memory(runtime: ModuleType, encoded: bytes, *limits: int) -> int:
  if hasattr(runtime, 'decoding_memory'):
    return runtime.decoding_memory(encoded, *limits)
  import io

  from PIL import Image

  with Image.open(io.BytesIO(encoded)) as image:  # For the run.py of version 0.1.0.
    return 12 * image.size[0] * image.size[1]


def _be_nice(nice: int) -> None:
  if nice:
    with contextlib.suppress(OSError, AttributeError):
      os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
