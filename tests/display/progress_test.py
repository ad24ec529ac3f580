"""Tests of the progress line."""

import io
import math
import os
import signal

import pytest

from paranet_jax.display.progress import Progress, human_duration


class Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


def screen(text: str) -> list[str]:
  """What a terminal shows after `text`: a carriage return goes back, an erase clears to the end of the line."""
  lines, column = [''], 0
  for part in text.replace('\x1b[K', '\0'):
    if part == '\n':
      lines.append('')
      column = 0
    elif part == '\r':
      column = 0
    elif part == '\0':
      lines[-1] = lines[-1][:column]
    else:
      lines[-1] = lines[-1][:column] + part + lines[-1][column + 1 :]
      column += 1
  return lines


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
  monkeypatch.setenv('COLUMNS', '120')
  monkeypatch.setenv('TERM', 'xterm')
  return Terminal()


LOSSES = {1: 2.9134, 2: 2.5, 3: 1.9}
# 130 epochs of 100 steps of 64 images; 12,872 steps to go at 64 x 2 images/s: 6,436 s.
FULL = 'epoch 1.28/130  step 128/13000  loss 1:2.913 2:2.500 3:1.900  128 images/s  1 h 47 min left'
NO_STEP = 'epoch 1.28/130  loss 1:2.913 2:2.500 3:1.900  128 images/s  1 h 47 min left'
NO_SPEED = 'epoch 1.28/130  loss 1:2.913 2:2.500 3:1.900  1 h 47 min left'


@pytest.mark.parametrize(
  ('columns', 'expected'),
  [
    (len(FULL) + 1, FULL),
    (len(FULL), NO_STEP),
    (len(NO_STEP) + 1, NO_STEP),
    (len(NO_STEP), NO_SPEED),
    (len(NO_SPEED), NO_SPEED[:-1]),
    (20, NO_SPEED[:19]),
  ],
)
def test_the_live_line_fits_the_terminal_with_one_column_free(terminal, monkeypatch, columns, expected):
  monkeypatch.setenv('COLUMNS', str(columns))
  Progress(13000, 100, 64, terminal).update(128, LOSSES, 128.0)
  assert screen(terminal.getvalue()) == [expected]


def test_the_live_line_is_rewritten_in_place(terminal):
  progress = Progress(200, 100, 10, terminal)
  progress.update(50, {1: 1234.5, 3: 1.0}, 10.0)
  progress.update(100, {1: 1.0, 3: math.nan}, 10.0)
  expected = 'epoch 1.00/2  step 100/200  loss 1:1.000 3:nan  10.0 images/s  1 min 40 s left'
  assert screen(terminal.getvalue()) == [expected]
  progress.close()
  assert screen(terminal.getvalue()) == [expected, '']


def test_a_message_goes_above_the_live_line(terminal):
  progress = Progress(200, 100, 10, terminal)
  progress.message('before')
  progress.update(100, {1: 1.0}, 10.0)
  live = 'epoch 1.00/2  step 100/200  loss 1:1.000  10.0 images/s  1 min 40 s left'
  progress.message('a table\nof two lines')
  assert screen(terminal.getvalue()) == ['before', 'a table', 'of two lines', live]
  progress.close()
  progress.message('after')
  assert screen(terminal.getvalue()) == ['before', 'a table', 'of two lines', live, 'after', '']


def test_plain_whole_lines_where_there_is_no_terminal(monkeypatch):
  monkeypatch.setenv('COLUMNS', '20')
  stream = io.StringIO()
  progress = Progress(13000, 100, 64, stream)
  progress.update(128, LOSSES, 128.0)
  progress.message('a table')
  progress.close()
  assert stream.getvalue() == f'{FULL}\na table\n'


def test_a_terminal_that_cannot_erase_gets_plain_lines(terminal, monkeypatch):
  monkeypatch.setenv('TERM', 'dumb')
  Progress(13000, 100, 64, terminal).update(128, LOSSES, 128.0)
  assert terminal.getvalue() == FULL + '\n'


def test_the_default_stream_is_standard_output(capsys):
  Progress(13000, 100, 64).message('hello')
  assert capsys.readouterr() == ('hello\n', '')


@pytest.mark.parametrize('images_per_second', [0.0, math.nan, math.inf])
def test_without_a_rate_there_is_no_speed_and_no_time_left(images_per_second):
  stream = io.StringIO()
  Progress(200, 100, 10, stream).update(1, {2: 0.5}, images_per_second)
  assert stream.getvalue() == 'epoch 0.01/2  step 1/200  loss 2:0.500\n'


@pytest.mark.parametrize(
  ('seconds', 'expected'),
  [
    (0, '0 s'),
    (42.4, '42 s'),
    (59.6, '1 min 00 s'),
    (307, '5 min 07 s'),
    (3599.6, '1 h 00 min'),
    (3600 + 5 * 60 + 59, '1 h 05 min'),
    (86_399, '23 h 59 min'),
    (2 * 86_400 + 3 * 3600, '2 d 03 h'),
  ],
)
def test_human_duration(seconds, expected):
  assert human_duration(seconds) == expected


def test_a_reader_that_stops_is_a_request_to_stop():
  received = []
  previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
  reading, writing = os.pipe()
  os.close(reading)
  try:
    with os.fdopen(writing, 'w') as stream:
      progress = Progress(10, 5, 1, stream)
      progress.message('lost')
      progress.message('discarded')
  finally:
    signal.signal(signal.SIGTERM, previous)
  assert received == [signal.SIGTERM]


def test_a_terminal_that_is_gone_without_a_signal_stops_nothing(capsys):
  """As after `disown`: the run goes on writing to its files."""
  terminal, lost = os.openpty()
  with os.fdopen(lost, 'w') as stream:
    progress = Progress(10, 5, 1, stream)
    os.close(terminal)
    progress.message('lost')
    progress.message('discarded')
  expected = 'standard output cannot be written (Input/output error): the run goes on without it\n'
  assert capsys.readouterr() == ('', expected)
