"""Starts a run in this process, tied to the queue that started it; executed as a script, by its path.

`python child.py PARENT CORES ARGUMENT...` becomes `python ARGUMENT...`, on these cores ('' for all), and gets SIGTERM,
on which a run saves and stops, when process PARENT ends, whatever ended it. It imports nothing of this package, because
the run has its own copy of it.
"""

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_AUTOGROUP = '/proc/self/autogroup'


def main(parent: str, cores: str, *arguments: str) -> None:
  """Becomes the run."""
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _keep_niceness()
  if os.getppid() != int(parent):  # It ended before.
    sys.exit(f'process {parent} has ended')
  if cores:
    os.sched_setaffinity(0, map(int, cores.split(',')))
  os.execv(sys.executable, [sys.executable, *arguments])


def _keep_niceness() -> None:
  """Gives this session the queue's niceness: Linux weighs sessions against each other by one that starts at 0."""
  with contextlib.suppress(OSError):  # The kernel has no autogroups.
    if niceness := os.nice(0):
      with open(_AUTOGROUP, 'w') as file:
        file.write(str(niceness))


if __name__ == '__main__':
  main(*sys.argv[1:])
