"""Tests of network families in a configuration: their fields, errors and derived values."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
from running import CONFIGS, refusal, run_main
from tiny import small

from paranet_jax import config as config_lib
from paranet_jax.base_config import base_config, field_names
from paranet_jax.command_line import parse
from paranet_jax.costs import abstract_variables
from paranet_jax.host.errors import UserError
from paranet_jax.host.fields import Field
from paranet_jax.models.fractalnet import FractalNet
from paranet_jax.models.registry import FAMILIES, Family, family_names, find_family, register_family
from paranet_jax.models.resnet import ResNet
from paranet_jax.runs.workdir import prepare_workdir, restore_config, save_config

# For each field, a new value and the other fields to set.
FIELDS = {
  'densenet': {
    'depth': (16, {}),
    'growth_rate': (3, {}),
    'stem_channels': (24, {'bottleneck': False}),
    'compression': (0.7, {}),
    'bottleneck': (False, {}),
    'bn_size': (3, {}),
    'exits': ('blocks', {}),
    'dropout': (0.1, {}),
    'scan_layers': (1, {'depth': 16}),
  },
  'resnet': {
    'depth': (14, {}),
    'block': ('preactivation', {}),
    'shortcut_padding': ('both_sides', {}),
    'exits': ('stages', {}),
  },
  'msdnet': {
    'num_blocks': (3, {}),
    'base': (2, {}),
    'step_mode': ('lin_grow', {}),
    'step': (2, {}),
    'initial_channels': (3, {}),
    'growth_rate': (8, {}),
    'growth_factors': ((1, 3), {}),
    'bottleneck_factors': ((1, 1), {'initial_channels': 16}),
    'reduction': (0.7, {'base': 3}),
  },
  'ranet': {
    'scales': ((1, 1), {}),
    'growth_factors': ((3, 1), {}),
    'bottleneck_factors': ((1, 1), {'initial_channels': 16}),
    'base_blocks': (2, {}),
    'block_step': (2, {}),
    'step_mode': ('lin_grow', {}),
    'step': (2, {}),
    'initial_channels': (3, {}),
    'growth_rate': (8, {}),
    'fusion': (0.5, {}),
    'reduction': (0.7, {}),
  },
  'fractalnet': {
    'columns': (3, {}),
    'widths': ((2, 4), {}),
    'block_dropout': ((0.0, 0.2), {}),
    'local_drop_path': (0.3, {}),
    'global_drop_path': (0.1, {}),
  },
  'adopted': {
    'arch': ('cifar_resnet26', {}),
    'exits': ('layer1', {}),
    'head': ('linear', {'exits': 'layer1'}),
    'copies': (2, {'exits': 'layer1', 'head': 'blocks'}),
    'last': ('new', {}),
  },
}
COMMON = {
  'num_classes': (12, {}),
  'image_side': (16, {}),
  'channels': (1, {}),
  'dtype': ('bfloat16', {}),
  'boost': (0.5, {}),
  'transfer': (5, {}),
}
# These link exits, so that networks need more than one.
MORE_EXITS = {'densenet': {'exits': 'blocks'}, 'resnet': {'exits': 'stages'}, 'adopted': {'exits': 'layer1'}}


def program(config):
  """The traced program of a forward pass in training."""
  model, shape = config_lib.build_model(config, 10), config_lib.image_shape(config)
  rngs = {name: jax.random.key(0) for name in getattr(model, 'rng_names', ())}

  def forward(variables, images):
    return model.apply(variables, images, train=True, mutable=['batch_stats'], rngs=rngs)

  images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
  return str(jax.make_jaxpr(forward)(variables(config), images))


def variables(config):
  return abstract_variables(config_lib.build_model(config, 10), config_lib.image_shape(config))


@functools.cache
def small_program(family, *fields):
  return program(small(family, **dict(fields)))


def test_every_family_and_field_is_in_the_tables():
  assert {'paranet', *tiny.FAMILIES} == {'paranet', *FIELDS} == set(family_names())
  for family, fields in FIELDS.items():
    assert {'family', *fields, *COMMON} == set(base_config(family=family).model)


@pytest.mark.parametrize('family, field', [(family, field) for family in FIELDS for field in FIELDS[family] | COMMON])
def test_every_field_changes_the_program(family, field, standard_promotion):
  value, given = (FIELDS[family] | COMMON)[field]
  if field in ('boost', 'transfer'):
    given = MORE_EXITS.get(family, {})
  base, changed = small(family, **given), small(family, **given, **{field: value})
  if variables(base) == variables(changed):  # Otherwise the programs differ too, and need not be traced.
    assert small_program(family, *given.items()) != program(changed)


@pytest.mark.parametrize('family', FIELDS)
def test_equal_fields_give_the_same_program(family, standard_promotion):
  assert small_program(family) == program(small(family))


@pytest.mark.parametrize('family', family_names())
def test_example_of_a_family(family):
  """Only the fields of `model` differ between families."""
  _, config = parse(['main', f'--config={CONFIGS.parent / find_family(family).example}'])
  assert config.model.family == family
  others = [name for name in field_names(base_config(family=family)) if not name.startswith('model.')]
  assert others == [name for name in field_names(base_config()) if not name.startswith('model.')]


def test_an_unknown_family_is_refused():
  with pytest.raises(UserError) as error:
    base_config('VGG', 'vgg')
  assert str(error.value) == (
    'family of base_config must be one of paranet, densenet, resnet, msdnet, ranet, fractalnet, adopted, '
    "found 'vgg'; fix --config"
  )


FILES = ', '.join(find_family(name).example for name in family_names())


@pytest.mark.parametrize('found', ['paranet', 'vgg'])
def test_the_family_cannot_be_changed_by_a_flag(found):
  message = refusal(f'--config={CONFIGS}/resnet_110.py', f'--config.model.family={found}', '--mode=describe')
  assert message == (
    f'model.family must be resnet, whose fields the configuration has, found {found}; for another family '
    f'set --config to one of {FILES}'
  )


def test_a_run_of_a_family_whose_package_is_gone(tmp_path):
  config = small('resnet')
  with config.unlocked():
    config.model.update(family='vgg', widths=3)
  save_config(tmp_path, config)
  with pytest.raises(UserError) as error:
    restore_config(tmp_path)
  assert str(error.value) == (
    f"{tmp_path}/config.json has the model.family 'vgg', which is not known here; install the package that has it, "
    'or update paranet_jax'
  )
  with pytest.raises(UserError) as error:
    config_lib.build_model(config, num_classes=10)
  assert str(error.value) == f'model.family must be one of {", ".join(family_names())}, found vgg; set --config'


@pytest.mark.parametrize(
  'file, argument, message',
  [
    (
      'resnet_110',
      'name=a b',
      "name must be letters, digits and, after the first, ._-, found 'a b'; set --config.name",
    ),
    ('resnet_110', 'name=-a', "name must be letters, digits and, after the first, ._-, found '-a'; set --config.name"),
    (
      'resnet_110',
      'model.depth=111',
      'depth must be 6 n + 2 for n basic blocks a stage, found 111; '
      'set --config.model.depth, .block, .shortcut_padding, .exits or .image_side',
    ),
    (
      'resnet_110',
      'model.shortcut_padding=left',
      'model.shortcut_padding must be one of behind, both_sides, found left; set --config.model.shortcut_padding',
    ),
    (
      'densenet_mc',
      'model.stem_channels=0',
      'model.stem_channels must be from 1 to 100,000, found 0; set --config.model.stem_channels',
    ),
    (
      'densenet_mc',
      'model.exits=6,x',
      "exits must be 'last', 'blocks' or ascending numbers from 1 to 16, found '6,x'; "
      'set --config.model.depth, .bottleneck, .exits or .image_side',
    ),
    (
      'msdnet_anytime',
      'model.image_side=30',
      'image_side must be a multiple of 4, to be halved 2 times, found 30; '
      'set --config.model.num_blocks, .growth_rate, .growth_factors, .bottleneck_factors or .image_side',
    ),
    (
      'fractalnet_20',
      'model.block_dropout=(0.1,0.2)',
      'dropout (0.1, 0.2) must have one rate for each of the 5 blocks, or none; '
      'set --config.model.widths, .columns, .block_dropout or .image_side',
    ),
    (
      'resnet_mc',
      'loss.exit_weights=(0,1,1,1,1,1,1)',
      'loss.exit_weights must be more than 0 for exit 1, which ResNet-MC trains, found (0, 1, 1, 1, 1, 1, 1); '
      'set --config.loss.exit_weights',
    ),
  ],
)
def test_refusals(file, argument, message):
  assert refusal(f'--config={CONFIGS}/{file}.py', f'--config.{argument}', '--mode=describe') == message


def test_every_exit_learns_from_labels():
  assert config_lib.targets(small('densenet', exits='blocks')) == (0, 0, 0)
  assert config_lib.targets(small('resnet')) == (0,)
  assert config_lib.exit_weights(small('msdnet')) == (1.0, 1.0)
  assert config_lib.default_workdir(small('msdnet')) == 'runs/small-cifar100-s0'


def test_fields_reach_the_network():
  dtype = jnp.dtype('float32')
  assert config_lib.build_model(small('resnet', exits='1,2', depth=14), 7) == ResNet(
    7, image_side=8, depth=14, exits=(1, 2), dtype=dtype
  )
  assert config_lib.build_model(small('fractalnet', num_classes=3, block_dropout=(0.0, 0.5)), 7) == FractalNet(
    3, 2, (2, 3), (0.0, 0.5), image_side=8, dtype=dtype
  )


def test_ten_exits_fit_the_width_of_a_terminal():
  one_scale = (f'--config.model.{field}' for field in ('base=1', 'growth_factors=(1,)', 'bottleneck_factors=(1,)'))
  result = run_main(f'--config={CONFIGS}/msdnet_anytime.py', *one_scale, '--config.model.step=1', '--mode=describe')
  lines = result.out.splitlines()
  assert (result.code, result.err, len(lines)) == (0, '', 13)
  assert lines[0].startswith('MSDNet-anytime on cifar100: ')
  assert [line.split()[:2] for line in lines[2:12]] == [[str(number), 'labels'] for number in range(1, 11)]
  assert max(map(len, lines)) <= 100


@pytest.mark.parametrize('family', FIELDS)
def test_a_saved_configuration_keeps_its_family(tmp_path, family):
  save_config(tmp_path, small(family))
  restored = restore_config(tmp_path)
  assert restored.to_dict() == small(family).to_dict()
  config_lib.validate(restored)
  with pytest.raises(UserError, match=f'model.family: {family} -> paranet'):
    prepare_workdir(tmp_path, base_config('PN3-ddd'), accept_changes=False)


def test_a_configuration_saved_without_a_family_is_a_paranet(tmp_path: Path):
  config = base_config('PN2-dd')
  saved = json.loads(config.to_json())
  del saved['model']['family'], saved['train']['devices']
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  assert restore_config(tmp_path).to_dict() == config.to_dict()
  prepare_workdir(tmp_path, config, accept_changes=False)
  config.train.devices = 1
  with pytest.raises(UserError, match='configuration: train.devices: 0 -> 1 '):
    prepare_workdir(tmp_path, config, accept_changes=False)


def test_a_saved_family_from_another_version_is_refused(tmp_path):
  saved = json.loads(small('resnet').to_json())
  saved['model']['family'] = 'vgg'
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  message = refusal(f'--workdir={tmp_path}', '--mode=describe')
  assert message.startswith(f"{tmp_path}/config.json has the model.family 'vgg', which is not known here; install ")


def test_register_family(monkeypatch):
  monkeypatch.setattr(FAMILIES, 'known', dict(FAMILIES.known))  # Other tests list what is registered.
  first = Family('first', 'first.py', 'a_package:build', {'width': Field(2)})
  register_family(first)
  register_family(first)
  assert find_family('first') is first and base_config(family='first').model.width == 2
  assert family_names()[-1] == 'first' and find_family('none') is None
  with pytest.raises(ValueError, match="there is already a family 'first'"):
    register_family(Family('first', 'other.py', 'a_package:build', {}))
  with pytest.raises(ValueError, match="family 'second' has fields that every family has"):
    Family('second', 'second.py', 'a_package:build', {'dtype': Field('float32')})
