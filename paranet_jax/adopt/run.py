"""The run of adopted exits: its configuration, its normalization and classes from the weights, and its training."""

import argparse
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from paranet_jax import config as config_lib
from paranet_jax.adopt.places import default_head, find_places, suggested
from paranet_jax.base_config import base_config
from paranet_jax.data.known import known_dataset
from paranet_jax.frozen import places_shifted
from paranet_jax.host.arguments import absolute
from paranet_jax.host.errors import UserError, say
from paranet_jax.models.adopted.architecture import Architecture
from paranet_jax.models.adopted.class_names import class_names
from paranet_jax.models.adopted.read_weights import classes_of, read_weights
from paranet_jax.models.adopted.tensors import to_state_dict
from paranet_jax.portable.run import find_images
from paranet_jax.runs.dataset_facts import restore_dataset_facts, save_weights_facts
from paranet_jax.runs.init_from import check_finished
from paranet_jax.runs.learned import IDENTITY
from paranet_jax.runs.workdir import CONFIG, Accepted, prepare_workdir, restore_config
from paranet_jax.task import sides_of
from paranet_jax.train import train_and_evaluate
from paranet_jax.weights.hub import download_weights, hub_place, is_hub


class Recipe(NamedTuple):
  """How exits learn, by default.

  Attributes:
    epochs: passes over the images.
    steps: at least this many are made, because a small folder needs more passes.
    learning_rate: peak of the schedule.
    mirrored: whether they also learn from the mirrored images, and match the mean of what both give.
    shift: of kept features, as a share of their side.
    matching, temperature: how they match the last exit.
    optimizer: of their parameters.
    features: weight with which they also match the last features of the backbone.
  """

  epochs: float
  steps: int
  learning_rate: float
  mirrored: bool
  shift: float = 0.0
  matching: str = 'squared_error'
  temperature: float = 4.0
  optimizer: str = 'sgd'
  features: float = 0.0


RECIPES = {
  'blocks': Recipe(
    epochs=5.0,
    steps=310,
    learning_rate=0.02,
    mirrored=True,
    shift=1 / 16,
    matching='kl',
    temperature=2.0,
    optimizer='muon',
    features=50.0,
  )
}
"""By kind of head. Copied blocks start near a solution, so they need few passes, each of which takes longer."""
OTHER_RECIPE = Recipe(30.0, 2000, 0.1, False)
"""Of the other kinds."""
WHOLE_RECIPE = Recipe(10.0, 600, 0.01, False)
"""Of a network that trains with its exits after these have learned alone."""
BATCH = 128
_OF_THE_COUNT = (('data', 'held_out'), ('train', 'batch_size'), ('train', 'epochs'), ('eval', 'every_epochs'))
"""Fields that follow from the number of images."""


class Facts(NamedTuple):
  """The data that weights were trained on.

  Attributes:
    mean, deviation: one per channel, by which images are normalized.
  """

  name: str
  class_names: Sequence[str]
  mean: Sequence[float]
  deviation: Sequence[float]


