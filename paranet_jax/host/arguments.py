"""Flags of the commands: a parser and types of values."""

import argparse
import contextlib
import os
from pathlib import Path
from typing import NoReturn

from paranet_jax.host.errors import UserError


class Parser(argparse.ArgumentParser):
  """An argparse parser without abbreviations that raises `UserError`."""

  def __init__(self, **options):
    super().__init__(allow_abbrev=False, **options)

  def error(self, message: str) -> NoReturn:
    raise UserError(f'{message}; see --help')


def positive(text: str) -> int:
  """An integer of 1 or more."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'expected an integer of 1 or more, found {text}')
  return int(text)


def fraction(text: str) -> float:
  """A number between 0 and 1, both excluded."""
  with contextlib.suppress(ValueError):
    if 0 < float(text) < 1:
      return float(text)
  raise argparse.ArgumentTypeError(f'expected a number between 0 and 1, found {text}')


def absolute(path: str | Path) -> Path:
  """Makes a user's path absolute; a home folder that does not exist stays as written."""
  return Path(os.path.expanduser(path)).absolute()
