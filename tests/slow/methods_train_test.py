"""Every method of training several exits and every part of a recipe trains, through the command: the loss falls at each
exit, and otherwise than without it."""

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
  'averaged teacher of all exits': (
    *('train.average=0.5', 'loss.teacher=average', 'loss.distill=all', 'loss.hard_label_weight=0.5'),
    *('loss.temperature=1.0', 'train.learning_rate=0.05', 'train.epochs=5'),
  ),
  'RandAugment': ('train.auto_augment=rand',),
  'TrivialAugment': ('train.auto_augment=trivial', 'train.epochs=2'),  # Hard for digits of 8 x 8 pixels.
  'CutMix': ('train.cutmix=0.5',),
  'alternating flip': ('data.flip=True', 'train.alternate_flip=True'),
  'decoupled decay': ('train.decoupled_decay=True', 'train.weight_decay=0.01'),
  'norm biases': ('train.norm_bias_factor=4.0',),
  'Muon': ('train.optimizer=muon',),
}


def losses(workdir):
  """Of exits 1 to 3, at each line of the log."""
  lines = [line for line in read_metrics(workdir) if line['split'] == 'train']
  return np.array([[line[f'exit_{number}/loss'] for number in (1, 2, 3)] for line in lines])


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('plain') / 'run'
  assert run_main(*arguments('preact_resnet_110', workdir)).code == 0
  return losses(workdir)


@pytest.mark.parametrize('method', METHODS)
def test_one_epoch_lowers_the_loss_at_every_exit(method, plain, tmp_path, request):
  if method == 'Muon':
    request.getfixturevalue('standard_promotion')
  result = run_main(*arguments('preact_resnet_110', tmp_path / 'run', *METHODS[method]))
  assert (result.code, result.err) == (0, '')
  found = losses(tmp_path / 'run')
  assert (found[-1] < 0.95 * found[0]).all() and (found[-1] != plain[-1]).all()
  # Stage by stage, the runtime gives the answers that the evaluation of the last exit measured.
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  test = read_run(tmp_path / 'run').load_dataset().test
  found = EarlyExit.load(tmp_path / 'run').predict(test.images)
  right = np.mean(found.probabilities.argmax(-1) == test.labels)
  assert right == pytest.approx(summary['exits'][-1]['accuracy'], abs=0.003) and set(found.exits) == {3}
