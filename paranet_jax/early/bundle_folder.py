"""Reading a bundle as a run: configuration, network, weights, classes and normalization, without its model files."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paranet_jax import config as config_lib
from paranet_jax.costs import abstract_variables
from paranet_jax.host.errors import UserError, say
from paranet_jax.host.files import read_file, read_object
from paranet_jax.models.numerics import check_inference
from paranet_jax.portable.run import BUNDLE, CLASSES, EXITS, PREPROCESSING
from paranet_jax.runs.checkpoints import shape_difference, shapes_by_path
from paranet_jax.runs.dataset_facts import DatasetFacts
from paranet_jax.runs.trained import TrainedRun
from paranet_jax.runs.workdir import CONFIG, restore_config

WEIGHTS = 'weights.safetensors'
FILES = (BUNDLE, CONFIG, EXITS, CLASSES, PREPROCESSING, WEIGHTS)
"""What is read of a bundle."""

_AGAIN = 'copy or export the bundle again'


def is_bundle(folder: Path) -> bool:
  """Whether a folder is a bundle."""
  return (folder / BUNDLE).is_file()


def read_bundle(folder: Path) -> TrainedRun:
  """Reads a bundle; `step` is that of the checkpoint which it was exported from.

  Args:
    folder: absolute.

  Raises:
    UserError: a file is missing or is not what was exported, or the weights do not fit the configuration.
  """
  bundle = read_object(folder / BUNDLE, _AGAIN) or {}
  checksums, step = bundle.get('checksums'), bundle.get('step')
  if not isinstance(checksums, dict) or type(step) is not int:
    raise UserError(f'{folder / BUNDLE} lacks the checksums or the step of a bundle; {_AGAIN}')
  content = {name: _sealed(folder / name, checksums.get(name)) for name in FILES if name != BUNDLE}
  try:  # As it was exported; only a bundle by another program can hold something else.
    class_names, preprocessing = (json.loads(content[name]) for name in (CLASSES, PREPROCESSING))
    mean, std = (tuple(map(float, preprocessing[name])) for name in ('mean', 'std'))
    variables = _variables(content[WEIGHTS])
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f'{folder} does not have the contents of a bundle ({error}); {_AGAIN}') from error
  config = restore_config(folder)
  if (dtype := bundle.get('dtype', 'float32')) != 'float32' and dtype == bundle.get('calibrated_dtype'):
    # Of another network than these weights, to rounding.
    say(f'{folder} was calibrated in {dtype} and is read in float32: nothing is promised of it here', to_stderr=True)
  model = config_lib.build_model(config, len(class_names))
  image_shape = config_lib.image_shape(config)
  wanted = shapes_by_path(abstract_variables(model, image_shape))
  if difference := shape_difference(shapes_by_path(variables), wanted):
    raise UserError(f'{folder / WEIGHTS} does not fit {folder / CONFIG}: {difference}; {_AGAIN}')
  check_inference(model, image_shape, config.eval.batch_size)
  facts = DatasetFacts(
    config.data.name, '', tuple(class_names), mean, std, dict.fromkeys(('train', 'held_out', 'test'), 0), {}
  )
  return TrainedRun(model, jax.device_put(variables), config, step, facts, folder)


def _sealed(path: Path, expected: Any) -> bytes:
  content = read_file(path, _AGAIN)
  if content is None:
    raise UserError(f'expected {path}, found none; {_AGAIN}')
  found = hashlib.sha256(content).hexdigest()
  if found != expected:
    raise UserError(f'{path} is not what was exported: expected sha256 {expected!s:.12}, found {found:.12}; {_AGAIN}')
  return content


def _variables(content: bytes) -> dict[str, Any]:
  """Nested arrays from their paths, such as params/exit_1/classifier/kernel."""
  try:
    import safetensors
    from safetensors.numpy import load
  except ImportError as error:
    raise UserError('a bundle is read with safetensors, found none; pip install safetensors') from error
  variables: dict[str, Any] = {'params': {}, 'batch_stats': {}}
  try:
    arrays = load(content)
  except safetensors.SafetensorError as error:
    raise ValueError(str(error)) from error
  for path, array in arrays.items():
    *parts, leaf = path.split('/')
    node = variables
    for part in parts:
      node = node.setdefault(part, {})
    node[leaf] = np.asarray(array)
  return variables
