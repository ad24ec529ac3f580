"""Tests that an evaluation is exact: equal to numpy on the logits of every image, once each."""

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest
import reference
import tiny

from paranet_jax.base_config import base_config
from paranet_jax.data.dataset import Dataset, Split
from paranet_jax.devices import pick_devices
from paranet_jax.evaluation import Evaluator, as_metrics
from paranet_jax.targets import LABELS
from paranet_jax.task import Task

NUM_CLASSES, SIDE, BATCH = 7, 2, 4
ASKED = []


class Linear(nn.Module):
  """The least multi-exit model; notes in ASKED which exits it was traced for."""

  num_exits: int = 3

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


def task(model, targets, test: Split, held_out: Split | None = None, label_smoothing: float = 0.0) -> Task:
  config = base_config()
  config.eval.batch_size = BATCH
  config.loss.label_smoothing = label_smoothing
  mean, std = tiny.PLAIN.mean, tiny.PLAIN.std
  dataset = Dataset('noise', '1', split(1), held_out, test, tuple('abcdefg'), mean, std, crop_padding=2, flip=True)
  return Task(config, dataset, model, targets, None, tiny.AUGMENTED, None, None, 0, 0)


def pixels(images):
  return (images / 255 - np.array(tiny.PLAIN.mean)) / np.array(tiny.PLAIN.std)


def measured(logits, labels, label_smoothing=0.0) -> dict:
  log_probabilities = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
  nll = -log_probabilities[np.arange(len(labels)), labels]
  best = np.argsort(-logits, axis=-1)
  return {
    'accuracy': np.mean(best[:, 0] == labels),
    'top5': np.mean(np.any(best[:, :5] == labels[:, None], axis=-1)),
    'loss': np.mean((1 - label_smoothing) * nll - label_smoothing * np.mean(log_probabilities, axis=-1)),
    'nll': np.mean(nll),
  }


def linear_exits(data: Split, label_smoothing: float = 0.0) -> list[dict]:
  """What the evaluation of `Linear` must say where exit 2 is not trained."""
  flat = pixels(data.images).reshape(len(data), -1)
  exits = []
  for number in (1, 2, 3):
    layer = PARAMS[f'exit_{number}']
    values = measured(flat @ layer['kernel'] + layer['bias'], data.labels, label_smoothing)
    trained = number != 2
    exits.append({'exit': number, 'trained': trained} | (values if trained else dict.fromkeys(values)))
  return exits


def check(found: list[dict], expected: list[dict]) -> None:
  assert [row.keys() for row in found] == [row.keys() for row in expected]
  for row, wanted in zip(found, expected, strict=True):
    assert {name for name, value in row.items() if value is None} == {name for name in wanted if wanted[name] is None}
    values = [name for name in wanted if wanted[name] is not None]
    np.testing.assert_allclose([row[name] for name in values], [wanted[name] for name in values], rtol=1e-5)


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
  found = evaluator.evaluate(PARAMS, {})
  assert found.keys() == {'test'}
  check(found['test'], linear_exits(data))


def test_both_splits_and_smoothing():
  test, held_out = split(5), split(9)
  evaluator = Evaluator(task(Linear(), (3, None, LABELS), test, held_out, label_smoothing=0.2), pick_devices(1))
  found = evaluator.evaluate(PARAMS, {})
  check(found['test'], linear_exits(test, 0.2))
  check(found['held_out'], linear_exits(held_out, 0.2))
  assert found['test'][0]['loss'] != found['test'][0]['nll']


def test_each_exit_is_compiled_once_for_itself():
  ASKED.clear()
  evaluator = Evaluator(task(Linear(), (LABELS, None, LABELS), split(6)), pick_devices(1))
  evaluator.evaluate(PARAMS, {})
  evaluator.evaluate(jax.tree.map(np.zeros_like, PARAMS), {})
  assert ASKED == [(1,), (3,)]


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
    {'exit': 1, 'trained': False, 'accuracy': None, 'top5': None, 'loss': None, 'nll': None},
    {'exit': 2, 'trained': True, 'accuracy': 0.5, 'top5': 0.75, 'loss': 2.0, 'nll': 1.5},
  ]
  assert as_metrics(exits) == {
    'exit_2/accuracy': 0.5,
    'exit_2/top5': 0.75,
    'exit_2/loss': 2.0,
    'exit_2/nll': 1.5,
  }
