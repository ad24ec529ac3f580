"""What the package is compared with.

The functions that make a PyTorch peer are for a process of its own: no PyTorch user has what ours sets in its process,
huge pages above all, so a peer runs as PyTorch comes. One peer has them too, to show what they are worth there.
"""

import importlib.util
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
    bfloat16: under autocast, so that products are in bfloat16.
    compiled: by torch.compile in this mode; '': not at all.
  """

  pool_first: bool = False
  huge_pages: bool = False
  bfloat16: bool = False
  compiled: str = ''


PACKAGES = ('torch', 'onnxruntime', 'openvino', 'earlyon')
"""Whose versions stand in every result, where they are installed."""
EAGER = 'eager'
"""Of the headlines: channels_last, transitions that convolve and then pool, as DenseNet's code does."""
COMPILED = 'compile'
OURS_BFLOAT16 = 'ours_bfloat16'
"""Ours with `model.dtype=bfloat16!`, beside ours in float32."""
LINEN = 'linen'
TORCH_PEERS = {
  EAGER: TorchPeer(),
  'eager_pool_first': TorchPeer(pool_first=True),
  'eager_huge_pages': TorchPeer(huge_pages=True),
  'eager_bfloat16': TorchPeer(bfloat16=True),
  'eager_everything': TorchPeer(pool_first=True, huge_pages=True, bfloat16=True),
  COMPILED: TorchPeer(compiled='default'),
  'compile_everything': TorchPeer(
    pool_first=True, huge_pages=True, bfloat16=True, compiled='max-autotune-no-cudagraphs'
  ),
}
"""'everything' is what a user would find who tries it all: transitions that pool first, huge pages and bfloat16."""


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
  options = {'compiled': peer.compiled, 'bfloat16': peer.bfloat16}
  return torch_paranet().forward(_torch_network(peer, variables), exits, **options)


def torch_step(
  peer: TorchPeer, variables: dict[str, Any], images: np.ndarray, labels: np.ndarray, optimizer: dict[str, Any]
) -> Callable[[], None]:
  """A function that trains the peer for one step more, from the package's variables on one batch."""
  network = _torch_network(peer, variables)
  options = {'compiled': peer.compiled, 'bfloat16': peer.bfloat16}
  return torch_paranet().training_step(network, images, labels, optimizer, **options)


def _torch_network(peer: TorchPeer, variables: dict[str, Any]) -> Any:
  return torch_paranet().torch_network(variables, pool_first=peer.pool_first)
