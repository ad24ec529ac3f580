"""Tests of `python -m paranet_jax.calibrate`: its flags, what it writes and prints, and every refusal."""

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from running import PROGRAMS, run_command

from paranet_jax.calibrate import calibration, latency, report
from paranet_jax.calibrate.__main__ import main
from paranet_jax.calibrate.choice import Ranked, choose
from paranet_jax.calibrate.figures import calibration_figures
from paranet_jax.calibrate.flags import Budget, parse, parse_budget
from paranet_jax.early.checkpoint_id import CheckpointId
from paranet_jax.early.exit_plan import EXITS, full_network_plan, load_plan, read_plan
from paranet_jax.early.path_costs import PathCosts
from paranet_jax.host.errors import UserError

HELD_OUT, TEST = 300, 360
READING = f'reading {HELD_OUT} held-out and {TEST} test images\n'


def calibrate(*arguments):
  """The command with these arguments, in this process."""
  return run_command(main, *arguments)


def refused(*arguments, started=False):
  """The one line in which these arguments are refused; where it has started, what it reads is said before."""
  code, out, err = calibrate(*arguments)
  assert (code, out) == (2, READING if started else '') and err.startswith('error: ') and err.count('\n') == 1, (
    code,
    out,
    err,
  )
  return err[len('error: ') : -1]


@pytest.fixture(scope='module', autouse=True)
def _compiled_once():
  """Keeps what every calibration of the one run would compute again."""
  restore, logits, kept = calibration.restore_checkpoint, calibration.split_logits, {}

  def restore_once(config, workdir, step, devices):
    key = workdir, step
    if key not in kept:
      kept[key] = restore(config, workdir, step, devices)
    return kept[key]

  def logits_once(model, variables, exits, preprocessing, split, batch_size):
    key = id(variables['params']), len(split)
    if key not in kept:
      kept[key] = variables, logits(model, variables, exits, preprocessing, split, batch_size)
    return kept[key][1]

  with pytest.MonkeyPatch.context() as patch:
    PROGRAMS.install(patch)
    patch.setattr(calibration, 'restore_checkpoint', restore_once)
    patch.setattr(calibration, 'split_logits', logits_once)
    yield


@pytest.fixture(scope='module')
def workdir(finished_run, tmp_path_factory):
  """A finished run to write into; its first exit is not usable."""
  return shutil.copytree(finished_run, tmp_path_factory.mktemp('calibrate') / 'run')


@pytest.fixture(scope='module')
def logits(workdir):
  """Of the usable exits, on the held-out and on the test images, and their labels, without our batches."""
  restored = calibration.restore_checkpoint(calibration.restore_config(workdir), workdir, None, jax.local_devices()[:1])
  data, found = restored.task.dataset, {}
  forward = jax.jit(lambda images: restored.task.model.apply(restored.variables, images))
  for name, split in (('held_out', data.held_out), ('test', data.test)):
    images = (split.images / 255.0 - np.array(data.mean)) / np.array(data.std)
    found[name] = np.stack(forward(images.astype(np.float32))[1:]).astype(np.float64), split.labels
  return found


def probabilities(logits, temperature):
  exponentials = np.exp(logits / temperature - (logits / temperature).max(-1, keepdims=True))
  return exponentials / exponentials.sum(-1, keepdims=True)


def walked(plan, logits, labels):
  """Cost and accuracy of a plan, one image after the other; usable exits are told apart by their place."""
  cost = right = 0
  for image in range(len(labels)):
    for place in range(len(plan.exits)):
      row = probabilities(logits[place, image], plan.temperatures[place])
      threshold = plan.thresholds[place]
      if threshold is not None and row.max() >= threshold:
        break
    cost += plan.macs[place]
    right += int(row.argmax() == labels[image])
  return cost / len(labels), right / len(labels)


