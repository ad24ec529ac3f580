"""Tests of benchmarks/deploy.py: its runtimes agree, and what it prints."""

import contextlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import deploy, deploy_runtimes, early_exit, network
from benchmarks.deploy_runtimes import Point
from paranet_jax.models.paranet import ParaNet

SMALLEST = network.Size(layers=1, growth_rate=2, side=8, batch=4)
FLAGS = [f'--{field}={value}' for field, value in vars(SMALLEST).items()]
FLAGS += ['--rounds=1', '--seconds=0', '--json']
WHATS = ['exit 1', 'exit 2', 'exit 3', 'budget 25%', 'budget 50%', 'budget 75%']


@pytest.fixture(scope='module')
def subject():
  """The benchmark's network, with few images."""
  return early_exit.untrained(SMALLEST, 8)


@pytest.fixture(scope='module')
def folder(subject, tmp_path_factory):
  """What the runtimes are made from."""
  folder = tmp_path_factory.mktemp('deployed')
  deploy.write(folder, subject, SimpleNamespace(workdir=None, dtype='float32'))
  return folder


@pytest.fixture
def here(subject, folder, monkeypatch):
  """Only ONNX Runtime, in this process, from the written folder; returns the runtimes by kind."""
  made, find_spec = {}, importlib.util.find_spec

  def stand_in(kind, make, *arguments, huge_pages):
    assert not huge_pages
    made[kind] = make(*arguments)
    return contextlib.nullcontext(made[kind])

  def write(place, *_):
    shutil.copytree(folder, place, dirs_exist_ok=True)
    return {'labels': 1.0}

  monkeypatch.setattr(deploy, 'own_process', stand_in)
  monkeypatch.setattr(deploy, 'write', write)
  monkeypatch.setattr(early_exit, 'untrained', lambda *_: subject)
  missing = ('openvino', 'torch', 'jax', 'earlyon')
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name in missing else find_spec(name))
  return made


def test_what_is_printed(here, capsys):
  assert deploy.main(FLAGS) == 0
  out, err = capsys.readouterr()
  result = json.loads(out)
  assert out.count('\n') == 1
  for name, module in (('openvino', 'openvino'), ('ours', 'jax'), ('eager', 'torch'), ('earlyon', 'earlyon')):
    assert f'{name} is left out: found no {module}; pip install -r benchmarks/requirements.txt' in err.splitlines()
  rows = result['rows']
  assert [(row['what'], row['peer']) for row in rows] == [(what, kind) for what in WHATS for kind in here]
  last = {row['peer']: row['one_image_ms'] for row in rows if row['what'] == 'exit 3'}
  for row in rows:
    assert row['accuracy'] is None and row['one_image_ms'] > 0 and row['images_per_s'] > 0
    assert row['speedup'] == pytest.approx(last[row['peer']] / row['one_image_ms'], rel=1e-3)
  assert list(here) == list(result['runtimes']) == ['onnxruntime']
  for facts in result['runtimes'].values():
    assert set(facts) == {'size_mb', 'start_s', 'peak_mb'} and min(facts.values()) > 0
  assert set(result) == {'rows', 'runtimes', 'agreement', 'energy', 'machine', 'versions', 'date'}
  assert result['energy'].startswith('this machine does not say') == (rows[0]['one_image_joules'] is None)


@pytest.mark.filterwarnings('ignore:os.fork')  # Importing PyTorch or OpenVINO starts a process.
def test_the_same_answers(subject, folder):
  kinds = ['onnxruntime', 'ours', *(kind for kind in ('openvino', 'eager') if _is_installed(deploy.NEEDS[kind]))]
  answers = [deploy_runtimes.make(kind, str(folder)) for kind in kinds]
  logits = subject.logits(subject.images)
  for name, point in deploy.points(subject).items():
    first, *others = (answer(point, subject.images, 4) for answer in answers)
    for other in others:
      np.testing.assert_array_equal(other, first)
    if name.startswith('exit'):
      np.testing.assert_array_equal(first, logits[point.last].argmax(-1))
    np.testing.assert_array_equal(answers[0](point, subject.images[:3], 1), first[:3])


@pytest.mark.filterwarnings('ignore')  # What earlyon and its dependencies warn of.
@pytest.mark.skipif(importlib.util.find_spec('earlyon') is None, reason='needs earlyon')
def test_earlyon_answers_the_same_one_by_one(subject, folder):
  onnxruntime, earlyon = (deploy_runtimes.make(kind, str(folder)) for kind in ('onnxruntime', 'earlyon'))
  for name, point in deploy.points(subject).items():
    expected = onnxruntime(point, subject.images, 1)
    np.testing.assert_array_equal(earlyon(point, subject.images, 1), expected, name)
    if name.startswith('exit'):  # At budgets a batch leaves as a whole.
      np.testing.assert_array_equal(earlyon(point, subject.images, 4), expected, name)


def _is_installed(module):
  try:
    __import__(module)
  except ImportError:
    return False
  return True


def test_points():
  thresholds = {'budget 25%': [0.5, np.inf, -np.inf], 'budget 50%': [-0.1, 2.0, -np.inf], 'budget 75%': [np.inf] * 2}
  thresholds['budget 75%'].append(-np.inf)
  points = {name: SimpleNamespace(thresholds=np.array(at)) for name, at in thresholds.items()}
  assert deploy.points(SimpleNamespace(plan=SimpleNamespace(exits=(1, 2, 3)), points=points)) == {
    'exit 1': Point((None, None, None), 0),
    'exit 2': Point((None, None, None), 1),
    'exit 3': Point((None, None, None), 2),
    'budget 25%': Point((0.5, None, 0.0), 2),
    'budget 50%': Point((0.0, 2.0, 0.0), 2),
    'budget 75%': Point((None, None, 0.0), 2),
  }


@pytest.mark.parametrize(
  'model, full',
  [
    (ParaNet(), True),
    (ParaNet(num_pipelines=2, num_classes=10, layers_per_block=3, growth_rate=4, image_side=8), True),
    (ParaNet(cascade=False), False),
    (ParaNet(stem_norm=True), False),
    (SimpleNamespace(num_pipelines=3), False),
  ],
)
def test_networks_that_pytorch_supports(model, full):
  assert deploy.is_full_paranet(model) == full


def test_peak_memory(tmp_path):
  (tmp_path / 'status').write_text('Name:\tpython\nVmPeak:\t  900000 kB\nVmHWM:\t  123456 kB\nVmRSS:\t  1 kB\n')
  assert deploy_runtimes.peak_memory_mb(tmp_path / 'status') == 123.456
  assert deploy_runtimes.peak_memory_mb(tmp_path / 'none') > 0
