import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from image_folder import config_of, spoil, write
from PIL import Image

from paranet_jax.data.load import load_dataset
from paranet_jax.data.sources import corrupt
from paranet_jax.data.sources.folder import folder_source
from paranet_jax.host.errors import UserError
from paranet_jax.portable.run import TO_SIDE


@pytest.fixture
def root(tmp_path):
  folder = tmp_path / 'images'
  folder.mkdir()
  return folder


def load(root, channels=3, **changes):
  return load_dataset(config_of(root, **changes), image_side=4, channels=channels)


def pairs(split):
  return sorted((int(label), int(image[0, 0, 0])) for image, label in zip(split.images, split.labels, strict=True))


BOTH = {
  'train/dog/a.png': 10,
  'train/dog/b.PNG': 11,
  'train/cat/c.jpg': 20,
  'train/cat/d.JPEG': 21,
  'train/ant/e.webp': 30,
  'test/dog/f.png': 12,
  'test/ant/g.png': 31,
}
SIZES = {'train/cat/c.jpg': (9, 6), 'test/ant/g.png': (4, 8)}
ONE_FOLDER = {
  f'{name}/{number}.png': 100 * label + number for label, name in enumerate(['ant', 'cat']) for number in range(8)
}


def write_all(root, values):
  for name, value in values.items():
    write(root / name, value, SIZES.get(name, (4, 4)))


def test_train_and_test_folders(root):
  write_all(root, BOTH)
  (root / 'train/dog/.hidden.png').write_bytes(b'not an image')
  (root / 'train/dog/notes.txt').write_text('not an image')
  (root / 'train/.git').mkdir()
  dataset = load(root)
  assert dataset.class_names == ('ant', 'cat', 'dog')
  assert pairs(dataset.train) == [(0, 30), (1, 20), (1, 21), (2, 10), (2, 11)]
  assert pairs(dataset.test) == [(0, 31), (2, 12)]
  assert dataset.train.images.shape == (5, 4, 4, 3)
  assert dataset.skipped == 0


def test_grey(root):
  write_all(root, BOTH)
  assert load(root, channels=1).train.images.shape == (5, 4, 4, 1)


