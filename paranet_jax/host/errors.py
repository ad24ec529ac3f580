"""The exception for what a user can fix, and how a command reports it."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
  """A user's mistake, in one line: what was expected, what was found, and what fixes it.

  A command prints the line and exits with code 2, without a traceback.
  """


@contextlib.contextmanager
def report_no_room(workdir: Path) -> Iterator[None]:
  """Turns an error caused by a full disk, a quota or a size limit into a `UserError`."""
  try:
    yield
  except OSError as error:
    if error.errno not in _NO_ROOM:
      raise
    raise UserError(
      f'{workdir} cannot be written ({error.strerror}), and its checkpoints are intact; '
      'make room, and the same command resumes'
    ) from error


def exit_code(run: Callable[[], int | None], stopped: str = 'stopped at once') -> int:
  """Runs a command and returns its exit code, 0 if it returns None.

  Returns 2 after a `UserError`, whose line it prints, or after an error of the file system, whose path it names, and
  130 if the command was interrupted, after printing `stopped`.
  """
  logging.set_verbosity(logging.WARNING)  # At INFO, orbax logs much that users need not see.
  for name in ('stdout', 'stderr'):  # None if closed, as by `>&-`.
    if getattr(sys, name) is None:
      setattr(sys, name, open(os.devnull, 'w'))
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')  # For characters that its encoding lacks.
  try:
    return run() or 0
  except UserError as error:
    _print_error(str(error))
    return 2
  except OSError as error:
    if not names_file(error):  # Such as a closed pipe.
      raise
    path = os.fsdecode(error.filename2 or error.filename)
    _print_error(f'{path} cannot be read or written ({error.strerror}); fix that, or name another path')
    return 2
  except (AssertionError, RuntimeError):  # jax raises either, and not always with a text.
    wanted = os.environ.get('JAX_PLATFORMS')
    if not wanted or _platform_starts():
      raise
    print(f'error: expected the platform of JAX_PLATFORMS={wanted}, found no such device; unset it', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(stopped, file=sys.stderr)
    return 130


def names_file(error: BaseException) -> bool:
  """Whether this is an error of the file system that names a path."""
  return isinstance(error, OSError) and isinstance(error.filename, str | bytes | os.PathLike)


def _print_error(text: str) -> None:
  line = ' '.join(text.split())
  print('error:', ''.join(char if char.isprintable() else ascii(char)[1:-1] for char in line), file=sys.stderr)


def discard_output(descriptor: int) -> None:
  """Discards what is written to a standard stream from now on, such as after its reader stopped."""
  silent = os.open(os.devnull, os.O_WRONLY)
  os.dup2(silent, descriptor)
  os.close(silent)


def _platform_starts() -> bool:
  if 'jax' in sys.modules:
    try:
      sys.modules['jax'].devices()
    except (AssertionError, RuntimeError):
      return False
  return True
