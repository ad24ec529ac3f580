"""Every method of training several exits trains, through the command: the loss falls at each exit."""

import json

import numpy as np
import pytest
from families import arguments
from running import run_main

from paranet_jax.display.metrics import read_metrics
from paranet_jax.early.runtime import EarlyExit
from paranet_jax.runs.trained import read_run

pytestmark = pytest.mark.usefixtures('programs')

METHODS = {
  'boostnet': ('model.boost=0.5', 'loss.gradient_equilibrium=True'),
  'transfer': ('model.transfer=16', 'loss.gradient_equilibrium=True'),
  'conflict averse': ('loss.conflict_averse=0.4',),
  'own channels': ('loss.own_channels=0.5',),
  'sample weights': ('loss.sample_weight=0.3',),
}


@pytest.mark.parametrize('method', METHODS)
def test_one_epoch_lowers_the_loss_at_every_exit(method, tmp_path):
  result = run_main(*arguments('preact_resnet_110', tmp_path / 'run', *METHODS[method]))
  assert (result.code, result.err) == (0, '')
  lines = [line for line in read_metrics(tmp_path / 'run') if line['split'] == 'train']
  for number in (1, 2, 3):
    assert lines[-1][f'exit_{number}/loss'] < 0.95 * lines[0][f'exit_{number}/loss']
  # Stage by stage, the runtime gives the answers that the evaluation of the last exit measured.
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  test = read_run(tmp_path / 'run').load_dataset().test
  found = EarlyExit.load(tmp_path / 'run').predict(test.images)
  right = np.mean(found.probabilities.argmax(-1) == test.labels)
  assert right == pytest.approx(summary['exits'][-1]['accuracy'], abs=0.003) and set(found.exits) == {3}
