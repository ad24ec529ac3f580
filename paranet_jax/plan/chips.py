"""What a device has: of TPUs as published, of the device that is here as measured."""

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

_DOCS = 'https://docs.cloud.google.com/tpu/docs'


class Chip(NamedTuple):
  """A chip, which is one device of jax's.

  Attributes:
    memory: bytes.
    flops: floating-point operations a second, at most; of a TPU in bfloat16, in which it also multiplies float32
      unless told otherwise.
    bandwidth: bytes a second to and from main memory.
    links: bytes a second that it sends to its neighbours while it receives as many; None: devices of one machine.
    source: where the numbers are from.
    clock: cycles a second of its core, where `flops` and the published number of multipliers give it.
    topology_options: what libtpu must be told so that a chip is one device.
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
"""By the name that a topology begins with, as published on the page named in `source`."""


def measured_chip(device: jax.Device, count: int) -> Chip:
  """What one of `count` equal devices of this machine has: its share of what one of them reaches alone.

  A product of 2,048 x 2,048 matrices and a pass over 256 MB, both float32; CPU devices share the memory.
  """
  side, size = 2048, 2**26
  matrix, vector = (jax.device_put(jnp.ones(shape, jnp.float32), device) for shape in ((side, side), (size,)))
  shared = count if device.platform == 'cpu' else 1
  product = _seconds(jax.jit(jnp.matmul), matrix, matrix)
  copy = _seconds(jax.jit(lambda x: x + 1), vector)
  return Chip(
    memory=_memory(device) / shared,
    flops=2 * side**3 / product / shared,
    bandwidth=2 * vector.nbytes / copy / shared,
    links=None,
    source='measured now: a product of 2,048 x 2,048 float32 matrices and a pass over 256 MB',
  )


def _seconds(function: Callable, *arguments: jax.Array) -> float:
  """The best of a few calls."""
  best = float('inf')
  for _ in range(4):  # The first one compiles.
    started = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    best = min(best, time.perf_counter() - started)
  return best


def _memory(device: jax.Device) -> float:
  if device.platform == 'cpu':
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  return device.memory_stats()['bytes_limit']
