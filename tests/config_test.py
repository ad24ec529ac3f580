"""Tests of checks on a configuration and of values derived from it. For the effect of each field see fields_test.py."""

import inspect
import math
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from paranet_jax import base_config as base_config_lib
from paranet_jax import config as config_lib
from paranet_jax.base_config import base_config, field_names, fields_of
from paranet_jax.costs import abstract_variables
from paranet_jax.host.errors import UserError
from paranet_jax.models import registry
from paranet_jax.models.registry import family_names, find_family
from paranet_jax.task import build_task

# field: values that its rule refuses, values just within it
BOUNDS = {
  'seed': ((2**31, -(2**31) - 1), (2**31 - 1, -(2**31), 0)),
  'seeds': ((0, -1, 10_001), (1, 5, 10_000)),
  'model.layers_per_block': ((0, -1, 1001), (1, 1000)),
  'model.growth_rate': ((0, -1), (1,)),
  'model.bn_size': ((0, -1), (1,)),
  'model.blocks': (((0, 1), (1,) * 1001, (1.0, 2), (True, 2), ('1', '2')), ((1,), (1, 3))),
  'model.halvings': (((-1, 1), (1.5, 2), (False, 2)), ((0,), (0, 3))),
  'model.cascade': (('2', '2.2,', '2.2;3.3', 'all', '2.2, 3.3'), ('', '2.2', '2.2,3.3,4.12')),
  'model.stem': (('5x5', ''), ('3x3', '7x7')),
  'model.entry_pool': (('mean', 'Max', ''), ('max', 'avg', 'max3x3')),
  'model.entry_order': (('pool', ''), ('stem_first', 'pool_first')),
  'model.depth': ((0, -4), (1,)),
  'model.compression': ((0.0, 1.1, math.nan), (0.5, 1.0)),
  'model.block': (('wide', ''), ('basic', 'preactivation', 'bottleneck')),
  'model.shortcut_padding': (('left', ''), ('behind', 'both_sides')),
  'model.stem_channels': ((0, -1), (1, 24)),
  'model.num_blocks': ((0, -1), (1,)),
  'model.base': ((0, -1), (1,)),
  'model.step_mode': (('odd', ''), ('even', 'lin_grow')),
  'model.step': ((0, -1), (1,)),
  'model.initial_channels': ((0, -1), (1,)),
  'model.growth_factors': (((0, 1), (1.0, 2), (True, 2)), ((1,), (1, 2, 4))),
  'model.bottleneck_factors': (((0, 1), (1.5, 2)), ((1,), (1, 2, 4))),
  'model.scales': (((0, 1), (1.0, 2), (1, 31)), ((1,), (1, 2, 3, 3))),
  'model.base_blocks': ((0, -1), (1,)),
  'model.block_step': ((0, -1), (1,)),
  'model.fusion': ((0.0, 1.0, math.nan), (0.01, 0.99)),
  'model.boost': ((-0.1, math.nan, math.inf), (0.0, 0.5, 2.0)),
  'model.transfer': ((-1, 100_001), (0, 128)),
  'model.reduction': ((0.0, 1.1, math.nan), (0.5, 1.0)),
  'model.columns': ((1, 0, 13), (2, 4, 12)),
  'model.widths': (((0, 1), (1.0,)), ((1,), (64, 128))),
  'model.dropout': ((1.0, -0.1, math.nan), (0.0, 0.9)),
  'model.block_dropout': (((1.0,), (-0.1, 0.0), (math.nan,), ('a',)), ((), (0.0, 0.4), (0,))),
  'model.local_drop_path': ((-0.1, 1.1, math.nan), (0.0, 1.0)),
  'model.global_drop_path': ((-0.1, 1.1, math.nan), (0.0, 1.0)),
  'model.head': (('mlp', ''), ('linear', 'bn_relu', 'conv', 'class_token', 'blocks')),
  'model.copies': ((0, -1, 1001), (1, 3)),
  'model.last': (('', 'none'), ('own', 'new')),
  'model.num_classes': ((1, 0, -3), (2,)),
  'model.image_side': ((0, -8, 10_001), (1, 10_000)),
  'model.channels': ((0, 2, 4), (1, 3)),
  'model.dtype': (('float16', 'int8', ''), ('float32', 'bfloat16', 'bfloat16!')),
  'model.scan_layers': ((0, -1), (1, 16)),
  'data.held_out': ((-1,), (0,)),
  'data.test_fraction': ((0.0, 1.0, -0.1, math.nan), (0.01, 0.99)),
  'data.on_corrupt': (('ignore', ''), ('refuse', 'skip')),
  'data.short_side': ((0, -1), (32, 256)),
  'data.interpolation': (('nearest', ''), ('bilinear', 'bicubic')),
  'data.crop_padding': ((-1,), (0,)),
  'data.workers': ((-1,), (0, 16)),
  'loss.matching': (('mse', ''), ('squared_error', 'kl')),
  'loss.conflict_averse': ((1.0, -0.1, math.nan), (0.0, 0.4)),
  'loss.own_channels': ((-0.1, 1.1, math.nan), (0.0, 0.5, 1.0)),
  'loss.sample_weight': ((1.0, -0.1, math.nan), (0.0, 0.3)),
  'loss.leaving': ((0.0, -1.0, math.nan, math.inf), (0.1, 2.0)),
  'loss.temperature': ((0.0, -1.0, math.nan, math.inf), (0.1, 20.0)),
  'loss.hard_label_weight': ((-0.1, 1.1, math.nan), (0.0, 1.0)),
  'loss.distill': (('first', ''), ('none', 'last', 'next', 'later', 'all')),
  'loss.match_features': ((-0.1, math.nan), (0.0, 1.0)),
  'loss.match_from_epoch': ((-1.0, math.nan, math.inf), (0.0, 5.0)),
  'loss.teacher': (('exit', ''), ('network', 'average', 'run')),
  'loss.exit_weights': (((-1.0, 1), (math.nan, 1), (math.inf, 1), ('a', 'b')), ((0,), (0.5, 2))),
  'loss.label_smoothing': ((1.0, -0.1, math.nan), (0.0, 0.99)),
  'loss.class_weights': (
    ('cat', '', ',', '0,1', '-1,2', '1,nan', '1,inf', '1e7,1', '1e-7,1', '1,,2'),
    ('none', 'balanced', '1,2.5', '(1,2.5)', '(3,)', '0.001, 1000'),
  ),
  'train.epochs': ((0.0, -1.0, math.nan, math.inf, 1e30), (0.01, 300.0)),
  'train.max_steps': ((-1,), (0,)),
  'train.exit_targets': (('', 'next'), ('last', 'labels', 'both')),
  'train.feature_shift': ((-0.1, 0.6, math.nan), (0.0, 0.5)),
  'train.features': (('bfloat16', ''), ('float32', 'float16')),
  'train.regime': (('separate', ''), ('joint', 'disjoint', 'mixed', 'exits')),
  'train.backbone_epochs': ((0.0, -1.0, math.nan, 1e30), (0.5, 65.0)),
  'train.batch_size': ((0, -64, 10**7 + 1), (1, 10**7)),
  'train.learning_rate': ((0.0, -0.1, math.nan, math.inf), (1e-9, 10.0)),
  'train.schedule': (('linear', ''), ('step', 'cosine', 'one_cycle', 'constant')),
  'train.drops': (((-0.1,), (0.5, 1.1), (math.nan,), ('a',)), ((), (0, 0.5, 1))),
  'train.drop_epochs': (((-1, 2), (math.nan,), ('a',), (True,)), ((), (0,), (1.5, 2))),
  'train.drop_factor': ((0.0, -0.1, math.nan), (0.5,)),
  'train.warmup_epochs': ((-0.5, math.nan, math.inf), (0.0, 0.5)),
  'train.optimizer': (('adam', ''), ('sgd', 'adamw', 'muon')),
  'train.norm_bias_factor': ((0.0, -1.0, math.nan, math.inf), (64.0,)),
  'train.average': ((1.0, -0.1, math.nan), (0.0, 0.999)),
  'train.momentum': ((1.0, -0.1, math.nan), (0.0, 0.99)),
  'train.weight_decay': ((-1e-4, math.nan, math.inf), (0.0,)),
  'train.decay': (('none', ''), ('all', 'kernels')),
  'train.clip_norm': ((-1.0, math.nan, math.inf), (0.0,)),
  'train.accumulate_steps': ((0, -1), (1,)),
  'train.cutout': ((-1,), (0, 16)),
  'train.mixup': ((-0.1, math.nan, math.inf), (0.0, 0.2)),
  'train.cutmix': ((-0.1, math.nan, math.inf), (0.0, 1.0)),
  'train.auto_augment': (('auto', ''), ('none', 'rand', 'trivial')),
  'train.rand_augment_operations': ((0, 11), (1, 10)),
  'train.rand_augment_magnitude': ((-1, 31), (0, 30)),
  'loss.match_scale': (('sum', ''), ('mean', 'half_sum')),
  'loss.match_before': (('exits', ''), ('labels', 'nothing')),
  'train.devices': ((-1,), (0,)),
  'eval.every_epochs': ((0.0, -1.0, math.nan, 1e30), (0.1,)),
  'eval.batch_size': ((0, -1), (1,)),
  'checkpoint.every_steps': ((0, -1), (1,)),
  'checkpoint.keep': ((0, -1), (1,)),
  'checkpoint.keep_every_epochs': ((-1.0, math.nan, math.inf), (0.0, 0.5)),
  'checkpoint.keep_best': (('best', ''), ('none',)),
  'log.every_steps': ((0, -1), (1,)),
}


