"""Tests of the registry of data sets."""

import pytest
from ml_collections import ConfigDict

from paranet_jax.base_config import base_config
from paranet_jax.data.dataset import Source
from paranet_jax.data.known import DATASETS, KnownDataset, known_dataset, register_source
from paranet_jax.data.load import load_dataset
from paranet_jax.host.errors import UserError

# Classes, images, mirrored, padding at side 32, and whether data_dir identifies the images.
FACTS = {
  'cifar100': (100, (50_000, 10_000), True, 4, False),
  'cifar10:3.0.2': (10, (50_000, 10_000), True, 4, False),
  'digits': (10, (1437, 360), False, 1, False),
  'imagenet2012': (1000, (1_281_167, 50_000), True, 4, False),
  'folder': (None, None, True, 4, True),
  'images': (None, None, True, 4, True),
  'mnist': (None, None, False, 4, False),
  'emnist/letters:3.1.0': (None, None, False, 4, False),
  'some_other': (None, None, True, 4, False),
}


@pytest.mark.parametrize('name', FACTS)
def test_facts(name):
  known = known_dataset(name)
  facts = known.num_classes, known.counts, known.mirrored, 32 // known.padding_share, known.in_data_dir
  assert facts == FACTS[name]
  assert known.labeled == (name != 'images')


def test_register_source(monkeypatch):
  monkeypatch.setattr(DATASETS, 'known', dict(DATASETS.known))  # Other tests list what is registered.
  known = KnownDataset(lambda config, side, channels: Source('registered', '', ('a',), None))
  for _ in range(2):
    register_source('registered', known)
  assert known_dataset('registered') is known
  assert known_dataset('registered').open(ConfigDict(), 8, 1).name == 'registered'
  with pytest.raises(ValueError, match="there is already a data set 'registered'"):
    register_source('registered', KnownDataset())
  config = base_config()
  config.data.name = 'registred'
  with pytest.raises(UserError, match="unknown data set 'registred'; nearest: registered"):
    load_dataset(config.data, image_side=8, channels=1)
