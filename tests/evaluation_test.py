"""Tests that an evaluation is exact: equal to numpy on the logits of every image, once each."""

import dataclasses

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest
import reference
import tiny

from paranet_jax import evaluation
from paranet_jax.base_config import base_config
from paranet_jax.data.dataset import Dataset, Split
from paranet_jax.devices import pick_devices
from paranet_jax.evaluation import MOST_CLASSES, Evaluator, as_json, as_metrics
from paranet_jax.steps import Objective
from paranet_jax.targets import LABELS
from paranet_jax.task import Task

NUM_CLASSES, SIDE, BATCH = 7, 2, 4
ASKED = []


class Linear(nn.Module):
  """The least multi-exit model; notes in ASKED which exits it was traced for."""

  num_exits: int = 3
  num_classes: int = NUM_CLASSES

  @nn.compact
  def __call__(self, images, train=False, exits=None):
    ASKED.append(tuple(exits))
    layers = {number: nn.Dense(NUM_CLASSES, name=f'exit_{number}') for number in exits}
    flat = images.reshape(len(images), -1)
    return [layers[number](flat) if number in exits else None for number in range(1, self.num_exits + 1)]


RNG = np.random.default_rng(0)
PARAMS = {
  f'exit_{number}': {
    'kernel': RNG.normal(size=(SIDE * SIDE * 3, NUM_CLASSES)).astype(np.float32),
    'bias': RNG.normal(size=NUM_CLASSES).astype(np.float32),
  }
  for number in (1, 2, 3)
}


def split(number: int, side: int = SIDE, num_classes: int = NUM_CLASSES) -> Split:
  rng = np.random.default_rng(number)
  images = rng.integers(0, 256, (number, side, side, 3), dtype=np.uint8)
  return Split(images, rng.integers(0, num_classes, number, dtype=np.int32))


def task(
  model, targets, test: Split, held_out: Split | None = None, label_smoothing: float = 0.0, class_weights=None
) -> Task:
  config = base_config()
  config.eval.batch_size = BATCH
  config.loss.label_smoothing = label_smoothing
  mean, std = tiny.PLAIN.mean, tiny.PLAIN.std
  dataset = Dataset('noise', '1', split(1), held_out, test, tuple('abcdefg'), mean, std, crop_padding=2, flip=True)
  objective = Objective(targets, (1.0,) * len(targets), class_weights=class_weights)
  return Task(config, dataset, model, targets, objective, tiny.AUGMENTED, None, None, 0, 0)


def pixels(images):
  return (images / 255 - np.array(tiny.PLAIN.mean)) / np.array(tiny.PLAIN.std)


def measured(logits, labels, label_smoothing=0.0, weights=None) -> dict:
  log_probabilities = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
  nll = -log_probabilities[np.arange(len(labels)), labels]
  best = np.argsort(-logits, axis=-1)
  classes = range(logits.shape[-1])
  right = [np.mean(best[labels == number, 0] == number) if number in labels else None for number in classes]
  weights = np.ones(len(classes)) if weights is None else np.array(weights)
  smoothed = (1 - label_smoothing) * weights[labels] * nll - label_smoothing * np.mean(weights * log_probabilities, -1)
  return {
    'accuracy': np.mean(best[:, 0] == labels),
    'balanced_accuracy': np.mean([share for share in right if share is not None]),
    'top5': np.mean(np.any(best[:, :5] == labels[:, None], axis=-1)),
    'loss': np.sum(smoothed) / np.sum(weights[labels]),
    'nll': np.mean(nll),
    'class_accuracy': [share if share is None else round(share, 6) for share in right],
  }


def linear_exits(data: Split, label_smoothing: float = 0.0, weights=None) -> list[dict]:
  """What the evaluation of `Linear` must say where exit 2 is not trained."""
  flat = pixels(data.images).reshape(len(data), -1)
  exits = []
  for number in (1, 2, 3):
    layer = PARAMS[f'exit_{number}']
    logits = flat @ layer['kernel'] + layer['bias']
    values = measured(logits, data.labels, label_smoothing, weights)
    values['confusion'] = np.zeros((NUM_CLASSES, NUM_CLASSES), int)
    np.add.at(values['confusion'], (data.labels, logits.argmax(-1)), 1)
    trained = number != 2
    exits.append({'exit': number, 'trained': trained} | (values if trained else dict.fromkeys(values)))
  return exits


