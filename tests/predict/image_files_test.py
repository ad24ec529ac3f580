"""Tests of listing image files, and of decoding them ahead in order."""

import os
import threading
import warnings

import numpy as np
import pytest
from PIL import Image

from paranet_jax.portable import run
from paranet_jax.portable.run import BundleError, find_images, left_out_line, list_images
from paranet_jax.predict import image_files
from paranet_jax.predict.image_files import read_batches


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


def write(path, value=0, size=(4, 4)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('L', size, value).save(path, 'PNG')


def test_listing(tmp_path):
  names = 'd/b.PNG', 'd/a.jpg', 'd/c/z.tiff', 'd/c.webp', 'd/p.pgm', 'd/x.jfif/y.bmp', 'd/.hidden.png', 'd/.git/x.png'
  for name in (*names, 'd/notes.txt', 'd/__MACOSX/._a.jpg', 'd/c/@eaDir/z.png', 'other'):
    write(tmp_path / name)
  (tmp_path / 'linked').mkdir()
  write(tmp_path / 'linked' / 'l.gif')
  (tmp_path / 'd' / 'link').symlink_to(tmp_path / 'linked')
  (tmp_path / 'd' / 'loop').symlink_to(tmp_path / 'd')
  (tmp_path / 'd' / 'gone.png').symlink_to('nowhere')
  found = ['d/a.jpg', 'd/b.PNG', 'd/c.webp', 'd/c/z.tiff', 'd/gone.png', 'd/link/l.gif', 'd/p.pgm', 'd/x.jfif/y.bmp']
  left_out = ['d/.git/x.png', 'd/.hidden.png', 'd/__MACOSX/._a.jpg', 'd/c/@eaDir/z.png', 'd/notes.txt']
  assert list_images(['d', 'missing.png', 'other']) == ([*found, 'missing.png', 'other'], left_out)
  assert list_images(['d/c', 'd/c']) == (['d/c/z.tiff'] * 2, ['d/c/@eaDir/z.png'] * 2)
  assert left_out_line(left_out) == (
    'left out 5 files, hidden or without the suffix of an image: d/.git/x.png, d/.hidden.png, d/__MACOSX/._a.jpg '
    'and 2 more'
  )
  assert left_out_line(['x.txt']) == 'left out 1 file, hidden or without the suffix of an image: x.txt'


def test_links_take_no_image_from_its_own_folder(tmp_path):
  write(tmp_path / 'd' / 'z' / 'x.png')
  (tmp_path / 'd' / 'a').symlink_to('z')
  (tmp_path / 'd' / '.a').symlink_to('z')
  (tmp_path / 'd' / 'circle.png').symlink_to('circle.png')
  assert find_images('d') == (['d/z/x.png'], [('d/circle.png', 'a link to a file that does not exist')], [])


def test_a_hidden_place_takes_no_image_from_a_link(tmp_path):
  """`.b` and `photos` are one folder; `far/photos` is in `.c`, and only `e` leads there."""
  write(tmp_path / 'b' / 'x.png')
  write(tmp_path / 'd' / '.c' / 'photos' / 'y.png')
  write(tmp_path / 'd' / '.c' / 'z.png')
  (tmp_path / 'far').mkdir()
  for place, target in (('d/.b', 'b'), ('d/photos', 'b'), ('d/e', 'far'), ('far/photos', 'd/.c/photos')):
    (tmp_path / place).symlink_to(tmp_path / target)
  assert find_images('d') == (['d/e/photos/y.png', 'd/photos/x.png'], [], ['d/.c/z.png'])


def test_a_folder_that_cannot_be_listed_is_listed_as_a_file(tmp_path, monkeypatch):
  for name in ('d/a.png', 'd/closed/b.png', 'd/.closed/c.png'):
    write(tmp_path / name)
  scandir = os.scandir

  def refuse(folder):
    if folder.endswith('closed'):
      raise PermissionError(13, 'Permission denied', folder)
    return scandir(folder)

  monkeypatch.setattr(run.os, 'scandir', refuse)
  assert list_images(['d']) == (['d/a.png', 'd/closed'], ['d/.closed'])


@pytest.mark.parametrize(
  ('paths', 'message'),
  [
    ([], 'expected image files or folders of images, found none; name them after the flags'),
    (
      ['a.png', 'empty'],
      'expected images (.png .jpg .jpeg .jfif .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm) in empty, found none; '
      'name another folder, or files',
    ),
  ],
)
def test_nothing_to_read(tmp_path, paths, message):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'empty' / 'notes.txt').write_text('text')
  with pytest.raises(BundleError) as caught:
    list_images(paths)
  assert str(caught.value) == message


