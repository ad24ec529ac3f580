"""Stopping on request: the first signal or preemption notice is recorded, a second signal acts at once."""

import contextlib
import ctypes
import os
import signal
import stat
import sys
import threading
import time
from types import FrameType

import jax
from jax.experimental import multihost_utils

from paranet_jax.host.errors import discard_output
from paranet_jax.host.watch import set_c_handler

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOTICE = 'a preemption notice'

_PR_SET_PDEATHSIG = 1
_SAME = 1.0  # Seconds in which further signals are the same request: a launcher and a terminal both send one to all.


_open: list['StopRequest'] = []


def seconds_since_request() -> float | None:
  """How long ago an open `StopRequest` got a signal; None: it did not."""
  times = [stop.received_at for stop in _open if stop.received_at is not None]
  return time.monotonic() - min(times) if times else None


class Stopped(Exception):
  """Long work between two steps ended at once, because of a signal."""


class StopRequest:
  """A context in which the first SIGINT, SIGTERM or SIGHUP sets `received` to the signal's name and does nothing else.

  `received_at` is the time of the signal that reached this process.

  A SIGHUP that is ignored stays so, as under nohup.

  Outside the main thread, where Python cannot handle signals, nothing is ever received.

  Under jax.distributed the first signal is raised again for jax's own handler of SIGTERM, which takes it for a
  preemption notice: jax then agrees with all processes on the step after which they stop. A signal that comes a second
  later ends this process.
  """

  def __init__(self):
    self.received: str | None = None
    self.received_at: float | None = None
    self._together = jax.distributed.is_initialized()
    self._jax_handler: int | None = None
    self._acts: threading.Timer | None = None
    self._previous = {}

  def __enter__(self) -> 'StopRequest':
    if threading.current_thread() is threading.main_thread():
      if self._together:
        # Python neither sees nor can restore a handler that was installed in C++.
        self._jax_handler = set_c_handler(signal.SIGTERM, None)
      handle = self._pass_on if self._together else self._remember
      self._previous = {number: signal.signal(number, handle) for number in _heeded()}
    _open.append(self)
    return self

  def __exit__(self, *unused) -> None:
    _open.remove(self)
    if self._acts is not None:
      self._acts.cancel()
      self._acts.join()
    self._restore()

  def requested(self, step: int) -> bool:
    """Whether to stop before another step; every process asks before every step.

    Args:
      step: steps done.
    """
    if self._together and self.received is None and multihost_utils.reached_preemption_sync_point(step):
      self.received = NOTICE
    return self.received is not None

  def check(self) -> None:
    """For long work between two steps: raises Stopped after a signal; processes that agree on a step go on to that."""
    if self.received is not None:
      raise Stopped

  def _remember(self, number: int, frame: FrameType | None) -> None:
    _outlive_parent()
    self._restore()
    self.received_at = time.monotonic()
    if number == signal.SIGHUP:
      _leave_terminal()
    self.received = signal.Signals(number).name

  def _pass_on(self, number: int, frame: FrameType | None) -> None:
    if number == signal.SIGHUP:
      _leave_terminal()
    if self._acts is None:
      self.received_at = time.monotonic()
      set_c_handler(signal.SIGTERM, self._jax_handler)
      signal.raise_signal(signal.SIGTERM)
      # Not a handler in Python: it would wait as long as the main thread does in a step that hangs.
      self._acts = threading.Timer(_SAME, _let_signals_act)
      self._acts.daemon = True
      self._acts.start()

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      # None stands for jax's handler of SIGTERM. After a request the process is about to end, and another one acts.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if self._jax_handler is not None and self._acts is None:
      set_c_handler(signal.SIGTERM, self._jax_handler)
    self._previous = {}


def _let_signals_act() -> None:
  for number in _heeded():
    set_c_handler(number, None)


def _heeded() -> list[signal.Signals]:
  return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def _outlive_parent() -> None:
  """Lets what started this process end: the end of a queue would send a second signal (see its `child.py`)."""
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)


def _leave_terminal() -> None:
  """Discards what would be written to the terminal, where it fails once the terminal is gone."""
  for descriptor in (1, 2):
    with contextlib.suppress(OSError):
      if stat.S_ISCHR(os.fstat(descriptor).st_mode):
        discard_output(descriptor)