@pytest.mark.parametrize(
  ('text', 'budget'),
  [
    ('30M', (30e6, 'macs')),
    ('30m', (30e6, 'macs')),
    ('30e6', (30e6, 'macs')),
    ('30000000', (30e6, 'macs')),
    ('0.5G', (5e8, 'macs')),
    ('1.5k', (1500.0, 'macs')),
    ('2.5ms', (2.5, 'ms')),
    ('.5 MS', (0.5, 'ms')),
    ('2.5e-1ms', (0.25, 'ms')),
    ('32.631277M', (32_631_277.0, 'macs')),  # 32.631277 times 10^6 is 32,631,276.999999996.
  ],
)
def test_budgets(text, budget):
  assert parse_budget(text) == Budget(*budget)


@pytest.mark.parametrize(
  'text', ['', '0', '-3M', '3 tons', '2.5s', 'inf', 'nan', '1e999', '1e9999M', '1e-9999M', '1e99999', 'M', '3MM']
)
def test_what_is_no_budget(text):
  with pytest.raises(UserError) as error:
    parse_budget(text)
  expected = f"budget must be multiply-adds such as 30M or a time such as 2.5ms, found '{text}'; set --budget"
  assert str(error.value) == expected


def test_defaults():
  request = parse(['--workdir=runs/a', '--budget=30M'])
  assert request.workdir == Path('runs/a').absolute()
  assert (request.score, request.policy.name, request.options) == ('max_prob', 'optimal', {})
  assert (request.step, request.batch_size, request.curves) == (None, None, False)
  risk = parse(['--workdir=a', '--risk=0.02'])
  assert risk.target == {'risk': 0.02, 'guarantee': 'ltt', 'delta': 0.1, 'loss': 'gap'}
  assert parse(['--workdir=a', '--risk=0.02', '--policy=ltt']) == parse(
    ['--workdir=a', '--risk=0.02', '--guarantee=ltt']
  )
  assert parse(['--workdir=a', '--budget=1ms']).batch_size == 1
  assert parse(['--workdir=a', '--budget=1ms', '--batch-size=32']).batch_size == 32


TARGETS = '--budget=30M (multiply-adds), --budget=2.5ms, --risk=0.02 or --threshold=0.9'


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], f'expected one target, found none; set {TARGETS}'),
    (['--budget=3M', '--risk=0.1'], 'expected one target, found --budget and --risk; leave out all but one'),
    (['--risk=0.1', '--threshold=0.9'], 'expected one target, found --risk and --threshold; leave out all but one'),
    (
      ['--budget=3M', '--risk=0.1', '--threshold=1'],
      'expected one target, found --budget and --risk and --threshold; leave out all but one',
    ),
    (['--risk=0'], 'risk must be between 0 and 1, found 0; set --risk'),
    (['--risk=1'], 'risk must be between 0 and 1, found 1; set --risk'),
    (['--risk=nan'], 'risk must be between 0 and 1, found nan; set --risk'),
    (['--risk=small'], 'risk must be between 0 and 1, found small; set --risk'),
    (['--risk=0.1', '--delta=0'], 'delta must be between 0 and 1, found 0; set --delta'),
    (['--risk=0.1', '--delta=1.5'], 'delta must be between 0 and 1, found 1.5; set --delta'),
    (['--threshold=1.1'], 'threshold must be from 0 to 1, found 1.1; set --threshold'),
    (['--threshold=nan'], 'threshold must be from 0 to 1, found nan; set --threshold'),
    (
      ['--threshold=0.9', '--score=patience'],
      'threshold must be a whole number from 1 to 1,000,000,000, found 0.9; set --threshold',
    ),
    (
      ['--threshold=1', '--score=energy'],
      "unknown score 'energy', expected one of max_prob, entropy, margin, patience; set --score",
    ),
    (['--budget=3M', '--policy=best'], "unknown policy 'best', expected one of optimal, quota, shared; set --policy"),
    (['--risk=0.1', '--guarantee=pac'], "unknown guarantee 'pac', expected one of ltt, crc; set --guarantee"),
    (['--risk=0.1', '--risk-loss=mse'], 'risk-loss must be one of gap, disagreement, found mse; set --risk-loss'),
    (['--budget=3M', '--guarantee=ltt'], '--guarantee belongs to risk control; set --risk, or leave it out'),
    (
      ['--risk=0.1', '--guarantee=ltt', '--policy=ltt'],
      '--guarantee is the --policy of --risk, found both; leave one of the two out',
    ),
    (
      ['--budget=1ms', '--batch-size=0'],
      'batch-size must be a whole number from 1 to 1,000,000,000, found 0; set --batch-size',
    ),
    (['--threshold=1', '--step=last'], 'step must be a whole number from 0 to 1,000,000,000, found last; set --step'),
    (
      ['--threshold=1', '--policy=quota'],
      '--policy=quota belongs to --budget, found --threshold; leave one of the two out',
    ),
    (['--threshold=1', '--delta=0.1'], '--delta belongs to --policy=ltt, found shared; leave out --delta'),
    (
      ['--budget=3M', '--risk-loss=gap'],
      '--risk-loss belongs to --policy=ltt or crc, found optimal; leave out --risk-loss',
    ),
    (
      ['--risk=0.1', '--guarantee=crc', '--delta=0.1'],
      '--delta belongs to --policy=ltt, found crc; leave out --delta',
    ),
    (
      ['--risk=0.1', '--score=patience'],
      '--risk needs a score that ranks the images, found --score=patience; leave one of the two out',
    ),
    (
      ['--budget=3M', '--policy=quota', '--score=patience'],
      '--policy=quota with --budget needs a score of max_prob or entropy or margin, found patience; set --score',
    ),
    (['--budget'], 'argument --budget: expected one argument; see --help'),
    (['--budgt=3M'], 'unrecognized arguments: --budgt=3M; see --help'),
  ],
)
def test_flags_that_are_refused(tmp_path, arguments, message):
  assert refused(f'--workdir={tmp_path / "none"}', *arguments) == message


