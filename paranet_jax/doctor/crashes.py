"""Programs that crash some versions of jaxlib, each run in a process of its own."""

import multiprocessing
import signal

RANKS = {
  7: ((3, 1, 2, 2, 8, 8, 8), (3, 1, 2, 2, 8, 8, 8), 3),
  8: ((10, 4, 6, 1, 1, 1, 1, 1), (10, 4, 6, 9, 9, 9, 9, 2), 2),
}
"""Shapes and summed axis of jax issues 40412 and 39257, by number of axes."""

SECONDS = 60.0


def crash(rank: int) -> str | None:
  """How the sum of a product of arrays with so many axes fails on this machine; None: it does not."""
  process = multiprocessing.get_context('spawn').Process(target=sum_of_product, args=(rank,))
  process.start()
  process.join(SECONDS)
  if process.is_alive():
    process.kill()
    process.join()
    return f'took more than {SECONDS:.0f} seconds'
  code = process.exitcode or 0
  if code < 0:
    return f'ended by {signal.Signals(-code).name}'
  return f'exit code {code}' if code else None


def sum_of_product(rank: int) -> None:
  """Computes it.

  Raises:
    ArithmeticError: the result is wrong.
  """
  import jax  # Not in the process that only waits.
  import numpy as np

  first, second, axis = RANKS[rank]
  random = np.random.default_rng(0)
  a, b = (random.normal(size=shape).astype(np.float32) for shape in (first, second))
  found = jax.jit(lambda a, b: (a * b).sum(axis))(a, b)
  if not np.allclose(found, (a.astype(np.float64) * b).sum(axis), atol=1e-4):
    raise ArithmeticError(f'the sum of a product of arrays of {rank} axes is wrong')
