"""Stopping on request: the first SIGINT, SIGTERM or preemption notice is remembered, a second signal acts at once."""

import ctypes
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = 'a preemption notice'

_SAME = 1.0  # Seconds in which further signals are the same request: a launcher and a terminal both send one to all.


class StopRequest:
  """A context in which the first SIGINT or SIGTERM sets `received` to the signal's name and does nothing else.

  Outside the main thread, where Python cannot handle signals, nothing is ever received.

  Under jax.distributed the first one is passed to jax, which takes it for a preemption notice, tells every process of
  it, and agrees with them on the step after which all of them stop. One that comes a second later ends this process.
  """

  def __init__(self):
    self.received: str | None = None
    self._together = jax.distributed.is_initialized()
    self._of_jax: _Disposition | None = None
    self._acts: threading.Timer | None = None
    self._previous = {}

  def __enter__(self) -> 'StopRequest':
    if threading.current_thread() is threading.main_thread():
      self._of_jax = _Disposition() if self._together else None
      handle = self._pass_on if self._together else self._remember
      self._previous = {number: signal.signal(number, handle) for number in SIGNALS}
    return self

  def __exit__(self, *unused) -> None:
    if self._acts is not None:
      self._acts.cancel()
      self._acts.join()
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
    self.received = signal.Signals(number).name

  def _pass_on(self, number: int, frame: FrameType | None) -> None:
    if self._acts is None:
      self._of_jax.call()
      # Not by Python, whose handlers wait for as long as the main thread does in a step that hangs.
      self._acts = threading.Timer(_SAME, _let_signals_act)
      self._acts.daemon = True
      self._acts.start()

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      # None: not Python's, but jax's of SIGTERM. After a request the process is at its end, and another one acts.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if self._of_jax is not None and self._acts is None:
      self._of_jax.restore()
    self._previous = {}


class _Disposition:
  """What C does on SIGTERM: jax's own handler, which Python neither sees nor can call."""

  def __init__(self):
    self._saved = ctypes.create_string_buffer(512)  # A struct sigaction, which begins with the handler's address.
    ctypes.CDLL(None).sigaction(int(signal.SIGTERM), None, self._saved)

  def call(self) -> None:
    """Does it. It only sets a flag, which a thread of jax looks at."""
    address = ctypes.c_void_p.from_buffer(self._saved).value
    if address and address != int(signal.SIG_IGN):
      ctypes.CFUNCTYPE(None, ctypes.c_int)(address)(int(signal.SIGTERM))

  def restore(self) -> None:
    """Puts it back."""
    ctypes.CDLL(None).sigaction(int(signal.SIGTERM), self._saved, None)


def _let_signals_act() -> None:
  library = ctypes.CDLL(None)
  library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
  library.signal.restype = ctypes.c_void_p
  for number in SIGNALS:
    library.signal(int(number), int(signal.SIG_DFL))