FAMILIES = family_names()
ALL_FIELDS = {name: (family, field) for family in reversed(FAMILIES) for name, field in fields_of(family).items()}
"""Every field, with the first family that has it."""


def changed(family='paranet', **fields):
  """The base configuration of a family with changes given as `section__field`."""
  config = base_config(family=family)
  config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
  return config


def refusal(check, *arguments) -> str:
  with pytest.raises(UserError) as error:
    check(*arguments)
  return str(error.value)


def test_every_rule_is_tested():
  assert BOUNDS.keys() == {name for name, (_, field) in ALL_FIELDS.items() if field.rule}


@pytest.mark.parametrize('name', BOUNDS)
def test_bounds(name):
  family, field = ALL_FIELDS[name]
  refused, allowed = BOUNDS[name]
  for value in refused:
    message = refusal(config_lib.validate, changed(family, **{name.replace('.', '__'): value}))
    assert message == f'{name} must be {field.rule.expected}, found {value}; set --config.{name}'
  assert all(field.rule.holds(value) for value in allowed)


@pytest.mark.parametrize('name', BOUNDS)
def test_every_number_has_an_upper_bound(name):
  _, field = ALL_FIELDS[name]
  kind = field.kind or type(field.default)
  if kind in (int, float):
    assert not field.rule.holds(kind(10**30)), name
  elif kind is tuple:
    assert not field.rule.holds((10**30,)), name


