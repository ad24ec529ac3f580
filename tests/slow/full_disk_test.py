"""Runs on file systems of 50 sizes, most of which are full before the end: one line each, and nothing is left behind.

Where no file system can be mounted, files cannot grow from the Nth file on that the run opens (see killing.py).
"""

import subprocess

import killing
import pytest
from killing import run

RUN = (*killing.RUN, '--config.train.epochs=2')
TRIES = 50


@pytest.fixture(scope='module')
def cached(tmp_path_factory):
  """Programs and images are in the cache, so that only the run's own files lack room."""
  assert run(*RUN, workdir=tmp_path_factory.mktemp('whole'))[::2] == (0, '')


def mounted(folder, size):
  """Whether a file system of so many bytes could be mounted."""
  folder.mkdir()
  command = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)]
  return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize('number', range(TRIES))
def test_a_full_disk_is_one_line_and_nothing_is_left(tmp_path, cached, number):
  folder = tmp_path / 'disk'
  real = mounted(folder, 4096 * (1 + number))
  try:
    fault = () if real else ('full', f'(open|os.mkdir) {folder}/run', 1 + number)
    code, _, err = run(*RUN, workdir=folder / 'run', fault=fault)
    left = [path.name for path in folder.rglob('*') if 'tmp' in path.name or path.name == 'deleted']
  finally:
    if real:
      subprocess.run(['umount', str(folder)], check=True)
  assert left == []
  if code or number < 20:
    assert code == 2 and err.startswith('error: ') and err.count('\n') == 1, err
    assert 'No space left on device' in err if real else 'File too large' in err
  else:
    assert (code, err) == (0, '')
