"""The one exception for what a user can mend, and how a command answers it."""

import sys
from collections.abc import Callable


class UserError(Exception):
  """A mistake of the user's: one line saying what was expected, what was found and what mends it.

  A command prints the line and exits with code 2, without a traceback.
  """


def exit_code(run: Callable[[], object]) -> int:
  """Runs a command: 0; 2 after a `UserError`, whose line it prints; 130 if it was interrupted."""
  try:
    run()
  except UserError as error:
    print('error:', *str(error).split(), file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('stopped at once', file=sys.stderr)
    return 130
  return 0
