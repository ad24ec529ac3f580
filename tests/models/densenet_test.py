"""Tests of DenseNet against the paper's counts and against a plain network in NumPy."""

import itertools

import numpy as np
import plain
import pytest
import tiny

from paranet_jax.costs import exit_costs, parameter_sizes
from paranet_jax.models.densenet import DenseNet

SMALL = {'num_classes': tiny.NUM_CLASSES, 'image_side': tiny.SIDE, 'growth_rate': 3}
CASES = {
  'BC with exits within the blocks': DenseNet(depth=16, bn_size=2, exits=(1,), **SMALL),
  'no bottleneck': DenseNet(depth=10, bn_size=None, stem_channels=6, compression=1.0, exits='blocks', **SMALL),
}


def reference(model):
  """DenseNet as in the paper. Exits within a block only change parameter names."""
  size = model.layers_per_block
  inner = {'last': (), 'blocks': (size,)}.get(model.exits, model.exits)
  cuts = sorted({0, *inner, size})

  def network(variables, images, train):
    net = plain.Plain(variables, train)
    x, logits = net.conv(images, 'stem'), []
    for block in (1, 2, 3):
      if block > 1:
        x = net.conv(net.norm_relu(x, f'transition_{block - 1}', 'norm'), f'transition_{block - 1}', 'conv')
        x = np.mean(x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1), axis=(2, 4))
      for first, last in itertools.pairwise(cuts):
        name = f'block_{block}' if last - first == size else f'block_{block}_layers_{first + 1}_to_{last}'
        for layer in range(1, last - first + 1):
          x = np.concatenate([x, dense_layer(net, x, name, layer)], axis=-1)
        if last in inner or (block, last) == (3, size):
          exit_ = f'exit_{len(logits) + 1}'
          logits.append(net.pool_linear(net.norm_relu(x, exit_, 'norm'), exit_, 'classifier'))
    return logits, net.statistics

  def dense_layer(net, x, name, layer):
    if model.bn_size is None:
      return net.conv(net.norm_relu(x, name, f'layer_{layer}_norm'), name, f'layer_{layer}_conv')
    layer = f'layer_{layer}'
    y = net.conv(net.norm_relu(x, name, layer, 'norm1'), name, layer, 'conv1')
    return net.conv(net.norm_relu(y, name, layer, 'norm2'), name, layer, 'conv2')

  return network


@pytest.mark.parametrize('case', CASES)
def test_logits_statistics_and_gradients_match_the_plain_network(case):
  plain.assert_alike(CASES[case], reference(CASES[case]))


def paper_counts(depth, growth, bottleneck, compression, classes, stem=None):
  """Parameters and multiply-adds from Table 1 of the paper, layer by layer, for 32 x 32 x 3 images."""
  layers = (depth - 4) // (6 if bottleneck else 3)
  channels = stem or (2 * growth if bottleneck else 16)
  side, params, macs = 32, 0, 0

  def convolution(size, inputs, outputs, side):
    nonlocal params, macs
    params += size * size * inputs * outputs
    macs += size * size * inputs * outputs * side * side

  convolution(3, 3, channels, side)
  for block in range(3):
    for _ in range(layers):
      params += 2 * channels
      if bottleneck:
        convolution(1, channels, 4 * growth, side)
        params += 2 * 4 * growth
        convolution(3, 4 * growth, growth, side)
      else:
        convolution(3, channels, growth, side)
      channels += growth
    if block < 2:
      params += 2 * channels
      side //= 2  # The paper pools after the convolution, with the same result for four times the work.
      convolution(1, channels, int(channels * compression), side)
      channels = int(channels * compression)
  params += 2 * channels + channels * classes + classes
  return params, macs + channels * classes


def test_densenet_bc_100_12_has_the_parameters_of_the_literature():
  assert sum(parameter_sizes(DenseNet(10), (32, 32, 3), 1).values()) == 769_162


@pytest.mark.parametrize(
  'depth, growth, bottleneck, compression, stem',
  [(22, 5, True, 0.7, None), (40, 12, True, 0.5, None), (19, 12, False, 1.0, None), (19, 12, False, 1.0, 24)],
)
def test_counts(depth, growth, bottleneck, compression, stem):
  bn_size = 4 if bottleneck else None
  fields = {'growth_rate': growth, 'compression': compression, 'bn_size': bn_size, 'stem_channels': stem}
  (cost,) = exit_costs(DenseNet(10, depth=depth, **fields), (32, 32, 3))
  assert (cost['params'], cost['macs']) == paper_counts(depth, growth, bottleneck, compression, 10, stem)


def test_a_transition_keeps_at_least_one_channel():
  """Of 4 channels of the stem and 2 of the first block, and of the one kept and 2 of the second."""
  sizes = parameter_sizes(DenseNet(10, depth=10, growth_rate=2, compression=0.1), (32, 32, 3), 1)
  assert [sizes[f'transition_{number}', 'conv', 'kernel'] for number in (1, 2)] == [6 * 1, 3 * 1]


# In millions, from Table 2 of the paper.
@pytest.mark.parametrize(
  'depth, growth, bottleneck, compression, published',
  [(40, 12, False, 1.0, 1.0), (100, 12, True, 0.5, 0.8), (250, 24, True, 0.5, 15.3), (190, 40, True, 0.5, 25.6)],
)
def test_paper_counts_match_the_published_numbers(depth, growth, bottleneck, compression, published):
  params, _ = paper_counts(depth, growth, bottleneck, compression, 10)
  assert params == pytest.approx(published * 1e6, rel=0.05)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'depth': 101}, 'depth must be 6 n + 4 for n layers a block, found 101'),
    ({'depth': 4}, 'depth must be 6 n + 4 for n layers a block, found 4'),
    ({'depth': 41, 'bn_size': None}, 'depth must be 3 n + 4 for n layers a block, found 41'),
    ({'compression': 0.0}, 'compression must be above 0 and at most 1, found 0.0'),
    ({'compression': 1.5}, 'compression must be above 0 and at most 1, found 1.5'),
    ({'image_side': 30}, 'image_side must be a multiple of 4, to be halved 2 times, found 30'),
    ({'exits': (17,)}, "exits must be 'last', 'blocks' or ascending numbers from 1 to 16, found (17,)"),
  ],
)
def test_invalid_shapes_are_refused(fields, message):
  with pytest.raises(ValueError) as error:
    DenseNet(**fields)
  assert str(error.value) == message
