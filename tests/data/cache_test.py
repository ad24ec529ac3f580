import contextlib
import dataclasses
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from paranet_jax.data import cache
from paranet_jax.data.cache import channel_statistics, fingerprint, load_decoded
from paranet_jax.data.dataset import Source
from paranet_jax.host.files import replacing

SIDE, CHANNELS = 4, 3


def random_split(split):
  """Images and labels."""
  count = {'train': 10, 'test': 6}[split]
  images = np.random.RandomState(len(split)).randint(0, 256, (count, SIDE, SIDE, CHANNELS)).astype(np.uint8)
  return images, np.arange(count, dtype=np.int32) % 2


class CountedRecords:
  """A split and some corrupt images after it; adds its name to `reads` whenever the first image is read."""

  def __init__(self, split, reads, corrupt):
    self.split, self.reads = split, reads
    images, labels = random_split(split)
    self.images = [*images, *[None] * corrupt]
    self.labels = np.concatenate([labels, np.zeros(corrupt, np.int32)])

  def __len__(self):
    return len(self.images)

  def read(self, numbers):
    if 0 in numbers:
      self.reads.append(self.split)
    return [self.images[number] for number in numbers], self.labels[list(numbers)]


def make_source(reads, corrupt=0, records=CountedRecords, **changes):
  source = Source('shapes/big', '1.2.3', ('a', 'b'), lambda split: records(split, reads, corrupt), 'f00d')
  return dataclasses.replace(source, **changes)


def load(reads, **changes):
  return load_decoded(make_source(reads, **changes), SIDE, CHANNELS)


def check(decoded):
  for split in ('train', 'test'):
    images, labels = random_split(split)
    np.testing.assert_array_equal(decoded.split(split).images, images)
    np.testing.assert_array_equal(decoded.split(split).labels, labels)
    assert decoded.split(split).labels.dtype == np.int32
  scaled = random_split('train')[0] / 255
  np.testing.assert_allclose(decoded.mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-12)
  np.testing.assert_allclose(decoded.std, scaled.std(axis=(0, 1, 2)), rtol=1e-12)


def test_decodes_once_and_maps_the_file_after(cache_folder):
  reads = []
  for _ in range(2):
    decoded = load(reads)
    check(decoded)
    assert isinstance(decoded.images['train'], np.memmap)
  assert reads == ['train', 'test']
  (entry,) = cache_folder.iterdir()
  assert entry.name == 'shapes_big-1.2.3-4x4x3-f00d-v3'
  assert sorted(file.name for file in entry.iterdir()) == ['index.npz', 'test.npy', 'train.npy']


@pytest.mark.parametrize('changes', [{'name': 'other'}, {'version': '1.2.4'}, {'fingerprint': 'beef'}])
def test_another_data_set_has_its_own_entry(changes):
  reads = []
  load(reads)
  load(reads, **changes)
  assert reads == 2 * ['train', 'test']


def test_side_and_channels_make_another_entry(cache_folder):
  @dataclasses.dataclass
  class Zeros:
    shape: tuple[int, ...]

    def __len__(self):
      return 2

    def read(self, numbers):
      return [np.zeros(self.shape, np.uint8)] * len(numbers), np.zeros(len(numbers), np.int32)

  for shape in [(4, 4, 3), (8, 8, 3), (4, 4, 1)]:
    source = Source('zeros', '', ('a', 'b'), lambda split, shape=shape: Zeros(shape), 'f00d')
    assert load_decoded(source, shape[0], shape[2]).images['train'].shape == (2, *shape)
  assert len(list(cache_folder.iterdir())) == 3


def truncate(path):
  path.write_bytes(path.read_bytes()[:-5])


def flip_byte(path):
  content = bytearray(path.read_bytes())
  content[-9] ^= 1
  path.write_bytes(content)


def other_images(path):
  with path.open('wb') as file:
    np.save(file, np.zeros((2, SIDE, SIDE, CHANNELS), np.uint8))


@pytest.mark.parametrize('damage', [truncate, flip_byte, other_images, os.unlink, lambda path: path.write_bytes(b'')])
@pytest.mark.parametrize('file', ['train.npy', 'test.npy', 'index.npz'])
def test_damaged_entry_is_written_again(cache_folder, file, damage):
  reads = []
  load(reads)
  damage(next(cache_folder.iterdir()) / file)
  check(load(reads))
  assert reads == 2 * ['train', 'test']
  check(load(reads))
  assert reads == 2 * ['train', 'test']


@pytest.mark.parametrize('place', range(4, 30))
def test_each_byte_of_a_zip_header_may_be_damaged(cache_folder, place):
  load([])
  index = next(cache_folder.iterdir()) / 'index.npz'
  whole = index.read_bytes()
  for start in (0, whole.index(b'PK\x01\x02')):
    for flipped in (1, 8, 128):
      content = bytearray(whole)
      content[start + place] ^= flipped
      index.write_bytes(content)
      check(load([]))


