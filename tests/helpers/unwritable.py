"""Programs whose standard output cannot be written."""

import os
import subprocess
from collections.abc import Sequence


def run_with_closed_pipe(command: Sequence) -> tuple[int, str]:
  """The exit code and standard error of a program that writes to a pipe without a reader."""
  read, write = os.pipe()
  os.close(read)
  return _run(command, write)


def run_with_full_disk(command: Sequence) -> tuple[int, str]:
  """The exit code and standard error of a program that writes to a full disk."""
  return _run(command, os.open('/dev/full', os.O_WRONLY))


def _run(command, stdout):
  buffered = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
  done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=buffered, text=True, timeout=120)
  os.close(stdout)
  return done.returncode, done.stderr
