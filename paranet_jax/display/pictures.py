"""Pictures, which never stop a command, whatever is set for matplotlib."""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from paranet_jax.host.errors import UserError

_Drawn = TypeVar('_Drawn')


def drawn(draw: Callable[[], _Drawn]) -> _Drawn | str:
  """Returns draw(), which imports what draws with matplotlib; if that fails, a line that says why.

  Raises:
    UserError, OSError: what draw() reads or writes is wrong, or cannot be read or written.
  """
  try:
    _import_matplotlib()
  except Exception as error:  # A matplotlibrc that is not text, or may not be read.
    return _why(error)
  try:
    return draw()
  except (UserError, OSError):
    raise
  except Exception as error:
    return _why(error)


def _import_matplotlib() -> None:
  """Imports matplotlib without MPLBACKEND, as an unknown one fails the import; a known one is set afterwards."""
  backend = None if 'matplotlib' in sys.modules else os.environ.pop('MPLBACKEND', None)
  try:
    import matplotlib
  finally:
    if backend is not None:
      os.environ['MPLBACKEND'] = backend
  if backend:
    with contextlib.suppress(ValueError):
      matplotlib.rcParams['backend'] = backend


def _why(error: Exception) -> str:
  return f'not drawn: {" ".join(str(error).split()) or type(error).__name__}'