ABSURD = [
  ('paranet', {'model__layers_per_block': 1000, 'model__growth_rate': 10_000}),
  ('paranet', {'model__image_side': 10_000}),
  ('paranet', {'data__crop_padding': 10_000}),
  ('paranet', {'train__batch_size': 10**7}),
  ('paranet', {'eval__batch_size': 10**7}),
  ('densenet', {'model__depth': 9_994, 'model__growth_rate': 10_000}),
  ('densenet', {'model__depth': 10_000, 'model__growth_rate': 10_000, 'model__bottleneck': False}),
  ('resnet', {'model__depth': 9_998, 'model__image_side': 1000}),
  ('msdnet', {'model__base': 1000, 'model__growth_rate': 10_000}),
  ('fractalnet', {'model__columns': 12, 'model__widths': (100_000,)}),
]


@pytest.mark.parametrize(('family', 'fields'), ABSURD)
def test_what_cannot_fit_is_refused_before_it_is_built(family, fields):
  config = changed(family, **fields)
  message = refusal(config_lib.check_memory, config, 1, 64e9, True)
  assert re.fullmatch(
    r'expected a run that fits the 64.0 GB of a device, found one that needs more than [\d,]+\.\d GB; lower '
    '--config.train.batch_size, .eval.batch_size, .model.image_side or the size of the network',
    message,
  )
  config_lib.check_memory(config, 1, math.inf, True)
  config_lib.check_memory(base_config(family=family), 1, 2e9, True)
  config_lib.check_memory(changed(train__batch_size=10**7), 1, 2e9, training=False)


