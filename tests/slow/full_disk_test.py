"""Runs on file systems of 50 sizes, most of which are full before the end: one line each, and nothing is left behind.

Where no file system can be mounted, the run's Nth audit event makes every file one that cannot grow (see fault.py).
"""

import subprocess

import pytest
from killing import run
from running import TINY

RUN = (*TINY, '--config.name=PN1-d')
TRIES = 50


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  """Programs and images are read from here, so that only the run's own files lack room."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('PARANET_CACHE_DIR', str(tmp_path_factory.mktemp('cache')))
    assert run(*RUN, workdir=tmp_path_factory.mktemp('whole')) == (0, '')
    yield


def mounted(folder, size):
  """Whether a file system of so many bytes could be mounted."""
  folder.mkdir()
  command = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)]
  return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize('number', range(TRIES))
def test_a_full_disk_is_one_line_and_nothing_is_left(tmp_path, cache, number):
  folder = tmp_path / 'disk'
  real = mounted(folder, 4096 * (1 + number))
  try:
    fault = () if real else ('full', rf'(open .* [wxa]|mkdir .*){folder}|{folder}.* [wxa]', str(1 + number))
    code, err = run(*RUN, workdir=folder / 'run', fault=fault)
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
