"""PyTorch's CIFAR ResNets with parameter-free shortcuts (option A of He et al. 2016a) for the family `resnet`.

The names are those of akamaster/pytorch_resnet_cifar10 and its many descendants. Their shortcuts put half of the new
zero channels on each side (`shortcut_padding='both_sides'`). The running variance is taken as it is: PyTorch's
inference divides by the same number.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paranet_jax.host.errors import UserError
from paranet_jax.weights.pytorch_file import read_tensors
from paranet_jax.weights.state_dict import Entry, differences, not_finite, shown, to_variables, without_prefix

FIELDS = {'block': 'basic', 'shortcut_padding': 'both_sides'}
"""Fields of `model` that these networks have."""
DEPTHS = range(8, 111, 6)
"""Depths that are suggested; 20 to 110 are published."""

_NORM = {
  'weight': ('params', 'scale'),
  'bias': ('params', 'bias'),
  'running_mean': ('batch_stats', 'mean'),
  'running_var': ('batch_stats', 'var'),
}


def backbone_table(depth: int, channels: int = 3) -> list[Entry]:
  """The tensors before the classifier, for images of this many channels."""
  table = [Entry('conv1.weight', (16, channels, 3, 3), ('params', 'stem', 'conv', 'kernel'))]
  table += _norm('bn1', 16, 'stem', 'norm')
  inputs = 16
  for stage, width in enumerate((16, 32, 64), 1):
    for block in range((depth - 2) // 6):
      name, own = f'layer{stage}.{block}', f'stage_{stage}_block_{block + 1}'
      table.append(Entry(f'{name}.conv1.weight', (width, inputs, 3, 3), ('params', own, 'conv1', 'conv', 'kernel')))
      table += _norm(f'{name}.bn1', width, own, 'conv1', 'norm')
      table.append(Entry(f'{name}.conv2.weight', (width, width, 3, 3), ('params', own, 'conv2', 'kernel')))
      table += _norm(f'{name}.bn2', width, own, 'norm2')
      inputs = width
  return table


def whole_table(depth: int, channels: int, classes: int, exit_number: int) -> list[Entry]:
  """All tensors; the exit with this number is the classifier."""
  return backbone_table(depth, channels) + _classifier_table(classes, exit_number, 'linear')


def read_backbone(path: Path, depth: int, channels: int = 3) -> dict[str, Any]:
  """The variables outside the exits of a CIFAR ResNet of this depth.

  Raises:
    UserError: the file cannot be read, or holds another network.
  """
  return _checked(path, _without_classifier(_read(path)), depth, channels)


def read_cifar_resnet(path: Path, exit_number: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
  """A whole CIFAR ResNet: `ResNet(**fields)` with these variables computes PyTorch's logits at its last exit.

  The depth follows from the names. Images are NHWC, normalized as the network was trained.

  Args:
    exit_number: the last exit's.

  Returns:
    Fields and variables.

  Raises:
    UserError: the file cannot be read, or holds another network.
  """
  tensors = _read(path)
  backbone = _without_classifier(tensors)
  depth = _nearest_depth(backbone)
  stem = tensors.get('conv1.weight')
  channels = stem.shape[1] if stem is not None and stem.ndim == 4 else 3
  variables = _checked(path, backbone, depth, channels)
  layer = 'fc' if 'fc.weight' in tensors else 'linear'
  classifier = {name: tensor for name, tensor in tensors.items() if name.split('.')[0] in ('linear', 'fc')}
  bias = classifier.get(f'{layer}.bias')
  classes = bias.shape[0] if bias is not None and bias.ndim == 1 else 0
  table = _classifier_table(classes, exit_number, layer)
  _check(path, classifier, table, f'the classifier of ResNet-{depth}', '')
  variables['params'] |= to_variables(classifier, table)['params']
  return {**FIELDS, 'depth': depth, 'channels': channels, 'num_classes': classes}, variables


def _classifier_table(classes: int, exit_number: int, layer: str) -> list[Entry]:
  own = ('params', f'exit_{exit_number}', 'classifier')
  return [
    Entry(f'{layer}.weight', (classes, 64), (*own, 'kernel')),
    Entry(f'{layer}.bias', (classes,), (*own, 'bias')),
  ]


def _norm(name: str, width: int, *own: str) -> list[Entry]:
  return [Entry(f'{name}.{part}', (width,), (kind, *own, leaf)) for part, (kind, leaf) in _NORM.items()]


def _read(path: Path) -> dict[str, np.ndarray]:
  tensors = without_prefix(read_tensors(path))
  learned = [name for name in tensors if '.shortcut.' in name or '.downsample.' in name]
  if learned:
    raise UserError(
      f'expected a CIFAR ResNet whose shortcuts have no parameters (option A), and {path} has {len(learned)} of them '
      f'({shown(learned[0])}, ...); name weights of one without'
    )
  return tensors


def _without_classifier(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {name: tensor for name, tensor in tensors.items() if name.split('.')[0] not in ('linear', 'fc')}


def _checked(path: Path, tensors: Mapping[str, np.ndarray], depth: int, channels: int) -> dict[str, Any]:
  table = backbone_table(depth, channels)
  nearest = _nearest_depth(tensors)
  exact = not differences(tensors, backbone_table(nearest, channels))
  _check(path, tensors, table, f'ResNet-{depth}', f'{"it fits" if exact else "the nearest is"} depth {nearest}')
  return to_variables(tensors, table)


def _check(path: Path, tensors: Mapping[str, np.ndarray], table: list[Entry], what: str, hint: str) -> None:
  if found := differences(tensors, table):
    raise UserError(
      f'{path} does not fit {what}: tensors {"; ".join(found)}; '
      + (f'{hint}, set --config.model.depth or --config.init_from' if hint else 'name another file')
    )
  if names := not_finite(tensors, table):
    raise UserError(f'{path} has NaN or infinity in {len(names)} tensors ({names[0]}); name another file')


def _nearest_depth(tensors: Mapping[str, np.ndarray]) -> int:
  """The depth whose tensors differ least from these by name."""
  names = tensors.keys()
  return min(DEPTHS, key=lambda depth: len(names ^ {entry.name for entry in backbone_table(depth)}))
