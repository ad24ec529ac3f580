"""Tests of parameters and multiply-adds: the spec's numbers, a separate count, shipped configurations, `describe`."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest
import tiny
from reference import SHIPPED
from running import CONFIGS, QUICKSTART, contents, run_main

from paranet_jax import costs
from paranet_jax.base_config import base_config
from paranet_jax.command_line import load_config
from paranet_jax.config import build_model
from paranet_jax.costs import abstract_variables, describe, exit_costs, multiply_adds, parameter_sizes
from paranet_jax.data.known import known_dataset
from paranet_jax.models.adopted.network import AdoptedNetwork
from paranet_jax.models.densenet import DenseNet
from paranet_jax.models.fractalnet import FractalNet
from paranet_jax.models.msdnet import MSDNet
from paranet_jax.models.paranet import ParaNet
from paranet_jax.models.ranet import RANet
from paranet_jax.models.resnet import ResNet


@functools.cache
def costs_of(model: ParaNet) -> list[dict]:
  return exit_costs(model, (model.image_side, model.image_side, model.channels))


def column(model: ParaNet, name: str) -> list[int]:
  return [exit_cost[name] for exit_cost in costs_of(model)]


def listed(model: ParaNet, cascade: bool) -> list[dict]:
  """The same costs summed layer by layer, for the default blocks and halvings."""
  k, bottleneck, classes, pipelines = model.growth_rate, model.bn_size * model.growth_rate, model.num_classes, {}
  counts, width, heads = [], {}, 0
  for p in range(1, model.num_pipelines + 1):
    area = model.image_side**2
    own_params = 9 * model.channels * 2 * k + (4 * k if model.stem_norm else 0)
    own_macs = area * 9 * model.channels * 2 * k
    channels = 2 * k
    for b in range(1, p + 1):
      area = (model.image_side // 2 ** (model.num_pipelines + 1 - p + b - 1)) ** 2
      if b > 1:
        own_params += 2 * channels + channels * channels
        own_macs += area * channels * channels
        channels += width[p - 1, b - 1] if cascade else 0
      for _ in range(model.layers_per_block):
        own_params += 2 * channels + channels * bottleneck + 2 * bottleneck + 9 * bottleneck * k
        own_macs += area * (channels * bottleneck + 9 * bottleneck * k)
        channels += k
      width[p, b] = channels
    head = channels * classes
    own_params += 2 * channels + head + classes
    own_macs += head
    pipelines[p] = {'own_macs': own_macs, 'own_params': own_params}
    macs = sum(own['own_macs'] for own in pipelines.values())
    params = sum(own['own_params'] for own in pipelines.values())
    alone = macs - heads if cascade else own_macs
    counts.append({'exit': p, **pipelines[p], 'macs': macs, 'params': params, 'macs_alone': alone})
    heads += head
  return counts


@pytest.mark.parametrize(
  'cascade, own_params, params, macs, last_alone',
  [
    (True, [198_460, 789_244, 2_417_980], 3_405_684, [3_413_088, 23_538_720, 125_943_456], 125_859_456),
    (False, [198_460, 594_412, 1_264_156], 2_057_028, [3_413_088, 20_862_912, 98_678_304], 77_815_392),
  ],
  ids=['PN3', 'PN3cut'],
)
def test_reference_counts_of_the_spec(cascade, own_params, params, macs, last_alone):
  """Of the sum over layers, to which the test below compares what is counted."""
  rows = listed(ParaNet(cascade=cascade), cascade)
  assert [row['own_params'] for row in rows] == own_params
  assert [row['macs'] for row in rows] == macs
  assert (rows[-1]['params'], rows[-1]['macs_alone']) == (params, last_alone)


@pytest.mark.parametrize('cascade', [True, False])
def test_costs_equal_a_sum_over_layers(cascade):
  model = ParaNet(4, 7, 2, 5, bn_size=3, cascade=cascade, stem_norm=True, image_side=16, channels=1)
  assert costs_of(model) == listed(model, cascade)


def test_stem_norm_adds_a_scale_and_a_bias_per_channel():
  plain, normed = (ParaNet(layers_per_block=1, stem_norm=stem_norm) for stem_norm in (False, True))
  assert [b - a for a, b in zip(column(plain, 'own_params'), column(normed, 'own_params'), strict=True)] == [48] * 3
  assert column(plain, 'macs') == column(normed, 'macs')


@pytest.mark.parametrize(
  'fields', [{}, {'cascade': False}, {'cascade': ((3, 3),)}, {'blocks': (2, 2, 2), 'halvings': (2, 1, 0)}]
)
def test_costs_match_the_passes(fields):
  model = tiny.network(3, **fields)
  variables, images = tiny.variables(model), jnp.zeros((1, tiny.SIDE, tiny.SIDE, 3))

  def forward(exits=None, train=False):
    return model.apply(variables, images, train=train, exits=exits, mutable=['batch_stats'] if train else [])

  @functools.cache
  def convolutions(*options):
    return str(jax.make_jaxpr(functools.partial(forward, *options))()).count('conv_general_dilated[')

  assert column(model, 'params')[-1] == sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
  # Trying the exits in turn computes nothing twice.
  assert column(model, 'macs')[-1] == multiply_adds(forward)[0]
  # Training computes only what its exits need: the same number of 3x3 convolutions, one per stem and layer.
  for number in (1, 2, 3):
    assert convolutions((number,), True) == convolutions((number,)) <= convolutions()
  assert convolutions((1,)) < convolutions()


@pytest.mark.parametrize(
  'name, exits, unused',
  [
    ('PN3-ddd', (2,), ('pipeline_3_', 'exit_1', 'exit_3')),
    ('PN3cut-ddd', (3,), ('pipeline_1_', 'pipeline_2_', 'exit_1', 'exit_2')),
  ],
)
def test_parameter_sizes_of_some_exits(name, exits, unused):
  model = tiny.named(name)
  every = jax.tree_util.tree_leaves_with_path(tiny.variables(model)['params'])
  every = {tuple(key.key for key in path): leaf.size for path, leaf in every}
  used = {path: size for path, size in every.items() if not path[0].startswith(unused)}
  assert parameter_sizes(model, (tiny.SIDE, tiny.SIDE, 3), *exits) == used


def _convolution(groups=1):
  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (2, 2), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=groups
    )

  return convolve


@pytest.mark.parametrize(
  'function, shapes, macs',
  [
    (jnp.matmul, [(2, 3), (3, 5)], 2 * 3 * 5),
    (jnp.matmul, [(7, 2, 3), (7, 3, 5)], 7 * 2 * 3 * 5),
    (jnp.tensordot, [(2, 3, 4), (3, 4, 5)], 2 * 3 * 4 * 5),
    (jnp.multiply, [(2, 3), (2, 3)], 0),
    (_convolution(), [(1, 7, 7, 4), (3, 3, 4, 6)], 3 * 3 * 6 * 3 * 3 * 4),
    (_convolution(groups=2), [(1, 7, 7, 4), (3, 3, 2, 6)], 3 * 3 * 6 * 3 * 3 * 2),
    (jax.jit(jnp.matmul), [(2, 3), (3, 5)], 2 * 3 * 5),
    (jax.checkpoint(jnp.matmul), [(2, 3), (3, 5)], 2 * 3 * 5),
    (lambda x, y: jax.lax.scan(lambda carry, row: (carry @ y, row @ y), x, x), [(3, 3), (3, 3)], 3 * (27 + 9)),
    (
      lambda x, y: jax.lax.scan(
        lambda c, _: (jax.lax.scan(lambda c, _: (c @ y, None), c, length=4)[0], None), x, length=5
      ),
      [(2, 3), (3, 3)],
      5 * 4 * 2 * 3 * 3,
    ),
  ],
)
def test_multiply_adds(function, shapes, macs):
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  counted, result = multiply_adds(function, *arguments)
  assert counted == macs
  assert result == jax.eval_shape(function, *arguments)


# Their tests count some of them, tests/slow/costs_test.py all.
MODELS = {
  'paranet:PN1-d': ParaNet(1),
  'paranet:PN2cut-2d': ParaNet(2, cascade=False),
  'pn4_imagenet': ParaNet(4, 1000, 6, 32, stem_norm=True, stem='7x7', entry_pool='max3x3', image_side=224),
  'densenet_bc_100_12': DenseNet(),
  'densenet_mc': DenseNet(depth=52, compression=1.0, bn_size=None, exits=(6, 12)),
  'resnet_110': ResNet(),
  'preact_resnet_110': ResNet(block='preactivation'),
  'resnet_mc': ResNet(depth=62, exits=(4, 8)),
  'msdnet_anytime': MSDNet(num_blocks=10),
  'msdnet_budgeted': MSDNet(num_blocks=5, step_mode='lin_grow', step=1, base=1),
  'ranet_anytime': RANet(),
  'fractalnet_20': FractalNet(dropout=(0.0, 0.1, 0.2, 0.3, 0.4)),
  'adopted': AdoptedNetwork(arch='cifar_resnet56', exits=('layer1', 'layer2', 'layer3.4')),
}


@pytest.mark.parametrize('config', SHIPPED)
def test_shipped_configurations(config):
  found = load_config(f'paranet_jax:{config}')
  name, counts = SHIPPED[config]
  assert found.name == name
  model = build_model(found, known_dataset(found.data.name).num_classes)
  if config in MODELS:
    assert model == MODELS[config]
  if config not in MODELS or config in ('paranet:PN1-d', 'resnet_mc', 'fractalnet_20'):
    assert list(zip(column(model, 'params'), column(model, 'macs'), strict=True)) == counts


def test_every_shipped_configuration_is_in_the_table():
  assert {path.stem for path in CONFIGS.glob('*.py')} == {config.split(':')[0] for config in SHIPPED}


@pytest.mark.parametrize('exits', [None, (2,)])
def test_abstract_variables_match_init(exits):
  model = ParaNet(num_pipelines=2, num_classes=5, layers_per_block=2, growth_rate=4, image_side=16)
  image = jnp.zeros((1, 16, 16, 3))
  shapes = jax.eval_shape(functools.partial(model.init, exits=exits), jax.random.key(0), image)
  assert abstract_variables(model, image.shape[1:], exits) == shapes


FULL = f'--config={CONFIGS}/paranet.py'
SMALL = ('--config.model.layers_per_block=1', '--config.model.growth_rate=2', '--config.model.image_side=8')


def small(**data):
  config = base_config('PN2-2d')
  config.model.update(layers_per_block=1, growth_rate=2, image_side=8)
  config.data.update(data)
  return config


def test_describe_prints_one_json_object_and_reads_no_data(tmp_path, monkeypatch):
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
  # An exit alone needs no earlier head: from 216 and from 624 features to 100 classes.
  assert [row['macs'] - row['macs_alone'] for row in found['exits']] == [0, 216 * 100, (216 + 624) * 100]
  assert not contents(tmp_path)


def test_describe_prints_a_table(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  result = run_main(QUICKSTART, '--config.name=PN2-2d', *SMALL, '--mode=describe')
  lines = result.out.splitlines()
  assert (result.code, result.err, len(lines)) == (0, '', 5)
  assert lines[0].startswith('PN2-2d on digits: ')
  assert [line.split()[0] for line in lines[1:4]] == ['exit', '1', '2']
  assert 'exit 2' in lines[2] and 'labels' in lines[3]
  assert not contents(tmp_path)


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    (('name=PN3-ddd', 'loss.distill=later'), ['labels, exits 2 3', 'labels, exit 3', 'labels']),
    (('name=PN3-x3d', 'loss.matching=kl'), ['nothing', 'labels, exit 3', 'labels']),
    (('name=PN3-x3d',), ['nothing', 'exit 3', 'labels']),  # By squared error, which has no part from labels.
  ],
)
def test_describe_distilled_exits(fields, expected):
  arguments = (f'--config.{field}' for field in (*fields, 'loss.hard_label_weight=0.5'))
  result = run_main(QUICKSTART, *SMALL, *arguments, '--mode=describe', '--json')
  assert [row['learns_from'] for row in json.loads(result.out)['exits']] == expected


@pytest.mark.parametrize(
  ('dataset', 'configured', 'from_data', 'expected'),
  [
    ('cifar100', None, None, 100),
    ('cifar10', None, None, 10),
    ('digits', None, None, 10),
    ('folder', None, 3, 3),
    ('folder', 7, None, 7),
    ('cifar10', 7, 10, 7),
  ],
)
def test_number_of_classes(monkeypatch, dataset, configured, from_data, expected):
  config = small(name=dataset)
  if configured:
    config.model.num_classes = configured
  found = []
  monkeypatch.setattr(costs, 'exit_costs', lambda model, shape: found.append(model.num_classes) or [{'exit': 1}] * 2)
  assert describe(config, from_data)['num_classes'] == expected
  assert found == [expected]
