"""Tests of a run from its command to what it leaves behind."""

import datetime
import functools
import importlib.metadata
import json
import math
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import PROGRAMS, TINY, before_each_step, contents, refusal, run_main, saved_state

from paranet_jax import devices
from paranet_jax.display.metrics import read_metrics
from paranet_jax.display.progress import Clock
from paranet_jax.host.machine import cpu_name, usable_cores
from paranet_jax.runs.workdir import restore_config
from paranet_jax.task import build_task

# One block a pipeline, which compiles faster.
RUN = (*TINY, '--config.model.blocks=(1,1,1)')
WORKDIR = 'runs/PN3-x3d-digits-s0'


@pytest.fixture(scope='module', autouse=True)
def _in_a_folder_of_its_own(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(tmp_path_factory.mktemp('here'))
    PROGRAMS.install(patch)
    yield


@pytest.fixture(scope='module')
def finished(_in_a_folder_of_its_own, tmp_path_factory):
  """The folder and the output of a run without --workdir."""
  result = run_main(*RUN)
  assert (result.code, result.err) == (0, ''), result
  return (tmp_path_factory.getbasetemp() / 'here0' / WORKDIR).absolute(), result.out


@pytest.fixture(scope='module')
def summary(finished):
  return json.loads((finished[0] / 'summary.json').read_text())


def steps(workdir):
  """The steps of the checkpoints there."""
  return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())


def test_what_is_in_a_workdir(finished):
  workdir, _ = finished
  names = {path.name for path in workdir.iterdir()}
  files = {'config.json', 'data_identity.npz', 'dataset.json', 'metrics.jsonl', 'summary.json'}
  assert names == files | {'curves.png', 'confusion.png', 'checkpoints', 'tensorboard'}
  assert steps(workdir) == [8, 10]
  for picture in ('curves.png', 'confusion.png'):
    assert (workdir / picture).read_bytes().startswith(b'\x89PNG\r\n\x1a\n')
  config = json.loads((workdir / 'config.json').read_text())
  assert config['name'] == 'PN3-x3d' and config['model']['growth_rate'] == 2 and config['train']['epochs'] == 2


