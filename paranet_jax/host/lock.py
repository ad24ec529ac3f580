"""One training process per workdir: a lock that the operating system releases when its process dies."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from paranet_jax.host.errors import UserError

LOCK = 'lock'

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def workdir_lock(workdir: Path) -> Iterator[None]:
  """Holds `workdir/lock`, which names its holder and is removed at the end.

  A file left behind by a killed process is not locked, and is taken over. If the file system has no locks, a line says
  so, and nothing is held.

  Args:
    workdir: an existing folder.

  Raises:
    UserError: another process holds it.
  """
  path = workdir / LOCK
  with _locked(path) as file:
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}')
    file.flush()
    try:
      yield
    finally:
      path.unlink(missing_ok=True)


def _locked(path: Path) -> IO[str]:
  file = path.open('a+')  # Not 'w': until it is locked, its contents belong to another process.
  try:
    # Unlike flock's, this lock is not inherited: workers that outlive a killed run do not hold it. It is released with
    # the first descriptor of the file that this process closes, so there is only one.
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    file.seek(0)
    holder = file.read() or 'another process'
    if error.errno not in _NO_LOCKS:
      file.close()
      raise UserError(
        f'workdir {path.parent} is in use by {holder}; wait for it or stop it, or set --workdir'
      ) from error
    print(f'workdir {path.parent} cannot be locked ({error.strerror}): run one training there at a time', flush=True)
  if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
    return file
  # Its holder removed it after we opened it and before we locked it.
  file.close()
  return _locked(path)
