"""Tests of the process of a run and of its code, with packages of one file in place of ours."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from paranet_jax.experiments.queue import child
from paranet_jax.experiments.queue.code import commit, fingerprint, keep_code, kept_code
from paranet_jax.experiments.queue.process import RunProcess, share_cores
from paranet_jax.host.errors import UserError

MAIN = """
import os, sys, time
import paranet_jax
print(paranet_jax.__file__, os.sched_getaffinity(0), sys.argv[1:], flush=True)
print('error: no\\x07 data', file=sys.stderr) if 'fail' in sys.argv else None
time.sleep(60 if 'wait' in sys.argv else 0)
sys.exit(2 if 'fail' in sys.argv else 0)
"""


@pytest.fixture
def code(tmp_path):
  """A folder to import a package from."""
  package = tmp_path / 'code' / 'paranet_jax'
  package.mkdir(parents=True)
  (package / '__init__.py').write_text('')
  (package / 'main.py').write_text(MAIN)
  return package.parent


def wait(process, seconds=30):
  end = time.monotonic() + seconds
  while process.ended() is None:
    assert time.monotonic() < end
    time.sleep(0.01)
  return process.ended()


def test_a_process_has_its_own_code_cores_and_log(code, tmp_path, monkeypatch):
  monkeypatch.chdir(os.path.dirname(os.path.dirname(__file__)))
  log, core = tmp_path / 'log', max(os.sched_getaffinity(0))
  log.write_text('earlier\nerror: old\n')
  process = RunProcess(['one', 'two'], code, log, (core,))
  assert wait(process) == 0
  lines = log.read_text().splitlines()
  assert lines == ['earlier', 'error: old', f"{code}/paranet_jax/__init__.py {{{core}}} ['one', 'two']"]
  assert process.reason() == lines[-1]
  process = RunProcess(['fail'], code, log)
  assert wait(process) == 2 and process.reason() == 'no\\x07 data'
  log.unlink()
  assert process.reason() == 'its log cannot be read (No such file or directory)'


def test_a_process_is_stopped_by_one_signal(code, tmp_path):
  process = RunProcess(['wait'], code, tmp_path / 'log')
  while not (tmp_path / 'log').read_text():
    time.sleep(0.01)
  process.stop()
  assert wait(process) == -signal.SIGTERM


SAVES = """
import signal, sys, time
def remember(*_):
  signal.signal(signal.SIGTERM, signal.SIG_DFL)  # As `StopRequest` does: a second signal acts.
  stopped.append(True)
stopped = []
signal.signal(signal.SIGTERM, remember)
print('trains', flush=True)
while not stopped:
  time.sleep(0.01)
print('saves', flush=True)
time.sleep(1)
sys.exit(0)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems do not tell which signals a process handles')
@pytest.mark.parametrize('by_others', [False, True])
def test_a_run_that_has_got_a_signal_gets_no_second_one(code, tmp_path, by_others):
  """A service that is stopped, or a job that is canceled: all processes get the signal, and the queue passes it on."""
  (code / 'paranet_jax' / 'main.py').write_text(SAVES)
  process = RunProcess([], code, tmp_path / 'log')
  while 'trains' not in (tmp_path / 'log').read_text():
    assert process.ended() is None
    time.sleep(0.01)
  assert process.ended() is None
  if by_others:
    process._process.terminate()
    while 'saves' not in (tmp_path / 'log').read_text():
      time.sleep(0.01)
  process.stop()
  assert wait(process) == 0