@pytest.mark.parametrize('family', [name for name in FAMILIES if find_family(name).least])
def test_the_bound_on_parameters_is_below_them(family):
  config = base_config('PN2-dd' if family == 'paranet' else family, family)
  config.model.image_side = 64
  small = {'growth_rate': 3, 'layers_per_block': 2, 'depth': 20 if family == 'resnet' else 22}
  if family == 'ranet':  # A fourth of its growth_rate must be 1 or more. It is the dearest to trace.
    small |= {'growth_rate': 4, 'scales': (1, 2), 'growth_factors': (2, 1), 'bottleneck_factors': (2, 1)}
  small |= {'initial_channels': 1, 'base': 2, 'num_blocks': 3}
  for fields in (small, {'growth_rate': 12, 'initial_channels': 16}):
    config.model.update({name: value for name, value in fields.items() if name in config.model})
    variables = abstract_variables(config_lib.build_model(config, 2), config_lib.image_shape(config))
    assert find_family(family).least(dict(config.model))[0] <= sum(x.size for x in jax.tree.leaves(variables['params']))


DERIVED = {
  *('model.blocks', 'model.halvings', 'model.cascade', 'model.num_classes', 'model.scan_layers', 'model.stem_channels'),
  *('model.head', 'model.copies'),
  *('data.streaming', 'data.workers', 'data.short_side'),
  *('data.crop_padding', 'data.flip', 'loss.exit_weights', 'train.drop_epochs', 'train.backbone_epochs'),
}


def test_only_derived_fields_may_be_none():
  for family in FAMILIES:
    config_lib.validate(base_config(family=family))
  for field, (family, _) in ALL_FIELDS.items():
    config = changed(family, **{field.replace('.', '__'): None})
    if field in DERIVED:
      config_lib.validate(config)
    else:
      expected = f'{field} must have a value, found None; set --config.{field}'
      assert refusal(config_lib.validate, config) == expected


def test_missing_and_unknown_fields_are_refused():
  config = base_config()
  with config.unlocked():
    config.train.patience = 3
  message = (
    'the configuration has an unknown field train.patience; start from base_config() as configs/quickstart.py does'
  )
  assert refusal(config_lib.validate, config) == message
  with config.unlocked():
    del config.train.patience, config.data
  message = 'the configuration lacks field data.crop_padding; start from base_config() as configs/quickstart.py does'
  assert refusal(config_lib.validate, config) == message


def test_a_misspelled_field_is_an_error():
  with pytest.raises(AttributeError, match='Did you mean "epochs"'):
    base_config().train.epoch = 3


def test_every_field_has_a_comment():
  for file in (base_config_lib, registry):
    lines = [line.strip() for line in inspect.getsource(file).splitlines()]
    fields = [i for i, line in enumerate(lines) if re.match(r"'\w+(\.\w+)?': (Field|derived|_PARANET)", line)]
    assert fields
    assert [lines[i] for i in fields if '  # ' not in lines[i] and not lines[i - 1].startswith('# ')] == []


