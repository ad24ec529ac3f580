import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from paranet_jax.data.load import load_dataset
from paranet_jax.host.errors import UserError


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('PARANET_CACHE_DIR', str(tmp_path / 'cache'))


@pytest.fixture
def root(tmp_path):
  folder = tmp_path / 'images'
  folder.mkdir()
  return folder


def write(path, value, size=(4, 4)):
  """One image of a single grey value, width and height in pixels."""
  path.parent.mkdir(parents=True, exist_ok=True)
  options = {'lossless': True} if path.suffix.lower() == '.webp' else {}
  Image.new('RGB', size, (value,) * 3).save(path, **options)


def load(root, channels=3, **changes):
  config = ConfigDict(
    {
      'name': 'folder',
      'data_dir': str(root),
      'held_out': 0,
      'test_fraction': 0.25,
      'on_corrupt': 'refuse',
      'crop_padding': 0,
      'flip': False,
      'streaming': None,
      'workers': 0,
      **changes,
    }
  )
  return load_dataset(config, image_side=4, channels=channels)


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


def test_changed_files_are_decoded_again(root):
  write_all(root, BOTH)
  load(root)
  write(root / 'train/dog/new.png', 13)
  assert (2, 13) in pairs(load(root).train)


def spoil(path):
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])


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


# What is written ('/' ends an empty folder), changes of the configuration, and the message.
ERRORS = {
  'no images': ([], {}, r'expected <class>/\*.png.* in .*images, found no images there: .*data_dir=\.\.\.'),
  'no classes': (['a.png'], {}, 'found no images there'),
  'empty class': ([*BOTH, 'train/bee/'], {}, "found no images of class 'bee': add some or remove .*/train/bee"),
  'empty test class': ([*BOTH, 'test/cat/'], {}, "found no images of class 'cat': add some or remove .*/test/cat"),
  'no test': (
    ['train/dog/a.png'],
    {},
    'expected both train/ and test/ in .*, found only train/: .*test_fraction=0.2',
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
  'not a file': (
    [*BOTH, 'train/dog/folder.png/'],
    {},
    'expected a readable image, found Is a directory at .*/folder.png',
  ),
  'no folder named': ([], {'data_dir': ''}, 'found none given: name it with --config.data.data_dir='),
  'no such folder': ([], {'data_dir': '/no/such'}, 'found no folder /no/such: name it with --config.data.data_dir='),
  'on_corrupt': ([], {'on_corrupt': 'ignore'}, "expected 'refuse' or 'skip', found 'ignore': .*on_corrupt=skip"),
  'no fraction': (ONE_FOLDER, {'test_fraction': 0.0}, 'found 0.0 of 16 images in .*: .*test_fraction=0.2'),
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
