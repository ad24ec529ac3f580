"""Tests of the base classes: chains, the positions of their exits, and lazily computed graphs."""

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
import tiny

from paranet_jax.costs import exit_costs, multiply_adds
from paranet_jax.models.densenet import DenseNet
from paranet_jax.models.multi_exit import Chain, Graph, MultiExit, exit_positions, kept, needed
from paranet_jax.models.resnet import ResNet

SMALL = {'num_classes': tiny.NUM_CLASSES, 'image_side': tiny.SIDE}
CASES = {
  'densenet': DenseNet(depth=16, growth_rate=2, exits=(1,), **SMALL),
  'preactivation': ResNet(depth=8, block='preactivation', exits='stages', **SMALL),
}


IMAGE = np.zeros((1, tiny.SIDE, tiny.SIDE, 3), np.float32)


class OneExit(Chain):
  """It defines where its exit is, and nothing else."""

  exit_positions = (1,)


def noise(model, number=4):
  shape = (number, model.image_side, model.image_side, model.channels)
  return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('case', CASES)
def test_stages_match_the_full_pass_even_when_skipped(case):
  model = CASES[case]
  variables, images = plain.variables_of(model), noise(model)
  last = model.num_exits

  @jax.jit
  def all_ways(variables):
    ways = []
    for numbers in (range(1, last + 1), (2, last), (last,)):
      carry, logits = {}, {}
      for number in numbers:
        logits[number], carry = model.apply(variables, images, carry, number, method='stage')
        assert set(carry) == ({number} if number < last else set())
      ways.append(logits)
    return model.apply(variables, images), model.apply(variables, images, exits=(last, 2)), ways

  full, asked, ways = all_ways(variables)
  assert [number for number, logits in enumerate(asked, 1) if logits is not None] == [2, last]
  for way in (*ways, {2: asked[1], last: asked[last - 1]}):
    for number, logits in way.items():
      np.testing.assert_allclose(logits, full[number - 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  'lacks',
  [
    lambda: MultiExit().num_exits,
    lambda: MultiExit().apply({}, IMAGE, exits=(1,)),
    lambda: Chain().num_exits,
    lambda: OneExit().apply({}, IMAGE),
    lambda: OneExit().exit_logits(IMAGE, 1, train=False),
    lambda: Graph().apply({}, IMAGE, exits=(1,)),
    lambda: Graph().node_features((1, 1), IMAGE, {}, train=False),
    lambda: Graph().exit_logits(IMAGE, 1, train=False),
  ],
)
def test_what_a_network_must_define(lacks):
  with pytest.raises(NotImplementedError):
    lacks()


@pytest.mark.parametrize('case', CASES)
def test_nothing_is_computed_twice_or_unused(case):
  """An exit alone costs as much as the stages up to it, without the linear layers of earlier exits."""
  model = CASES[case]
  costs = exit_costs(model, (tiny.SIDE, tiny.SIDE, 3))
  classifiers = [channels * tiny.NUM_CLASSES for channels in features_of_the_exits(model)]
  for number, cost in enumerate(costs):
    assert cost['macs_alone'] == cost['macs'] - sum(classifiers[:number])
  assert all(cost['own_macs'] > classifier for cost, classifier in zip(costs, classifiers, strict=True))
  variables, images = plain.variables_of(model), noise(model, 1)
  assert multiply_adds(lambda: model.apply(variables, images, exits=()))[0] == 0
  assert multiply_adds(lambda: model.apply(variables, images))[0] == costs[-1]['macs']


def features_of_the_exits(model):
  """Channels at the exits of CASES, computed by hand."""
  if isinstance(model, ResNet):
    return [16, 32, 64]
  return [6, 6, 6, 8]  # 4 + 2; (4 + 2 * 2) / 2 + 2, twice; and 4 + 2 * 2 at the end.


@pytest.mark.parametrize(
  'exits, positions',
  [
    ('last', (12,)),
    ('blocks', (4, 8, 12)),
    ((), (12,)),
    ((4,), (4, 8, 12)),
    ((1, 3), (1, 3, 5, 7, 9, 11, 12)),
    ((2, 4), (2, 4, 6, 8, 10, 12)),
  ],
)
def test_exit_positions(exits, positions):
  assert exit_positions(exits, 'blocks', 3, 4) == positions


@pytest.mark.parametrize('exits', ['stages', (0,), (5,), (2, 1), (1, 1)])
def test_invalid_exits_are_refused(exits):
  with pytest.raises(ValueError) as error:
    exit_positions(exits, 'blocks', 3, 4)
  assert str(error.value) == f"exits must be 'last', 'blocks' or ascending numbers from 1 to 4, found {exits!r}"


@pytest.mark.parametrize('case', CASES)
def test_half_precision_keeps_float32_statistics_and_logits(case):
  model = CASES[case].clone(dtype=jnp.bfloat16)
  variables, images = plain.variables_of(model), noise(model)
  logits, updated = jax.eval_shape(lambda: model.apply(variables, images, train=True, mutable=['batch_stats']))
  assert {leaf.dtype for leaf in jax.tree.leaves((logits, updated))} == {jnp.dtype('float32')}
  _, carry = jax.eval_shape(lambda: model.apply(variables, images, {}, 1, method='stage'))
  assert {leaf.dtype for leaf in jax.tree.leaves(carry)} == {jnp.dtype('bfloat16')}


# 1 <- 2 <- 4 and 1 <- 3 <- 4 <- 5, and 6 alone.
READS = {(1,): [], (2,): [(1,)], (3,): [(1,)], (4,): [(2,), (3,)], (5,): [(4,)], (6,): []}


def nodes(*numbers):
  return [(number,) for number in numbers]


@pytest.mark.parametrize(
  'targets, given, expected',
  [
    ([], [], []),
    ([1], [], [1]),
    ([3], [], [1, 3]),
    ([5], [], [1, 2, 3, 4, 5]),
    ([5], [2], [1, 3, 4, 5]),
    ([5], [2, 3], [4, 5]),
    ([5], [1, 4], [5]),
    ([5], [5], []),
    ([6, 2], [], [1, 2, 6]),
  ],
)
def test_needed(targets, given, expected):
  assert needed(nodes(*targets), READS.get, nodes(*given)) == nodes(*expected)


@pytest.mark.parametrize(
  'targets, given, expected',
  [
    ([], [1, 2], []),
    ([5], [1, 2], [1, 2]),
    ([5], [1, 2, 3], [2, 3]),
    ([5], [1, 2, 3, 4], [4]),
    ([5], [1, 5, 6], [5]),
    ([2, 6], [1, 6], [1, 6]),
    ([6], [1, 2], []),
  ],
)
def test_kept(targets, given, expected):
  assert kept(nodes(*targets), READS.get, nodes(*given)) == nodes(*expected)
