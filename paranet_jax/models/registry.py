"""The network of a configuration: how each family reads its fields."""

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from paranet_jax.host.errors import UserError
from paranet_jax.models.densenet import DenseNet
from paranet_jax.models.fractalnet import FractalNet
from paranet_jax.models.msdnet import MSDNet
from paranet_jax.models.paranet import ParaNet
from paranet_jax.models.resnet import ResNet
from paranet_jax.targets import LABELS, Targets, parse_name

COMMON = ('family', 'num_classes', 'image_side', 'channels', 'dtype')
"""The fields of `model` that every family has."""


def build_model(config: ConfigDict, num_classes: int) -> Any:
  """The model of a configuration, with the multi-exit interface.

  Args:
    num_classes: of the data set; `model.num_classes` goes before it.

  Raises:
    UserError: a refused name, or shapes that do not fit.
  """
  fields = config.model
  build, mends = _BUILDERS[fields.family]
  common = {
    'num_classes': fields.num_classes or num_classes,
    'image_side': fields.image_side,
    'channels': fields.channels,
    'dtype': jnp.dtype(fields.dtype),
  }
  try:
    return build(config.name, {name: value for name, value in fields.items() if name not in COMMON}, common)
  except ValueError as error:
    raise UserError(f'{error}; set --config.model.{mends}') from error


def targets(config: ConfigDict) -> Targets:
  """What each exit learns from: what a ParaNet's name says, the labels in another family.

  Raises:
    UserError: a refused name, or shapes that do not fit.
  """
  if config.model.family == 'paranet':
    return parse_name(config.name).targets
  if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9._-]*', config.name):
    raise UserError(f'name must be letters, digits and, after the first, ._-, found {config.name!r}; set --config.name')
  return (LABELS,) * build_model(config, num_classes=2).num_exits


def _paranet(name: str, own: dict, common: dict) -> ParaNet:
  parsed = parse_name(name)
  cascade = parsed.cascade if own['cascade'] is None else _parse_cascade(own['cascade'])
  model = ParaNet(parsed.num_pipelines, **(own | {'cascade': cascade}), **common)
  geometry = model.geometry
  if len(geometry.blocks) != parsed.num_pipelines:
    raise UserError(
      f'model.blocks and model.halvings must have {parsed.num_pipelines} entries, one a pipeline of {name}, '
      f'found {geometry.blocks} and {geometry.halvings}; set --config.model.blocks and --config.model.halvings'
    )
  return model


def _densenet(_: str, own: dict, common: dict) -> DenseNet:
  bottleneck = own.pop('bottleneck')
  return DenseNet(
    **(own | {'exits': _parse_exits(own['exits']), 'bn_size': own['bn_size'] if bottleneck else None}), **common
  )


def _resnet(_: str, own: dict, common: dict) -> ResNet:
  return ResNet(**(own | {'exits': _parse_exits(own['exits'])}), **common)


def _msdnet(_: str, own: dict, common: dict) -> MSDNet:
  return MSDNet(**own, **common)


def _fractalnet(_: str, own: dict, common: dict) -> FractalNet:
  return FractalNet(dropout=own.pop('block_dropout'), **own, **common)


_BUILDERS: dict[str, tuple[Callable[[str, dict, dict], Any], str]] = {
  'paranet': (_paranet, 'image_side, .blocks, .halvings or .cascade'),
  'densenet': (_densenet, 'depth, .bottleneck, .exits or .image_side'),
  'resnet': (_resnet, 'depth, .block, .exits or .image_side'),
  'msdnet': (_msdnet, 'num_blocks, .growth_rate, .growth_factors, .bottleneck_factors or .image_side'),
  'fractalnet': (_fractalnet, 'widths, .columns, .block_dropout or .image_side'),
}


def _parse_cascade(text: str) -> tuple[tuple[int, int], ...]:
  edges = [tuple(map(int, edge.split('.'))) for edge in text.split(',') if edge]
  return tuple(sorted(edges))


def _parse_exits(text: str) -> str | tuple[int, ...]:
  return tuple(map(int, text.split(','))) if re.fullmatch(r'\d+(,\d+)*', text) else text
