"""Images a second of the training step, ours and PyTorch's in turn.

Ours is the package's own step on uint8 images: it takes the batch out of the data set, normalizes, crops and mirrors
it, and counts the metrics. Theirs is given one batch, normalized and in place; it runs forward, the sum of the three
cross-entropies, backward and SGD. What differs favours theirs. Each PyTorch peer runs in a process of its own with
PyTorch's defaults, and so does our step on two CPU devices; each works only while it has its turn.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from benchmarks import cli, network, peers, report
from benchmarks.network import Size
from benchmarks.own_process import own_process
from benchmarks.timing import in_turn

SCALING = {'layers': (8, 32), 'growth_rate': (6, 24), 'side': (16, 64), 'batch': (16, 256)}
"""What `--scaling` changes, one at a time."""

TWO_DEVICES = 'two devices'

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
  peers.require_torch()
  steps = {'ours': our_step(size)}
  with contextlib.ExitStack() as processes:
    for name in peers.torch_peers(options.peer):
      steps[name] = processes.enter_context(torch_step(size, name))
    if options.linen:
      steps[peers.LINEN] = our_step(size, network.linen_network)
    steps[TWO_DEVICES] = processes.enter_context(own_process(TWO_DEVICES, two_device_step, size))
    seconds = timed('training step', steps, options)
  two = {'ours': seconds.pop(TWO_DEVICES), peers.EAGER: seconds[peers.EAGER]}
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
  with torch_step(size, peers.EAGER) as theirs:
    seconds = timed(what, {'ours': our_step(size), peers.EAGER: theirs}, options)
  return report.compare(what, seconds, unit='ms', batch=size.batch)


def timed(what: str, steps: Mapping[str, Step], options: argparse.Namespace) -> dict[str, float]:
  """Seconds a step of each."""
  cli.progress(f'{what}: {", ".join(steps)} ...')
  return in_turn(steps, options.rounds, options.seconds)


def our_step(size: Size, make_network: Callable[[Size], Any] = network.our_network) -> Step:
  """The package's step on one device, around its own network or another."""
  return network.our_training_step(make_network(size), size, network.random_state(size), jax.devices()[:1])


def torch_step(size: Size, name: str) -> contextlib.AbstractContextManager[Step]:
  """The step of a PyTorch peer, in its own process."""
  images, labels = network.random_images(size, size.batch), network.random_labels(size.batch)
  variables, peer = network.random_variables(size), peers.TORCH_PEERS[name]
  arguments = peer, variables, images, labels, network.TORCH_SGD
  return own_process(name, peers.torch_step, *arguments, huge_pages=peer.huge_pages)


def two_device_step(size: Size) -> Step:
  """The package's step on two CPU devices: for a process of its own, because devices are counted when jax starts."""
  jax.config.update('jax_num_cpu_devices', 2)
  devices = jax.devices()[:2]
  return network.our_training_step(network.our_network(size), size, network.random_state(size), devices)


if __name__ == '__main__':
  sys.exit(main())
