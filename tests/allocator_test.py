"""Freed memory that the process keeps."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from paranet_jax import allocator

FAULTS = """
import resource, sys
import numpy as np
from paranet_jax.allocator import keep_freed_memory
if sys.argv[1] == 'keep':
  assert keep_freed_memory()
for _ in range(20):
  np.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc has this setting')
def test_pages_are_not_taken_anew():
  """Twenty times 80 MB: without the setting each time is some 20,000 pages of 4 KiB."""
  root = Path(__file__).resolve().parents[1]
  faults = {
    mode: int(subprocess.run([sys.executable, '-c', FAULTS, mode], cwd=root, capture_output=True, check=True).stdout)
    for mode in ('keep', 'give back')
  }
  assert faults['keep'] < faults['give back'] / 3


def test_elsewhere_nothing_is_done(monkeypatch):
  monkeypatch.setattr(sys, 'platform', 'darwin')
  assert allocator.keep_freed_memory() is False
