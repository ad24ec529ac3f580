"""A family from another package, found by its entry point, works with every command."""

import json
import shutil

import numpy as np
import plugin
import pytest
from PIL import Image
from running import run_command, run_main

from paranet_jax.base_config import base_config
from paranet_jax.calibrate import __main__ as calibrate
from paranet_jax.ensemble import __main__ as ensemble
from paranet_jax.export import __main__ as export
from paranet_jax.host.errors import UserError
from paranet_jax.host.fields import Field
from paranet_jax.models.registry import FAMILIES, Family, family_names, find_family, register_family
from paranet_jax.plan import __main__ as plan
from paranet_jax.predict import __main__ as predict

PLUGIN = """
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
CONFIG = """
from paranet_jax.base_config import base_config

def get_config():
  config = base_config('mine', family='own')
  config.model.image_side = 8
  config.data.update(name='digits', held_out=300)
  config.train.update(batch_size=220, devices=1, max_steps=2)
  return config
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
  """A folder with an installed package and a configuration file."""
  entries = 'own = a_package:FAMILY', 'broken = a_package:NONE'
  plugin.install(tmp_path, monkeypatch, FAMILIES, 'a_package', entries, PLUGIN)
  (tmp_path / 'own.py').write_text(CONFIG)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_every_command(here):
  def run(command, *arguments):
    result = run_command(command.main, *arguments)
    assert result.code == 0, result.err
    return result.out

  assert run_main('--config=own.py', '--workdir=run').code == 0
  saved = json.loads((here / 'run/config.json').read_text())['model']
  assert (saved['family'], saved['width']) == ('own', 4)
  run(calibrate, '--workdir=run', '--threshold=0.3')
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save('a.png')
  assert 'a.png' in run(predict, '--workdir=run', 'a.png')
  run(export, '--workdir=run', '--out=bundle')
  assert json.loads((here / 'bundle/bundle.json').read_text())['all_stages'] == ['stage_1', 'stage_2']
  assert 'mine' in run(plan, '--config=own.py', '--devices=1')
  shutil.copytree('run', 'other')
  assert run(ensemble, 'run', 'other').count('mine, seed 0') == 2


def test_errors(here):
  def refusal(*arguments):
    code, _, err = run_main('--config=own.py', *arguments, '--mode=describe')
    assert code == 2
    return err

  assert (
    refusal('--config.model.width=0') == 'error: model.width must be 1 or more, found 0; set --config.model.width\n'
  )
  assert refusal('--config.model.width=3') == 'error: width must be even, found 3; set --config.model.width\n'
  with pytest.raises(UserError, match="family 'broken': entry point a_package:NONE fails: .*; fix or uninstall its"):
    base_config(family='broken')


def test_register_family(here):
  first = Family('first', 'first.py', 'a_package:build', {'width': Field(2)})
  register_family(first)
  register_family(first)
  assert find_family('first') is first and base_config(family='first').model.width == 2
  assert family_names()[-3:] == ['first', 'own', 'broken'] and find_family('none') is None
  with pytest.raises(ValueError, match="there is already a family 'first'"):
    register_family(Family('first', 'other.py', 'a_package:build', {}))
  with pytest.raises(ValueError, match="family 'second' has fields that every family has"):
    Family('second', 'second.py', 'a_package:build', {'dtype': Field('float32')})
