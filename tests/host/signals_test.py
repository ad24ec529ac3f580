"""Tests of stopping on request."""

import ctypes
import os
import signal
import socket
import sys
import threading

import pytest
from forking import Forked, execute

from paranet_jax.host.signals import StopRequest, seconds_since_request


@pytest.fixture(autouse=True)
def outer():
  """Installs handlers beforehand, and lists the signals that reach them."""
  received = []
  previous = {
    number: signal.signal(number, lambda number, frame: received.append(signal.Signals(number).name))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
  }
  yield received
  for number, handler in previous.items():
    signal.signal(number, handler)


def send(number):
  os.kill(os.getpid(), number)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_remembered(outer, number):
  with StopRequest() as stop:
    assert stop.received is None and seconds_since_request() is None
    send(number)
    assert stop.received == number.name and 0 <= seconds_since_request() < 60
  assert not outer and seconds_since_request() is None


@pytest.mark.parametrize('second', [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_acts(outer, second):
  with StopRequest() as stop:
    send(signal.SIGTERM)
    send(second)
    assert outer == [second.name]
    assert stop.received == 'SIGTERM'


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems do not tell a process that its parent ended')
def test_after_a_signal_the_end_of_the_parent_sends_none():
  """As of a queue that a second Control-C ends while its runs save."""
  libc, found = ctypes.CDLL(None), ctypes.c_int()
  libc.prctl(1, signal.SIGTERM)
  try:
    with StopRequest():
      for expected in (signal.SIGTERM, 0):
        libc.prctl(2, ctypes.byref(found))
        assert found.value == expected
        if expected:
          send(signal.SIGTERM)
  finally:
    libc.prctl(1, 0)


@pytest.mark.parametrize('sent', [(), (signal.SIGTERM,)])
def test_the_earlier_handlers_are_restored(outer, sent):
  before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
  with StopRequest():
    assert signal.getsignal(signal.SIGINT) != before[0] and signal.getsignal(signal.SIGTERM) != before[1]
    for number in sent:
      send(number)
  assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
  send(signal.SIGINT)
  assert outer == ['SIGINT']


def test_an_ignored_hangup_stays_ignored(outer):
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
  with StopRequest() as stop:
    send(signal.SIGHUP)
    assert stop.received is None


def test_after_a_hangup_a_lost_terminal_can_be_written(outer):
  terminal, lost = os.openpty()
  kept = os.dup(1)
  os.dup2(lost, 1)
  try:
    with StopRequest():
      os.close(terminal)
      send(signal.SIGHUP)
      os.write(1, b'stopped')  # EIO if it still were the terminal.
  finally:
    os.dup2(kept, 1)
    os.close(kept)
    os.close(lost)


def test_they_are_restored_after_an_exception(outer):
  with pytest.raises(RuntimeError):
    with StopRequest():
      raise RuntimeError
  send(signal.SIGTERM)
  assert outer == ['SIGTERM']


def test_outside_the_main_thread_nothing_is_received(outer):
  found = []

  def run():
    with StopRequest() as stop:
      send(signal.SIGTERM)
      found.append(stop.received)

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert found == [None]
  assert outer == ['SIGTERM']


JOINED = """
import ctypes, os, signal, sys, time
import jax
jax.distributed.initialize(f'localhost:{sys.argv[1]}', 1, 0)
from paranet_jax.host.signals import StopRequest
"""
TOGETHER = """
with StopRequest() as stop:
  step = 0
  while not stop.requested(step):
    assert stop.received is None
    step += 1
    if step == 3:
      for _ in range(2):  # A terminal and a launcher both send one.
        os.kill(os.getpid(), int(sys.argv[2]))
    time.sleep(0.02)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
print(stop.received, step)
jax.distributed.shutdown()
"""
HANGING = """
with StopRequest() as stop:
  os.kill(os.getpid(), signal.SIGTERM)
  print('asked', flush=True)
  # Waits in C, like a step that waits for another process: no Python handler runs.
  libc = ctypes.CDLL(None)
  lock = (ctypes.c_char * 256)()
  libc.pthread_mutex_lock(lock)
  libc.pthread_mutex_lock(lock)
"""


def joined(program, *arguments):
  """Starts a program under jax.distributed in another process."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  return Forked(execute, JOINED + program, *map(str, (port, *arguments)))


@pytest.fixture(scope='module')
def all_joined():
  """The programs that each test needs, which start for a second, together."""
  started = {number: (joined(TOGETHER, int(number)), joined(HANGING)) for number in (signal.SIGINT, signal.SIGTERM)}
  yield started
  for pair in started.values():
    for process in pair:
      process.kill()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_under_jax_distributed_the_processes_agree_on_the_step(all_joined, number):
  process, _ = all_joined[number]
  code, out, err = process.ended()
  assert code == 0, err
  what, step = out.strip().rsplit(' ', 1)
  assert what == 'a preemption notice' and int(step) > 3


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_under_jax_distributed_a_later_signal_acts_even_in_a_step_that_hangs(all_joined, number):
  _, process = all_joined[number]
  assert process.out.readline() == 'asked\n'
  for _ in range(60):
    if process.has_ended(0.5):
      break
    process.send(number)
  assert process.ended()[0] == -number
