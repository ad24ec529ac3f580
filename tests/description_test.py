"""Tests of what is said about a run before it, without its data."""

import json
import platform

import jax
import pytest
from running import CONFIGS, QUICKSTART, contents, run_main

from paranet_jax import costs
from paranet_jax.base_config import base_config
from paranet_jax.costs import describe
from paranet_jax.host.machine import environment

FULL = f'--config={CONFIGS}/paranet.py'
SMALL = ('--config.model.layers_per_block=1', '--config.model.growth_rate=2', '--config.model.image_side=8')


def small(**data):
  config = base_config('PN2-2d')
  config.model.update(layers_per_block=1, growth_rate=2, image_side=8)
  config.data.update(data)
  return config


def test_json_is_one_object_and_touches_no_data(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  arguments = (f'{FULL}:PN3-x3d', '--mode=describe', '--json', '--config.data.data_dir=/nowhere', '--workdir=/nowhere')
  result = run_main(*arguments)
  assert (result.code, result.err) == (0, '') and result.out.count('\n') == 1
  found = json.loads(result.out)
  assert found | {'exits': None} == {
    'name': 'PN3-x3d',
    'dataset': 'cifar100',
    'seed': 0,
    'image_shape': [32, 32, 3],
    'num_classes': 100,
    'exits': None,
  }
  # The counts are the specification's.
  assert found['exits'] == [
    {
      **{'exit': 1, 'trained': False, 'learns_from': 'nothing', 'own_params': 198_460, 'params': 198_460},
      **{'own_macs': 3_413_088, 'macs': 3_413_088, 'macs_alone': 3_413_088},
    },
    {
      **{'exit': 2, 'trained': True, 'learns_from': 'exit 3', 'own_params': 789_244, 'params': 987_704},
      **{'own_macs': 20_125_632, 'macs': 23_538_720, 'macs_alone': found['exits'][1]['macs_alone']},
    },
    {
      **{'exit': 3, 'trained': True, 'learns_from': 'labels', 'own_params': 2_417_980, 'params': 3_405_684},
      **{'own_macs': 102_404_736, 'macs': 125_943_456, 'macs_alone': found['exits'][2]['macs_alone']},
    },
  ]
  # An exit by itself needs no earlier head: from 216 features and from 624 to 100 classes.
  assert [row['macs'] - row['macs_alone'] for row in found['exits']] == [0, 216 * 100, (216 + 624) * 100]
  assert not contents(tmp_path)


def test_a_table_for_people(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  result = run_main(QUICKSTART, '--config.name=PN2-2d', *SMALL, '--mode=describe')
  lines = result.out.splitlines()
  assert (result.code, result.err, len(lines)) == (0, '', 5)
  assert lines[0].startswith('PN2-2d on digits: ')
  assert [line.split()[0] for line in lines[1:4]] == ['exit', '1', '2']
  assert 'exit 2' in lines[2] and 'labels' in lines[3]
  assert not contents(tmp_path)


def test_what_distilled_exits_learn_from():
  arguments = ('--config.name=PN3-ddd', '--config.loss.distill=later', '--config.loss.hard_label_weight=0.5')
  result = run_main(QUICKSTART, *SMALL, *arguments, '--mode=describe', '--json')
  learns_from = [row['learns_from'] for row in json.loads(result.out)['exits']]
  assert learns_from == ['labels, exits 2 3', 'labels, exit 3', 'labels']


@pytest.mark.parametrize(
  ('data_set', 'of_the_config', 'of_the_data', 'expected'),
  [
    ('cifar100', None, None, 100),
    ('cifar10', None, None, 10),
    ('digits', None, None, 10),
    ('folder', None, 3, 3),
    ('folder', 7, None, 7),
    ('cifar10', 7, 10, 7),
  ],
)
def test_number_of_classes(monkeypatch, data_set, of_the_config, of_the_data, expected):
  config = small(name=data_set)
  if of_the_config:
    config.model.num_classes = of_the_config
  found = []
  monkeypatch.setattr(costs, 'exit_costs', lambda model, shape: found.append(model.num_classes) or [{'exit': 1}] * 2)
  assert describe(config, of_the_data)['num_classes'] == expected
  assert found == [expected]


def test_environment():
  found = environment(jax.devices()[:3])
  assert found['device'] == {'platform': 'cpu', 'kind': 'cpu', 'count': 3}
  assert found['versions']['python'] == platform.python_version() and found['versions']['jax'] == jax.__version__
