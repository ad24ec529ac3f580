"""The timing, the tables and the flags of the benchmarks; tests/slow/ runs each benchmark."""

import sys
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import cli, inference, memory, report, train_step
from benchmarks.timing import in_turn


def test_in_turn():
  now, order = 0.0, []
  durations = {
    # The first call, the one that says how many fit into a turn of 1 s, four turns of two calls; the first is left out.
    'ours': iter([9.0, 0.5, 0.1, 0.1, 0.5, 0.5, 3.0, 5.0, 1.0, 1.0]),
    # A turn is one call at least.
    'theirs': iter([9.0, 4.0, 99.0, 8.0, 2.0, 6.0]),
  }

  def call(name, number):
    nonlocal now
    assert number == 7
    order.append(name)
    now += next(durations[name])

  functions = {name: partial(call, name) for name in durations}
  assert in_turn(functions, rounds=3, seconds=1.0, arguments=(7,), clock=lambda: now) == {'ours': 1.0, 'theirs': 6.0}
  assert order == ['ours'] * 2 + ['theirs'] * 2 + ['ours', 'ours', 'theirs'] * 4


class Remote:
  """Stands in for a `RemoteFunction` whose calls take 0.25 s."""

  def __init__(self):
    self.calls = []

  def __call__(self, image):
    self.calls.append(('once', image))

  def seconds(self, calls, image):
    self.calls.append((calls, image))
    return 0.25 * calls


def test_in_turn_leaves_the_clock_to_another_process():
  remote = Remote()
  assert in_turn({'theirs': remote}, rounds=2, seconds=1.0, arguments=('image',)) == {'theirs': 0.25}
  assert remote.calls == [('once', 'image'), (1, 'image'), *[(4, 'image')] * 3]


def test_rows_and_table():
  seconds = {'ours': 0.25, 'eager': 0.5, 'linen': 2.0}
  rows = report.compare('forward pass', seconds, unit='images/s', batch=64)
  rows += report.compare('one image', {'ours': 0.002, 'eager': 0.008}, unit='ms', batch=1, exit=3)
  assert [tuple(row.values()) for row in rows] == [
    ('forward pass', 'eager', 64, None, 256.0, 128.0, 2.0, 'images/s'),
    ('forward pass', 'linen', 64, None, 256.0, 32.0, 8.0, 'images/s'),
    ('one image', 'eager', 1, 3, 2.0, 8.0, 0.25, 'ms'),
  ]
  result = report.headline(rows) | {'machine': {'cpu': 'X', 'device': {'count': 1}}, 'tpu_code_mb': None}
  assert report.text(result).splitlines() == [
    'what          peer   batch  exit  ours  theirs  ratio  unit',
    'forward pass  eager     64         256     128      2  images/s',
    'forward pass  linen     64         256      32      8  images/s',
    'one image     eager      1     3     2       8   0.25  ms',
    '',
    'ours: 256.0',
    'theirs: 128.0',
    'ratio: 2.0',
    'machine: cpu X, device count 1',
    'tpu_code_mb: None',
  ]


@pytest.mark.parametrize(
  'main, flags, message',
  [
    (train_step.main, ['--rounds=0'], 'argument --rounds: expected an integer of 1 or more, found 0; see --help'),
    (train_step.main, ['--batch=some'], 'argument --batch: expected an integer of 1 or more, found some; see --help'),
    (train_step.main, ['--scale'], 'unrecognized arguments: --scale; see --help'),
    (memory.main, ['--rounds=2'], 'unrecognized arguments: --rounds=2; see --help'),
    (
      inference.main,
      ['--peer=jit'],
      "argument --peer: invalid choice: 'jit' (choose from 'eager', 'compile'); see --help",
    ),
    (
      memory.main,
      ['--side=12'],
      'expected a side that can be halved three times, found 12; set --side to a multiple of 8',
    ),
    (
      train_step.main,
      ['--batch=3'],
      'expected a batch that 2 devices can share, found 3; set --batch to a multiple',
    ),
  ],
)
def test_refused_flags(main, flags, message, capsys):
  assert main([*flags, '--json']) == 2
  assert capsys.readouterr() == ('', f'error: {message}\n')


@pytest.mark.parametrize(
  'load, warning',
  [
    (1.0, ''),
    (1.5, 'warning: load average 1.5 on 2 cores slows PyTorch most; wait until the machine is idle\n'),
  ],
)
def test_busy_machine(load, warning, capsys):
  cli.warn_if_busy(load_average=load, cores=2, cpu='X')
  assert capsys.readouterr() == ('', warning)
