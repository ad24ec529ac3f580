"""Whom the package is compared with.

The functions that make a PyTorch peer are for a process of its own: no PyTorch user has what ours sets in its process,
huge pages above all, so a peer runs as PyTorch comes. One peer has them too, to show what they are worth there.
"""

import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from paranet_jax.host.errors import UserError


class TorchPeer(NamedTuple):
  """How a PyTorch peer differs from the plain one.

  Attributes:
    pool_first: transitions pool, then convolve.
    huge_pages: glibc asks for huge pages, as in our process.
    compiled: by torch.compile.
  """

  pool_first: bool = False
  huge_pages: bool = False
  compiled: bool = False


EAGER = 'eager'
"""Of the headlines: channels_last, transitions that convolve and then pool, as DenseNet's code does."""
COMPILED = 'compile'
LINEN = 'linen'
TORCH_PEERS = {
  EAGER: TorchPeer(),
  'eager_pool_first': TorchPeer(pool_first=True),
  'eager_huge_pages': TorchPeer(huge_pages=True),
  COMPILED: TorchPeer(compiled=True),
}


def torch_peers(peer: str) -> dict[str, TorchPeer]:
  """The PyTorch peers by name; `peer` is 'eager' or 'compile'."""
  return {name: torch_peer for name, torch_peer in TORCH_PEERS.items() if peer == COMPILED or not torch_peer.compiled}


def require_torch() -> None:
  """Looks for PyTorch without loading it into this process.

  Raises:
    UserError: PyTorch is missing.
  """
  if importlib.util.find_spec('torch') is None:
    raise UserError('expected PyTorch, found none; pip install -r benchmarks/requirements.txt')


def torch_paranet() -> ModuleType:
  """The module `torch_paranet`, which loads PyTorch."""
  from benchmarks import torch_paranet

  return torch_paranet


def torch_forward(
  peer: TorchPeer, variables: dict[str, Any], exits: tuple[int, ...]
) -> Callable[[np.ndarray], list[np.ndarray]]:
  """The peer's forward pass in inference mode with the package's variables: images to the logits of these exits."""
  return torch_paranet().forward(_torch_network(peer, variables), exits, compiled=peer.compiled)


def torch_step(
  peer: TorchPeer, variables: dict[str, Any], images: np.ndarray, labels: np.ndarray, optimizer: dict[str, Any]
) -> Callable[[], None]:
  """A function that trains the peer for one step more, from the package's variables on one batch."""
  network = _torch_network(peer, variables)
  return torch_paranet().training_step(network, images, labels, optimizer, compiled=peer.compiled)


def _torch_network(peer: TorchPeer, variables: dict[str, Any]) -> Any:
  return torch_paranet().torch_network(variables, pool_first=peer.pool_first)


def available_cores() -> int:
  """CPU cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