def test_summary(summary):
  assert set(summary) == {
    *('name', 'dataset', 'seed', 'image_shape', 'num_classes', 'steps', 'exits', 'held_out'),
    *('class_names', 'versions', 'device', 'processor', 'cores', 'finished', 'wall_time_s'),
  }
  assert [summary[key] for key in ('name', 'dataset', 'seed', 'steps')] == ['PN3-x3d', 'digits', 0, 10]
  assert summary['image_shape'] == [8, 8, 3] and summary['num_classes'] == 10
  assert summary['versions']['jax'] == importlib.metadata.version('jax')
  assert summary['versions'].keys() == {
    *('paranet_jax', 'python', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
  }
  assert summary['device'] == {'platform': 'cpu', 'kind': 'cpu', 'count': 1}
  assert (summary['processor'], summary['cores']) == (cpu_name(), usable_cores())
  assert abs(datetime.date.fromisoformat(summary['finished']) - datetime.datetime.now(datetime.UTC).date()).days <= 1
  assert 0 < summary['wall_time_s'] < 3600


def test_summary_of_the_exits(summary):
  costs = {'own_macs', 'own_params', 'macs', 'params', 'macs_alone'}
  measures = {'accuracy', 'balanced_accuracy', 'top5', 'loss', 'nll', 'class_accuracy', 'confusion'}
  exits = summary['exits']
  assert [(row['exit'], row['trained'], row['learns_from']) for row in exits] == [
    (1, False, 'nothing'),
    (2, True, 'exit 3'),
    (3, True, 'labels'),
  ]
  assert all(row.keys() == {'exit', 'trained', 'learns_from'} | costs | measures for row in exits)
  assert all(row[key] is None for row in (exits[0], summary['held_out'][0]) for key in measures)
  for row in exits[1:] + summary['held_out'][1:]:
    assert 0 <= row['accuracy'] <= row['top5'] <= 1 and 0 < row['loss'] < math.inf
  assert [row['params'] for row in exits] == np.cumsum([row['own_params'] for row in exits]).tolist()
  assert [row['macs'] for row in exits] == np.cumsum([row['own_macs'] for row in exits]).tolist()


def test_the_numbers_are_those_of_the_saved_network(finished, summary):
  workdir, _ = finished
  task, state = build_task(restore_config(workdir)), saved_state(workdir)
  apply = jax.jit(functools.partial(task.model.apply, {'params': state.params, 'batch_stats': state.batch_stats}))
  for rows, split in ((summary['exits'], task.dataset.test), (summary['held_out'], task.dataset.held_out)):
    images = (split.images / 255 - task.dataset.mean) / task.dataset.std
    for row, logits in zip(rows[1:], apply(images.astype(np.float32))[1:], strict=True):
      logits = np.asarray(logits, np.float64)
      ranked = np.argsort(-logits, axis=-1)
      assert row['accuracy'] == np.mean(ranked[:, 0] == split.labels)
      matrix = np.zeros((10, 10), int)
      np.add.at(matrix, (split.labels, ranked[:, 0]), 1)
      assert row['confusion'] == matrix.tolist()
      by_class = np.diag(matrix) / matrix.sum(axis=1)
      assert row['class_accuracy'] == np.round(by_class, 6).tolist()
      assert row['balanced_accuracy'] == pytest.approx(by_class.mean())
      assert row['top5'] == np.mean(np.any(ranked[:, :5] == split.labels[:, None], axis=-1))
      nll = np.log(np.sum(np.exp(logits), axis=-1)) - logits[np.arange(len(split)), split.labels]
      assert row['nll'] == pytest.approx(np.mean(nll), rel=1e-5)


def test_metrics(finished, summary):
  lines = read_metrics(finished[0])
  assert [(line['step'], line['split']) for line in lines] == [
    *((2, 'train'), (4, 'train'), (5, 'held_out'), (5, 'test'), (6, 'train'), (8, 'train')),
    *((10, 'train'), (10, 'held_out'), (10, 'test')),
  ]
  where = {'step', 'epoch', 'split'}
  for line in lines:
    measures = ('accuracy', 'loss', 'nll')
    measures += () if line['split'] == 'train' else ('balanced_accuracy', 'top5')
    own = {'loss', 'learning_rate', 'images_per_second'} if line['split'] == 'train' else set()
    assert line.keys() == where | own | {f'exit_{number}/{name}' for number in (2, 3) for name in measures}
    assert line['epoch'] == line['step'] / 5
  trained = [line for line in lines if line['split'] == 'train']
  # The rate of the last step that a line speaks of: a cosine over 10 steps.
  rates = [0.1 * (1 + math.cos(math.pi * (step - 1) / 10)) / 2 for step in (2, 4, 6, 8, 10)]
  np.testing.assert_allclose([line['learning_rate'] for line in trained], rates, rtol=1e-5)
  for line in trained:
    assert line['loss'] == pytest.approx(line['exit_2/loss'] + line['exit_3/loss'], rel=1e-5)
    assert line['images_per_second'] > 0
  for line, rows in zip(lines[-2:], (summary['held_out'], summary['exits']), strict=True):
    assert [line[f'exit_{row["exit"]}/nll'] for row in rows[1:]] == [row['nll'] for row in rows[1:]]


def test_output_where_there_is_no_terminal(finished):
  workdir, out = finished
  assert '\r' not in out and '\x1b' not in out
  lines = out.splitlines()
  assert lines[0].startswith('PN3-x3d on digits: ') and lines[1].split()[:2] == ['exit', 'learns']
  assert 'images: 1,137 train, 300 held out, 360 test; 10 steps of 220 on 1 x cpu' in lines
  progress = [line.split('  ')[:2] for line in lines if line.startswith('epoch ')]
  assert progress == [[f'epoch {step / 5:.2f}/2', f'step {step}/10'] for step in (2, 4, 6, 8, 10)]
  assert [line for line in lines if line.startswith('after step')] == ['after step 5:', 'after step 10:']
  files = ('curves', 'png'), ('confusion', 'png'), ('summary', 'json')
  assert lines[-3:] == [f'{name}: {workdir}/{name}.{suffix}' for name, suffix in files]


@pytest.mark.parametrize('config', [RUN, ()], ids=['its config', 'the saved config'])
def test_evaluation_of_a_checkpoint_gives_the_numbers_of_the_run(finished, summary, config):
  workdir, _ = finished
  before = contents(workdir)
  result = run_main(*config, f'--workdir={workdir}', '--mode=eval', '--json')
  evaluation = json.loads(result.out)
  assert evaluation.keys() == {'name', 'dataset', 'seed', 'step', 'class_names', 'splits'} and evaluation['step'] == 10
  assert evaluation['splits']['held_out'] == summary['held_out']
  for measured, row in zip(evaluation['splits']['test'], summary['exits'], strict=True):
    assert measured == {key: row[key] for key in measured}
  assert contents(workdir) == before


def test_evaluation_of_an_earlier_checkpoint(finished):
  workdir, _ = finished
  earlier, latest = (run_main(f'--workdir={workdir}', '--mode=eval', *step).out for step in (['--step=8'], []))
  assert earlier.startswith('PN3-x3d after step 8:\nsplit ') and latest.startswith('PN3-x3d after step 10:\nsplit ')
  assert earlier.splitlines()[2:] != latest.splitlines()[2:]
  assert 'all classes on test images, least accurate at exit 3 first' in latest.splitlines()
  message = refusal(f'--workdir={workdir}', '--mode=eval', '--step=9')
  assert message == f'no checkpoint of step 9 in {workdir}/checkpoints, found [8, 10]; set --step'


@pytest.mark.parametrize('config', [RUN, ()], ids=['its config', 'the saved config'])
def test_a_finished_run_is_not_trained_again(finished, summary, monkeypatch, config):
  workdir, _ = finished

  def fail(*unused):
    raise AssertionError('a step was trained')

  before_each_step(monkeypatch, fail)
  before = contents(workdir)
  (workdir / 'summary.json').unlink()
  result = run_main(*config, f'--workdir={workdir}')
  assert result.code == 0 and 'resuming from the checkpoint at step 10 of 10' in result.out.splitlines()
  again = json.loads((workdir / 'summary.json').read_text())
  assert again | {'wall_time_s': None} == summary | {'wall_time_s': None}
  assert again['wall_time_s'] >= summary['wall_time_s'] - 1
  (workdir / 'summary.json').write_bytes(before['summary.json'])
  after = contents(workdir)
  assert {path: after[path] for path in before} == before
  assert all(path.startswith('tensorboard/') for path in after.keys() - before.keys())


def test_a_finished_run_that_is_started_again_still_tells_where_it_was_trained(finished, summary, tmp_path):
  workdir = shutil.copytree(finished[0], tmp_path / 'run')
  trained = {'processor': 'Another CPU', 'cores': 96, 'finished': '2025-01-01', 'wall_time_s': 7.5}
  trained |= {'device': {'platform': 'gpu'}, 'versions': {'jax': '0.9.9'}}
  path, lost = workdir / 'summary.json', {'exits': [row | {'accuracy': 0.0} for row in summary['exits']]}
  for known in (trained, {key: trained[key] for key in ('wall_time_s', 'device', 'versions')}):  # The second: of 0.1.0.
    rest = {key: value for key, value in summary.items() if key not in trained}
    path.write_text(json.dumps(rest | lost | known))
    assert run_main(*RUN, f'--workdir={workdir}').code == 0
    assert json.loads(path.read_text()) == rest | known
  path.write_text('{"steps": 10}')  # Damaged: it is written anew.
  assert run_main(*RUN, f'--workdir={workdir}').code == 0
  assert json.loads(path.read_text()) | {'wall_time_s': None} == summary | {'wall_time_s': None}


def test_evaluation_with_another_network_or_loss_is_refused(finished):
  workdir, _ = finished
  for field, change in (
    ('model.entry_pool=avg', 'model.entry_pool: max -> avg'),
    ('data.interpolation=bicubic', 'data.interpolation: bilinear -> bicubic'),
    ('loss.label_smoothing=0.1', 'loss.label_smoothing: 0.0 -> 0.1'),
  ):
    assert refusal(*RUN, f'--workdir={workdir}', '--mode=eval', f'--config.{field}') == (
      f'workdir {workdir} holds a run with a different configuration: {change} (saved -> now); leave out --config, or '
      'set these fields as the run has them'
    )
  free = '--config.eval.batch_size=90', '--config.train.learning_rate=0.2', '--config.data.workers=1'
  both = (run_main(*given, f'--workdir={workdir}', '--mode=eval').out for given in ((*RUN, *free), ()))
  assert next(both) == next(both)


def test_another_configuration_is_refused_with_its_differences(finished):
  workdir, _ = finished
  before = contents(workdir)
  message = refusal(*RUN, f'--workdir={workdir}', '--config.train.learning_rate=0.2', '--config.data.held_out=0')
  assert message == (
    f'workdir {workdir} holds a run with a different configuration: data.held_out: 300 -> 0; '
    'train.learning_rate: 0.1 -> 0.2 (saved -> now); '
    'set --workdir for a new run, or --accept_config_changes to train with the new one'
  )
  assert contents(workdir) == before


@pytest.mark.parametrize(
  ('change', 'what'),
  [
    ('model.growth_rate=4', 'params/exit_1/classifier/kernel is [6, 10] there and [12, 10] in this configuration'),
    ('model.stem_norm=true', 'params/pipeline_1_stem_norm/bias is absent there and [4] in this configuration'),
    ('train.optimizer=adamw', 'opt_state/0/0/count is absent there and [] in this configuration'),
  ],
)
def test_a_checkpoint_of_another_architecture_is_refused(finished, change, what):
  workdir, _ = finished
  before = contents(workdir)
  message = refusal(*RUN, f'--workdir={workdir}', f'--config.{change}', '--accept_config_changes', started=True)
  assert message.startswith(f'checkpoint {workdir}/checkpoints/10 has a different architecture or optimizer: ')
  assert what in message and message.endswith('set --config to the one it was trained with, or --workdir')
  assert contents(workdir) == before


def test_a_run_that_is_further_than_its_end_is_refused(finished):
  workdir, _ = finished
  before = contents(workdir)
  message = refusal(*RUN, f'--workdir={workdir}', '--config.train.max_steps=9', '--accept_config_changes', started=True)
  assert message == (
    'the run is at step 10 and this configuration ends at step 9; '
    'raise --config.train.epochs or --config.train.max_steps, or set --workdir for a new run'
  )
  assert contents(workdir) == before


def test_a_speed_counts_steps_that_are_computed(tmp_path, monkeypatch):
  run_on, rate, given, ready = devices.run_on, Clock.images_per_second, [], []

  @jax.jit
  def slowly(totals):
    product = jax.lax.fori_loop(0, 100, lambda _, product: product @ product, jnp.full((200, 200), 1 / 200))
    return jax.tree.map(lambda total: total + 0 * product[0, 0], totals)

  def slow_run_on(*arguments):
    def step(*operands):
      state, totals = train_step(*operands)
      given[:] = [slowly(totals)]
      return state, given[0]

    train_step = run_on(*arguments)
    return step

  def noted(clock):
    ready.append(all(total.is_ready() for total in given[0].values()))
    return rate(clock)

  monkeypatch.setattr(devices, 'run_on', slow_run_on)
  monkeypatch.setattr(Clock, 'images_per_second', noted)
  assert run_main(*RUN, f'--workdir={tmp_path}').code == 0
  assert ready == [True] * 5


def poison(step, state):
  """Makes the last exit's parameters no numbers before step 7."""
  if step == 6:
    exit_3 = jax.tree.map(lambda leaf: leaf * np.float32('nan'), state.params['exit_3'])
    return state.replace(params=state.params | {'exit_3': exit_3})


def poison_and_stop(step, state):
  if step == 6:
    os.kill(os.getpid(), signal.SIGTERM)
  return poison(step, state)


@pytest.mark.parametrize(
  ('act', 'fields', 'what', 'step', 'saved'),
  [
    (poison, ('log.every_steps=1', 'checkpoint.every_steps=3'), 'the loss (exits [2, 3])', 7, 6),
    (poison, ('log.every_steps=9', 'checkpoint.every_steps=1'), 'the state', 7, 6),
    (poison_and_stop, ('log.every_steps=9', 'checkpoint.every_steps=4'), 'the state', 7, 4),
    (poison_and_stop, ('log.every_steps=9', 'checkpoint.every_steps=9'), 'the state', 7, None),
  ],
)
def test_what_is_not_finite_ends_the_run_and_is_not_saved(tmp_path, monkeypatch, act, fields, what, step, saved):
  before_each_step(monkeypatch, act)
  message = refusal(*RUN, f'--workdir={tmp_path}', *(f'--config.{field}' for field in fields), started=True)
  last = 'nothing is saved' if saved is None else f'the last checkpoint is of step {saved}'
  assert message == (
    f'{what} is no longer finite at step {step}, and {last}; '
    'lower --config.train.learning_rate or set --config.train.clip_norm, in a new --workdir'
  )
  assert not (tmp_path / 'summary.json').exists()
  assert steps(tmp_path)[-1:] == ([] if saved is None else [saved])
  if saved is not None:
    state = saved_state(tmp_path)
    assert state.step == saved and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
