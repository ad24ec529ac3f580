"""Tests of MSDNet against a plain network, stage by stage, and against costs derived from the paper."""

import functools
import itertools
import math

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
import tiny

from paranet_jax.costs import abstract_variables, multiply_adds
from paranet_jax.models.msdnet import MSDNet

CIFAR = (32, 32, 3)

# The layers of the authors' networks for CIFAR-100 after the one that makes the scales: the channels that each reads at
# scale 1 (2 and 4 times as many at scales 2 and 3), and its scales. `>` marks the end of a scale: the layer still reads
# it, and a transition then halves the channels of the others, rounding down.
ANYTIME_10 = """
  16 123, 22 123, 28 123, 34 123, 40 123, 46 123, 52 123, 58 123,
  64 >23, 35 23, 41 23, 47 23, 53 23, 59 23, 65 23, 71 23,
  77 >3, 41 3, 47 3, 53 3, 59 3, 65 3"""
BUDGETED = """
  16 123, 22 123, 28 123, 34 123, 40 123,
  46 >23, 26 23, 32 23, 38 23, 44 23,
  50 >3, 28 3, 34 3, 40 3, 46 3"""

NETWORKS = {
  'anytime_10': (MSDNet(num_blocks=10), ANYTIME_10, (4, 6, 8, 10, 12, 14, 16, 18, 20, 22)),
  'budgeted': (MSDNet(num_blocks=5, step_mode='lin_grow', step=1, base=1), BUDGETED, (1, 3, 6, 10, 15)),
}


class Count:
  """Multiply-adds, parameters and ReLU activations of convolutions with their normalization."""

  def __init__(self):
    self.macs = self.params = self.relus = 0

  def conv(self, size, channels, features, side):
    weights = size * size * channels * features
    self.macs += weights * side * side
    self.params += weights + 2 * features
    self.relus += features * side * side
    return self

  def path(self, channels, features, factor, side_read, side):
    """A 1x1 convolution to at most `factor` times the features, then a 3x3 one."""
    width = min(channels, factor * features)
    return self.conv(1, channels, width, side_read).conv(3, width, features, side)


