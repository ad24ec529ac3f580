"""Tests of several seeds of one configuration: each equals its own run, and the summary covers all."""

import json
import os
import shutil
import signal
import time

import chex
import pytest
from running import PROGRAMS, TINY, before_each_step, contents, refusal, run_main, saved_state, summary_of

from paranet_jax.command_line import parse
from paranet_jax.config import default_workdir
from paranet_jax.devices import SideBySide
from paranet_jax.display.metrics import read_metrics
from paranet_jax.evaluation import MEASURES
from paranet_jax.host.errors import UserError
from paranet_jax.runs.workdir import Accepted
from paranet_jax.seeds import seeds_table, summarize, train_seeds
from paranet_jax.train import train_and_evaluate

SEEDS = (3, 4)
SHORT = (
  *TINY,
  '--config.name=PN1-d',
  '--config.model.image_side=8',
  '--config.train.learning_rate=0.01',
  '--config.train.max_steps=3',
  '--config.checkpoint.every_steps=1',
  '--config.log.every_steps=1',
)
BOTH = (*SHORT, '--config.seed=3', '--config.seeds=2')


@pytest.fixture(scope='module', autouse=True)
def _programs():
  with pytest.MonkeyPatch.context() as patch:
    PROGRAMS.install(patch)
    compiled, kept = SideBySide.compiled, {}

    def compiled_once(self, *arguments):
      devices = len(self.devices)
      if devices not in kept:
        kept[devices] = compiled(self, *arguments)
      return kept[devices]

    patch.setattr(SideBySide, 'compiled', compiled_once)
    yield


@pytest.fixture(scope='module')
def together(_programs, tmp_path_factory):
  """The folder of both seeds, and what was printed."""
  workdir = tmp_path_factory.mktemp('both')
  result = run_main(*BOTH, f'--workdir={workdir}')
  assert (result.code, result.err) == (0, ''), result
  return workdir, result.out


@pytest.fixture(scope='module')
def alone(_programs, tmp_path_factory):
  """The folder in which each seed was trained alone."""
  folder = tmp_path_factory.mktemp('alone')
  for seed in SEEDS:
    assert run_main(*SHORT, f'--config.seed={seed}', f'--workdir={folder}/seed_{seed}').code == 0
  return folder


def test_each_seed_is_its_own_run_bit_for_bit(together, alone):
  workdir, _ = together
  assert {path.name for path in workdir.iterdir()} == {'config.json', 'summary.json', 'seed_3', 'seed_4'}
  for seed in SEEDS:
    own, expected = workdir / f'seed_{seed}', alone / f'seed_{seed}'
    chex.assert_trees_all_equal(saved_state(own), saved_state(expected), strict=True)
    assert summary_of(own) == summary_of(expected)
    assert (own / 'config.json').read_text() == (expected / 'config.json').read_text()
    assert {path.name for path in own.iterdir()} == {path.name for path in expected.iterdir()}
  first, second = (saved_state(workdir / f'seed_{seed}').params for seed in SEEDS)
  with pytest.raises(AssertionError):
    chex.assert_trees_all_close(first, second)


def test_summary_covers_both_seeds(together):
  workdir, out = together
  found = summary_of(workdir)
  each = [summary_of(workdir / f'seed_{seed}') for seed in SEEDS]
  assert found['seeds'] == list(SEEDS) and 'seed' not in found
  for split in ('exits', 'held_out'):
    for row, first, second in zip(found[split], each[0][split], each[1][split], strict=True):
      for name in ('accuracy', 'top5', 'loss', 'nll'):
        a, b = first[name], second[name]
        assert row[name]['each'] == [a, b]
        assert row[name]['mean'] == pytest.approx((a + b) / 2)
        assert row[name]['std'] == pytest.approx(abs(a - b) / 2**0.5, abs=1e-12)
  assert out.splitlines()[-1] == f'summary: {workdir}/summary.json'
  assert 'PN1-d, seeds 3, 4: mean +- standard deviation' in out.splitlines()


