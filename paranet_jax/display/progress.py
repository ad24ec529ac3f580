"""Training progress: one live line on a terminal, plain lines elsewhere."""

import math
import os
import shutil
import signal
import sys
import time
from typing import TextIO

from paranet_jax.display.tables import rounded
from paranet_jax.host.errors import discard_output, printable_lines, say


class Progress:
  """Shows epoch, step, loss per exit, images/s and the time left.

  On a terminal, one line is rewritten in place. It never wraps: if it is too long, the step and then the speed are left
  out. Elsewhere (a pipe, a log file), each update is a separate line.

  Args:
    total_steps: steps of the whole training, including those before a resume.
    steps_per_epoch: optimizer steps per epoch.
    batch_size: images per step over all devices, to turn images/s into time left.
    stream: None: standard output, like the tables, so that a log keeps their order.
  """

  def __init__(self, total_steps: int, steps_per_epoch: int, batch_size: int, stream: TextIO | None = None):
    self._total_steps = total_steps
    self._steps_per_epoch = steps_per_epoch
    self._batch_size = batch_size
    self._stream = sys.stdout if stream is None else stream
    self._live = self._stream.isatty() and os.environ.get('TERM') != 'dumb'
    self._line = ''

  def update(self, step: int, losses: dict[int, float], images_per_second: float) -> None:
    """Shows the state after `step` steps.

    Args:
      step: optimizer steps taken so far.
      losses: the loss of each trained exit, by its number from 1.
      images_per_second: training speed, without compilation; if it is not positive, speed and time are left out.
    """
    fields = self._fields(step, losses, images_per_second)
    if self._live:
      # One column stays free, because a full line wraps on some terminals.
      self._line = _fit(fields, shutil.get_terminal_size().columns - 1)
      self._write(f'\r{self._line}\x1b[K')
    else:
      self._write('  '.join(fields.values()) + '\n')

  def message(self, text: str) -> None:
    """Prints one or more lines above the live line."""
    text = printable_lines(text)
    self._write(f'\r\x1b[K{text}\n{self._line}' if self._line else f'{text}\n')

  def close(self) -> None:
    """Ends the live line, which stays visible."""
    if self._line:
      self._write('\n')
    self._line = ''

  def _write(self, text: str) -> None:
    try:
      self._stream.write(text)
      self._stream.flush()
    except BrokenPipeError:  # As in `main | head`: later lines are discarded, and the run saves and stops.
      discard_output(self._stream.fileno())
      signal.raise_signal(signal.SIGTERM)
    except OSError as error:  # A terminal that is gone without SIGHUP, as after `disown`, or a log on a full disk.
      discard_output(self._stream.fileno())
      say(f'standard output cannot be written ({error.strerror}): the run goes on without it', to_stderr=True)

  def _fields(self, step: int, losses: dict[int, float], images_per_second: float) -> dict[str, str]:
    fields = {
      'epoch': f'epoch {step / self._steps_per_epoch:.2f}/{rounded(self._total_steps / self._steps_per_epoch, 4)}',
      'step': f'step {step}/{self._total_steps}',
      'loss': 'loss ' + ' '.join(f'{number}:{loss:.3f}' for number, loss in sorted(losses.items())),
    }
    if math.isfinite(images_per_second) and images_per_second > 0:
      seconds = (self._total_steps - step) * self._batch_size / images_per_second
      fields['speed'] = human_speed(images_per_second)
      fields['left'] = f'{human_duration(seconds)} left'
    return fields


class Clock:
  """Measures images/s since the last restart, so that compiling, evaluating and saving do not count.

  Attributes:
    running: whether it has been started, which the first step does.
  """

  def __init__(self, batch_size: int):
    self.running = False
    self._batch_size = batch_size
    self._started = 0.0
    self._steps = 0

  def step(self) -> None:
    """Counts a step; the first one starts the clock instead."""
    if self.running:
      self._steps += 1
    else:
      self.restart()

  def restart(self) -> None:
    """Counts from here."""
    self.running, self._started, self._steps = True, time.monotonic(), 0

  def images_per_second(self) -> float:
    """NaN before a step is counted."""
    elapsed = time.monotonic() - self._started
    return self._steps * self._batch_size / elapsed if self._steps else math.nan


def human_duration(seconds: float) -> str:
  """Formats a duration in its two largest units: `42 s`, `5 min 07 s`, `1 h 05 min`, `2 d 03 h`."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  if days:
    return f'{days} d {hours:02} h'
  if hours:
    return f'{hours} h {minutes:02} min'
  return f'{minutes} min {seconds:02} s' if minutes else f'{seconds} s'


def human_speed(images_per_second: float) -> str:
  """Formats a speed: `1,234 images/s`, `12.3 images/s`."""
  return f'{images_per_second:,.{0 if images_per_second >= 100 else 1}f} images/s'


def _fit(fields: dict[str, str], columns: int) -> str:
  for dropped in ((), ('step',), ('step', 'speed')):
    line = '  '.join(text for name, text in fields.items() if name not in dropped)
    if len(line) <= columns:
      break
  return line[:columns]
