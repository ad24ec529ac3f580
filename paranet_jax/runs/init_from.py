"""Fine-tuning: a new run takes its backbone from a finished one, or from PyTorch's weights, and its exits are new."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from paranet_jax.config import build_model, image_shape, targets
from paranet_jax.costs import abstract_variables
from paranet_jax.data.dataset import Dataset
from paranet_jax.data.identity import known_of
from paranet_jax.data.load import unnamed
from paranet_jax.host.errors import UserError, say
from paranet_jax.models.adopted.heads import COPIED
from paranet_jax.models.adopted.read_weights import read_weights
from paranet_jax.models.adopted.registry import find_architecture
from paranet_jax.runs.checkpoints import (
  FOLDER,
  VARIABLES,
  Checkpoints,
  has_checkpoint,
  shape_difference,
  shapes_by_path,
)
from paranet_jax.runs.dataset_facts import restore_dataset_facts
from paranet_jax.runs.learned import restore_learned
from paranet_jax.runs.workdir import CONFIG, SUMMARY, restore_config
from paranet_jax.steps import Beside, TrainState
from paranet_jax.targets import GIVEN
from paranet_jax.weights.cifar_resnet import FIELDS, read_backbone, read_cifar_resnet

EXIT = 'exit'
"""Prefix of the modules of an exit in every model; no module of the backbone has it."""


def check_backbone(config: ConfigDict, workdir: Path) -> None:
  """Checks, before a run's folder is made, that `init_from` is a finished run, or a file of PyTorch weights, that fits.

  Args:
    workdir: of the new run; one that has a checkpoint does not need `init_from` any more.

  Raises:
    UserError: there is no finished run and no such file, or its backbone has a different architecture.
  """
  if has_checkpoint(workdir):
    return
  if not config.init_from:
    if config.train.regime == 'exits':
      raise UserError(
        "train.regime 'exits' trains no backbone, and init_from is not set; set --config.init_from to the folder of a "
        'run or to a file of PyTorch weights'
      )
    return
  run = Path(config.init_from)
  if not os.path.isdir(run):
    _read_pytorch(run, config)
    return
  check_finished(run, 'init_from')
  if difference := backbone_difference(config, run):
    raise UserError(
      f'the backbone of init_from {run} does not fit: {difference}; '
      f'set --config to the network of {run / CONFIG}, or --config.init_from'
    )


def check_finished(run: Path, field: str) -> None:
  """Checks that the folder that a field of the configuration names holds a finished run.

  Raises:
    UserError: it does not.
  """
  for name in (CONFIG, SUMMARY, FOLDER):
    if not os.path.exists(run / name):
      raise UserError(f'{field} must be the folder of a finished run, and {run} has no {name}; set --config.{field}')


def backbone_difference(config: ConfigDict, run: Path) -> str | None:
  """Where a run's backbone, by its shapes or by what it computes, differs from a configuration's; None: nowhere."""
  with Checkpoints(run) as checkpoints:
    _, saved = checkpoints.read_chosen(Checkpoints.choose, checkpoints.shapes)
  wanted = shapes_by_path(abstract_variables(build_model(config, num_classes=2), image_shape(config)))
  difference = shape_difference(_backbone_paths(saved), _backbone_paths(wanted))
  return difference or other_function(restore_config(run).model, config.model, _OF_THE_FUNCTION)


_OF_THE_FUNCTION = ('arch', 'block', 'shortcut_padding', 'entry_pool', 'entry_order', 'scales')
"""Fields that change what a backbone computes, but not the shapes of its parameters."""


def other_function(there: ConfigDict, here: ConfigDict, names: Sequence[str]) -> str | None:
  """The first of these fields of `model` that both have with other values; None: there is none."""
  for name in names:
    if name in there and name in here and there[name] != here[name]:
      return f'model.{name} is {there[name]} there and {here[name]} in this configuration'
  return None


def take_backbone(state: TrainState, source: Path, config: ConfigDict) -> TrainState:
  """Returns a fresh state with the backbone's parameters and running statistics of a finished run or a file.

  The exits are new even if the number of classes is the same, except the last one under the regime 'exits'. Exits that
  learned alone, under this regime, are taken too by a run that trains the whole. Averages of the weights begin with
  these. Images are normalized with the new data set's own mean and deviation, so that the backbone reads inputs of
  mean 0 and deviation 1, as before; but with those of the weights, where these came with them (see `dataset_facts`).

  Args:
    state: at step 0.
    source: absolute, see `check_backbone`.
    config: of the new run.

  Raises:
    UserError: the last exit, which stays, has another number of classes.
  """
  if os.path.isdir(source):
    with Checkpoints(source) as checkpoints:
      step, variables = checkpoints.read_chosen(Checkpoints.choose, checkpoints.read_variables)
    whole, which = _learned_alone(config, source), f'at step {step}'
    saved = variables if whole else _backbone(variables, *_last_exits(config, source))
  else:
    whole = False
    saved, model = _read_pytorch(source, config), config.model
    what = model.arch if model.family == 'adopted' else f'CIFAR ResNet-{model.depth}, zeros of shortcuts on both sides'
    which = f'(PyTorch, {what})'
  fresh = {'params': state.params, 'batch_stats': state.batch_stats}
  own_exits = 'its exits' if whole else 'its last exit, new others' if config.train.regime == 'exits' else 'new exits'
  say(f'backbone from {source} {which}, {own_exits}')
  kept = {part: {name: own for name, own in saved[part].items() if name in fresh[part]} for part in fresh}
  for path, leaf in jax.tree_util.tree_leaves_with_path(kept):
    expected: Any = fresh
    for key in path:
      expected = expected[key.key]
    if expected.shape != leaf.shape:
      name = '/'.join(key.key for key in path)
      found = f'{source} has {name} {list(leaf.shape)}, expected {list(expected.shape)} for'
      if leaf.shape[-1] == expected.shape[-1]:  # What reads the images, or tells the places in them.
        raise UserError(
          f'{found} the side and channels of the images; set --config.model.image_side and .channels, or '
          '--config.init_from'
        )
      raise UserError(f'{found} the classes of the data; set --config.model.num_classes, or --config.init_from')
  exits = {
    part: {name: _with_copies(own, saved[part]) for name, own in fresh[part].items() if name.startswith(EXIT)}
    for part in fresh
  }
  taken, beside = {part: exits[part] | kept[part] for part in fresh}, state.opt_state
  if isinstance(beside, Beside) and beside.average:  # They would be of what the seed drew, and may teach.
    beside = beside._replace(average=jax.tree.map(jnp.copy, taken))
  return dataclasses.replace(state, opt_state=beside, **taken)


def _learned_alone(config: ConfigDict, run: Path) -> bool:
  """Whether the exits of a run learned on its frozen backbone, and the same ones now train together with it."""

  def exits_of(settings: ConfigDict) -> dict[str, Any]:
    return {name: value for name, value in settings.model.items() if name not in ('dtype', 'num_classes')}

  there = restore_config(run)
  return there.train.regime == 'exits' != config.train.regime and exits_of(there) == exits_of(config)


def _with_copies(exit_variables: dict[str, Any], backbone: dict[str, Any]) -> dict[str, Any]:
  """The variables of an exit; the backbone's blocks that it has copies of (see `BlocksHead`) are their start."""
  fresh = exit_variables.get(COPIED)
  if fresh is None:
    return exit_variables

  def start(path, leaf):
    own: Any = backbone
    for key in path:
      own = own.get(key.key, {})
    return own if getattr(own, 'shape', None) == leaf.shape else leaf  # A classifier of other classes is new.

  return exit_variables | {COPIED: jax.tree_util.tree_map_with_path(start, fresh)}


