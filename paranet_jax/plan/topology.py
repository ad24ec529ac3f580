"""TPUs that are not here: libtpu compiles for them on any Linux machine."""

import importlib.util
import math
import os
import re

import jax

from paranet_jax.host.errors import UserError
from paranet_jax.plan.chips import CHIPS, Chip

INSTALL = 'pip install -r requirements-tpu.txt'

_WITHOUT_TPU = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
}
"""What libtpu asks for where there is no TPU, whatever it then compiles for."""


def has_libtpu() -> bool:
  """Whether the compiler for TPUs is installed."""
  return importlib.util.find_spec('libtpu') is not None


def split_topology(name: str) -> tuple[Chip, int]:
  """The chip of a topology such as `v5e:4x4`, and how many of them there are.

  Raises:
    UserError: the name is not of this form, or the chip is not known.
  """
  chip, _, shape = name.partition(':')
  dims = 3 if chip in ('v4', 'v5p') else 2
  if chip not in CHIPS or not re.fullmatch(rf'[1-9]\d*(x[1-9]\d*){{{dims - 1}}}', shape):
    known = ', '.join(f'{known}:{"2x2x1" if known in ("v4", "v5p") else "2x2"}' for known in CHIPS)
    raise UserError(
      f"topology must be a chip and the shape of its slice, such as {known}, found '{name}'; set --topology"
    )
  return CHIPS[chip], math.prod(map(int, shape.split('x')))


def topology_devices(name: str) -> list[jax.Device]:
  """Devices to compile for, one a chip, on a machine that need not have them. Call it before jax is used.

  Raises:
    UserError: libtpu is missing, or knows no such topology.
  """
  chip, count = split_topology(name)
  if not has_libtpu():
    raise UserError(f'compiling for {name} needs libtpu, found none; {INSTALL}')
  os.environ.update(_WITHOUT_TPU)
  jax.config.update('jax_platforms', 'cpu')  # The TPU of this machine, if it has one, is left to others.
  from jax.experimental import topologies

  options = dict(chip.topology_options)
  if count == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)
  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices)
  except RuntimeError as error:
    reason = ' '.join(str(error).split())
    raise UserError(f"libtpu knows no topology '{name}' ({reason}); set --topology, such as v5e:2x2") from error
