"""What a configuration must hold, and what is derived from it."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from paranet_jax.base_config import FAMILIES, base_config, family_of, field_names
from paranet_jax.data.known import known_dataset
from paranet_jax.host.errors import UserError
from paranet_jax.models.registry import COMMON, build_model, targets
from paranet_jax.regimes import REGIMES, check_regime
from paranet_jax.targets import distill_teachers, trained_exits

Rule = tuple[Callable[[Any], bool], str]


def _one_of(*choices: Any) -> Rule:
  return lambda value: value in choices, 'one of ' + ', '.join(map(str, choices))


def _at_least(low: float) -> Rule:
  return lambda value: low <= value < math.inf, f'{low} or more'


def _tuple_of(kind: type | tuple[type, ...], low: float) -> Rule:
  def holds(values):
    return all(isinstance(v, kind) and not isinstance(v, bool) and low <= v < math.inf for v in values)

  return holds, f'numbers of {low} or more, such as "(1,2,3)"'


_POSITIVE: Rule = (lambda value: 0 < value < math.inf, 'more than 0 and finite')
_EPOCHS: Rule = (lambda value: 0 < value <= 1e6, 'more than 0 and at most 1,000,000')
_PART: Rule = (lambda value: 0 < value <= 1, 'more than 0 and at most 1')
_SHARE: Rule = (lambda value: 0 <= value <= 1, 'from 0 to 1')
_TIMES: Rule = _tuple_of((int, float), 0)

FAMILY_CONFIGS = {
  'paranet': 'paranet',
  'densenet': 'densenet_bc_100_12',
  'resnet': 'resnet_110',
  'msdnet': 'msdnet_anytime',
  'fractalnet': 'fractalnet_20',
}
"""A file in `configs/` of each family."""

RULES: dict[str, Rule] = {
  'seed': (lambda value: -(2**31) <= value < 2**31, 'an integer of 32 bits'),
  'seeds': _at_least(1),
  'model.layers_per_block': _at_least(1),
  'model.growth_rate': _at_least(1),
  'model.bn_size': _at_least(1),
  'model.blocks': _tuple_of(int, 1),
  'model.halvings': _tuple_of(int, 0),
  'model.cascade': (
    lambda value: re.fullmatch(r'(\d\.\d+(,\d\.\d+)*)?', value) is not None,
    "receiving blocks 'pipeline.block' separated by commas, such as 2.2,3.3",
  ),
  'model.stem': _one_of('3x3', '7x7'),
  'model.entry_pool': _one_of('max', 'avg', 'max3x3'),
  'model.entry_order': _one_of('stem_first', 'pool_first'),
  'model.depth': _at_least(1),
  'model.compression': _PART,
  'model.block': _one_of('basic', 'preactivation', 'bottleneck'),
  'model.num_blocks': _at_least(1),
  'model.base': _at_least(1),
  'model.step_mode': _one_of('even', 'lin_grow'),
  'model.step': _at_least(1),
  'model.initial_channels': _at_least(1),
  'model.growth_factors': _tuple_of(int, 1),
  'model.bottleneck_factors': _tuple_of(int, 1),
  'model.reduction': _PART,
  'model.columns': _at_least(2),
  'model.widths': _tuple_of(int, 1),
  'model.dropout': (lambda value: 0 <= value < 1, 'from 0 to less than 1'),
  'model.block_dropout': (
    lambda values: all(isinstance(v, int | float) and 0 <= v < 1 for v in values),
    'rates from 0 to less than 1, such as "(0.0,0.1)"',
  ),
  'model.local_drop_path': _SHARE,
  'model.global_drop_path': _SHARE,
  'model.num_classes': _at_least(2),
  'model.image_side': _at_least(1),
  'model.channels': _one_of(1, 3),
  'model.dtype': _one_of('float32', 'bfloat16'),
  'model.scan_layers': _at_least(1),
  'data.held_out': _at_least(0),
  'data.test_fraction': (lambda value: 0 < value < 1, 'between 0 and 1'),
  'data.on_corrupt': _one_of('refuse', 'skip'),
  'data.crop_padding': _at_least(0),
  'data.workers': _at_least(0),
  'loss.matching': _one_of('squared_error', 'kl'),
  'loss.temperature': _POSITIVE,
  'loss.hard_label_weight': _SHARE,
  'loss.distill': _one_of('none', 'last', 'next', 'later'),
  'loss.exit_weights': _tuple_of((int, float), 0),
  'loss.label_smoothing': (lambda value: 0 <= value < 1, 'from 0 to less than 1'),
  'train.epochs': _EPOCHS,
  'train.max_steps': _at_least(0),
  'train.regime': _one_of(*REGIMES),
  'train.body_epochs': _EPOCHS,
  'train.batch_size': _at_least(1),
  'train.learning_rate': _POSITIVE,
  'train.schedule': _one_of('step', 'cosine', 'one_cycle', 'constant'),
  'train.drops': (
    lambda values: _TIMES[0](values) and max(values, default=0) <= 1,
    'shares from 0 to 1, such as "(0.5,0.75)"',
  ),
  'train.drop_epochs': _TIMES,
  'train.drop_factor': _POSITIVE,
  'train.warmup_epochs': _at_least(0),
  'train.optimizer': _one_of('sgd', 'adamw'),
  'train.momentum': (lambda value: 0 <= value < 1, 'from 0 to less than 1'),
  'train.weight_decay': _at_least(0),
  'train.decay': _one_of('all', 'kernels'),
  'train.clip_norm': _at_least(0),
  'train.accumulate_steps': _at_least(1),
  'train.cutout': _at_least(0),
  'train.mixup': _at_least(0),
  'train.devices': _at_least(0),
  'eval.every_epochs': _EPOCHS,
  'eval.batch_size': _at_least(1),
  'checkpoint.every_steps': _at_least(1),
  'checkpoint.keep': _at_least(1),
  'checkpoint.keep_every_epochs': _at_least(0),
  'checkpoint.keep_best': _one_of('none', 'accuracy', 'top5', 'loss', 'nll'),
  'log.every_steps': _at_least(1),
}
"""What each field with a range must hold: a predicate and how to say it. A derived value (None) is not checked."""


def validate(config: ConfigDict) -> None:
  """Checks every field by itself, and that the name, the shapes and the exits fit together.

  Raises:
    UserError: the first field that does not hold, with the flag that sets it.
  """
  _check_family(config)
  _check_fields(config, base_config(family=family_of(config)))
  known = field_names(config)
  for field, (holds, expected) in RULES.items():
    value = _get(config, field) if field in known else None
    if value is not None and not holds(value):
      raise UserError(f'{field} must be {expected}, found {value}; set --config.{field}')
  exit_weights(config)
  teachers(config)
  _check_training(config)
  if config.checkpoint.keep_best != 'none' and not config.data.held_out:
    raise UserError(
      'checkpoint.keep_best chooses by the images held out, found data.held_out 0; '
      'set --config.data.held_out, or --config.checkpoint.keep_best=none'
    )
  build_model(config, num_classes=2)


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
  """(H, W, C) of the images that the model reads."""
  return (config.model.image_side, config.model.image_side, config.model.channels)


def exit_weights(config: ConfigDict) -> tuple[float, ...]:
  """One loss weight an exit."""
  num_exits = len(targets(config))
  weights = config.loss.exit_weights or (1.0,) * num_exits
  if len(weights) != num_exits:
    raise UserError(
      f'loss.exit_weights must have {num_exits} entries, one an exit of {config.name}, found {weights}; '
      'set --config.loss.exit_weights'
    )
  or_name = ', or give that exit an x in --config.name' if config.model.family == 'paranet' else ''
  for number in trained_exits(targets(config)):
    if not weights[number - 1]:
      raise UserError(
        f'loss.exit_weights must be more than 0 for exit {number}, which {config.name} trains, found {weights}; '
        f'set --config.loss.exit_weights{or_name}'
      )
  return tuple(weights)


def teachers(config: ConfigDict) -> dict[int, tuple[int, ...]]:
  """The exits from which an exit that learns from labels learns besides (see `targets.distill_teachers`)."""
  loss = config.loss
  return distill_teachers(targets(config), loss.distill, loss.hard_label_weight, config.name)


def body_steps(config: ConfigDict, steps_per_epoch: int) -> int:
  """Length of the first phase of a regime that has two, in steps."""
  return max(round(_body_epochs(config) * steps_per_epoch), 1)


def _body_epochs(config: ConfigDict) -> float:
  return config.train.epochs / 2 if config.train.body_epochs is None else config.train.body_epochs


def drop_epochs(config: ConfigDict) -> list[float]:
  """When the learning rate drops, in epochs."""
  train = config.train
  return [share * train.epochs for share in train.drops] if train.drop_epochs is None else list(train.drop_epochs)


def total_steps(config: ConfigDict, steps_per_epoch: int) -> int:
  """Length of the run, in steps."""
  steps = max(round(config.train.epochs * steps_per_epoch), 1)
  return min(steps, config.train.max_steps) if config.train.max_steps else steps


def default_workdir(config: ConfigDict) -> str:
  """`runs/<name>-<dataset>-s<seed>`, in the current folder; a tfds name's config and version stay readable.

  Several seeds are `s<first>to<last>`.
  """
  dataset = config.data.name.replace('/', '_').replace(':', '_')
  last = f'to{config.seed + config.seeds - 1}' if config.seeds > 1 else ''
  return f'runs/{config.name}-{dataset}-s{config.seed}{last}'


def check_devices(config: ConfigDict, num_devices: int) -> None:
  """Refuses a batch that the devices cannot share evenly."""
  if config.train.batch_size % num_devices:
    raise UserError(
      f'train.batch_size {config.train.batch_size} cannot be shared evenly by {num_devices} devices; '
      'set --config.train.batch_size or --config.train.devices'
    )


def differences(saved: dict, current: dict, prefix: str = '') -> list[str]:
  """The fields in which two configurations differ, as `field: saved -> current`.

  The place of a prepared data set may change between starts; the place of a user's own images says which they are.
  """
  found = []
  for key in sorted(saved.keys() | current.keys()):
    field, old, new = prefix + key, saved.get(key), current.get(key)
    if isinstance(old, dict) and isinstance(new, dict):
      found += differences(old, new, f'{field}.')
    elif old != new and not (field == 'data.data_dir' and not known_dataset(current.get('name', '')).in_data_dir):
      found.append(f'{field}: {old} -> {new}')
  return found


def absolute_paths(config: ConfigDict) -> None:
  """Makes folders absolute, so that a saved configuration does not depend on the folder it was started from."""
  for section, field in ((config.data, 'data_dir'), (config, 'init_from')):
    if section[field]:
      section[field] = str(Path(section[field]).expanduser().absolute())


def _check_training(config: ConfigDict) -> None:
  train = config.train
  check_regime(train.regime, targets(config), config.name)
  if train.regime != 'joint' and _body_epochs(config) >= train.epochs:
    raise UserError(
      f'train.body_epochs must be less than train.epochs {train.epochs}, found {train.body_epochs}; '
      'set --config.train.body_epochs'
    )
  if train.cutout > config.model.image_side:
    raise UserError(
      f'train.cutout must be at most model.image_side {config.model.image_side}, found {train.cutout}; '
      'set --config.train.cutout'
    )


def _check_family(config: ConfigDict) -> None:
  own, found = set(config.get('model', {})) - set(COMMON), config.get('model', {}).get('family')
  for family, fields in FAMILIES.items():
    if found is not None and found != family and own == set(fields()):
      raise UserError(
        f'model.family must be {family}, whose fields the configuration has, found {found}; for another family set '
        f'--config to one of {", ".join(f"configs/{name}.py" for name in FAMILY_CONFIGS.values())}'
      )


def _check_fields(config: ConfigDict, base: ConfigDict) -> None:
  known = field_names(base)
  for field in sorted(set(known) ^ set(field_names(config))):
    problem = 'lacks' if field in known else 'has an unknown'
    raise UserError(
      f'the configuration {problem} field {field}; start from base_config() as configs/quickstart.py does'
    )
  for field in known:
    if _get(config, field) is None and _get(base, field) is not None:
      raise UserError(f'{field} must have a value, found None; set --config.{field}')


def _get(config: ConfigDict, field: str) -> Any:
  for key in field.split('.'):
    config = config[key]
  return config
