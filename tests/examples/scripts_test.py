"""The notebooks in percent format run from top to bottom and show what they promise."""

import pathlib
import runpy

import matplotlib.pyplot as plt
import pytest

from paranet_jax.models.registry import FAMILIES

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / 'examples'


@pytest.fixture
def run(monkeypatch, tmp_path):
  """Runs an example in a folder of its own; returns its variables."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(FAMILIES, 'known', dict(FAMILIES.known))
  yield lambda name: runpy.run_path(str(EXAMPLES / name))
  plt.close('all')


def test_train_calibrate_plot(run, tmp_path):
  found = run('train_calibrate_plot.py')
  first, *_, last = found['macs']
  assert first < found['plan'].test['cost_macs'] < last
  # Threshold 0 stops every image at the first exit. The plot goes from there towards the last one.
  assert found['costs'][0] == first and max(found['costs']) <= last
  assert found['plan'].test['accuracy'] > 0.5
  assert (tmp_path / 'runs/example/accuracy_against_cost.png').stat().st_size > 0


def test_own_backbone(run, capsys):
  found = run('own_backbone.py')
  assert found['summary']['name'] == 'OwnBackbone' and len(found['summary']['exits']) == 3
  assert found['accuracy'] > 0.5
  assert found['macs'].mean() < found['last']['macs']
  assert 'early exit: ' in capsys.readouterr().out
