"""Images a second of the forward pass in inference mode, and milliseconds for one image, ours and PyTorch's in turn.

Both are given normalized images, and the same random weights and running statistics; that their logits agree is
checked first. Every exit is computed alone, with what it needs and nothing else, and all of them together. Ours, in
float32 and in bfloat16, and each PyTorch peer run in a process of their own, with the defaults of either, and only
while they have their turn.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cli, network, peers, report
from benchmarks.network import Size
from benchmarks.own_process import own_process
from benchmarks.timing import in_turn
from paranet_jax.host.machine import use_compilation_cache
from paranet_jax.models.registry import INSISTED

EXITS = (1, 2, 3)
TOLERANCE = 1e-4
BFLOAT16_TOLERANCE = 0.1
"""Of those that compute in bfloat16, relative to the largest logit."""

Forward = Callable[[np.ndarray], list]


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  parser = cli.Parser(__doc__)
  parser.add_rounds(7)
  parser.add_seconds()
  parser.add_peers()
  return cli.run(parser, measure, argv)


def measure(options: argparse.Namespace) -> dict[str, Any]:
  """`ours`, `theirs` and `ratio` in images a second, all exits; `logit_difference`, the largest; and `rows`."""
  size = options.size
  peers.require_torch()
  rows, differences = [], []
  for exit in (None, *EXITS):
    cli.progress(f'forward pass, {f"exit {exit} alone" if exit else "all exits"} ...')
    batch = network.random_images(size, size.batch)
    with make_forwards(size, (exit,) if exit else EXITS, options) as forwards:
      differences.append(check_logits(forwards, batch))
      for what, images, unit in (('forward pass', batch, 'images/s'), ('one image', batch[:1], 'ms')):
        seconds = in_turn(forwards, options.rounds, options.seconds, (images,))
        rows += report.compare(what, seconds, unit=unit, batch=len(images), exit=exit)
  return report.headline(rows) | {'logit_difference': max(differences)}


@contextlib.contextmanager
def make_forwards(size: Size, exits: tuple[int, ...], options: argparse.Namespace) -> Iterator[dict[str, Forward]]:
  """'ours', in both types, and every peer; the linen baseline for all exits only, since it is slow to compile."""
  variables, forwards = network.random_variables(size), {}
  with contextlib.ExitStack() as processes:
    for name, dtype in (('ours', 'float32'), (peers.OURS_BFLOAT16, INSISTED)):
      forwards[name] = processes.enter_context(own_process(name, our_forward, size, variables, exits, dtype))
    for name, peer in peers.torch_peers(options.peer).items():
      process = own_process(name, peers.torch_forward, peer, variables, exits, huge_pages=peer.huge_pages)
      forwards[name] = processes.enter_context(process)
    if options.linen and exits == EXITS:
      forwards[peers.LINEN] = network.applied_forward(network.linen_network(size), variables, exits)
    yield forwards


def our_forward(size: Size, variables: dict[str, Any], exits: tuple[int, ...], dtype: str) -> Forward:
  """Ours as the commands run it, compiled programs kept: images to the logits of these exits, as NumPy arrays."""
  use_compilation_cache(None)
  forward = network.our_forward(network.our_network(size, dtype), variables, exits)
  return lambda images: [np.asarray(logits) for logits in forward(images)]


def check_logits(forwards: Mapping[str, Forward], images: np.ndarray) -> float:
  """The largest difference between our logits and those of a peer that computes in float32.

  Raises:
    RuntimeError: a peer's is larger than its tolerance: the two do not compute the same.
  """
  found = {name: np.concatenate(forward(images), axis=-1) for name, forward in forwards.items()}
  ours = found.pop('ours')
  differences = {name: float(np.abs(ours - theirs).max()) for name, theirs in found.items()}
  rough = {peers.OURS_BFLOAT16, *(name for name, peer in peers.TORCH_PEERS.items() if peer.bfloat16)}
  for name, difference in differences.items():
    most = BFLOAT16_TOLERANCE * float(np.abs(ours).max()) if name in rough else TOLERANCE
    if not difference <= most:
      raise RuntimeError(f'the logits of {name} differ by {difference:.1e}, and by {most:.0e} at most was expected')
  return max(difference for name, difference in differences.items() if name not in rough)


if __name__ == '__main__':
  sys.exit(main())
