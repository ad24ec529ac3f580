"""The parser of the commands whose flags are not a configuration's."""

import argparse
from typing import NoReturn

from paranet_jax.errors import UserError


class Parser(argparse.ArgumentParser):
  """argparse's, without abbreviations; whatever is mistyped is a `UserError`."""

  def __init__(self, **options):
    super().__init__(allow_abbrev=False, **options)

  def error(self, message: str) -> NoReturn:
    raise UserError(f'{message}; see --help')