def check(found: list[dict], expected: list[dict]) -> None:
  assert [row.keys() for row in found] == [row.keys() for row in expected]
  for row, wanted in zip(found, expected, strict=True):
    assert {name for name, value in row.items() if value is None} == {name for name in wanted if wanted[name] is None}
    for name in (name for name in wanted if wanted[name] is not None):
      np.testing.assert_allclose(np.array(row[name], float), np.array(wanted[name], float), rtol=1e-5)


@pytest.mark.parametrize(
  ('number', 'devices'),
  [(1, 1), (BATCH, 1), (3 * BATCH + 2, 1), (BATCH - 1, 4), (BATCH + 1, 4), (3 * BATCH + 2, 8)],
)
def test_exact_for_any_number_of_images(number, devices):
  """Padding repeats the first image, whose loss is not the mean: it would be seen."""
  if devices > len(jax.devices()):
    pytest.skip(f'needs {devices} devices, found {len(jax.devices())}')
  data = split(number)
  evaluator = Evaluator(task(Linear(), (LABELS, None, LABELS), data), pick_devices(devices))
  found = evaluator.evaluate(PARAMS, {}, True)
  assert found.keys() == {'test'}
  check(found['test'], linear_exits(data))


def test_both_splits_and_smoothing():
  test, held_out = split(5), split(9)
  weights = 1.0, 2.0, 0.5, 1.0, 1.0, 3.0, 1.0
  given = task(Linear(), (3, None, LABELS), test, held_out, label_smoothing=0.2, class_weights=weights)
  found = Evaluator(given, pick_devices(1)).evaluate(PARAMS, {}, True)
  check(found['test'], linear_exits(test, 0.2, (1, 2, 0.5, 1, 1, 3, 1)))
  check(found['held_out'], linear_exits(held_out, 0.2, (1, 2, 0.5, 1, 1, 3, 1)))
  assert found['test'][0]['loss'] != found['test'][0]['nll']


def test_without_labels_an_exit_is_compared_with_the_last_one():
  data = split(3 * BATCH + 2)
  given = task(Linear(), (3, None, 3), data)
  given = dataclasses.replace(given, dataset=dataclasses.replace(given.dataset, labeled=False))
  found = Evaluator(given, pick_devices(1)).evaluate(PARAMS, {}, True)
  flat = pixels(data.images).reshape(len(data), -1)
  first, last = (np.argmax(flat @ PARAMS[name]['kernel'] + PARAMS[name]['bias'], -1) for name in ('exit_1', 'exit_3'))
  share = np.mean(first == last)
  assert 0 < share < 1
  nothing = dict.fromkeys((*evaluation.MEASURES, 'class_accuracy', 'confusion'))
  assert found['test'] == [
    {'exit': number, 'trained': number != 2, 'agreement': agreement} | nothing
    for number, agreement in ((1, share), (2, None), (3, 1.0))
  ]
  assert as_metrics(found['test']) == {'exit_1/agreement': share, 'exit_3/agreement': 1.0}


def test_two_processes_count_what_one_does(monkeypatch):
  """Each has some of the batches, the last of which is padded."""
  given, counted = task(Linear(), (LABELS, None, LABELS), split(3 * BATCH + 2)), []

  class Process:
    def __init__(self, index, count):
      self.index, self.count, self.found = index, count, []
      monkeypatch.setattr(evaluation, 'Coordinator', lambda: self)
      Evaluator(given, pick_devices(1)).evaluate(PARAMS, {}, True)

    def summed(self, values):
      self.found.append(values)
      return values

  counted = [Process(*place).found for place in ((0, 1), (0, 2), (1, 2))]
  assert len(counted[0]) == 3  # The sums of both exits, and a matrix for each.
  for whole, *parts in zip(*counted, strict=True):
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)


@pytest.mark.parametrize('devices', [1, 2])
def test_features_on_disk_come_in_the_same_batches(monkeypatch, devices):
  data, features = split(2 * BATCH + 1), {1: np.arange(2 * (2 * BATCH + 1)).reshape(-1, 2)}
  evaluator = Evaluator(task(Linear(), (LABELS, None, LABELS), data), pick_devices(devices))
  found = []
  for on_disk in (False, True):
    monkeypatch.setattr(evaluation, 'on_disk', lambda features, on_disk=on_disk: on_disk)
    found.append(list(evaluator._place(data, features)()))
  assert len(found[0]) == 3 and all(len(batch[2].devices()) == devices for batch in found[1])
  chex.assert_trees_all_equal(*found, strict=True)


