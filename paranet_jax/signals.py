"""Stopping on request: the first SIGINT, SIGTERM or preemption notice is remembered, a second signal acts at once."""

import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = 'a preemption notice'


class StopRequest:
  """A context in which the first SIGINT or SIGTERM sets `received` to the signal's name and does nothing else.

  Outside the main thread, where Python cannot handle signals, nothing is ever received.

  Under jax.distributed SIGTERM is left to jax, which takes it for a preemption notice, tells every process of it, and
  agrees with them on the step after which all of them stop; SIGINT becomes one.
  """

  def __init__(self):
    self.received: str | None = None
    self._together = jax.distributed.is_initialized()
    self._previous = {}

  def __enter__(self) -> 'StopRequest':
    if threading.current_thread() is threading.main_thread():
      handled = (signal.SIGINT,) if self._together else SIGNALS
      self._previous = {number: signal.signal(number, self._remember) for number in handled}
    return self

  def __exit__(self, *unused) -> None:
    self._restore()

  def requested(self, step: int) -> bool:
    """Whether to stop before another step; all processes ask before every one.

    Args:
      step: steps done.
    """
    if self._together and self.received is None and multihost_utils.reached_preemption_sync_point(step):
      self.received = NOTICE
    return self.received is not None

  def _remember(self, number: int, frame: FrameType | None) -> None:
    self._restore()
    if self._together:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self.received = signal.Signals(number).name

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}
