"""The devices that a run is planned for: those of this machine, measured, or TPUs elsewhere, as published."""

import contextlib
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from paranet_jax.host.errors import UserError
from paranet_jax.host.machine import Device, cpu_name, device_memory

INSTALL = 'pip install -r requirements-tpu.txt'

_WITHOUT_TPU = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
}
"""What libtpu requires on a machine without a TPU, whichever TPU it then compiles for."""
_MOST_HERE = 512  # A CPU starts threads for each.
_DOCS = 'https://docs.cloud.google.com/tpu/docs'


class Chip(NamedTuple):
  """A chip, which JAX sees as one device.

  Attributes:
    memory: bytes.
    flops: peak floating-point operations per second; for a TPU in bfloat16, which it also uses for float32 products
      by default.
    bandwidth: bytes per second to and from main memory.
    links: bytes per second that it sends to its neighbors while receiving as many; None: devices of one machine.
    source: where the numbers come from.
    clock: core cycles per second, where `flops` and the published number of multipliers determine it.
    topology_options: libtpu options that make a chip one device.
  """

  memory: float
  flops: float
  bandwidth: float
  links: float | None
  source: str
  clock: float | None = None
  topology_options: tuple[tuple[str, str], ...] = ()


CHIPS = {
  # links: the all-reduce bandwidth of a pod over its 4,096 chips. clock: 2 cores of 4 multipliers of 128 x 128.
  'v4': Chip(
    32 * 2**30, 275e12, 1200e9, 1.1e15 / 4096, f'{_DOCS}/v4', 275e12 / 2**18, (('chip_config_name', 'megacore'),)
  ),
  # links: half of 400 GB/s in both directions. clock: a core of 4 multipliers.
  'v5e': Chip(16e9, 197e12, 819e9, 200e9, f'{_DOCS}/v5e', 197e12 / 2**17),
  # links: half of 4,800 Gbit/s. clock: 2 cores of 4 multipliers.
  'v5p': Chip(95e9, 459e12, 2765e9, 300e9, f'{_DOCS}/v5p', 459e12 / 2**18),
  # links: half of 800 GB/s.
  'v6e': Chip(32e9, 918e12, 1638e9, 400e9, f'{_DOCS}/v6e'),
}
"""By the prefix of the topology name; `source` is the page that publishes the numbers."""


_SIDE, _SIZE = 2048, 2**26  # Large enough that starting a computation does not count.


def measured_chip(device: Device, count: int) -> Chip:
  """Measures one of `count` equal devices of this machine; CPU devices each get an equal share.

  It times a product of 2,048 x 2,048 matrices and a pass over 256 MB, both float32.
  """
  shapes = (_SIDE, _SIDE), (_SIZE,)
  matrix, vector = (jax.device_put(jnp.ones(shape, jnp.float32), device) for shape in shapes)
  shared = count if device.platform == 'cpu' else 1
  product = _seconds(jax.jit(jnp.matmul), matrix, matrix)
  copy = _seconds(jax.jit(lambda x: x + 1), vector)
  return Chip(
    memory=device_memory(device) / shared,
    flops=2 * _SIDE**3 / product / shared,
    bandwidth=2 * vector.nbytes / copy / shared,
    links=None,
    source='measured now: a product of 2,048 x 2,048 float32 matrices and a pass over 256 MB',
  )


def _seconds(function: Callable, *arguments: jax.Array) -> float:
  """The fastest of a few calls."""
  best = float('inf')
  for _ in range(4):  # The first one compiles.
    started = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    best = min(best, time.perf_counter() - started)
  return best


class Target(NamedTuple):
  """Devices with a readable name; `topology` is None where they are on this machine and can run a step."""

  name: str
  devices: list[Device]
  topology: str | None

  @property
  def here(self) -> bool:
    """Whether the devices can run a step."""
    return self.topology is None

  def chip(self) -> Chip:
    """The chip behind each device: as published, or measured now."""
    if self.topology is not None:
      return split_topology(self.topology)[0]
    return measured_chip(self.devices[0], len(self.devices))


def choose_target(topology: str | None, count: int | None) -> Target:
  """The devices to plan for. Call it before JAX is used.

  Args:
    topology: a TPU slice such as v5e:2x2; None: the devices of this machine.
    count: how many of them; a CPU is divided into that many devices; None: all.

  Raises:
    UserError: the topology does not exist, or has fewer devices.
  """
  fix = 'set --devices or --config.train.devices'
  if topology is None and count is not None:
    if count > _MOST_HERE:
      raise UserError(f'expected at most {_MOST_HERE} devices of this machine, found {count}; {fix}')
    with contextlib.suppress(RuntimeError):  # JAX has created its devices already.
      jax.config.update('jax_num_cpu_devices', count)
  devices = jax.local_devices() if topology is None else topology_devices(topology)
  if count is not None and count > len(devices):
    where = 'this machine' if topology is None else topology
    raise UserError(f'expected at most {len(devices)} devices, the number in {where}, found {count}; {fix}')
  devices = devices[:count]
  kind = devices[0].device_kind
  detail = topology or (cpu_name() if devices[0].platform == 'cpu' else '')
  return Target(f'{len(devices)} x {kind}' + (f' ({detail})' if detail else ''), devices, topology)


def has_libtpu() -> bool:
  """Whether the compiler for TPUs is installed."""
  return importlib.util.find_spec('libtpu') is not None


def split_topology(name: str) -> tuple[Chip, int]:
  """The chip and the number of chips of a topology such as `v5e:4x4`.

  Raises:
    UserError: the name has another form, or the chip is unknown.
  """
  chip, _, shape = name.partition(':')
  dims = 3 if chip in ('v4', 'v5p') else 2
  if chip not in CHIPS or not re.fullmatch(rf'[1-9]\d*(x[1-9]\d*){{{dims - 1}}}', shape):
    known = ', '.join(f'{known}:{"2x2x1" if known in ("v4", "v5p") else "2x2"}' for known in CHIPS)
    raise UserError(f"expected a topology of a chip and a slice shape, such as {known}, found '{name}'; set --topology")
  return CHIPS[chip], math.prod(map(int, shape.split('x')))


def topology_devices(name: str) -> list[Device]:
  """Devices to compile for, one per chip, on a machine that may lack them. Call it before JAX is used.

  Raises:
    UserError: libtpu is missing, or does not know the topology.
  """
  chip, count = split_topology(name)
  if not has_libtpu():
    raise UserError(f'compiling for {name} needs libtpu, found none; {INSTALL}')
  os.environ.update(_WITHOUT_TPU)
  jax.config.update('jax_platforms', 'cpu')  # Leaves a TPU of this machine to other processes.
  from jax.experimental import topologies

  options: dict[str, Any] = dict(chip.topology_options)
  if count == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)
  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices)
  except RuntimeError as error:
    reason = ' '.join(str(error).split())
    raise UserError(f"libtpu does not know topology '{name}' ({reason}); set --topology, such as v5e:2x2") from error
