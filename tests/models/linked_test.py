"""Tests of exits that read the logits of the exit before them, against the logits of the model that is linked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from running import CONFIGS, refusal

from paranet_jax import config as config_lib
from paranet_jax.base_config import base_config
from paranet_jax.costs import abstract_variables, exit_costs
from paranet_jax.export.stages import cut
from paranet_jax.models.linked import boosted, trained_by_its_exits, with_transfer
from paranet_jax.models.paranet import ParaNet
from paranet_jax.task import _users, build_task

SHAPE = (1, 1, 2)
PLAIN = tiny.dense(3)
IMAGES = np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float32)
HALF = boosted(PLAIN, 0.5)
WIDE = with_transfer(PLAIN, 5)


def variables_of(model):
  return tiny.filled(jax.eval_shape(model.init, jax.random.key(0), IMAGES))


def unlinked_logits(variables):
  own = {name: leaf for name, leaf in variables['params'].items() if not name.endswith('_transfer')}
  return np.asarray(PLAIN.apply({'params': own}, IMAGES))


def sums(logits, _):
  """0.5 of the sum before."""
  first, second, third = logits
  return first, second + 0.5 * first, third + 0.5 * second + 0.25 * first


def transferred(logits, variables, train=False):
  """Linear, batch normalization, ReLU and linear of the logits before, added."""
  found = [logits[0]]
  for number, own in enumerate(logits[1:], 2):
    params = variables['params'][f'exit_{number}_transfer']
    norm, known = params['norm'], variables['batch_stats'][f'exit_{number}_transfer']['norm']
    hidden = found[-1] @ params['hidden']['kernel'] + params['hidden']['bias']
    mean, var = (hidden.mean(0), hidden.var(0)) if train else (known['mean'], known['var'])
    hidden = np.maximum((hidden - mean) / np.sqrt(var + 1e-5) * norm['scale'] + norm['bias'], 0)
    found.append(own + hidden @ params['classifier']['kernel'])
  return found


LINKED = {'boost': (HALF, sums), 'transfer': (WIDE, transferred)}


@pytest.mark.parametrize('case', LINKED)
def test_logits_in_one_pass_and_stage_by_stage(case):
  model, expected = LINKED[case]
  variables = variables_of(model)

  @jax.jit
  def all_ways(variables):
    ways = []
    for numbers in ((1, 2, 3), (1, 3), (3,)):
      carry, logits = {}, {}
      for number in numbers:
        logits[number], carry = model.apply(variables, IMAGES, carry, number, method='stage')
      assert carry == {}
      ways.append(logits)
    return model.apply(variables, IMAGES), model.apply(variables, IMAGES, exits=(2,)), ways

  full, asked, ways = all_ways(variables)
  wanted = expected(unlinked_logits(variables), variables)
  np.testing.assert_allclose(full, wanted, rtol=1e-5, atol=1e-5)
  assert [logits is None for logits in asked] == [True, False, True]
  for way in (*ways, {2: asked[1]}):
    for number, logits in way.items():
      np.testing.assert_allclose(logits, wanted[number - 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('case', LINKED)
def test_training(case):
  """A boosted loss trains one exit's own logits; what passes through a transfer also trains the exit before."""
  model, expected = LINKED[case]
  variables = variables_of(model)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def third(params):
    everything = variables | {'params': params}
    logits, _ = model.apply(everything, IMAGES, train=True, mutable=['batch_stats'])
    return logits[2].sum(), logits

  gradient, logits = third(variables['params'])
  options = {'train': True} if case == 'transfer' else {}
  wanted = expected(unlinked_logits(variables), variables, **options)
  np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)
  heads = [np.abs(gradient[f'default_heads_{index}']['classifier']['kernel']).sum() > 0 for index in range(3)]
  assert heads == [case == 'transfer'] * 2 + [True]


def test_costs_of_linked_exits():
  """An exit alone also needs the classifiers before it (4 features to 3 classes), and a transfer adds two products."""
  plain, half, wide = ([row['macs'] for row in exit_costs(model, SHAPE)] for model in (PLAIN, HALF, WIDE))
  assert half == plain
  assert [b - a for a, b in zip(plain, wide, strict=True)] == [0, 30, 60]
  for model, each in ((PLAIN, 0), (HALF, 12), (WIDE, 12)):
    rows = exit_costs(model, SHAPE)
    before = [(12 - each) * (row['exit'] - 1) for row in rows]
    assert [row['macs'] - row['macs_alone'] for row in rows] == before


