"""Tests that a program restarts itself with huge pages, once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paranet_jax.host import huge_pages as allocator

PROGRAM = """
import os, resource, sys
from paranet_jax.host.huge_pages import use_huge_pages
use_huge_pages()
for _ in range(20):
  b'x' * 80_000_000
print(sys.argv[1:], os.environ.get('GLIBC_TUNABLES'), resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def run(tmp_path, variable):
  """What the program prints: its arguments, its value of the variable, and its number of page faults."""
  (tmp_path / 'program.py').write_text(PROGRAM)
  root = Path(__file__).resolve().parents[2]
  env = os.environ | {'PYTHONPATH': str(root), 'GLIBC_TUNABLES': variable}
  command = [sys.executable, tmp_path / 'program.py', 'one', '--two=3 4']
  words = subprocess.run(command, env=env, capture_output=True, check=True, text=True).stdout.rsplit(maxsplit=2)
  return words[0], words[1], int(words[2])


@pytest.mark.skipif(not allocator._on_request(), reason='this system has no huge pages on request')
def test_the_program_restarts_with_its_arguments(tmp_path):
  arguments, variable, faults = run(tmp_path, '')
  assert (arguments, variable) == ("['one', '--two=3 4']", 'glibc.malloc.hugetlb=1')
  # Twenty times 80 MB are 400,000 pages of 4 KiB.
  plain = run(tmp_path, 'glibc.malloc.hugetlb=0')
  assert plain[:2] == (arguments, 'glibc.malloc.hugetlb=0')  # What the user has set is left alone.
  assert faults < plain[2] / 3


@pytest.fixture
def started(monkeypatch, tmp_path):
  """The commands that are restarted, on a system with huge pages on request."""
  commands = []
  monkeypatch.setattr(os, 'execv', lambda path, arguments: commands.append(arguments))
  monkeypatch.setattr(os, 'confstr', lambda name: 'glibc 2.36')
  monkeypatch.setattr(sys, 'platform', 'linux')
  monkeypatch.setattr(sys, 'orig_argv', ['python', '-m', 'paranet_jax.main', '--mode=eval'])
  monkeypatch.setattr(allocator, '_MODES', tmp_path / 'enabled')
  allocator._MODES.write_text('always [madvise] never\n')
  monkeypatch.setenv('GLIBC_TUNABLES', '')
  return commands


@pytest.mark.parametrize(
  ('before', 'after'),
  [('', 'glibc.malloc.hugetlb=1'), ('glibc.malloc.check=3', 'glibc.malloc.check=3:glibc.malloc.hugetlb=1')],
)
def test_it_restarts_once_and_keeps_other_settings(started, monkeypatch, before, after):
  monkeypatch.setenv('GLIBC_TUNABLES', before)
  allocator.use_huge_pages()
  allocator.use_huge_pages()
  assert os.environ['GLIBC_TUNABLES'] == after
  assert started == [[sys.executable, '-m', 'paranet_jax.main', '--mode=eval']]


def no_libc(name):
  raise ValueError('unrecognized configuration name')


@pytest.mark.parametrize(
  'elsewhere',
  [
    lambda patch: patch.setattr(sys, 'platform', 'darwin'),
    lambda patch: patch.setattr(os, 'confstr', no_libc),
    lambda patch: patch.setattr(sys, 'argv', ['calibrate', '--workdir=run', '--help']),
    lambda patch: allocator._MODES.unlink(),
    lambda patch: allocator._MODES.write_text('[always] madvise never\n'),
    lambda patch: allocator._MODES.write_text('always madvise [never]\n'),
  ],
)
def test_elsewhere_nothing_is_restarted(started, monkeypatch, elsewhere):
  elsewhere(monkeypatch)
  allocator.use_huge_pages()
  assert started == []


def test_a_restart_that_fails_does_not_stop_the_program(started, monkeypatch):
  def refused(*_):
    raise PermissionError(13, 'Permission denied', sys.executable)

  monkeypatch.setattr(os, 'execv', refused)
  assert allocator.use_huge_pages() is None
