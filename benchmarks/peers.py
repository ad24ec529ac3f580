"""Whom the package is compared with."""

import os
from types import ModuleType

from paranet_jax.errors import UserError

EAGER = 'eager'
"""Of the headlines: channels_last, transitions that convolve and then pool, as DenseNet's code does."""
COMPILED = 'compile'
LINEN = 'linen'


def torch_peers(peer: str) -> dict[str, tuple[bool, bool]]:
  """The PyTorch peers by name, each as (pool_first, compiled); `peer` is 'eager' or 'compile'."""
  peers = {EAGER: (False, False), 'eager_pool_first': (True, False)}
  return peers | ({COMPILED: (False, True)} if peer == 'compile' else {})


def torch_peer() -> ModuleType:
  """The module `torch_paranet`, PyTorch given all cores.

  Raises:
    UserError: PyTorch is missing.
  """
  try:
    import torch
  except ModuleNotFoundError as error:
    raise UserError('expected PyTorch, found none; pip install -r benchmarks/requirements.txt') from error
  from benchmarks import torch_paranet

  torch.set_num_threads(available_cores())
  return torch_paranet


def available_cores() -> int:
  """CPU cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
