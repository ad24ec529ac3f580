"""The one exception for what a user can mend."""


class UserError(Exception):
  """A mistake of the user's: one line saying what was expected, what was found and what mends it.

  `main` prints the line and exits with code 2, without a traceback.
  """
