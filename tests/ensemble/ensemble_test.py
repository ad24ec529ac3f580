"""Tests of `python -m paranet_jax.ensemble`; models/ensemble_test.py tests the averaging itself."""

import dataclasses
import json
import shutil
import types
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import paranet_jax
from paranet_jax.costs import exit_costs
from paranet_jax.ensemble import evaluate
from paranet_jax.ensemble.__main__ import main
from paranet_jax.ensemble.evaluate import evaluate_ensemble, load_ensemble
from paranet_jax.host.errors import UserError
from paranet_jax.task import build_task

STOPPED = Path(__file__).resolve().parents[1] / 'fixtures/v0_1_0/stopped'


@pytest.fixture(scope='module')
def workdirs(finished_run):
  """Two runs with different parameters, of steps 140 and 47."""
  return [finished_run, STOPPED]


@pytest.fixture(scope='module')
def rows(workdirs):
  """What the command measures, which `test_the_table` prints again."""
  return evaluate_ensemble(load_ensemble(workdirs))


def test_averaged_probabilities_on_the_test_images(workdirs, rows, monkeypatch, capsys):
  monkeypatch.setattr(evaluate, 'evaluate_ensemble', lambda *_: rows)
  assert main([*map(str, workdirs), '--json']) == 0
  assert json.loads(capsys.readouterr().out) == rows
  assert [(row['exit'], row['name'], row['seed']) for row in rows] == [(1, 'PN3-x3d', 0), (2, 'PN3-ddd', 0)]
  runs = [paranet_jax.load(workdir) for workdir in workdirs]
  forward = jax.jit(runs[0].model.apply)  # Both have the same architecture.
  macs = exit_costs(runs[0].model, runs[0].image_shape)[-1]['macs_alone']
  test = build_task(runs[0].config).dataset.test
  total = 0
  for count, (row, run) in enumerate(zip(rows, runs, strict=True), 1):
    images = (np.asarray(test.images) / np.float32(255) - np.float32(run.dataset.mean)) / np.float32(run.dataset.std)
    logits = np.float64(forward(run.variables, images)[-1])
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    total = total + powers / powers.sum(-1, keepdims=True)
    assert row['macs'] == count * macs
    assert row['accuracy'] == pytest.approx((total.argmax(-1) == test.labels).mean(), abs=1e-9)
    probability = (total / count)[np.arange(len(test)), test.labels]
    assert row['nll'] == pytest.approx(-np.log(probability).mean(), rel=1e-4)
  assert rows[1]['params'] > rows[0]['params']


def test_a_first_run_with_a_frozen_backbone(workdirs, monkeypatch):
  """An evaluation of such a run alone keeps the features of its backbone, which an ensemble does not have."""
  tasks, measured = [], dict.fromkeys(('accuracy', 'balanced_accuracy', 'top5', 'nll'), 0.0)

  def exits_alone(*args, **kwargs):
    task = build_task(*args, **kwargs)
    config = task.config.copy_and_resolve_references()
    config.train.regime = 'exits'
    return dataclasses.replace(task, config=config)

  def evaluator(task, devices):
    tasks.append(task)
    return types.SimpleNamespace(evaluate=lambda **_: {'test': [measured, measured]})

  monkeypatch.setattr(evaluate, 'build_task', exits_alone)
  monkeypatch.setattr(evaluate, 'Evaluator', evaluator)
  evaluate_ensemble(load_ensemble(workdirs))
  assert not tasks[0].frozen


def test_the_table(workdirs, rows, monkeypatch, capsys):
  monkeypatch.setattr(evaluate, 'evaluate_ensemble', lambda *_: rows)
  assert main([*map(str, workdirs)]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].split() == ['exit', 'with', 'params', 'macs', 'accuracy', '(%)', 'top-5', '(%)', 'nll']
  assert len(lines) == 3 and lines[2].startswith('   2  PN3-ddd, seed 0')


