"""Checks of a whole configuration, and the values derived from it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from paranet_jax.base_config import base_config, family_of, field_names, fields_of
from paranet_jax.data.known import known_dataset
from paranet_jax.host.arguments import absolute
from paranet_jax.host.errors import UserError
from paranet_jax.host.fields import numbers
from paranet_jax.models import registry
from paranet_jax.models.registry import COMMON, build_model, family_names, find_family
from paranet_jax.targets import (
  GIVEN,
  LABELS,
  Targets,
  check_regime,
  distill_teachers,
  exits_targets,
  matches_exits,
  trained_exits,
)

__all__ = ['build_model']  # Also derived from a configuration.


def validate(config: ConfigDict) -> None:
  """Checks every field alone, and that the name, the shapes and the exits fit together.

  Raises:
    UserError: the first field that is wrong, with the flag that sets it.
  """
  family = family_of(config)
  _check_family(config)
  _check_fields(config, base_config(family=family))
  for name, field in fields_of(family).items():
    value = _get(config, name)
    if value is not None and field.rule and not field.rule.holds(value):
      raise UserError(f'{name} must be {field.rule.expected}, found {value}; set --config.{name}')
  exit_weights(config)
  teachers(config)
  _check_labels(config)
  _check_scaling(config)
  _check_training(config)
  _check_teacher(config)
  _check_links(config)
  _check_gradients(config)
  if config.checkpoint.keep_best != 'none' and not config.data.held_out:
    raise UserError(
      'checkpoint.keep_best needs a held-out split, found data.held_out 0; '
      'set --config.data.held_out, or --config.checkpoint.keep_best=none'
    )
  _check_network(config, build_model(config, num_classes=2))


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
  """(H, W, C) of the images that the model reads."""
  return (config.model.image_side, config.model.image_side, config.model.channels)


def targets(config: ConfigDict) -> Targets:
  """What each exit learns from: given by the regime 'exits', by the name of a ParaNet, or else the labels.

  Raises:
    UserError: the name is invalid, or the fields do not fit together.
  """
  found = registry.targets(config)
  if config.train.regime != 'exits':
    return found
  return exits_targets(len(found), config.train.exit_targets, config.model.get('last') == 'new')


def exit_weights(config: ConfigDict) -> tuple[float, ...]:
  """One loss weight per exit."""
  num_exits = len(targets(config))
  weights = config.loss.exit_weights or (1.0,) * num_exits
  if len(weights) != num_exits:
    raise UserError(
      f'loss.exit_weights must have {num_exits} entries, one for each exit of {config.name}, found {weights}; '
      'set --config.loss.exit_weights'
    )
  family = find_family(config.model.family)
  or_name = ', or give that exit an x in --config.name' if family and family.targets else ''
  for number in trained_exits(targets(config)):
    if not weights[number - 1] and targets(config)[number - 1] != GIVEN:
      raise UserError(
        f'loss.exit_weights must be more than 0 for exit {number}, which {config.name} trains, found {weights}; '
        f'set --config.loss.exit_weights{or_name}'
      )
  return tuple(weights)


def class_weights(
  config: ConfigDict, class_names: Sequence[str], labels: Int[np.ndarray, ' N'], num_outputs: int
) -> tuple[float, ...] | None:
  """The weight of every output in losses with the true label; None: all are the same.

  'balanced' gives class c the weight N / (C n_c), for N training images of C classes, n_c of class c. Outputs without
  training images have the weight 1.

  Args:
    labels: of the training images.
    num_outputs: of the model, which may have more than the data set has classes.

  Raises:
    UserError: there is another number of weights than of classes.
  """
  given = config.loss.class_weights
  if given == 'none':
    return None
  if given == 'balanced':
    counts = np.bincount(labels, minlength=num_outputs)
    present = counts > 0
    return tuple(np.where(present, len(labels) / (present.sum() * np.maximum(counts, 1)), 1.0).tolist())
  weights = numbers(given)
  if len(weights) != len(class_names):
    raise UserError(
      f'loss.class_weights must have {len(class_names)} numbers, one for each class from {class_names[0]!r} to '
      f'{class_names[-1]!r}, found {len(weights)}; set --config.loss.class_weights'
    )
  return weights + (1.0,) * (num_outputs - len(weights))


def teachers(config: ConfigDict) -> dict[int, tuple[int, ...]]:
  """The exits that each exit with labels also learns from (see `targets.distill_teachers`)."""
  distill = 'last' if _from_both(config) else config.loss.distill
  given = config.loss.teacher == 'run'
  return distill_teachers(targets(config), distill, hard_label_weight(config), config.name, given)


def learning_from_labels(config: ConfigDict) -> list[int]:
  """Numbers of the exits that learn from labels, alone or beside exits."""
  from_exits = () if hard_label_weight(config) else teachers(config)
  return [number for number, target in enumerate(targets(config), 1) if target == LABELS and number not in from_exits]


def hard_label_weight(config: ConfigDict, target: int | None = LABELS) -> float:
  """The share of the labels in the loss of an exit that also learns from exits.

  Args:
    target: of the exit; one that matches another by squared error learns from no labels.
  """
  if target != LABELS and config.loss.matching == 'squared_error':
    return 0.0
  return config.loss.hard_label_weight or (0.5 if _from_both(config) else 0.0)


def _from_both(config: ConfigDict) -> bool:
  return config.train.regime == 'exits' and config.train.exit_targets == 'both'


def backbone_epochs(config: ConfigDict) -> float:
  """Length of the first of a regime's two phases, in epochs."""
  return config.train.epochs / 2 if config.train.backbone_epochs is None else config.train.backbone_epochs


