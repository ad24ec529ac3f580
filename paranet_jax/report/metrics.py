"""What a run measures, on disk: JSON lines for scripts and TensorBoard events for browsing."""

import json
import math
import os
import time
from pathlib import Path
from typing import Literal

from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from paranet_jax.host.errors import UserError
from paranet_jax.host.files import replacing

FILE_NAME = 'metrics.jsonl'


class MetricsWriter:
  """Appends measurements to `workdir/metrics.jsonl` and to TensorBoard events in `workdir/tensorboard`.

  A context manager. On a resume, what was measured after the checkpoint is dropped, because it will be measured again:
  from the JSON lines by `drop_after`, from TensorBoard by its own purge.

  Args:
    workdir: an existing folder.
    resume_step: the checkpoint's step; what was measured up to and including it is kept. None keeps everything.
  """

  def __init__(self, workdir: str | os.PathLike, resume_step: int | None = None):
    workdir = Path(workdir)
    drop_after(workdir, math.inf if resume_step is None else resume_step)
    self._lines = (workdir / FILE_NAME).open('ab')
    # Not SummaryWriter: its background thread dies on a full disk, and training then waits for it for ever.
    self._events = RecordWriter(_new_event_path(workdir / 'tensorboard'))
    self._write_event(file_version='brain.Event:2')
    if resume_step is not None:
      self._write_event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *unused) -> None:
    self.close()

  def write(
    self, step: int, epoch: float, split: Literal['train', 'held_out', 'test'], values: dict[str, float]
  ) -> None:
    """Appends one line, and one TensorBoard scalar tagged `split/key` for each value.

    Args:
      step: optimiser steps taken so far.
      epoch: epochs trained so far, with their fraction.
      split: what the values were measured on.
      values: for example `exit_1/accuracy` (a fraction), `exit_1/loss`, `learning_rate`, `images_per_second`.
        A value that is not finite becomes null, so that the line is strict JSON.
    """
    values = {key: float(value) for key, value in values.items()}
    finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
    record = {'step': int(step), 'epoch': float(epoch), 'split': split, **finite}
    self._lines.write(json.dumps(record, allow_nan=False).encode() + b'\n')
    self._lines.flush()
    scalars = [Summary.Value(tag=f'{split}/{key}', simple_value=value) for key, value in values.items()]
    self._write_event(step=int(step), summary=Summary(value=scalars))

  def close(self) -> None:
    """Closes both files; nothing can be written afterwards."""
    self._lines.close()
    self._events.close()

  def _write_event(self, **fields) -> None:
    self._events.write(Event(wall_time=time.time(), **fields).SerializeToString())
    self._events.flush()


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
  """Returns the lines of `workdir/metrics.jsonl` in file order, without a last line that a kill left half written.

  An absent file has no lines.

  Raises:
    UserError: if another line is not a JSON object with a `step`.
  """
  return [record for _, record in _read(Path(workdir) / FILE_NAME)]


def drop_after(workdir: str | os.PathLike, step: float) -> int:
  """Removes, atomically, the lines whose step is larger than `step`, and a last line that a kill left half written.

  Returns:
    The number of whole lines removed.

  Raises:
    UserError: as `read_metrics`; the file is then left as it was.
  """
  path = Path(workdir) / FILE_NAME
  lines = _read(path)
  kept = [line.rstrip(b'\n') + b'\n' for line, record in lines if record['step'] <= step]
  content = b''.join(kept)
  if path.exists() and content != path.read_bytes():
    with replacing(path, 'wb') as file:
      file.write(content)
  return len(lines) - len(kept)


def _new_event_path(folder: Path) -> str:
  folder.mkdir(exist_ok=True)
  # TensorBoard looks for `tfevents` in the name, and reads the files of a folder in the order of their names.
  # A clock that was set back does not put a new file before those that are there.
  numbers = (path.suffix[1:] for path in folder.glob('events.out.tfevents.*'))
  latest = max((int(number) for number in numbers if number.isdecimal()), default=0)
  return str(folder / f'events.out.tfevents.{max(time.time_ns(), latest + 1)}')


def _read(path: Path) -> list[tuple[bytes, dict]]:
  lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
  if lines and not lines[-1].endswith(b'\n') and _record(lines[-1]) is None:
    lines.pop()
  records = [_record(line) for line in lines]
  if None in records:
    index = records.index(None)
    found = lines[index].decode(errors='replace').rstrip()[:40]
    raise UserError(
      f'expected a JSON object with a step on every line of {path}, found {found!r} on line {index + 1}; '
      'mend or delete that line'
    )
  return list(zip(lines, records, strict=True))


def _record(line: bytes) -> dict | None:
  try:
    record = json.loads(line)
  except ValueError:
    return None
  return record if isinstance(record, dict) and isinstance(record.get('step'), int) else None
