"""Tests of the measurements on disk."""

import json
import math
import struct

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from paranet_jax.display.metrics import MetricsWriter, read_metrics
from paranet_jax.host.errors import UserError


def write_lines(workdir, *lines: str):
  path = workdir / 'metrics.jsonl'
  path.write_bytes(''.join(lines).encode())
  return path


def line(step: int) -> str:
  return f'{{"step": {step}, "epoch": 0.5, "split": "train"}}\n'


def read_events(path) -> list[event_pb2.Event]:
  """Reads TFRecords: length (8 bytes), its checksum (4), data, its checksum (4)."""
  content, events = path.read_bytes(), []
  while content:
    (length,) = struct.unpack('<Q', content[:8])
    events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
    content = content[16 + length :]
  return events


def test_each_write_is_one_line_with_full_precision(tmp_path):
  third = 1 / 3
  with MetricsWriter(tmp_path) as writer:
    writer.write(10, 0.0128, 'train', {'exit_1/loss': third, 'learning_rate': np.float32(0.5)})
    writer.write(np.int64(781), 1, 'held_out', {'exit_1/accuracy': 0.25})
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [list(json.loads(text).items()) for text in lines] == [
    [('step', 10), ('epoch', 0.0128), ('split', 'train'), ('exit_1/loss', third), ('learning_rate', 0.5)],
    [('step', 781), ('epoch', 1.0), ('split', 'held_out'), ('exit_1/accuracy', 0.25)],
  ]


def test_a_line_is_on_disk_before_the_writer_is_closed(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(1, 0.5, 'test', {'exit_1/loss': 2.0})
    assert read_metrics(tmp_path) == [{'step': 1, 'epoch': 0.5, 'split': 'test', 'exit_1/loss': 2.0}]


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf, np.float32('nan')])
def test_what_is_not_finite_becomes_null_in_strict_json(tmp_path, value):
  def refuse(constant):
    raise AssertionError(f'{constant} is not JSON')

  with MetricsWriter(tmp_path) as writer:
    writer.write(1, 0.5, 'train', {'exit_1/loss': value})
  record = json.loads((tmp_path / 'metrics.jsonl').read_text(), parse_constant=refuse)
  assert record['exit_1/loss'] is None


def test_tensorboard_gets_one_scalar_per_value(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(10, 0.1, 'train', {'exit_1/loss': 2.5, 'learning_rate': 0.5})
    writer.write(20, 0.2, 'test', {'exit_1/accuracy': 0.75})
  (path,) = (tmp_path / 'tensorboard').iterdir()
  scalars = [
    (event.step, value.tag, value.simple_value) for event in read_events(path) for value in event.summary.value
  ]
  assert scalars == [
    (10, 'train/exit_1/loss', 2.5),
    (10, 'train/learning_rate', 0.5),
    (20, 'test/exit_1/accuracy', 0.75),
  ]


def test_resuming_drops_later_lines_and_purges_later_events(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    for step in (10, 20, 30):
      writer.write(step, 0.1, 'train', {'exit_1/loss': step})
  with MetricsWriter(tmp_path, resume_step=20) as writer:
    writer.write(30, 0.1, 'train', {'exit_1/loss': 0.0})
  assert [(record['step'], record['exit_1/loss']) for record in read_metrics(tmp_path)] == [(10, 10), (20, 20), (30, 0)]
  # The first run's event file is kept beside the second's.
  first, second = sorted((tmp_path / 'tensorboard').iterdir())
  start = event_pb2.SessionLog.START
  assert [event.step for event in read_events(first) if event.session_log.status == start] == []
  assert [event.step for event in read_events(second) if event.session_log.status == start] == [21]
  assert [event.step for event in read_events(first) if event.summary.value] == [10, 20, 30]


def test_opening_without_resuming_keeps_whole_lines_and_cuts_a_torn_one(tmp_path):
  write_lines(tmp_path, line(10), line(99), '{"step": 100, "ep')
  with MetricsWriter(tmp_path) as writer:
    writer.write(5, 0.5, 'test', {})
  assert [record['step'] for record in read_metrics(tmp_path)] == [10, 99, 5]


@pytest.mark.parametrize(
  ('content', 'steps'),
  [
    ((), []),
    ((line(1), line(2)), [1, 2]),
    ((line(1), '{"step": 2, "epo'), [1]),
    ((line(1), line(2).rstrip()), [1, 2]),
    ((line(1), '\0\0\0\0'), [1]),
    (('{',), []),
  ],
)
def test_reading_tolerates_a_torn_last_line(tmp_path, content, steps):
  path = write_lines(tmp_path, *content)
  before = path.read_bytes()
  assert [record['step'] for record in read_metrics(tmp_path)] == steps
  assert path.read_bytes() == before


def test_an_absent_file_has_no_lines(tmp_path):
  assert read_metrics(tmp_path) == []
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('content', 'step', 'left'),
  [
    ((line(10), line(20), line(20), line(30)), 20, (line(10), line(20), line(20))),
    ((line(10), line(20)), 0, ()),
    ((line(10), line(20)), 20, (line(10), line(20))),
    ((line(10), line(30), line(20)), 20, (line(10), line(20))),
    ((line(10), '{"step": 15, "e'), 20, (line(10),)),
    ((line(10), line(15).rstrip()), 20, (line(10), line(15))),
  ],
)
def test_resuming_keeps_the_lines_up_to_the_step(tmp_path, content, step, left):
  path = write_lines(tmp_path, *content)
  MetricsWriter(tmp_path, step).close()
  assert path.read_text() == ''.join(left)
  assert sorted(entry.name for entry in tmp_path.iterdir()) == ['metrics.jsonl', 'tensorboard']


@pytest.mark.parametrize('broken', ['{"step": 2, "epo', '7', '{"epoch": 1}', ''])
def test_a_broken_line_that_is_not_a_torn_last_one_is_named_and_nothing_is_lost(tmp_path, broken):
  path = write_lines(tmp_path, line(1), broken + '\n', line(3))
  before = path.read_bytes()
  for action in (read_metrics, MetricsWriter):
    with pytest.raises(UserError) as error:
      action(tmp_path)
    assert str(error.value) == (
      f'expected a JSON object with a step on every line of {path}, found {broken!r} on line 2; fix or delete that line'
    )
  assert path.read_bytes() == before
