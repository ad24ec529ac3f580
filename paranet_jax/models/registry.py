"""The registry of network families: the `model` fields of each, their checks, and how to build a network from them.

To add a family, add a file to this folder with the network and its `from_fields`, an entry to `_BUILT_IN` and a file
to `configs/`. A family outside this package needs no change here: see `register_family`.

Every configuration imports this module, so it imports neither jax nor networks: `build` names a function.
"""

import dataclasses
import pkgutil
import re
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from paranet_jax.host.errors import UserError
from paranet_jax.host.fields import FRACTION, RATE, SHARE, Field, Fields, Rule, at_least, derived, one_of, tuple_of
from paranet_jax.host.plugins import Registry
from paranet_jax.targets import LABELS, Targets, parse_name

BFLOAT16, INSISTED = 'bfloat16', 'bfloat16!'
"""Values of `model.dtype`: bfloat16 if it is fast, and bfloat16."""


@dataclasses.dataclass(frozen=True)
class Family:
  """What configurations and commands need to know about a family of networks.

  Attributes:
    name: value of `model.family`.
    example: an example configuration, as `--config` takes it.
    build: function from the run's name and the model fields to a model with the multi-exit interface (see
      `multi_exit.py`), or 'module:function', imported when a network is built. It raises ValueError with one line if
      the fields do not fit together.
    fields: the fields of `model` in addition to COMMON.
    fix: the fields that an error of `build` asks the user to set, such as 'depth, .exits or .image_side'.
    targets: function from the run's name to what each exit learns from; None: every exit learns from the labels.
    least: function from the model fields to lower bounds of the number of parameters, and of the values that a training
      step keeps for an image: a run that cannot fit is refused before anything is traced. None: nothing is known.
  """

  name: str
  example: str
  build: str | Callable[[str, dict[str, Any]], Any]
  fields: Fields
  fix: str = 'image_side'
  targets: Callable[[str], Targets] | None = None
  least: Callable[[dict[str, Any]], tuple[float, float]] | None = None

  def __post_init__(self):
    if self.fields.keys() & COMMON.keys():
      raise ValueError(f'family {self.name!r} has fields that every family has: {", ".join(COMMON)}')


COMMON: Fields = {
  'family': Field(''),  # A registered family. It determines the other fields of `model`, so it cannot be changed later.
  'num_classes': derived(int, at_least(2, 10**6)),  # Width of an exit; None: the data set's number of classes.
  'image_side': Field(32, at_least(1, 10_000)),  # Pixels; images of another size are resized.
  'channels': Field(3, one_of(1, 3)),  # 3 (RGB) or 1 (gray).
  # In which the network computes; parameters and statistics stay float32. 'float32'; 'bfloat16', unless a CPU is slower
  # in it, as measured when a run starts; or 'bfloat16!', whatever its speed.
  'dtype': Field('float32', one_of('float32', BFLOAT16, INSISTED)),
  # BoostNet: an exit adds this share of the logits of the exit before it to its own, such as 0.5; 0: its own alone.
  'boost': Field(0.0, at_least(0)),
  # IMTA's transfer: features through which an exit reads the logits of the exit before it, such as 128; 0: none.
  'transfer': Field(0, at_least(0, 100_000)),
}
"""The fields of `model` in every family."""

_PARANET: Fields = {
  'layers_per_block': Field(16, at_least(1, 1000)),  # n, dense layers in every block: 16 is L = 100.
  'growth_rate': Field(12, at_least(1, 10_000)),  # k, channels that a dense layer adds.
  # One for each side of blocks, the largest first, such as "(1,2,4)": multiply growth_rate there; (): 1 each.
  'growth_factors': Field((), tuple_of(int, 1, 1000)),
  'bn_size': Field(4, at_least(1, 1000)),  # Bottleneck width, in multiples of growth_rate.
  'blocks': derived(tuple, tuple_of(int, 1, 1000)),  # Dense blocks of each pipeline; None: pipeline p has p.
  'halvings': derived(tuple, tuple_of(int, 0, 30)),  # 2x2 poolings at the entry of each pipeline; None: P + 1 - p.
  # Receiving blocks 'pipeline.block', separated by commas ('2.2,3.3'); None: all of them, or none if the name says cut.
  'cascade': derived(
    str,
    Rule(
      lambda value: re.fullmatch(r'(\d\.\d+(,\d\.\d+)*)?', value) is not None,
      "receiving blocks 'pipeline.block' separated by commas, such as 2.2,3.3",
    ),
  ),
  'stem_norm': Field(False),  # Batch normalization and ReLU after the stem's convolution.
  # Convolution of the image: '3x3', or '7x7', which halves it once more by its stride.
  'stem': Field('3x3', one_of('3x3', '7x7')),
  # 'max' or 'avg' (2x2) or 'max3x3' (overlapping): how a pipeline's entry halves.
  'entry_pool': Field('max', one_of('max', 'avg', 'max3x3')),
  # 'stem_first' or 'pool_first': convolve the image before or after halving it.
  'entry_order': Field('stem_first', one_of('stem_first', 'pool_first')),
  'dropout': Field(0.0, RATE),  # Rate after each convolution except a stem's, 0 to less than 1.
  # Dense layers compiled as one loop in training; changes speed, memory and compile time, not the result; None: the
  # backend's measured default.
  'scan_layers': derived(int, at_least(1, 1000)),
}