def test_batches_keep_the_order_and_omit_unreadable_files(tmp_path):
  for i in range(7):
    write(tmp_path / f'{i}.png', value=i)
  files = ['0.png', '1.png', 'gone.png', '3.png', '4.png', '5.png', 'gone.png', 'gone.png', 'gone.png', '2.png']
  batches = list(read_batches(files, 2, 3, 3))
  assert [batch.files for batch in batches] == [['0.png', '1.png'], ['3.png', '4.png', '5.png'], [], ['2.png']]
  gone = ('gone.png', 'No such file or directory')
  assert [batch.unreadable for batch in batches] == [[gone], [], [gone] * 3, []]
  assert all(batch.images.dtype == np.uint8 for batch in batches)
  expected = [np.full((2, 2, 3), int(file[0])) for batch in batches for file in batch.files]
  np.testing.assert_array_equal(np.concatenate([batch.images for batch in batches]), expected)
  assert list(read_batches([], 2, 3, 3)) == []


def test_images_are_scaled_as_asked(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / 'a.png')
  (batch,) = read_batches(['a.png'], 2, 3, 1, scaling=run.Scaling(6))
  np.testing.assert_array_equal(batch.images, [pixels[2:4, 2:4]])


def test_two_later_batches_are_decoded_ahead(monkeypatch):
  decoded, ready = [], threading.Semaphore(0)

  def decode(file, side, channels, **_):
    decoded.append(file)
    ready.release()
    return np.zeros((side, side, channels), np.uint8)

  monkeypatch.setattr(image_files, 'read_image', decode)
  files = [str(i) for i in range(20)]
  batches = read_batches(files, 1, 1, 2)
  for taken in range(1, 8):
    assert next(batches).files == files[2 * taken - 2 : 2 * taken]
    for _ in range(6 if taken == 1 else 2):
      assert ready.acquire(timeout=10)  # Decoded before anything asks for it.
    assert sorted(decoded, key=int) == files[: 2 * taken + 4]
  batches.close()


def reasons(*files):
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # As the command does, see predict_test.py.
    (batch,) = read_batches(files, 2, 1, len(files))
  assert not batch.files and [file for file, _ in batch.unreadable] == list(files)
  return [reason for _, reason in batch.unreadable]


def test_reasons(tmp_path):
  (tmp_path / 'text.png').write_text('not an image')
  (tmp_path / 'empty.png').touch()
  (tmp_path / 'folder.png').mkdir()
  os.mkfifo(tmp_path / 'pipe.png')
  (tmp_path / 'broken.png').symlink_to('nowhere')
  unknown = 'not an image in a known format (PNG, JPEG, GIF, BMP, PPM, WEBP, TIFF)'
  assert reasons('text.png', 'empty.png', 'folder.png', 'pipe.png', 'broken.png') == [
    unknown,
    unknown,
    'Is a directory',
    'not a regular file',
    'a link to a file that does not exist',
  ]


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'webp', 'bmp', 'tif', 'gif'])
def test_half_a_file_has_a_reason_of_one_line(tmp_path, suffix):
  path = tmp_path / f'cut.{suffix}'
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  (reason,) = reasons(path.name)
  assert reason and '\n' not in reason and ('truncated' in reason or suffix not in ('png', 'jpg'))


def test_a_decompression_bomb(tmp_path, monkeypatch):
  write(tmp_path / 'bomb.png', size=(30, 30))
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 400)  # Pillow refuses more than twice as many.
  assert reasons('bomb.png') == ['expected at most 178,956,970 pixels, found many more; set --max-pixels']


def test_no_permission(tmp_path, monkeypatch):
  def refuse(file, mode):
    raise PermissionError(13, 'Permission denied', file)

  write(tmp_path / 'a.png')
  monkeypatch.setattr('builtins.open', refuse)
  assert reasons('a.png') == ['Permission denied']