def test_flags_without_a_workdir():
  message = 'the following arguments are required: --workdir; see --help'
  assert refused('--threshold=0.9') == message


def test_a_folder_that_is_no_run(tmp_path):
  message = f'expected a run with a config.json in {tmp_path}, found none; set --workdir'
  assert refused(f'--workdir={tmp_path}', '--threshold=0.9') == message


def test_a_run_without_held_out_images(tmp_path, workdir):
  config = json.loads((workdir / 'config.json').read_text())
  config['data']['held_out'] = 0
  (tmp_path / 'config.json').write_text(json.dumps(config))
  assert refused(f'--workdir={tmp_path}', '--threshold=0.9') == (
    f'expected a run with held-out images, and {tmp_path} was trained on all of its images; '
    'train a new one with --config.data.held_out=N (a tenth of them is usual) and another --workdir'
  )
  assert [path.name for path in tmp_path.iterdir()] == ['config.json']


def test_a_folder_that_cannot_be_written(workdir, monkeypatch):
  monkeypatch.setattr(os, 'access', lambda path, mode: path != workdir)
  message = f'workdir {workdir} must be writable, and is not; set --workdir'
  assert refused(f'--workdir={workdir}', '--threshold=0.9') == message


def test_figures_that_could_not_be_written(workdir):
  (workdir / 'exits').write_text('')
  message = f'workdir {workdir}/exits must be a folder, and there is a file; set --workdir'
  assert refused(f'--workdir={workdir}', '--threshold=0.9', '--curves') == message
  (workdir / 'exits').unlink()


def test_a_home_that_nobody_has():
  message = f'expected a run with a config.json in {Path.cwd()}/~nobody-here/run, found none; set --workdir'
  assert refused('--workdir=~nobody-here/run', '--threshold=0.9') == message


def test_logits_that_are_not_finite(workdir, logits, monkeypatch):
  given = logits['held_out'][0].astype(np.float32)
  given[1, 7, 3] = np.nan
  monkeypatch.setattr(calibration, 'split_logits', lambda *_: given)
  (workdir / EXITS).unlink(missing_ok=True)
  assert refused(f'--workdir={workdir}', '--threshold=0.9', started=True) == (
    'expected finite logits, and those of exits [3] are not at step 60; set --step to an earlier checkpoint, '
    'or train a new run'
  )
  assert not (workdir / EXITS).exists()


def test_a_step_that_is_not_there(workdir):
  message = f'no checkpoint of step 3 in {workdir}/checkpoints, found [50, 60]; set --step'
  assert refused(f'--workdir={workdir}', '--threshold=0.9', '--step=3') == message


