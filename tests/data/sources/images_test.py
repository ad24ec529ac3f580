"""Tests of images without labels."""

import numpy as np
import pytest
from image_folder import config_of, spoil, write

from paranet_jax.data.identity import Known, Learned
from paranet_jax.data.load import load_dataset
from paranet_jax.host.errors import UserError

NAMES = ['a.png', 'b.JPG', 'cats/c.png', 'cats/more/d.webp', 'train/e.png', 'test/f.png', 'cats/g.png', 'h.gif']


@pytest.fixture
def root(tmp_path):
  for number, name in enumerate(NAMES):
    write(tmp_path / 'images' / name, 10 * number)
  (tmp_path / 'images/notes.txt').write_text('no image')
  return tmp_path / 'images'


def load(root, learned=None, num_classes=5, **changes):
  config = config_of(root, **({'name': 'images', 'held_out': 2} | changes))
  return load_dataset(config, image_side=4, channels=3, num_classes=num_classes, learned=learned)


def values(split):
  return sorted(np.asarray(split.images[:])[:, 0, 0, 0].tolist())


def test_all_images_whatever_their_folders(root, caplog):
  dataset = load(root)
  splits = dataset.train, dataset.held_out, dataset.test
  assert [len(split) for split in splits] == [4, 2, 2]
  assert sorted(sum(map(values, splits), [])) == pytest.approx([10 * number for number in range(8)], abs=1)
  assert not dataset.labeled and not any(split.labels.any() for split in splits)
  assert dataset.class_names == tuple(f'class {number}' for number in range(5))
  assert 'left out 1 file' in caplog.text
  streamed = load(root, streaming=True)
  for before, after in zip(splits, (streamed.train, streamed.held_out, streamed.test), strict=True):
    np.testing.assert_array_equal(before.images, after.images[:])
  assert streamed.mean == pytest.approx(dataset.mean)


def test_added_images_move_no_other_one(root):
  before = load(root)
  learned = Learned(
    root,
    before.class_names,
    before.mean,
    before.std,
    splits={name: Known(part.identities, part.labels) for name, part in splits_of(before).items()},
    limits=before.limits,
  )
  for number in range(8):
    write(root / f'more/{number}.png', 200 + number)
  after = load(root, learned)
  for name, part in splits_of(before).items():
    assert set(part.identities) <= set(splits_of(after)[name].identities)
  assert (after.mean, after.std) == (before.mean, before.std)
  assert load(root).mean != before.mean


def splits_of(dataset):
  return {'train': dataset.train, 'held_out': dataset.held_out, 'test': dataset.test}


def test_corrupt_files(root):
  spoil(root / 'cats/c.png')
  with pytest.raises(UserError, match='found a corrupt file .*cats/c.png .*fix or remove it, or set'):
    load(root)
  assert load(root, on_corrupt='skip').skipped == 1
  for path in root.rglob('*.*'):
    path.write_bytes(b'nothing')
  with pytest.raises(UserError, match='expected images in train, found only corrupt files: fix or remove them'):
    load(root, on_corrupt='skip')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'data_dir': ''}, 'expected a folder of images, found none given: name it with --config.data.data_dir=...'),
    ({'data_dir': '{root}/a.png'}, 'expected a folder of images, found no folder {root}/a.png: name it'),
    ({'data_dir': '{root}/empty'}, 'expected images (.png .jpg '),
    ({'test_fraction': 0.01}, 'expected a share that leaves an image to train on and one to test on, found 0.01 of 8'),
    ({'test_fraction': 0.99}, 'expected a share that leaves an image to train on and one to test on, found 0.99 of 8'),
    ({'num_classes': None}, 'expected the number of classes, which the images without labels in {root} do not tell: '),
  ],
)
def test_what_does_not_fit_is_refused(root, changes, message):
  (root / 'empty').mkdir()
  changes = {key: value.format(root=root) if isinstance(value, str) else value for key, value in changes.items()}
  with pytest.raises(UserError) as error:
    load(root, **changes)
  assert str(error.value).startswith(message.format(root=root))
