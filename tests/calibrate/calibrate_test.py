"""`python -m paranet_jax.calibrate`: what it writes and prints, and what it rejects."""

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import types

import jax
import numpy as np
import pytest
from early_samples import samples_of, softmax
from running import PROGRAMS, run_command

from paranet_jax.base_config import base_config
from paranet_jax.calibrate import calibration, figures, latency, measures, summary_text
from paranet_jax.calibrate.__main__ import main
from paranet_jax.calibrate.flags import parse
from paranet_jax.early.exit_plan import EXITS, CheckpointId, full_network_plan, load_plan, read_plan
from paranet_jax.early.path_costs import PathCosts
from paranet_jax.host.errors import UserError
from paranet_jax.targets import make_phases, parse_name

HELD_OUT, TEST = 300, 360
COSTS = PathCosts(2, lambda before, index: 1.0)
READING = f'reading {HELD_OUT} held-out and {TEST} test images\n'


def calibrate(*arguments):
  """Runs the command in this process; it must succeed."""
  result = run_command(main, *arguments)
  assert (result.code, result.err) == (0, ''), result
  return result.out


def rejected(*arguments, started=False):
  """The line with which the command rejects these arguments, possibly after it has started to read images."""
  code, out, err = run_command(main, *arguments)
  assert (code, out) == (2, READING if started else ''), (code, out, err)
  assert err.startswith('error: ') and err.count('\n') == 1, err
  return err[len('error: ') : -1]


def once(function, key):
  """The function, which keeps its results by `key` of the arguments."""
  kept = {}

  def call(*arguments):
    place = key(*arguments)
    if place not in kept:
      kept[place] = function(*arguments), arguments  # The arguments stay alive, so that their ids stay unique.
    return kept[place][0]

  return call


@pytest.fixture(scope='module', autouse=True)
def _computed_once():
  """Keeps what every calibration of the one run would compute again."""
  with pytest.MonkeyPatch.context() as patch:
    PROGRAMS.install(patch)
    for name, key in {
      'read_task': lambda config, workdir, step, *_: (workdir, step),
      'split_logits': lambda model, variables, exits, preprocessing, split, size: (id(variables['params']), len(split)),
      'mac_costs': lambda model, image_shape, exits: (id(model), exits),
    }.items():
      patch.setattr(calibration, name, once(getattr(calibration, name), key))
    patch.setattr(calibration, 'find_energy', lambda gpu: 'no counter')  # Whatever this machine tells.
    yield


@pytest.fixture(scope='module')
def workdir(finished_run, tmp_path_factory):
  """A finished run to write into; its first exit is not usable."""
  return shutil.copytree(finished_run, tmp_path_factory.mktemp('calibrate') / 'run')


@pytest.fixture(scope='module')
def alone(workdir):
  """Multiply-adds of each usable exit alone."""
  return [exit_['macs_alone'] for exit_ in json.loads((workdir / 'summary.json').read_text())['exits']][1:]


@pytest.fixture(scope='module')
def logits(workdir):
  """By split, the logits of the usable exits and the labels, without the package's preprocessing and batches."""
  restored = calibration.read_task(calibration.restore_config(workdir), workdir, None, jax.local_devices()[:1])
  data, found = restored.task.dataset, {}
  forward = jax.jit(lambda images: restored.task.model.apply(restored.variables, images))
  for name, split in (('held_out', data.held_out), ('test', data.test)):
    images = (split.images / 255.0 - np.array(data.mean)) / np.array(data.std)
    found[name] = np.stack(forward(images.astype(np.float32))[1:]).astype(np.float64), split.labels
  return found


def probabilities(logits, temperature):
  return np.stack([softmax(row, temperature) for row in logits])


def walked(plan, logits, labels):
  """Mean cost and accuracy of a plan, one image after the other."""
  cost = right = 0
  for image in range(len(labels)):
    for place in range(len(plan.exits)):
      row = softmax(logits[place, image], plan.temperatures[place])
      threshold = plan.thresholds[place]
      if threshold is not None and row.max() >= threshold:
        break
    cost += plan.macs[place]
    right += int(row.argmax() == labels[image])
  return cost / len(labels), right / len(labels)


