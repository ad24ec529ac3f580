"""Temporary memory of the compiled training step, an image: ours and the linen baseline's.

As XLA's `memory_analysis()` says, for one device: activations and whatever else the step needs beside its arguments
(state, images) and its results. Nothing is run.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from benchmarks import cli, network, peers, report
from benchmarks.network import Size


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  return cli.run(cli.Parser(__doc__), measure, argv)


def measure(options: argparse.Namespace) -> dict[str, Any]:
  """`temp_bytes_per_image`, `linen_temp_bytes_per_image`, their `ratio`, and `rows`."""
  size = options.size
  ours, linen = (temp_bytes_per_image(size, make) for make in (network.our_network, network.linen_network))
  row = report.row('temporary memory of the training step', peers.LINEN, ours, linen, 'bytes an image', size.batch)
  return {
    'temp_bytes_per_image': ours,
    'linen_temp_bytes_per_image': linen,
    'ratio': row['ratio'],
    'rows': [row],
  }


def temp_bytes_per_image(size: Size, make_network: Callable[[Size], Any]) -> float:
  """Compiles the training step around a network."""
  cli.progress(f'compiling {make_network.__name__} ...')
  state = jax.eval_shape(partial(network.random_state, size))
  step = network.compiled_step(make_network(size), jax.devices()[:1])
  return step.lower(*network.step_arguments(size, state)).compile().memory_analysis().temp_size_in_bytes / size.batch


if __name__ == '__main__':
  sys.exit(main())
