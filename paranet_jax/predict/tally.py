"""Counts predictions, and shows their progress on the terminal."""

import os
import shutil
import time
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np

from paranet_jax.display.progress import human_duration, human_speed
from paranet_jax.display.tables import human_count
from paranet_jax.host.errors import discard_output, printable_lines


class Tally:
  """Counts what was predicted.

  Args:
    plan: the `ExitPlan`.
    clock: in seconds, for the speed.
  """

  def __init__(self, plan: Any, clock: Callable[[], float] = time.perf_counter):
    self._plan, self._clock = plan, clock
    self._exited = dict.fromkeys(plan.exits, 0)
    self._macs = 0
    # The first batch compiles, so the speed leaves it out.
    self._first: tuple[int, float] | None = None
    self._last = 0.0
    self.images = self.unreadable = self.unknown = 0

  def add(self, exits: np.ndarray, macs: np.ndarray, unreadable: int, unknown: int = 0) -> None:
    """Adds a batch: the exits [n], 1-based, and multiply-adds [n] of its images, and the number of unreadable files.

    Args:
      unknown: images of the batch that are not answered.
    """
    for number in exits.tolist():
      self._exited[number] += 1
    self._macs += int(np.sum(macs, dtype=np.int64))
    self.images += len(exits)
    self.unreadable += unreadable
    self.unknown += unknown
    self._last = self._clock()
    if self._first is None and len(exits):
      self._first = self.images, self._last

  @property
  def images_per_second(self) -> float:
    """The speed after the first batch; 0 until there is another."""
    images, start = self._first or (0, 0.0)
    return (self.images - images) / (self._last - start) if self._last > start else 0.0

  def summary(self) -> str:
    """One line: images, share of each exit, mean cost, speed-up over the last exit alone, images/s."""
    parts = [f'{self.images:,} image{"s" * (self.images != 1)}']
    if self.unreadable:
      parts[0] += f', {self.unreadable:,} unreadable'
    if self.unknown:
      parts[0] += f', {self.unknown:,} unknown'
    if self.images:
      parts += [f'exit {number}: {100 * count / self.images:.1f} %' for number, count in self._exited.items()]
      parts.append(self._cost())
    if self.images_per_second:
      parts.append(human_speed(self.images_per_second))
    return '; '.join(parts)

  def _cost(self) -> str:
    mean, last = self._macs / self.images, self._plan.macs_alone[-1]
    return (
      f'{human_count(round(mean))} multiply-adds per image, '
      f'{last / mean:.2f} x fewer than exit {self._plan.exits[-1]} alone ({human_count(last)})'
    )


class LiveLine:
  """A line that is rewritten in place on a terminal.

  Args:
    total: number of files.
    live: show the line, if the terminal can; messages are always printed.
  """

  def __init__(self, stream: TextIO, total: int, live: bool):
    self._stream, self._total = stream, total
    self._live = live and os.environ.get('TERM') != 'dumb'

  def update(self, done: int, images_per_second: float) -> None:
    """Shows how many files are done, and the speed and the time left once they are known."""
    if not self._live:
      return
    line = f'{done:,}/{self._total:,} images'
    if images_per_second:
      left = (self._total - done) / images_per_second
      line += f'  {human_speed(images_per_second)}  {human_duration(left)} left'
    # One column stays free: a full line wraps on some terminals.
    self._write(f'\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K')

  def message(self, text: str) -> None:
    """Prints a line in place of the live one, which the next update restores."""
    self.clear()
    self._write(f'{printable_lines(text)}\n')

  def clear(self) -> None:
    """Erases the live line."""
    if self._live:
      self._write('\r\x1b[K')

  def _write(self, text: str) -> None:
    try:
      self._stream.write(text)
      self._stream.flush()
    except OSError:  # Predicting continues without it.
      discard_output(self._stream.fileno())
