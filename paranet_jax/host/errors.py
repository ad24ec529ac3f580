"""The one exception for what a user can mend, and how a command answers it."""

import contextlib
import errno
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
  """A mistake of the user's: one line saying what was expected, what was found and what mends it.

  A command prints the line and exits with code 2, without a traceback.
  """


@contextlib.contextmanager
def no_room_is_told(workdir: Path) -> Iterator[None]:
  """Turns the error of a full disk, a quota or a limit into a `UserError`."""
  try:
    yield
  except OSError as error:
    if error.errno not in _NO_ROOM:
      raise
    raise UserError(
      f'{workdir} cannot be written ({error.strerror}), and its checkpoints are whole; '
      'make room, and the same command goes on'
    ) from error


def exit_code(run: Callable[[], object]) -> int:
  """Runs a command: 0; 2 after a `UserError`, whose line it prints; 130 if it was interrupted."""
  logging.set_verbosity(logging.WARNING)  # orbax tells much at INFO that is not for the reader of a terminal.
  try:
    run()
  except UserError as error:
    print('error:', *str(error).split(), file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('stopped at once', file=sys.stderr)
    return 130
  return 0