def _last_exits(config: ConfigDict, run: Path) -> tuple[str, str]:
  """The module of the last exit in a run and in the new one, whose last exit stays under the regime 'exits'."""
  if config.train.regime != 'exits':
    return '', ''
  return f'exit_{len(targets(restore_config(run)))}', f'exit_{len(targets(config))}'


def check_kept_classes(config: ConfigDict, source: Path, dataset: Dataset) -> None:
  """Checks the classes of a run of which `take_backbone` takes exits too (see `check_classes`)."""
  if not os.path.isdir(source):
    return
  if targets(config)[-1] == GIVEN or config.model.get('last') == 'own' or _learned_alone(config, source):
    check_classes('init_from', source, dataset)


def check_classes(field: str, source: Path, dataset: Dataset) -> None:
  """Checks that the logits of a finished run are of the classes of a new run's data, in the same order.

  Only outputs that both name are compared: a network may have more, and images without labels name none.

  Args:
    field: of the configuration, which names the run.
    dataset: of the new run.

  Raises:
    UserError: they are not, or the run has no record of its classes.
  """
  there = restore_dataset_facts(source, channels=len(dataset.mean)).class_names
  for number, names in enumerate(zip(there, dataset.class_names, strict=False)):
    if names[0] != names[1] and unnamed(number) not in names:
      raise UserError(
        f'{field} {source} learned {names[0]!r} as class {number + 1}, found {names[1]!r}; name a run that learned the '
        f'same classes by --config.{field}, or set --config.data.data_dir'
      )


