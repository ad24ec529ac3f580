"""Tests of `python -m paranet_jax.experiments run`: files, exit codes and refusals, with runs that train nothing."""

import json
import os
import signal

import pytest
from queues import TWO, UNTIL_STOPPED, Ends, FakeQueue
from running import contents, run_command

from paranet_jax.experiments import __main__ as experiments
from paranet_jax.experiments.queue import loop

NAMES = ['early-s0', 'late-s0', 'late-s1']


@pytest.fixture
def run(monkeypatch):
  """Runs the command on a queue whose processes it fakes."""
  real = loop.Queue

  def command(fake, *arguments):
    def queue(*rest, **options):
      fake.queue = real(*rest, **options, **fake.fakes())
      return fake.queue

    monkeypatch.setattr(loop, 'Queue', queue)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1, 2, 3})
    return run_command(experiments.main, 'run', fake.path, *arguments)

  return command


def lines(text):
  """Of a table, with single spaces."""
  return [' '.join(line.split()) for line in text.splitlines()]


def test_a_queue_is_trained_and_written_down(tmp_path, run):
  fake = FakeQueue(tmp_path)
  flags = f'--data_dir={tmp_path}/data', '--compilation_cache=off', '--accept_data_changes', '--accept_wrong_numbers'
  code, out, err = run(fake, f'--workdir={fake.workdir}', *flags)
  assert (code, err, fake.names()) == (0, '', NAMES)
  assert all(arguments[-4:] == list(flags) for _, arguments, *_ in fake.starts)
  assert lines(out)[-5:] == [
    'early-s0 1 finished 4.0 of 4 1: 14.00 —',
    'late-s0 100 finished 4.0 of 4 1: 14.00 —',
    'late-s1 100 finished 4.0 of 4 1: 15.00 —',
    'left: 0 s (estimated from what has been trained)',
    f'written: {fake.workdir}/results.md',
  ]
  rows = json.loads((fake.workdir / 'results.json').read_text())['rows']
  assert [(row['run'], row['seeds'], row['ours']) for row in rows] == [
    ('early', [0], pytest.approx(14)),
    ('late', [0, 1], pytest.approx(14.5)),
  ]
  # Nothing is left to train.
  assert run(fake, f'--workdir={fake.workdir}').code == 0 and fake.names() == NAMES


def test_a_failed_run_is_an_exit_code(tmp_path, run):
  fake = FakeQueue(tmp_path, ends={'late-s0': [Ends(2, 0, 'no data')]})
  code, out, err = run(fake, f'--workdir={fake.workdir}')
  assert (code, err, fake.names()) == (1, '', NAMES)
  # The other seed, which trained 4 epochs in 80 s, tells how long it would take.
  assert lines(out)[-5:-1] == [
    'late-s0 100 failed 0.0 of 4 — 1 min 20 s',
    'late-s1 100 finished 4.0 of 4 1: 15.00 —',
    'late-s0 failed: no data',
    'left: 1 min 20 s (estimated from what has been trained)',
  ]


@pytest.mark.parametrize('file', ['summary.json', 'metrics.jsonl', 'dataset.json'])
def test_a_damaged_run_stops_no_other_one(tmp_path, run, file):
  path = tmp_path / 'work' / 'runs' / 'early-s0' / file

  def damage(_):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('[]\n')

  fake = FakeQueue(tmp_path, ends={'early-s0': [Ends(0, 0)]}, on_look=damage)
  code, out, err = run(fake, f'--workdir={fake.workdir}')
  assert (code, err, fake.names()) == (1, '', NAMES)
  why = next(line for line in lines(out) if line.startswith('early-s0 failed: ') and str(path) in line)
  assert 'early-s0 1 damaged — — —' in lines(out) and lines(out)[-3] == why and fake.record('early-s0')['failed'] in why
  results = json.loads((fake.workdir / 'results.json').read_text())
  assert [row['run'] for row in results['rows']] == ['late']
  assert results['left_out'] == [why.replace(' failed', '')]


def test_a_run_is_stopped_before_its_first_checkpoint(tmp_path, run):
  fake = FakeQueue(tmp_path, ends={'early-s0': [Ends(0, 0)]})
  fake.on_look = lambda _: fake.write('early-s0', 0) or os.rmdir(fake.workdir / 'runs/early-s0/checkpoints/0')
  code, out, _ = run(fake, f'--workdir={fake.workdir}')
  assert code == 1 and 'early-s0 was stopped after step 0; the next start of the queue resumes it' in lines(out)
  assert 'early-s0 1 stopped at step 0 0.0 of 4 — 1 min 20 s' in lines(out)


