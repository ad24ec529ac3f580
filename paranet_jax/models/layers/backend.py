"""The backend that a program is traced for, where layers choose an implementation by it."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

PLAIN = 'plain'
"""Platform of `compiling_for` for exporters: each convolution, pool and concatenation is a single operation."""

SHAPES = 'shapes'
"""Platform of `compiling_for` to get only the variables' shapes: expensive tracing is skipped."""

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar('target', default=None)


def backend() -> str:
  """The platform given to `compiling_for`, or jax's default backend: 'cpu', 'gpu', 'tpu', `PLAIN` or `SHAPES`."""
  return _target.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
  """Traces models for another platform within the context, such as for ahead-of-time compilation."""
  token = _target.set(platform)
  try:
    yield
  finally:
    _target.reset(token)


@contextlib.contextmanager
def plain_operations() -> Iterator[None]:
  """Traces with the operations that exporters support; flax's pools divide by an integer, so types are promoted."""
  with compiling_for(PLAIN), jax.numpy_dtype_promotion('standard'):
    yield