@pytest.mark.parametrize(
  ('given', 'expected'),
  [
    ('none', None),
    ('(1,2.5)', (1, 2.5, 1)),  # The network has an output more than there are classes.
    # Four images of two classes: 4 / (2 * 3) and 4 / (2 * 1).
    ('balanced', (pytest.approx(2 / 3), 2, 1)),
  ],
)
def test_class_weights(given, expected):
  labels = np.array([0, 1, 0, 0], np.int32)
  assert config_lib.class_weights(changed(loss__class_weights=given), ('cat', 'dog'), labels, 3) == expected


def test_another_number_of_class_weights_than_of_classes():
  names = ('cat', 'cow', 'dog')
  message = refusal(config_lib.class_weights, changed(loss__class_weights='1,2'), names, np.zeros(3, np.int32), 3)
  assert message == (
    "loss.class_weights must have 3 numbers, one for each class from 'cat' to 'dog', found 2; "
    'set --config.loss.class_weights'
  )


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'name': 'PN3-3xd'}, 'exit 3 of PN3-3xd learns from labels, found images without labels (data.name images); '),
    ({'loss__hard_label_weight': 0.1}, 'loss.hard_label_weight 0.1 needs labels, found images without labels'),
    ({'checkpoint__keep_best': 'nll'}, 'checkpoint.keep_best nll needs labels, found images without labels'),
  ],
)
def test_what_needs_labels_is_refused_without(fields, message, monkeypatch):
  if 'name' not in fields:
    monkeypatch.setattr(config_lib, 'targets', lambda config: (3, 3, None))
  assert refusal(config_lib.validate, changed(data__name='images', data__held_out=1, **fields)).startswith(message)


def test_the_data_folder_from_the_environment(monkeypatch):
  monkeypatch.setenv('PARANET_DATA_DIR', '/prepared')
  assert base_config().data.data_dir == '/prepared'
  monkeypatch.delenv('PARANET_DATA_DIR')
  assert base_config().data.data_dir == ''


@pytest.mark.parametrize(
  ('data_dir', 'expected'), [('', ''), ('sets', '{here}/sets'), ('/sets', '/sets'), ('~/sets', '{home}/sets')]
)
def test_absolute_paths(tmp_path, monkeypatch, data_dir, expected):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', '/home/of/user')
  config = changed(data__data_dir=data_dir, init_from=data_dir)
  config_lib.absolute_paths(config)
  assert config.data.data_dir == config.init_from == expected.format(here=tmp_path, home='/home/of/user')


@pytest.mark.parametrize(
  ('name', 'data', 'seed', 'expected'),
  [
    ('PN3-ddd', 'cifar100', 0, 'runs/PN3-ddd-cifar100-s0'),
    ('PN3cut-33d', 'digits', 7, 'runs/PN3cut-33d-digits-s7'),
    ('PN2-dx', 'emnist/letters:3.1.0', -1, 'runs/PN2-dx-emnist_letters_3.1.0-s-1'),
  ],
)
def test_default_workdir_follows(name, data, seed, expected):
  assert config_lib.default_workdir(changed(name=name, data__name=data, seed=seed)) == expected


@pytest.mark.parametrize(
  ('epochs', 'max_steps', 'steps_per_epoch', 'expected'),
  [(130, 0, 781, 101_530), (2, 0, 5, 10), (0.5, 0, 5, 2), (0.01, 0, 5, 1), (2, 7, 5, 7), (2, 70, 5, 10)],
)
def test_total_steps_follow(epochs, max_steps, steps_per_epoch, expected):
  config = changed(train__epochs=epochs, train__max_steps=max_steps)
  assert config_lib.total_steps(config, steps_per_epoch) == expected


