"""Huge pages for the memory of the C library, with which a CPU computes faster."""

import contextlib
import os
import sys
from pathlib import Path

VARIABLE = 'GLIBC_TUNABLES'
SETTING = 'glibc.malloc.hugetlb'
_HELP = frozenset({'-h', '--help', '--helpshort', '--helpfull'})
"""With these, nothing is computed, and a restart would take most of the time."""
_MODES = Path('/sys/kernel/mm/transparent_hugepage/enabled')


def use_huge_pages() -> None:
  """Restarts this program with glibc requesting huge pages, unless it already does or the system has none.

  XLA's CPU backend allocates a program's temporary memory at every call, and the kernel clears and maps it in pages of
  4 KiB or of 2 MiB. PN3-ddd at batch 64 on 2 cores of an AMD EPYC, one process each: 136 and 209 images/s in training,
  846 and 971 in inference. glibc reads the setting only when a process starts.

  Call it first in a program's main module: everything before it runs twice.
  """
  settings = os.environ.get(VARIABLE, '')
  if SETTING in settings or not _on_request() or _HELP & set(sys.argv[1:]):
    return
  os.environ[VARIABLE] = ':'.join(filter(None, [settings, f'{SETTING}=1']))
  for stream in filter(None, (sys.stdout, sys.stderr)):  # None if closed.
    stream.flush()
  with contextlib.suppress(OSError):  # Such as an interpreter that this user may not start by its path: go on without.
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _on_request() -> bool:
  """Whether the system gives huge pages to a process that requests them."""
  try:
    linux = sys.platform == 'linux' and 'glibc' in (os.confstr('CS_GNU_LIBC_VERSION') or '')
    return linux and '[madvise]' in _MODES.read_text()
  except (OSError, ValueError):  # Another C library; another kernel.
    return False
