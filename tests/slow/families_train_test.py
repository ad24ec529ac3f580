"""The other families train, are evaluated and exit early, as FractalNet in ../models/families_train_test.py."""

import functools
import json

import numpy as np
import pytest
from families import RUNS, arguments
from running import run_command, run_main

from paranet_jax.calibrate import __main__ as calibrate
from paranet_jax.display.metrics import read_metrics
from paranet_jax.early.runtime import EarlyExit
from paranet_jax.models import msdnet

pytestmark = pytest.mark.usefixtures('programs')

OTHERS = RUNS.keys() - {'fractalnet_20'}


@pytest.fixture(scope='module')
def finished(programs, tmp_path_factory):
  """A function from a configuration's file to the workdir of its one-epoch run; MSDNet's exits are narrow."""

  @functools.cache
  def run(file):
    workdir = tmp_path_factory.mktemp(file)
    assert run_main(*arguments(file, workdir)).code == 0
    return workdir

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(msdnet, 'EXIT_CHANNELS', 16)
    yield run


@pytest.mark.parametrize('file', sorted(OTHERS))
def test_one_epoch_lowers_the_loss_at_every_exit(finished, file):
  lines = [line for line in read_metrics(finished(file)) if line['split'] == 'train']
  exits = json.loads((finished(file) / 'summary.json').read_text())['exits']
  assert [row['learns_from'] for row in exits] == ['labels'] * RUNS[file][1]
  for number, row in enumerate(exits, 1):
    assert lines[-1][f'exit_{number}/loss'] < 0.95 * lines[0][f'exit_{number}/loss']
    assert 0 <= row['accuracy'] <= 1


def test_a_run_is_evaluated_and_exits_early(finished, file='msdnet_budgeted'):
  workdir = finished(file)
  result = run_main(f'--workdir={workdir}', '--mode=eval', '--json')
  summary = json.loads((workdir / 'summary.json').read_text())
  for row, known in zip(json.loads(result.out)['splits']['test'], summary['exits'], strict=True):
    assert row.items() <= known.items()
  assert run_command(calibrate.main, f'--workdir={workdir}', '--threshold=0.3').code == 0
  found = EarlyExit.load(workdir).predict(np.zeros((3, 8, 8, 3), np.uint8))
  assert found.probabilities.shape == (3, 10) and set(found.exits.tolist()) <= set(range(1, RUNS[file][1] + 1))
