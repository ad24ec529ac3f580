"""A small network of each file of architectures, which together have every kind of block."""

from paranet_jax.models.adopted import (
  convnext,
  efficientnet,
  efficientnet_lite,
  mobilenet_v2,
  mobilenet_v3,
  resnet,
  vit,
  wide_resnet,
)
from paranet_jax.models.adopted.architecture import Architecture
from paranet_jax.models.adopted.registry import ARCHITECTURES

ONE_EACH = (1, 1, 1, 1)
SMALL = {
  'resnet': lambda classes: resnet.parts(resnet.BasicBlock, ONE_EACH, classes),
  'resnext': lambda classes: resnet.parts(resnet.Bottleneck, ONE_EACH, classes, groups=32, group_width=4),
  'mobilenet_v2': lambda classes: mobilenet_v2.parts(((1, 16, 1, 1), (6, 24, 2, 2)), classes),
  'mobilenet_v3': lambda classes: mobilenet_v3.parts(
    (
      mobilenet_v3.Row(3, 16, 16, True, False, 2),
      mobilenet_v3.Row(5, 72, 24, False, True, 2),
      mobilenet_v3.Row(5, 88, 24, True, True, 1),
    ),
    32,
    classes,
  ),
  'efficientnet': lambda classes: efficientnet.parts(((1, 3, 1, 16, 1), (6, 5, 2, 24, 2)), classes),
  'efficientnet_lite': lambda classes: efficientnet_lite.parts(
    ((1, 3, 1, 16, 1), (6, 5, 2, 24, 2)), classes, 'SAME', 1e-3
  ),
  'vit': lambda classes: vit.parts(2, 128, vit.TIMM, classes),
  'convnext': lambda classes: convnext.parts(((16, 1), (32, 2)), classes),
  'wide_resnet': lambda classes: wide_resnet.parts(1, 1, classes),
}
"""From the number of classes to its parts; tests/slow/adopted_fixtures.py builds the same in PyTorch."""


def register(monkeypatch, name):
  """Makes it the only architecture, during a test; returns it."""
  architecture = Architecture(f'small_{name}', SMALL[name], head='class_token' if name == 'vit' else 'linear')
  monkeypatch.setattr(ARCHITECTURES, 'known', {architecture.name: lambda _: architecture})
  return architecture
