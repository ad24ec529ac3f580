"""Protocols: how the paper's networks are trained, and what the command line changes in that."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from paranet_jax import config as config_lib
from paranet_jax.base_config import base_config
from paranet_jax.command_line import override
from paranet_jax.host.errors import UserError

# Configuration fields and values, as on the command line.
PROTOCOLS = {
  'paper': {},
  'quarter': {'train.epochs': '32.5'},  # The learning rate then drops at epochs 12.5 and 25.
  'tenth': {'train.epochs': '13'},  # The learning rate then drops at epochs 5 and 10.
  'smoke': {
    'model.layers_per_block': '1',
    'model.growth_rate': '4',
    'model.image_side': '16',
    'data.name': 'digits',
    'train.epochs': '4',
    'train.batch_size': '48',
  },
}

NO_REDUCTION = (
  'seed:',
  'name:',
  'train.devices:',
  'eval.',
  'checkpoint.',
  'log.',
  'data.data_dir:',
  'data.workers:',
  'data.streaming:',
)
"""Beginnings of differences that change no parameter, or that a row names itself."""

_OF_STEPS = 'train.drops:', 'train.drop_epochs:', 'train.drop_factor:'
"""Beginnings of differences that change no parameter under another `train.schedule` than 'step'."""

SET_PER_RUN = ('name', 'seed', 'seeds')


class Protocol(NamedTuple):
  """A protocol by name, with `overrides`: fields and values as on the command line."""

  name: str
  overrides: dict[str, str]

  @property
  def arguments(self) -> list[str]:
    """The flags for `python -m paranet_jax.main`."""
    fields = PROTOCOLS[self.name] | self.overrides
    return [f'--config.{field}={value}' for field, value in sorted(fields.items())]


def parse_protocol(name: str, assignments: Sequence[str]) -> Protocol:
  """Reads `--protocol` and each `--set`.

  Raises:
    UserError: an assignment is not `field=value`, or sets a field that differs between runs.
  """
  overrides = {}
  for assignment in assignments:
    field, equals, value = assignment.partition('=')
    if not (field and equals):
      raise UserError(f"expected --set=field=value, such as --set=model.layers_per_block=4, found '{assignment}'")
    if field in SET_PER_RUN:
      raise UserError(f'{field} differs between the runs, found --set={assignment}; leave it out, or set --seeds')
    overrides[field] = value
  return Protocol(name, overrides)


def run_config(protocol: Protocol, name: str, seed: int) -> ConfigDict:
  """The configuration of one run, the same that `main` builds from `run_command`.

  Raises:
    UserError: an override is invalid.
  """
  config = base_config(name)
  override(config, [*protocol.arguments, f'--config.seed={seed}'])
  config_lib.validate(config)
  config_lib.absolute_paths(config)
  return config


def run_command(protocol: Protocol, name: str, seed: int, workdir: Path) -> str:
  """The command that trains this run alone."""
  arguments = [f'--config=configs/paranet.py:{name}', *protocol.arguments, f'--config.seed={seed}']
  return shlex.join(['python', '-m', 'paranet_jax.main', *arguments, f'--workdir={workdir}'])


def default_workdir(protocol: Protocol) -> str:
  """`results/<protocol>`, followed by the overrides."""
  changed = [f'{field}={value}'.replace('/', '_') for field, value in sorted(protocol.overrides.items())]
  return '-'.join([f'results/{protocol.name}', *changed])


def reductions(config: ConfigDict) -> list[str]:
  """The differences between a run and the paper's that matter to its results, each as `field: the paper's -> here`."""
  paper, here = base_config(config.name, config.model.family).to_dict(), config.to_dict()
  ignored = NO_REDUCTION if config.train.schedule == 'step' else (*NO_REDUCTION, *_OF_STEPS)
  return [change for change in config_lib.differences(paper, here) if not change.startswith(ignored)]
