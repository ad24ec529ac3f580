"""What would be trained, without touching data: the facts behind `--mode=describe` and summary.json."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from paranet_jax import __version__
from paranet_jax import config as config_lib
from paranet_jax.costs import exit_costs
from paranet_jax.data.known import known_dataset
from paranet_jax.host.errors import UserError
from paranet_jax.targets import describe_target

LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def describe(config: ConfigDict, num_classes: int | None = None) -> dict[str, Any]:
  """Describes a configuration.

  Args:
    num_classes: of the data set, where it has been read.

  Returns:
    `name`, `dataset`, `seed`, `image_shape` (H, W, C), `num_classes`, and `exits`: for each `exit`, `trained`,
    `learns_from`, and the costs of `costs.exit_costs`.

  Raises:
    UserError: the configuration does not hold, or the number of classes is not known without the data.
  """
  config_lib.validate(config)
  num_classes = config.model.num_classes or num_classes or known_dataset(config.data.name).num_classes
  if num_classes is None:
    raise UserError(
      f"the number of classes of data set '{config.data.name}' is not known without reading it; "
      'set --config.model.num_classes'
    )
  model = config_lib.build_model(config, num_classes)
  image_shape = config_lib.image_shape(config)
  targets = config_lib.targets(config)
  teachers = config_lib.teachers(config)
  exits = []
  for cost, target in zip(exit_costs(model, image_shape), targets, strict=True):
    learns_from = describe_target(target, teachers.get(cost['exit'], ()), config.loss.hard_label_weight)
    exits.append({'exit': cost['exit'], 'trained': target is not None, 'learns_from': learns_from, **cost})
  return {
    'name': config.name,
    'dataset': config.data.name,
    'seed': config.seed,
    'image_shape': list(image_shape),
    'num_classes': num_classes,
    'exits': exits,
  }


def environment(devices: list[jax.Device]) -> dict[str, Any]:
  """Versions and device: what a number needs beside it."""
  versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
  return {
    'versions': {'paranet_jax': __version__, 'python': platform.python_version(), **versions},
    'device': {'platform': devices[0].platform, 'kind': devices[0].device_kind, 'count': len(devices)},
  }


def cpu_name(cpuinfo: Path = Path('/proc/cpuinfo')) -> str:
  """What this machine's processor calls itself."""
  try:
    lines = cpuinfo.read_text().splitlines()
  except OSError:
    lines = []
  names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
  return names[0] if names else platform.processor() or platform.machine()
