"""The summary of a run with many classes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from paranet_jax.evaluation import as_json
from paranet_jax.host.processes import Coordinator
from paranet_jax.runs.record import RunRecord


@pytest.mark.parametrize(('classes', 'inline', 'largest'), [(100, True, 70_000), (1000, False, 60_000)])
def test_the_summary_stays_small(tmp_path, classes, inline, largest):
  matrix = np.eye(classes, dtype=int)
  matrix[1, 0] = 2
  accuracies = [round(1 / 3, 6)] * classes
  rows = [
    {'exit': 1, 'trained': False, 'class_accuracy': None, 'confusion': None},
    {'exit': 2, 'trained': True, 'class_accuracy': accuracies, 'confusion': matrix},
  ]
  data = SimpleNamespace(class_names=[f'class {number}' for number in range(classes)])
  run = SimpleNamespace(
    task=SimpleNamespace(dataset=data, total_steps=9, class_weights=(0.5,) * classes),
    _workdir=tmp_path,
    _processes=Coordinator(),
    _wall_time=lambda: 1.0,
  )
  description = {'name': 'PN2-xd', 'num_classes': classes, 'exits': [{'macs': 1}, {'macs': 2}]}
  RunRecord.finish(run, RunRecord.summarize(run, description, {'held_out': rows, 'test': rows}, {}))
  text = (tmp_path / 'summary.json').read_text()
  summary = json.loads(text)
  assert len(text) < largest
  assert [row['macs'] for row in summary['exits']] == [1, 2] and summary['exits'][1]['class_accuracy'] == accuracies
  assert summary['class_names'] == data.class_names and summary['class_weights'] == [0.5] * classes
  assert summary['held_out'] == as_json({'': rows})['']
  assert summary['exits'][1]['confusion'] == (matrix.tolist() if inline else None)
  assert summary.get('confusion_file') == (None if inline else 'confusion.npz')
  if not inline:
    with np.load(tmp_path / 'confusion.npz') as saved:
      assert set(saved) == {'held_out.exit_2', 'test.exit_2'}
      np.testing.assert_array_equal(saved['test.exit_2'], matrix)
    assert (tmp_path / 'confusion.npz').stat().st_size < 60_000
