"""Files that are written atomically, JSON, and checksums."""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def replacing(path: Path, mode: str = 'w', shared: bool = False, **options: Any) -> Iterator[IO]:
  """Opens a file that replaces `path` when the context ends without an error, and is discarded otherwise.

  Args:
    mode: 'w' or 'wb'.
    shared: several processes may write the path at once, and the last one wins. Otherwise the temporary name is fixed,
      so that the next write takes the place of what a kill left behind.
    **options: as for `open`.
  """
  temporary = path.with_name(f'{path.name}.{os.urandom(4).hex()}.tmp' if shared else f'{path.name}.tmp')
  try:
    with temporary.open(mode, **options) as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
  """Writes a text file atomically."""
  with replacing(path) as file:
    file.write(text)


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON file atomically."""
  write_text(path, json.dumps(value, indent=2) + '\n')


def read_object(path: Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    OSError: the file cannot be read.
    ValueError: it holds something else.
  """
  value = json.loads(path.read_text())
  if not isinstance(value, dict):
    raise ValueError(f'it holds {value!r:.40}')
  return value


def file_checksums(folder: Path) -> dict[str, int]:
  """CRC-32 of every file below a folder, by its relative path."""
  files = (path for path in sorted(folder.rglob('*')) if path.is_file())
  return {path.relative_to(folder).as_posix(): zlib.crc32(path.read_bytes()) for path in files}


def damaged_file(folder: Path, saved: dict[str, int]) -> str | None:
  """Returns the first file that is missing or has another checksum; files that were added later are ignored."""
  found = file_checksums(folder)
  return next((path for path, checksum in saved.items() if found.get(path) != checksum), None)
