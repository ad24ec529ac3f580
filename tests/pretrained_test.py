"""The pretrained run is small, complete, and as accurate as its files say."""

import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import paranet_jax
from paranet_jax.base_config import base_config
from paranet_jax.data.sources.tfds import tfds_source

FOLDER = Path(__file__).resolve().parents[1] / 'pretrained'
IMAGES = 500
ABSOLUTE = re.compile(rb'(^|[ =:"\'])/[\w.-]+/')
"""The start of an absolute path."""


@pytest.fixture(scope='module')
def run():
  return paranet_jax.load(FOLDER)


def test_size_below_two_megabytes():
  assert sum(path.stat().st_size for path in FOLDER.rglob('*') if path.is_file()) < 2e6


def test_parameters_are_exact_in_float16(run):
  for leaf in jax.tree.leaves(run.variables['params']):
    np.testing.assert_array_equal(leaf, np.asarray(leaf).astype(np.float16).astype(np.float32))


def test_the_log_ends_with_the_accuracies_of_the_summary(run):
  lines = [json.loads(line) for line in (FOLDER / 'metrics.jsonl').read_text().splitlines()]
  summary = json.loads((FOLDER / 'summary.json').read_text())
  last = [line for line in lines if line['split'] == 'test'][-1]
  assert (last['step'], run.step) == (summary['steps'], summary['steps'])
  assert [last[f'exit_{row["exit"]}/accuracy'] for row in summary['exits']] == [
    row['accuracy'] for row in summary['exits']
  ]


def test_no_absolute_path():
  for path in FOLDER.rglob('*'):
    if path.is_file():
      assert not ABSOLUTE.search(path.read_bytes()), path


@pytest.mark.skipif('PARANET_DATA_DIR' not in os.environ, reason='PARANET_DATA_DIR, with CIFAR-100, is not set')
def test_accuracy_and_cost_on_cifar100(run):
  images, labels = tfds_source(base_config().data, 32, 3).records('test').read(range(IMAGES))
  found = paranet_jax.EarlyExit.load(FOLDER).predict(np.stack(images))
  accuracy, expected = (found.labels == labels).mean(), run.exits.test['accuracy']
  # Three standard deviations for a sample of this size.
  assert abs(accuracy - expected) < 3 * np.sqrt(expected * (1 - expected) / IMAGES)
  assert abs(found.macs.mean() / run.exits.test['cost_macs'] - 1) < 0.1
