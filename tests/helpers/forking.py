"""Processes forked from a server that has imported the program once, which takes a process seconds."""

import contextlib
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

import jax

HELPERS = Path(__file__).resolve().parent


class Forked:
  """A started process that calls a function.

  Attributes:
    pid: its process id.
    out, err: what it writes.
    send: sends a signal.
  """

  _context = multiprocessing.get_context('forkserver')
  _context.set_forkserver_preload(['group', 'killing'])

  def __init__(self, function: Callable[..., Any], *arguments: Any):
    pipes = [self._context.Pipe(duplex=False) for _ in range(2)]
    self._process = self._context.Process(target=_run, args=(*(end for _, end in pipes), function, *arguments))
    with _paths():
      self._process.start()  # The first one starts the server.
    self.pid, self.kill, self.terminate = self._process.pid, self._process.kill, self._process.terminate
    self.out, self.err = (os.fdopen(os.dup(reader.fileno())) for reader, _ in pipes)
    for _, writer in pipes:
      writer.close()

  def send(self, number: int) -> None:
    os.kill(self.pid, number)

  def ended(self) -> tuple[int | None, str, str]:
    """Exit code, remaining output and error; a process that hangs is killed."""
    self.has_ended(240)
    self.kill()
    self._process.join()
    return self._process.exitcode, _rest(self.out), _rest(self.err)

  def has_ended(self, seconds: float) -> bool:
    """Whether it ends in so many seconds."""
    self._process.join(seconds)
    return self._process.exitcode is not None


def execute(program: str, *arguments: str) -> None:
  """Runs a program as `python -c` does."""
  sys.argv = ['-c', *arguments]
  exec(program, {'__name__': '__main__'})


@contextlib.contextmanager
def forked_workers() -> Iterator[None]:
  """The worker processes that read images are forked from the server, too."""
  with _paths(), mock.patch.object(multiprocessing, 'get_context', lambda *_: Forked._context):
    yield


def _paths() -> Any:
  """Where the server, which is started with the first process, finds what it imports."""
  return mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, [HELPERS.parents[1], HELPERS])))


def _rest(pipe: TextIO) -> str:
  with pipe:
    return pipe.read()


def _run(out: Connection, err: Connection, function: Callable[..., Any], *arguments: Any) -> None:
  for number, pipe in enumerate((out, err), 1):
    os.dup2(pipe.fileno(), number)
  sys.stdout, sys.stderr = (os.fdopen(os.dup(number), 'w', buffering=1) for number in (1, 2))
  jax.config.update('jax_disable_most_optimizations', True)
  gc.freeze()  # See conftest.py.
  gc.set_threshold(100_000, 20, 20)
  function(*arguments)
