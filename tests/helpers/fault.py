"""The training program with one fault in it: `python tests/helpers/fault.py FAULT EVENT NUMBER ARGUMENT...`.

The fault occurs at the NUMBERth Python audit event (an open, a rename, ...) that matches EVENT, a regular expression
for `name path...`. The program itself is unchanged: `kill` sends SIGKILL before that call takes effect, and `full`
makes the file system one on which no file can grow from then on.
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
