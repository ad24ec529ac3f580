"""The devices that a run is planned for, and what each of them has."""

from typing import NamedTuple

import jax

from paranet_jax.description import cpu_name
from paranet_jax.host.errors import UserError
from paranet_jax.plan.chips import Chip, measured_chip
from paranet_jax.plan.topology import split_topology, topology_devices


class Target(NamedTuple):
  """Devices: what a reader calls them, and whether they are here and can run a step."""

  name: str
  devices: list[jax.Device]
  topology: str | None

  @property
  def here(self) -> bool:
    """Whether a step can be run."""
    return self.topology is None

  def chip(self) -> Chip:
    """What one device has: as published, or measured now."""
    if self.topology is not None:
      return split_topology(self.topology)[0]
    return measured_chip(self.devices[0], len(self.devices))


def choose_target(topology: str | None, count: int | None) -> Target:
  """The devices to plan for. Call it before jax is used.

  Args:
    topology: of TPUs, such as v5e:2x2; None: the devices that are here.
    count: the first so many of them, as many CPU devices as asked for; None: all.

  Raises:
    UserError: there is no such topology, or it has fewer devices.
  """
  if topology is None and count is not None:
    _divide_cpu(count)
  devices = jax.local_devices() if topology is None else topology_devices(topology)
  if count is not None and count > len(devices):
    where = 'here' if topology is None else f'in {topology}'
    raise UserError(f'devices must be at most {len(devices)}, all that are {where}, found {count}; set --devices')
  devices = devices[:count]
  kind = devices[0].device_kind
  detail = topology or (cpu_name() if devices[0].platform == 'cpu' else '')
  return Target(f'{len(devices)} x {kind}' + (f' ({detail})' if detail else ''), devices, topology)


def _divide_cpu(count: int) -> None:
  try:
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError:  # jax has made its devices already.
    return
