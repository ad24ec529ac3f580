"""Stopping on request: the first SIGINT or SIGTERM is remembered, the second acts at once."""

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
  """A context in which the first SIGINT or SIGTERM sets `received` to the signal's name and does nothing else.

  Outside the main thread, where Python cannot handle signals, nothing is ever received.
  """

  def __init__(self):
    self.received: str | None = None
    self._previous = {}

  def __enter__(self) -> 'StopRequest':
    if threading.current_thread() is threading.main_thread():
      self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
    return self

  def __exit__(self, *unused) -> None:
    self._restore()

  def _remember(self, number: int, frame: FrameType | None) -> None:
    self.received = signal.Signals(number).name
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}
