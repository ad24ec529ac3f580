"""Tests that processes which would not train the same are refused; threads stand for the processes."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from paranet_jax.base_config import base_config
from paranet_jax.data.dataset import Dataset, Split
from paranet_jax.host import processes
from paranet_jax.host.errors import UserError
from paranet_jax.host.processes import Coordinator
from paranet_jax.models.registry import family_names
from paranet_jax.task import Task


def task(of_data=None, family='paranet', **fields):
  config = base_config(family=family)
  config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
  split = Split(np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 1, 1, 0], np.int32))
  data = Dataset('own', '1', split, None, split, ('a', 'b'), (0.5,), (0.25,), 0, False)
  return Task(config, dataclasses.replace(data, **(of_data or {})), *[None] * (len(dataclasses.fields(Task)) - 2))


class Together:
  """What processes exchange, among threads."""

  def __init__(self, number):
    self.barrier, self.first, self.parts = threading.Barrier(number), [], []


class Thread(Coordinator):
  """The coordinator of a thread that stands for a process."""

  def __init__(self, index, count, together):
    self.index, self.count, self._together = index, count, together

  def from_first(self, value):
    if self.is_first:
      assert len(json.dumps(value)) <= processes._MESSAGE
      self._together.first.append(value)
    self._together.barrier.wait()
    return self._together.first[0]

  def summed(self, values):
    self._together.parts.append(values)
    self._together.barrier.wait()
    return sum(self._together.parts)


def refusals(tasks):
  """The error of each process, or None."""
  together = Together(len(tasks))

  def check(index, own):
    try:
      Thread(index, len(tasks), together).check_same(own.facts())
    except UserError as error:
      return str(error)

  with ThreadPoolExecutor(len(tasks)) as threads:
    return list(threads.map(check, range(len(tasks)), tasks))


@pytest.mark.parametrize('family', family_names())
def test_what_belongs_to_the_machine_may_differ(family):
  others = [task(family=family, data__data_dir='/b', data__workers=3, init_from='/c')] * 2
  assert refusals([task(family=family), *others]) == [None] * 3


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
    ({}, {'of_data': {'class_names': ('a', 'caf\udce9')}}, 'class names', ('a, b', 'a, caf\udce9')),
  ],
)
def test_every_process_names_the_first_field_that_differs(one, other, name, values):
  assert refusals([task(**one), task(**one), task(**other)]) == [
    f'all processes must train the same, found a difference between process 2 and process 0 in {name} '
    f'(here {value}); start all of them with the same flags and data'
    for value in (values[0], *values)
  ]


def test_labels():
  one, other = refusals([task(), task(of_data={'test': LABELS})])
  assert 'found a difference between process 1 and process 0 in test labels (here ' in one and one != other


def test_one_process_is_compared_with_no_other():
  Thread(0, 1, None).check_same(task().facts())  # It would fail if it exchanged anything.


def test_another_family():
  found = refusals([task(), task(family='msdnet')])
  assert 'between process 1 and process 0 in model.' in found[0]


def test_every_process_gets_the_object_of_the_first(monkeypatch):
  own, together, parts = {'limits': np.arange(2000), 'place': 'here'}, Together(2), []

  def broadcast(values):  # The others send zeros.
    parts.append(values)
    together.barrier.wait()
    return sum(parts)

  monkeypatch.setattr(processes, '_broadcast', broadcast)
  with ThreadPoolExecutor(2) as threads:
    sent = enumerate((own, None))
    found = [threads.submit(Thread(index, 2, together).object_from_first, value) for index, value in sent]
  first, other = (each.result() for each in found)
  assert first['place'] == other['place'] == 'here'
  np.testing.assert_array_equal(other['limits'], own['limits'])
