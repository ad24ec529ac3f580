"""Functions timed in turn, so that whatever else the machine does falls on all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Function = Callable[..., object]
"""Returns when its work is done. One that lives in another process times its calls there: see `RemoteFunction`."""


def in_turn(
  functions: Mapping[str, Function],
  rounds: int,
  seconds: float,
  arguments: tuple = (),
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
  """Times the functions one after the other, `rounds` times, after a round that does not count.

  In its first second a function may run at half its speed on a virtual machine, whose host has yet to give the memory.

  Args:
    functions: by name.
    rounds: times that each has its turn.
    seconds: length of a turn; a function that is faster is called several times.
    arguments: of every call of each function.
    clock: in seconds.

  Returns:
    Seconds a call of each function, median over the rounds.
  """
  calls = {}
  for name, function in functions.items():
    function(*arguments)  # Compiles.
    calls[name] = max(round(seconds / seconds_of(function, 1, arguments, clock)), 1)
  turns = {name: [] for name in functions}
  for _ in range(1 + rounds):
    for name, function in functions.items():
      turns[name].append(seconds_of(function, calls[name], arguments, clock) / calls[name])
  return {name: statistics.median(times[1:]) for name, times in turns.items()}


def seconds_of(
  function: Function, calls: int, arguments: tuple[Any, ...] = (), clock: Callable[[], float] = time.perf_counter
) -> float:
  """Seconds of so many calls, by the clock of the process in which the function lives."""
  if hasattr(function, 'seconds'):
    return function.seconds(calls, *arguments)
  start = clock()
  for _ in range(calls):
    function(*arguments)
  return clock() - start
