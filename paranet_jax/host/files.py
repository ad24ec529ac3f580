"""The files of a run: read by one loader, written atomically, and checksums."""

import contextlib
import fcntl
import glob
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from paranet_jax.host.errors import NO_ROOM, UserError

_DEEPEST = 50  # Levels of nested JSON; a run's files have fewer than ten.
_MISSING = (FileNotFoundError, NotADirectoryError)
_NUMBERS = re.compile(r'(?<=\[)\n[\s\d.,eE+-]*(?:null[\s\d.,eE+-]*)*(?=\])')
"""The inside of a list of numbers and nulls. Strings hold no line breaks, so this is in none."""


@contextlib.contextmanager
def replacing(path: Path, mode: str = 'w', **options: Any) -> Iterator[IO]:
  """Opens a file that replaces `path` when the context ends without an error, and is discarded otherwise.

  Several processes may write the path at once, and the last one wins. What a kill leaves behind is removed by the next
  write (see `sweep`), where the file system has locks.

  Args:
    mode: 'w' or 'wb'.
    **options: as for `open`. Text is UTF-8, and what it cannot hold is escaped.
  """
  if 'b' not in mode:  # Whatever the locale.
    options = {'encoding': 'utf-8', 'errors': 'backslashreplace'} | options
  sweep(path.parent, glob.escape(path.name))
  temporary = path.with_name(f'{path.name}.{os.urandom(4).hex()}.tmp')
  try:
    with _open_locked(temporary, mode.replace('w', 'x'), options) as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
      os.replace(temporary, path)  # While it is locked: a `sweep` of another writer would remove it.
  except OSError as error:
    if error.errno in NO_ROOM and error.filename is None:  # A failed write does not say where.
      error.filename = str(path)
    raise
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink()


def sweep(folder: Path, name: str = '*') -> None:
  """Removes the temporary files of `replacing` that killed processes left in a folder.

  Args:
    name: a pattern of the names of the files that were to be replaced.
  """
  if not os.path.isdir(folder):  # Where it may not be entered, Path.glob raises.
    return
  for path in folder.glob(f'{name}.{8 * "[0-9a-f]"}.tmp'):
    with contextlib.suppress(OSError):
      if path.is_file():
        with path.open('r+b') as file:  # NFS locks only what may be written.
          fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Refused while the process that writes it lives.
          path.unlink()


def _open_locked(path: Path, mode: str, options: dict[str, Any]) -> IO:
  """Opens a new file that `sweep` leaves alone."""
  file = path.open(mode, **options)
  with contextlib.suppress(OSError):  # A file system without locks.
    fcntl.flock(file, fcntl.LOCK_EX)  # A `sweep` that has just found it holds it until it is removed.
    if not path.exists():  # It was swept before it was locked.
      file.close()
      return _open_locked(path, mode, options)
  return file


def write_text(path: Path, text: str) -> None:
  """Writes a text file atomically."""
  with replacing(path) as file:
    file.write(text)


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON file atomically (see `to_json`)."""
  write_text(path, to_json(value))


def to_json(value: Any) -> str:
  """JSON as our files have it, with each list of numbers on one line."""
  return _NUMBERS.sub(lambda found: ' '.join(found[0].split()), json.dumps(value, indent=2)) + '\n'


def json_line(value: Any) -> str:
  """JSON on one line, as commands print it; a number that is not finite, which JSON lacks, is null."""
  return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _finite(each) for key, each in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(each) for each in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def read_file(path: Path, fix: str) -> bytes | None:
  """Reads a regular file, or what a link to one names; None: there is nothing.

  Args:
    fix: ends the error.

  Raises:
    UserError: it cannot be read.
  """
  try:
    # Without blocking: opening a pipe would wait for its writer.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), 'rb') as file:
      if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file.read()
      reason = 'Not a regular file'
  except OSError as error:
    if isinstance(error, _MISSING) and not os.path.islink(path):
      return None
    reason = error.strerror or str(error)
  raise UserError(f'{path} cannot be read ({reason}); {fix}')


def read_object(path: Path, fix: str) -> dict[str, Any] | None:
  """Reads a JSON object; None: there is no file.

  Args:
    fix: ends the error.

  Raises:
    UserError: the file cannot be read or holds something else.
  """
  content = read_file(path, fix)
  if content is None:
    return None
  try:
    return parse_object(content)
  except ValueError as error:
    raise UserError(f'{path} is not a JSON object ({error}); {fix}') from error


def parse_object(content: bytes) -> dict[str, Any]:
  """Parses a JSON object.

  Raises:
    ValueError: it is something else, or nested too deeply.
  """
  try:
    value = json.loads(content.decode())
  except RecursionError as error:
    raise ValueError(str(error)) from error
  if _depth(value) > _DEEPEST:  # What handles it may be recursive.
    raise ValueError(f'it is nested more than {_DEEPEST} levels deep')
  if not isinstance(value, dict):
    raise ValueError(f'it holds {value!r:.40}')
  return value


def _depth(value: Any) -> int:
  """Levels of lists and objects, counted up to one more than `_DEEPEST`."""
  depth, level = 0, [value]
  while depth <= _DEEPEST and (level := [each for each in level if isinstance(each, dict | list)]):
    level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
    depth += 1
  return depth


def file_checksums(folder: Path) -> dict[str, int]:
  """CRC-32 of every file below a folder, by its relative path."""
  files = (path for path in sorted(folder.rglob('*')) if path.is_file())
  return {path.relative_to(folder).as_posix(): zlib.crc32(path.read_bytes()) for path in files}


def damaged_file(folder: Path, saved: dict[str, int]) -> str | None:
  """Returns the first file that is missing or has another checksum; files that were added later are ignored.

  Raises:
    UserError: a file cannot be read.
  """
  fix = f'make it readable, or move {folder} away to continue without it'
  for name, checksum in saved.items():
    content = read_file(folder / name, fix)
    if content is None or zlib.crc32(content) != checksum:
      return name
  return None


def check_regular(path: Path, fix: str) -> None:
  """Raises a `UserError`, which ends with `fix`, if something else than a file is in the way of one to be written."""
  if os.path.lexists(path) and not os.path.isfile(path):
    raise UserError(f'expected {path} to be a file, found a folder, a pipe or a dangling link; {fix}')