def test_graphs_are_linked_too():
  """Skipped stages of a ParaNet have the same logits, and carry the features of the plain network and the logits."""
  model = boosted(tiny.named('PN3-ddd'), 0.5)
  assert model == boosted(tiny.named('PN3-ddd'), 0.5) and hash(model) == hash(boosted(tiny.named('PN3-ddd'), 0.5))
  assert isinstance(model, ParaNet) and model.clone(axis_name='batch').axis_name == 'batch'
  variables = abstract_variables(model, (tiny.SIDE, tiny.SIDE, 3))
  assert variables == abstract_variables(tiny.named('PN3-ddd'), (tiny.SIDE, tiny.SIDE, 3))
  images = jax.ShapeDtypeStruct((1, tiny.SIDE, tiny.SIDE, 3), jnp.float32)

  def stage(model, number, carry):
    return jax.eval_shape(
      lambda variables, images, carry: model.apply(variables, images, carry, number, method='stage'),
      *(variables, images, carry),
    )

  _, carry = stage(model, 1, {})
  _, own = stage(tiny.named('PN3-ddd'), 1, {})
  assert carry['features'] == own and list(carry['logits']) == [1]
  assert stage(model, 3, carry)[0].shape == (1, tiny.NUM_CLASSES)
  assert trained_by_its_exits(model) == tiny.named('PN3-ddd')
  assert trained_by_its_exits(WIDE) is WIDE


@pytest.mark.parametrize('case', LINKED)
def test_stages_of_a_bundle_exchange_the_logits(case):
  model, expected = LINKED[case]
  variables = variables_of(model)
  stages = cut(model, variables, SHAPE, (1, 2, 3), (1, 2, 3))
  arrays, found = {'images': IMAGES}, []
  for number in (1, 2, 3):
    spec = stages.specs[f'stage_{number}']
    logits, *given = spec.function(*(arrays[tensor.name] for tensor in spec.takes))
    arrays |= dict(zip([tensor.name for tensor in spec.gives], given, strict=True))
    found.append(logits)
  assert {tensor.name for tensor in stages.specs['stage_2'].takes} == {'features_features_1', 'features_logits_1'}
  np.testing.assert_allclose(found, expected(unlinked_logits(variables), variables), rtol=1e-5, atol=1e-5)


def small(**fields):
  config = base_config('PN2-dd')
  config.update_from_flattened_dict(
    {'model.layers_per_block': 1, 'model.growth_rate': 2, 'model.image_side': 8, 'data.name': 'digits', **fields}
  )
  return config


def test_models_are_linked_only_if_asked():
  plain = config_lib.build_model(small(), 10)
  assert type(plain) is ParaNet
  assert config_lib.build_model(small(**{'model.boost': 0.5}), 10) == boosted(plain, 0.5)
  assert config_lib.build_model(small(**{'model.transfer': 7}), 10) == with_transfer(plain, 7)


@pytest.mark.parametrize(('field', 'value', 'trains'), [('boost', 0.5, 1), ('transfer', 7, 2)])
def test_gradient_equilibrium_counts_the_exits_that_train_a_parameter(field, value, trains):
  task = build_task(small(**{f'model.{field}': value}))
  users = _users(task, task.phases[0])
  assert users['exit_1']['classifier']['kernel'] == trains and users['exit_2']['classifier']['kernel'] == 1
  assert users['pipeline_1_stem']['kernel'] == 2


JOINT = 'model.boost adds up exits that all learn from labels from the start, found '


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      ('model.boost=0.5', 'model.transfer=7'),
      'model.boost and model.transfer exclude each other, found 0.5 and 7; set one of --config.model.boost and '
      '--config.model.transfer to 0',
    ),
    (
      ('model.boost=0.5', 'name=PN3-x3d'),
      f"{JOINT}PN3-x3d and train.regime 'joint'; set --config.name and --config.train.regime=joint, or "
      '--config.model.boost=0',
    ),
    (
      ('model.boost=0.5', 'train.regime=mixed'),
      f"{JOINT}PN3-ddd and train.regime 'mixed'; set --config.name and --config.train.regime=joint, or "
      '--config.model.boost=0',
    ),
    (
      ('model.boost=0.5', 'loss.distill=last'),
      f"{JOINT}loss.distill 'last' and loss.hard_label_weight 0; set --config.loss.hard_label_weight, such as 0.5, or "
      '--config.model.boost=0',
    ),
  ],
)
def test_refusals(fields, message):
  flags = (f'--config.{field}' for field in fields)
  assert refusal(f'--config={CONFIGS}/pn3_ddd.py', *flags, '--mode=describe') == message


def test_a_frozen_backbone_has_no_transfer():
  flags = '--config.train.regime=exits', '--config.model.transfer=7', '--config.init_from=run', '--mode=describe'
  assert refusal(f'--config={CONFIGS}/resnet_mc.py', *flags) == (
    "model.transfer is of networks that train as a whole, found train.regime 'exits'; set --config.model.transfer=0"
  )
