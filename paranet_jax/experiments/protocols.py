"""How long and on what the paper's networks are trained again, and what the command line changes in it."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from paranet_jax import config as config_lib
from paranet_jax.base_config import base_config
from paranet_jax.command_line import override
from paranet_jax.host.errors import UserError

# Field of the configuration: value, as on the command line.
PROTOCOLS = {
  'paper': {},
  'tenth': {'train.epochs': '13'},  # The drops follow: at epochs 5 and 10.
  'smoke': {
    'model.layers_per_block': '1',
    'model.growth_rate': '4',
    'model.image_side': '16',
    'data.name': 'digits',
    'train.epochs': '4',
    'train.batch_size': '48',
  },
}

_OF_EACH_RUN = ('name', 'seed', 'seeds')


class Protocol(NamedTuple):
  """A protocol and what is changed in it: `overrides` maps fields to values as on the command line."""

  name: str
  overrides: dict[str, str]

  @property
  def arguments(self) -> list[str]:
    """For `python -m paranet_jax.main`."""
    fields = PROTOCOLS[self.name] | self.overrides
    return [f'--config.{field}={value}' for field, value in sorted(fields.items())]


def parse_protocol(name: str, assignments: Sequence[str]) -> Protocol:
  """Reads `--protocol` and each `--set`.

  Raises:
    UserError: there is no such protocol, or an assignment is not `field=value`, or is of what differs between runs.
  """
  if name not in PROTOCOLS:
    raise UserError(f"unknown protocol '{name}', expected one of {', '.join(PROTOCOLS)}; set --protocol")
  overrides = {}
  for assignment in assignments:
    field, equals, value = assignment.partition('=')
    if not (field and equals):
      raise UserError(f"expected --set=field=value, such as --set=model.layers_per_block=4, found '{assignment}'")
    if field in _OF_EACH_RUN:
      raise UserError(f'{field} is of each run by itself, found --set={assignment}; leave it out, or set --seeds')
    overrides[field] = value
  return Protocol(name, overrides)


def run_config(protocol: Protocol, name: str, seed: int) -> ConfigDict:
  """The configuration of one run, as `main` makes it from `run_command`.

  Raises:
    UserError: an override does not hold.
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
  """`results/<protocol>`, with what is changed in it."""
  changed = [f'{field}={value}'.replace('/', '_') for field, value in sorted(protocol.overrides.items())]
  return '-'.join([f'results/{protocol.name}', *changed])


def reductions(config: ConfigDict) -> list[str]:
  """In what a run differs from the paper's own, as `field: the paper's -> here`."""
  paper, here = base_config(config.name).to_dict(), config.to_dict()
  return [change for change in config_lib.differences(paper, here) if not change.startswith('seed:')]
