"""Tests of working through a queue: order, stops, kills, failures, edits, and the code that a run goes on with."""

import errno
import json
import os
import shutil

import pytest
from queues import TWO, UNTIL_STOPPED, Ends, FakeQueue

from paranet_jax.experiments.queue import loop, record, state
from paranet_jax.experiments.queue.file import read_queue
from paranet_jax.experiments.queue.record import read_records
from paranet_jax.experiments.queue.results import markdown, results
from paranet_jax.host.errors import UserError

ORDER = ['early-s0', 'late-s0', 'late-s1']


def test_runs_are_trained_by_priority_and_then_skipped(tmp_path, capsys):
  queue = FakeQueue(tmp_path)
  assert queue.work() == {} and queue.names() == ORDER and queue.most == 1
  name, arguments, code, cores = queue.starts[0]
  assert arguments == [
    '--config=paranet_jax:paranet:PN1-d',
    '--config.data.name=digits',
    '--config.train.epochs=4',
    '--config.seed=0',
    f'--workdir={queue.workdir}/runs/early-s0',
  ]
  assert (code, cores) == ('first', ())
  assert 'early-s0 finished: 1: 14.00\n' in capsys.readouterr().out
  assert queue.record('early-s0')['finished'] and not queue.record('early-s0')['failed']
  assert queue.work() == {} and queue.names() == ORDER


def test_several_at_once_share_the_cores(tmp_path):
  queue = FakeQueue(tmp_path, looks=3)
  queue.work(cores=[(2,), (3,)], flags=['--data_dir=/data'])
  assert queue.most == 2 and sorted(cores for *_, cores in queue.starts[:2]) == [(2,), (3,)]
  assert all(arguments[-1] == '--data_dir=/data' for _, arguments, *_ in queue.starts)


def test_a_signal_stops_the_runs_and_the_next_start_goes_on(tmp_path, capsys):
  def act(queue):
    queue.stop.received = 'SIGTERM'

  queue = FakeQueue(tmp_path, ends={'early-s0': [UNTIL_STOPPED]}, on_look=act)
  assert queue.work() == {} and queue.names() == queue.stopped == ['early-s0']
  assert 'early-s0 stopped after step 20, saved\n' in capsys.readouterr().out
  queue.stop.received = queue.on_look = None
  queue.work()
  assert queue.names() == ['early-s0', *ORDER]
  # Its own configuration counts from now on.
  assert queue.starts[1][1] == [f'--workdir={queue.workdir}/runs/early-s0']
  assert 'early-s0 goes on after step 20' in capsys.readouterr().out


def test_all_runs_save_although_nothing_can_be_printed(tmp_path, monkeypatch):
  queue = FakeQueue(tmp_path, ends={'early-s0': [UNTIL_STOPPED], 'late-s0': [UNTIL_STOPPED]}, saves=2)

  def closed(line, **_):
    if 'saved' in line:
      assert queue.running == []
      raise BrokenPipeError

  queue.on_look = lambda queue: setattr(queue.stop, 'received', 'SIGINT')
  monkeypatch.setattr(loop, 'say', closed)
  with pytest.raises(BrokenPipeError):
    queue.work(cores=[(0,), (1,)])
  assert queue.stopped == ['early-s0', 'late-s0']
  assert all((queue.workdir / 'runs' / name / 'checkpoints' / '20').exists() for name in queue.stopped)


def test_a_damaged_run_is_stopped_with_the_others(tmp_path, capsys):
  def act(queue):
    (queue.workdir / 'runs' / 'early-s0').mkdir(parents=True)
    (queue.workdir / 'runs' / 'early-s0' / 'dataset.json').write_text('[]')
    queue.stop.received = 'SIGTERM'

  queue = FakeQueue(tmp_path, ends={'early-s0': [UNTIL_STOPPED], 'late-s0': [UNTIL_STOPPED]}, on_look=act)
  path = queue.workdir / 'runs' / 'early-s0' / 'dataset.json'
  why = f'{path} is not a JSON object (it holds []); restore it'
  assert queue.work(cores=[(0,), (1,)]) == {'early-s0': why} and queue.stopped == ['early-s0', 'late-s0']
  out = capsys.readouterr().out
  assert f'early-s0 failed: {why}\n' in out and 'late-s0 stopped after step 20, saved\n' in out


def test_runs_take_a_while_to_stop(tmp_path):
  queue = FakeQueue(tmp_path, ends={'early-s0': [UNTIL_STOPPED]}, saves=2)
  queue.on_look = lambda queue: setattr(queue.stop, 'received', 'SIGTERM')
  assert queue.work() == {} and queue.stopped == ['early-s0'] and queue.pauses == 3
  assert (queue.workdir / 'runs' / 'early-s0' / 'checkpoints' / '20').exists()


