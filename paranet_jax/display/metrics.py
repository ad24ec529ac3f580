"""The metrics of a run on disk: JSON lines for scripts and TensorBoard events for browsing."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from tensorboardX import RecordWriter
from tensorboardX.proto import event_pb2, summary_pb2

from paranet_jax.host.errors import UserError
from paranet_jax.host.files import parse_object, read_file, replacing

FILE_NAME = 'metrics.jsonl'
_FIX = 'restore it, or move it away'
_events: Any = event_pb2  # The classes of generated protobuf modules exist at run time only.
_summaries: Any = summary_pb2


class MetricsWriter:
  """Appends metrics to `workdir/metrics.jsonl` and to TensorBoard events in `workdir/tensorboard`.

  A context manager. On a resume, the metrics of steps after the checkpoint are dropped, because those steps run again:
  TensorBoard purges its own.

  Args:
    workdir: an existing folder.
    resume_step: the checkpoint's step, up to which metrics are kept; None keeps them all.

  Raises:
    UserError: as `read_metrics`; the file is then unchanged.
  """

  def __init__(self, workdir: str | os.PathLike, resume_step: int | None = None):
    workdir = Path(workdir)
    drop_after(workdir / FILE_NAME, math.inf if resume_step is None else resume_step)
    self._lines = (workdir / FILE_NAME).open('ab')
    # Not SummaryWriter: its background thread dies on a full disk, and training then waits for it forever.
    self._events = RecordWriter(_new_event_path(workdir / 'tensorboard'))
    self._write_event(file_version='brain.Event:2')
    if resume_step is not None:
      self._write_event(step=resume_step + 1, session_log=_events.SessionLog(status=_events.SessionLog.START))

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *unused) -> None:
    self.close()

  def write(self, step: int, epoch: float, split: str, values: dict[str, float]) -> None:
    """Appends one line, and one TensorBoard scalar tagged `split/key` for each value.

    Args:
      step: optimizer steps taken so far.
      epoch: epochs trained so far, with their fraction.
      split: 'train', 'held_out' or 'test'.
      values: for example `exit_1/accuracy` (a fraction), `exit_1/loss`, `learning_rate`, `images_per_second`.
        A value that is not finite is saved as null, so that the line is strict JSON.
    """
    values = {key: float(value) for key, value in values.items()}
    finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
    record = {'step': int(step), 'epoch': float(epoch), 'split': split, **finite}
    self._lines.write(json.dumps(record, allow_nan=False).encode() + b'\n')
    self._lines.flush()
    scalars = [_summaries.Summary.Value(tag=f'{split}/{key}', simple_value=value) for key, value in values.items()]
    self._write_event(step=int(step), summary=_summaries.Summary(value=scalars))

  def close(self) -> None:
    """Closes both files; nothing can be written afterwards."""
    self._lines.close()
    self._events.close()

  def _write_event(self, **fields) -> None:
    self._events.write(_events.Event(wall_time=time.time(), **fields).SerializeToString())
    self._events.flush()


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
  """Returns the lines of `workdir/metrics.jsonl` in file order, without a last line that a kill left half written.

  Returns an empty list if there is no such file.

  Raises:
    UserError: another line is not a JSON object with a `step`.
  """
  return [record for _, record in _read(Path(workdir) / FILE_NAME)]


def drop_after(path: Path, step: float) -> None:
  """Atomically removes the lines with a step after `step`, and a last line that a kill left half written."""
  content = b''.join(line.rstrip(b'\n') + b'\n' for line, record in _read(path) if record['step'] <= step)
  if content != (read_file(path, _FIX) or b''):
    with replacing(path, 'wb') as file:
      file.write(content)


def _new_event_path(folder: Path) -> str:
  folder.mkdir(exist_ok=True)
  # TensorBoard looks for `tfevents` in the name and reads the files of a folder in the order of their names. A new file
  # must come last even if the clock was set back.
  numbers = (path.suffix[1:] for path in folder.glob('events.out.tfevents.*'))
  latest = max((int(number) for number in numbers if number.isdecimal()), default=0)
  return str(folder / f'events.out.tfevents.{max(time.time_ns(), latest + 1)}')


def _read(path: Path) -> list[tuple[bytes, dict]]:
  lines = (read_file(path, _FIX) or b'').splitlines(keepends=True)
  if lines and not lines[-1].endswith(b'\n') and _record(lines[-1]) is None:
    lines.pop()
  found = []
  for number, line in enumerate(lines, 1):
    record = _record(line)
    if record is None:
      raise UserError(
        f'expected a JSON object with a step on every line of {path}, found '
        f'{line.decode(errors="replace").rstrip()[:40]!r} on line {number}; fix or delete that line'
      )
    found.append((line, record))
  return found


def _record(line: bytes) -> dict | None:
  try:
    record = parse_object(line)
  except ValueError:
    return None
  return record if isinstance(record.get('step'), int) else None