def millions(count):
  return f'{count / 1e6:.10g}M'


@pytest.mark.parametrize('factor', [0.999, 1.001])
def test_a_budget_out_of_range(workdir, factor):
  alone = [exit_cost['macs_alone'] for exit_cost in json.loads((workdir / 'summary.json').read_text())['exits']]
  budget = round(alone[1] * factor if factor < 1 else alone[2] * factor)
  assert refused(f'--workdir={workdir}', f'--budget={budget}') == (
    f'budget must be from {millions(alone[1])} (exit 2 alone) to {millions(alone[2])} (exit 3 alone), '
    f'found {millions(budget)}; set --budget'
  )


@pytest.mark.parametrize('place', [1, 2])
def test_the_ends_of_the_range_can_be_set_as_they_are_shown(workdir, place):
  alone = [exit_cost['macs_alone'] for exit_cost in json.loads((workdir / 'summary.json').read_text())['exits']]
  assert calibrate(f'--workdir={workdir}', f'--budget={millions(alone[place])}').code == 0
  plan = read_plan(workdir)
  assert plan.expected['cost_macs'] <= alone[place] and sum(plan.expected['shares']) == 1


@pytest.mark.parametrize('policy', ['optimal', 'quota'])
def test_a_budget(workdir, logits, policy):
  alone = [exit_cost['macs_alone'] for exit_cost in json.loads((workdir / 'summary.json').read_text())['exits']][1:]
  budget = sum(alone) // 2
  result = calibrate(f'--workdir={workdir}', f'--budget={budget}', f'--policy={policy}')
  assert (result.code, result.err) == (0, ''), result
  plan = load_plan(workdir, read_plan(workdir).checkpoint, (2, 3))
  assert (plan.name, plan.dataset, plan.step, plan.exits) == ('PN3-x3d', 'digits', 60, (2, 3))
  assert plan.target == {'budget': budget, 'unit': 'macs'} and plan.policy == policy
  assert plan.macs_alone == tuple(alone) and plan.ms is None and plan.latency is None
  assert plan.splits == {'temperature': HELD_OUT, 'thresholds': HELD_OUT, 'test': TEST}
  assert plan.provenance['command'].startswith('python -m paranet_jax.calibrate --workdir=')
  assert {'versions', 'device', 'cpu', 'date'} < plan.provenance.keys()
  for split, measured in (('held_out', plan.expected), ('test', plan.test)):
    cost, accuracy = walked(plan, *logits[split])
    assert measured['cost_macs'] == pytest.approx(cost) and measured['accuracy'] == pytest.approx(accuracy)
  # The optimum may spend less, where the last exit does harm.
  least = budget * 0.99 - max(plan.macs) / HELD_OUT if policy == 'quota' else 0
  assert least <= plan.expected['cost_macs'] <= budget


def test_one_threshold(workdir, logits):
  assert calibrate(f'--workdir={workdir}', '--threshold=0.5', '--score=max_prob').code == 0
  plan = read_plan(workdir)
  assert plan.thresholds == (0.5, 0.0) and plan.policy == 'shared' and plan.target == {'threshold': 0.5}
  assert plan.confidence_thresholds[0] == pytest.approx(math.log(2))
  labels = logits['test'][1]
  sure = probabilities(logits['test'][0][0], plan.temperatures[0])
  leaves = sure.max(-1) >= 0.5
  assert 0 < leaves.sum() < TEST
  first, last = plan.test['exits']
  assert first['images'] == leaves.sum() and last['images'] == TEST - leaves.sum()
  assert first['accuracy'] == pytest.approx(np.mean((sure.argmax(-1) == labels)[leaves]))
  assert first['confidence'] == pytest.approx(sure.max(-1)[leaves].mean())
  for whose, chosen in (('all', np.ones(TEST, bool)), ('leaving', leaves)):
    before, after = first['calibration'][whose]['nll']
    for temperature, found in ((1, before), (plan.temperatures[0], after)):
      of_label = probabilities(logits['test'][0][0], temperature)[np.arange(TEST), labels]
      assert found == pytest.approx(-np.log(of_label[chosen]).mean(), rel=1e-4)


