"""Watches the processes of a run: when one dies, the others say which one and end.

jax's own heartbeat is not enough: it notices a killed process only after the timeout, and then aborts the others with a
long log that names a number. Here every process holds a connection to process 0, which passes the news on: the system
closes the connections of a process that dies, however it dies, and a machine that dies misses heartbeats.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import Future
from typing import NamedTuple, NoReturn

from paranet_jax.host.errors import say

_GRACE = 1.0  # Seconds for this process to report its own error first: often all processes fail alike.


class Place(NamedTuple):
  """A process's position as given by flags; all None if the cluster's environment gives it or the process is alone."""

  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None


@dataclasses.dataclass(frozen=True)
class Member:
  """One process of a run."""

  index: int
  host: str
  pid: int

  def ended(self, count: int, failed: bool) -> str:
    """The message that it has ended, after reporting an error (`failed`) or without a word."""
    who = f'process {self.index} of {count} (host {self.host}, pid {self.pid})'
    if failed:
      return f'{who} reported an error and has ended, and so all end'
    return f'{who} is gone, and so all end; start all of them again: the run resumes from its last checkpoint'


class Watch:
  """The connections of this process, each read by a thread; process 0 has one to every other.

  Args:
    index: of this process.
    count: of all processes.
    heartbeat_timeout: seconds without a heartbeat after which a process counts as dead.
  """

  def __init__(self, index: int, count: int, heartbeat_timeout: float):
    self._me = Member(index, socket.gethostname(), os.getpid())
    self._count = count
    self._timeout = heartbeat_timeout
    self._connections: list[socket.socket] = []
    self._leaving = False
    self._ending = threading.Lock()
    _hold_aborts()

  def listen(self) -> int:
    """Accepts the other processes in the background; returns the port."""
    server = socket.create_server(('', 0), backlog=self._count)
    self._start(self._accept, server)
    self._start(self._beat)
    return server.getsockname()[1]

  def connect(self, hosts: list[str], port: int) -> bool:
    """Connects to process 0 at the first of its names that answers; False if none does.

    It has answered when it has told who it is: from then on its death is noticed, and named.
    """
    for host in hosts:
      with contextlib.suppress(OSError):
        connection = socket.create_connection((host, port), timeout=10)
        if self._add(connection).result():
          self._start(self._beat)
          return True
        self._connections.remove(connection)
    return False

  def wait(self) -> None:
    """Gives the threads time to end this process, if it failed because another one died."""
    time.sleep(2 * _GRACE)

  def leave(self, done: bool) -> None:
    """Stops watching: from now on the death of another process does not end this one.

    Args:
      done: the run has finished. Otherwise this process has failed: the others are notified and get time to end.
    """
    self._leaving = True
    self._send('done' if done else 'failed')
    if not done:
      # jax would end the others with a long log as soon as process 0 is gone; they need 1.5 of these.
      time.sleep((4 if self._me.index == 0 else 0.5) * _GRACE)

  def _accept(self, server: socket.socket) -> None:
    while True:
      connection, _ = server.accept()
      with contextlib.suppress(OSError):
        self._add(connection)

  def _add(self, connection: socket.socket) -> Future[bool]:
    """Whether the other end tells who it is, which it must before the timeout of heartbeats."""
    connection.settimeout(self._timeout)
    connection.sendall(f'{self._me.index} {self._me.host} {self._me.pid}\n'.encode())
    self._connections.append(connection)
    told: Future[bool] = Future()
    self._start(self._read, connection, told)
    return told

  def _start(self, act, *arguments) -> None:
    threading.Thread(target=act, args=arguments, daemon=True).start()

  def _beat(self) -> None:
    while True:
      time.sleep(self._timeout / 4)
      self._send('alive')

  def _send(self, line: str) -> None:
    for connection in self._connections:
      with contextlib.suppress(OSError):
        connection.sendall(f'{line}\n'.encode())

  def _read(self, connection: socket.socket, told: Future[bool]) -> None:
    member, failed = None, False
    # ValueError: a stranger, not one of our processes.
    with contextlib.suppress(OSError, ValueError), connection.makefile(encoding='utf-8') as lines:
      index, host, pid = lines.readline().split()
      member = Member(int(index), host, int(pid))
      told.set_result(True)
      for line in lines:
        what, _, rest = line.strip().partition(' ')
        if what == 'done':
          return
        if what == 'end':
          self._end(rest)
        if what == 'failed':
          failed = True
          break
    if member is None:
      told.set_result(False)
    else:
      time.sleep(_GRACE)
      self._end(member.ended(self._count, failed))

  def _end(self, reason: str) -> NoReturn | None:
    with self._ending:
      if self._leaving:
        return
      self._send(f'end {reason}')
      say(f'error: {reason}', to_stderr=True)
      time.sleep(_GRACE / 2)  # Time for the others to read it, before jax aborts them for a missing coordinator.
      os._exit(1)


def _hold_aborts() -> None:
  """Delays an abort by six seconds.

  Without process 0, the coordinator, jax aborts the others at once, from one of its threads, and has no setting
  against it; in those seconds the watch reports who died. The handler is C's `sleep`: it gets the number of the signal,
  which is 6, and sleeps so many seconds in the thread that aborts, while Python's threads continue.
  """
  if sys.platform == 'linux':
    import ctypes

    library = ctypes.CDLL(None)
    set_c_handler(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p).value)


def set_c_handler(number: signal.Signals, handler: int | None) -> int | None:
  """Sets a handler as C does, from any thread; returns the one before.

  Args:
    handler: address of a C function; None: the default action.
  """
  import ctypes  # Not for the command line, which imports this file.

  library = ctypes.CDLL(None)
  library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
  library.signal.restype = ctypes.c_void_p
  return library.signal(int(number), handler)
