"""Flags of the commands: a parser and types of values."""

import argparse
import contextlib
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from paranet_jax.host.errors import UserError

_PATH_FLAGS = (
  *('--workdir', '--bundle', '--images', '--out', '--output', '--data', '--data_dir', '--data-dir', '--weights'),
  *('--compilation_cache', '--web-runtime', '--config', '--config.data.data_dir', '--config.init_from'),
  '--config.loss.teacher_run',
)
_PATH = re.compile(r'[/~]|\.\.?/|[A-Za-z]:')


class Parser(argparse.ArgumentParser):
  """An argparse parser without abbreviations that raises `UserError`."""

  def __init__(self, **options):
    super().__init__(allow_abbrev=False, **options)

  def error(self, message: str) -> NoReturn:
    raise UserError(f'{message}; see --help')

  def parse_with_overrides(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the arguments `--config.section.field=value`.

    Raises:
      UserError: a flag is unknown or missing, or its value does not fit.
    """
    given, rest = self.parse_known_args(argv)
    if unknown := [argument for argument in rest if not argument.startswith('--config.')]:
      self.error(f'unrecognized arguments: {" ".join(unknown)}')
    return given, rest


def add_data_flags(parser: argparse.ArgumentParser, accept: bool = True) -> None:
  """Adds `--data_dir` and, for a command that reads a run's data again, `--accept_data_changes`."""
  add = parser.add_argument
  add('--data_dir', '--data-dir', type=absolute, help='folder of the data set, if it is not where the run says')
  if accept:
    add(
      '--accept_data_changes',
      '--accept-data-changes',
      action='store_true',
      help='go on although classes, labels or all images changed; the run keeps its own classes',
    )


def add_jax_flags(parser: argparse.ArgumentParser) -> None:
  """Adds `--compilation_cache` and `--accept_wrong_numbers` (see `machine.start_jax`)."""
  add = parser.add_argument
  add('--compilation_cache', help='folder of compiled programs (default: compiled/ in PARANET_CACHE_DIR); off: none')
  add(
    '--accept_wrong_numbers',
    '--accept-wrong-numbers',
    action='store_true',
    help='compute on although a check found that this jaxlib computes wrong numbers',
  )


def positive(text: str, most: int = 10**9) -> int:
  """An integer from 1 to `most`."""
  digits = text.lstrip('0')
  if not text.isdecimal() or not digits:
    raise argparse.ArgumentTypeError(f'expected an integer of 1 or more, found {text:.40}')
  if len(digits) > len(str(most)) or int(digits) > most:  # Thousands of digits are not converted.
    raise argparse.ArgumentTypeError(f'expected an integer from 1 to {most:,}, found {text:.40}')
  return int(digits)


def fraction(text: str) -> float:
  """A number between 0 and 1, both excluded."""
  with contextlib.suppress(ValueError):
    if 0 < float(text) < 1:
      return float(text)
  raise argparse.ArgumentTypeError(f'expected a number between 0 and 1, found {text}')


def absolute(path: str | Path) -> Path:
  """Makes a user's path absolute.

  Raises:
    UserError: it is a URL, or in the home folder of an unknown user.
  """
  if re.match(r'[A-Za-z][\w+.-]+:/', str(path)):  # Path('gs://bucket') is gs:/bucket.
    raise UserError(f'expected a local path, found the URL {path}; copy or mount it, and name the local folder')
  expanded = os.path.expanduser(path)
  if str(expanded).startswith('~') and not os.path.lexists(expanded):
    raise UserError(f'expected a path, found {path}, whose home folder is unknown; write it in full, or set HOME')
  return Path(expanded).absolute()


def from_here(path: Path) -> Path:
  """An absolute path as it is printed in commands: from the current folder if it is below."""
  here = Path.cwd()
  return path.relative_to(here) if path.is_relative_to(here) else path


def without_paths(command: str) -> str | None:
  """A command line as it may be shared, with FOLDER for its paths; None: it has no words that a shell would find.

  A flag of another package may have a path that is not known as one here, so whatever looks like one is replaced too.
  """
  try:
    words = shlex.split(command)
  except ValueError:
    return None
  for place, (before, word) in enumerate(zip(['', *words], words, strict=False)):
    flag, given, value = word.partition('=') if word.startswith('-') else ('', '', word)
    if before in _PATH_FLAGS or _PATH.match(value) or (flag in _PATH_FLAGS and given):
      words[place] = f'{flag}=FOLDER' if given else 'FOLDER'
  return shlex.join(words)


def check_utf8(folder: Path, flag: str) -> None:
  """Raises a `UserError` naming the flag for a folder whose path is not UTF-8: libraries in C++ do not take it."""
  try:
    str(folder).encode()
  except UnicodeEncodeError as error:
    raise UserError(f'expected a folder whose path is UTF-8, found {folder}; rename it, or set {flag}') from error


def cache_folder() -> Path:
  """PARANET_CACHE_DIR, by default ~/.cache/paranet_jax.

  Raises:
    UserError: it is not a local path, or this user has no home folder.
  """
  folder = os.environ.get('PARANET_CACHE_DIR')
  if not folder and os.path.expanduser('~') == '~':
    raise UserError('expected a home folder for caches, found none for this user; set PARANET_CACHE_DIR or HOME')
  return absolute(folder or '~/.cache/paranet_jax')