def test_finished_seeds_are_not_trained_again(together, monkeypatch):
  workdir, _ = together

  def fail(*unused):
    raise AssertionError('a step was trained')

  before_each_step(monkeypatch, fail)
  before = contents(workdir)
  assert run_main(*BOTH, f'--workdir={workdir}').code == 0
  # The saved configuration says that there are two.
  assert run_main(f'--workdir={workdir}').code == 0
  assert contents(workdir) == before


def test_extended_seeds_that_are_killed_before_their_first_checkpoint_are_not_finished(together, tmp_path, monkeypatch):
  longer = *BOTH, '--config.train.max_steps=5', '--accept_config_changes'
  workdir, killed = shutil.copytree(together[0], tmp_path / 'both'), tmp_path / 'killed'

  def copy_once(*_):
    if not killed.exists():
      assert (workdir / 'lock').exists()
      shutil.copytree(workdir, killed)

  with monkeypatch.context() as patch:
    before_each_step(patch, copy_once)
    assert run_main(*longer, f'--workdir={workdir}').code == 0
  assert not (killed / 'seed_3' / 'summary.json').exists()
  # Nor does the mean of the shorter ones stand beside the configuration of the longer ones.
  assert not (killed / 'summary.json').exists()
  assert json.loads((killed / 'config.json').read_text())['train']['max_steps'] == 5
  assert run_main(*longer, f'--workdir={killed}').code == 0
  assert [summary_of(killed / f'seed_{seed}')['steps'] for seed in SEEDS] == [5, 5]


@pytest.mark.parametrize('at_once', [False, True])
def test_what_the_data_refuse_changes_nothing(together, tmp_path, at_once):
  workdir, _ = together
  new, finished = tmp_path / 'new', shutil.copytree(workdir, tmp_path / 'finished')
  before = contents(finished)
  _, config = parse(['main', *BOTH, '--config.data.held_out=100000'])
  for folder in (new, finished):
    with pytest.raises(UserError, match='^expected to hold out 0 to 1427 of 1437 '):
      train_seeds(config, folder, Accepted(config=True), at_once)
  assert contents(new) == {} and contents(finished) == before


def test_stopped_at_every_step(together, tmp_path, monkeypatch):
  workdir, _ = together
  trained = []

  def stop(step, state):
    trained.append((int(state.seed), step))
    os.kill(os.getpid(), signal.SIGTERM)

  before_each_step(monkeypatch, stop)
  for _ in range(10):
    assert run_main(*BOTH, f'--workdir={tmp_path}').code == 0
    if (tmp_path / 'summary.json').exists():
      break
  assert trained == [(seed, step) for seed in SEEDS for step in range(3)]
  assert summary_of(tmp_path) == summary_of(workdir)
  assert [line['step'] for line in read_metrics(tmp_path / 'seed_4')] == [1, 2, 3, 3, 3]


def test_folder_with_other_runs(together, alone, tmp_path):
  workdir, _ = together
  before = contents(workdir)
  assert refusal(*SHORT, '--config.seed=3', '--config.seeds=3', f'--workdir={workdir}') == (
    f'workdir {workdir} holds a run with a different configuration: seeds: 2 -> 3 (saved -> now); '
    'set --workdir for a new run, or --accept_config_changes to train with the new one'
  )
  assert refusal(*BOTH, f'--workdir={alone}/seed_3', '--accept_config_changes') == (
    f'workdir {alone}/seed_3 holds a single run, found 2 seeds; set --workdir for new runs'
  )
  assert refusal(f'--workdir={workdir}', '--mode=eval') == (
    f'--mode=eval evaluates one run, found 2 seeds; set --workdir={workdir}/seed_3'
  )
  assert refusal(*TINY, f'--config.seed={2**31 - 1}', '--config.seeds=2', f'--workdir={tmp_path}/new') == (
    'seed must be an integer of 32 bits, found 2147483648; set --config.seed'
  )
  assert contents(workdir) == before and not contents(tmp_path)