def test_a_signal_stops_the_queue_and_the_same_command_goes_on(tmp_path, run):
  fake = FakeQueue(tmp_path, ends={'early-s0': [UNTIL_STOPPED]}, on_look=lambda _: os.kill(os.getpid(), signal.SIGTERM))
  code, out, err = run(fake, f'--workdir={fake.workdir}')
  assert (code, err, fake.names()) == (130, '', ['early-s0'])
  assert lines(out)[-1] == 'stopped by SIGTERM; the same command goes on'
  # What it has reached by then is written, and said to be partial.
  (row,) = json.loads((fake.workdir / 'results.json').read_text())['rows']
  assert (row['run'], row['epoch'], row['partial'], row['ours']) == ('early', 2, True, pytest.approx(12))
  fake.on_look = None
  assert run(fake, f'--workdir={fake.workdir}').code == 0 and fake.names() == ['early-s0', *NAMES]


def test_status_and_results_train_nothing(tmp_path, run):
  fake = FakeQueue(tmp_path)
  fake.write('early-s0', 4)
  fake.write('late-s0', 2)
  before = contents(fake.workdir)
  # The finished run took 20 s an epoch, at 20 images/s the other one takes 10 x 64 / 20 = 32 s.
  table = [
    'run priority state epoch test accuracy (%) left',
    'early-s0 1 finished 4.0 of 4 1: 14.00 —',
    'late-s0 100 stopped at step 20 2.0 of 4 1: 12.00 1 min 04 s',
    'late-s1 100 waiting 0.0 of 4 — 2 min 08 s',
    'left: 2 min 08 s, 2 at once (estimated from what has been trained)',
  ]
  arguments = f'--workdir={fake.workdir}', '--at-once=2', '--cores=4'
  code, out, err = run(fake, '--status', *arguments)
  assert (code, lines(out), err) == (0, table, '') and contents(fake.workdir) == before
  code, out, err = run(fake, '--write', *arguments)
  assert (code, lines(out), err) == (0, [*table, f'written: {fake.workdir}/results.md'], '')
  after = contents(fake.workdir)
  assert after.keys() - before.keys() == {'results.json', 'results.md'} and before.items() <= after.items()
  assert fake.names() == []


def test_the_results_of_another_queue_are_not_replaced_in_silence(tmp_path, run):
  fake = FakeQueue(tmp_path)
  fake.write('early-s0', 4)
  arguments = f'--workdir={fake.workdir}', '--write'
  assert 'results of' not in run(fake, *arguments).out + run(fake, *arguments).out
  fake.path = fake.path.rename(tmp_path / 'other.toml')
  assert lines(run(fake, *arguments).out)[0] == (
    f'{fake.workdir} has the results of queue.toml, and those of other.toml take their place; `run` queue.toml with '
    '--write writes them again'
  )


@pytest.mark.parametrize(
  ('text', 'arguments', 'folder'),
  [('', (), 'results/queue'), ("workdir = 'own'", (), 'own'), ("workdir = 'own'", ('--workdir=flag',), 'flag')],
)
def test_the_folder_of_a_queue(tmp_path, run, monkeypatch, text, arguments, folder):
  monkeypatch.chdir(tmp_path)
  fake = FakeQueue(tmp_path, text + TWO)
  code, out, _ = run(fake, '--write', *arguments)
  assert code == 0 and lines(out)[-1] == f'written: {tmp_path}/{folder}/results.md'
  assert 'Nothing has been measured yet.' in (tmp_path / folder / 'results.md').read_text()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--at-once=0'], 'argument --at-once: expected an integer of 1 or more, found 0; see --help'),
    (['--cores=5000', '--status'], 'expected --cores from --at-once 1 to 4 (the cores of this process), found 5000; '),
    (['--workdir={folder}/run'], 'expected the folder of a queue, found a run in {folder}/run; set --workdir'),
    (['--workdir={folder}/tables'], 'expected no results.json in {folder}/tables or that of a queue, found that of'),
    (['--workdir={folder}/tables', '--write'], 'expected no results.json in {folder}/tables or that of a queue, '),
    (['--workdir={folder}/page', '--write'], 'expected {folder}/page/results.md to be a file, found a folder, '),
    (['--workdir={folder}/queue.toml'], 'workdir {folder}/queue.toml must be a folder, found a file; set --workdir'),
    (['--workdir=gs://bucket'], 'expected a local path, found the URL gs://bucket; '),
  ],
)  # fmt: skip
def test_refusals(tmp_path, run, arguments, message):
  fake = FakeQueue(tmp_path)
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'config.json').write_text('{}')
  (tmp_path / 'page' / 'results.md').mkdir(parents=True)
  (tmp_path / 'tables').mkdir()
  (tmp_path / 'tables' / 'results.json').write_text('{"protocol": "tenth"}')
  before = contents(tmp_path)
  code, out, err = run(fake, *(argument.format(folder=tmp_path) for argument in arguments))
  assert (code, out) == (2, '') and err.count('\n') == 1
  assert err.startswith('error: ' + message.format(folder=tmp_path))
  assert contents(tmp_path) == before