def test_targets_and_weights_follow_the_name():
  config = changed(name='PN4-x44d')
  assert config_lib.targets(config) == (None, 4, 4, 0)
  assert config_lib.exit_weights(config) == (1.0, 1.0, 1.0, 1.0)
  assert config_lib.exit_weights(changed(loss__exit_weights=(1, 2, 0.5))) == (1, 2, 0.5)
  assert refusal(config_lib.exit_weights, changed(loss__exit_weights=(1, 2))) == (
    'loss.exit_weights must have 3 entries, one for each exit of PN3-ddd, found (1, 2); set --config.loss.exit_weights'
  )


@pytest.mark.parametrize(
  ('fields', 'edges'),
  [
    ({'name': 'PN3-ddd'}, {(2, 2), (3, 2), (3, 3)}),
    ({'name': 'PN3cut-ddd'}, set()),
    ({'name': 'PN3-ddd', 'model__cascade': ''}, set()),
    ({'name': 'PN3-ddd', 'model__cascade': '3.3,2.2'}, {(2, 2), (3, 3)}),
    ({'name': 'PN3cut-ddd', 'model__cascade': '3.2'}, {(3, 2)}),
  ],
)
def test_cascade_follows_name_and_field(fields, edges):
  assert set(config_lib.build_model(changed(**fields), 10).geometry.cascade) == edges


def test_classes_follow_the_data_unless_they_are_set():
  assert config_lib.build_model(changed(), 10).num_classes == 10
  assert config_lib.build_model(changed(model__num_classes=7), 10).num_classes == 7


@pytest.mark.parametrize(('epochs', 'drops'), [(13.0, (15, 30)), (26.0, (30, 60))])
def test_drops_follow_the_epochs(epochs, drops):
  # Three steps per epoch; the paper drops after 5 and 10 of 13 epochs.
  small = {'model__layers_per_block': 1, 'model__growth_rate': 2, 'model__image_side': 8}
  task = build_task(changed(name='PN1-d', data__name='digits', train__batch_size=400, train__epochs=epochs, **small))
  rates = [task.learning_rate(step) for drop in drops for step in (drop - 1, drop)]
  assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001])


@pytest.mark.parametrize(('batch_size', 'devices'), [(64, 3), (2, 4), (220, 8)])
def test_devices_must_share_a_batch_evenly(batch_size, devices):
  assert refusal(config_lib.check_devices, changed(train__batch_size=batch_size), devices) == (
    f'train.batch_size {batch_size} cannot be shared evenly by {devices} devices; '
    'set --config.train.batch_size or --config.train.devices'
  )
  config_lib.check_devices(changed(train__batch_size=batch_size * devices), devices)


@pytest.mark.parametrize(
  ('saved', 'current', 'expected'),
  [
    ({'seed': 0, 'train': {'epochs': 2}}, {'seed': 0, 'train': {'epochs': 2.0}}, []),
    ({'seed': 0}, {'seed': 1}, ['seed: 0 -> 1']),
    (
      {'b': {'y': 1, 'x': [1]}, 'a': 1},
      {'b': {'y': 2, 'x': None}, 'a': 2},
      ['a: 1 -> 2', 'b.x: [1] -> None', 'b.y: 1 -> 2'],
    ),
    ({'old': 1}, {'new': 2}, ['new: None -> 2', 'old: 1 -> None']),
    ({'data': {'name': 'cifar10', 'data_dir': 'a'}}, {'data': {'name': 'cifar10', 'data_dir': 'b'}}, []),
    (
      {'data': {'name': 'folder', 'data_dir': 'a'}},
      {'data': {'name': 'folder', 'data_dir': 'b'}},
      ['data.data_dir: a -> b'],
    ),
  ],
)
def test_differences(saved, current, expected):
  assert config_lib.differences(saved, current) == expected


def test_field_names():
  config = ConfigDict({'name': 'a', 'train': {'epochs': 1, 'deep': {'er': None}}})
  assert (
    sorted(field_names(config)) == ['name', 'train.deep.er', 'train.epochs'] == sorted(field_names(config.to_dict()))
  )