def test_a_queue_file_that_is_gone(tmp_path, capsys):
  queue = FakeQueue(tmp_path, on_look=lambda queue: queue.path.unlink(missing_ok=True))
  assert queue.work() == {} and queue.names() == ORDER
  err = capsys.readouterr().err
  assert err.startswith(f'the queue goes on as it was: expected a queue file at {queue.path}') and err.count('\n') == 1


def test_a_queue_that_dies_is_taken_over(tmp_path, monkeypatch):
  def killed(queue):
    raise SystemExit  # As far as its records are concerned.

  queue = FakeQueue(tmp_path, ends={'early-s0': [UNTIL_STOPPED]}, on_look=killed)
  with pytest.raises(SystemExit):
    queue.work()
  queue.on_look = None
  # Its run still saves, and is waited for; others go on.
  held = ['early-s0']
  monkeypatch.setattr(state, 'lock_holder', lambda folder: 'process 1 on here' if folder.name in held else '')
  queue.on_look = lambda queue: queue.names()[1:] == ORDER[1:] and held.clear()
  queue.work()
  assert queue.names() == ['early-s0', 'late-s0', 'late-s1', 'early-s0']


def test_a_run_may_finish_when_it_is_stopped(tmp_path, capsys):
  def act(queue):
    queue.stop.received = 'SIGTERM'

  queue = FakeQueue(tmp_path, TWO.replace('train.epochs = 4', 'train.epochs = 2'), {'early-s0': [None]}, on_look=act)
  assert queue.work() == {} and queue.record('early-s0')['finished']
  assert 'early-s0 finished\n' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('ends', 'started', 'failed'),
  [
    # Killed at the start and then after each of two checkpoints.
    ([Ends(-9, 0), Ends(-9, 1), Ends(-9, 2)], 4, None),
    ([Ends(-9, 1), Ends(-9, 1)], 2, 'killed by signal 9 twice after the same step'),
    ([Ends(2, 0, 'no such data')], 1, 'no such data'),
    ([Ends(0, 1)], 1, ''),  # Somebody stopped it.
  ],
)
def test_killed_and_failing_runs(tmp_path, capsys, ends, started, failed):
  queue = FakeQueue(tmp_path, ends={'early-s0': ends})
  assert queue.work() == ({} if failed is None else {'early-s0': failed or 'stopped'})
  assert queue.names() == ['early-s0'] * started + ORDER[1:]
  out = capsys.readouterr().out
  assert (f'early-s0 failed: {failed}\n' in out) == bool(failed)
  assert queue.record('early-s0')['failed'] == (failed or '')
  # The next start tries again.
  assert queue.work() == {} and queue.names()[-1] == ('late-s1' if len(ends) == 3 else 'early-s0')


def test_a_run_goes_on_with_the_code_it_began_with(tmp_path, capsys):
  queue = FakeQueue(tmp_path, ends={'early-s0': [Ends(0, 1)], 'late-s0': [Ends(0, 1)], 'late-s1': [Ends(2, 0, 'no')]})
  queue.work()
  (queue.package / 'main.py').write_text('second')
  queue.work()
  assert [(name, code) for name, _, code, _ in queue.starts[3:]] == [
    ('early-s0', 'first'),
    ('late-s0', 'first'),
    ('late-s1', 'second'),  # It had not begun.
  ]
  assert queue.record('early-s0')['code'] != queue.record('late-s1')['code']


@pytest.mark.parametrize('damage', [lambda file: file.write_text('third'), lambda file: file.unlink()])
def test_code_that_is_not_what_it_was_is_refused(tmp_path, damage):
  queue = FakeQueue(tmp_path, ends={'early-s0': [Ends(0, 1)]})
  queue.work()
  code = queue.workdir / 'code' / queue.record('early-s0')['code']
  damage(code / 'paranet_jax' / 'main.py')
  assert queue.work()['early-s0'] == (
    f'the code that early-s0 began with was changed ({code}); restore it, or remove the folder of the run, which then '
    'begins again'
  )


@pytest.mark.parametrize('change', [shutil.Error([('a', 'b', 'No such file')]), FileNotFoundError(2, 'No such file')])
def test_code_that_changes_while_it_is_copied(tmp_path, monkeypatch, change):
  def copy(*_, **__):
    raise change

  queue = FakeQueue(tmp_path)
  monkeypatch.setattr(shutil, 'copytree', copy)
  why = f'{queue.package} changed while it was copied; the same command tries again'
  assert queue.work() == dict.fromkeys(ORDER, why)


