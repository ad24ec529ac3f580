"""Tests of RANet against a plain network, stage by stage, and against costs summed from the authors' description."""

import functools
import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
import tiny
from reference import SHIPPED

from paranet_jax.costs import abstract_variables, exit_costs
from paranet_jax.models.ranet import Geometry, RANet, resize


def counts(scales, factors, layers, blocks=(2, 2), channels=16, growth=6, side=32, classes=100):
  """(multiply-adds, parameters, ReLUs and the like) after each exit, summed layer by layer.

  Args:
    factors: of growth and of bottlenecks, the same.
    layers: function from a block's number to its layers.
    blocks: of the first sub-network, and more in each other one.
  """
  macs = params = relus = 0
  rows, before, count = [], None, [0, *(blocks[0] + blocks[1] * index for index in range(len(scales)))]

  def conv(inputs, outputs, size, side):
    nonlocal macs, params, relus
    macs += inputs * outputs * size**2 * side**2
    params += inputs * outputs * size**2 + 2 * outputs
    relus += outputs * side**2

  def path(inputs, outputs, factor, side_read, side):
    width = min(inputs, factor * outputs)
    conv(inputs, width, 1, side_read)
    conv(width, outputs, 3, side)

  base, x = {}, (3, side)
  for index in reversed(range(len(scales))):
    last = index == len(scales) - 1
    x = (x[0], x[1] if last or scales[index] == scales[index + 1] else x[1] // 2)
    conv(x[0], channels * factors[index], 3, x[1])
    base[index] = x = (channels * factors[index], x[1])
  for index, scale in enumerate(scales):
    (width, side), g, all_blocks, mine = base[index], growth * factors[index], count[index + 1], []
    for number in range(1, all_blocks + 1):
      fusion = number <= count[index]
      seen = [(width, side)]
      for layer in range(layers(number)):
        halves = fusion and layer == layers(number) - 1 and number in count[1 + index - (scale - 1) : index + 1]
        smaller = side // 2 if halves else side
        own = g
        if fusion:
          own = g - g // 4
          path(before[number - 1][layer][0], g // 4, factors[index - 1], *2 * (before[number - 1][layer][1],))
        path(width, own, factors[index], side, smaller)
        width, side = width + g, smaller
        seen.append((width, side))
      if fusion:
        inputs, side_read = before[number - 1][layers(number)]
        conv(inputs, width // 4, 1, side_read)
        width += width // 4
      if number in [math.floor(part * all_blocks / scale) for part in range(1, scale)]:
        conv(width, width // 2, 1, side)
        width //= 2
      mine.append(seen)
      if not fusion:
        conv(width, 128, 3, 4)
        conv(128, 128, 3, 2)
        macs, params, relus = macs + 128 * classes, params + 129 * classes, relus + 4 * 128 + classes
        rows.append((macs, params, relus))
    before = mine
  return rows


ANYTIME = counts((1, 2, 3, 3), (4, 2, 1, 1), lambda number: 4)


def test_the_description_gives_the_published_costs():
  """In millions, from BoostNet's table, which also counts an operation per ReLU, pooled value and bias: 15.8 at exit 1,
  44.7 at exit 3 and 95.1 at exit 8, where this sum is 95.0."""
  found = [round((macs + relus) / 1e6, 1) for macs, _, relus in ANYTIME]
  assert (found[0], found[2]) == (15.8, 44.7) and found[7] == pytest.approx(95.1, abs=0.11)


def test_costs_match_the_description():
  """Of a small network; tests/slow/costs_test.py counts the authors' one, whose costs are those of ANYTIME."""
  fields = {'scales': (1, 2, 2), 'growth_factors': (2, 1, 1), 'bottleneck_factors': (2, 1, 1), 'initial_channels': 5}
  model = RANet(
    **fields, base_blocks=1, block_step=2, step_mode='lin_grow', step=1, growth_rate=4, num_classes=7, image_side=16
  )
  expected = counts((1, 2, 2), (2, 1, 1), lambda number: number, (1, 2), 5, 4, 16, 7)
  assert [(row['macs'], row['params']) for row in exit_costs(model, (16, 16, 3))] == [row[:2] for row in expected]
  assert [row[1::-1] for row in ANYTIME] == SHIPPED['ranet_anytime'][1]


def test_geometry_of_the_authors_network():
  """With four sub-networks of 2, 4, 6 and 8 blocks, exits end the first ones that fuse nothing."""
  geometry = Geometry(32, (1, 2, 3, 3), 2, 2)
  blocks = [(p, n) for p in range(1, 5) for n in range(1, geometry.blocks(p) + 1)]
  assert [geometry.exit_node(number) for number in range(1, 9)] == [
    *((1, 1), (1, 2), (2, 3), (2, 4), (3, 5), (3, 6), (4, 7), (4, 8)),
  ]
  assert [node for node in blocks if geometry.halves(node)] == [(2, 2), (3, 2), (3, 4), (4, 4), (4, 6)]
  assert [node for node in blocks if geometry.compresses(node)] == [(2, 2), (3, 2), (3, 4), (4, 2), (4, 5)]
  assert geometry.reads((3, 4)) == ((3, 3), (2, 4)) and geometry.reads((3, 5)) == ((3, 4),)
  assert geometry.reads((3, 1)) == ((0, 1), (2, 1)) and geometry.reads((0, 1)) == ((0, 0),)


def test_resizing_keeps_the_corners():
  """As torch.nn.functional.interpolate(mode='bilinear', align_corners=True)."""
  x = jnp.array([[0.0, 3.0], [6.0, 9.0]])[None, :, :, None]
  expected = [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9]]
  np.testing.assert_allclose(resize(x, 4)[0, :, :, 0], expected, atol=1e-6)
  np.testing.assert_allclose(resize(jnp.float32(expected)[None, :, :, None], 2), x, atol=1e-6)
  assert resize(x, 2) is x


# Three sub-networks of 1, 2 and 3 blocks with two layers; blocks (2, 1) and (3, 2) halve, (2, 1) and (3, 1) compress.
SMALL = RANet(
  *(tiny.NUM_CLASSES, (1, 2, 2), (2, 1, 1), (2, 1, 1), 1, 1, 'even', 2, 2, 4),
  image_side=8,
)


def test_a_transition_keeps_at_least_one_channel():
  """Of 2 base channels, 2 layers of 4, and a quarter of those 10 from the sub-network before."""
  shapes = abstract_variables(SMALL.clone(reduction=0.01), (8, 8, 3))['params']
  assert shapes['network_2_transition_1']['conv']['kernel'].shape == (1, 1, 12, 1)
  assert shapes['network_3_transition_1']['conv']['kernel'].shape == (1, 1, 12, 1)


def plain_network(variables, images):
  """Logits of SMALL in inference, in NumPy, block by block as the authors' code goes; it reads every parameter."""
  net, read = plain.Plain(variables, False), set()

  def conv(x, width, *path, stride=1):
    kernel = plain.at(net.params, path)['conv']['kernel']
    assert kernel.shape[-1] == width, path
    read.update({(*path, 'conv'), (*path, 'norm')})
    return net.norm_relu(net.conv(x, *path, 'conv', stride=stride), *path, 'norm')

  def path(x, width, factor, *place, stride=1):
    y = conv(x, min(x.shape[-1], factor * width), *place[:-1], f'{place[-1]}_bottleneck')
    return conv(y, width, *place, stride=stride)

  def sized(x, side):
    if x.shape[1] == side:
      return x
    places = np.linspace(0, x.shape[1] - 1, side)
    weights = np.array([[max(0, 1 - abs(place - other)) for other in range(x.shape[1])] for place in places])
    return np.einsum('ap,bq,npqc->nabc', weights, weights, x)

  base = {}
  for network, width, stride in ((3, 2, 1), (2, 2, 1), (1, 4, 2)):
    base[network] = images = conv(images, width, f'network_{network}_base', stride=stride)
  before, logits = [], []
  for network, growth in ((1, 8), (2, 4), (3, 4)):
    x, mine = base[network], []
    for number in range(1, network + 1):
      name, fusion, seen = f'network_{network}_block_{number}', number < network, [x]
      for layer in (1, 2):
        stride = 2 if layer == 2 and (network, number) in ((2, 1), (3, 2)) else 1
        factor = 2 if network == 1 else 1
        parts = [path(x, growth - growth // 4 * fusion, factor, name, f'layer_{layer}', stride=stride)]
        side = parts[0].shape[1]
        if fusion:
          low = path(before[number - 1][layer - 1], growth // 4, 2 if network == 2 else 1, name, f'layer_{layer}_fused')
          parts.insert(0, sized(low, side))
        x = np.concatenate([sized(x, side), *parts], -1)
        seen.append(x)
      if fusion:
        low = conv(before[number - 1][2], x.shape[-1] // 4, f'network_{network}_fusion_{number}')
        x = np.concatenate([x, sized(low, x.shape[1])], -1)
      if (network, number) in ((2, 1), (3, 1)):
        x = conv(x, x.shape[-1] // 2, f'network_{network}_transition_{number}')
      mine.append(seen)
    before = mine
    exit_name = f'exit_{network}'
    x = conv(conv(x, 128, exit_name, 'conv1', stride=2), 128, exit_name, 'conv2', stride=2)
    logits.append(net.pool_linear(x, exit_name, 'head', 'classifier'))
    read.add((exit_name, 'head', 'classifier'))
  assert read == {path[:-1] for path in flax.traverse_util.flatten_dict(variables['params'])}
  return logits


def test_logits_in_one_pass_and_stage_by_stage():
  variables = plain.variables_of(SMALL)
  images = np.random.default_rng(1).normal(size=(3, 8, 8, 3)).astype(np.float32)

  @jax.jit
  def all_ways(variables):
    ways = []
    for numbers in ((1, 2, 3), (1, 3), (2,)):
      carry, logits = {}, {}
      for number in numbers:
        logits[number], carry = SMALL.apply(variables, images, carry, number, method='stage')
      ways.append(logits)
    return SMALL.apply(variables, images), ways

  full, ways = all_ways(variables)
  expected = plain_network(variables, images)
  for way in (dict(enumerate(full, 1)), *ways):
    for number, logits in way.items():
      np.testing.assert_allclose(logits, expected[number - 1], rtol=1e-4, atol=1e-5)


def test_a_stage_carries_what_later_blocks_read():
  """After exit 1, its block and the base features of later sub-networks; after exit 2, no more of the first one."""
  images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  carry = {}
  for number, nodes in ((1, [(0, 0), (0, 1), (1, 1)]), (2, [(0, 0), (2, 1), (2, 2)]), (3, [])):
    stage = functools.partial(SMALL.apply, number=number, method='stage')
    _, carry = jax.eval_shape(stage, plain.variables_of(SMALL), images, carry)
    assert sorted(carry) == nodes


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'growth_factors': (4, 2, 1)}, r'must have one entry for each sub-network'),
    (
      {'scales': (1, 3, 3, 3)},
      r'scales must begin with 1 and rise by 0 or 1 from one to the next, found \(1, 3, 3, 3\)',
    ),
    ({'scales': (2, 2, 3, 3)}, r'scales must begin with 1'),
    ({'step_mode': 'odd'}, "step_mode 'odd' must be 'even' or 'lin_grow'"),
    ({'growth_rate': 3}, r'fusion 0.25 of growth_rate 3 times growth_factors \(4, 2, 1, 1\) must leave'),
    ({'image_side': 30}, 'image_side must be a multiple of 4, to be halved 2 times, found 30'),
  ],
)
def test_invalid_fields_are_refused(fields, message):
  with pytest.raises(ValueError, match=message) as error:
    RANet(**fields)
  assert len(str(error.value).splitlines()) == 1