def test_what_is_right_predicts_the_label_also_if_logits_are_not_finite():
  """NaN in every logit: no image is right, although an argmax would say class 0."""
  broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), PARAMS)
  labels = np.zeros(3, np.int32)
  data = Split(split(3).images, labels)
  (row, *_) = Evaluator(task(Linear(), (LABELS, None, None), data), pick_devices(1)).evaluate(broken, {}, True)['test']
  assert row['accuracy'] == row['balanced_accuracy'] == row['class_accuracy'][0] == row['confusion'][0, 0] == 0
  assert row['confusion'].sum() == 3


def test_many_classes():
  """Above 100 there is no matrix in JSON, above 2,000 there is none; the accuracy of each class stays."""
  labels, predictions = np.array([0, 0, 7, -1]), np.array([0, 3, 7, 0])
  sums = dict.fromkeys(('count', 'weight', 'accuracy', 'top5', 'loss', 'nll'), np.float32(3))
  for classes in (100, 101, MOST_CLASSES + 1):
    counts = evaluation._Counts([(sums, labels, predictions)], classes)
    matrix, row = counts.confusion(), evaluation._measured(np.array(counts.totals))
    assert (row['class_accuracy'][0], row['class_accuracy'][7], row['balanced_accuracy']) == (0.5, 1.0, 0.75)
    assert len(row['class_accuracy']) == classes and row['class_accuracy'][1] is None
    listed = as_json({'test': [row | {'confusion': matrix}]})['test'][0]['confusion']
    if classes == 100:
      assert listed[0][:4] == [1, 0, 0, 1] and listed[7][7] == 1 and np.sum(listed) == 3
    else:
      assert listed is None and (matrix is None) == (classes > MOST_CLASSES)


def test_each_exit_is_compiled_once_for_itself():
  ASKED.clear()
  evaluator = Evaluator(task(Linear(), (LABELS, None, LABELS), split(6)), pick_devices(1))
  evaluator.evaluate(PARAMS, {})
  evaluator.evaluate(jax.tree.map(np.zeros_like, PARAMS), {})
  assert ASKED == [(1,), (3,)]


def test_it_looks_before_each_batch_comes_and_before_it_is_computed():
  evaluator, events = Evaluator(task(Linear(), (LABELS, None, LABELS), split(2 * BATCH)), pick_devices(1)), []
  batches = evaluator._splits['test']
  evaluator._splits['test'] = lambda: (events.append('comes') or batch for batch in batches())
  evaluator.evaluate(PARAMS, {}, look=lambda: events.append('look'))
  assert events == ['look', *['comes', 'look'] * 2]


def test_it_looks_before_each_batch_of_features(monkeypatch):
  evaluator, looks = Evaluator(task(Linear(), (LABELS, None, LABELS), split(BATCH)), pick_devices(1)), []
  evaluator._splits = {}  # As of a frozen backbone.
  monkeypatch.setattr(Task, 'keep_features', lambda self, split, variables, name, check: [check()] and None)
  evaluator.evaluate(PARAMS, {}, look=lambda: looks.append(0))
  assert len(looks) == 1 + 2


def test_paranet_with_its_running_statistics():
  model = tiny.named('PN2-dd')
  variables, data = tiny.variables(model), split(5, tiny.SIDE, tiny.NUM_CLASSES)
  evaluator = Evaluator(task(model, (LABELS, LABELS), data), pick_devices(min(2, len(jax.devices()))))
  found = evaluator.evaluate(variables['params'], variables['batch_stats'])['test']
  geometry = {'blocks': (1, 2), 'halvings': (2, 1), 'cascade': ((2, 2),)}
  logits, _ = reference.paranet(variables, pixels(data.images), **geometry)
  expected = [{'exit': n, 'trained': True} | measured(each, data.labels) for n, each in enumerate(logits, 1)]
  assert [row.keys() for row in found] == [row.keys() for row in expected]
  chex.assert_trees_all_close(found, expected, rtol=1e-4)


def test_as_metrics_leaves_out_untrained_exits():
  exits = [
    {'exit': 1, 'trained': False} | dict.fromkeys(evaluation.MEASURES),
    {'exit': 2, 'trained': True, 'accuracy': 0.5, 'balanced_accuracy': 0.25, 'top5': 0.75, 'loss': 2.0, 'nll': 1.5}
    | {'class_accuracy': [0.5]},
  ]
  assert as_metrics(exits) == {
    'exit_2/accuracy': 0.5,
    'exit_2/balanced_accuracy': 0.25,
    'exit_2/top5': 0.75,
    'exit_2/loss': 2.0,
    'exit_2/nll': 1.5,
  }
