"""The code of a run: a copy of this package, so that a run goes on with the code it began with."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from paranet_jax.host.errors import NO_ROOM, UserError

PACKAGE = Path(__file__).resolve().parents[2]
FOLDER = 'code'

_by_name = shutil.ignore_patterns('__pycache__', '*.pyc', '*.toml')  # A queue file that is edited is no other code.
_LENGTH = 12


def fingerprint(package: Path = PACKAGE) -> str:
  """A hash of every file of a package that determines what it computes."""
  digest = hashlib.sha256()
  for path in sorted(_files(package)):
    content = path.read_bytes()
    digest.update(f'{path.relative_to(package).as_posix()}\0{len(content)}\0'.encode() + content)
  return digest.hexdigest()[:_LENGTH]


def _ignored(folder: str, names: list[str]) -> set[str]:
  # Links to nothing are an editor's locks; copytree looks for what a relative link names in the current folder.
  return _by_name(folder, names) | {name for name in names if not os.path.exists(os.path.join(folder, name))}


def _files(package: Path) -> Iterator[Path]:
  # configs/ is a link in a checkout.
  for folder, folders, names in os.walk(package, followlinks=True):
    ignored = _ignored(folder, [*folders, *names])
    folders[:] = [name for name in folders if name not in ignored]
    yield from (Path(folder, name) for name in names if name not in ignored)


def commit(package: Path = PACKAGE) -> str | None:
  """The git commit of a package, with `+changes` if files of it differ; None: no repository has its files."""

  def git(*arguments: str) -> str:
    # A lock that `git status` takes for its own sake would refuse a command of the user's.
    command = ['git', '--no-optional-locks', '-C', str(package), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()

  try:
    git('ls-files', '--error-unmatch', '__init__.py')  # A repository that the package is only installed in has not.
    return git('rev-parse', '--short=12', 'HEAD') + ('+changes' if git('status', '--porcelain', '--', '.') else '')
  except (OSError, subprocess.SubprocessError):
    return None


def keep_code(workdir: Path, package: Path = PACKAGE) -> str:
  """Copies a package into `workdir/code/<fingerprint>`, unless it is there; returns the fingerprint.

  Raises:
    UserError: the package changed while it was copied.
  """
  try:
    found = fingerprint(package)
    folder = workdir / FOLDER / found
    if folder.exists():
      if fingerprint(folder / package.name) == found:
        return found
      damaged = folder.with_name(f'{found}.damaged')  # By a crash of the machine that came before it was on disk.
      shutil.rmtree(damaged, ignore_errors=True)
      folder.rename(damaged)
    temporary = folder.with_name(f'{found}.tmp')
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(package, temporary / package.name, ignore=_ignored)
    if fingerprint(temporary / package.name) == found:
      temporary.rename(folder)
      return found
    shutil.rmtree(temporary)
  except FileNotFoundError:  # A file is gone since its folder was listed.
    pass
  except shutil.Error as error:  # Of several files, as texts.
    for code in NO_ROOM:
      if os.strerror(code) in str(error):
        raise OSError(code, os.strerror(code)) from error
  raise UserError(f'{package} changed while it was copied; the same command tries again')


def kept_code(workdir: Path, found: str, run: str, package: Path = PACKAGE) -> Path:
  """The folder to import a kept package from.

  Raises:
    UserError: it is gone or was changed.
  """
  folder = workdir / FOLDER / found
  if not folder.is_dir() or fingerprint(folder / package.name) != found:
    state = 'was changed' if folder.is_dir() else 'is gone'
    raise UserError(
      f'the code that {run} began with {state} ({folder}); restore it, or remove the folder of the run, which then '
      'begins again'
    )
  return folder
