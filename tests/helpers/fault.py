"""The training program with one fault in it: `python tests/fault.py FAULT EVENT NUMBER ARGUMENT...`.

The fault comes at the NUMBERth audit event of Python's (an open, a rename, ...) that EVENT, a regular expression,
matches as `name path...`. The program itself is not changed: `kill` is SIGKILL before that call takes effect, and
`full` is a file system on which no file can grow from then on.
"""

import os
import re
import resource
import runpy
import signal
import sys

_EVENTS = ('open', 'os.rename', 'os.mkdir', 'os.remove', 'shutil.rmtree')


def _kill() -> None:
  os.kill(os.getpid(), signal.SIGKILL)


def _fill() -> None:
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def plan(act, event: str, number: int) -> None:
  """Calls act() at the numberth event that matches."""
  pattern, left = re.compile(event), number

  def hook(name, arguments):
    nonlocal left
    if name in _EVENTS and pattern.search(' '.join([name, *map(str, arguments)])):
      left -= 1
      if left == 0:
        act()

  sys.addaudithook(hook)


if __name__ == '__main__':
  fault, event, number, *arguments = sys.argv[1:]
  plan({'kill': _kill, 'full': _fill}[fault], event, int(number))
  sys.argv = ['main', *arguments]
  runpy.run_module('paranet_jax.main', run_name='__main__')