def _changed(run, tmp_path, file, **fields):
  copy = shutil.copytree(run, tmp_path / 'copy')
  saved = json.loads((copy / file).read_text())
  (copy / file).write_text(json.dumps(saved | fields))
  return copy


@pytest.mark.parametrize(
  'file, fields, message',
  [
    (
      'dataset.json',
      {'name': 'cifar10'},
      'expected runs with the same data set, and {copy} has cifar10 where {first} has ',
    ),
    ('dataset.json', {'class_names': list('abcdefghij')}, 'expected runs with the same classes, and {copy} has ('),
    ('dataset.json', {'std': [1.0, 1.0, 1.0]}, 'expected runs with the same normalization, and {copy} has (('),
    (
      'config.json',
      {'name': 'PN3-ddx'},
      'expected runs with a trained last exit, and that of {copy} is not; leave it out',
    ),
  ],
)
def test_runs_that_do_not_match(workdirs, tmp_path, capsys, file, fields, message):
  copy = _changed(workdirs[0], tmp_path, file, **fields)
  assert main([str(workdirs[0]), str(copy)]) == 2
  assert capsys.readouterr().err.startswith('error: ' + message.format(copy=copy, first=workdirs[0]))


def test_runs_with_other_numbers_of_outputs_are_refused(workdirs, monkeypatch):
  """Of the same classes: a network may have more outputs than the data has classes."""
  first = evaluate.load(workdirs[0])
  wider = dataclasses.replace(first, model=first.model.clone(num_classes=12))
  monkeypatch.setattr(evaluate, 'load', {'a': first, 'b': wider}.get)
  with pytest.raises(UserError) as error:
    load_ensemble(['a', 'b'])
  assert str(error.value) == (
    'expected runs with the same number of outputs (model.num_classes), and b has 12 where a has 10; leave it out'
  )


def test_runs_that_learned_from_images_scaled_in_another_way_are_refused(workdirs, monkeypatch):
  """All members read the same test images. A short side that is not set is the side of the images."""

  def scaled(run, short_side):
    config = run.config.copy_and_resolve_references()
    config.data.short_side = short_side
    return dataclasses.replace(run, config=config)

  first = evaluate.load(workdirs[0])
  side = first.image_shape[0]
  runs = {'a': first, 'b': scaled(first, side), 'c': scaled(first, side + 2)}
  monkeypatch.setattr(evaluate, 'load', runs.get)
  load_ensemble(['a', 'b'])
  with pytest.raises(UserError) as error:
    load_ensemble(['a', 'c'])
  assert str(error.value) == (
    f'expected runs with the same scaling of images, and c has shorter side to {side + 2} (bilinear, antialiased), '
    f'center crop where a has shorter side to {side} (bilinear, antialiased), center crop; leave it out'
  )


@pytest.mark.parametrize('count', [0, 1])
def test_too_few_runs(workdirs, capsys, count):
  assert main([str(workdir) for workdir in workdirs[:count]]) == 2
  expected = f'error: expected the folders of 2 runs or more, found {count}; add them to the command\n'
  assert capsys.readouterr().err == expected


def test_images_without_labels_are_refused(workdirs, monkeypatch):
  task = types.SimpleNamespace(dataset=types.SimpleNamespace(labeled=False))
  monkeypatch.setattr(evaluate, 'build_task', lambda *_, **__: task)
  with pytest.raises(UserError, match='expected runs on images with labels, to measure the ensemble by, found none'):
    evaluate_ensemble(load_ensemble(workdirs))


def test_each_stage_runs_one_member(workdirs):
  ensemble = load_ensemble(workdirs)
  image = np.zeros((1, *ensemble.runs[0].image_shape), np.float32)
  stage = partial(ensemble.model.apply, method='stage')
  _, carry = jax.eval_shape(lambda variables: stage(variables, image, {}, 1), ensemble.variables)
  assert list(carry) == [1]