_DENSENET: Fields = {
  # L, layers with weights: 6 n + 4 for n dense layers per block, 3 n + 4 without bottlenecks.
  'depth': Field(100, at_least(1, 10_000)),
  'growth_rate': _PARANET['growth_rate'],  # k, channels that a dense layer adds.
  # Channels of the first convolution; None: 2 growth_rate, or without bottlenecks 16 (2 growth_rate is common too).
  'stem_channels': derived(int, at_least(1, 100_000)),
  'compression': Field(0.5, FRACTION),  # theta, share of the channels that a transition keeps: above 0, at most 1.
  'bottleneck': Field(True),  # Dense layers begin with a 1x1 convolution, the B of DenseNet-BC.
  'bn_size': _PARANET['bn_size'],  # Width of that convolution, in multiples of growth_rate.
  # 'last', 'blocks' (after each), or the layers of every block after which there is an exit, in addition to the last
  # one ('6,12').
  'exits': Field('last'),
  'dropout': Field(0.0, RATE),  # Rate after each convolution but the first, 0 to less than 1.
  'scan_layers': _PARANET['scan_layers'],  # As in a ParaNet; None: the backend's default.
}

_RESNET: Fields = {
  # Layers with weights: 6 n + 2 for n residual blocks per stage, 9 n + 2 for bottlenecks.
  'depth': Field(110, at_least(1, 10_000)),
  # 'basic', 'preactivation' or 'bottleneck' (also pre-activation).
  'block': Field('basic', one_of('basic', 'preactivation', 'bottleneck')),
  # Where a shortcut without parameters has the zeros for new channels: 'behind' the others, or half on 'both_sides'.
  'shortcut_padding': Field('behind', one_of('behind', 'both_sides')),
  # 'last', 'stages' (after each), or the blocks of every stage after which there is an exit, in addition to the last
  # one ('4,8').
  'exits': Field('last'),
}

_MSDNET: Fields = {
  'num_blocks': Field(7, at_least(1, 1000)),  # Blocks of layers, with an exit after each.
  'base': Field(4, at_least(1, 1000)),  # Layers of the first block.
  # 'even' or 'lin_grow': later blocks have `step` layers, or each has `step` more than the one before.
  'step_mode': Field('even', one_of('even', 'lin_grow')),
  'step': Field(2, at_least(1, 1000)),  # Layers.
  # Channels of layer 0 at the finest scale; other scales multiply them by their growth factor.
  'initial_channels': Field(16, at_least(1, 100_000)),
  # Channels that a layer adds at the finest scale; other scales multiply them by their growth factor.
  'growth_rate': Field(6, at_least(1, 10_000)),
  'growth_factors': Field((1, 2, 4), tuple_of(int, 1, 1000)),  # One per scale, finest first.
  # One per scale: width of a 1x1 convolution, in multiples of what its path adds.
  'bottleneck_factors': Field((1, 2, 4), tuple_of(int, 1, 1000)),
  'reduction': Field(0.5, FRACTION),  # Share of the channels that a transition keeps: above 0, at most 1.
}

