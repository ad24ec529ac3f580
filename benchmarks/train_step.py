"""Images a second of the training step, ours and PyTorch's in turn.

Ours is the package's own step on uint8 images: it takes the batch out of the data set, normalizes, crops and mirrors
it, and counts the metrics. Theirs is given one batch, normalized and in place; it runs forward, the sum of the three
cross-entropies, backward and SGD. What differs favours theirs.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from benchmarks import cli, network, peers, report
from benchmarks.network import Size
from benchmarks.timing import in_turn
from benchmarks.two_devices import two_device_step

SCALING = {'layers': (8, 32), 'growth_rate': (6, 24), 'side': (16, 64), 'batch': (16, 256)}
"""What `--scaling` changes, one at a time."""

Step = Callable[[], None]


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  parser = cli.Parser(__doc__, sharers=2)
  parser.add_rounds(7)
  parser.add_seconds()
  parser.add_peers()
  parser.add_argument('--scaling', action='store_true', help='also how the time of a step grows with each of the sizes')
  return cli.run(parser, measure, argv)


def measure(options: argparse.Namespace) -> dict[str, Any]:
  """`ours`, `theirs` and `ratio` in images a second, and `rows`."""
  size = options.size
  steps = {'ours': our_step(size)}
  steps |= {name: torch_step(size, *made) for name, made in peers.torch_peers(options.peer).items()}
  if options.linen:
    steps[peers.LINEN] = our_step(size, network.linen_network)
  with two_device_step(size) as two_devices:
    seconds = timed('training step', steps | {'two devices': two_devices}, options)
  two = {'ours': seconds.pop('two devices'), peers.EAGER: seconds[peers.EAGER]}
  rows = report.compare('training step', seconds, unit='images/s', batch=size.batch)
  rows += report.compare('training step, two CPU devices', two, unit='images/s', batch=size.batch)
  if options.scaling:
    base = {name: seconds[name] for name in ('ours', peers.EAGER)}
    rows += report.compare('time of a step', base, unit='ms', batch=size.batch)
    for field, values in SCALING.items():
      for value in values:
        rows += changed(size, field, value, options)
  return report.headline(rows)


def changed(size: Size, field: str, value: int, options: argparse.Namespace) -> list[dict[str, Any]]:
  """The row of the time of a step where one field of the size has another value."""
  size = dataclasses.replace(size, **{field: value})
  what = f'time of a step, {field} {value}'
  seconds = timed(what, {'ours': our_step(size), peers.EAGER: torch_step(size)}, options)
  return report.compare(what, seconds, unit='ms', batch=size.batch)


def timed(what: str, steps: Mapping[str, Step], options: argparse.Namespace) -> dict[str, float]:
  """Seconds a step of each."""
  cli.progress(f'{what}: {", ".join(steps)} ...')
  return in_turn(steps, options.rounds, options.seconds)


def our_step(size: Size, make_network: Callable[[Size], Any] = network.our_network) -> Step:
  """The package's step on one device, around its own network or another."""
  return network.our_training_step(make_network(size), size, network.random_state(size), jax.devices()[:1])


def torch_step(size: Size, pool_first: bool = False, compiled: bool = False) -> Step:
  """The peer's step."""
  torch_paranet = peers.torch_peer()
  theirs = torch_paranet.torch_network(network.random_variables(size), pool_first=pool_first)
  images, labels = network.random_images(size, size.batch), network.random_labels(size.batch)
  return torch_paranet.training_step(theirs, images, labels, network.TORCH_SGD, compiled=compiled)


if __name__ == '__main__':
  sys.exit(main())
