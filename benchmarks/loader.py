"""Images a second that streaming reads, beside what the training step takes.

The first row is the loader alone against the training step alone: batches of CIFAR-100 from its array_record files,
read and decoded by worker processes and put on the device. Without `--data_dir` (default: PARANET_DATA_DIR) it is noise
of that size as PNG files. The second row trains on such batches, and on images in memory. The third is the loader on
generated JPEG files of 500 x 375 pixels, scaled and cropped to 224, against one thread that only decodes.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from benchmarks import cli, network, report
from benchmarks.network import Size
from benchmarks.timing import in_turn
from paranet_jax.data.dataset import Source, Split, StoredImages
from paranet_jax.data.sources.folder import folder_source
from paranet_jax.data.sources.tfds import tfds_source
from paranet_jax.data.stream import Stream, TrainBatches, num_workers
from paranet_jax.devices import replicated
from paranet_jax.host.arguments import positive
from paranet_jax.host.errors import UserError

FILES = 128
"""Generated images of a kind; they are read again and again, so the system has them in memory."""

PHOTO_SIZE, PHOTO_SIDE = (500, 375), 224
WARM_UP = 4  # Batches for each worker and the device that may be ready before the clock starts.


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  parser = cli.Parser(__doc__)
  parser.add_rounds(3)
  parser.add_seconds()
  parser.add_argument('--data_dir', default=os.environ.get('PARANET_DATA_DIR', ''), help='of a prepared CIFAR-100')
  parser.add_argument('--workers', type=positive, help='processes that read (default: one a core, at most 16)')
  return cli.run(parser, measure, argv)


def measure(options: argparse.Namespace) -> dict[str, Any]:
  """`ours`, `theirs` and `ratio` of the loader and the training step in images a second, `rows`, and `workers`."""
  size, device = options.size, jax.devices()[0]
  with tempfile.TemporaryDirectory() as folder:
    small, photos = small_images(options, Path(folder)), photographs(Path(folder))
    cli.progress('training step ...')
    step = network.our_training_step(network.our_network(size), size, network.random_state(size), [device])
    in_memory = size.batch / in_turn({'ours': step}, options.rounds, options.seconds)['ours']
    rates = {}
    for name, split in (('small', small), ('photos', photos)):
      cli.progress(f'loader, {name} ...')
      rates[name] = rate(split, size.batch, options, lambda _: None)
    cli.progress('training on streamed images ...')
    streamed = rate(small, size.batch, options, streamed_step(size, device))
    alone = decoding_rate(photos, options)
  rows = [
    report.row('loader', 'training step', rates['small'], in_memory, 'images/s', size.batch),
    report.row('training, streamed', 'in memory', streamed, in_memory, 'images/s', size.batch),
    report.row('loader, 224 pixels', 'one thread', rates['photos'], alone, 'images/s', size.batch),
  ]
  images = 'CIFAR-100' if options.data_dir else 'generated'
  return report.headline(rows) | {'workers': num_workers(options.workers), 'images': images}


def small_images(options: argparse.Namespace, folder: Path) -> Split:
  """CIFAR-100's training images, or noise, at the size of the network."""
  side = options.size.side
  if options.data_dir:
    source = tfds_source(ConfigDict({'name': 'cifar100', 'data_dir': options.data_dir}), side, 3)
    if source is None:
      raise UserError('expected tensorflow-datasets to know cifar100, found that it does not')
    return as_split(source, side)
  write_images(folder / 'small', (side, side), 'png')
  return as_split(open_folder(folder / 'small', side), side)


def photographs(folder: Path) -> Split:
  """JPEG files of PHOTO_SIZE, read at PHOTO_SIDE."""
  write_images(folder / 'photos', PHOTO_SIZE, 'jpg')
  return as_split(open_folder(folder / 'photos', PHOTO_SIDE), PHOTO_SIDE)


def open_folder(folder: Path, side: int) -> Source:
  """The images of a folder."""
  return folder_source(ConfigDict({'data_dir': str(folder), 'test_fraction': 0.1, 'on_corrupt': 'refuse'}), side, 3)


def write_images(folder: Path, size: tuple[int, int], suffix: str) -> None:
  """Smooth noise, which compresses about as a photograph does, in two classes."""
  random = np.random.default_rng(0)
  for number in range(FILES):
    coarse = random.integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    path = folder / f'class_{number % 2}' / f'{number}.{suffix}'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


def as_split(source: Source, side: int) -> Split:
  """The training images, with labels that are not used."""
  records = source.records('train')
  images = StoredImages(records, np.arange(len(records)), (side, side, 3))
  return Split(images, network.random_labels(len(records)))


def rate(split: Split, batch_size: int, options: argparse.Namespace, use: Callable[[Any], None]) -> float:
  """Images a second of a stream whose batches are put on the device and used, median over the rounds."""
  # As many batches of one epoch as there are images, for splits smaller than a batch.
  repeated = split.take(np.arange(max(len(split), batch_size)) % len(split))
  batches = TrainBatches(repeated, seed=0, batch_size=batch_size, total_steps=10**9)
  place = replicated(jax.devices()[:1])
  with Stream(batches, options.workers, place) as placed:
    for _ in range(WARM_UP * (num_workers(options.workers) + 1)):
      use(next(placed))
    return statistics.median(batch_size / seconds for seconds in turns(placed, options, use))


def turns(placed: Iterator[Any], options: argparse.Namespace, use: Callable[[Any], None]) -> Iterator[float]:
  """Seconds a batch, of each round."""
  for _ in range(options.rounds):
    start, count = time.perf_counter(), 0
    while not count or time.perf_counter() - start < options.seconds:
      use(next(placed))
      count += 1
    yield (time.perf_counter() - start) / count


def streamed_step(size: Size, device: jax.Device) -> Callable[[Any], None]:
  """A function that trains for one step on a streamed batch and waits for its end."""
  step = network.compiled_step(network.our_network(size), [device])
  state, totals = jax.device_put((network.random_state(size), network.zero_totals(network.TARGETS)), device)
  counting = jax.device_put(np.arange(size.batch, dtype=np.int32)[None], device)

  def train(batch: Any) -> None:
    nonlocal state, totals
    state, totals = jax.block_until_ready(step(state, totals, batch['images'], batch['labels'], counting))

  return train


def decoding_rate(split: Split, options: argparse.Namespace) -> float:
  """Images a second of one thread of this process."""
  some = np.arange(min(len(split), 16))
  return len(some) / in_turn({'read': lambda: split.images.read(some)}, options.rounds, options.seconds)['read']


if __name__ == '__main__':
  sys.exit(main())