def measured(seed, accuracy, wall_time):
  # A run of version 0.1.0 has no balanced accuracy.
  values = {'accuracy': accuracy, 'top5': 1.0, 'loss': 0.5, 'nll': 0.5, 'class_accuracy': [1.0], 'confusion': [[1]]}
  exits = [{'exit': 1, 'trained': False, **dict.fromkeys(values)}, {'exit': 2, 'trained': True, **values}]
  return {'name': 'PN1-d', 'seed': seed, 'steps': 9, 'exits': exits, 'wall_time_s': wall_time}


def test_mean_and_deviation_of_three():
  # 0.2, 0.3, 0.7: mean 0.4, deviations -0.2, -0.1, 0.3, variance (0.04 + 0.01 + 0.09) / 2 = 0.07.
  result = summarize([measured(seed, accuracy, 1.5) for seed, accuracy in enumerate((0.2, 0.3, 0.7))])
  assert result['exits'][1]['accuracy'] == {
    'mean': pytest.approx(0.4),
    'std': pytest.approx(0.07**0.5),
    'each': [0.2, 0.3, 0.7],
  }
  assert result['exits'][0]['accuracy'] is None and result['exits'][1]['balanced_accuracy'] is None
  assert not {'class_accuracy', 'confusion'} & result['exits'][1].keys()
  assert (result['name'], result['steps'], result['seeds'], result['wall_time_s']) == ('PN1-d', 9, [0, 1, 2], 4.5)
  assert [line.split() for line in seeds_table(result).splitlines()[2:]] == [
    ['test', '1', '—', '—', '—'],
    ['test', '2', '40.00', '+-', '26.46', '100.00', '+-', '0.00', '0.5000', '+-', '0.0000'],
  ]


def test_where_and_when_several_were_trained():
  summaries = [measured(seed, 0.5, 1.0) | {'cores': 2, 'device': {'kind': 'cpu'}} for seed in (0, 1)]
  for summary, day, processor in zip(summaries, ('30', '29'), ('AMD EPYC', 'Intel'), strict=True):
    summary |= {'finished': f'2026-11-{day}', 'processor': processor}
  result = summarize(summaries)
  assert (result['finished'], result['cores'], result['device']) == ('2026-11-30', 2, {'kind': 'cpu'})
  assert 'processor' not in result and 'seed' not in result
  del summaries[0]['finished']  # Of version 0.1.0.
  assert 'finished' not in summarize(summaries)


def test_mean_and_deviation_of_averaged_weights():
  summaries = [measured(seed, 0.5, 1.0) for seed in (0, 1)]
  for summary, accuracy in zip(summaries, (0.25, 0.75), strict=True):
    summary['average'] = {'test': measured(0, accuracy, 1.0)['exits']}
  result = summarize(summaries)
  assert result['average'].keys() == {'test'} and result['exits'][1]['accuracy']['mean'] == 0.5
  assert result['average']['test'][1]['accuracy'] == {
    'mean': 0.5,
    'std': pytest.approx(0.25 * 2**0.5),
    'each': [0.25, 0.75],
  }


def test_mean_and_deviation_without_labels():
  summaries = []
  for seed, agreement in enumerate((0.5, 0.75)):
    rows = [{'exit': 1, 'trained': True, 'agreement': agreement} | dict.fromkeys(MEASURES)]
    summaries.append(measured(seed, None, 1.5) | {'exits': rows})
  result = summarize(summaries)
  assert result['exits'][0]['accuracy'] is None
  assert result['exits'][0]['agreement'] == {'mean': 0.625, 'std': pytest.approx(0.125 * 2**0.5), 'each': [0.5, 0.75]}
  assert seeds_table(result).splitlines()[1:] == [
    'split  exit  same answer as the last exit (%)',
    'test      1                    62.50 +- 17.68',
  ]


