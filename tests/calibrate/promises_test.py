"""What `calibrate` promises, on logits made by hand: nothing is trained or compiled."""

import math
import types

import numpy as np
import pytest
from early_samples import path_costs, softmax

from paranet_jax.calibrate import calibration
from paranet_jax.calibrate.flags import parse
from paranet_jax.calibrate.summary_text import summary_text
from paranet_jax.early.exit_plan import EXITS, CheckpointId, read_plan
from paranet_jax.early.logits import Outputs
from paranet_jax.host.errors import UserError

HELD_OUT, TEST, CLASSES = 300, 240, 6


def made(count, seed):
  """Logits of three exits, the later the better, and labels."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, CLASSES, count)
  strength = np.array([1.5, 2.5, 4.0])[:, None, None] * rng.exponential(1.0, (count, 1))
  logits = 2 * (np.eye(CLASSES)[labels] * strength + 0.4 * rng.normal(size=(3, count, CLASSES)))
  return Outputs(logits.astype(np.float32), labels)


@pytest.fixture
def run(tmp_path, monkeypatch):
  """The folder of a run with these logits; exits in turn cost 10, 21 and 32, alone 10, 20 and 30."""
  outputs = {'held-out': made(HELD_OUT, 1), 'test': made(TEST, 2)}
  dataset = types.SimpleNamespace(
    held_out=range(HELD_OUT), test=range(TEST), labeled=True, class_names=[f'class {c}' for c in range(CLASSES)]
  )
  costs = path_costs(3, cut=False)
  subject = calibration.Subject(
    CheckpointId('made', 'nothing', 1, 'f' * 16), types.SimpleNamespace(dataset=dataset), None, (1, 2, 3), costs, None
  )
  chosen = {HELD_OUT: outputs['held-out'], TEST: outputs['test']}
  monkeypatch.setattr(calibration, '_restore', lambda request, energy: subject)
  monkeypatch.setattr(calibration, '_outputs', lambda _, split: chosen[len(split)])
  monkeypatch.setattr(calibration, 'repair_dataset_facts', lambda *_: None)
  return types.SimpleNamespace(folder=tmp_path, dataset=dataset, test=outputs['test'])


def calibrate(run, *flags):
  found = calibration.calibrate(parse([f'--workdir={run.folder}', *flags]), 'calibrate')
  assert read_plan(run.folder) == found.plan and found.problem is None
  text = summary_text(found.plan)
  assert max(map(len, text.splitlines())) <= 100
  return found.plan, text


def walked(run, plan, thresholds):
  """The exit, 0-based, and the probabilities there, of each test image."""
  for image, label in enumerate(run.test.labels):
    rows = [softmax(run.test.logits[k, image], plan.temperatures[k]) for k in range(3)]
    k = next((k for k in range(2) if rows[k].max() >= thresholds[k]), 2)
    yield int(label), k, rows[k]


def test_answers_and_sets(run):
  plan, text = calibrate(run, '--threshold=0.8', '--reject=0.1', '--coverage=0.9')
  assert plan.splits == {'temperature': 150, 'thresholds': 150, 'test': TEST, 'promises': 150}
  assert (plan.reject['risk'], plan.reject['delta'], plan.sets['coverage']) == (0.1, 0.1, 0.9)
  answered, wrong, covered, sizes = 0, 0, [], 0
  for label, k, row in walked(run, plan, (0.8, 0.8)):
    order = np.argsort(-row, kind='stable')
    spare = np.maximum(np.arange(1, CLASSES + 1) - plan.sets['free'], 0) * plan.sets['penalty']
    limit = plan.sets['limits'][k]
    inside = order[np.cumsum(row[order]) - row[order] + spare <= (math.inf if limit is None else limit)]
    covered.append(label in inside)
    sizes += len(inside)
    if k < 2 or row.max() >= plan.reject['threshold']:
      answered, wrong = answered + 1, wrong + (order[0] != label)
  assert plan.test['answered'] == pytest.approx(answered / TEST) and 0 < answered < TEST
  assert plan.test['answered_error'] == pytest.approx(wrong / answered)
  assert (plan.seen['answered'], plan.seen['wrong']) == (answered, wrong)
  assert (plan.test['covered'], plan.test['set_size']) == pytest.approx((np.mean(covered), sizes / TEST))
  assert plan.expected['answered_error'] <= 0.1 and plan.expected['covered'] >= 0.9
  for line in (
    'temperatures from 150 held-out images, thresholds from 150, promises from 150',
    'answered, the others are unknown (%)',
    'wrong among them (%), 90 % sure: at most 10',
    'sets that hold the right class (%), promised: 90',
    'classes in a set, on average',
  ):
    assert line in text


def test_without_flags_nothing_is_promised(run):
  plan, text = calibrate(run, '--threshold=0.8')
  assert plan.reject is plan.sets is None and plan.splits == {'temperature': 300, 'thresholds': 300, 'test': TEST}
  assert 'promise' not in text and 'unknown' not in text


def test_what_the_watch_compares_with(run):
  plan, _ = calibrate(run, '--threshold=0.8')
  seen, classes, wrong = plan.seen, [0] * CLASSES, 0
  counts = [[0] * (len(edges) + 1) for edges in seen['edges']]
  for label, k, row in walked(run, plan, (0.8, 0.8)):
    counts[k][sum(edge <= row.max() for edge in seen['edges'][k])] += 1
    classes[row.argmax()] += 1
    wrong += int(row.argmax() != label)
  assert 'answered' not in seen  # All are.
  assert seen['images'] == TEST and len(seen['edges'][0]) > 4 and max(len(edges) for edges in seen['edges']) <= 9
  assert (seen['classes'], seen['wrong']) == (classes, wrong)
  assert np.abs(np.concatenate(seen['counts']) - np.concatenate(counts)).sum() <= 2  # Rounding of float32.


def test_an_audit_is_kept_and_printed(run, monkeypatch):
  rows = {name: {'cost_macs': cost, 'accuracy': 0.5} for name, cost in (('clean', 20), ('hardest', 25), ('attack', 30))}
  rows['hardest']['name'] = 'blur'
  found = {'images': 9, 'within': 8, 'most_macs': 32.0, 'corruptions': [rows['hardest']], **rows}
  given = []
  monkeypatch.setattr(calibration, 'audit', lambda plan, *arguments: given.append((plan, *arguments)) or found)
  run.dataset.test, task = np.arange(TEST), calibration._restore(None, None).task
  task.model, task.preprocessing = 'model', 'preprocessing'
  plan, text = calibrate(run, '--threshold=0.8', '--audit')
  ((audited, model, _, preprocessing, test, labels, kind, _),) = given
  assert plan.audit == found and 'slowdown attack, at most 8 of 255 a pixel' in text
  assert (audited.thresholds, model, preprocessing, kind) == (plan.thresholds, 'model', 'preprocessing', 'accuracy')
  assert test is run.dataset.test and labels is run.test.labels
  assert calibrate(run, '--threshold=0.8')[0].audit is None


def refusal(run, *flags):
  before = {path: path.read_bytes() for path in run.folder.iterdir()}
  with pytest.raises(UserError) as error:
    calibrate(run, *flags)
  assert {path: path.read_bytes() for path in run.folder.iterdir()} == before
  return str(error.value)


KEPT = 'exits.json is unchanged; '
MORE = 'raise --reject, let fewer images leave early, or hold out more images in a new run'


def test_what_cannot_be_promised(run):
  calibrate(run, '--threshold=0.8')
  assert (run.folder / EXITS).exists()
  error = 'an error of {} among the answers cannot be promised from 150 held-out images: '
  assert refusal(run, '--threshold=0.8', '--reject=0.001') == (
    f'{error.format(0.001)}it would need 2,302 of its own, half of all; {KEPT}{MORE}'  # 0.999^2302 = 0.09995
  )
  found = refusal(run, '--threshold=0', '--reject=0.03')
  assert found.startswith(f'{error.format(0.03)}of those that leave before exit 3, ')
  assert found.endswith(f' % are wrong; {KEPT}{MORE}')
  assert refusal(run, '--threshold=0.9', '--coverage=0.999') == (
    f'a coverage of 0.999 needs 999 held-out images of its own, half of all, found 150; {KEPT}'
    'lower --coverage, or hold out more images in a new run'
  )


def test_a_risk_that_cannot_be_promised_replaces_no_earlier_plan(run, monkeypatch):
  written = []
  monkeypatch.setattr(calibration, 'repair_dataset_facts', lambda *given: written.append(given))

  def refused():
    found = calibration.calibrate(parse([f'--workdir={run.folder}', '--risk=0.01']), 'calibrate')
    return found.problem.replace('risk 0.01 cannot be promised from 150 held-out images: it would need 230; ', '')

  more = 'raise --risk, or hold out more images in a new run'  # 0.99^230 = 0.0991
  assert refused() == f'exits.json keeps the full network; {more}' and read_plan(run.folder).visited == (3,)
  plan, _ = calibrate(run, '--threshold=0.8')
  before = len(written)
  assert refused() == KEPT + more and read_plan(run.folder) == plan and len(written) == before == 2


def test_a_class_without_tested_images_is_named(run, capsys):
  run.dataset.class_names += ['trained on', 'of no image']
  run.dataset.train = types.SimpleNamespace(labels=np.array([0, 6]))
  flags = f'--workdir={run.folder}', '--risk=0.3', '--risk-of=class'
  plan = calibration.calibrate(parse(flags), 'calibrate').plan
  assert (plan.target['too_few'], plan.target['needed']) == ([6], 7)  # 0.7^6 = 0.118, 0.7^7 = 0.082
  assert capsys.readouterr().out.endswith(
    'no risk of their own is promised for 1 of 8 classes, which have fewer than 7 held-out images to test it: '
    'trained on; they count in the overall risk\n'
  )


@pytest.mark.parametrize('flag', ['reject', 'coverage'])
def test_without_labels(run, flag):
  run.dataset.labeled = False
  assert refusal(run, '--threshold=0.9', f'--{flag}=0.9') == (
    f'--{flag} needs labels, and the images of the run in {run.folder} have none; leave it out'
  )
  found = calibration.calibrate(parse([f'--workdir={run.folder}', '--threshold=0.9']), 'calibrate')
  assert found.plan.seen['wrong'] is None


def test_no_image_costs_more_than_the_limit(run):
  plan, text = calibrate(run, '--threshold=0.8', '--max-macs=21')
  assert plan.thresholds == (pytest.approx(0.8), 0.0, 0.0) and plan.target == {'threshold': 0.8, 'max_macs': 21}
  assert plan.test['shares'][2] == 0 and plan.test['cost_macs'] <= 21
  assert ', 0.8, at most 21 multiply-adds for any image\n' in text
  assert refusal(run, '--threshold=0.9', '--max-macs=9') == (
    'expected a limit of 1e-05M or more, as exit 1 alone takes, found 9e-06M; set --max-macs'
  )