def adopt(given: argparse.Namespace, architecture: Architecture, override: Callable[[ConfigDict], None]) -> None:
  """Trains exits for the network that the flags name, in a new run, or resumes that.

  Args:
    given: the flags.
    override: changes fields as the command line says.

  Raises:
    UserError: the weights, the places or the images do not fit.
  """
  hub = is_hub(given.weights)
  weights = download_weights(hub_place(given.weights, '--weights'), '--weights') if hub else absolute(given.weights)
  if weights.is_dir():
    config, facts = configure_whole(given, architecture, weights)
  else:
    num_classes = classes_of(to_state_dict(read_weights(weights, architecture)), architecture)
    given.head = given.head or default_head(architecture)
    if given.exits is None:
      given.exits = ','.join(suggested(find_places(architecture, num_classes, given.head), given.head))
      places = f'python -m paranet_jax.adopt describe --arch={given.arch} lists the places'
      say(f'exits: {given.exits} (suggested; {places})')
    config = configure(given, architecture, weights, num_classes)
    prepared = architecture.preprocessing
    names = class_names(architecture.class_names, num_classes)
    facts = Facts(given.arch, names, given.mean or prepared.mean, given.deviation or prepared.deviation)

  def as_asked() -> None:
    override(config)
    if given.data_dir:
      config.data.data_dir = str(given.data_dir)

  as_asked()
  try:
    config_lib.validate(config)
  except UserError as error:  # These flags set the fields that it names.
    raise error.saying(str(error).replace('--config.model.arch, .exits or .head', '--exits or --head')) from error
  _settle(config, given)
  as_asked()  # What the command line names stays.
  config_lib.absolute_paths(config)
  if config.model.last == 'new' and not weights.is_dir():
    facts = facts._replace(class_names=new_classes(config))
  workdir = given.workdir
  accepted = Accepted(given.accept_config_changes, given.accept_data_changes, bool(given.data_dir))
  prepare_workdir(workdir, config, accepted.config, accepted.place)
  if not any((workdir / name).exists() for name in (CONFIG, IDENTITY)):
    save_weights_facts(workdir, *facts)
  else:
    _check_normalization(workdir, facts)
  summary = train_and_evaluate(config, workdir, accepted)
  if summary is not None:
    say(next_steps(workdir, summary['exits'][-1]['macs_alone'], labeled=known_dataset(config.data.name).labeled))


def configure(given: argparse.Namespace, architecture: Architecture, weights: Path, num_classes: int) -> ConfigDict:
  """The configuration of the run, before fields are overridden."""
  recipe = RECIPES.get(given.head, OTHER_RECIPE)
  config = base_config(f'{given.arch}-exits', family='adopted')
  config.init_from = str(weights)
  prepared = architecture.preprocessing
  config.model.update(
    arch=given.arch,
    exits=given.exits,
    head=given.head,
    copies=architecture.adopt_copies if given.head == 'blocks' else None,
    last='new' if given.classes else 'own',
    num_classes=num_classes,
    image_side=prepared.side,
  )
  config.data.update(short_side=prepared.resize, interpolation=prepared.interpolation)
  config.train.update(regime='exits', exit_targets=given.targets or 'last', feature_shift=recipe.shift)
  matches = not given.classes and given.targets != 'labels'
  config.loss.update(
    matching=recipe.matching,
    temperature=recipe.temperature,
    match_mirrored=recipe.mirrored and matches,
    match_features=recipe.features if matches else 0.0,
  )
  _learn(config, given, recipe)
  config.checkpoint.every_steps = 10_000  # A run of a few minutes; one that is stopped saves itself.
  return config


def configure_whole(given: argparse.Namespace, architecture: Architecture, run: Path) -> tuple[ConfigDict, Facts]:
  """The configuration of a run that trains the network of another run and its exits together, and that run's facts.

  Raises:
    UserError: it is not a finished run of this architecture whose exits learned alone, or the flags do not fit.
  """
  try:
    check_finished(run, 'init_from')
  except UserError as error:
    raise error.saying(str(error).replace('init_from', '--weights').replace('--config.--', '--')) from error
  source = restore_config(run)
  if source.train.regime != 'exits' or source.model.get('arch') != architecture.name:
    raise UserError(
      f'expected a run of adopt with --arch={architecture.name}, found --weights={run} with '
      f'{source.model.get("arch", source.model.family)}, train.regime {source.train.regime!r}; set --weights'
    )
  for flag in ('exits', 'head', 'targets', 'classes', 'mean', 'deviation', 'images'):
    if getattr(given, flag):
      fix = 'set --data to a folder of images for each class' if flag == 'images' else f'leave out --{flag}'
      raise UserError(
        f'the network and the exits of {run} train together as they are, and from labels, found --{flag}; {fix}'
      )
  config = base_config(f'{given.arch}-whole', family='adopted')
  config.init_from = str(run)
  config.model.update({name: source.model[name] for name in source.model})  # Values, not references to them.
  config.data.update(short_side=source.data.short_side, interpolation=source.data.interpolation)
  config.train.regime = 'joint'
  _learn(config, given, WHOLE_RECIPE)
  facts = restore_dataset_facts(run, config.model.channels)
  return config, Facts(facts.name, facts.class_names, facts.mean, facts.std)


