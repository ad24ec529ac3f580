"""Tests that processes which would not train the same are refused; threads stand for the processes."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from paranet_jax import agreement
from paranet_jax.base_config import FAMILIES, base_config
from paranet_jax.data.dataset import Dataset, Split
from paranet_jax.host import processes
from paranet_jax.host.errors import UserError
from paranet_jax.task import Task


def task(of_data=None, family='paranet', **fields):
  config = base_config(family=family)
  config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
  split = Split(np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 1, 1, 0], np.int32))
  data = Dataset('own', '1', split, None, split, ('a', 'b'), (0.5,), (0.25,), 0, False)
  return Task(config, dataclasses.replace(data, **(of_data or {})), *[None] * (len(dataclasses.fields(Task)) - 2))


class Together:
  """What processes tell each other, among threads."""

  def __init__(self, number):
    self.own, self._barrier, self._told, self._parts = threading.local(), threading.Barrier(number), [], []

  def from_first(self, value):
    if self.own.index == 0:
      assert len(json.dumps(value)) <= processes._MESSAGE
      self._told.append(value)
    self._barrier.wait()
    return self._told[0]

  def summed(self, values):
    self._parts.append(values)
    self._barrier.wait()
    return sum(self._parts)


def refusals(monkeypatch, tasks):
  """What each process says; None: it goes on."""
  together = Together(len(tasks))

  def check(index, own):
    together.own.index = index
    try:
      agreement.check_agreement(own)
    except UserError as error:
      return str(error)

  monkeypatch.setattr(processes, 'count', lambda: len(tasks))
  monkeypatch.setattr(processes, 'index', lambda: together.own.index)
  monkeypatch.setattr(processes, 'from_first', together.from_first)
  monkeypatch.setattr(processes, 'summed', together.summed)
  with ThreadPoolExecutor(len(tasks)) as threads:
    return list(threads.map(check, range(len(tasks)), tasks))


@pytest.mark.parametrize('family', FAMILIES)
def test_what_is_of_the_machine_may_differ(monkeypatch, family):
  others = [task(family=family, data__data_dir='/b', data__workers=3, init_from='/c')] * 2
  assert refusals(monkeypatch, [task(family=family), *others]) == [None] * 3


LABELS = Split(np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 1, 0, 1], np.int32))
FEWER = Split(np.zeros((3, 2, 2, 1), np.uint8), np.array([0, 1, 1], np.int32))


@pytest.mark.parametrize(
  'one, other, name, values',
  [
    ({'train__max_steps': 6}, {'train__max_steps': 3}, 'train.max_steps', ('6', '3')),
    ({}, {'seed': 1, 'train__learning_rate': 0.2}, 'seed', ('0', '1')),
    ({}, {'train__learning_rate': 0.2}, 'train.learning_rate', ('0.1', '0.2')),
    ({}, {'of_data': {'train': FEWER}}, 'number of training images', ('4', '3')),
    ({}, {'of_data': {'mean': (0.51,)}}, 'mean of the images', ('0.50000', '0.51000')),
    ({}, {'of_data': {'std': (0.26,)}}, 'std of the images', ('0.25000', '0.26000')),
    ({}, {'of_data': {'class_names': ('a', 'c')}}, 'class names', ('a, b', 'a, c')),
  ],
)
def test_the_first_field_that_differs_is_told_in_all(monkeypatch, one, other, name, values):
  assert refusals(monkeypatch, [task(**one), task(**one), task(**other)]) == [
    f'all processes must train the same, found in process 2 another {name} than in process 0 (here {value}); start '
    'all of them with the same flags and data'
    for value in (values[0], *values)
  ]


def test_labels(monkeypatch):
  one, other = refusals(monkeypatch, [task(), task(of_data={'test': LABELS})])
  assert 'found in process 1 another test labels than in process 0 (here ' in one and one != other


def test_another_family(monkeypatch):
  found = refusals(monkeypatch, [task(), task(family='msdnet')])
  assert 'found in process 1 another model.' in found[0]
