"""Tests that a run whose images stay in their files is the run that has them in memory, bit for bit."""

import contextlib
import io
import json
import signal

import chex
import numpy as np
import pytest
from PIL import Image
from running import CONFIGS, TINY, before_each_step, refusal, run_main, saved_state, send, summary_of

from paranet_jax.calibrate import __main__ as calibrate
from paranet_jax.calibrate import figures
from paranet_jax.command_line import parse
from paranet_jax.data.stream import TrainBatches
from paranet_jax.display.metrics import read_metrics
from paranet_jax.evaluation import Evaluator
from paranet_jax.host.errors import LostWorkersError, UserError
from paranet_jax.seeds import train_seeds

pytestmark = pytest.mark.usefixtures('programs')

RUN = (*TINY, '--config.name=PN1-d')
STREAMED = ('--config.data.streaming=True', '--config.data.workers=0')


@pytest.fixture(scope='module')
def in_memory(programs, tmp_path_factory):
  return trained(tmp_path_factory.mktemp('in_memory'))


@pytest.fixture(scope='module')
def streamed(programs, tmp_path_factory):
  return trained(tmp_path_factory.mktemp('streamed'), *STREAMED)


def trained(workdir, *arguments):
  result = run_main(*RUN, f'--workdir={workdir}', *arguments)
  assert (result.code, result.err) == (0, '')
  return workdir


def measured(workdir):
  """Every line of the metrics, but for its speed."""
  return [{name: value for name, value in line.items() if 'per_second' not in name} for line in read_metrics(workdir)]


def assert_alike(workdir, other):
  chex.assert_trees_all_equal(saved_state(workdir), saved_state(other), strict=True)
  assert measured(workdir) == measured(other)
  assert summary_of(workdir) == summary_of(other)
  assert (workdir / 'dataset.json').read_text() == (other / 'dataset.json').read_text()


def test_streamed_is_as_in_memory(streamed, in_memory):
  assert_alike(streamed, in_memory)


def test_on_two_devices(tmp_path):
  two = '--config.train.devices=2'
  assert_alike(trained(tmp_path / 'a', two, *STREAMED), trained(tmp_path / 'b', two))


def test_stopped_and_resumed(tmp_path, streamed):
  for step in (2, 5):  # Within an epoch, and at its end.
    with pytest.MonkeyPatch.context() as patch:
      before_each_step(patch, send(signal.SIGTERM, step))
      result = run_main(*RUN, f'--workdir={tmp_path}', *STREAMED)
    assert result.out.splitlines()[-1] == f'stopped by SIGTERM after step {step}, saved; the same command resumes'
  trained(tmp_path, *STREAMED)
  chex.assert_trees_all_equal(saved_state(tmp_path), saved_state(streamed), strict=True)


def test_evaluated(streamed, in_memory):
  found, expected = (run_main('--mode=eval', '--json', f'--workdir={workdir}') for workdir in (streamed, in_memory))
  assert found == expected and found.code == 0


def test_calibrated(streamed, in_memory, monkeypatch):
  monkeypatch.setattr(figures, 'FUNCTIONS', (figures.contact_sheet,))  # The one that shows images.
  plans = []
  for workdir, flags in ((streamed, ['--curves']), (in_memory, [])):
    with contextlib.redirect_stdout(io.StringIO()):
      assert calibrate.main([f'--workdir={workdir}', '--threshold=0.2', *flags]) == 0
    plans.append(json.loads((workdir / 'exits.json').read_text()) | {'provenance': None})
  assert plans[0] == plans[1]
  assert (streamed / 'exits' / 'contact_sheet.png').exists()


@pytest.mark.parametrize(
  ('step', 'saved'), [(6, '; saved after step 6, and the same command resumes'), (0, '')], ids=['later', 'at once']
)
def test_an_image_that_cannot_be_read_ends_the_run_in_one_line(tmp_path, monkeypatch, step, saved):
  read = TrainBatches.__getitem__

  def failing(self, number):
    if number == step:
      raise UserError('expected an image, found none: put it back')
    return read(self, number)

  monkeypatch.setattr(TrainBatches, '__getitem__', failing)
  message = refusal(*RUN, f'--workdir={tmp_path}', *STREAMED, started=True)
  assert message == f'expected an image, found none: put it back{saved}'
  assert sorted(path.name for path in tmp_path.glob('checkpoints/[0-9]*')) == (['4', '6'] if step else [])


def test_workers_that_are_lost_during_an_evaluation(tmp_path, streamed):
  def fail(*unused):
    raise LostWorkersError('worker 5 was killed')

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Evaluator, 'evaluate', fail)
    result = run_main(*RUN, f'--workdir={tmp_path}', *STREAMED)
  message = 'error: worker 5 was killed; saved after step 5, and the same command resumes\n'
  assert (result.code, result.err) == (1, message)
  trained(tmp_path, *STREAMED)
  chex.assert_trees_all_equal(saved_state(tmp_path), saved_state(streamed), strict=True)
  found, expected = ([line for line in measured(folder) if line['split'] != 'train'] for folder in (tmp_path, streamed))
  assert found == expected and summary_of(tmp_path) == summary_of(streamed)


def test_several_seeds_are_trained_one_after_another(tmp_path, capsys, streamed):
  _, config = parse(['main', *RUN, *STREAMED, '--config.seeds=2'])
  assert train_seeds(config, tmp_path, at_once=True)['seeds'] == [0, 1]
  chex.assert_trees_all_equal(saved_state(tmp_path / 'seed_0'), saved_state(streamed), strict=True)
  assert [line for line in capsys.readouterr().out.splitlines() if line.startswith('seed')][1:3] == ['seed 0', 'seed 1']


def test_the_network_for_imagenet_on_photographs(tmp_path):
  """With its stem and pooling, one layer deep and two channels wide, at a side of 64 pixels."""
  rng = np.random.default_rng(0)
  for split, count in (('train', 4), ('test', 2)):
    for label in ('cat', 'dog'):
      (tmp_path / 'photos' / split / label).mkdir(parents=True)
      for number in range(count):
        pixels = rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'photos' / split / label / f'{number}.jpg')
  result = run_main(
    *(f'--config={CONFIGS}/pn4_imagenet.py', '--config.name=PN1-d', f'--workdir={tmp_path}/run', *STREAMED),
    *('--config.data.name=folder', f'--config.data.data_dir={tmp_path}/photos', '--config.train.devices=1'),
    *('--config.model.layers_per_block=1', '--config.model.growth_rate=2', '--config.model.image_side=64'),
    *('--config.train.batch_size=4', '--config.train.max_steps=3', '--config.eval.every_epochs=9'),
  )
  assert (result.code, result.err) == (0, '')
  state = saved_state(tmp_path / 'run')
  assert state.step == 3 and state.params['pipeline_1_stem']['kernel'].shape == (7, 7, 3, 4)