def _check_normalization(workdir: Path, facts: Facts) -> None:
  """Raises UserError if a run that is resumed was begun with another normalization."""
  saved = restore_dataset_facts(workdir, len(facts.mean))
  for flag, own, now in (('mean', saved.mean, facts.mean), ('deviation', saved.std, facts.deviation)):
    if not np.allclose(own, now, rtol=1e-6):
      before, found = (','.join(f'{value:g}' for value in values) for values in (own, now))
      raise UserError(
        f'expected --{flag}={before}, with which {workdir} began, found {found}; set --{flag} or --workdir'
      )


def _learn(config: ConfigDict, given: argparse.Namespace, recipe: Recipe) -> None:
  """Sets from which images a run learns, and for how long; one that was begun keeps what follows from their number."""
  config.data.update(crop_padding=0, flip=recipe.mirrored, test_fraction=0.1)
  config.train.update(
    optimizer=recipe.optimizer, learning_rate=recipe.learning_rate, schedule='cosine', decay='kernels'
  )
  config.eval.batch_size = 250
  if folder := given.images or given.data:
    config.data.update(name='images' if given.images else 'folder', data_dir=str(folder))
    _count(config, given.workdir, recipe)


def _count(config: ConfigDict, workdir: Path, recipe: Recipe) -> None:
  """Sets what follows from the number of images; a data set that is not known is left to what reads it."""
  known, folder = known_dataset(config.data.name), config.data.data_dir
  tested = 0
  if os.path.exists(workdir / CONFIG):
    # Images may have been added or removed since; a run that is resumed goes on with what it began with.
    begun = restore_config(workdir)
    for section, name in _OF_THE_COUNT:
      config[section][name] = begun[section][name]
    return
  if config.data.name in ('images', 'folder') and folder:
    count = len(find_images(str(folder)).images)
    tested = round(config.data.test_fraction * count)
  elif known.counts:
    count = known.counts[0]
  elif source := known.open(config.data, config.model.image_side, config.model.channels):
    count, tested = len(source.records('train')), source.test_count or 0
  else:
    return
  config.data.held_out = max(count // 10, 1)
  learned = max(count - config.data.held_out - tested, 1)
  config.train.batch_size = min(BATCH, learned)
  config.train.epochs = max(recipe.epochs, -(-recipe.steps // max(learned // config.train.batch_size, 1)))
  config.eval.every_epochs = config.train.epochs / 5


def _settle(config: ConfigDict, given: argparse.Namespace) -> None:
  """Sets what follows from fields that the command line may have changed: from the data set and from the places."""
  whole = config.train.regime != 'exits'
  if not (given.images or given.data):
    _count(config, given.workdir, WHOLE_RECIPE if whole else RECIPES.get(given.head, OTHER_RECIPE))
  shift, classes = config.train.feature_shift, config.model.num_classes or 2
  if not whole and shift:
    sides = sides_of(config_lib.build_model(config, classes), config)
    moves = any(places_shifted(shift, side) for side in sides)
    if not moves or config_lib.varies_images(config, config.data.crop_padding):
      config.train.feature_shift = 0.0


def new_classes(config: ConfigDict) -> tuple[str, ...]:
  """The names of the data's classes, of which `config.model.num_classes` becomes the number.

  Raises:
    UserError: the data cannot be read.
  """
  source = known_dataset(config.data.name).open(config.data, config.model.image_side, config.model.channels)
  if source is None:
    raise UserError(f'unknown data set {config.data.name!r}; set --data or --config.data.name')
  config.model.num_classes = len(source.class_names)
  return source.class_names


def next_steps(workdir: Path, macs: int, labeled: bool) -> str:
  """What to do with the run, as commands."""
  run = shlex.quote(str(workdir))
  agree = '' if labeled else ' --risk-loss=disagreement'
  return (
    'next:\n'
    f'  python -m paranet_jax.calibrate --workdir={run} --budget={macs / 2e6:.4g}M  # half of the multiply-adds\n'
    f'  python -m paranet_jax.calibrate --workdir={run} --risk=0.05{agree}\n'
    f'  python -m paranet_jax.predict --workdir={run} IMAGES\n'
    f'  python -m paranet_jax.export --workdir={run} --out=BUNDLE'
  )