def say_shared(source: Path, dataset: Dataset) -> None:
  """Says how many held-out and test images a run was trained on whose backbone or logits are taken."""
  if not os.path.isdir(source):
    return
  learned = restore_learned(source, channels=len(dataset.mean), accept_changes=True)
  trained = learned.splits['train'].ids if learned and learned.splits else ()
  for name in ('held_out', 'test'):
    if count := np.isin(known_of(getattr(dataset, name)).ids, trained).sum():
      say(
        f'{name} has {count:,} images that {source} was trained on, so what is measured on them does not hold for new '
        'ones; set --config.data.held_out (and data.test_fraction) as there'
      )


def _read_pytorch(file: Path, config: ConfigDict) -> dict[str, Any]:
  model = config.model
  if not os.path.lexists(file):
    raise UserError(
      f'init_from must be the folder of a finished run or a file of PyTorch weights, and {file} does not exist; '
      'set --config.init_from'
    )
  if model.family == 'adopted':
    try:
      return read_weights(file, find_architecture(model.arch), model.num_classes if model.last == 'own' else None)
    except UserError as error:  # `adopt`, which has the flag --arch, has read the file before.
      raise error.saying(str(error).replace('set --arch', 'set --config.model.arch')) from error
  if model.family != 'resnet':
    raise UserError(
      f"PyTorch weights are read for model.family 'adopted' or 'resnet' (CIFAR ResNets), found {model.family!r}; "
      'set --config, or --config.init_from to the folder of a run'
    )
  for name, value in FIELDS.items():
    if model[name] != value:
      raise UserError(
        f"PyTorch's CIFAR ResNets have model.{name} {value!r}, found {model[name]!r}; set --config.model.{name}={value}"
      )
  if config.train.regime != 'exits':
    return read_backbone(file, model.depth, model.channels)
  fields, variables = read_cifar_resnet(file, len(targets(config)))
  for name in ('depth', 'num_classes'):
    if model[name] not in (None, fields[name]):
      raise UserError(
        f'{file} has {name} {fields[name]}, found {model[name]}; set --config.model.{name}={fields[name]}'
      )
  return variables


def _backbone_paths(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
  def kept(part: str, module: str = EXIT) -> bool:
    return part in VARIABLES and not module.startswith(EXIT)

  return {path: shape for path, shape in shapes.items() if kept(*path.split('/')[:2])}


def _backbone(variables: dict[str, Any], last: str, name: str) -> dict[str, Any]:
  """The variables outside the exits, and those of the exit `last` under another name."""
  return {
    part: {
      name if module == last else module: own
      for module, own in modules.items()
      if not module.startswith(EXIT) or module == last
    }
    for part, modules in variables.items()
  }