def test_a_full_disk_while_code_is_copied(tmp_path, monkeypatch):
  def copy(*_, **__):
    raise shutil.Error([('a', 'b', f'[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}')])

  monkeypatch.setattr(shutil, 'copytree', copy)
  rooms = iter([10**9, 10**6])
  with pytest.raises(UserError, match=r'cannot be written \(No space left on device\)'):
    FakeQueue(tmp_path).work(free=lambda path: next(rooms))


def test_links_to_nothing_are_no_code(tmp_path):
  queue = FakeQueue(tmp_path)
  (queue.package / '.#main.py').symlink_to('user@host.1234')  # The lock of an editor.
  (queue.package / 'configs').symlink_to('../settings')  # As in a checkout.
  (queue.package.parent / 'settings').mkdir()
  (queue.package.parent / 'settings' / 'file.py').write_text('a')
  assert queue.work() == {} and queue.names() == ORDER
  code = queue.workdir / 'code' / queue.record('early-s0')['code'] / 'paranet_jax'
  assert sorted(path.name for path in code.iterdir()) == ['configs', 'main.py']
  assert (code / 'configs' / 'file.py').read_text() == 'a'


def test_the_disk_fills_while_a_run_trains(tmp_path):
  queue, rooms = FakeQueue(tmp_path, ends={'early-s0': [UNTIL_STOPPED]}), iter([10**9, 10**6])
  with pytest.raises(UserError, match=r'has 1 MB of free disk, and a run needs 200 MB'):
    queue.work(free=lambda path: next(rooms))
  assert queue.stopped == ['early-s0']


READERS = """
[[runs]]
name = 'student'
config = 'paranet_jax:paranet:PN1-d'
set = { train.epochs = 4, data.name = 'digits', init_from = 'WORK/runs/teacher-s0' }

[[runs]]
name = 'teacher'
config = 'paranet_jax:paranet:PN1-d'
set = { train.epochs = 4, data.name = 'digits', init_from = 'OTHER' }
priority = 1
"""


@pytest.mark.parametrize(
  ('other', 'ends', 'names'),
  [
    ('', [], ['teacher-s0', 'student-s0']),
    ('', [Ends(2, 0, 'no')], ['teacher-s0', 'student-s0']),
    ('WORK/runs/student-s0', [], ['teacher-s0', 'student-s0']),  # Each reads the other: one has to begin.
    ('WORK/runs/teacher-s0', [], ['teacher-s0', 'student-s0']),  # It reads itself.
  ],
)
def test_a_run_waits_for_the_one_that_it_reads(tmp_path, other, ends, names):
  text = READERS.replace('OTHER', other).replace('WORK', str(tmp_path / 'work'))
  queue = FakeQueue(tmp_path, text, {'teacher-s0': ends})
  queue.work(cores=[(0,), (1,)])
  assert queue.names() == names and queue.most == 1


def test_a_run_waits_for_the_one_that_it_reads_by_another_path(tmp_path):
  (tmp_path / 'link').symlink_to(tmp_path / 'work')
  queue = FakeQueue(tmp_path, READERS.replace('OTHER', '').replace('WORK', str(tmp_path / 'link')))
  queue.work(cores=[(0,), (1,)])
  assert queue.names() == ['teacher-s0', 'student-s0'] and queue.most == 1


def test_a_run_waits_for_the_averaged_weights_that_it_reads(tmp_path):
  text = READERS.replace('OTHER', '').replace('teacher-s0', 'teacher-s0/average')
  queue = FakeQueue(tmp_path, text.replace('WORK', str(tmp_path / 'work')))
  queue.work(cores=[(0,), (1,)])
  assert queue.names() == ['teacher-s0', 'student-s0'] and queue.most == 1


