"""CIFAR-100 as tensorflow-datasets prepared it, all 60,000 images of it."""

import os
from pathlib import Path

import numpy as np
import pytest

from paranet_jax.base_config import base_config
from paranet_jax.data.load import load_dataset
from paranet_jax.data.sources.tfds import tfds_source

DATA_DIR = os.environ.get('PARANET_DATA_DIR', '')


@pytest.mark.skipif(
  not DATA_DIR or not (Path(DATA_DIR) / 'cifar100').is_dir(),
  reason='needs CIFAR-100: set PARANET_DATA_DIR to a folder that holds it prepared',
)
def test_cifar100():
  config = base_config().data
  config.update({'name': 'cifar100', 'data_dir': DATA_DIR, 'held_out': 5000})
  dataset = load_dataset(config, image_side=32, channels=3)
  assert (len(dataset.train), len(dataset.held_out), len(dataset.test)) == (45_000, 5_000, 10_000)
  for split, per_class in [(dataset.train, 450), (dataset.held_out, 50), (dataset.test, 100)]:
    assert split.images.shape == (100 * per_class, 32, 32, 3) and split.images.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(split.labels, minlength=100), per_class)
  np.testing.assert_allclose(dataset.mean, (0.50707516, 0.48654887, 0.44091784), atol=1e-8)
  np.testing.assert_allclose(dataset.std, (0.26733429, 0.25643846, 0.27615047), atol=1e-8)
  assert dataset.class_names[:2] == ('apple', 'aquarium_fish') and dataset.class_names[-1] == 'worm'
  numbers = [49_999, 7, 7, 20_000]
  images, labels = tfds_source(config, 32, 3).records('train').read(numbers)
  config.held_out = 0
  whole = load_dataset(config, image_side=32, channels=3).train
  np.testing.assert_array_equal(images, whole.images[numbers])
  np.testing.assert_array_equal(labels, whole.labels[numbers])
