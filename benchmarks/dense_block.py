"""A dense block's forward and backward pass by XLA and by the kernels in C++, in turn, and what the machine can do.

The blocks are the largest on each side of PN3-ddd. A block's rate counts the multiply-adds of its products, three times
those of the forward pass; the machine's are a large product and a copy in memory.
"""

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cli
from benchmarks.timing import in_turn, seconds_of
from paranet_jax.host.errors import UserError
from paranet_jax.host.native import VARIABLE
from paranet_jax.models.layers import native_dense
from paranet_jax.models.layers.dense_block import SCAN_LAYERS, dense_block_training
from paranet_jax.models.numerics import drawn_layers

BN_SIZE = 4
DTYPES = ('float32', 'bfloat16')


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  parser = cli.Parser(__doc__)
  parser.add_rounds(5)
  parser.add_seconds()
  return cli.run(parser, measure, argv)


def measure(options: argparse.Namespace) -> dict[str, Any]:
  """`rows`, one for each block and type, and `rates` of the machine in GFLOP/s and GB/s.

  Raises:
    UserError: this machine does not use the kernels.
  """
  if why := native_dense.missing(native_dense.FEATURES):
    raise UserError(f'expected kernels in C++ to compare with, found {why}')
  size, rows = options.size, []
  added = size.layers * size.growth_rate
  for halvings, channels in ((1, 2 * size.growth_rate), (2, 2 * added + 4 * size.growth_rate)):
    rows += [row(options, size.side >> halvings, channels, dtype) for dtype in DTYPES]
  rows += [row(options, size.side >> 3, 6 * added + 8 * size.growth_rate, dtype) for dtype in DTYPES]
  return {'rows': rows, 'rates': rates()}


def row(options: argparse.Namespace, side: int, channels: int, dtype: str) -> dict[str, Any]:
  """Milliseconds of one block."""
  size = options.size
  what = f'{size.batch} x {side} x {side}, {channels} to {channels + size.layers * size.growth_rate} channels'
  cli.progress(f'{what}, {dtype} ...')
  arguments = block_arguments(size, side, channels, dtype)
  functions = {'xla': block('off', arguments), 'kernels': block('on', arguments)}
  seconds = in_turn(functions, options.rounds, options.seconds)
  width = BN_SIZE * size.growth_rate
  reads = sum(channels + i * size.growth_rate for i in range(size.layers))
  macs = size.batch * side**2 * (reads * width + size.layers * 9 * width * size.growth_rate)
  return {
    'what': what,
    'dtype': dtype,
    **{f'{name}_ms': 1e3 * value for name, value in seconds.items()},
    **{f'{name}_gflops': 6e-9 * macs / value for name, value in seconds.items()},
    'ratio': seconds['xla'] / seconds['kernels'],
  }


def block_arguments(size: Any, side: int, channels: int, dtype: str) -> tuple:
  """Input, layers and the gradient of the output, random."""
  random = np.random.default_rng(0)
  layers = jax.tree.map(jnp.asarray, drawn_layers(random, channels, size.layers, size.growth_rate, BN_SIZE))
  shape = size.batch, side, side
  x = jnp.asarray(random.normal(size=(*shape, channels)), dtype)
  return x, layers, jnp.asarray(random.normal(size=(*shape, channels + size.layers * size.growth_rate)), dtype)


def block(native: str, arguments: tuple) -> Callable[[], object]:
  """Forward and backward pass, compiled with this setting of the kernels."""

  @jax.jit
  def forward_and_backward(x, layers, weights):
    run = lambda x, layers: dense_block_training(x, layers, SCAN_LAYERS['cpu'], None)[0]  # noqa: E731
    values, backward = jax.vjp(run, x, layers)
    return values, backward(weights)

  before = os.environ.get(VARIABLE)
  os.environ[VARIABLE] = native
  try:
    compiled = forward_and_backward.lower(*arguments).compile()
  finally:
    os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})
  return lambda: jax.block_until_ready(compiled(*arguments))


def rates(side: int = 2048, megabytes: int = 256) -> dict[str, float]:
  """The best of several large products in GFLOP/s by type, and copies in GB/s read and written by 1 and 2 threads."""
  found = {}
  for dtype in DTYPES:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(side, side)), dtype)
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    function = lambda x=x, product=product: jax.block_until_ready(product(x))  # noqa: E731
    function()
    found[f'product_{dtype}'] = 2e-9 * side**3 / min(seconds_of(function, 1) for _ in range(20))
  source = np.ones(megabytes << 18, np.float32)
  target = np.ones_like(source)
  for threads in (1, 2):
    with ThreadPoolExecutor(threads) as pool:
      pairs = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
      function = lambda pool=pool, pairs=pairs: list(pool.map(lambda pair: np.copyto(*pair), pairs))  # noqa: E731
      found[f'copy_{threads}'] = 2e-9 * source.nbytes / min(seconds_of(function, 1) for _ in range(8))
  return found


if __name__ == '__main__':
  sys.exit(main())
