"""One training process per workdir: a lock that the operating system releases when its process dies."""

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from paranet_jax.host.errors import UserError, report_no_room, say

LOCK = 'lock'

_FLOCK = ('qqihh', ('start', 'length', 'process', 'type', 'whence'))
"""struct flock of macOS and the BSDs, and of Linux."""
if sys.platform == 'linux':
  _FLOCK = ('hhqqi', ('type', 'whence', 'start', 'length', 'process'))
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_held: set[tuple[int, int, int]] = set()
"""By process, as forks copy it: the files that it has locked. To open and close one again would release its lock."""


@contextlib.contextmanager
def workdir_lock(workdir: Path) -> Iterator[None]:
  """Holds `workdir/lock`, which names its holder and is removed at the end.

  A file left behind by a killed process is not locked, and is taken over. If the file system has no locks, a line says
  so, and nothing is held.

  Args:
    workdir: an existing folder.

  Raises:
    UserError: another process holds it, or this one does already; something else has its name; or the disk is full,
      also inside the context.
  """
  path, own = workdir / LOCK, f'process {os.getpid()} on {socket.gethostname()}'
  if _is_held(path):
    raise _in_use(path, own)
  with report_no_room(workdir), _locked(path) as file:
    _held.add(identity := _identity(os.fstat(file.fileno())))
    try:
      os.ftruncate(file.fileno(), 0)
      os.pwrite(file.fileno(), own.encode(), 0)  # Of what the file buffers, closing it would fail once more.
      yield
    finally:
      path.unlink(missing_ok=True)
      _held.discard(identity)


def lock_holder(workdir: Path) -> str:
  """Which other process holds a folder, in its words; '': none, or the system does not say.

  It takes no lock, not even for a moment, in which another process would be refused.
  """
  if _is_held(workdir / LOCK):
    return ''
  try:
    with open(os.open(workdir / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), errors='replace') as file:
      asked = {**dict.fromkeys('type whence start length process'.split(), 0), 'type': fcntl.F_WRLCK}
      answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(_FLOCK[0], *(asked[name] for name in _FLOCK[1])))
      found = dict(zip(_FLOCK[1], struct.unpack(_FLOCK[0], answer), strict=True))
      return '' if found['type'] == fcntl.F_UNLCK else file.read(1000) or 'another process'
  except OSError:
    return ''


def _locked(path: Path) -> IO[str]:
  # Not truncated: until it is locked, its contents belong to another process. A link's target belongs to the user.
  flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
  try:
    descriptor = os.open(path, flags, 0o666)
  except OSError as error:
    if not os.path.lexists(path):
      raise
    raise _not_ours(path, 'a link' if path.is_symlink() else error.strerror) from error
  if not stat.S_ISREG(os.fstat(descriptor).st_mode):
    os.close(descriptor)
    raise _not_ours(path, 'a pipe or a device')
  file = open(descriptor, 'r+', errors='replace')
  try:
    # Unlike flock's, this lock is not inherited: workers that outlive a killed run do not hold it. It is released with
    # the first descriptor of the file that this process closes, so there is only one.
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    holder = file.read() or 'another process'
    file.seek(0)
    if error.errno not in _NO_LOCKS:
      file.close()
      raise _in_use(path, holder) from error
    say(f'workdir {path.parent} cannot be locked ({error.strerror}): run one training there at a time')
  if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
    if not re.fullmatch(r'(process \d+ on .*)?', file.read(1000)):
      file.close()
      raise _not_ours(path, 'a file of another program')
    file.seek(0)
    return file
  # Its holder removed it after we opened it and before we locked it.
  file.close()
  return _locked(path)


def _is_held(path: Path) -> bool:
  with contextlib.suppress(OSError):
    return _identity(path.lstat()) in _held
  return False


def _identity(status: os.stat_result) -> tuple[int, int, int]:
  return os.getpid(), status.st_dev, status.st_ino


def _in_use(path: Path, holder: str) -> UserError:
  return UserError(f'workdir {path.parent} is in use by {holder}; wait for it or stop it, or set --workdir')


def _not_ours(path: Path, found: str | None) -> UserError:
  return UserError(f'expected {path} to be the lock of a run, found {found}; move it away, or set --workdir')
