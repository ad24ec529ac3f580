"""The notebooks in percent format run from top to bottom and show what they promise."""

import pathlib
import runpy

import matplotlib.pyplot as plt
import pytest
from running import share_pictures

import paranet_jax.train  # noqa: F401  What it imports has `base_config` before a test replaces it.
from paranet_jax import base_config as base_config_lib
from paranet_jax.models.registry import FAMILIES

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / 'examples'


@pytest.fixture
def run(monkeypatch, tmp_path):
  """Runs an example in a folder of its own, with other defaults of the model; returns its variables."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(FAMILIES, 'known', dict(FAMILIES.known))
  share_pictures(monkeypatch)
  base_config = base_config_lib.base_config

  def run(name, **model):
    def small(*arguments, **named):
      config = base_config(*arguments, **named)
      config.model.update(model)
      return config

    monkeypatch.setattr(base_config_lib, 'base_config', small)
    return runpy.run_path(str(EXAMPLES / name))

  yield run
  plt.close('all')


def test_train_calibrate_plot(run, tmp_path):
  found = run('train_calibrate_plot.py', blocks=(1, 1, 2))
  first, *_, last = found['macs']
  assert first < found['plan'].test['cost_macs'] < last
  # Threshold 0 stops every image at the first exit. The plot goes from there towards the last one.
  assert found['costs'][0] == first and max(found['costs']) <= last
  assert found['plan'].test['accuracy'] > 0.5
  assert (tmp_path / 'runs/example/accuracy_against_cost.png').stat().st_size > 0


def test_own_backbone(run, capsys):
  found = run('own_backbone.py', widths=(8, 16, 32))
  assert found['summary']['name'] == 'OwnBackbone' and len(found['summary']['exits']) == 3
  assert found['accuracy'] > 0.5
  assert found['macs'].mean() < found['last']['macs']
  assert 'early exit: ' in capsys.readouterr().out