def test_a_threshold_that_nobody_reaches_skips_the_exit(workdir):
  assert calibrate(f'--workdir={workdir}', '--threshold=1').code == 0
  plan = read_plan(workdir)
  assert plan.thresholds == (None, 0.0) and plan.visited == (3,) and plan.macs == (None, plan.macs_alone[1])


def test_patience_runs_every_exit(workdir, logits):
  assert calibrate(f'--workdir={workdir}', '--threshold=2', '--score=patience').code == 0
  plan = read_plan(workdir)
  assert plan.thresholds == (2.0, 0.0) and plan.visited == (2, 3)
  assert plan.test['shares'] == [0.0, 1.0]  # Two equal answers are there at the second usable exit at the earliest.
  assert plan.test['cost_macs'] == plan.macs[1]


@pytest.mark.parametrize(
  ('flags', 'target'),
  [
    (['--delta=0.2'], {'delta': 0.2, 'guarantee': 'ltt', 'loss': 'gap'}),
    (['--guarantee=crc', '--risk-loss=disagreement'], {'guarantee': 'crc', 'loss': 'disagreement'}),
  ],
)
def test_risk_control(workdir, monkeypatch, flags, target):
  seen, fit, rank = {}, calibration.fit_temperature, calibration.rank
  monkeypatch.setattr(calibration, 'fit_temperature', lambda *split: seen.setdefault('fit', split) and fit(*split))
  monkeypatch.setattr(calibration, 'rank', lambda *split: seen.setdefault('rank', split) and rank(*split))
  assert calibrate(f'--workdir={workdir}', '--risk=0.5', *flags).code == 0
  plan = read_plan(workdir)
  assert plan.target == {'risk': 0.5} | target and plan.policy == target['guarantee']
  assert plan.splits == {'temperature': HELD_OUT // 2, 'thresholds': HELD_OUT // 2, 'test': TEST}
  assert plan.expected['images'] == HELD_OUT // 2 and plan.expected[target['loss']] <= 0.5
  # The temperatures and the risk see different images of the same classes.
  (fitted, fitted_labels), (tested, tested_labels, *_) = seen['fit'], seen['rank']
  together = {row.tobytes() for row in fitted} | {row.tobytes() for row in tested[0]}
  assert len(together) == HELD_OUT
  assert np.abs(np.bincount(fitted_labels) - np.bincount(tested_labels)).max() <= 1


@pytest.mark.parametrize(('flags', 'needed'), [([], 230), (['--guarantee=crc'], None)])
def test_risk_control_that_cannot_qualify_keeps_the_full_network(workdir, flags, needed):
  risk = '0.01' if needed else '0.005'
  needed = needed or 199
  assert refused(f'--workdir={workdir}', f'--risk={risk}', *flags, started=True) == (
    f'risk {risk} cannot be promised from 150 held-out images: it would need {needed}; '
    'exits.json keeps the full network; raise --risk, or hold out more images in a new run'
  )
  plan = read_plan(workdir)
  assert plan.thresholds == (None, 0.0) and plan.visited == (3,)


def test_risk_control_whose_surest_image_loses():
  correct = np.repeat([[False], [True]], 10, axis=1)
  ranked = Ranked(np.array([np.arange(10.0), np.zeros(10)]), correct.astype(int), correct)
  request = parse(['--workdir=a', '--risk=0.25', '--delta=0.1'])
  choice = choose(request, ranked, PathCosts(2, lambda before, index: 1.0))
  assert choice.thresholds.tolist() == [np.inf, -np.inf] and request.policy.name == 'ltt'
  # 0.75^9 <= 0.1: nine images without a loss would do, of ten.
  assert choice.problem == (
    'risk 0.25 cannot be promised from 10 held-out images: 9 would do if the most confident images lost nothing, '
    'and they do; exits.json keeps the full network; raise --risk, or hold out more images in a new run'
  )


def test_one_exit_keeps_every_risk():
  correct = np.zeros((1, 10), bool)
  ranked = Ranked(np.zeros((1, 10)), np.zeros((1, 10), int), correct)
  for flags in (['--risk=0.25'], ['--risk=0.01', '--guarantee=crc']):
    choice = choose(parse(['--workdir=a', *flags]), ranked, PathCosts(1, lambda before, index: 1.0))
    assert choice.thresholds.tolist() == [-np.inf] and choice.problem is None


@pytest.mark.parametrize('labels', [[0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3], [1, 1]])
def test_halves_of_few_images(labels):
  everybody = calibration.Outputs(np.arange(len(labels), dtype=np.float32).reshape(1, -1, 1), np.array(labels))
  fitted, tested = calibration._halves(everybody)
  assert len(tested.labels) == len(labels) // 2
  assert sorted([*fitted.logits.ravel(), *tested.logits.ravel()]) == list(range(len(labels)))
  if labels == [0, 0, 0, 1, 1, 1]:
    assert set(fitted.labels) == set(tested.labels) == {0, 1}


def test_risk_control_of_one_held_out_image(tmp_path, workdir):
  text = (workdir / 'config.json').read_text()
  (tmp_path / 'config.json').write_text(text.replace(f'"held_out": {HELD_OUT}', '"held_out": 1'))
  assert refused(f'--workdir={tmp_path}', '--risk=0.1') == (
    'risk control needs 2 held-out images or more, to fit the temperatures on some and to test on others, found 1; '
    'train a new run with a larger --config.data.held_out and another --workdir'
  )


@pytest.mark.parametrize(
  ('exit_accuracy', 'accuracy', 'costs', 'best'),
  [
    ([0.5, 0.75, 0.75], 0.75, (1, 2, 3), 2),
    ([0.5, 0.75, 0.75], 0.75, (1, 3, 2), 3),
    ([0.5, 0.75, 0.75], 0.5, (1, 2, 3), 1),
    ([0.5, 0.75, 0.75], 0.8, (1, 2, 3), None),
  ],
)
def test_the_single_best_exit(exit_accuracy, accuracy, costs, best):
  plan = full_network_plan(CheckpointId('', '', 0, ''), (1, 2, 3), (1, 2, 3))
  measured = {'exit_accuracy': exit_accuracy, 'accuracy': accuracy}
  assert calibration._single_best(plan, measured, PathCosts(3, lambda _, index: costs[index])) == best


def test_what_is_printed(workdir):
  (workdir / EXITS).unlink(missing_ok=True)
  first = calibrate(f'--workdir={workdir}', '--threshold=0.5')
  again = calibrate(f'--workdir={workdir}', '--threshold=0.5')
  assert max(map(len, first.out.splitlines()[:-1])) <= 100
  assert first.out.splitlines()[-1] == f'exits: {workdir / EXITS}'
  assert again.out.splitlines()[-1] == f'exits: {workdir / EXITS}, in place of an earlier one'
  plan, lines = read_plan(workdir), first.out.splitlines()
  assert first.out.startswith(READING)
  assert lines[1] == 'PN3-x3d on digits, step 60: one threshold for all exits, 0.5'
  (total,) = (line.split() for line in lines if line.strip().startswith('all') and '100.0' in line)
  assert total[1:4] == [str(TEST), '100.0', f'{100 * plan.test["accuracy"]:.2f}']
  (speed_up,) = (line.split() for line in lines if 'speed-up against exit 3 alone' in line)
  assert speed_up[-2] == f'{plan.macs_alone[1] / plan.test["cost_macs"]:.2f}'
  assert speed_up[-4] == f'{plan.macs_alone[1] / plan.expected["cost_macs"]:.2f}'


@pytest.mark.parametrize('batch_size', [1, 4])
def test_milliseconds(workdir, monkeypatch, batch_size):
  """The first usable exit is said to take 1 ms of a batch, the second 3 ms alone and 2 ms after the first."""
  ran = []

  def pretended(function, runs):
    _, (_, carry), score = function.args
    return 1e-3 if score else 2e-3 if carry else 3e-3

  class Runtime:
    def __init__(self, model, variables, plan, image_shape, mean, std):
      assert plan.visited == (2, 3) and len(mean) == len(std) == 3

    def warm_up(self, batches):
      ran.append(batches)

    def predict(self, images):
      ran.append(len(images))

    def predict_one(self, image):
      ran.append(image.ndim)

  monkeypatch.setattr(latency, 'median_seconds', pretended)
  monkeypatch.setattr(calibration, 'EarlyExit', Runtime)
  budget = 2 / batch_size
  result = calibrate(f'--workdir={workdir}', f'--budget={budget}ms', '--policy=quota', f'--batch-size={batch_size}')
  assert (result.code, result.err) == (0, ''), result
  plan = read_plan(workdir)
  assert plan.target == {'budget': budget, 'unit': 'ms', 'batch_size': batch_size}
  assert plan.ms == (1 / batch_size, 3 / batch_size)
  assert plan.latency['batch_sizes'][0]['ms_alone'] == [1 / batch_size, 3 / batch_size]
  assert budget * 0.99 <= plan.expected['cost_ms'] <= budget
  assert np.dot(plan.test['shares'], plan.ms) == pytest.approx(plan.test['cost_ms'])
  batches = [3] * HELD_OUT if batch_size == 1 else [4] * (HELD_OUT // 4)
  assert ran == [batch_size > 1, *batches[:1], *batches] and plan.expected['measured_ms'] > 0
  assert 'as measured with the runtime' in result.out and max(map(len, result.out.splitlines()[:-1])) <= 100


def test_a_time_out_of_range(workdir, monkeypatch):
  monkeypatch.setattr(latency, 'median_seconds', lambda function, runs: 1e-3 if function.args[2] else 3e-3)
  assert refused(f'--workdir={workdir}', '--budget=0.5ms') == (
    'budget must be from 1ms (exit 2 alone) to 3ms (exit 3 alone), found 0.5ms; set --budget'
  )


def test_a_first_exit_that_takes_longer_than_the_last(workdir, monkeypatch):
  monkeypatch.setattr(latency, 'median_seconds', lambda function, runs: 3e-3 if function.args[2] else 2e-3)
  assert refused(f'--workdir={workdir}', '--budget=2.5ms') == (
    'no budget is within reach: exit 2 alone takes 3ms, more than exit 3 alone with 2ms; set --batch-size, or a '
    '--budget of multiply-adds'
  )


@pytest.mark.parametrize(('device', 'machine'), [('cpu', 'a processor'), ('NVIDIA H100', 'NVIDIA H100')])
def test_the_figures_name_what_was_measured_on(device, machine):
  assert calibration_figures._machine({'device': device, 'cpu': 'a processor'}) == machine


@pytest.mark.parametrize(
  ('threshold', 'shown'),
  [(0.9, 'max_prob 0.9000'), (0.9999, 'max_prob 0.9999'), (1 - 2.5e-7, 'max_prob 1 - 2.5e-07'), (0.0, 'everybody')],
)
def test_a_threshold_is_told_from_1(threshold, shown):
  plan = full_network_plan(CheckpointId('', '', 0, ''), (1, 2), (1, 2))
  plan = dataclasses.replace(plan, thresholds=(threshold, 0.0), confidence_thresholds=(-math.log1p(-threshold), 0.0))
  assert report._threshold(plan, 0) == shown


def test_standard_output_without_our_letters(workdir):
  out = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
  with contextlib.redirect_stdout(out):
    assert main([f'--workdir={workdir}', '--threshold=1']) == 0
  out.flush()
  assert b'\\u2014' in out.buffer.getvalue()


def test_curves_are_drawn_into_the_run(workdir, monkeypatch):
  drawn = []
  monkeypatch.setattr(calibration_figures, 'draw_figures', lambda *given: drawn.append(given) or [workdir / 'a.png'])
  result = calibrate(f'--workdir={workdir}', '--threshold=0.5', '--curves')
  ((folder, data),) = drawn
  assert folder == workdir / 'exits' and data.run == 'PN3-x3d' and data.unit == 'macs'
  assert data.images == {'held_out': HELD_OUT, 'test': TEST}
  assert result.out.splitlines()[-1] == f'figure: {workdir / "a.png"}'
