"""Tests of dataset.json."""

import dataclasses
import json

import numpy as np
import pytest

from paranet_jax.data.dataset import Dataset, Split
from paranet_jax.host.errors import UserError
from paranet_jax.runs.dataset_facts import (
  DATASET,
  DatasetFacts,
  output_names,
  restore_dataset_facts,
  save_dataset_facts,
)


def split(count):
  return Split(np.zeros((count, 2, 2, 3), np.uint8), np.zeros(count, np.int32))


DATA = Dataset(
  name='shapes',
  version='1.0.0',
  train=split(5),
  held_out=split(2),
  test=split(3),
  class_names=('círculo', 'square'),
  mean=(0.5, 0.25, 0.125),
  std=(0.2, 0.3, 0.4),
  crop_padding=1,
  flip=True,
)


@pytest.mark.parametrize(('held_out', 'count'), [(split(2), 2), (None, 0)])
def test_what_is_saved_is_restored(tmp_path, held_out, count):
  save_dataset_facts(tmp_path, dataclasses.replace(DATA, held_out=held_out))
  assert restore_dataset_facts(tmp_path, channels=3) == DatasetFacts(
    name='shapes',
    version='1.0.0',
    class_names=('círculo', 'square'),
    mean=(0.5, 0.25, 0.125),
    std=(0.2, 0.3, 0.4),
    counts={'train': 5, 'held_out': count, 'test': 3},
  )


def test_an_equal_file_stays_and_another_is_replaced(tmp_path):
  path = tmp_path / DATASET
  save_dataset_facts(tmp_path, DATA)
  path.write_text(json.dumps(json.loads(path.read_text())))  # The same in another layout.
  kept = path.read_text()
  save_dataset_facts(tmp_path, DATA)
  assert path.read_text() == kept
  for text in (json.dumps(json.loads(kept) | {'version': '2.0.0'}), 'damaged'):
    path.write_text(text)
    save_dataset_facts(tmp_path, DATA)
    assert json.loads(path.read_text()) == json.loads(kept)


@pytest.mark.parametrize(('outputs', 'names'), [(1, ('a',)), (2, ('a', 'b')), (4, ('a', 'b', 'class 2', 'class 3'))])
def test_every_output_has_a_name(outputs, names):
  assert output_names(('a', 'b'), outputs) == names


FIELDS = '{path} must hold name, version, class_names, mean, std and counts, found '


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda path: path.unlink(), 'expected {path}, found none; {fix}'),
    (lambda path: path.write_text('{'), '{path} is not a JSON object (Expecting property name'),
    (lambda path: _edit(path, counts=[3]), FIELDS + '{{'),
    (lambda path: _edit(path, counts={'train': '3'}), FIELDS + '{{'),
    (lambda path: _edit(path, counts={'train': 3, 'test': 3}), FIELDS + '{{'),
    (lambda path: _edit(path, name=3), FIELDS + '{{'),
    (lambda path: _edit(path, mean=[0.5]), FIELDS + '{{'),
    (lambda path: _edit(path, mean=[0.5], std=[0.2]), FIELDS + '{{'),
    (lambda path: _edit(path, std=[0.2, 0, 0.4]), FIELDS + '{{'),
    (lambda path: _edit(path, mean=[0.5, float('nan'), 0.5]), FIELDS + '{{'),
    (lambda path: _edit(path, std='1'), FIELDS + '{{'),
    (lambda path: _edit(path, class_names=[1, 2]), FIELDS + '{{'),
    (lambda path: _edit(path, more=1), FIELDS + '{{'),
  ],
)
def test_no_file_or_a_damaged_one(tmp_path, change, message):
  save_dataset_facts(tmp_path, DATA)
  path = tmp_path / DATASET
  change(path)
  with pytest.raises(UserError) as error:
    restore_dataset_facts(tmp_path, channels=3)
  fix = f'python -m paranet_jax.calibrate --workdir={tmp_path} --threshold=0.9 writes it again'
  assert str(error.value).startswith(message.format(path=path, fix=fix))


def _edit(path, **changes):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
