"""A function that lives in a process of its own, so that what the others have set does not reach it."""

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from benchmarks.timing import seconds_of
from paranet_jax.host.errors import UserError
from paranet_jax.host.huge_pages import VARIABLE


class RemoteFunction:
  """Calls the function that another process has made. Its arguments and results travel, so they can be pickled."""

  def __init__(self, name: str, process: BaseProcess, connection: Connection):
    self._name, self._process, self._connection = name, process, connection

  def __call__(self, *arguments: Any) -> Any:
    """Calls it once, and gives its result."""
    return self._ask(None, arguments)

  def seconds(self, calls: int, *arguments: Any) -> float:
    """Seconds of so many calls one after the other, by the other process's clock: nothing travels between them."""
    return self._ask(calls, arguments)

  def _ask(self, calls: int | None, arguments: tuple) -> Any:
    with contextlib.suppress(BrokenPipeError):  # Its last words may still be there to read.
      self._connection.send((calls, arguments))
    return self.answer()

  def answer(self) -> Any:
    """What the other process says next.

    Raises:
      UserError: making or calling the function has failed there, or the process has ended.
    """
    try:
      answer = self._connection.recv()
    except (EOFError, ConnectionResetError) as error:
      self._process.join()
      code = self._process.exitcode
      raise UserError(f'expected {self._name} to run in its own process, found it ended with code {code}') from error
    if isinstance(answer, UserError):
      raise answer
    return answer


@contextlib.contextmanager
def own_process(
  name: str, make: Callable[..., Callable], *arguments: Any, huge_pages: bool = True
) -> Iterator[RemoteFunction]:
  """Starts a new Python, which makes a function and is ended with the context, whatever happens.

  Args:
    name: in messages.
    make: called there with the arguments, a function of a module; gives the function.
    huge_pages: glibc asks for huge pages there too, if it does here.

  Raises:
    UserError: in the context, what making or calling raised or that the process has ended.
  """
  context = multiprocessing.get_context('spawn')
  ours, theirs = context.Pipe()
  process = context.Process(target=_serve, args=(name, theirs, make, arguments), daemon=True)
  try:
    with with_huge_pages(huge_pages):
      process.start()
    theirs.close()
    function = RemoteFunction(name, process, ours)
    function.answer()  # That it is made.
    yield function
  finally:
    if process.pid:
      process.kill()
      process.join()
    ours.close()


@contextlib.contextmanager
def with_huge_pages(wanted: bool) -> Iterator[None]:
  """A process that is started in this context asks for huge pages if this one does, or else has glibc's defaults."""
  settings = None if wanted else os.environ.pop(VARIABLE, None)
  try:
    yield
  finally:
    if settings is not None:
      os.environ[VARIABLE] = settings


def _serve(name: str, connection: Connection, make: Callable[..., Callable], arguments: tuple) -> None:
  """Answers until the parent ends this process, or has gone itself."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Control-C is the parent's.
  os.dup2(2, 1)  # So is standard output, of which Python has a buffer of its own.
  sys.stdout = sys.stderr
  try:
    function = make(*arguments)
    connection.send(None)
    while True:
      calls, arguments = connection.recv()
      connection.send(seconds_of(function, calls, arguments) if calls else function(*arguments))
  except (EOFError, BrokenPipeError):
    return
  except UserError as error:
    connection.send(error)
  except Exception as error:
    traceback.print_exc()
    reason = f'{type(error).__name__}: {error}'.splitlines()[0]
    connection.send(UserError(f'expected {name} to run in its own process, found {reason} (traceback above)'))