KILLED = """
import os, signal, sys, time
from pathlib import Path
from paranet_jax.experiments.queue.process import RunProcess
process = RunProcess(['wait'], Path(sys.argv[1]), Path(sys.argv[2]))
while not Path(sys.argv[2]).read_text():
  time.sleep(0.01)
print(process._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems do not tell a process that its parent ended')
def test_a_process_is_stopped_when_its_queue_is_killed(code, tmp_path):
  command = [sys.executable, '-c', KILLED, str(code), str(tmp_path / 'log')]
  found = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=os.getcwd())
  assert found.returncode == -signal.SIGKILL
  end = time.monotonic() + 30
  while os.path.exists(f'/proc/{int(found.stdout)}') and b'paranet_jax.main' in _command(int(found.stdout)):
    assert time.monotonic() < end
    time.sleep(0.01)


def _command(process):
  try:
    with open(f'/proc/{process}/cmdline', 'rb') as file:
      return file.read()
  except OSError:
    return b''


def test_a_run_does_not_begin_after_its_queue_has_ended(code):
  command = [sys.executable, child.__file__, '1', '', '-m', 'paranet_jax.main']  # Not the process that starts it.
  found = subprocess.run(command, capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(code)})
  assert (found.returncode, found.stdout, found.stderr) == (1, '', 'process 1 has ended\n')


@pytest.mark.skipif(not os.path.exists('/proc/self/autogroup'), reason='the kernel has no autogroups')
@pytest.mark.parametrize('niceness', [0, 7])
def test_the_session_of_a_run_is_as_nice_as_its_queue(niceness):
  command = ['nice', '-n', str(niceness), sys.executable, child.__file__, str(os.getpid()), '']
  command += ['-c', "print(open('/proc/self/autogroup').read())"]
  read = subprocess.run(command, capture_output=True, text=True, start_new_session=True, check=True)
  assert read.stdout.split()[1:] == ['nice', str(niceness + os.nice(0))]


@pytest.mark.parametrize(
  ('count', 'at_once', 'expected'),
  [
    (None, 1, [()]),
    (1, 1, [(7,)]),
    (4, 1, [(4, 5, 6, 7)]),
    (4, 2, [(4, 5), (6, 7)]),
    (5, 2, [(3, 4), (5, 6)]),
    (None, 2, [(2, 3, 4), (5, 6, 7)]),
  ],
)
def test_shares_of_cores(monkeypatch, count, at_once, expected):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {2, 3, 4, 5, 6, 7})
  assert share_cores(count, at_once) == expected


@pytest.mark.parametrize(('count', 'at_once'), [(7, 1), (1, 2), (None, 7)])
def test_too_few_cores(monkeypatch, count, at_once):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {2, 3, 4, 5, 6, 7})
  with pytest.raises(UserError, match='expected --cores from --at-once . to 6 .*; set --cores or --at-once'):
    share_cores(count, at_once)


def test_no_cores_to_bind_to(monkeypatch):
  monkeypatch.delattr(os, 'sched_setaffinity')
  assert share_cores(None, 2) == [(), ()]
  with pytest.raises(UserError, match='--cores needs Linux'):
    share_cores(2, 1)


def test_copies_of_the_code(code, tmp_path):
  package = code / 'paranet_jax'
  (tmp_path / 'configs').mkdir()
  (package / 'configs').symlink_to(tmp_path / 'configs')
  before = fingerprint(package)
  # A queue file and compiled files are no code.
  (tmp_path / 'configs' / 'queue.toml').write_text('')
  (package / '__pycache__').mkdir()
  (package / '__pycache__' / 'main.pyc').write_text('')
  assert fingerprint(package) == before == keep_code(tmp_path, package) == keep_code(tmp_path, package)
  (tmp_path / 'configs' / 'new.py').write_text('x = 1')
  after = fingerprint(package)
  assert after != before and keep_code(tmp_path, package) == after
  kept = kept_code(tmp_path, after, 'run', package)
  assert (kept / 'paranet_jax' / 'configs' / 'new.py').read_text() == 'x = 1'
  assert not (kept / 'paranet_jax' / '__pycache__').exists()
  with pytest.raises(UserError, match='the code that run began with is gone'):
    kept_code(tmp_path, 'nothing', 'run', package)


def test_a_damaged_copy_is_made_again(code, tmp_path):
  """Such as by a crash of the machine: a run that has not begun takes the same code, and the others go on with it."""
  package = code / 'paranet_jax'
  found = keep_code(tmp_path, package)
  copy = tmp_path / 'code' / found / 'paranet_jax' / 'main.py'
  copy.write_text('')
  with pytest.raises(UserError, match=f'the code that run began with was changed .*{found}'):
    kept_code(tmp_path, found, 'run', package)
  assert keep_code(tmp_path, package) == found
  assert kept_code(tmp_path, found, 'run', package) == tmp_path / 'code' / found and copy.read_text() == MAIN
  assert (tmp_path / 'code' / f'{found}.damaged' / 'paranet_jax' / 'main.py').read_text() == ''  # Nothing is lost.


def test_code_that_changes_while_it_is_copied(code, tmp_path, monkeypatch):
  copy = shutil.copytree

  def edited(package, *rest, **options):
    (package / 'main.py').write_text('edited')
    return copy(package, *rest, **options)

  monkeypatch.setattr(shutil, 'copytree', edited)
  package = code / 'paranet_jax'
  with pytest.raises(UserError, match=f'^{package} changed while it was copied; the same command tries again$'):
    keep_code(tmp_path / 'work', package)
  monkeypatch.undo()
  kept = keep_code(tmp_path / 'work', package)
  assert [path.name for path in (tmp_path / 'work' / 'code').iterdir()] == [kept] == [fingerprint(package)]


def test_commit(tmp_path):
  package = tmp_path / 'venv' / 'paranet_jax'
  package.mkdir(parents=True)
  (package / '__init__.py').write_text('')
  (tmp_path / '.gitignore').write_text('venv')
  assert commit(package) is None

  def git(*arguments):
    subprocess.run(['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a@b', *arguments], check=True)

  git('init', '-q')
  git('commit', '-q', '--allow-empty', '-m', 'first')
  assert commit(package) is None  # The repository of somebody who installed it.
  git('add', '-f', 'venv')
  git('commit', '-q', '-m', 'second')
  found = commit(package)
  assert found and len(found) == 12
  os.utime(package / '__init__.py', (1, 1))  # What git has noted of it is out of date.
  index = (tmp_path / '.git' / 'index').read_bytes()
  assert commit(package) == found and (tmp_path / '.git' / 'index').read_bytes() == index  # A lock may be in the way.
  (package / 'file').write_text('')
  assert commit(package) == found  # Ignored, as compiled files are.
  (package / '__init__.py').write_text('1')
  assert commit(package) == f'{found}+changes'
