"""Which images are decoded when: large ones do not delay small ones, and what a request may decode is bounded."""

import asyncio
import io
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from decoding import _LEAST, SMALL, TINY_BYTES, Decoders, Lane, decode
from PIL import Image
from serving import PNG, encoded, of_pixels
from uploads import Refused

from paranet_jax.portable import run


class Slow:
  """A run.py whose large images are decoded once the test says so. The size of an image is its text."""

  TooManyPixels = run.TooManyPixels

  def __init__(self):
    self.may_end = threading.Event()

  def decoding_memory(self, encoded, max_pixels):
    return int(encoded)

  def decode_image(self, encoded, side, channels, max_pixels):
    if int(encoded) > SMALL:
      assert self.may_end.wait(60)
    return encoded


def test_small_images_do_not_wait_for_large_ones():
  runtime = Slow()
  decoders = Decoders(runtime, (8, 8, 3), 1, 10**9)

  async def decode_all():
    large = [asyncio.create_task(decoders.decode(b'%d' % (SMALL + 1), SMALL + 1)) for _ in range(20)]
    sizes = await decoders.sizes([b'5', b'7'])
    assert sizes == [5, 7]
    assert await decoders.decode(b'5', 5) == b'5' and not any(task.done() for task in large)
    assert decoders.wait(sizes) == 0 and decoders.wait([5, SMALL + 1]) > 0.01
    runtime.may_end.set()
    await asyncio.gather(*large)
    assert decoders.wait([SMALL + 1]) == 0

  asyncio.run(decode_all())


def test_all_images_of_a_request_count():
  decoders = Decoders(Slow(), (8, 8, 3), 1, 100)
  assert asyncio.run(decoders.sizes([b'50'] * 2)) == [50, 50]
  with pytest.raises(Refused, match='at most 100 bytes to decode together, found 150; send fewer or ') as refused:
    asyncio.run(decoders.sizes([b'50'] * 3))
  assert refused.value.status == 413


def test_the_sizes_of_real_files():
  decoders = Decoders(run, (8, 8, 3), 10**6, 10**9)
  images = [PNG, of_pixels(500, 400), of_pixels(5000, 400), b'', b'no image']
  assert asyncio.run(decoders.sizes(images)) == [8 * 8 * 4, 500 * 400 * 2, 0, 0, 0]
  old = SimpleNamespace(damage=run.damage)
  assert asyncio.run(Decoders(old, (8, 8, 3), 10**6, 10**9).sizes([PNG, b'no image'])) == [8 * 8 * 12, 0]


def test_an_empty_file():
  with pytest.raises(Refused, match='^expected an image, found an empty file$'):
    decode(run, b'', (8, 8, 3), 100)


def test_images_are_scaled_as_the_bundle_asks():
  pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'PNG')
  decoders = Decoders(run, (2, 2, 3), 10**6, 10**9, run.Scaling(6))
  np.testing.assert_array_equal(asyncio.run(decoders.decode(file.getvalue(), 100)), pixels[2:4, 2:4])


def test_the_pace_of_a_lane_is_learned():
  now = [0.0]
  lane = Lane('test', 2, clock=lambda: now[0])

  def work(seconds):
    now[0] += seconds
    return lane.wait()

  async def learn():
    for _ in range(200):
      await lane.run(10**6, work, 0.2)
    return await lane.run(10**6, work, 0.2)

  assert asyncio.run(learn()) == pytest.approx(0.2 / 2)  # One image of 0.2 s in two threads.
  assert lane.bytes == 0 and lane.wait() == 0
  asyncio.run(lane.run(0, lambda: np.testing.assert_equal(lane.bytes, _LEAST)))
  asyncio.run(lane.run(0, work, 1000))  # A file that takes long for its size does not make others wait for as long.
  asyncio.run(lane.run(0, lambda: np.testing.assert_array_less(lane.wait(), 0.02)))


def test_images_that_take_longer_than_their_size_says():
  now, may_end = [0.0], threading.Event()
  lane = Lane('test', 2, clock=lambda: now[0])

  async def run_all():
    started = [threading.Event(), threading.Event()]

    def work(number):
      started[number].set()
      assert may_end.wait(60)

    tasks = []
    for number in range(2):
      tasks.append(asyncio.create_task(lane.run(0, work, number)))
      await asyncio.to_thread(started[number].wait, 60)
      now[0] += 10
      assert lane.wait() == pytest.approx([0, 10][number], abs=0.1)  # At first, one thread is free.
    may_end.set()
    await asyncio.gather(*tasks)

  asyncio.run(run_all())
  assert lane.wait() == 0


def test_a_failed_image_is_no_longer_decoded():
  lane = Lane('test', 1)
  with pytest.raises(ZeroDivisionError):
    asyncio.run(lane.run(0, lambda: 1 / 0))
  assert lane.wait() == 0


TINY = {
  'PNG': (PNG, True),
  'JPEG': (encoded(1, 'JPEG', (20, 13)), True),
  'as many pixels as are tiny': (of_pixels(128, 128), True),
  'more pixels': (of_pixels(129, 128), False),
  'more bytes': (PNG + b'0' * TINY_BYTES, False),
  'another format': (encoded(2, 'BMP'), False),
  'half an image': (PNG[:60], False),
  'nothing': (b'', False),
}


@pytest.mark.parametrize('name', TINY)
def test_tiny_images_are_decoded_as_others(name):
  image, is_tiny = TINY[name]
  decoders = Decoders(run, (8, 8, 3), 10**6, 10**9)
  found = decoders.decode_tiny(image)
  assert (found is not None) == is_tiny
  if is_tiny:
    np.testing.assert_array_equal(found, decode(run, image, (8, 8, 3), 10**6))


def test_limits_and_runtimes_with_which_no_image_is_tiny():
  assert Decoders(run, (8, 8, 3), 63, 10**9).decode_tiny(PNG) is None
  assert Decoders(run, (8, 8, 3), 10**6, 10**5).decode_tiny(PNG) is None
  assert Decoders(SimpleNamespace(damage=run.damage), (8, 8, 3), 10**6, 10**9).decode_tiny(PNG) is None
