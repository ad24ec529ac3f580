"""Finished runs as one anytime network. The averaging itself is tested in models_ensemble_test.py."""

import json
import shutil

import numpy as np
import pytest
from running import TINY, run_main

import paranet_jax
from paranet_jax.costs import exit_costs
from paranet_jax.ensemble.__main__ import main
from paranet_jax.ensemble.evaluate import load_ensemble
from paranet_jax.task import build_task

STEPS = ('--config.train.max_steps=2',)


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs')
  found = [folder / 'first', folder / 'second']
  for seed, (name, workdir) in enumerate(zip(('PN2-dd', 'PN3-ddd'), found, strict=True)):
    arguments = f'--config.name={name}', f'--config.seed={seed}', f'--workdir={workdir}'
    assert run_main(*TINY, *STEPS, *arguments).code == 0
  return found


def test_the_table_is_of_averaged_probabilities_on_the_test_images(workdirs, capsys):
  assert main([*map(str, workdirs), '--json']) == 0
  rows = json.loads(capsys.readouterr().out)
  assert [(row['exit'], row['name'], row['seed']) for row in rows] == [(1, 'PN2-dd', 0), (2, 'PN3-ddd', 1)]
  total, macs = 0, 0
  for count, (row, workdir) in enumerate(zip(rows, workdirs, strict=True), 1):
    run = paranet_jax.load(workdir)
    test = build_task(run.config).dataset.test
    images = (np.asarray(test.images) / np.float32(255) - np.float32(run.dataset.mean)) / np.float32(run.dataset.std)
    logits = np.float64(run.model.apply(run.variables, images)[-1])
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    total = total + powers / powers.sum(-1, keepdims=True)
    macs += exit_costs(run.model, run.image_shape)[-1]['macs_alone']
    assert row['macs'] == macs
    assert row['accuracy'] == pytest.approx((total.argmax(-1) == test.labels).mean(), abs=1e-9)
    probability = (total / count)[np.arange(len(test)), test.labels]
    assert row['nll'] == pytest.approx(-np.log(probability).mean(), rel=1e-4)
  assert rows[1]['params'] > rows[0]['params']


def test_the_table_is_read_as_one(workdirs, capsys):
  assert main([*map(str, workdirs)]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].split() == ['exit', 'with', 'params', 'macs', 'accuracy', '(%)', 'top-5', '(%)', 'nll']
  assert len(lines) == 3 and lines[2].startswith('   2  PN3-ddd, seed 1')


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
      'expected runs of the same data set, and {copy} has cifar10 where {first} has ',
    ),
    ('dataset.json', {'class_names': list('abcdefghij')}, 'expected runs of the same classes, and {copy} has ('),
    ('dataset.json', {'std': [1.0, 1.0, 1.0]}, 'expected runs of the same normalization, and {copy} has (('),
    (
      'config.json',
      {'name': 'PN2-dx'},
      'expected runs whose last exit is trained, and that of {copy} is not; leave it out',
    ),
  ],
)
def test_runs_that_do_not_go_together(workdirs, tmp_path, capsys, file, fields, message):
  copy = _changed(workdirs[0], tmp_path, file, **fields)
  assert main([str(workdirs[0]), str(copy)]) == 2
  assert capsys.readouterr().err.startswith('error: ' + message.format(copy=copy, first=workdirs[0]))


@pytest.mark.parametrize('count', [0, 1])
def test_one_run_is_none(workdirs, capsys, count):
  assert main([str(workdir) for workdir in workdirs[:count]]) == 2
  expected = f'error: expected the folders of 2 runs or more, found {count}; name them one after the other\n'
  assert capsys.readouterr().err == expected


def test_its_stages_run_one_member_each(workdirs):
  ensemble = load_ensemble(workdirs)
  image = np.zeros((1, *ensemble.runs[0].image_shape), np.float32)
  _, carry = ensemble.model.apply(ensemble.variables, image, {}, 1, method='stage')
  assert list(carry) == [1]
