"""A run in a process of its own: started on some cores, stopped, and what became of it."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from paranet_jax.host.errors import UserError, printable

_CHILD = Path(__file__).with_name('child.py')
_LONGEST = 300  # Characters of an error that are repeated.


class RunProcess:
  """`python -m paranet_jax.main` with another copy of the package; its output is appended to a log.

  Args:
    arguments: of the command.
    code: folder to import the package from.
    log: a file in an existing folder.
    cores: numbers of the cores that it runs on; none: all.
  """

  def __init__(self, arguments: Sequence[str], code: Path, log: Path, cores: Sequence[int] = ()):
    self._log = log
    # The current folder, which Python would search first, may be a checkout whose code has changed.
    path = os.pathsep.join(filter(None, [str(code), os.environ.get('PYTHONPATH'), os.getcwd()]))
    environment = os.environ | {'PYTHONPATH': path, 'PYTHONSAFEPATH': '1'}
    command = [sys.executable, str(_CHILD), str(os.getpid()), ','.join(map(str, cores)), '-m', 'paranet_jax.main']
    with log.open('ab') as output:
      self._start = output.tell()
      # In a session of its own: a terminal's Control-C reaches only the queue, which passes one signal on.
      self._process = subprocess.Popen(
        [*command, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
      )
    self._heeded = False  # Whether it has ever been seen to wait for a signal to stop.

  def ended(self) -> int | None:
    """The exit code, negative after a signal; None: it runs."""
    code = self._process.poll()
    if code is None and not self._heeded:
      self._heeded = _heeds(self._process.pid)
    return code

  def stop(self) -> None:
    """Makes the run save and stop.

    Nothing is sent to one that a signal has reached: a second one would end it before it has saved. What manages
    services or jobs sends its signal to the queue and to all of its runs.
    """
    if not self._heeded or _heeds(self._process.pid):
      self._process.send_signal(signal.SIGTERM)

  def reason(self) -> str:
    """Its error in one line, or else the last line that it printed."""
    try:
      with self._log.open('rb') as file:
        file.seek(self._start)
        lines = file.read().decode(errors='replace').split('\n')
    except OSError as error:
      return f'its log cannot be read ({error.strerror})'
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line.removeprefix('error: ') for line in lines if line.startswith('error: ')]
    return printable((errors or lines or ['it printed nothing'])[-1])[:_LONGEST]


def _heeds(process: int) -> bool:
  """Whether a process handles SIGTERM, as a `StopRequest` does until the first signal; only Linux tells."""
  with contextlib.suppress(OSError):
    for line in Path(f'/proc/{process}/status').read_text().splitlines():
      if line.startswith('SigCgt:'):
        return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
  return False


def share_cores(count: int | None, at_once: int) -> list[tuple[int, ...]]:
  """The cores of each of the runs that train at once, from the last of this process; `()` stands for all.

  Args:
    count: cores in all; None: all that this process may use.
    at_once: runs.

  Raises:
    UserError: there are fewer cores.
  """
  if not hasattr(os, 'sched_setaffinity'):
    if count is None:
      return [()] * at_once
    raise UserError('--cores needs Linux, found a system that does not bind processes to cores; leave it out')
  cores = sorted(os.sched_getaffinity(0))
  if count is None and at_once == 1:
    return [()]
  wanted = len(cores) if count is None else count
  if not at_once <= wanted <= len(cores):
    raise UserError(
      f'expected --cores from --at-once {at_once} to {len(cores)} (the cores of this process), found {wanted}; '
      'set --cores or --at-once'
    )
  own, each = cores[len(cores) - wanted :], wanted // at_once
  return [tuple(own[number * each : (number + 1) * each]) for number in range(at_once)]
