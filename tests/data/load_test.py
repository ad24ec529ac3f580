import numpy as np
import pytest
from ml_collections import ConfigDict

from paranet_jax.data.load import load_dataset
from paranet_jax.host.errors import UserError


def load(image_side=8, channels=1, num_classes=None, **changes):
  config = {'name': 'digits', 'data_dir': '', 'held_out': 0, 'crop_padding': None, 'flip': None}
  config |= {'streaming': None, 'workers': 0, **changes}
  return load_dataset(ConfigDict(config), image_side=image_side, channels=channels, num_classes=num_classes)


def test_digits():
  dataset = load(image_side=32, channels=3)
  assert (dataset.name, dataset.crop_padding, dataset.flip, dataset.skipped) == ('digits', 1, False, 0)
  assert dataset.held_out is None
  assert dataset.train.images.shape == (1437, 32, 32, 3) and dataset.test.images.shape == (360, 32, 32, 3)
  pixels = dataset.train.images / 255
  np.testing.assert_allclose(dataset.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-9)
  np.testing.assert_allclose(dataset.std, pixels.std(axis=(0, 1, 2)), rtol=1e-9)


def test_held_out_is_drawn_from_the_training_split():
  whole, dataset = load(), load(held_out=300)
  assert (len(dataset.train), len(dataset.held_out), len(dataset.test)) == (1137, 300, 360)
  assert (dataset.mean, dataset.std) == (whole.mean, whole.std)  # Of the whole training split.
  np.testing.assert_array_equal(dataset.test.images, whole.test.images)

  def examples(*splits):
    pairs = [pair for split in splits for pair in zip(split.labels, split.images, strict=True)]
    return sorted((int(label), image.tobytes()) for label, image in pairs)

  assert examples(dataset.train, dataset.held_out) == examples(whole.train)
  expected = np.bincount(whole.train.labels) * 300 / 1437
  assert np.abs(np.bincount(dataset.held_out.labels) - expected).max() < 1


def test_augmentation_by_config():
  dataset = load(crop_padding=3, flip=True)
  assert (dataset.crop_padding, dataset.flip) == (3, True)
  assert load(crop_padding=0, flip=False).crop_padding == 0


def test_a_wider_model_is_no_error():
  assert len(load(num_classes=12).class_names) == 10


FIRST_OUTSIDE = (
  'expected labels 0 to 6 .7 classes., found label [789] at image [0-9]+ of digits: set --config.model.num_c'
)
ERRORS = [
  ({'name': 'cifra100'}, "unknown data set 'cifra100'; nearest: cifar100.*; set --config.data.name="),
  ({'name': 'folders'}, "unknown data set 'folders'; nearest: folder"),
  (
    {'name': '/my/data'},
    "expected the name of a data set, found '/my/data'; .*name=folder --config.data.data_dir=/my/data",
  ),
  ({'name': ''}, "expected the name of a data set, found ''; for a folder of images set"),
  (
    {'name': 'gs://bucket/photos'},
    r"expected the name of a data set, found 'gs://bucket/photos'; .* --config.data.data_dir=\.\.\.",
  ),
  ({'name': 'qqqqq'}, "unknown data set 'qqqqq'; nearest: cifar100, cifar10, digits, folder, images; set --config"),
  ({'channels': 2}, 'expected 1 .gray. or 3 .RGB. channels, found 2: set --config.model.channels=3'),
  ({'num_classes': 7}, FIRST_OUTSIDE + 'lasses=10'),
  (
    {'held_out': -1},
    'expected to hold out 0 to 1427 of 1437 training images .*, found -1: set --config.data.held_out=0',
  ),
  ({'held_out': 1437}, 'expected to hold out 0 to 1427 .*, found 1437: set --config.data.held_out=0'),
  ({'crop_padding': -1}, 'expected 0 pixels of padding or more, found -1: set --config.data.crop_padding=0'),
]


@pytest.mark.parametrize('changes, message', ERRORS)
def test_errors(changes, message):
  with pytest.raises(UserError, match=message) as error:
    load(**changes)
  assert '\n' not in str(error.value)


def test_the_first_label_outside_is_named():
  labels = load().train.labels
  first = int(np.flatnonzero(labels >= 7)[0])
  with pytest.raises(UserError, match=f'found label {labels[first]} at image {first} of digits'):
    load(num_classes=7)
