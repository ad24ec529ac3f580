"""Tests of the pass over stored images: the same splits as decoded ones, once, and what it refuses."""

import os

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from paranet_jax.data import load as load_lib
from paranet_jax.data import scan
from paranet_jax.data.load import load_dataset
from paranet_jax.host.errors import UserError


@pytest.fixture(autouse=True)
def _in_chunks(monkeypatch):
  monkeypatch.setattr(scan, '_CHUNK', 3)


@pytest.fixture
def photos(tmp_path):
  """Nine images of two classes, of several sizes, and a cache of two."""
  rng = np.random.default_rng(0)
  for label, count in (('cat', 5), ('dog', 4)):
    for number in range(count):
      path = tmp_path / 'photos' / label / f'{number}.png'
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(rng.integers(0, 256, (7 + number, 9, 3), dtype=np.uint8)).save(path)
  return tmp_path / 'photos'


def load(name, data_dir='', streaming=True, **changes):
  config = {'name': name, 'data_dir': str(data_dir), 'held_out': 0, 'test_fraction': 0.3, 'on_corrupt': 'refuse'}
  config |= {'crop_padding': None, 'flip': None, 'streaming': streaming, 'workers': 0, **changes}
  return load_dataset(ConfigDict(config), image_side=6, channels=3)


def check_same(stored, decoded):
  for name in ('train', 'held_out', 'test'):
    found, expected = getattr(stored, name), getattr(decoded, name)
    if expected is None:
      assert found is None
      continue
    assert found.streamed and not expected.streamed
    np.testing.assert_array_equal(found.images[:], expected.images)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert found.labels.dtype == np.int32
  assert (stored.mean, stored.std, stored.skipped) == (decoded.mean, decoded.std, decoded.skipped)


@pytest.mark.parametrize('streaming', [False, True])
@pytest.mark.parametrize('mode', ['nothing may be entered', 'it may be listed'])
def test_a_cache_that_may_not_be_entered(photos, tmp_path, monkeypatch, caplog, streaming, mode):
  splits = {own: load('folder', photos, streaming=own) for own in (True, False)}
  cache = tmp_path / 'closed' / 'cache'
  (cache / 'entry').mkdir(parents=True)
  monkeypatch.setenv('PARANET_CACHE_DIR', str(cache))
  closed = f'{cache}/' if mode == 'it may be listed' else f'{cache}'
  refused = []

  def refuse(name):
    of_system = getattr(os, name)

    def call(path, *arguments, **options):
      if isinstance(path, str | os.PathLike) and f'{os.fspath(path)}'.startswith(closed):
        refused.append(name)
        raise PermissionError(13, 'Permission denied', str(path))
      return of_system(path, *arguments, **options)

    monkeypatch.setattr(os, name, call)

  for name in ('stat', 'mkdir', 'scandir'):  # What the tests' user, if it is root, is not refused.
    refuse(name)
  splits[streaming] = load('folder', photos, streaming=streaming)
  check_same(splits[True], splits[False])
  assert {'stat', 'mkdir'} <= set(refused)
  (message,) = caplog.messages
  assert message.startswith('Continuing without ') and 'Permission denied' in message


@pytest.mark.parametrize('held_out', [0, 2])
def test_a_folder_is_as_decoded(photos, held_out):
  check_same(load('folder', photos, held_out=held_out), load('folder', photos, streaming=False, held_out=held_out))


def test_digits_are_as_decoded(monkeypatch):
  monkeypatch.setattr(scan, '_CHUNK', 500)
  check_same(load('digits', held_out=300), load('digits', streaming=False, held_out=300))


def test_corrupt_images_are_skipped_alike(photos):
  (photos / 'cat' / '1.png').write_bytes(b'no picture')
  (photos / 'dog' / '3.png').write_bytes((photos / 'dog' / '3.png').read_bytes()[:80])
  options = {'on_corrupt': 'skip', 'test_fraction': 0.25}
  stored = load('folder', photos, **options)
  assert stored.skipped == 2
  check_same(stored, load('folder', photos, streaming=False, **options))


def test_corrupt_images_are_refused(photos):
  (photos / 'cat' / '1.png').write_bytes(b'no picture')
  with pytest.raises(UserError, match='expected an image, found a corrupt file .*cat/1.png .*on_corrupt=skip'):
    load('folder', photos)


def test_a_class_of_corrupt_images_alone(photos):
  for path in (photos / 'dog').iterdir():
    path.write_bytes(b'no picture')
  with pytest.raises(
    UserError, match="expected images of class 'dog' in train, found only corrupt files: fix or remove them"
  ) as error:
    load('folder', photos, on_corrupt='skip')
  assert '\n' not in str(error.value)


def test_images_are_read_once_until_a_file_changes(photos, cache_folder, monkeypatch):
  reads = []
  scan_all = scan._scan
  monkeypatch.setattr(scan, '_scan', lambda *arguments: reads.append(1) or scan_all(*arguments))
  first = load('folder', photos)
  again = load('folder', photos)
  assert len(reads) == 1 and (again.mean, len(again.train)) == (first.mean, len(first.train))
  assert [path.name for path in cache_folder.rglob('*') if path.is_file()] == ['stored.npz']
  for path in (photos / 'cat').iterdir():
    Image.new('RGB', (9, 9)).save(path)
  assert load('folder', photos).mean != first.mean
  assert len(reads) == 2


def test_a_damaged_file_is_written_again(photos, cache_folder, caplog):
  first = load('folder', photos)
  (kept,) = cache_folder.rglob('stored.npz')
  whole = kept.read_bytes()
  kept.write_bytes(whole[:100])
  assert load('folder', photos).mean == first.mean
  assert f'{kept} is damaged and will be written again' in caplog.text
  assert len(kept.read_bytes()) == len(whole)


def test_it_continues_without_a_cache(photos, cache_folder, caplog):
  cache_folder.write_text('a file where the folder should be')
  assert load('folder', photos).train.streamed
  assert 'Continuing without writing' in caplog.text


# 1,797 images of 6 x 6 pixels and 3 channels.
@pytest.mark.parametrize('above, streamed', [(1797 * 108, False), (1797 * 108 - 1, True)])
def test_streamed_above_a_size(above, streamed, monkeypatch):
  assert load_lib.STREAM_ABOVE == 2 * 10**9
  monkeypatch.setattr(load_lib, 'STREAM_ABOVE', above)
  monkeypatch.setattr(scan, '_CHUNK', 500)
  assert load('digits', streaming=None).train.streamed is streamed
