"""A package that adds a network family, a data set and a policy by entry points: every command works with all three."""

import json

import numpy as np
import plugin
import pytest
import shapes
from PIL import Image
from running import run_command, run_main

import paranet_jax
from paranet_jax.base_config import base_config
from paranet_jax.calibrate.__main__ import main as calibrate
from paranet_jax.calibrate.flags import parse
from paranet_jax.config import differences
from paranet_jax.data.known import KnownDataset
from paranet_jax.data.load import load_dataset
from paranet_jax.early.policies import POLICIES, find_policy
from paranet_jax.ensemble.__main__ import main as ensemble
from paranet_jax.export.__main__ import main as export
from paranet_jax.host.errors import UserError
from paranet_jax.models.registry import FAMILIES
from paranet_jax.pack import main as pack
from paranet_jax.plan import plan as plan_lib
from paranet_jax.plan import target as target_lib
from paranet_jax.plan.__main__ import main as plan
from paranet_jax.portable import run as run_py
from paranet_jax.predict.__main__ import main as predict

FAMILY = """
import flax.linen as nn
from paranet_jax.host.fields import Field, at_least
from paranet_jax.models.registry import Family
from paranet_jax.models.staged import StagedModel

class Stage(nn.Module):
  features: int

  @nn.compact
  def __call__(self, x, train, axis_name=None):
    x = nn.Conv(self.features, (3, 3), strides=2, use_bias=False)(x)
    return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=axis_name)(x))

def build(name, fields):
  if fields['width'] % 2:
    raise ValueError(f'width must be even, found {fields["width"]}')
  stages = [Stage(fields['width']), Stage(2 * fields['width'])]
  return StagedModel(stages, exits=(1, 2), num_classes=fields['num_classes'], dtype=fields['dtype'])

FAMILY = Family('own', 'own.py', build, {'width': Field(4, at_least(1))}, fix='width')
"""
POLICY = """
from paranet_jax.early.policies import Choice, Flag, Policy
from paranet_jax.early.policies.shared import shared_thresholds

def level(text):
  if not text.isdecimal():
    raise ValueError('must be a whole number')
  return int(text)

def choose(samples, target):
  return Choice(shared_thresholds(target['level'], samples.costs.num_exits))

LEVEL = Flag('level', 'level', level, 7, 'how confident a sample must be')
POLICY = Policy('plugin', 'one level', {'budget': ('max_prob',)}, choose, (LEVEL,))
"""
CONFIG = """
from paranet_jax.base_config import base_config

def get_config():
  config = base_config('mine', family='own')
  config.model.image_side = 8
  config.data.update(name='shapes', held_out=18)
  config.train.update(batch_size=20, devices=1, epochs=1.0)
  return config
"""


