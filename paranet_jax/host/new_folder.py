"""A folder that a command writes as a whole, or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from paranet_jax.host.errors import UserError


def check_absent(out: Path) -> None:
  """Raises a `UserError` naming --out if something is there."""
  if os.path.lexists(out):
    raise UserError(f'expected no {out}, found something there; set --out to another folder')


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
  """A new folder beside `out` that moves there if the context ends without an error, else is removed.

  Raises:
    UserError: it cannot be written, or `out` exists by then.
  """
  try:
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', dir=out.parent, ignore_cleanup_errors=True) as holder:
      folder = Path(holder) / out.name  # The holder itself is readable by its owner only.
      folder.mkdir()
      yield folder
      check_absent(out)
      folder.rename(out)
  except OSError as error:
    raise UserError(f'{out} cannot be written: {error.strerror or error}; set --out to another folder') from error
