"""The pretrained run is as accurate on CIFAR-100, and as cheap, as its files say."""

import os
from pathlib import Path

import numpy as np
import pytest

import paranet_jax
from paranet_jax.base_config import base_config
from paranet_jax.data.sources.tfds import tfds_source

FOLDER = Path(__file__).resolve().parents[2] / 'pretrained'
IMAGES = 500


@pytest.mark.skipif('PARANET_DATA_DIR' not in os.environ, reason='PARANET_DATA_DIR, with CIFAR-100, is not set')
def test_accuracy_and_cost_on_cifar100():
  expected_test = paranet_jax.load(FOLDER).exits.test
  images, labels = tfds_source(base_config().data, 32, 3).records('test').read(range(IMAGES))
  found = paranet_jax.EarlyExit.load(FOLDER).predict(np.stack(images))
  accuracy, expected = (found.labels == labels).mean(), expected_test['accuracy']
  # Three standard deviations for a sample of this size.
  assert abs(accuracy - expected) < 3 * np.sqrt(expected * (1 - expected) / IMAGES)
  assert abs(found.macs.mean() / expected_test['cost_macs'] - 1) < 0.1
