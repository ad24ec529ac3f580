"""Weights for adopted networks, drawn by NumPy from the tensors' names so that PyTorch can be given the same.

`MEMBERS` are the architectures, and a small network of each group, whose logits PyTorch computed (see
tests/slow/adopted_fixtures.py).
"""

import re
import zlib
from typing import NamedTuple

import numpy as np

KEPT = 50
"""Of 1,000 classes, the logits of every 50th are kept."""


PHOTOGRAPHS = ('chelsea.png', 'coffee.png', 'rocket.jpg', 'astronaut.png', 'motorcycle_left.png')
"""Files of scikit-image that a trained network names."""


class Member(NamedTuple):
  """A network.

  Attributes:
    side: of its images, in pixels.
    ends: what ends its residual branches: drawn small, so that features do not grow from block to block.
    gain: factor of kernels, so that features do not vanish behind activations and gates.
  """

  side: int
  ends: str = '$^'
  gain: float = 1.0


_BASIC, _BOTTLENECK, _VIT = Member(64, r'\d\.bn2\.weight'), Member(64, r'\.bn3\.weight'), Member(224)
_LITE, _V2 = Member(64, r'\.bn3\.weight', 1.25), Member(64, r'\.conv\.3\.weight', 1.25)
_V3, _B0 = Member(64, r'\.block\.[23]\.1\.weight', 1.4), Member(64, r'\.block\.3\.1\.weight', 1.4)
_CONVNEXT, _WIDE = Member(64), Member(32, r'\.conv2\.weight')
MEMBERS = {
  **{'resnet18': _BASIC, 'resnet34': _BASIC},
  **{'resnet50': _BOTTLENECK, 'resnet101': _BOTTLENECK, 'resnext50_32x4d': _BOTTLENECK},
  **{'tf_efficientnet_lite0': _LITE, 'efficientnet_lite0': _LITE, 'mobilenet_v2': _V2},
  **{'vit_small_patch16_224': _VIT, 'vit_base_patch16_224': _VIT, 'vit_b_16': _VIT, 'deit_tiny_patch16_224': _VIT},
  **{'efficientnet_b0': _B0, 'mobilenet_v3_large': _V3._replace(gain=1.2), 'mobilenet_v3_small': _V3},
  **{'convnext_tiny': _CONVNEXT, 'wide_resnet28_10': _WIDE},
}
"""Architectures by name."""
SMALL = {
  'resnet': _BASIC._replace(side=33),
  'resnext': _BOTTLENECK._replace(side=32),
  'mobilenet_v2': _V2._replace(side=32),
  'mobilenet_v3': _V3._replace(side=32),
  'efficientnet': _B0._replace(side=32),
  'efficientnet_lite': _LITE._replace(side=32),
  'vit': _VIT._replace(side=32),
  'convnext': _CONVNEXT._replace(side=32),
  'wide_resnet': _WIDE._replace(side=8),
}
"""A small network of each file, which together have every kind of block."""


def draw(shapes, member):
  """float32 arrays by name, from the shapes by name."""
  return {name: _draw(name, shape, member) for name, shape in shapes.items()}


def _draw(name, shape, member):
  random = np.random.default_rng(zlib.crc32(name.encode()))
  if len(shape) == 4:
    values = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:])) * member.gain
  elif len(shape) == 2:
    values = random.standard_normal(shape) / np.sqrt(shape[1])
  elif name.endswith(('weight', 'running_var')):
    values = random.uniform(0.6, 1.4, shape)
  elif name.endswith('layer_scale'):
    values = random.uniform(0.1, 0.5, shape)
  else:
    values = random.uniform(-0.3, 0.3, shape)
  return (values * (0.3 if re.search(member.ends, name) else 1)).astype(np.float32)


def images(side):
  """Two normalized images of some squares, NHWC."""
  random = np.random.default_rng(side)
  squares = random.standard_normal((2, 4, 4, 3)).repeat(-(-side // 4), 1).repeat(-(-side // 4), 2)[:, :side, :side]
  return (squares + random.standard_normal((2, side, side, 3)) / 4).astype(np.float32)
