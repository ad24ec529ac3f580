"""Who of the processes of a run is there: when one is gone, the others say which and end.

jax ends them too, with a log of many lines that names a number, and of a process that was killed only when its
heartbeats have been missed. Here every process holds a connection to the first one, which tells the others: the system
closes the connections of a process that dies, however it dies, and of a machine that dies the heartbeats are missed.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from typing import NamedTuple, NoReturn

_GRACE = 1.0  # Seconds in which this process may come to its own end, with a better reason: often all fail alike.


class Member(NamedTuple):
  """One process of a run."""

  index: int
  host: str
  pid: int

  def ended(self, count: int, failed: bool) -> str:
    """Says that it has ended: with an error that it has told (`failed`), or without a word."""
    who = f'process {self.index} of {count} (host {self.host}, pid {self.pid})'
    if failed:
      return f'{who} has ended with an error that it has told, and so all end'
    return f'{who} is gone, and so all end; start all of them again: the run goes on from its last checkpoint'


class Watch:
  """The connections of this process, each read by a thread; the first process has one to every other.

  Args:
    index, count: of this process, and of all.
    heartbeat_timeout: seconds without a sign of life after which a process is gone.
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
    """Waits for the other processes, in the background; returns the port."""
    server = socket.create_server(('', 0), backlog=self._count)
    self._start(self._accept, server)
    self._start(self._beat)
    return server.getsockname()[1]

  def connect(self, hosts: list[str], port: int) -> bool:
    """Connects to the first process, at whichever of its names answers; False where none does."""
    for host in hosts:
      with contextlib.suppress(OSError):
        connection = socket.create_connection((host, port), timeout=10)
        self._add(connection)
        self._start(self._beat)
        return True
    return False

  def wait(self) -> None:
    """Gives the threads the time to end this process for another one's death, if that is why something failed."""
    time.sleep(2 * _GRACE)

  def leave(self, done: bool) -> None:
    """What becomes of the others no longer ends this process.

    Args:
      done: the run is at its end, so that the others miss nothing here; else they are told, and given the time to end.
    """
    self._leaving = True
    self._send('done' if done else 'failed')
    if not done:
      # jax would end the others with a long log as soon as the first process is gone; they need 1.5 of these.
      time.sleep((4 if self._me.index == 0 else 0.5) * _GRACE)

  def _accept(self, server: socket.socket) -> None:
    while True:
      connection, _ = server.accept()
      with contextlib.suppress(OSError):
        self._add(connection)

  def _add(self, connection: socket.socket) -> None:
    connection.settimeout(self._timeout)
    connection.sendall(f'{self._me.index} {self._me.host} {self._me.pid}\n'.encode())
    self._connections.append(connection)
    self._start(self._read, connection)

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

  def _read(self, connection: socket.socket) -> None:
    member, failed = None, False
    # Of what is no process of ours (ValueError) nothing is expected.
    with contextlib.suppress(OSError, ValueError), connection.makefile(encoding='utf-8') as lines:
      index, host, pid = lines.readline().split()
      member = Member(int(index), host, int(pid))
      for line in lines:
        what, _, rest = line.strip().partition(' ')
        if what == 'done':
          return
        if what == 'end':
          self._end(rest)
        if what == 'failed':
          failed = True
          break
    if member is not None:
      time.sleep(_GRACE)
      self._end(member.ended(self._count, failed))

  def _end(self, reason: str) -> NoReturn | None:
    with self._ending:
      if self._leaving:
        return
      self._send(f'end {reason}')
      print(f'error: {reason}', file=sys.stderr, flush=True)
      time.sleep(_GRACE / 2)  # The others read what was sent, before jax tells them that the coordinator is gone.
      os._exit(1)


def _hold_aborts() -> None:
  """Lets six seconds pass before an abort ends this process.

  Without the first process, which coordinates, jax aborts the others at once, from a thread of its own that cannot be
  told otherwise; in those seconds the watch says who is gone. The handler is C's `sleep`: it is given the number of the
  signal, which is 6, and waits for so many seconds in the thread that aborts, and Python's threads go on.
  """
  if sys.platform == 'linux':
    library = ctypes.CDLL(None)
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    library.signal.restype = ctypes.c_void_p
    library.signal(int(signal.SIGABRT), ctypes.cast(library.sleep, ctypes.c_void_p))