def changed(workdir, folder, held_out):
  """The configuration of the run, with another number of held-out images."""
  config = json.loads((workdir / 'config.json').read_text())
  config['data']['held_out'] = held_out
  (folder / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize(
  ('held_out', 'flag', 'message'),
  [
    (
      0,
      '--threshold=0.9',
      'expected a run with held-out images, and {} was trained on all of its images; '
      'train a new one with --config.data.held_out=N (a tenth of them is usual) and another --workdir',
    ),
    (
      1,
      '--risk=0.1',
      'risk control needs 2 held-out images or more, some for the temperatures and some for the thresholds, found 1; '
      'train a new run with a larger --config.data.held_out and another --workdir, or set --temperature=none',
    ),
    (
      3,
      '--reject=0.1',
      '--reject and --coverage need 4 held-out images or more, half of them for what they promise, found 3; '
      'train a new run with a larger --config.data.held_out and another --workdir',
    ),
  ],
)
def test_too_few_held_out_images(tmp_path, workdir, held_out, flag, message):
  changed(workdir, tmp_path, held_out)
  flags = [flag] if 'risk' in flag else ['--threshold=0.9', flag]
  assert rejected(f'--workdir={tmp_path}', *flags) == message.format(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ['config.json']


def test_a_folder_without_a_run():
  message = 'expected a run with a config.json in /no/run, found none; set --workdir'
  assert rejected('--workdir=/no/run', '--threshold=0.9') == message


def test_a_run_that_cannot_be_read_or_written(workdir, monkeypatch):
  flags = f'--workdir={workdir}', '--threshold=0.9'
  message = f'no checkpoint of step 3 in {workdir}/checkpoints, found [47, 140]; set --step'
  assert rejected(*flags, '--step=3') == message
  (workdir / 'exits').write_text('')
  message = f'workdir {workdir}/exits must be a folder, found a file; set --workdir'
  assert rejected(*flags, '--curves') == message
  (workdir / 'exits').unlink()
  monkeypatch.setattr(os, 'access', lambda path, mode: path != workdir)
  assert rejected(*flags) == f'workdir {workdir} is not writable; set --workdir'


def test_logits_that_are_not_finite(workdir, logits, monkeypatch):
  given = logits['held_out'][0].astype(np.float32)
  given[1, 7, 3] = np.nan
  monkeypatch.setattr(calibration, 'split_logits', lambda *_: given)
  (workdir / EXITS).unlink(missing_ok=True)
  assert rejected(f'--workdir={workdir}', '--threshold=0.9', started=True) == (
    'expected finite logits, found others at exits [3] at step 140; set --step to an earlier checkpoint, '
    'or train a new run'
  )
  assert not (workdir / EXITS).exists()


def millions(count):
  return f'{count / 1e6:.10g}M'


def test_the_range_of_budgets(workdir, alone):
  for budget in (round(alone[0] * 0.999), round(alone[1] * 1.001)):
    assert rejected(f'--workdir={workdir}', f'--budget={budget}') == (
      f'budget must be from {millions(alone[0])} (exit 2 alone) to {millions(alone[1])} (exit 3 alone), '
      f'found {millions(budget)}; set --budget'
    )
  for budget in alone:  # The ends of the range, as printed.
    calibrate(f'--workdir={workdir}', f'--budget={millions(budget)}')
    plan = read_plan(workdir)
    assert plan.expected['cost_macs'] <= budget and sum(plan.expected['shares']) == 1


@pytest.mark.parametrize(
  ('unit', 'accepted', 'refused'),
  [('macs', (20e6, 30e6), (20e6 - 1, 30e6 + 1)), ('ms', (1.999, 3.0029), (1.997, 3.004))],
)
def test_measured_ends_of_the_range_are_rounded(unit, accepted, refused):
  alone = {'macs': (20e6, 25e6, 30e6), 'ms': (2.0, 2.5, 3.0)}[unit]
  costs = types.SimpleNamespace(alone=lambda: np.array(alone))
  for values, allowed in (
    (accepted, contextlib.nullcontext()),
    (refused, pytest.raises(UserError, match='budget must be from')),
  ):
    for value in values:
      with allowed:
        calibration.check_budget(types.SimpleNamespace(target={'budget': value, 'unit': unit}), costs, (1, 2, 3))


@pytest.mark.parametrize('policy', ['optimal', 'quota'])
def test_a_budget(workdir, alone, logits, policy):
  budget = sum(alone) // 2
  calibrate(f'--workdir={workdir}', f'--budget={budget}', f'--policy={policy}')
  plan = load_plan(workdir, read_plan(workdir).checkpoint, (2, 3))
  assert (plan.name, plan.dataset, plan.step, plan.exits) == ('PN3-x3d', 'digits', 140, (2, 3))
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
  calibrate(f'--workdir={workdir}', '--threshold=0.5', '--score=max_prob')
  plan = read_plan(workdir)
  assert plan.thresholds == (0.5, 0.0) and plan.policy == 'shared' and plan.target == {'threshold': 0.5}
  assert plan.confidence_thresholds[0] == pytest.approx(math.log(2))
  labels = logits['test'][1]
  found = probabilities(logits['test'][0][0], plan.temperatures[0])
  exiting = found.max(-1) >= 0.5
  assert 0 < exiting.sum() < TEST
  first, last = plan.test['exits']
  assert first['images'] == exiting.sum() and last['images'] == TEST - exiting.sum()
  assert first['accuracy'] == pytest.approx(np.mean((found.argmax(-1) == labels)[exiting]))
  assert first['confidence'] == pytest.approx(found.max(-1)[exiting].mean())
  for whose, chosen in (('all', np.ones(TEST, bool)), ('leaving', exiting)):
    before, after = first['calibration'][whose]['nll']
    for temperature, measured in ((1, before), (plan.temperatures[0], after)):
      of_label = probabilities(logits['test'][0][0], temperature)[np.arange(TEST), labels]
      assert measured == pytest.approx(-np.log(of_label[chosen]).mean(), rel=1e-4)


def test_a_threshold_that_no_image_reaches_skips_the_exit(workdir):
  out = io.TextIOWrapper(io.BytesIO(), encoding='ascii')  # Standard output may not have the dash of the tables.
  with contextlib.redirect_stdout(out):
    assert main([f'--workdir={workdir}', '--threshold=1']) == 0
  out.flush()
  assert b'\\u2014' in out.buffer.getvalue()
  plan = read_plan(workdir)
  assert plan.thresholds == (None, 0.0) and plan.visited == (3,) and plan.macs == (None, plan.macs_alone[1])


def test_patience_runs_every_exit(workdir):
  calibrate(f'--workdir={workdir}', '--threshold=2', '--score=patience')
  plan = read_plan(workdir)
  assert plan.thresholds == (2.0, 0.0) and plan.visited == (2, 3)
  assert plan.test['shares'] == [0.0, 1.0]  # The second usable exit is the first with two equal answers.
  assert plan.test['cost_macs'] == plan.macs[1]


@pytest.mark.parametrize(
  ('flags', 'target'),
  [
    (['--delta=0.2'], {'delta': 0.2, 'guarantee': 'ltt', 'loss': 'gap'}),
    (['--guarantee=crc', '--risk-loss=disagreement'], {'guarantee': 'crc', 'loss': 'disagreement'}),
  ],
)
def test_risk_control(workdir, monkeypatch, flags, target):
  seen, fit, rank = {}, measures.fit_temperature, measures.rank
  monkeypatch.setattr(measures, 'fit_temperature', lambda *split: seen.setdefault('fit', split) and fit(*split))
  monkeypatch.setattr(measures, 'rank', lambda *split: seen.setdefault('rank', split) and rank(*split))
  calibrate(f'--workdir={workdir}', '--risk=0.5', *flags)
  plan = read_plan(workdir)
  assert plan.target == {'risk': 0.5} | target and plan.policy == target['guarantee']
  assert plan.splits == {'temperature': HELD_OUT // 2, 'thresholds': HELD_OUT // 2, 'test': TEST}
  assert plan.expected['images'] == HELD_OUT // 2 and plan.expected[target['loss']] <= 0.5
  # The temperatures and the thresholds see different images.
  (fitted, _), (tested, *_) = seen['fit'], seen['rank']
  together = {row.tobytes() for row in fitted} | {row.tobytes() for row in tested[0]}
  assert len(together) == HELD_OUT


@pytest.mark.parametrize(
  ('flags', 'keep_best', 'said'),
  [
    (['--step=140', '--risk=0.5'], 'nll', True),
    (['--step=140', '--threshold=0.5', '--reject=0.9'], 'nll', True),
    (['--step=140', '--threshold=0.5', '--coverage=0.5'], 'accuracy', True),
    (['--step=140', '--threshold=0.5'], 'nll', False),
    (['--step=140', '--risk=0.5'], 'none', False),
    (['--risk=0.5'], 'nll', False),
  ],
)
def test_a_promise_for_the_checkpoint_that_the_held_out_images_chose(workdir, monkeypatch, flags, keep_best, said):
  config = calibration.restore_config(workdir)
  config.checkpoint.keep_best = keep_best

  def read_task(*arguments, read=calibration.read_task):
    found = read(*arguments)
    return found._replace(task=dataclasses.replace(found.task, config=config))

  monkeypatch.setattr(calibration, 'read_task', read_task)
  line = (
    f'step 140 was the best on the held-out images, by checkpoint.keep_best={keep_best}, and they also test what is '
    'promised: it may be broken a little more often; leave out --step for a checkpoint that they did not choose\n'
  )
  assert (line in calibrate(f'--workdir={workdir}', *flags)) == said


def test_a_step_that_was_not_the_best(tmp_path, monkeypatch):
  lines = [{'step': step, 'split': 'held_out', 'exit_3/nll': nll} for step, nll in ((70, 0.5), (140, 0.6))]
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
  checkpoints = types.SimpleNamespace(steps=lambda: [70, 140])
  monkeypatch.setattr(calibration, 'Checkpoints', lambda _: contextlib.nullcontext(checkpoints))
  config = base_config()
  config.checkpoint.keep_best = 'nll'
  phases = make_phases('joint', parse_name('PN3-x3d').targets, 0, 140)
  task = types.SimpleNamespace(config=config, phases=phases, steps_per_epoch=70, evaluation_steps=70)
  for step, said in ((70, True), (140, False)):
    subject = types.SimpleNamespace(task=task, checkpoint=CheckpointId('', '', step, ''))
    request = parse([f'--workdir={tmp_path}', '--risk=0.5', f'--step={step}'])
    assert bool(calibration._chosen_by(request, subject)) == said


@pytest.mark.parametrize(('flags', 'needed'), [(['--risk=0.01'], 230), (['--risk=0.005', '--guarantee=crc'], 199)])
def test_a_risk_that_cannot_be_promised_keeps_the_full_network(workdir, flags, needed):
  (workdir / EXITS).unlink(missing_ok=True)
  assert rejected(f'--workdir={workdir}', *flags, started=True) == (
    f'risk {flags[0][7:]} cannot be promised from 150 held-out images: it would need {needed}; '
    'exits.json keeps the full network; raise --risk, or hold out more images in a new run'
  )
  plan = read_plan(workdir)
  assert plan.thresholds == (None, 0.0) and plan.visited == (3,)


@pytest.mark.parametrize('temperature', ['nll', 'none'])
def test_the_risk_at_each_early_exit(workdir, monkeypatch, temperature):
  seen, rank = [], measures.rank
  monkeypatch.setattr(measures, 'rank', lambda *split: seen.append(split) or rank(*split))
  out = calibrate(f'--workdir={workdir}', '--risk=0.3', '--risk-of=selective', f'--temperature={temperature}')
  plan = read_plan(workdir)
  assert plan.target == {'risk': 0.3, 'delta': 0.1, 'guarantee': 'ltt', 'loss': 'gap', 'of': 'selective'}
  assert plan.splits['thresholds'] == HELD_OUT // 2
  tested, order = seen[0][0], seen[1][0]  # Other images decide in which order thresholds are tested.
  assert len({row.tobytes() for row in tested[0]} | {row.tobytes() for row in order[0]}) == HELD_OUT
  assert 'a threshold for each exit, so that with probability 0.9 the risk at each early exit is at most 0.3' in out
  (line,) = (line.split() for line in out.splitlines() if 'the largest at an early exit' in line)
  (of_test,) = plan.test['risks']
  assert plan.expected['risks'][0] <= 0.3 and line[-1] == f'{of_test:.4f}'


def test_the_risk_of_each_class(workdir):
  out = calibrate(f'--workdir={workdir}', '--risk=0.15', '--risk-of=class')  # 0.85^14 = 0.103, 0.85^15 = 0.087
  plan = read_plan(workdir)
  few = plan.target['too_few']
  assert plan.target['needed'] == 15 and len(plan.expected['risks']) == len(plan.test['risks']) == 10
  assert few and len(few) < 10
  assert (
    f'no risk of their own is promised for {len(few)} of 10 classes, which have fewer than 15 held-out images to test '
    f'it: {", ".join(map(str, few))}; they count in the overall risk\n'
  ) in out
  assert 'the largest of a class' in out


def choose(samples, *flags):
  request = parse(['--workdir=a', *flags])
  return request.policy.choose(samples, request.target)


def test_a_risk_whose_most_confident_image_loses():
  correct = np.repeat([[False], [True]], 10, axis=1)
  choice = choose(samples_of([np.arange(10.0), np.zeros(10)], correct, COSTS), '--risk=0.25', '--delta=0.1')
  assert choice.thresholds.tolist() == [np.inf, -np.inf]
  # 0.75^9 <= 0.1: nine images without a loss would do, of ten.
  assert choice.problem == (
    'risk 0.25 cannot be promised from 10 held-out images: 9 would do if the most confident images lost nothing, '
    'and they do; exits.json keeps the full network; raise --risk, or hold out more images in a new run'
  )


def test_a_single_exit_keeps_every_risk():
  for flags in (['--risk=0.25'], ['--risk=0.01', '--guarantee=crc']):
    choice = choose(samples_of(np.zeros((1, 10)), np.zeros((1, 10)), COSTS), *flags)
    assert choice.thresholds.tolist() == [-np.inf] and choice.problem is None


@pytest.mark.parametrize('count', [2, 5, 6, 601])
def test_halves_are_drawn_whatever_the_classes_are(count):
  images = np.arange(count, dtype=np.float32).reshape(1, -1, 1)
  drawn = []
  for labels in (np.zeros(count), np.arange(count), np.arange(count) // 3, np.minimum(np.arange(count), count // 2)):
    reference, tested = measures.halves(calibration.Outputs(images, labels.astype(int)))
    assert len(tested.labels) == count // 2
    assert sorted([*reference.logits.ravel(), *tested.logits.ravel()]) == list(range(count))
    drawn.append(tested.logits.ravel().tolist())
  assert drawn == drawn[:1] * 4


def test_rare_classes_are_tested_as_often_as_they_occur():
  """Of 600 images, 180 are the only ones of their class: 90 are expected among the 300 that are tested."""
  rng = np.random.default_rng(0)
  tested = []
  for _ in range(100):
    labels = rng.permutation(np.where(np.arange(600) < 180, np.arange(600) + 8, np.arange(600) % 8))
    tested.append((measures.halves(calibration.Outputs(np.zeros((1, 600, 1)), labels))[1].labels >= 8).sum())
  # Hypergeometric: 300 of 600, of which 180 are rare: 300 * 0.3 * 0.7 * 300 / 599 = 31.6 is the variance.
  assert abs(np.mean(tested) - 90) < 3 * 5.62 / 10 and 4 < np.std(tested) < 7.5


@pytest.mark.parametrize(
  ('accuracy', 'costs', 'best'),
  [(0.75, (1, 2, 3), 2), (0.75, (1, 3, 2), 3), (0.5, (1, 2, 3), 1), (0.8, (1, 2, 3), None)],
)
def test_the_single_best_exit(accuracy, costs, best):
  plan = full_network_plan(CheckpointId('', '', 0, ''), (1, 2, 3), (1, 2, 3))
  measured = {'exit_accuracy': [0.5, 0.75, 0.75], 'accuracy': accuracy}
  assert calibration._single_best(plan, measured, PathCosts(3, lambda _, index: costs[index])) == best


def test_what_is_printed(workdir):
  (workdir / EXITS).unlink(missing_ok=True)
  first, again = (calibrate(f'--workdir={workdir}', '--threshold=0.5') for _ in range(2))
  plan, lines = read_plan(workdir), first.splitlines()
  assert max(map(len, lines[:-1])) <= 100
  assert lines[-1] == f'exits: {workdir / EXITS}'
  assert again.splitlines()[-1] == f'exits: {workdir / EXITS}, replacing an earlier one'
  assert first.startswith(READING)
  assert lines[1] == 'PN3-x3d on digits, step 140: one threshold for all exits, 0.5'
  (total,) = (line.split() for line in lines if line.strip().startswith('all') and '100.0' in line)
  assert total[1:4] == [str(TEST), '100.0', f'{100 * plan.test["accuracy"]:.2f}']
  (speed_up,) = (line.split() for line in lines if 'speed-up over exit 3 alone' in line)
  assert speed_up[-2] == f'{plan.macs_alone[1] / plan.test["cost_macs"]:.2f}'
  assert speed_up[-4] == f'{plan.macs_alone[1] / plan.expected["cost_macs"]:.2f}'


@pytest.mark.parametrize(
  ('minimized', 'fitted', 'expected', 'said', 'sources'),
  [
    (
      'nll',
      1.7617,
      [0, 0.1460],
      {'ece': [2, 3], 'nll': []},
      'temperatures from 300 held-out images, thresholds from 300',
    ),
    ('ece', 1, [0, 0], {'ece': [], 'nll': []}, 'temperatures by ECE from 300 held-out images, thresholds from 300'),
    ('none', 1, [0, 0], {'ece': [], 'nll': []}, 'no temperatures, thresholds from 300 held-out images'),
  ],
)
def test_what_a_temperature_makes_worse_is_said(workdir, monkeypatch, minimized, fitted, expected, said, sources):
  """The logits of measures_test.py: 7 of 10 images have the first of three classes, the others the last."""

  def split_logits(model, variables, exits, preprocessing, split, size):
    step = math.log((7 + math.sqrt(133)) / 6)
    found = np.full((len(exits), len(split), 10), -1000.0)
    for image, label in enumerate(split.labels):
      ranks = np.roll([2, 1, 0], 0 if image % 10 < 7 else 1)  # Of the label and the two classes after it.
      found[:, image, (label + np.arange(3)) % 10] = step * ranks
    return found

  monkeypatch.setattr(calibration, 'split_logits', split_logits)
  out = calibrate(f'--workdir={workdir}', '--threshold=0.9', f'--temperature={minimized}')
  plan = read_plan(workdir)
  assert plan.temperatures == pytest.approx((fitted, fitted), rel=1e-3)
  assert plan.expected['temperature'] == minimized and plan.expected['raised'] == plan.test['raised'] == said
  for split in (plan.expected, plan.test):
    assert [row['exit'] for row in split['exits']] == [2, 3]
    assert split['exits'][0]['calibration']['all']['ece'] == pytest.approx(expected, abs=1e-3)
  assert plan.splits == {'temperature': 0 if minimized == 'none' else HELD_OUT, 'thresholds': HELD_OUT, 'test': TEST}
  lines = out.splitlines()
  assert lines[2] == f'score: max_prob; {sources}' and max(map(len, lines[:-1])) <= 100
  notes = [line for line in lines if 'rises' in line]
  assert notes == [
    f'  exit {number}: ECE rises, held-out 0.00 -> 14.60 %, test 0.00 -> 14.60 %' for number in said['ece']
  ]
  assert ('make worse' in out) == bool(notes)


def test_without_labels(workdir, logits, monkeypatch):
  """What is fitted, chosen and measured is agreement with the last exit, and nothing is called an accuracy."""
  read = calibration.read_task

  def unlabeled(*arguments):
    found = read(*arguments)
    return found._replace(
      task=dataclasses.replace(found.task, dataset=dataclasses.replace(found.task.dataset, labeled=False))
    )

  monkeypatch.setattr(calibration, 'read_task', unlabeled)
  monkeypatch.setattr(figures, 'write_figures', lambda folder, data: drawn.append(data) or [])
  drawn = []
  out = calibrate(f'--workdir={workdir}', '--threshold=0.5', '--curves')
  plan = read_plan(workdir)
  for split, measured in (('held_out', plan.expected), ('test', plan.test)):
    both = logits[split][0]
    _, agreement = walked(plan, both, both[-1].argmax(-1))
    assert 0.5 < agreement < 1 and measured['agreement'] == pytest.approx(agreement)
    assert measured['disagreement'] == pytest.approx(1 - agreement)
    assert measured['exit_agreement'] == pytest.approx([np.mean(both[0].argmax(-1) == both[1].argmax(-1)), 1])
    assert measured['accuracy'] is measured['exit_accuracy'] is measured['gap'] is None
    assert all(row['accuracy'] is None and row['agreement'] is not None for row in measured['exits'])
  assert plan.temperatures[1] == 1  # It always agrees with itself.
  assert 'accura' not in out and 'same answer as exit 3 (%)' in out
  assert max(map(len, out.splitlines())) <= 100 + len(str(workdir))
  (data,) = drawn
  assert (data.kind, data.axis) == ('agreement', 'same answer as exit 3 (%)') and data.accuracy['test'][1] == 1
  calibrate(f'--workdir={workdir}', '--risk=0.5')
  assert read_plan(workdir).target == {'risk': 0.5, 'delta': 0.1, 'guarantee': 'ltt', 'loss': 'disagreement'}
  assert rejected(f'--workdir={workdir}', '--risk=0.5', '--risk-loss=gap') == (
    f'--risk-loss=gap needs labels, and the images of the run in {workdir} have none; set --risk-loss=disagreement'
  )


def test_without_temperatures_all_held_out_images_control_the_risk(workdir):
  calibrate(f'--workdir={workdir}', '--risk=0.5', '--temperature=none')
  plan = read_plan(workdir)
  assert plan.temperatures == (1, 1) and plan.expected['images'] == HELD_OUT
  assert plan.splits == {'temperature': 0, 'thresholds': HELD_OUT, 'test': TEST}


@pytest.mark.parametrize(
  ('threshold', 'shown'),
  [(0.9, 'max_prob 0.9000'), (0.9999, 'max_prob 0.9999'), (1 - 2.5e-7, 'max_prob 1 - 2.5e-07'), (0.0, 'all images')],
)
def test_a_printed_threshold_differs_from_1(threshold, shown):
  plan = full_network_plan(CheckpointId('', '', 0, ''), (1, 2), (1, 2))
  plan = dataclasses.replace(plan, thresholds=(threshold, 0.0), confidence_thresholds=(-math.log1p(-threshold), 0.0))
  assert summary_text._threshold(plan, 0) == shown


@pytest.mark.parametrize('batch_size', [1, 4])
def test_milliseconds(workdir, monkeypatch, batch_size):
  """The first usable exit takes 1 ms per batch, the second 3 ms alone and 2 ms after the first."""
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
  out = calibrate(f'--workdir={workdir}', f'--budget={budget}ms', '--policy=quota', f'--batch-size={batch_size}')
  plan = read_plan(workdir)
  assert plan.target == {'budget': budget, 'unit': 'ms', 'batch_size': batch_size}
  assert plan.ms == (1 / batch_size, 3 / batch_size)
  assert plan.latency['batch_sizes'][0]['ms_alone'] == [1 / batch_size, 3 / batch_size]
  assert budget * 0.99 <= plan.expected['cost_ms'] <= budget
  assert np.dot(plan.test['shares'], plan.ms) == pytest.approx(plan.test['cost_ms'])
  batches = [3] * HELD_OUT if batch_size == 1 else [4] * (HELD_OUT // 4)
  assert ran == [batch_size > 1, *batches[:1], *batches] and plan.expected['measured_ms'] > 0
  assert 'measured in the runtime' in out and max(map(len, out.splitlines()[:-1])) <= 100


class Told:
  """Tells energy: each call of a stage takes 0.1 J, the last one 0.3 J."""

  sources = ('package-0',)

  def __init__(self):
    self.used = 0.0

  def joules(self):
    self.used += 30.0
    return self.used

  def a_call(self, function, seconds):
    return 0.1 if function.__closure__[0].cell_contents.args[2] else 0.3


def test_joules(workdir, monkeypatch):
  monkeypatch.setattr(latency, 'median_seconds', lambda function, runs: 1e-3)
  monkeypatch.setattr(calibration, 'Energy', Told)
  monkeypatch.setattr(calibration, 'find_energy', lambda gpu: Told())
  runtime = types.SimpleNamespace(warm_up=lambda batches: None, predict_one=lambda image: None)
  monkeypatch.setattr(calibration, 'EarlyExit', lambda *_: runtime)
  out = calibrate(f'--workdir={workdir}', '--budget=200mJ', '--policy=quota')
  plan = read_plan(workdir)
  assert plan.target == {'budget': 0.2, 'unit': 'joules', 'batch_size': 1}
  assert plan.joules == pytest.approx((0.1, 0.4)) and plan.ms == (1, 2) and plan.latency['energy'] == ['package-0']
  assert 0.2 * 0.98 <= plan.expected['cost_joules'] <= 0.2
  assert np.dot(plan.test['shares'], plan.joules) == pytest.approx(plan.test['cost_joules'])
  assert plan.expected['measured_joules'] == pytest.approx(30 / HELD_OUT)
  assert max(map(len, out.splitlines()[:-1])) <= 100
  (line,) = (line for line in out.splitlines() if line.startswith('mean joules'))
  assert line.split()[2:] == [f'{plan.expected["cost_joules"]:.3g}', f'{plan.test["cost_joules"]:.3g}']
  assert 'for a mean of 0.2 joules at batch size 1' in out and 'no joules' not in out
  assert rejected(f'--workdir={workdir}', '--budget=0.05J') == (
    'budget must be from 0.1J (exit 2 alone) to 0.3J (exit 3 alone), found 0.05J; set --budget'
  )


def test_a_machine_that_does_not_tell_its_energy(workdir, monkeypatch):
  monkeypatch.setattr(latency, 'median_seconds', lambda function, runs: 1e-3)
  out = calibrate(f'--workdir={workdir}', '--threshold=0.5', '--batch-size=1')
  assert out.startswith(f'no joules are measured: no counter\n{READING}')
  saved = json.loads((workdir / EXITS).read_text())
  assert 'joules' not in saved and 'cost_joules' not in saved['test'] and saved['ms'] == [1, 2]
  assert rejected(f'--workdir={workdir}', '--budget=0.5J') == (
    'no counter; set --budget to multiply-adds or milliseconds'
  )


@pytest.mark.parametrize(
  ('last', 'budget', 'message'),
  [
    (3, 0.5, 'budget must be from 1ms (exit 2 alone) to 3ms (exit 3 alone), found 0.5ms; set --budget'),
    (
      0.5,
      2.5,
      'no budget is within reach: exit 2 alone takes 1ms, more than exit 3 alone with 0.5ms; set --batch-size, or a '
      '--budget of multiply-adds',
    ),
  ],
)
def test_a_time_out_of_range(workdir, monkeypatch, last, budget, message):
  monkeypatch.setattr(latency, 'median_seconds', lambda function, runs: 1e-3 if function.args[2] else last * 1e-3)
  assert rejected(f'--workdir={workdir}', f'--budget={budget}ms') == message


@pytest.mark.parametrize(('device', 'machine'), [(None, ''), ('cpu', 'a processor'), ('NVIDIA H100', 'NVIDIA H100')])
def test_figures_are_drawn_into_the_run(workdir, monkeypatch, device, machine):
  drawn = []
  monkeypatch.setattr(figures, 'write_figures', lambda *given: drawn.append(given) or [workdir / 'a.png'])
  monkeypatch.setattr(latency, 'median_seconds', lambda function, runs: 1e-3)
  record = calibration.latency_record
  machine_of = {'device': device, 'cpu': 'a processor'}
  monkeypatch.setattr(calibration, 'latency_record', lambda *costs: record(*costs) | machine_of)
  out = calibrate(f'--workdir={workdir}', '--threshold=0.5', '--curves', *(['--batch-size=1'] if device else []))
  ((folder, data),) = drawn
  assert folder == workdir / 'exits' and data.run == 'PN3-x3d' and data.unit == 'macs'
  assert data.images == {'held_out': HELD_OUT, 'test': TEST}
  assert data.measured == (f'batch size 1, {machine}' if device else '')
  assert data.ms is None if device is None else data.ms.tolist() == [1, 1]
  assert out.splitlines()[-1] == f'figure: {workdir / "a.png"}'