def install(folder, patch):
  plugin.install(folder, patch, FAMILIES, 'a_family', ['own = a_family:FAMILY', 'broken = a_family:NONE'], FAMILY)
  plugin.install(folder, patch, POLICIES, 'a_policy', ['plugin = a_policy:POLICY'], POLICY)
  shapes.install(folder, patch)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Where the packages are installed, with a configuration and an image."""
  folder = tmp_path_factory.mktemp('site')
  (folder / 'own.py').write_text(CONFIG)
  Image.new('L', (8, 8), 200).save(folder / 'a.png')
  with pytest.MonkeyPatch.context() as patch:
    install(folder, patch)
    yield folder


@pytest.fixture(scope='module')
def run(folder):
  """A trained run, calibrated by the policy for the cost of its last exit."""
  workdir = folder / 'run'
  code, _, err = run_main(f'--config={folder}/own.py', f'--workdir={workdir}')
  assert code == 0, err
  budget = json.loads((workdir / 'summary.json').read_text())['exits'][-1]['macs_alone']
  code, out, err = run_command(calibrate, f'--workdir={workdir}', f'--budget={budget}', '--policy=plugin', '--level=0')
  assert (code, err) == (0, '') and ': one level, for a mean of ' in out and 'shapes' in out
  return workdir


def test_training_and_evaluation(run):
  saved = json.loads((run / 'config.json').read_text())['model']
  assert (saved['family'], saved['width']) == ('own', 4)
  facts = json.loads((run / 'dataset.json').read_text())
  assert (facts['name'], facts['version'], tuple(facts['class_names'])) == ('shapes', '2.0', shapes.CLASSES)
  assert facts['counts'] == {'train': 42, 'held_out': 18, 'test': 20}
  code, out, err = run_main(f'--workdir={run}', '--mode=eval', '--json')
  assert code == 0 and json.loads(out)['step'] == 2, err


def test_facts_that_need_no_images(folder, monkeypatch):
  monkeypatch.setattr(KnownDataset, 'open', None)
  monkeypatch.setattr(plan_lib, 'second_batch', lambda *_: 10_000)  # More than there are images: it is not compiled.
  monkeypatch.setattr(target_lib, '_SIDE', 64)
  monkeypatch.setattr(target_lib, '_SIZE', 4096)
  flag = f'--config={folder}/own.py'
  code, out, err = run_main(flag, '--mode=describe', '--json')
  assert code == 0 and (json.loads(out)['num_classes'], json.loads(out)['dataset']) == (3, 'shapes'), err
  code, out, err = run_command(plan, flag, '--devices=1', '--json')
  assert code == 0 and json.loads(out)['dataset'] == 'shapes', err


def test_prediction_and_deployment(folder, run, tmp_path):
  code, out, err = run_command(predict, folder / 'a.png', f'--workdir={run}', '--format=json')
  assert code == 0 and any(name in out for name in shapes.CLASSES), err
  code, _, err = run_command(pack, f'--workdir={run}', f'--out={tmp_path / "packed"}')
  assert code == 0, err
  code, out, err = run_command(ensemble, run, tmp_path / 'packed', '--json')
  assert code == 0 and len(json.loads(out)) == 2, err
  code, _, err = run_command(export, f'--workdir={run}', f'--out={tmp_path / "bundle"}')
  assert code == 0, err
  assert json.loads((tmp_path / 'bundle/classes.json').read_text()) == list(shapes.CLASSES)
  assert json.loads((tmp_path / 'bundle/bundle.json').read_text())['all_stages'] == ['stage_1', 'stage_2']
  card = (tmp_path / 'bundle/README.md').read_text()
  assert 'License of the data: public domain.' in card and 'plugin' in card
  assert run_py.load(tmp_path / 'bundle').predict_one(np.zeros((8, 8, 3), np.uint8)).exit == 1


def test_a_policy_is_not_needed_where_its_run_is_used(run, monkeypatch):
  monkeypatch.delitem(POLICIES.known, 'plugin', raising=False)
  monkeypatch.setattr(POLICIES, 'group', 'nothing.is.installed')
  assert find_policy('plugin') is None
  exits = paranet_jax.load(run).exits
  found = exits.policy, exits.target['level'], exits.thresholds
  assert found == ('plugin', 0, (0.0, 0.0)), found


def test_flags_of_a_policy(folder):
  request = parse(['--workdir=a', '--budget=3M', '--policy=plugin'])
  assert request.policy.name == 'plugin' and request.target == {'budget': 3e6, 'unit': 'macs', 'level': 7}
  assert parse(['--workdir=a', '--budget=3M', '--policy=plugin', '--level=2']).target['level'] == 2
  for flags, message in (
    (['--policy=plugin', '--level=x'], 'argument --level: must be a whole number, found x; see --help'),
    (['--level=2'], '--level belongs to --policy=plugin, found optimal; leave out --level'),
    (['--policy=other'], "unknown policy 'other', expected one of optimal, quota, shared, plugin; set --policy"),
  ):
    with pytest.raises(UserError) as error:
      parse(['--workdir=a', '--budget=3M', *flags])
    assert str(error.value) == message


def test_fields_of_a_family(folder):
  for width, message in ((0, 'model.width must be from 1 to 1,000,000,000'), (3, 'width must be even')):
    code, _, err = run_main(f'--config={folder}/own.py', f'--config.model.width={width}', '--mode=describe')
    assert (code, err) == (2, f'error: {message}, found {width}; set --config.model.width\n')
  with pytest.raises(UserError, match="family 'broken': entry point a_family:NONE fails: .*; fix or uninstall its"):
    base_config(family='broken')


def test_augmentation_and_folder_of_a_data_set(folder):
  config = base_config()
  config.data.name = 'shapes'
  found = load_dataset(config.data, image_side=8, channels=1)
  assert (found.crop_padding, found.flip) == (2, False)
  np.testing.assert_array_equal(found.train.images[4], np.full((8, 8, 1), 104))
  here, there = ({'name': 'shapes', 'data_dir': place} for place in 'ab')
  assert differences({'data': here}, {'data': there}) == ['data.data_dir: a -> b']
