"""A folder that a command writes as a whole, or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from paranet_jax.host.errors import NO_ROOM, UserError


def check_absent(out: Path) -> None:
  """Raises a `UserError` naming --out if something is there."""
  if os.path.lexists(out):
    raise UserError(f'expected no {out}, found something there; set --out to another folder')


@contextlib.contextmanager
def moved_there(out: Path, check: Callable[[], None]) -> Iterator[Path]:
  """A new folder beside `out` that moves there if the context ends without an error, else is removed.

  Args:
    out: no folder, or an empty one, when it ends.
    check: is called before it moves; may raise.
  """
  with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', dir=out.parent, ignore_cleanup_errors=True) as holder:
    folder = Path(holder) / out.name  # The holder is readable by its owner only.
    folder.mkdir()
    yield folder
    check()
    folder.rename(out)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
  """As `moved_there`, where nothing may be.

  Raises:
    UserError: it cannot be written, or `out` exists by then. Other errors of the file system are raised as they are.
  """
  holder = out.parent
  try:
    with moved_there(out, lambda: check_absent(out)) as folder:
      holder = folder.parent
      yield folder
  except shutil.Error as error:  # Of several files, as texts.
    raise UserError(f'{out} cannot be written: {error}; set --out to another folder') from error
  except OSError as error:
    if error.errno not in NO_ROOM and not _is_in(error, holder):
      raise
    raise UserError(f'{out} cannot be written: {error.strerror or error}; set --out to another folder') from error


def _is_in(error: OSError, holder: Path) -> bool:
  paths = [
    Path(os.fsdecode(path)) for path in (error.filename, error.filename2) if isinstance(path, str | bytes | Path)
  ]
  return any(path.is_relative_to(holder) for path in paths)