@pytest.mark.parametrize(
  ('name', 'fields', 'message'),
  [
    (
      'PN2-dd',
      {'train.mixup': 0.2, 'train.cutmix': 1.0},
      'train.mixup and train.cutmix exclude each other, found 0.2 and 1.0; set one of --config.train.mixup and '
      '--config.train.cutmix to 0',
    ),
    (
      'PN2-dd',
      {'loss.match_from_epoch': 2.0},
      "loss.match_from_epoch needs an exit that matches another and train.regime 'joint', found PN2-dd and 'joint'; "
      'set --config.loss.match_from_epoch=0',
    ),
    (
      'PN2-2d',
      {'loss.match_from_epoch': 130.0},
      'loss.match_from_epoch must be less than train.epochs 130.0, found 130.0; set --config.loss.match_from_epoch',
    ),
    (
      'PN2-2d',
      {'loss.teacher': 'average'},
      "loss.teacher 'average' needs averages of the weights, found train.average 0; set --config.train.average, such "
      'as 0.999, or --config.loss.teacher=network',
    ),
    (
      'PN2-2d',
      {'loss.teacher': 'run'},
      "loss.teacher 'run' and loss.teacher_run, the folder of a finished run, go together, found 'run' and ''; set "
      '--config.loss.teacher and --config.loss.teacher_run',
    ),
    (
      'PN2-dd',
      {'loss.teacher': 'average', 'train.average': 0.9},
      "loss.teacher 'average' needs an exit that matches another or learns from exits, and PN2-dd has none; set "
      '--config.loss.distill, or --config.loss.teacher=network',
    ),
    (
      'PN2-dd',
      {'loss.distill': 'all', 'loss.hard_label_weight': 0.5},
      "loss.distill 'all' lets the last exit learn from another network's, found loss.teacher 'network'; set "
      '--config.loss.teacher to average or run, or --config.loss.distill',
    ),
  ],
)
def test_fields_of_teachers_and_blends_that_do_not_fit(name, fields, message):
  config = base_config(name)
  config.update_from_flattened_dict(fields)
  with pytest.raises(UserError) as error:
    config_lib.validate(config)
  assert str(error.value) == message


@pytest.mark.parametrize('field', ['train.alternate_flip', 'train.average'])
def test_a_frozen_backbone_has_no_use_for(field):
  config = base_config('net', 'resnet')
  value = True if field.endswith('flip') else 0.9
  config.update_from_flattened_dict({'train.regime': 'exits', 'model.exits': 'stages', field: value})
  with pytest.raises(UserError, match=f"{field}.* found .*train.regime 'exits'; set --config.{field}="):
    config_lib.validate(config)


def exits_of_resnet(**fields):
  return changed('resnet', name='net', model__exits='stages', train__regime='exits', **fields)


def test_exits_that_learn_from_both_learn_from_the_last_one():
  given = {'train__exit_targets': 'both', 'loss__distill': 'next'}
  assert refusal(config_lib.validate, exits_of_resnet(**given)) == (
    "train.exit_targets 'both' lets every exit learn from the last one, found loss.distill 'next'; set "
    '--config.loss.distill=none, or --config.train.exit_targets=labels'
  )
  for distill in ('none', 'last'):
    config = exits_of_resnet(train__exit_targets='both', loss__distill=distill)
    config_lib.validate(config)
    assert config_lib.teachers(config) == {1: (3,), 2: (3,)}


def test_an_exit_that_came_trained_needs_no_weight():
  config_lib.validate(exits_of_resnet(loss__exit_weights=(1, 2, 0)))
  assert refusal(config_lib.validate, exits_of_resnet(loss__exit_weights=(1, 0, 0))).startswith(
    'loss.exit_weights must be more than 0 for exit 2, which net trains'
  )
