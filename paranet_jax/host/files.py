"""Whether the files of a folder are still what was written."""

import zlib
from pathlib import Path


def file_checksums(folder: Path) -> dict[str, int]:
  """CRC-32 of every file below a folder, by its path in it."""
  files = (path for path in sorted(folder.rglob('*')) if path.is_file())
  return {path.relative_to(folder).as_posix(): zlib.crc32(path.read_bytes()) for path in files}


def damaged_file(folder: Path, saved: dict[str, int]) -> str | None:
  """The first file that is gone or is not what `file_checksums` found; files that came after are not looked at."""
  found = file_checksums(folder)
  return next((path for path, checksum in saved.items() if found.get(path) != checksum), None)