_RANET: Fields = {
  # Scale of each sub-network, the coarsest first: 1 has the least side, each other one twice that of the one before.
  'scales': Field((1, 2, 3, 3), tuple_of(int, 1, 30)),
  # One per sub-network: multiply initial_channels and growth_rate.
  'growth_factors': Field((4, 2, 1, 1), tuple_of(int, 1, 1000)),
  # One per sub-network: width of a 1x1 convolution that reads it, in multiples of what its path adds.
  'bottleneck_factors': Field((4, 2, 1, 1), tuple_of(int, 1, 1000)),
  'base_blocks': Field(2, at_least(1, 1000)),  # Blocks of the first sub-network, each with an exit.
  'block_step': Field(2, at_least(1, 1000)),  # Blocks that each further sub-network adds, each with an exit.
  'step_mode': Field('even', one_of('even', 'lin_grow')),  # Blocks have `step` layers, or block n has n times as many.
  'step': Field(4, at_least(1, 1000)),  # Layers.
  'initial_channels': _MSDNET['initial_channels'],  # Channels of the first convolutions, times the growth factor.
  'growth_rate': _MSDNET['growth_rate'],  # Channels that a layer adds, times the growth factor.
  # Share of the channels of a layer that come from the sub-network before: between 0 and 1.
  'fusion': Field(0.25, Rule(lambda value: 0 < value < 1, 'between 0 and 1')),
  'reduction': _MSDNET['reduction'],  # Share of the channels that a transition keeps: above 0, at most 1.
}

_FRACTALNET: Fields = {
  # C: blocks have 2^(C - 1) rows; the exits are each column and the whole network.
  'columns': Field(3, at_least(2, 12)),
  'widths': Field((64, 128, 256, 512, 512), tuple_of(int, 1, 100_000)),  # Channels of each block.
  # Rate after each block's convolutions, 0 to less than 1; (): none.
  'block_dropout': Field(
    (),
    Rule(
      lambda values: all(isinstance(v, int | float) and 0 <= v < 1 for v in values),
      'rates from 0 to less than 1, such as "(0.0,0.1)"',
    ),
  ),
  'local_drop_path': Field(0.15, SHARE),  # Rate at which a join drops an input, in a step of local drop-path.
  'global_drop_path': Field(0.5, SHARE),  # Share of the steps that keep a single column instead.
}

ADOPTED_HEADS = ('linear', 'bn_relu', 'conv', 'class_token', 'blocks')
"""The kinds of head of exits that are added to a trained network (see models/adopted/heads.py)."""

_ADOPTED: Fields = {
  # A network that PyTorch users have trained, by torchvision's or timm's name (see models/adopted/registry.py).
  'arch': Field('cifar_resnet56'),
  # Places of the exits before the last one, by PyTorch's names of modules ('layer1,layer2.1'); '': the last exit alone.
  'exits': Field(''),
  # 'linear' (pool-linear), 'bn_relu' (BN-ReLU-pool-linear, the paper's), 'conv' (a convolution before it),
  # 'class_token' (norm-linear of the first token) or 'blocks' (copies of later blocks of the network), for the exits
  # before the last one; None: the architecture's own.
  'head': derived(str, one_of(*ADOPTED_HEADS)),
  # Blocks of each shape that a head 'blocks' copies, if the network has as many; None: one, but three in all.
  'copies': derived(int, at_least(1, 1000)),
  # The last exit: the network's 'own' classifier, or a 'new' one, for other classes.
  'last': Field('own', one_of('own', 'new')),
}


def _least_dense(fields: dict[str, Any], layers: int, side: float) -> tuple[float, float]:
  """Those of the first dense block: layer i has the k channels of each layer before it, and adds k."""
  k, pairs = fields['growth_rate'], layers * (layers - 1) / 2
  bottleneck = fields.get('bottleneck', True)
  params = fields['bn_size'] * k**2 * (pairs + 9 * layers) if bottleneck else 9 * k**2 * pairs
  return params, layers * k * side**2


def _least_fractal(fields: dict[str, Any]) -> tuple[float, float]:
  rows, widths = 2 ** (fields['columns'] - 1), fields['widths'] or (0,)
  return 9 * (rows - 1) * sum(width**2 for width in widths), rows * widths[0] * fields['image_side'] ** 2