def backbone_steps(config: ConfigDict, steps_per_epoch: int) -> int:
  """Length of the first of a regime's two phases, in steps."""
  return max(round(backbone_epochs(config) * steps_per_epoch), 1)


def match_step(config: ConfigDict, steps_per_epoch: int) -> int:
  """The step from which exits match others."""
  return round(config.loss.match_from_epoch * steps_per_epoch)


def keeps_beside(config: ConfigDict) -> bool:
  """Whether a run holds averages of its weights or another network that teaches (see `steps.Beside`)."""
  return bool(config.train.average) or config.loss.teacher != 'network'


def varies_images(config: ConfigDict, crop_padding: int | None) -> bool:
  """Whether training images are more than mirrored, so that features of them cannot be kept."""
  train = config.train
  return bool(crop_padding or train.cutout or train.mixup or train.cutmix) or train.auto_augment != 'none'


def drop_epochs(config: ConfigDict) -> list[float]:
  """Epochs at which the learning rate drops."""
  train = config.train
  return [share * train.epochs for share in train.drops] if train.drop_epochs is None else list(train.drop_epochs)


def total_steps(config: ConfigDict, steps_per_epoch: int) -> int:
  """Length of the run, in steps."""
  steps = all_steps(config, steps_per_epoch)
  return min(steps, config.train.max_steps) if config.train.max_steps else steps


def all_steps(config: ConfigDict, steps_per_epoch: int) -> int:
  """Length of the run in steps, if `train.max_steps` does not stop it."""
  return max(round(config.train.epochs * steps_per_epoch), 1)


def default_workdir(config: ConfigDict) -> str:
  """`runs/<name>-<dataset>-s<seed>`, or `-s<first>to<last>` for several seeds, in the current folder."""
  dataset = config.data.name.replace('/', '_').replace(':', '_')
  last = f'to{config.seed + config.seeds - 1}' if config.seeds > 1 else ''
  return f'runs/{config.name}-{dataset}-s{config.seed}{last}'


