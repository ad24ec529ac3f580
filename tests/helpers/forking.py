"""Processes forked from a server that has imported the program once, which takes a process seconds."""

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
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
  """

  _context = multiprocessing.get_context('forkserver')
  _context.set_forkserver_preload(['group', 'killing'])

  def __init__(self, function: Callable[..., Any], *arguments: Any):
    pipes = [self._context.Pipe(duplex=False) for _ in range(2)]
    self._process = self._context.Process(target=_run, args=(*(end for _, end in pipes), function, *arguments))
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, [HELPERS.parents[1], HELPERS]))):
      self._process.start()  # The first one starts the server.
    self.pid, self.kill, self.terminate = self._process.pid, self._process.kill, self._process.terminate
    self.out, self.err = (os.fdopen(os.dup(reader.fileno())) for reader, _ in pipes)
    for _, writer in pipes:
      writer.close()

  def ended(self) -> tuple[int | None, str, str]:
    """Exit code, remaining output and error; a process that hangs is killed."""
    self._process.join(240)
    self.kill()
    self._process.join()
    return self._process.exitcode, _rest(self.out), _rest(self.err)


def _rest(pipe: TextIO) -> str:
  with pipe:
    return pipe.read()


def _run(out: Connection, err: Connection, function: Callable[..., Any], *arguments: Any) -> None:
  for number, pipe in enumerate((out, err), 1):
    os.dup2(pipe.fileno(), number)
  sys.stdout, sys.stderr = (os.fdopen(os.dup(number), 'w', buffering=1) for number in (1, 2))
  jax.config.update('jax_disable_most_optimizations', True)
  gc.freeze()  # See conftest.py.
  gc.set_threshold(20_000, 20, 20)
  function(*arguments)