def backbone(rows):
  """Count of each node (layer, scale)."""
  side = {1: 32, 2: 16, 3: 8}
  counts = {
    (0, 1): Count().conv(3, 3, 16, 32),
    (0, 2): Count().conv(3, 16, 32, 16),
    (0, 3): Count().conv(3, 32, 64, 8),
  }
  for layer, row in enumerate(rows.split(','), 1):
    channels, scales = int(row.split()[0]), row.split()[1]
    for scale in map(int, scales.strip('>')):
      factor, count = 2 ** (scale - 1), Count()
      if scales.startswith(str(scale)):
        count.path(factor * channels, factor * 6, factor, side[scale], side[scale])
      else:
        count.path(factor * channels, factor * 3, factor, side[scale], side[scale])
        count.path(factor // 2 * channels, factor * 3, factor // 2, side[scale - 1], side[scale])
      if scales.startswith('>'):
        count.conv(1, factor * (channels + 6), factor * ((channels + 6) // 2), side[scale])
      counts[layer, scale] = count
  return counts


def heads(rows, exits):
  """Count of each exit: its convolutions and its linear layer (128 x 100 and a bias)."""
  last = int(rows.split(',')[-1].split()[0]) + 6
  after = [int(row.split()[0]) for row in rows.split(',')][1:] + [last]
  for layer in exits:
    count = Count().conv(3, 4 * after[layer - 1], 128, 4).conv(3, 128, 128, 2)
    count.macs += 128 * 100
    count.params += 128 * 100 + 100
    yield count


def test_the_description_gives_the_published_costs():
  """In millions, from BoostNet's table: eager, also counting one operation per ReLU, pooled value and bias."""
  _, rows, exits = NETWORKS['anytime_10']
  of_heads = itertools.accumulate(head.macs + head.relus + 4 * 128 + 100 for head in heads(rows, exits))
  of_backbones = [
    sum(count.macs + count.relus for node, count in backbone(rows).items() if node[0] <= last) for last in exits
  ]
  found = [round((head + of_backbone) / 1e6, 1) for head, of_backbone in zip(of_heads, of_backbones, strict=True)]
  assert {number: found[number - 1] for number in (1, 3, 5, 10)} == {1: 15.1, 3: 37.8, 5: 62.2, 10: 121.7}


def lazily_needed(rows, layer):
  """Nodes that an exit after a layer needs: its coarsest scale, the two coarsest of the layer before, and so on."""
  return {node for node in backbone(rows) if node[0] == 0 or node[1] >= 3 - (layer - node[0]) and node[0] <= layer}


# The other one is counted in tests/slow/costs_test.py.
@pytest.mark.parametrize('name', ['budgeted'])
def test_costs_match_the_description(name):
  model, rows, exits = NETWORKS[name]
  counts, of_heads = backbone(rows), list(heads(rows, exits))
  variables = abstract_variables(model, CIFAR)
  sizes = [leaf.size for leaf in jax.tree.leaves(variables['params'])]
  assert sum(sizes) == sum(count.params for count in [*counts.values(), *of_heads])

  image, carry, done = jax.ShapeDtypeStruct((1, *CIFAR), jnp.float32), {}, set()
  for number, (layer, head) in enumerate(zip(exits, of_heads, strict=True), 1):
    stage = functools.partial(model.apply, number=number, method='stage')
    macs, (_, carry) = multiply_adds(stage, variables, image, carry)
    new = lazily_needed(rows, layer) - done
    done |= new
    assert macs == head.macs + sum(counts[node].macs for node in new), number
  assert done == set(counts)


def test_requested_exits_compute_only_what_they_need():
  model, rows, layers = NETWORKS['budgeted']
  counts, of_heads, exits = backbone(rows), list(heads(rows, layers)), (4, 1)
  image = jax.ShapeDtypeStruct((1, *CIFAR), jnp.float32)
  variables = abstract_variables(model, CIFAR)
  macs, logits = multiply_adds(lambda variables, image: model.apply(variables, image, exits=exits), variables, image)
  needed = set().union(*(lazily_needed(rows, layers[number - 1]) for number in exits))
  expected = sum(counts[node].macs for node in needed) + sum(of_heads[number - 1].macs for number in exits)
  assert macs == expected
  assert [number for number, found in enumerate(logits, 1) if found is not None] == sorted(exits)


network = functools.partial(
  MSDNet, num_classes=tiny.NUM_CLASSES, initial_channels=3, growth_rate=2, image_side=tiny.SIDE
)
# Layers 1 to 6, exits after 1, 3 and 6; scale 1 ends at layer 3 and scale 2 at layer 5.
THREE_SCALES = network(num_blocks=3, step_mode='lin_grow', step=1, base=1)
# Layers 1 and 2, an exit after each; scale 1 ends at layer 2.
TWO_SCALES = network(num_blocks=2, step=1, base=1, growth_factors=(1, 2), bottleneck_factors=(1, 2))


def test_a_transition_keeps_at_least_one_channel_for_each_unit_of_its_growth_factor():
  """At scale 2, of factor 2, layer 2 leaves 2 (3 + 2 + 2) channels."""
  shapes = abstract_variables(TWO_SCALES.clone(reduction=0.1), (tiny.SIDE, tiny.SIDE, 3))
  assert shapes['params']['transition_2_scale_2']['conv']['kernel'].shape == (1, 1, 14, 2)


def plain_network(layers, exits):
  """All scales of each layer in turn, in NumPy, as a function (variables, images, train) -> (logits, statistics).

  It reads every parameter, and the shape of each kernel is the expected one.

  Args:
    layers: for each, its scales and the channels (times the scale's factor) that a transition after it keeps, or 0.
    exits: the layers that an exit follows.
  """

  def network(variables, images, train):
    net, read = plain.Plain(variables, train), set()

    def conv(x, features, size, name, place, stride=1):
      read.update({(name, place, 'conv'), (name, place, 'norm')} if place else {(name, 'conv'), (name, 'norm')})
      path = (name, place) if place else (name,)
      assert plain.at(net.params, path)['conv']['kernel'].shape == (size, size, x.shape[-1], features), path
      return net.norm_relu(net.conv(x, *path, 'conv', stride=stride), *path, 'norm')

    def layer(same, finer, scale, name):
      factor = 2 ** (scale - 1)
      features = factor if finer is not None else 2 * factor
      y = conv(same, min(same.shape[-1], factor * features), 1, name, 'same_bottleneck')
      parts = [same, conv(y, features, 3, name, 'same')]
      if finer is not None:
        z = conv(finer, min(finer.shape[-1], factor // 2 * features), 1, name, 'down_bottleneck')
        parts.insert(1, conv(z, features, 3, name, 'down', stride=2))
      return np.concatenate(parts, -1)

    x, scales, logits = images, {}, []
    for scale in layers[0][0]:
      x = scales[scale] = conv(x, 3 * 2 ** (scale - 1), 3, f'layer_0_scale_{scale}', '', min(scale, 2))
    for number, (kept, transition) in enumerate(layers, 1):
      before, scales = scales, {}
      for scale in kept:
        x = layer(before[scale], before.get(scale - 1), scale, f'layer_{number}_scale_{scale}')
        if transition:
          x = conv(x, transition * 2 ** (scale - 1), 1, f'transition_{number}_scale_{scale}', '')
        scales[scale] = x
      if number in exits:
        name = f'exit_{len(logits) + 1}'
        x = conv(conv(x, 128, 3, name, 'conv1', stride=2), 128, 3, name, 'conv2', stride=2)
        logits.append(net.pool_linear(x, name, 'head', 'classifier'))
        read.add((name, 'head', 'classifier'))
    assert read == {path[:-1] for path in flax.traverse_util.flatten_dict(variables['params'])}
    return logits, net.statistics

  return network


# A transition keeps 4 of 3 + 3 x 2 = 9 channels, 4 of 4 + 2 x 2 = 8, and 3 of 3 + 2 x 2 = 7.
PLAIN_THREE = plain_network([((1, 2, 3), 0), ((1, 2, 3), 0), ((2, 3), 4), ((2, 3), 0), ((3,), 4), ((3,), 0)], (1, 3, 6))
PLAIN_TWO = plain_network([((1, 2), 0), ((2,), 3)], (1, 2))


def noise(number=16):
  return np.random.default_rng(1).normal(size=(number, tiny.SIDE, tiny.SIDE, 3)).astype(np.float32)


@functools.cache
def random_variables(model):
  """`tiny.variables` with kernels that preserve the scale of the features."""

  def scale(path, leaf):
    return np.float32(leaf / math.sqrt(leaf[..., 0].size)) if path[-1].key == 'kernel' else leaf

  return jax.tree_util.tree_map_with_path(scale, tiny.variables(model))


@functools.cache
def plain_logits():
  return plain.single(PLAIN_THREE(random_variables(THREE_SCALES), noise(), False)[0])


def test_logits_and_parameters_match_the_plain_network():
  logits = jax.jit(lambda variables: THREE_SCALES.apply(variables, noise()))(random_variables(THREE_SCALES))
  chex.assert_trees_all_close(logits, plain_logits(), rtol=1e-5, atol=1e-5)


def test_training_on_two_devices_matches_the_plain_network():
  """Two halves of a batch on an axis give the logits, statistics and gradient of the plain network on the whole."""
  weights = np.random.default_rng(2).normal(size=(16, 2, tiny.NUM_CLASSES)).astype(np.float32)
  variables = random_variables(TWO_SCALES)

  def gradient(params, images, weights):
    def loss(params):
      model = TWO_SCALES.clone(axis_name='batch')
      logits, updated = model.apply(variables | {'params': params}, images, train=True, mutable=['batch_stats'])
      logits = jnp.stack(logits, 1)
      return (logits * weights).mean(), (logits, updated['batch_stats'])

    return jax.grad(loss, has_aux=True)(params)

  def wanted(params):
    logits, statistics = PLAIN_TWO(variables | {'params': params}, noise(), True)
    return np.stack(logits, 1), statistics

  ours = jax.jit(jax.vmap(functools.partial(gradient, variables['params']), axis_name='batch'))
  gradients, (logits, updated) = ours(*(leaf.reshape(2, 8, *leaf.shape[1:]) for leaf in (noise(), weights)))
  expected, statistics = plain.single(wanted(variables['params']))
  mean = jax.tree.map(lambda leaf: np.mean(leaf, 0), gradients)
  plain.assert_gradient(mean, lambda params: (wanted(params)[0] * weights).mean(), variables['params'])
  for half in (0, 1):
    found = logits.reshape(expected.shape), jax.tree.map(lambda leaf, half=half: leaf[half], updated)
    chex.assert_trees_all_close(found, (expected, statistics), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  'numbers, kept',
  [
    ((1, 2, 3), [[(0, 1), (0, 2), (1, 3)], [(1, 1), (2, 2), (3, 3)], []]),
    ((1, 3), [[(0, 1), (0, 2), (1, 3)], []]),
  ],
)
def test_stages_match_the_full_pass_and_carry_a_diagonal(numbers, kept):
  carry = {}
  for number, nodes in zip(numbers, kept, strict=True):
    found, carry = jitted_stage(number)(random_variables(THREE_SCALES), carry)
    np.testing.assert_allclose(found, plain_logits()[number - 1], rtol=1e-5, atol=1e-5)
    assert sorted(carry) == nodes


@functools.cache
def jitted_stage(number):
  return jax.jit(lambda variables, carry: THREE_SCALES.apply(variables, noise(), carry, number, method='stage'))


def test_half_precision():
  model = THREE_SCALES.clone(dtype=jnp.bfloat16)
  logits, carry = jax.eval_shape(lambda: model.apply(random_variables(THREE_SCALES), noise(), {}, 1, method='stage'))
  assert logits.dtype == jnp.float32
  assert {leaf.dtype for leaf in carry.values()} == {jnp.dtype('bfloat16')}


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'bottleneck_factors': (1, 2)}, r'growth_factors \(1, 2, 4\) and bottleneck_factors \(1, 2\) must have one entry'),
    ({'growth_rate': 3, 'growth_factors': (1, 1, 4)}, r'growth_rate 3 times growth_factors \(1, 1, 4\) must be even'),
    ({'reduction': 0.0}, 'reduction 0.0 must be above 0 and at most 1'),
    ({'step_mode': 'odd'}, "step_mode 'odd' must be 'even' or 'lin_grow'"),
    ({'image_side': 30}, 'image_side must be a multiple of 4, to be halved 2 times, found 30'),
    ({'num_blocks': 0}, r'found blocks of \(\)'),
    ({'step': 0}, r'found blocks of \(4, 0, 0, 0, 0, 0, 0\)'),
  ],
)
def test_invalid_fields_are_refused(fields, message):
  with pytest.raises(ValueError, match=message) as error:
    MSDNet(**fields)
  assert len(str(error.value).splitlines()) == 1
