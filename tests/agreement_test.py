"""One image has one answer: predict, a bundle's run.py, the service and what a training evaluates agree on it.

The run and the bundle that was exported from it are those of version 0.1.0, in fixtures/v0_1_0, with thresholds at
which the images exit everywhere.
"""

import hashlib
import json
import runpy
import shutil
import sys
from pathlib import Path

import application
import jax
import numpy as np
import odd_images
import pytest
from running import run_command
from serving import form

from paranet_jax.calibrate.measures import rank
from paranet_jax.data.sources.folder import folder_source
from paranet_jax.early.exit_plan import read_plan
from paranet_jax.early.logits import Outputs, split_logits
from paranet_jax.early.path_costs import mac_costs
from paranet_jax.early.thresholds import exits_taken
from paranet_jax.evaluation import Evaluator
from paranet_jax.portable import run as bundle_runtime
from paranet_jax.predict.__main__ import main as predict
from paranet_jax.runs.trained import read_task
from paranet_jax.runs.workdir import restore_config

pytestmark = pytest.mark.filterwarnings('ignore')  # Pillow's, about damaged metadata.

FIXTURES = Path(__file__).resolve().parent / 'fixtures/v0_1_0'
CASES = Path(__file__).resolve().parents[2] / 'shared/cases/images.py'
"""Writes the images of a collection of public reports, where a checkout has that beside it."""


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  """A folder of every odd image."""
  folder = tmp_path_factory.mktemp('images')
  for name, content in odd_images.all_files().items():
    (folder / f'{name}.png'.replace('/', '-')).write_bytes(content)
  if CASES.exists():
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(sys, 'argv', [str(CASES), str(folder / 'cases')])
      runpy.run_path(str(CASES), run_name='__main__')
  return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory, images):
  """A folder with the run and the bundle: a part of the images exits at each exit."""
  folder = tmp_path_factory.mktemp('runs')
  for name in ('run', 'bundle'):
    shutil.copytree(FIXTURES / name, folder / name)
  bundle = bundle_runtime.load(folder / 'bundle', threads=1)
  carried = bundle.begin(np.stack([bundle_runtime.read_image(path, 16, 3) for path in paths_of(images)]))
  thresholds = []
  for number in (1, 2):
    carried, logits = bundle.stage(number)(carried)
    found = np.sort(bundle_runtime.confidence(logits, 'max_prob', bundle._temperatures[number]))
    middle = slice(len(found) // 3, -len(found) // 3)
    place = middle.start + np.diff(found[middle]).argmax()  # Runtimes round in their own ways.
    thresholds.append(float(found[place : place + 2].mean()))
  for name in ('run', 'bundle'):
    plan = json.loads((folder / name / 'exits.json').read_text())
    plan['confidence_thresholds'] = [*thresholds, 0.0]
    plan['thresholds'] = (-np.expm1(-np.array(plan['confidence_thresholds']))).tolist()
    (folder / name / 'exits.json').write_text(json.dumps(plan))
  whole = json.loads((folder / 'bundle/bundle.json').read_text())
  whole['checksums']['exits.json'] = hashlib.sha256((folder / 'bundle/exits.json').read_bytes()).hexdigest()
  (folder / 'bundle/bundle.json').write_text(json.dumps(whole))
  return folder


def paths_of(images):
  return sorted(str(path) for path in images.rglob('*') if path.is_file())


@pytest.fixture(scope='module')
def answers(images, folder):
  """By path: label, exit and probability, as predict answers."""
  code, out, err = run_command(predict, f'--workdir={folder}/run', '--format=json', '--top=1', images)
  rows = json.loads(out)
  assert code == 0 and sorted(row['file'] for row in rows) == paths_of(images), err
  assert {row['exit'] for row in rows} == {1, 2, 3}
  return {row['file']: (int(row['label']), row['exit'], row['probability']) for row in rows}


def assert_equal(found, answers):
  assert found.keys() == answers.keys()
  for path, (label, exit, probability) in found.items():
    assert (label, exit) == answers[path][:2], path
    assert probability == pytest.approx(answers[path][2], abs=6e-4), path  # run.py prints three digits.


def test_the_bundle_answers_as_the_run(images, folder, answers, capsys):
  assert bundle_runtime.main([f'--bundle={folder}/bundle', '--threads=1', str(images)]) == 0
  rows = [line.rsplit(maxsplit=3) for line in capsys.readouterr().out.splitlines()[1:]]
  found = {path: (int(label), int(exit), float(probability)) for path, label, probability, exit in rows}
  assert_equal(found, answers)


def test_the_service_answers_as_the_run(folder, answers):
  service = application.Service(bundle_runtime.load(folder / 'bundle', threads=1), max_bytes=10**6)
  service.scheduler.start()
  paths, found = list(answers), []
  for first in range(0, len(paths), 4):  # More would take too much to decode together.
    body = form([Path(path).read_bytes() for path in paths[first : first + 4]])
    status, _, reply = service.ask('POST', '/predict', *body)
    assert status == 200
    found += [(answer['label'], answer['exit'], answer['probability']) for answer in reply['answers']]
  service.scheduler.close()
  assert_equal(dict(zip(paths, found, strict=True)), answers)


def test_a_training_evaluates_the_same(folder, answers, tmp_path):
  """The images are the test split of a run, whose checkpoint is evaluated; each is in the class of its answer."""
  run, photos = folder / 'run', tmp_path / 'photos'
  places = {}
  for number, path in enumerate(answers):
    place = photos / 'test' / str(answers[path][0]) / f'{number}.png'
    place.parent.mkdir(parents=True, exist_ok=True)
    places[str(place)] = shutil.copy(path, place) and path
  for digit in range(10):  # What it is trained on does not matter here.
    (photos / f'train/{digit}').mkdir(parents=True)
    shutil.copy(next(iter(answers)), photos / f'train/{digit}/a.png')
  config = restore_config(run)
  config.data.update(name='folder', data_dir=str(photos), held_out=0)
  config.train.batch_size = 10
  (task, _, variables), plan = read_task(config, run, None, jax.local_devices()[:1], True), read_plan(run)
  data = task.dataset.test
  logits = split_logits(task.model, variables, plan.exits, task.preprocessing, data, 64)
  outputs, temperatures = Outputs(logits, np.asarray(data.labels)), np.array(plan.temperatures)
  costs = mac_costs(task.model, task.image_shape, plan.exits)
  samples = rank(*outputs, plan.score, temperatures, costs)
  taken = exits_taken(samples.confidences, np.array(plan.confidence_thresholds))
  scaled = logits[taken, np.arange(len(data))] / temperatures[taken][:, None]
  probabilities = np.exp(scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True))
  paths = [places[file] for file in folder_source(config.data, 16, 3).records('test').files]
  found = zip(probabilities.argmax(1).tolist(), (taken + 1).tolist(), probabilities.max(1), strict=True)
  assert_equal(dict(zip(paths, found, strict=True)), answers)
  measured = Evaluator(task, jax.local_devices()[:1]).evaluate(variables['params'], variables['batch_stats'])['test']
  for row, own in zip(measured, logits, strict=True):
    assert row['accuracy'] == pytest.approx(np.mean(own.argmax(1) == data.labels))
    of_label = own[np.arange(len(own)), data.labels] - np.logaddexp.reduce(own, axis=1)
    assert row['nll'] == pytest.approx(-of_label.mean(), rel=1e-4)