def check_devices(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError if the devices cannot share a batch evenly."""
  if config.train.batch_size % num_devices:
    raise UserError(
      f'train.batch_size {config.train.batch_size} cannot be shared evenly by {num_devices} devices; '
      'set --config.train.batch_size or --config.train.devices'
    )


def check_memory(config: ConfigDict, parts: int, memory: float, training: bool) -> None:
  """Refuses, before anything is read or traced, what cannot fit by far: by a lower bound on its memory.

  Args:
    parts: into which a training batch is divided, each with its own memory.
    memory: bytes of each.
    training: or else only evaluation.

  Raises:
    UserError: it does not fit.
  """
  model, family = config.model, find_family(config.model.family)
  params, values = family.least(dict(model)) if family and family.least else (0, 0)
  # Of an image its pixels, as bytes and as float32.
  needed = config.eval.batch_size * 5 * model.channels * model.image_side**2 + 4 * params
  if training:  # Values may be bfloat16; every parameter has a momentum or a gradient.
    padded = model.image_side + 2 * (config.data.crop_padding or 0)
    each = 5 * model.channels * padded**2 + 2 * values
    needed = max(needed, config.train.batch_size / parts * each + 8 * params)
  if needed > memory:
    raise UserError(
      f'expected a run that fits the {memory / 1e9:,.1f} GB of a device, found one that needs more than '
      f'{needed / 1e9:,.1f} GB; lower --config.train.batch_size, .eval.batch_size, .model.image_side or the size of '
      'the network'
    )


def differences(saved: dict, current: dict, prefix: str = '') -> list[str]:
  """The fields in which two configurations differ, as `field: saved -> current`.

  A prepared data set may move between starts, so its folder is not compared; a folder of images identifies them.
  """
  found = []
  for key in sorted(saved.keys() | current.keys()):
    field, old, new = prefix + key, saved.get(key), current.get(key)
    if isinstance(old, dict) and isinstance(new, dict):
      found += differences(old, new, f'{field}.')
    elif old != new and not (field == 'data.data_dir' and not known_dataset(current.get('name', '')).in_data_dir):
      found.append(f'{field}: {_shown(old)} -> {_shown(new)}')
  return found


def _shown(value: Any) -> str:
  """A value in a line of text, where an empty one has to be seen."""
  return "''" if value == '' else str(value)


PATHS = ('data.data_dir', 'init_from', 'loss.teacher_run')
"""Fields that hold paths of the machine."""


def absolute_paths(config: ConfigDict) -> None:
  """Makes folders absolute, so that a saved configuration does not depend on the current folder."""
  for field in PATHS:
    if path := _get(config, field):
      config.update_from_flattened_dict({field: str(absolute(path))})


def real_paths(config: ConfigDict) -> dict[str, str]:
  """What each field of `PATHS` names, whatever links lead there; '': nothing."""
  paths = {field: _get(config, field) for field in PATHS}
  return {field: os.path.realpath(path) if path else '' for field, path in paths.items()}


def without_paths(config: ConfigDict) -> ConfigDict:
  """A copy to be shared: paths of this machine are private, so only the names of runs and weights stay."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.update_from_flattened_dict({field: Path(_get(config, field)).name for field in PATHS})
    del config.data.data_dir  # The name of the folder of the data is of no use to others.
  return config


def with_data_dir(config: ConfigDict, data_dir: Path | None) -> ConfigDict:
  """The same configuration for a data set that is in this folder; None: where the configuration says."""
  if data_dir is None:
    return config
  config = config.copy_and_resolve_references()
  config.data.data_dir = str(data_dir)
  return config


def _check_labels(config: ConfigDict) -> None:
  """Raises UserError if something would be learned or chosen from labels that the data set does not have."""
  if known_dataset(config.data.name).labeled:
    return
  found = f'found images without labels (data.name {config.data.name})'
  fix = 'set --config.data.name=folder, with a folder of images for each class'
  if LABELS in targets(config):
    number = targets(config).index(LABELS) + 1
    raise UserError(f'exit {number} of {config.name} learns from labels, {found}; {fix}')
  for name in ('loss.hard_label_weight', 'checkpoint.keep_best'):
    if _get(config, name) not in (0, 'none'):
      raise UserError(f'{name} {_get(config, name)} needs labels, {found}; set --config.{name} back, or {fix}')


def _check_scaling(config: ConfigDict) -> None:
  short, side = config.data.short_side, config.model.image_side
  if short is not None and short < side:
    raise UserError(
      f'data.short_side must be at least model.image_side {side}, found {short}; set --config.data.short_side'
    )


def _check_training(config: ConfigDict) -> None:
  train = config.train
  check_regime(train.regime, targets(config), config.name)
  if train.regime in ('disjoint', 'mixed') and backbone_epochs(config) >= train.epochs:
    raise UserError(
      f'train.backbone_epochs must be less than train.epochs {train.epochs}, found {backbone_epochs(config)}; '
      'set --config.train.backbone_epochs'
    )
  if train.regime == 'exits' and train.exit_targets == 'both' and config.loss.distill not in ('none', 'last'):
    raise UserError(
      f"train.exit_targets 'both' lets every exit learn from the last one, found loss.distill {config.loss.distill!r}; "
      'set --config.loss.distill=none, or --config.train.exit_targets=labels'
    )
  if train.mixup and train.cutmix:
    raise UserError(
      f'train.mixup and train.cutmix exclude each other, found {train.mixup} and {train.cutmix}; set one of '
      '--config.train.mixup and --config.train.cutmix to 0'
    )
  if train.alternate_flip and train.regime == 'exits':
    raise UserError(
      "train.alternate_flip mirrors the images of a network that trains as a whole, found train.regime 'exits'; set "
      '--config.train.alternate_flip=False'
    )
  if train.cutout > config.model.image_side:
    raise UserError(
      f'train.cutout must be at most model.image_side {config.model.image_side}, found {train.cutout}; '
      'set --config.train.cutout'
    )


def _check_teacher(config: ConfigDict) -> None:
  loss, matches = config.loss, matches_exits(targets(config))
  if loss.match_from_epoch:
    if not matches or config.train.regime != 'joint':
      raise UserError(
        f"loss.match_from_epoch needs an exit that matches another and train.regime 'joint', found {config.name} and "
        f'{config.train.regime!r}; set --config.loss.match_from_epoch=0'
      )
    if loss.match_from_epoch >= config.train.epochs:
      raise UserError(
        f'loss.match_from_epoch must be less than train.epochs {config.train.epochs}, found {loss.match_from_epoch}; '
        'set --config.loss.match_from_epoch'
      )
  if loss.teacher == 'average' and not config.train.average:
    raise UserError(
      "loss.teacher 'average' needs averages of the weights, found train.average 0; set --config.train.average, such "
      'as 0.999, or --config.loss.teacher=network'
    )
  if (loss.teacher == 'run') != bool(loss.teacher_run):
    raise UserError(
      f"loss.teacher 'run' and loss.teacher_run, the folder of a finished run, go together, found {loss.teacher!r} and "
      f'{loss.teacher_run!r}; set --config.loss.teacher and --config.loss.teacher_run'
    )
  if loss.teacher != 'network' and not matches and loss.distill == 'none':
    raise UserError(
      f'loss.teacher {loss.teacher!r} needs an exit that matches another or learns from exits, and {config.name} has '
      'none; set --config.loss.distill, or --config.loss.teacher=network'
    )
  if loss.distill == 'all' and loss.teacher == 'network':
    raise UserError(
      "loss.distill 'all' lets the last exit learn from another network's, found loss.teacher 'network'; set "
      '--config.loss.teacher to average or run, or --config.loss.distill'
    )
  if keeps_beside(config) and config.train.regime == 'exits':
    raise UserError(
      f'train.average and loss.teacher are of networks that train as a whole, found {config.train.average:g}, '
      f"{loss.teacher!r} and train.regime 'exits'; set --config.train.average=0 and --config.loss.teacher=network"
    )


def _check_gradients(config: ConfigDict) -> None:
  loss, regime = config.loss, config.train.regime
  ways = {
    'loss.gradient_equilibrium': loss.gradient_equilibrium,
    'loss.conflict_averse': loss.conflict_averse,
    'loss.own_channels': loss.own_channels,
  }
  on = [name for name, value in ways.items() if value]
  if 'loss.gradient_equilibrium' in on and len(on) > 1:
    raise UserError(
      f'{on[0]} takes the mean of the gradients that {on[1]} changes, found both; set '
      f'--config.loss.gradient_equilibrium=False, or --config.{on[1]}=0'
    )
  # In the second phase of 'disjoint', exits change only what no other one uses.
  if (loss.conflict_averse or loss.own_channels) and regime in ('exits', 'disjoint'):
    raise UserError(
      f'{on[-1]} is about parameters that exits train together, found train.regime {regime!r}; set '
      f'--config.{on[-1]}=0, or --config.train.regime'
    )
  together = learning_from_labels(config)
  if regime == 'disjoint':
    together = [number for number in together if number != trained_exits(targets(config))[-1]]
  if loss.sample_weight and len(together) < 2:
    found, fix = '', ''
    if teachers(config) and not hard_label_weight(config):
      found, fix = f' with loss.distill {loss.distill!r}', ', or --config.loss.hard_label_weight'
    elif regime == 'disjoint':
      found, fix = f' with train.regime {regime!r}', ', or --config.train.regime'
    raise UserError(
      f'loss.sample_weight weighs images between exits that learn from labels, and {config.name}{found} has fewer than '
      f'two; set --config.loss.sample_weight=0{fix}'
    )


def _check_network(config: ConfigDict, model: Any) -> None:
  """Raises UserError if the network itself cannot train as the configuration says."""
  from paranet_jax.models.own_channels import hands_on_features  # It imports jax, as a network does.

  if config.train.regime == 'exits' and not getattr(model, 'exits_apart', False):
    raise UserError(
      f"train.regime 'exits' needs a network whose exits read what the backbone computes in inference (model.family "
      f"'adopted' or 'resnet'), found {config.model.family!r}; set --config.train.regime, or another --config"
    )
  if config.loss.own_channels and not hands_on_features(model):
    raise UserError(
      f'loss.own_channels needs a network whose exits lie along a chain or a graph of layers, found '
      f'{config.model.family!r}; set --config.loss.own_channels=0, or another --config'
    )


def _check_links(config: ConfigDict) -> None:
  model, regime = config.model, config.train.regime
  if model.boost and model.transfer:
    raise UserError(
      f'model.boost and model.transfer exclude each other, found {model.boost:g} and {model.transfer}; set one of '
      '--config.model.boost and --config.model.transfer to 0'
    )
  if model.boost and (regime != 'joint' or set(targets(config)) != {LABELS}):
    raise UserError(
      f'model.boost adds up exits that all learn from labels from the start, found {config.name} and train.regime '
      f'{regime!r}; set --config.name and --config.train.regime=joint, or --config.model.boost=0'
    )
  if model.boost and len(learning_from_labels(config)) < len(targets(config)):
    raise UserError(
      'model.boost adds up exits that all learn from labels from the start, found loss.distill '
      f'{config.loss.distill!r} and loss.hard_label_weight 0; set --config.loss.hard_label_weight, such as 0.5, or '
      '--config.model.boost=0'
    )
  if model.transfer and regime == 'exits':
    raise UserError(
      "model.transfer is of networks that train as a whole, found train.regime 'exits'; set --config.model.transfer=0"
    )


def _check_family(config: ConfigDict) -> None:
  model = config.get('model', {})
  found, own = model.get('family'), set(model) - set(COMMON)
  family = find_family(found)
  if found is None or family and own == set(family.fields):
    return
  known = [family for family in map(find_family, family_names()) if family]
  for family in known:
    if own == set(family.fields):
      raise UserError(
        f'model.family must be {family.name}, whose fields the configuration has, found {found}; for another family '
        f'set --config to one of {", ".join(family.example for family in known)}'
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