@pytest.mark.parametrize('devices', [1, 2])
def test_at_once_is_the_same_to_rounding(alone, tmp_path, capsys, devices):
  _, config = parse(['main', *BOTH, f'--config.train.devices={devices}'])
  started = time.monotonic()
  result = train_seeds(config, tmp_path, at_once=True)
  # Each seed has its share of the time of both: their sum is no longer than all took.
  assert result['wall_time_s'] <= time.monotonic() - started + 0.1  # Rounded.
  assert result['seeds'] == list(SEEDS)
  assert 'seeds 3, 4 at once' in capsys.readouterr().out.splitlines()
  for seed in SEEDS:
    own, expected = (folder / f'seed_{seed}' for folder in (tmp_path, alone))
    state, wanted = saved_state(own), saved_state(expected)
    chex.assert_trees_all_close(state.params, wanted.params, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(state.batch_stats, wanted.batch_stats, rtol=1e-5, atol=1e-5)
    # Gradients, where a rounding may move one activation of a batch over the kink of its ReLU.
    chex.assert_trees_all_close(state.opt_state, wanted.opt_state, rtol=1e-5, atol=1e-4)
    lines, wanted = read_metrics(own), read_metrics(expected)
    assert [(line['step'], line['split']) for line in lines] == [(line['step'], line['split']) for line in wanted]
    assert [line['exit_1/loss'] for line in lines] == pytest.approx([line['exit_1/loss'] for line in wanted], rel=1e-4)
  before = contents(tmp_path)
  assert train_seeds(config, tmp_path, at_once=True)['seeds'] == list(SEEDS)  # Nothing is left to train.
  assert 'seeds 3, 4 at once' not in capsys.readouterr().out and contents(tmp_path) == before


@pytest.mark.parametrize('at_once', [False, True])
def test_what_cannot_teach_is_refused_before_a_folder_is_made(tmp_path, at_once):
  run = tmp_path / 'teacher'
  run.mkdir()
  _, config = parse(
    ['main', *BOTH, '--config.name=PN2-2d', '--config.loss.teacher=run', f'--config.loss.teacher_run={run}']
  )
  with pytest.raises(UserError, match='^loss.teacher_run must be the folder of a finished run, and .*/teacher has no '):
    train_seeds(config, tmp_path / 'seeds', at_once=at_once)
  assert not (tmp_path / 'seeds').exists()


def test_stopped_at_once_and_resumed(alone, tmp_path, monkeypatch):
  _, config = parse(['main', *BOTH])
  compiled, steps = SideBySide.compiled, []

  def stopping(*arguments):
    train_step = compiled(*arguments)

    def stopping_step(state, *rest):
      steps.append(state.step.tolist())
      os.kill(os.getpid(), signal.SIGTERM)
      return train_step(state, *rest)

    return stopping_step

  monkeypatch.setattr(SideBySide, 'compiled', stopping)
  assert train_seeds(config, tmp_path, at_once=True) is None
  assert train_seeds(config, tmp_path, at_once=True) is None
  # One seed resumes alone, and then they are no longer in lockstep.
  _, own = parse(['main', *SHORT, '--config.seed=4'])
  assert train_and_evaluate(own, tmp_path / 'seed_4')['steps'] == 3
  summary = train_seeds(config, tmp_path, at_once=True)
  assert summary['seeds'] == list(SEEDS) and steps == [[0, 0], [1, 1]]
  for seed in SEEDS:
    state, wanted = (saved_state(folder / f'seed_{seed}') for folder in (tmp_path, alone))
    chex.assert_trees_all_close(state.params, wanted.params, rtol=1e-5, atol=1e-5)


def test_default_folder_names_the_seeds():
  _, config = parse(['main', *BOTH])
  assert default_workdir(config) == 'runs/PN1-d-digits-s3to4'