def test_a_run_is_the_same_by_another_path(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  text = "workdir = 'work'\n" + READERS.replace('OTHER', '').replace('WORK', '{workdir}')
  queue = FakeQueue(tmp_path, text, {'student-s0': [Ends(0, 1)]})
  assert queue.work() == {'student-s0': 'stopped'}
  shutil.copytree(queue.workdir, tmp_path / 'copy')
  before, why = '--config.init_from=work/runs/teacher-s0', None
  monkeypatch.chdir('/')  # Where the folder has no short name.
  for folder in (queue.workdir, tmp_path / 'copy'):
    student = read_queue(queue.path, folder).runs[-1]
    now = f'--config.init_from={folder}/runs/teacher-s0'
    assert student.name == 'student-s0' and now in student.arguments
    try:
      loop.check_same(student, state.run_state(folder, student.name), read_records(folder)[student.name])
    except UserError as error:
      why = str(error)
    refused = f'it began with {before}, and the file has {now}; give it another name, or undo the change'
    assert why == (None if folder == queue.workdir else refused)


def test_a_run_that_cannot_be_started(tmp_path):
  queue = FakeQueue(tmp_path)

  def start(arguments, code, log, cores):
    if log.stem == 'early-s0':
      raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return queue.start(arguments, code, log, cores)

  why = 'it cannot be started ([Errno 11] Resource temporarily unavailable)'
  assert queue.work(start=start) == {'early-s0': why} and queue.names() == ORDER[1:]


def test_output_that_is_closed_fails_no_run(tmp_path, monkeypatch):
  def closed(line, **_):
    raise BrokenPipeError

  queue = FakeQueue(tmp_path)
  queue.write('early-s0', 1)  # By another command, which is said.
  monkeypatch.setattr(loop, 'say', closed)
  with pytest.raises(BrokenPipeError):
    queue.work()
  assert queue.names() == [] and not (queue.workdir / 'queue.json').exists()


def test_another_environment_is_reported(tmp_path, capsys, monkeypatch):
  queue = FakeQueue(tmp_path, ends={'early-s0': [Ends(0, 1)]})
  queue.work()
  monkeypatch.setattr(record, 'cpu_name', lambda: 'another one')
  monkeypatch.setattr(record, 'library_versions', lambda: {'jax': '99'})
  before = queue.record('early-s0')['starts'][0]
  queue.work()
  line = next(line for line in capsys.readouterr().out.splitlines() if 'although' in line)
  assert line.startswith('early-s0 goes on although this changed, so that last bits may: ')
  assert f'processor: {before["processor"]} -> another one' in line
  assert f'jax: {before["versions"]["jax"]} -> 99' in line and 'cores' not in line
  assert [start['processor'] for start in queue.record('early-s0')['starts']] == [before['processor'], 'another one']


def test_an_edited_file_is_read_before_the_next_run(tmp_path, capsys):
  def edit(queue):
    text = queue.path.read_text()
    if 'added' not in text:
      queue.path.write_text(text.replace('seeds = [0, 1]', '') + ADDED)
      os.utime(queue.path, ns=(1, 1))  # Whatever the clock's resolution.
    elif 'added-s0' in queue.names() and 'broken' not in text:
      queue.path.write_text(text + 'broken')
      os.utime(queue.path, ns=(2, 2))

  queue = FakeQueue(tmp_path, on_look=edit)
  assert queue.work() == {} and queue.names() == ['early-s0', 'added-s0', 'late-s0']
  out, err = capsys.readouterr()
  assert f'{queue.path} was edited: 3 runs\n' in out
  assert err.startswith(f'the queue goes on as it was: {queue.path} is not TOML (') and err.count('\n') == 1


def test_an_edit_between_the_reading_of_the_file_and_the_first_run(tmp_path):
  queue = FakeQueue(tmp_path)
  read = read_queue(queue.path)
  queue.path.write_text(TWO + ADDED)
  os.utime(queue.path, ns=(1, 1))  # Whatever the clock's resolution.
  queue.queue = loop.Queue(read, queue.workdir, **queue.fakes())
  assert queue.queue.work(queue.stop) == {} and queue.names() == ['early-s0', 'added-s0', 'late-s0', 'late-s1']


ADDED = """
[[runs]]
name = 'added'
config = 'paranet_jax:paranet:PN1-d'
set = { train.epochs = 4, data.name = 'digits' }
priority = 2
"""


@pytest.mark.parametrize('end', [Ends(0, 1), Ends(0, 4)])
def test_a_run_that_has_begun_is_not_made_another_one(tmp_path, end):
  queue = FakeQueue(tmp_path, ends={'early-s0': [end]})
  queue.work()
  queue.path.write_text(
    queue.path.read_text().replace("epochs = 4, data.name = 'digits' }\npriority", 'epochs = 5 }\npriority')
  )
  assert queue.work() == {
    'early-s0': 'it began with --config.data.name=digits --config.train.epochs=4, and the file has '
    '--config.train.epochs=5; give it another name, or undo the change'
  }


def test_a_run_waits_for_a_teacher_that_may_be_allowed_again(tmp_path):
  queue = FakeQueue(tmp_path, READERS.replace('OTHER', '').replace('WORK', str(tmp_path / 'work')) + ADDED)
  queue.ends = {name: [Ends(0, 1)] for name in ('teacher-s0', 'added-s0')}
  queue.stop.received = None
  queue.work()
  assert sorted(queue.names()) == ['added-s0', 'student-s0', 'teacher-s0']
  shutil.rmtree(queue.workdir / 'runs' / 'student-s0')
  right = queue.path.read_text()
  queue.path.write_text(right.replace("init_from = ''", "init_from = '', train.warmup_epochs = 1"))

  def undo(queue):
    queue.path.write_text(right)
    os.utime(queue.path, ns=(1, 1))

  queue.on_look = undo
  queue.starts.clear()
  assert queue.work(cores=[(0,), (1,)]) == {}
  assert queue.names()[-1] == 'student-s0' and sorted(queue.names()) == ['added-s0', 'student-s0', 'teacher-s0']


def test_a_wrong_edit_is_undone_while_the_queue_works(tmp_path):
  names = ['early-s0', 'late-s0', 'late-s1']
  queue = FakeQueue(tmp_path, ends={name: [Ends(0, 1)] for name in names})
  queue.work()
  assert queue.names() == names
  right = queue.path.read_text()
  queue.path.write_text(right.replace("epochs = 4, data.name = 'digits' }\npriority", 'epochs = 5 }\npriority'))

  def undo(queue):
    queue.path.write_text(right)
    os.utime(queue.path, ns=(1, 1))  # Whatever the clock's resolution.

  queue.on_look = undo
  assert queue.work() == {} and queue.names() == [*names, 'late-s0', 'early-s0', 'late-s1']
  assert queue.record('early-s0')['failed'] == ''


@pytest.mark.parametrize(('epochs', 'again'), [(4, []), (3, ['early-s0'])])
def test_a_run_that_failed_is_tried_again_once_its_fields_are_edited(tmp_path, epochs, again):
  queue = FakeQueue(tmp_path, ends={'early-s0': [Ends(2, 0, 'no')]})

  def edit(queue):
    if 'late-s0' in queue.names():
      queue.path.write_text(
        TWO.replace("4, data.name = 'digits' }\npriority", f"{epochs}, data.name = 'digits' }}\npriority")
      )
      os.utime(queue.path, ns=(1, 1))  # Whatever the clock's resolution.

  queue.on_look = edit
  assert queue.work() == ({} if again else {'early-s0': 'no'})
  assert queue.names() == ['early-s0', 'late-s0', *again, 'late-s1']


def test_runs_of_other_commands(tmp_path, capsys):
  """One goes on, one is finished, and one is another run."""
  queue = FakeQueue(tmp_path)
  for name, epoch in (('early-s0', 1), ('late-s0', 4), ('late-s1', 1)):
    queue.write(name, epoch)
  path = queue.workdir / 'runs' / 'late-s1' / 'config.json'
  path.write_text(path.read_text().replace('"batch_size": 64', '"batch_size": 32'))
  summary = queue.workdir / 'runs' / 'late-s0' / 'summary.json'
  place = {'finished': '2026-01-02', 'processor': 'another one', 'cores': 7}
  summary.write_text(json.dumps(json.loads(summary.read_text()) | place))
  failed = queue.work()
  assert failed == {
    'late-s1': f'{path.parent} holds a run with a different configuration: train.batch_size: 32 -> 64 (saved -> now); '
    'give it another name'
  }
  assert queue.names() == ['early-s0'] and not queue.record('late-s0')['code']
  assert queue.record('late-s0')['finished'] == '2026-01-02'
  found = results(read_queue(queue.path), queue.workdir, read_records(queue.workdir))
  assert '| late-s0 | 4 | 2026-01-02 | — | — | another one | 7 | 0.02 |' in markdown(found).splitlines()
  assert 'early-s0 was begun by another command: it goes on with the present code\n' in capsys.readouterr().out


def test_the_disk_fills_while_a_run_is_prepared(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(loop, 'keep_code', full)
  rooms = iter([10**9, 10**6])
  with pytest.raises(UserError, match=r'cannot be written \(No space left on device\), and its checkpoints are intact'):
    FakeQueue(tmp_path).work(free=lambda path: next(rooms))


def test_a_full_disk_stops_the_queue(tmp_path):
  rooms = iter([10**9, 10**9, 10**6])
  queue = FakeQueue(tmp_path, ends={'early-s0': [UNTIL_STOPPED]})
  with pytest.raises(UserError, match=r'work has 1 MB of free disk, and a run needs 200 MB; make room, and the same'):
    queue.work(free=lambda path: next(rooms), cores=[(0,), (1,), (2,)])
  assert queue.stopped == ['early-s0', 'late-s0'] or queue.stopped == ['early-s0']
