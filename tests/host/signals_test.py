"""Tests of stopping on request."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from paranet_jax.host.signals import StopRequest


@pytest.fixture(autouse=True)
def outer():
  """Stands for the handlers that are there before: what reaches them is listed."""
  received = []
  previous = {
    number: signal.signal(number, lambda number, frame: received.append(signal.Signals(number).name))
    for number in (signal.SIGINT, signal.SIGTERM)
  }
  yield received
  for number, handler in previous.items():
    signal.signal(number, handler)


def send(number):
  os.kill(os.getpid(), number)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_remembered(outer, number):
  with StopRequest() as stop:
    assert stop.received is None
    send(number)
    assert stop.received == number.name
  assert not outer


@pytest.mark.parametrize('second', [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_acts(outer, second):
  with StopRequest() as stop:
    send(signal.SIGTERM)
    send(second)
    assert outer == [second.name]
    assert stop.received == 'SIGTERM'


@pytest.mark.parametrize('sent', [(), (signal.SIGTERM,)])
def test_afterwards_all_is_as_before(outer, sent):
  before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
  with StopRequest():
    assert signal.getsignal(signal.SIGINT) != before[0] and signal.getsignal(signal.SIGTERM) != before[1]
    for number in sent:
      send(number)
  assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
  send(signal.SIGINT)
  assert outer == ['SIGINT']


def test_an_exception_restores_too(outer):
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


TOGETHER = """
import os, signal, sys, time
import jax
jax.distributed.initialize(f'localhost:{sys.argv[1]}', 1, 0)
from paranet_jax.host.signals import StopRequest
with StopRequest() as stop:
  step = 0
  while not stop.requested(step):
    assert stop.received is None
    step += 1
    if step == 3:
      for _ in range(2):  # As of a terminal and of a launcher.
        os.kill(os.getpid(), int(sys.argv[2]))
    time.sleep(0.02)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
print(stop.received, step)
jax.distributed.shutdown()
"""


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_under_jax_distributed_the_processes_agree_on_the_step(number):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  command = [sys.executable, '-c', TOGETHER, str(port), str(int(number))]
  done = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  what, step = done.stdout.strip().rsplit(' ', 1)
  assert what == 'a preemption notice' and int(step) > 3


HANGING = """
import os, signal, sys, threading, time
import jax
jax.distributed.initialize(f'localhost:{sys.argv[1]}', 1, 0)
from paranet_jax.host.signals import StopRequest
with StopRequest() as stop:
  os.kill(os.getpid(), signal.SIGTERM)
  print('asked', flush=True)
  # Holds on in C, as a step does that waits for another process: no handler of Python's is called.
  import ctypes
  libc = ctypes.CDLL(None)
  lock = (ctypes.c_char * 256)()
  libc.pthread_mutex_lock(lock)
  libc.pthread_mutex_lock(lock)
"""


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_under_jax_distributed_a_later_signal_acts_even_in_a_step_that_hangs(number):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  command = [sys.executable, '-c', HANGING, str(port)]
  with subprocess.Popen(command, cwd=Path(__file__).resolve().parents[2], stdout=subprocess.PIPE) as process:
    assert process.stdout.readline() == b'asked\n'
    for _ in range(60):
      time.sleep(0.5)
      process.send_signal(number)
      if process.poll() is not None:
        break
    process.kill()
  assert process.returncode == -number