def test_what_killed_processes_left_is_swept(cache_folder):
  load([])
  (entry,) = cache_folder.iterdir()
  old = cache_folder / 'other' / 'train.npy.0123abcd.tmp'
  old.parent.mkdir()
  old.write_bytes(b'half')
  with replacing(entry / 'test.npy', 'wb') as file:
    load([])
    assert file.name.endswith('.tmp') and os.path.exists(file.name)  # Its process lives.
  assert not old.exists() and not list(entry.glob('*.tmp'))


def test_continues_without_a_folder_to_write_to(tmp_path, monkeypatch, caplog):
  (tmp_path / 'file').write_text('not a folder')
  monkeypatch.setenv('PARANET_CACHE_DIR', str(tmp_path / 'file' / 'cache'))
  reads = []
  check(load(reads))
  (message,) = caplog.messages
  assert message.startswith('Continuing without a cache of decoded images in') and '\n' not in message


def test_continues_when_the_disk_is_full(cache_folder, caplog):
  reads = []
  unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (200, unlimited[1]))  # Bytes; a write beyond raises OSError.
  try:
    decoded = load(reads)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
  check(decoded)
  assert any('Continuing without a cache' in message for message in caplog.messages)
  assert not list(next(cache_folder.iterdir()).iterdir())  # No partial file is left.


def test_two_writers_at_once(cache_folder):
  barrier = threading.Barrier(2, timeout=60)

  class MeetingRecords(CountedRecords):
    def read(self, numbers):
      barrier.wait()
      return super().read(numbers)

  reads = [], []
  with ThreadPoolExecutor(2) as threads:
    for decoded in threads.map(lambda own: load(own, records=MeetingRecords), reads):
      check(decoded)
  assert reads == (['train', 'test'],) * 2
  assert len(list(next(cache_folder.iterdir()).iterdir())) == 3


def test_another_writer_that_could_read_fewer_images(cache_folder, monkeypatch):
  @contextlib.contextmanager
  def then_replaced(path, *options, **more):
    with replacing(path, *options, **more) as file:
      yield file
    if path.name == 'train.npy':
      np.save(path, random_split('train')[0][:-1])

  monkeypatch.setattr(cache, 'replacing', then_replaced)
  check(load([]))


@pytest.mark.parametrize('fingerprint', ['f00d', None])
def test_corrupt_images_are_left_out(fingerprint, monkeypatch):
  monkeypatch.setattr(cache, '_READ', 4)  # Ends with a chunk that has no readable image.
  for _ in range(2):
    check(load([], corrupt=5, fingerprint=fingerprint))


def test_no_fingerprint_no_file(cache_folder):
  reads = []
  check(load(reads, fingerprint=None))
  assert not cache_folder.exists()


def test_default_folder(tmp_path, monkeypatch):
  monkeypatch.delenv('PARANET_CACHE_DIR')
  monkeypatch.setenv('HOME', str(tmp_path))
  load([])
  assert len(list((tmp_path / '.cache' / 'paranet_jax').iterdir())) == 1


def test_fingerprint_changes_with_names_sizes_times_and_settings(tmp_path):
  file = tmp_path / 'a.png'
  file.write_bytes(b'12')
  os.utime(file, (1, 1))
  seen = [fingerprint(tmp_path, [file], 'x')]
  assert fingerprint(tmp_path, [file], 'x') == seen[0]
  seen.append(fingerprint(tmp_path, [file], 'y'))
  seen.append(fingerprint(tmp_path.parent, [file], 'x'))
  os.utime(file, (2, 2))
  seen.append(fingerprint(tmp_path, [file], 'x'))
  file.write_bytes(b'123')
  os.utime(file, (2, 2))
  seen.append(fingerprint(tmp_path, [file], 'x'))
  file = file.rename(tmp_path / 'b.png')
  seen.append(fingerprint(tmp_path, [file], 'x'))
  assert len(set(seen)) == 6


def test_channel_statistics_by_hand(monkeypatch):
  monkeypatch.setattr(cache, '_CHUNK', 2)  # Three images: two chunks.
  images = np.zeros((3, 1, 1, 2), np.uint8)
  images[:, 0, 0, 0] = 0, 51, 102  # 0, 0.2 and 0.4
  images[:, 0, 0, 1] = 255
  mean, std = channel_statistics(images)
  np.testing.assert_allclose(mean, [0.2, 1], rtol=1e-12)
  np.testing.assert_allclose(std, [np.sqrt(0.08 / 3), 1], rtol=1e-12)  # A constant channel is divided by 1.
