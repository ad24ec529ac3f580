"""Functions timed in turn, so that whatever else the machine does falls on all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping

Function = Callable[[], object]


def in_turn(
  functions: Mapping[str, Function], rounds: int, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
  """Warms every function up, then times them one after the other, `rounds` times.

  Args:
    functions: each returns when its work is done.
    rounds: times that each has its turn.
    seconds: length of a turn; a function that is faster is called several times.
    clock: in seconds.

  Returns:
    Seconds a call of each function, median over the rounds.
  """
  calls = {}
  for name, function in functions.items():
    function()  # Compiles.
    calls[name] = max(round(seconds / _seconds_per_call(function, 1, clock)), 1)
  turns = {name: [] for name in functions}
  for _ in range(rounds):
    for name, function in functions.items():
      turns[name].append(_seconds_per_call(function, calls[name], clock))
  return {name: statistics.median(times) for name, times in turns.items()}


def _seconds_per_call(function: Function, calls: int, clock: Callable[[], float]) -> float:
  start = clock()
  for _ in range(calls):
    function()
  return (clock() - start) / calls
