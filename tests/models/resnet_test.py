"""Tests of ResNet against the papers' counts and against a plain network in NumPy."""

import numpy as np
import plain
import pytest
import tiny

from paranet_jax.costs import exit_costs, parameter_sizes
from paranet_jax.models.resnet import BasicBlock, ResNet

SMALL = {'num_classes': tiny.NUM_CLASSES, 'image_side': tiny.SIDE}
CASES = {
  'basic': ResNet(depth=14, exits=(1,), shortcut_padding='both_sides', **SMALL),
  'preactivation': ResNet(depth=14, block='preactivation', exits='stages', **SMALL),
  'bottleneck': ResNet(depth=20, block='bottleneck', **SMALL),
}


def option_a(x, stride, channels, padding='behind'):
  """Every `stride`-th pixel, with zeros for the new channels, pixel by pixel."""
  batch, side, _, old = x.shape
  rows = [[x[:, row, column] for column in range(0, side, stride)] for row in range(0, side, stride)]
  zeros = np.zeros((batch, (channels - old) // (2 if padding == 'both_sides' else 1)))
  before = [zeros] if padding == 'both_sides' else []
  return np.stack([np.stack([np.hstack([*before, pixel, zeros]) for pixel in row], 1) for row in rows], 1)


def basic(net, x, name, width, stride, first):
  y = net.norm_relu(net.conv(x, name, 'conv1', 'conv', stride=stride), name, 'conv1', 'norm')
  y = net.norm(net.conv(y, name, 'conv2'), name, 'norm2')
  return plain.relu(y + (option_a(x, stride, width, 'both_sides') if first else x))


def preactivation(net, x, name, width, stride, first):
  a = net.norm_relu(x, name, 'norm1')
  y = net.norm_relu(net.conv(a, name, 'conv1', stride=stride), name, 'norm2')
  return net.conv(y, name, 'conv2') + (option_a(a, stride, width) if first else x)


def bottleneck(net, x, name, width, stride, first):
  a = net.norm_relu(x, name, 'norm1')
  y = net.norm_relu(net.conv(a, name, 'conv1', stride=stride), name, 'norm2')
  y = net.norm_relu(net.conv(y, name, 'conv2'), name, 'norm3')
  return net.conv(y, name, 'conv3') + (net.conv(a, name, 'shortcut', stride=stride) if first else x)


def reference(model):
  """ResNet as in the papers, with exits after the blocks `inner` of every stage and at the end."""
  size = model.blocks_per_stage
  inner = {'last': (), 'stages': (size,)}.get(model.exits, model.exits)
  block = {'basic': basic, 'preactivation': preactivation, 'bottleneck': bottleneck}[model.block]

  def network(variables, images, train):
    net = plain.Plain(variables, train)
    if model.block == 'basic':
      x = net.norm_relu(net.conv(images, 'stem', 'conv'), 'stem', 'norm')
    else:
      x = net.conv(images, 'stem')
    logits = []
    for stage, width in enumerate((16, 32, 64), 1):
      for place in range(1, size + 1):
        stride = 2 if place == 1 and stage > 1 else 1
        x = block(net, x, f'stage_{stage}_block_{place}', width, stride, place == 1)
        if place in inner or (stage, place) == (3, size):
          name = f'exit_{len(logits) + 1}'
          read = x if model.block == 'basic' else net.norm_relu(x, name, 'norm')
          logits.append(net.pool_linear(read, name, 'classifier'))
    return logits, net.statistics

  return network


@pytest.mark.parametrize('case', CASES)
def test_logits_statistics_and_gradients_match_the_plain_network(case):
  plain.assert_alike(CASES[case], reference(CASES[case]))


# Two channels become six; each list is a pixel of a 4 x 4 image that a stride of 2 keeps, row by row.
@pytest.mark.parametrize(
  'padding, expected',
  [
    ('behind', [[0, 1, 0, 0, 0, 0], [4, 5, 0, 0, 0, 0], [16, 17, 0, 0, 0, 0], [20, 21, 0, 0, 0, 0]]),
    ('both_sides', [[0, 0, 0, 1, 0, 0], [0, 0, 4, 5, 0, 0], [0, 0, 16, 17, 0, 0], [0, 0, 20, 21, 0, 0]]),
  ],
)
def test_a_shortcut_without_parameters(padding, expected):
  images = np.arange(32).reshape(1, 4, 4, 2)
  shortcut = BasicBlock(6, stride=2, first=True, shortcut_padding=padding).subsample(images)
  np.testing.assert_array_equal(shortcut.reshape(4, 6), expected)


def test_resnet_110_has_the_parameters_of_the_paper():
  """1.7 M in Table 6 of He et al. (2016a), summed by hand for 10 classes."""
  stem = 3 * 3 * 3 * 16
  stage_1 = 36 * 9 * 16 * 16
  stage_2 = 9 * 16 * 32 + 35 * 9 * 32 * 32
  stage_3 = 9 * 32 * 64 + 35 * 9 * 64 * 64
  norms = 2 * (37 * 16 + 36 * 32 + 36 * 64)
  total = stem + stage_1 + stage_2 + stage_3 + norms + 10 * 64 + 10
  assert sum(parameter_sizes(ResNet(10), (32, 32, 3), 1).values()) == total == 1_727_962


def paper_counts(depth, block, classes):
  """Parameters and multiply-adds, layer by layer, for 32 x 32 x 3 images."""
  params, macs = 0, 0

  def convolution(size, inputs, outputs, side):
    nonlocal params, macs
    params += size * size * inputs * outputs
    macs += size * size * inputs * outputs * side * side

  def norm(channels):
    nonlocal params
    params += 2 * channels

  convolution(3, 3, 16, 32)
  channels = 16
  if block == 'basic':
    norm(16)
  for width, side in ((16, 32), (32, 16), (64, 8)):
    for place in range((depth - 2) // (9 if block == 'bottleneck' else 6)):
      if block == 'bottleneck':
        norm(channels)
        convolution(1, channels, width, side)
        norm(width)
        convolution(3, width, width, side)
        norm(width)
        convolution(1, width, 4 * width, side)
        if place == 0:
          convolution(1, channels, 4 * width, side)
        channels = 4 * width
      else:
        convolution(3, channels, width, side)
        convolution(3, width, width, side)
        norm(channels if block == 'preactivation' else width)
        norm(width)
        channels = width
  if block != 'basic':
    norm(channels)
  params += channels * classes + classes
  return params, macs + channels * classes


@pytest.mark.parametrize('depth, block', [(20, 'basic'), (14, 'preactivation'), (20, 'bottleneck')])
def test_counts(depth, block):
  (cost,) = exit_costs(ResNet(10, depth=depth, block=block), (32, 32, 3))
  assert (cost['params'], cost['macs']) == paper_counts(depth, block, 10)


# In millions: Table 6 of He et al. (2016a); for pre-activation, Table 5 of Zagoruyko and Komodakis (2016).
@pytest.mark.parametrize(
  'depth, block, published',
  [
    (20, 'basic', 0.27),
    (56, 'basic', 0.85),
    (1202, 'basic', 19.4),
    (110, 'preactivation', 1.7),
    (164, 'bottleneck', 1.7),
    (1001, 'bottleneck', 10.2),
  ],
)
def test_paper_counts_match_the_published_numbers(depth, block, published):
  assert paper_counts(depth, block, 10)[0] == pytest.approx(published * 1e6, rel=0.02)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'depth': 111}, 'depth must be 6 n + 2 for n basic blocks a stage, found 111'),
    ({'depth': 2}, 'depth must be 6 n + 2 for n basic blocks a stage, found 2'),
    ({'depth': 111, 'block': 'bottleneck'}, 'depth must be 9 n + 2 for n bottleneck blocks a stage, found 111'),
    ({'block': 'wide'}, "block must be one of basic, preactivation, bottleneck, found 'wide'"),
    ({'shortcut_padding': 'left'}, "shortcut_padding must be one of behind, both_sides, found 'left'"),
    (
      {'depth': 11, 'block': 'bottleneck', 'shortcut_padding': 'both_sides'},
      "shortcut_padding must be 'behind' for bottleneck blocks, whose shortcuts are projections, found 'both_sides'",
    ),
    ({'image_side': 0}, 'image_side must be a multiple of 4, to be halved 2 times, found 0'),
    ({'exits': 'blocks'}, "exits must be 'last', 'stages' or ascending numbers from 1 to 18, found 'blocks'"),
  ],
)
def test_invalid_shapes_are_refused(fields, message):
  with pytest.raises(ValueError) as error:
    ResNet(**fields)
  assert str(error.value) == message
