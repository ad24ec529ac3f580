"""Which backend a program is traced for, where that decides how something is computed."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

PLAIN = 'plain'
"""The platform of `compiling_for` for exporters: convolutions, pools and concatenations are one operation each."""

SHAPES = 'shapes'
"""The platform of `compiling_for` where only the shapes of the variables are wanted: what costs tracing is left out."""

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar('target', default=None)


def backend() -> str:
  """'cpu', 'gpu', 'tpu', `PLAIN` or `SHAPES`: the one of `compiling_for`, or else jax's own."""
  return _target.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
  """Within it, models are traced for a platform that is not here, to be compiled ahead of time."""
  token = _target.set(platform)
  try:
    yield
  finally:
    _target.reset(token)
