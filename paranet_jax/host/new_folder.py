"""A folder that a command writes as a whole, or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from paranet_jax.host.errors import NO_ROOM, UserError


def check_absent(out: Path) -> None:
  """Raises a `UserError` naming --out if something is there."""
  if os.path.lexists(out):
    raise UserError(f'expected no {out}, found something there; set --out to another folder')


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
  """A new folder beside `out` that moves there if the context ends without an error, else is removed.

  Raises:
    UserError: it cannot be written, or `out` exists by then. Other errors of the file system are raised as they are.
  """
  holder = out.parent
  try:
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', dir=out.parent, ignore_cleanup_errors=True) as name:
      holder = Path(name)  # Readable by its owner only, so the folder lies in it.
      folder = holder / out.name
      folder.mkdir()
      yield folder
      check_absent(out)
      folder.rename(out)
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
