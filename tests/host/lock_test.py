"""Tests that a workdir has one training process at a time."""

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from killing import fault_here
from running import TINY, contents, refusal, run_main

from paranet_jax.host.errors import UserError
from paranet_jax.host.lock import lock_holder, workdir_lock

pytestmark = pytest.mark.usefixtures('programs')

HOLD = """
import multiprocessing, pathlib, sys, time
from paranet_jax.host.lock import workdir_lock
with workdir_lock(pathlib.Path(sys.argv[1])):
  if len(sys.argv) > 2:
    multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,)).start()
  print('held', flush=True)
  sys.stdin.read()
"""


def holder(workdir, *arguments):
  """A process that holds the lock of a workdir until its input ends."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLD, str(workdir), *arguments],
    cwd=Path(__file__).resolve().parents[2],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  assert process.stdout.readline() == 'held\n'
  return process


def test_a_second_process_is_refused_and_a_dead_one_is_not_waited_for(tmp_path):
  arguments = *TINY, '--config.name=PN1-d', '--config.train.max_steps=1', f'--workdir={tmp_path}'
  with holder(tmp_path) as process:
    before = contents(tmp_path)
    assert refusal(*arguments, started=True) == (
      f'workdir {tmp_path} is in use by process {process.pid} on {socket.gethostname()}; '
      'wait for it or stop it, or set --workdir'
    )
    assert contents(tmp_path) == before
    process.kill()
  assert (tmp_path / 'lock').exists()
  assert run_main(*arguments).code == 0
  assert not (tmp_path / 'lock').exists()


@pytest.mark.parametrize(
  ('make', 'found'),
  [
    (lambda lock: lock.symlink_to('mine'), 'a link'),
    (lambda lock: lock.symlink_to('nothing'), 'a link'),
    (lambda lock: lock.hardlink_to(lock.with_name('mine')), 'a file of another program'),
    (lambda lock: lock.mkdir(), 'Is a directory'),
    (os.mkfifo, 'a pipe or a device'),
  ],
)
def test_what_is_not_its_own_lock_is_left_alone(tmp_path, make, found):
  (tmp_path / 'mine').write_bytes(b'mine \xff')
  make(tmp_path / 'lock')
  before = contents(tmp_path)
  with pytest.raises(UserError) as error, workdir_lock(tmp_path):
    pass
  expected = f'expected {tmp_path}/lock to be the lock of a run, found {found}; move it away, or set --workdir'
  assert str(error.value) == expected
  assert contents(tmp_path) == before and os.path.lexists(tmp_path / 'lock')


def test_a_process_releases_the_lock_at_its_end(tmp_path):
  with holder(tmp_path) as process:
    process.communicate()
  assert not list(tmp_path.iterdir())
  with workdir_lock(tmp_path):
    assert (tmp_path / 'lock').read_text() == f'process {os.getpid()} on {socket.gethostname()}'
  assert not list(tmp_path.iterdir())


def test_the_holder_itself_does_not_release_it(tmp_path):
  """The system drops a lock when its process closes the file, however often that was opened."""
  code = (
    'import pathlib, sys; from paranet_jax.host.lock import lock_holder; print(lock_holder(pathlib.Path(sys.argv[1])))'
  )
  for again in (lock_holder, lambda workdir: pytest.raises(UserError, workdir_lock(workdir).__enter__)):
    with workdir_lock(tmp_path):
      again(tmp_path)
      asked = subprocess.run([sys.executable, '-c', code, tmp_path], stdout=subprocess.PIPE, text=True, check=True)
      assert asked.stdout == f'process {os.getpid()} on {socket.gethostname()}\n'
      with pytest.raises(UserError, match=f'is in use by process {os.getpid()} on '), workdir_lock(tmp_path):
        pass
      assert (tmp_path / 'lock').exists()
  assert not lock_holder(tmp_path) and not list(tmp_path.iterdir())


def test_a_full_disk(tmp_path):
  with (
    fault_here('full', f'open {re.escape(str(tmp_path))}', 1),
    pytest.raises(UserError, match='cannot be written .* make room'),
    workdir_lock(tmp_path),
  ):
    pass
  assert not list(tmp_path.iterdir())


def test_workers_that_outlive_a_killed_process_do_not_hold_it(tmp_path):
  with holder(tmp_path, 'with a worker') as process:
    try:
      process.kill()
      process.wait()
      with workdir_lock(tmp_path):
        pass
    finally:
      os.killpg(process.pid, 9)


def test_a_lock_that_was_removed_while_it_was_waited_for(tmp_path, monkeypatch):
  lockf, seen = fcntl.lockf, []

  def removed(file, *rest):
    if not seen:
      (tmp_path / 'lock').unlink()
    seen.append(os.fstat(file.fileno()).st_nlink)
    lockf(file, *rest)

  monkeypatch.setattr(fcntl, 'lockf', removed)
  with workdir_lock(tmp_path):
    assert seen == [0, 1] and (tmp_path / 'lock').exists()


def test_a_folder_that_does_not_exist(tmp_path):
  with pytest.raises(FileNotFoundError) as error, workdir_lock(tmp_path / 'none'):
    pass
  assert os.fspath(error.value.filename) == f'{tmp_path}/none/lock'


@pytest.mark.parametrize(
  ('number', 'reported'), [(errno.ENOLCK, True), (errno.EOPNOTSUPP, True), (errno.EACCES, False), (errno.EAGAIN, False)]
)
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, number, reported):
  def fail(*unused):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(fcntl, 'lockf', fail)
  if reported:
    with workdir_lock(tmp_path):
      pass
    assert capsys.readouterr().out == (
      f'workdir {tmp_path} cannot be locked ({os.strerror(number)}): run one training there at a time\n'
    )
  else:
    with pytest.raises(UserError, match='is in use by another process; wait for it'), workdir_lock(tmp_path):
      pass


def test_who_holds_a_folder_is_asked_without_taking_its_lock(tmp_path):
  assert lock_holder(tmp_path) == ''
  with holder(tmp_path) as process:
    assert lock_holder(tmp_path) == f'process {process.pid} on {socket.gethostname()}'
    assert lock_holder(tmp_path) != ''  # It is still held.
    process.kill()
  assert (tmp_path / 'lock').exists() and lock_holder(tmp_path) == ''
  (tmp_path / 'lock').unlink()
  (tmp_path / 'lock').symlink_to('nowhere')
  assert lock_holder(tmp_path) == ''
