"""What was measured on this machine once, and is remembered in PARANET_CACHE_DIR."""

import contextlib
import hashlib
from pathlib import Path
from typing import Any

from paranet_jax.host.arguments import cache_folder
from paranet_jax.host.errors import UserError
from paranet_jax.host.files import write_json


def remembered_file(folder: str, *determines: object) -> Path | None:
  """Where a measurement is remembered; None: there is no cache, so it is made at every start.

  Args:
    folder: of the cache.
    determines: everything that the measurement depends on, with a `repr` that tells it.
  """
  key = hashlib.sha256(repr(determines).encode()).hexdigest()[:16]
  try:
    return cache_folder() / folder / f'{key}.json'
  except (UserError, OSError):
    return None


def remember(file: Path | None, measured: dict[str, Any]) -> None:
  """Writes a measurement; where that fails, it is made again at the next start."""
  if file:
    with contextlib.suppress(OSError):
      file.parent.mkdir(parents=True, exist_ok=True)
      write_json(file, measured)
