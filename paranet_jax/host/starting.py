"""What a command does first, before it imports anything large."""

import gc
import time

from paranet_jax.host.huge_pages import use_huge_pages

BEGAN = time.time()
"""When this process began to run code of this package."""

_FEW = (50_000, 20, 100)
"""Thresholds of the collector of reference cycles: with Python's, it took a seventh of the time of a start."""
_state = {'command': False}


def begin() -> None:
  """Starts a command; call it first in its main module, because it may restart the program (see `huge_pages`)."""
  use_huge_pages()
  gc.set_threshold(*_FEW)
  _state['command'] = True


def is_command() -> bool:
  """Whether this process is a command of ours, and not a user's own program."""
  return _state['command']
