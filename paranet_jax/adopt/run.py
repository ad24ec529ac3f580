"""The run of adopted exits: its configuration, its normalization and classes from the weights, and its training."""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from paranet_jax import config as config_lib
from paranet_jax.adopt.places import find_places, suggested
from paranet_jax.base_config import base_config
from paranet_jax.data.known import known_dataset
from paranet_jax.host.arguments import absolute
from paranet_jax.host.errors import UserError, say
from paranet_jax.models.adopted.architecture import Architecture
from paranet_jax.models.adopted.class_names import class_names
from paranet_jax.models.adopted.read_weights import classes_of, read_weights
from paranet_jax.models.adopted.tensors import to_state_dict
from paranet_jax.portable.run import find_images
from paranet_jax.runs.dataset_facts import save_weights_facts
from paranet_jax.runs.learned import IDENTITY
from paranet_jax.runs.workdir import CONFIG, prepare_workdir
from paranet_jax.train import train_and_evaluate
from paranet_jax.weights.hub import download_weights, hub_place, is_hub

EPOCHS = 30.0
STEPS = 2000
"""Fewer epochs than EPOCHS' would not be enough for a small folder: at least this many steps are made."""
BATCH = 128


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
  num_classes = classes_of(to_state_dict(read_weights(weights, architecture)), architecture)
  places = find_places(architecture, num_classes)
  if given.exits is None:
    given.exits = ','.join(suggested(places))
    say(f'exits: {given.exits} (suggested; python -m paranet_jax.adopt describe --arch={given.arch} lists the places)')
  config = configure(given, architecture, weights, num_classes)
  override(config)
  config_lib.absolute_paths(config)
  try:
    config_lib.validate(config)
  except UserError as error:  # These flags set the fields that it names.
    raise error.saying(str(error).replace('--config.model.arch, .exits or .head', '--exits or --head')) from error
  names = class_names(architecture.class_names, num_classes)
  if config.model.last == 'new':
    names = new_classes(config)
  workdir = given.workdir
  prepare_workdir(workdir, config, accept_changes=False)
  if not any((workdir / name).exists() for name in (CONFIG, IDENTITY)):
    prepared = architecture.preprocessing
    save_weights_facts(workdir, given.arch, names, prepared.mean, prepared.deviation)
  summary = train_and_evaluate(config, workdir)
  if summary is not None:
    say(next_steps(workdir, summary['exits'][-1]['macs_alone'], labeled=given.data is not None))


def configure(given: argparse.Namespace, architecture: Architecture, weights: Path, num_classes: int) -> ConfigDict:
  """The configuration of the run, before fields are overridden."""
  config = base_config(f'{given.arch}-exits', family='adopted')
  config.init_from = str(weights)
  prepared = architecture.preprocessing
  config.model.update(
    arch=given.arch,
    exits=given.exits,
    head=given.head,
    last='new' if given.classes else 'own',
    num_classes=num_classes,
    image_side=prepared.side,
  )
  config.data.update(short_side=prepared.resize, interpolation=prepared.interpolation)
  config.data.update(crop_padding=0, flip=False)
  folder = given.images or given.data
  if folder:
    config.data.update(name='images' if given.images else 'folder', data_dir=str(folder), test_fraction=0.1)
    count = len(find_images(str(folder)).images)
    config.data.held_out = max(count // 10, 1)
    learned = max(count - 2 * (count // 10), 1)
    config.train.batch_size = min(BATCH, learned)
    config.train.epochs = max(EPOCHS, -(-STEPS // max(learned // config.train.batch_size, 1)))
  config.train.update(
    regime='exits',
    exit_targets=given.targets or 'last',
    learning_rate=0.1,
    schedule='cosine',
    decay='kernels',
  )
  config.eval.update(every_epochs=config.train.epochs / 5, batch_size=250)
  config.checkpoint.every_steps = 10_000  # A run of a minute or two; one that is stopped saves itself.
  return config


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