_BUILT_IN = (
  Family(
    *('paranet', 'configs/paranet.py', 'paranet_jax.models.paranet:from_fields', _PARANET),
    fix='image_side, .blocks, .halvings, .cascade or .growth_factors',
    targets=lambda name: parse_name(name).targets,
    least=lambda fields: _least_dense(
      fields, fields['layers_per_block'], fields['image_side'] / 2 ** (1 + min(fields['halvings'] or (1,)))
    ),
  ),
  Family(
    *('densenet', 'configs/densenet_bc_100_12.py', 'paranet_jax.models.densenet:from_fields', _DENSENET),
    fix='depth, .bottleneck, .exits or .image_side',
    least=lambda fields: _least_dense(
      fields, (fields['depth'] - 4) // (6 if fields['bottleneck'] else 3), fields['image_side'] / 4
    ),
  ),
  Family(
    *('resnet', 'configs/resnet_110.py', 'paranet_jax.models.resnet:from_fields', _RESNET),
    fix='depth, .block, .shortcut_padding, .exits or .image_side',
    least=lambda fields: (0, 16 * (fields['depth'] // 9) * fields['image_side'] ** 2),
  ),
  Family(
    *('msdnet', 'configs/msdnet_anytime.py', 'paranet_jax.models.msdnet:from_fields', _MSDNET),
    fix='num_blocks, .growth_rate, .growth_factors, .bottleneck_factors or .image_side',
    least=lambda fields: (9 * fields['base'] * fields['growth_rate'] ** 2, 0),
  ),
  Family(
    *('ranet', 'configs/ranet_anytime.py', 'paranet_jax.models.ranet:from_fields', _RANET),
    fix='scales, .growth_factors, .bottleneck_factors, .fusion or .image_side',
    least=lambda fields: (6.75 * fields['step'] * fields['growth_rate'] ** 2, 0),
  ),
  Family(
    *('fractalnet', 'configs/fractalnet_20.py', 'paranet_jax.models.fractalnet:from_fields', _FRACTALNET),
    fix='widths, .columns, .block_dropout or .image_side',
    least=_least_fractal,
  ),
  Family(
    *('adopted', 'configs/adopted.py', 'paranet_jax.models.adopted.network:from_fields', _ADOPTED),
    fix='arch, .exits or .head',
  ),
)
FAMILIES = Registry('paranet_jax.families', 'family', {family.name: family for family in _BUILT_IN})


def register_family(family: Family) -> None:
  """Makes a family available to `base_config(family=...)`, and so to every command, in this process.

  Commands find the family of a saved run by its name. To make a family available in every process, provide it from an
  installed package as an entry point whose value is a `Family`:

      [project.entry-points.'paranet_jax.families']
      mynet = 'my_package.mynet:FAMILY'

  Raises:
    ValueError: another family has this name.
  """
  FAMILIES.register(family.name, family)


find_family = FAMILIES.find
"""The family with this name; None if there is none."""

family_names = FAMILIES.names
"""Every family that `model.family` may name."""


def build_model(config: ConfigDict, num_classes: int) -> Any:
  """The network of a configuration, with the multi-exit interface.

  Args:
    num_classes: number of classes of the data set; `model.num_classes`, if set, takes precedence.

  Raises:
    UserError: the name is invalid, or the fields do not fit together.
  """
  import jax.numpy as jnp

  family = _family_of(config)
  build = pkgutil.resolve_name(family.build) if isinstance(family.build, str) else family.build
  fields = {name: value for name, value in config.model.items() if name != 'family'}
  dtype = BFLOAT16 if fields['dtype'] == INSISTED else fields['dtype']
  fields |= {'num_classes': fields['num_classes'] or num_classes, 'dtype': jnp.dtype(dtype)}
  boost, transfer = fields.pop('boost'), fields.pop('transfer')
  try:
    model = build(config.name, fields)
  except ValueError as error:
    raise UserError(f'{error}; set --config.model.{family.fix}') from error
  if not (boost or transfer):
    return model
  from paranet_jax.models.linked import boosted, with_transfer

  return boosted(model, boost) if boost else with_transfer(model, transfer)


def targets(config: ConfigDict) -> Targets:
  """What each exit learns from: given by the name of a ParaNet, and the labels in other families.

  Raises:
    UserError: the name is invalid, or the fields do not fit together.
  """
  family = _family_of(config)
  if family.targets:
    return family.targets(config.name)
  if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9._-]*', config.name):
    raise UserError(f'name must be letters, digits and, after the first, ._-, found {config.name!r}; set --config.name')
  return (LABELS,) * build_model(config, num_classes=2).num_exits


def _family_of(config: ConfigDict) -> Family:
  family = find_family(config.model.family)
  if family is None:
    raise UserError(
      f'model.family must be one of {", ".join(family_names())}, found {config.model.family}; set --config'
    )
  return family