def test_one_folder_and_a_fraction(root):
  write_all(root, ONE_FOLDER)
  dataset = load(root, test_fraction=0.25)
  assert np.bincount(dataset.test.labels).tolist() == [2, 2]
  everything = [(value // 100, value) for value in ONE_FOLDER.values()]
  assert sorted(pairs(dataset.train) + pairs(dataset.test)) == everything
  assert pairs(load(root, test_fraction=0.25).test) == pairs(dataset.test)
  assert len(load(root, test_fraction=0.5).test) == 8  # Not the cached split.


def test_images_are_scaled_as_asked(root):
  write_all(root, BOTH)
  pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  Image.fromarray(pixels).save(root / 'test/dog/c.png')
  for short_side, interpolation in ((None, 'bilinear'), (8, 'bilinear'), (6, 'bicubic')):  # Not the cached ones.
    side, method = short_side or 4, Image.Resampling[interpolation.upper()]
    border = (side - 4) // 2
    expected = np.asarray(Image.fromarray(pixels).resize((side, side), method))[border:, border:][:4, :4]
    images = load(root, short_side=short_side, interpolation=interpolation).test.images
    assert any(np.array_equal(image, expected) for image in images)


def test_changed_files_are_decoded_again(root):
  write_all(root, BOTH)
  load(root)
  write(root / 'train/dog/new.png', 13)
  assert (2, 13) in pairs(load(root).train)


def test_corrupt_file_is_named(root):
  write_all(root, BOTH)
  spoil(root / 'train/dog/b.PNG')
  message = 'found a corrupt file .*/train/dog/b.PNG .*fix or remove it, or set --config.data.on_corrupt=skip'
  with pytest.raises(UserError, match=message):
    load(root)


def test_corrupt_files_are_skipped_and_counted(root):
  write_all(root, BOTH)
  write(root / 'test/ant/h.png', 32)
  spoil(root / 'train/dog/b.PNG')
  spoil(root / 'test/ant/g.png')
  for _ in range(2):  # Decoded, then from the cache.
    dataset = load(root, on_corrupt='skip')
    assert dataset.skipped == 2
    assert pairs(dataset.train) == [(0, 30), (1, 20), (1, 21), (2, 10)]
    assert pairs(dataset.test) == [(0, 32), (2, 12)]
  with pytest.raises(UserError, match='found a corrupt file'):
    load(root)  # What was skipped once is not forgotten by the cache.


def test_class_of_corrupt_files_only(root):
  write_all(root, BOTH)
  spoil(root / 'train/ant/e.webp')
  with pytest.raises(UserError, match="images of class 'ant' in train, found only corrupt files: fix or remove them"):
    load(root, on_corrupt='skip')


def test_more_images_than_a_chunk(root, monkeypatch):
  monkeypatch.setattr('paranet_jax.data.cache._READ', 3)
  write_all(root, ONE_FOLDER)
  spoil(root / 'ant/0.png')
  dataset = load(root, on_corrupt='skip')
  everything = [(value // 100, value) for value in ONE_FOLDER.values()]
  assert sorted(pairs(dataset.train) + pairs(dataset.test)) == everything[1:]


SUFFIXES = 'png jpg jpeg jfif webp gif bmp tif tiff ppm pgm pbm pnm JPG Tif'.split()


def test_every_suffix_and_nested_folders(root, caplog):
  names = [f'{label}/more/even more.png/{number}.{suffix}' for label in 'ab' for number, suffix in enumerate(SUFFIXES)]
  for name in (*names, 'readme.txt', 'b/labels.json', '__MACOSX/a/x.png', 'a/@eaDir/x.png', '.cache/x.png'):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new('L', (4, 4), 7).save(root / name, 'PNG')  # Whatever the suffix says.
  dataset = load(root)
  assert dataset.class_names == ('a', 'b') and len(dataset.train) + len(dataset.test) == len(names)
  (line,) = [message for message in caplog.messages if message.startswith('left out')]
  assert line.startswith('left out 5 files, hidden or without the suffix of an image: ') and line.endswith('and 2 more')
  assert folder_source(config_of(root), 4, 3).left_out == 5


def dangling(path):
  path.symlink_to('gone.png')


def pipe(path):
  os.mkfifo(path)


def device(path):
  path.symlink_to('/dev/zero')


IRREGULAR = {
  dangling: 'a link to a file that does not exist',
  pipe: 'not a regular file',
  device: '(not a regular file|a link to a file that does not exist)',
}


@pytest.mark.parametrize('make', IRREGULAR, ids=lambda make: make.__name__)
def test_regular_files_only(root, caplog, make):
  write_all(root, ONE_FOLDER)
  make(root / 'ant/odd.png')
  (root / 'ant/linked.png').symlink_to(root / 'cat/0.png')
  fix = 'fix or remove it, or set --config.data.on_corrupt=skip'
  with pytest.raises(UserError, match=f'^expected a readable image, found {IRREGULAR[make]} at .*/ant/odd.png: {fix}$'):
    load(root)
  dataset = load(root, on_corrupt='skip')
  assert len(dataset.train) + len(dataset.test) == len(ONE_FOLDER) + 1
  assert re.search(f'Skipping .*/ant/odd.png: {IRREGULAR[make]}', caplog.text)
  assert folder_source(config_of(root, on_corrupt='skip'), 4, 3).left_out == 1


@pytest.mark.parametrize(
  ('link', 'target', 'found'),
  [
    ('cat/all', '..', 'ant of class .ant. and .*/cat/all/ant of class .cat.'),
    ('cat/more', '../ant', 'ant of class .ant. and .*/cat/more of class .cat.'),
    ('kitten', 'cat', 'cat of class .cat. and .*/kitten of class .kitten.'),
    ('ant/some', '../cat/young', 'ant/some of class .ant. and .*/cat/young of class .cat.'),
  ],
)
def test_a_folder_linked_into_another_class(root, link, target, found):
  write_all(root, {**ONE_FOLDER, 'cat/young/a.png': 1})
  (root / link).symlink_to(target)
  message = f'^expected each folder of images in one class, found .*/{found} to be the same: remove the link to it$'
  with pytest.raises(UserError, match=message):
    load(root)


TWO_FOLDERS = {'train/ant/a.png': 1, 'train/cat/a.png': 2, 'test/ant/a.png': 3, 'test/cat/a.png': 4}


@pytest.mark.parametrize('splits', [('train', 'test'), ('Train', 'Val', 'test')])
def test_splits_without_classes(root, splits):
  write_all(root, {f'{split}/{number}.png': number for split in splits for number in range(8)})
  message = f'^expected a folder for each class in {splits[0]}/ and test/ of {root}, found images directly there: move '
  with pytest.raises(UserError, match=message):
    load(root)
  write_all(root, {f'bus/{number}.png': number for number in range(8)})
  assert load(root).class_names == tuple(sorted(['bus', *splits]))


def test_a_folder_linked_into_both_splits(root):
  write_all(root, TWO_FOLDERS)
  (root / 'test/ant/more').symlink_to('../../train/ant')
  message = '^expected other images to test on than to train on, found .*/test/ant/more and .*/train/ant to be the same'
  with pytest.raises(UserError, match=message):
    load(root)


@pytest.mark.parametrize('entry', ['checkpoints/100/state', 'dataset.json'])
def test_runs_beside_the_classes_are_no_class(root, entry):
  write_all(root, ONE_FOLDER)
  expected = load(root)
  for place in ('runs/PN3/config.json', f'runs/PN3/{entry}'):
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).write_text('{}')
  write_all(root, {'runs/PN3/curves.png': 7, 'runs/PN3/exits/budgeted.png': 8})
  found = load(root)
  assert found.class_names == ('ant', 'cat')
  assert (pairs(found.train), pairs(found.test)) == (pairs(expected.train), pairs(expected.test))
  # A folder of images is a class whatever lies in it.
  write_all(root, {f'runs/{number}.png': 200 + number for number in range(8)})
  assert load(root).class_names == ('ant', 'cat', 'runs')


def test_images_in_both_splits_are_counted(root, caplog):
  write_all(root, TWO_FOLDERS)
  load(root)
  assert 'also in train' not in caplog.text
  shutil.copy(root / 'train/ant/a.png', root / 'test/ant/copy.png')
  load(root)
  write_all(root, {'val/ant/a.png': 5, '.hidden/a.png': 6})
  caplog.clear()
  assert len(load(root).test) == 3
  assert f'left out 1 file, beside train/ and test/: {root}/val/ant/a.png' in caplog.text
  assert f'left out 1 file, hidden or without the suffix of an image: {root}/.hidden/a.png' in caplog.text
  assert f'test has 1 images that are also in train of {root}: they do not tell how new ones fare' in caplog.text


def test_a_folder_linked_into_its_own_class(root):
  write_all(root, {**ONE_FOLDER, 'cat/young/a.png': 1})
  (root / 'cat/again').symlink_to('young')
  (root / 'cat/itself').symlink_to('.')
  dataset = load(root)
  assert len(dataset.train) + len(dataset.test) == len(ONE_FOLDER) + 1


@pytest.mark.parametrize(
  ('closed', 'message'),
  [
    ('ant/closed', 'found Permission denied at .*/ant/closed: fix or remove it, or set --config'),
    ('zoo', 'found Permission denied at .*/zoo: make it readable or remove it$'),
  ],
)
def test_a_folder_that_cannot_be_listed(root, monkeypatch, closed, message):
  write_all(root, {**ONE_FOLDER, f'{closed}/a.png': 1})
  scandir = os.scandir

  def refuse(folder):
    if str(folder).endswith(closed):
      raise PermissionError(13, 'Permission denied', folder)
    return scandir(folder)

  monkeypatch.setattr(os, 'scandir', refuse)
  with pytest.raises(UserError, match=message):
    load(root)


@pytest.mark.parametrize('streaming', [False, True])
def test_a_file_that_may_not_be_read(root, monkeypatch, caplog, streaming):
  write_all(root, ONE_FOLDER)
  read_bytes = Path.read_bytes

  def refuse(path):
    if path.name == '3.png' and path.parent.name == 'ant':
      raise PermissionError(13, 'Permission denied', str(path))
    return read_bytes(path)

  monkeypatch.setattr(Path, 'read_bytes', refuse)
  fix = 'change its permissions or remove it, or set --config.data.on_corrupt=skip'
  with pytest.raises(UserError, match=f'^expected a readable image, found Permission denied at .*/ant/3.png: {fix}$'):
    load(root, streaming=streaming)
  dataset = load(root, on_corrupt='skip', streaming=streaming)
  assert (len(dataset.train) + len(dataset.test), dataset.skipped) == (len(ONE_FOLDER) - 1, 1)
  assert re.search('Skipping .*/ant/3.png: Permission denied', caplog.text)


@pytest.mark.parametrize('on_corrupt', ['refuse', 'skip'])
def test_a_file_that_does_not_fit_the_memory(root, monkeypatch, on_corrupt):
  write_all(root, ONE_FOLDER)

  def refuse(path):
    raise MemoryError

  monkeypatch.setattr(Path, 'read_bytes', refuse)
  with pytest.raises(UserError, match='found .*/ant/.*png of more bytes: remove it, or free memory$'):
    load(root, on_corrupt=on_corrupt)


@pytest.mark.parametrize('on_corrupt', ['refuse', 'skip'])
def test_a_file_that_cannot_be_decoded_in_the_memory_is_not_corrupt(root, monkeypatch, on_corrupt):
  write_all(root, ONE_FOLDER)

  def refuse(*_, **__):
    raise MemoryError

  monkeypatch.setattr(corrupt, 'decode_image', refuse)
  with pytest.raises(UserError, match='found file .*/ant/.*png that needs more to be decoded: free memory, or scale'):
    load(root, on_corrupt=on_corrupt)


@pytest.mark.parametrize('test', ['test', 'val', 'validation'])
def test_names_of_the_test_split(root, test):
  write_all(root, {name.replace('test/', f'{test}/'): value for name, value in BOTH.items()})
  write_all(root, {'train/stray.png': 1, 'cover.jpg': 1})
  write_all(root, {} if test == 'validation' else {'validation/dog/y.png': 1})
  assert pairs(load(root).test) == [(0, 31), (2, 12)]
  assert folder_source(config_of(root), 4, 3).left_out == 2 + (test != 'validation')


@pytest.mark.parametrize('names', [('Training', 'Testing'), ('TRAIN', 'Val'), ('training', 'valid')])
def test_other_names_of_the_splits(root, names):
  for old, new in zip(('train/', 'test/'), names, strict=True):
    write_all(root, {name.replace(old, f'{new}/'): value for name, value in BOTH.items() if name.startswith(old)})
  assert pairs(load(root).test) == [(0, 31), (2, 12)]


@pytest.mark.parametrize('names', [('bus', 'car', 'train'), ('bus', 'test', 'train'), ('bus', 'val')])
def test_classes_with_the_name_of_a_split(root, names):
  write_all(root, {f'{name}/{number}.png': 9 for name in names for number in range(4)})
  dataset = load(root)
  assert dataset.class_names == names and len(dataset.train) + len(dataset.test) == 4 * len(names)


def test_too_many_pixels(root, monkeypatch):
  write_all(root, ONE_FOLDER)
  monkeypatch.setattr('paranet_jax.portable.run.decode_image.__defaults__', (15, 10**9, TO_SIDE))
  fix = 'scale it down, or set --config.data.on_corrupt=skip'
  with pytest.raises(UserError, match=f'^expected at most 15 pixels, found 4 x 4 in file .*/0.png: {fix}$'):
    load(root)


IMAGE, TEXT, HALF, LINK, GONE = 'image', 'text', 'half', 'link', 'gone'
USED = ('train/cat', 'train/cat/more', 'train/dog/x.png', 'test/dog')
LEFT_OUT = ('', 'train', 'val/cat', 'other', 'train/dog/.git', 'train/dog/@eaDir', 'test/.a/b', '__MACOSX/cat')
NAMES = (*(f'{number}.{suffix}' for number in range(3) for suffix in SUFFIXES), 'a', '.a.png', 'b.txt', 'Thumbs.db')


def test_every_file_is_used_skipped_or_left_out(tmp_path_factory):
  from hypothesis import given, settings, strategies  # Seconds to import, which other tests do not wait for.

  trees = strategies.dictionaries(
    strategies.tuples(strategies.sampled_from(USED + LEFT_OUT), strategies.sampled_from(NAMES)),
    strategies.sampled_from([IMAGE, IMAGE, IMAGE, TEXT, HALF, LINK, GONE]),
    max_size=12,
  )
  every = given(trees)(lambda tree: assert_every_file_is_counted(tmp_path_factory.mktemp('tree'), tree))
  settings(max_examples=40, deadline=None)(every)()


def assert_every_file_is_counted(root, tree):
  write_all(root, {f'{split}/{name}/whole.png': 9 for split in ('train', 'test') for name in ('cat', 'dog')})
  whole = (root / 'test/cat/whole.png').read_bytes()
  for (folder, name), kind in tree.items():
    path = root / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind in (LINK, GONE):
      path.symlink_to(root / ('test/cat/whole.png' if kind == LINK else 'nowhere'))
    else:
      path.write_bytes({IMAGE: whole, TEXT: b'text', HALF: whole[:45]}[kind])
  dataset, source = load(root, on_corrupt='skip'), folder_source(config_of(root, on_corrupt='skip'), 4, 3)
  found = sum(len(files) for _, _, files in os.walk(root))
  used = len(dataset.train) + len(dataset.test)
  assert used + dataset.skipped + source.left_out == found == len(tree) + 4
  expected = sum(
    kind in (IMAGE, LINK) and folder in USED and name.lower().endswith(tuple(SUFFIXES)) and not name.startswith('.')
    for (folder, name), kind in tree.items()
  )
  assert used == 4 + expected


# What is written ('/' ends an empty folder), changes of the configuration, and the message.
ERRORS = {
  'no images': ([], {}, r'expected <class>/\*.png.* in .*images, found no images there: .*data_dir=\.\.\.'),
  'no classes': (['a.png'], {}, 'found images but no class folders there: name another folder'),
  'empty class': ([*BOTH, 'train/bee/'], {}, "found no images of class 'bee': add some or remove .*/train/bee"),
  'empty test class': ([*BOTH, 'test/cat/'], {}, "found no images of class 'cat': add some or remove .*/test/cat"),
  'no test': (
    ['train/dog/a.png'],
    {},
    r'expected both train/ and test/ \(or val/\) in .*, found only train/: .*test_fraction=0.2',
  ),
  'no train': (['test/dog/a.png'], {}, 'found only test/'),
  'class of test only': (
    [*BOTH, 'test/bee/a.png'],
    {},
    'expected the classes of .*/train, found bee in .*/test only: move them',
  ),
  'one class': (
    ['train/dog/a.png', 'test/dog/b.png'],
    {},
    "expected 2 class folders or more, found only 'dog' in .*: add another class",
  ),
  'no class folders': (['train/', 'test/'], {}, 'with class folders, found none in train/'),
  'names that look the same': (
    ['caf\u00e9/a.png', 'cafe\u0301/a.png'],
    {},
    r"found 'cafe\\u0301' and 'caf\\xe9', which differ only in their Unicode form: rename one to the other",
  ),
  'one name in two forms': (
    ['train/caf\u00e9/a.png', 'train/bar/a.png', 'test/cafe\u0301/a.png'],
    {},
    r"found 'caf\\xe9' and 'cafe\\u0301', which differ only",
  ),
  'no folder named': ([], {'data_dir': ''}, 'found none given: name it with --config.data.data_dir='),
  'no such folder': ([], {'data_dir': '/no/such'}, 'found no folder /no/such: name it with --config.data.data_dir='),
  'on_corrupt': ([], {'on_corrupt': 'ignore'}, "expected 'refuse' or 'skip', found 'ignore': .*on_corrupt=skip"),
  'no fraction': (ONE_FOLDER, {'test_fraction': 0.0}, 'found 0.0 of 16 images in .*: .*test_fraction=0.2'),
  'single images': (
    ['cat/a.png', 'dog/a.png'],
    {'test_fraction': 0.2},
    'found 0.2 of 2 images in .*: add images: one class at least needs two$',
  ),
  'few images': (  # 0.2 of 9 are 2, of which one would be all of a class.
    [f'{name}/a.png' for name in 'abcdefgh'] + ['a/b.png'],
    {'test_fraction': 0.2},
    'found 0.2 of 9 images in .*: set --config.data.test_fraction=0.11$',
  ),
  'whole fraction': (ONE_FOLDER, {'test_fraction': 1.0}, 'found 1.0 of 16 images'),
  'negative fraction': (ONE_FOLDER, {'test_fraction': -0.5}, 'found -0.5 of 16 images'),
}


@pytest.mark.parametrize('case', ERRORS)
def test_errors(root, case):
  written, changes, message = ERRORS[case]
  for name in written:
    if name.endswith('/'):
      (root / name).mkdir()
    else:
      write(root / name, 1)
  with pytest.raises(UserError, match=message) as error:
    load(root, **changes)
  assert '\n' not in str(error.value)
