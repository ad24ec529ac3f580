"""The cost of a path through the exits, against a table, the counts of `exit_costs`, and XLA's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from paranet_jax import costs as costs_lib
from paranet_jax.costs import abstract_variables, exit_costs
from paranet_jax.early.path_costs import PathCosts, Stages, mac_costs
from paranet_jax.models.layers.backend import plain_operations
from paranet_jax.models.paranet import ParaNet

IMAGE = (tiny.SIDE, tiny.SIDE, 3)
PATHS = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]


@functools.cache
def macs_of(name, exits=(1, 2, 3)):
  return mac_costs(tiny.named(name), IMAGE, exits)


def test_each_step_of_a_path_is_computed_once():
  asked = []

  def step_cost(before, index):
    asked.append((before, index))
    return 10 * index + len(before)

  costs = PathCosts(3, step_cost)
  for _ in range(2):
    np.testing.assert_array_equal(costs.cumulative((0, 2)), [0, 21])
    np.testing.assert_array_equal(costs.cumulative((0, 1, 2)), [0, 11, 33])
    np.testing.assert_array_equal(costs.alone(), [0, 10, 20])
  assert asked == [((), 0), ((0,), 2), ((0,), 1), ((0, 1), 2), ((), 1), ((), 2)]
  assert costs.cumulative((1,)).dtype == np.float64 and costs.cumulative(()).shape == (0,)


@pytest.mark.parametrize('name', ['PN3-ddd', 'PN3cut-ddd'])
def test_multiply_adds_of_the_full_path_and_alone_are_those_of_describe(name):
  listed, found = exit_costs(tiny.named(name), IMAGE), macs_of(name)
  assert found.cumulative((0, 1, 2)).tolist() == [cost['macs'] for cost in listed]
  assert found.alone().tolist() == [cost['macs_alone'] for cost in listed]


def test_skipping_a_stage_saves_what_no_later_stage_needs():
  cascade, cut = macs_of('PN3-ddd'), macs_of('PN3cut-ddd')
  # Without a cascade, pipelines 1 and 2 serve only their own exits.
  assert cut.cumulative((1, 2)).tolist() == np.cumsum(cut.alone()[1:]).tolist()
  # With one, only the head of exit 2 is saved: 4 channels a block's entry, 2 a layer, one layer a block.
  channels = {(1, 1): 4 + 2, (2, 1): 4 + 2}
  channels[2, 2] = channels[2, 1] + channels[1, 1] + 2
  head = channels[2, 2] * tiny.NUM_CLASSES
  assert cascade.cumulative((0, 1, 2))[-1] - cascade.cumulative((0, 2))[-1] == head


def test_paths_run_through_usable_exits_only():
  whole, usable = macs_of('PN3-ddd'), macs_of('PN3-ddd', (1, 3))
  assert usable.num_exits == 2
  assert usable.cumulative((0, 1)).tolist() == whole.cumulative((0, 2)).tolist()


def test_paths_with_the_same_carry_are_computed_once():
  model = tiny.named('PN3cut-ddd')
  stages = Stages(model, abstract_variables(model, IMAGE), (1, 2, 3), jax.ShapeDtypeStruct((1, *IMAGE), jnp.float32))
  asked = []
  costs = PathCosts(3, stages.by_carry(lambda index, carry: asked.append((index, carry)) or index + 1))
  assert [costs.cumulative(path).tolist() for path in PATHS] == [[1], [2], [3], [1, 3], [1, 4], [2, 5], [1, 3, 6]]
  assert asked == [(0, {}), (1, {}), (2, {})]


def test_a_stage_reads_the_features_of_the_path_before_it():
  class Model:
    def apply(self, variables, images, carry, number, method):
      return images, {**carry, f'after {number}': images}

  stages = Stages(Model(), {}, (1, 2, 3), jax.ShapeDtypeStruct((1, *IMAGE), jnp.float32))
  left = {path: sorted(stages.carry(path)) for path in [(), (1,), (0, 2), (0, 1, 2)]}
  assert left == {
    (): [],
    (1,): ['after 2'],
    (0, 2): ['after 1', 'after 3'],
    (0, 1, 2): ['after 1', 'after 2', 'after 3'],
  }


@pytest.mark.parametrize('cascade', [True, False])
def test_multiply_adds_agree_with_xla(cascade, monkeypatch):
  """XLA counts two operations a multiply-add, none on a convolution's padding, and here up to 5 % elementwise."""
  model = ParaNet(3, 10, 1, 24, image_side=16, cascade=cascade)
  in_full = costs_lib._equation_macs

  def inside_the_image(equation):
    if equation.primitive.name != 'conv_general_dilated' or not any(map(any, equation.params['padding'])):
      return in_full(equation)
    assert equation.params['padding'] == ((1, 1), (1, 1)) and equation.params['window_strides'] == (1, 1)
    sides = [equation.outvars[0].aval.shape[axis] for axis in equation.params['dimension_numbers'].out_spec[2:]]
    return in_full(equation) * np.prod([(3 * side - 2) / (3 * side) for side in sides])

  monkeypatch.setattr(costs_lib, '_equation_macs', inside_the_image)
  inside = mac_costs(model, (16, 16, 3), (1, 2, 3))
  variables = abstract_variables(model, (16, 16, 3))
  stages = Stages(model, variables, (1, 2, 3), jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32))
  for path in ((0,), (0, 1), (0, 2)):
    with plain_operations():  # The program that is counted.
      stage = jax.jit(stages.function(path[-1])).lower(variables, stages.images, stages.carry(path[:-1]))
    flops = stage.cost_analysis()['flops']
    counted = np.diff(inside.cumulative(path), prepend=0)[-1]
    assert 1 <= flops / (2 * counted) <= 1.05, (path, flops / (2 * counted))
