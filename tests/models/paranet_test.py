"""Tests of ParaNet against a plain reference, stage by stage, and of where its gradients flow."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

from paranet_jax.costs import abstract_variables
from paranet_jax.losses import exit_losses, total_loss
from paranet_jax.models.paranet import default_blocks, default_halvings, full_cascade
from paranet_jax.targets import parse_name

CASES = {
  'PN3': tiny.network(3),
  'cut': tiny.network(2, cascade=False),
  'imagenet': tiny.network(1, stem='7x7', stem_norm=True, entry_pool='max3x3', halvings=(2,)),
  'pool_first': tiny.network(1, stem='7x7', entry_order='pool_first', channels=1, layers_per_block=3, growth_rate=3),
  'avg': tiny.network(2, entry_pool='avg', stem_norm=True, bn_size=3, growth_rate=1),
  'equal_lengths': tiny.network(2, blocks=(2, 2), halvings=(2, 1), entry_order='pool_first'),
  'partial_cascade': tiny.network(3, cascade=((3, 3),)),
  'growth_factors': tiny.network(2, growth_factors=(1, 2, 3), blocks=(2, 2), halvings=(2, 1), bn_size=1),
}


def expected(model, variables, images, train=False):
  """Logits and batch statistics of the reference, in float32."""
  blocks = model.blocks or default_blocks(model.num_pipelines)
  result = reference.paranet(
    variables,
    images,
    blocks=blocks,
    halvings=model.halvings or default_halvings(model.num_pipelines),
    cascade={True: full_cascade(blocks), False: ()}.get(model.cascade, model.cascade),
    pool={'max': np.max, 'avg': np.mean, 'max3x3': reference.overlapping_max}[model.entry_pool],
    stride={'3x3': 1, '7x7': 2}[model.stem],
    pool_first=model.entry_order == 'pool_first',
    train=train,
  )
  return jax.tree.map(np.float32, result)


def noise(model, number=16):
  shape = (number, model.image_side, model.image_side, model.channels)
  return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('case', CASES)
def test_logits_and_statistics_match_the_reference(case):
  model = CASES[case]
  variables, images = tiny.variables(model), noise(model)

  @jax.jit
  def both(variables):
    return model.apply(variables, images), model.apply(variables, images, train=True, mutable=['batch_stats'])

  logits, (train_logits, updated) = both(variables)
  chex.assert_trees_all_close(logits, expected(model, variables, images)[0], rtol=1e-4, atol=1e-4)
  of_training = expected(model, variables, images, train=True)
  chex.assert_trees_all_close((train_logits, updated['batch_stats']), of_training, rtol=1e-4, atol=1e-4)


@functools.cache
def stage(name, number):
  model = tiny.named(name)
  return jax.jit(lambda carry: model.apply(tiny.variables(model), noise(model), carry, number, method='stage'))


@pytest.mark.parametrize(
  'name, numbers, kept',
  [
    ('PN3-ddd', (1, 2, 3), [{(1, 1)}, {(2, 1), (2, 2)}, set()]),
    ('PN3-ddd', (1, 3), [{(1, 1)}, set()]),
    ('PN3-ddd', (2, 3), [{(2, 1), (2, 2)}, set()]),
    ('PN2cut-dd', (1, 2), [set(), set()]),
  ],
)
def test_stages_match_the_full_pass_and_carry_what_later_exits_need(name, numbers, kept):
  model = tiny.named(name)
  logits, _ = expected(model, tiny.variables(model), noise(model))
  carry = {}
  for number, blocks in zip(numbers, kept, strict=True):
    found, carry = stage(name, number)(carry)
    np.testing.assert_allclose(found, logits[number - 1], rtol=1e-4, atol=1e-4)
    assert set(carry) == blocks


def test_requested_exits_only():
  model = tiny.named('PN3-ddd')
  variables, images = tiny.variables(model), noise(model)
  asked = [(), (2,), (3, 1)]
  outcomes = jax.jit(lambda: [model.apply(variables, images, exits=exits) for exits in asked])()
  wanted = expected(model, variables, images)[0]
  for exits, logits in zip(asked, outcomes, strict=True):
    chex.assert_trees_all_close(
      logits, [own if number in exits else None for number, own in enumerate(wanted, 1)], rtol=1e-4, atol=1e-4
    )


def test_half_precision(standard_promotion):
  """Computes in bfloat16; parameters, statistics and logits stay float32."""
  model = tiny.network(2, dtype=jnp.bfloat16)
  variables, images = tiny.variables(model), noise(model)
  chex.assert_trees_all_equal_dtypes(variables, jax.tree.map(jnp.float32, variables))
  logits, updated = jax.jit(lambda: model.apply(variables, images, train=True, mutable=['batch_stats']))()
  chex.assert_tree_all_finite(logits)
  assert {leaf.dtype for leaf in jax.tree.leaves((logits, updated))} == {jnp.dtype('float32')}
  wanted = expected(model, variables, images, train=True)[0]
  chex.assert_trees_all_close(logits, wanted, atol=0.1 * np.abs(wanted).max())
  assert np.abs(np.subtract(logits, wanted)).max() > 1e-4
  _, carry = jax.eval_shape(lambda: model.apply(variables, images, {}, 1, method='stage'))
  assert carry[1, 1].values.dtype == jnp.bfloat16


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'stem': '7x7'}, 'image_side 8 cannot be halved 4 times, as pipeline 1 needs .4 at its entry, 0 between'),
    ({'blocks': (1, 2, 3), 'halvings': (1, 1, 1)}, 'joins different sides'),
    (
      {'growth_factors': (1, 2)},
      r'growth_factors \(1, 2\) must have one entry for each side of blocks, the largest first: \[4, 2, 1\]',
    ),
  ],
)
def test_invalid_shapes_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    abstract_variables(tiny.network(3, **fields), (tiny.SIDE, tiny.SIDE, 3))


def test_growth_factors_multiply_the_growth_rate_by_side():
  model = tiny.network(3, growth_rate=2, growth_factors=(1, 3, 5))
  growth = {node: model.growth(node) for node in ((1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3))}
  assert growth == {(1, 1): 10, (2, 1): 6, (2, 2): 10, (3, 1): 2, (3, 2): 6, (3, 3): 10}
  params = abstract_variables(model, (tiny.SIDE, tiny.SIDE, 3))['params']
  stems = [params[f'pipeline_{pipeline}_stem']['kernel'].shape[-1] for pipeline in (1, 2, 3)]
  assert stems == [20, 12, 4]


@functools.cache
def gradient_of(name):
  model = tiny.named(name)
  variables, images, labels = tiny.variables(model), noise(model), tiny.labels(16)
  targets = parse_name(name).targets

  def loss(params, exit_weights):
    variables_ = {'params': params, 'batch_stats': variables['batch_stats']}
    logits, _ = model.apply(variables_, images, train=True, mutable=['batch_stats'])
    return total_loss(exit_losses(logits, labels, targets), exit_weights)

  return jax.jit(functools.partial(jax.grad(loss), variables['params']))


def gradients(name, *exit_weights):
  """The training loss's gradient for each exit's head and for each pipeline, numbered from 1."""
  found = gradient_of(name)(jnp.float32(exit_weights))
  numbers = range(1, len(exit_weights) + 1)
  heads = {number: found[f'exit_{number}'] for number in numbers}
  backbones = {
    number: {module: tree for module, tree in found.items() if module.startswith(f'pipeline_{number}_')}
    for number in numbers
  }
  return heads, backbones


def is_zero(tree) -> bool:
  """Whether every leaf is exactly 0; leaves must agree."""
  zero = {bool(np.all(np.asarray(leaf) == 0)) for leaf in jax.tree.leaves(tree)}
  assert len(zero) == 1
  return zero.pop()


# In PN3-2d2, exits 1 and 3 learn from exit 2.
def test_no_gradient_passes_through_the_matched_logits():
  """The teacher learns as if no exit matched it."""
  heads, backbones = gradients('PN3-2d2', 1, 1, 0)
  heads_alone, backbones_alone = gradients('PN3-2d2', 0, 1, 0)
  chex.assert_trees_all_close((heads[2], backbones[2]), (heads_alone[2], backbones_alone[2]), rtol=1e-5, atol=1e-7)
  assert not is_zero((heads[1], backbones[1]))


def test_an_exit_trains_earlier_pipelines_through_the_cascade():
  heads, backbones = gradients('PN3-2d2', 0, 1, 0)
  assert is_zero((heads[1], heads[3], backbones[3]))
  assert not is_zero((heads[2], backbones[1], backbones[2]))


def test_a_student_may_reach_the_backbone_of_its_teacher_through_the_cascade():
  heads, backbones = gradients('PN3-2d2', 0, 0, 1)
  assert is_zero((heads[1], heads[2]))
  assert not is_zero((backbones[1], backbones[2], backbones[3], heads[3]))


@pytest.mark.parametrize('number', [1, 2])
def test_cut_pipelines_have_no_gradient_between_them(number):
  heads, backbones = gradients('PN2cut-dd', *(other == number for other in (1, 2)))
  for other in (1, 2):
    assert is_zero((heads[other], backbones[other])) is (other != number)
