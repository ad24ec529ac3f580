"""The runtime of a bundle on stages that are tables, against a walk of one image at a time."""

import ast
import contextlib
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from early_samples import confidence_of, exit_taken, softmax

from paranet_jax.export.compare import agreement
from paranet_jax.portable import run as runtime
from paranet_jax.portable.run import Adaptive, BundleError

COUNT = 150  # Three waves.
CLASSES = 4
EXITS = (1, 2, 4)
TEMPERATURES = (1.5, 0.7, 2.0)
MACS = (10, 25, 60)
MEAN, STD = (0.5,), (0.25,)
LOGITS = np.random.default_rng(0).normal(0, 2, (len(EXITS), COUNT, CLASSES)).astype(np.float32)
IMAGES = np.arange(COUNT, dtype=np.uint8).reshape(COUNT, 1, 1, 1).repeat(2, 1).repeat(2, 2)


class Table:
  """A stage that looks its logits up and checks that it is given the features of the stage before, and no others."""

  def __init__(self, index, before):
    self.index, self.before, self.batches = index, before, []

  def __call__(self, carried):
    assert set(carried) - {'_label', '_streak'} == {'images', *(f'left_{k}' for k in self.before)}
    rows = np.rint((carried['images'][:, 0, 0, 0] * 0.25 + 0.5) * 255).astype(int)
    assert all((carried[f'left_{k}'][:, 0] == rows).all() for k in self.before)
    self.batches.append(len(rows))
    return {'images': carried['images'], f'left_{self.index}': rows[:, None]}, LOGITS[self.index, rows]


def adaptive(thresholds, score='max_prob', visited=EXITS, **promises):
  """Thresholds on the confidence scale, one for each exit. promises: `reject` and `sets` of exits.json."""
  path = [EXITS.index(number) for number in visited]
  plan = {
    'exits': EXITS,
    'visited': visited,
    'score': score,
    'confidence_thresholds': thresholds,
    'temperatures': TEMPERATURES,
    'macs': [7 * MACS[k] if k in path else None for k in range(len(EXITS))],  # Other than those of all exits in turn.
    **promises,
  }
  before = [(), *((k,) for k in path[:-1])]
  stages = {number: Table(*place) for number, *place in zip(visited, path, before, strict=True)}
  every = {number: Table(k, (k - 1,) if k else ()) for k, number in enumerate(EXITS)}
  return Adaptive(plan, stages, every, MACS, (2, 2, 1), MEAN, STD, [f'class {c}' for c in range(CLASSES)])


CASES = [
  *((score, (at, at, 0.0), EXITS) for score in ('max_prob', 'entropy', 'margin') for at in (0.0, 0.5, 1.2, 40.0)),
  *((score, (0.7, None, 0.0), EXITS) for score in ('max_prob', 'entropy', 'margin')),
  *(('patience', (at, at, 0.0), EXITS) for at in (1, 2, 3)),
  ('patience', (None, 2, 0.0), EXITS),
  ('max_prob', (0.7, None, 0.0), (1, 4)),
  ('max_prob', (None, 0.7, 0.0), (2, 4)),
  ('max_prob', (None, None, 0.0), (4,)),
]


def exits_taken(thresholds, score, path=range(3)):
  """The index of the exit of each image."""
  return [exit_taken(LOGITS[:, row], thresholds, score, TEMPERATURES, path) for row in range(COUNT)]


@pytest.mark.parametrize(('score', 'thresholds', 'visited'), CASES)
def test_each_image_exits_by_the_definition(score, thresholds, visited):
  bundle, path = adaptive(thresholds, score, visited), [EXITS.index(number) for number in visited]
  taken = exits_taken(thresholds, score, path)
  found = bundle.predict(IMAGES)
  assert found.exits.tolist() == [EXITS[k] for k in taken]
  assert found.macs.tolist() == [7 * MACS[k] for k in taken]
  assert found.labels.tolist() == [LOGITS[k, row].argmax() for row, k in enumerate(taken)]
  expected = [softmax(LOGITS[k, row], TEMPERATURES[k]) for row, k in enumerate(taken)]
  np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)
  for row in range(0, COUNT, 29):
    one = bundle.predict_one(IMAGES[row])
    assert (one.label, one.exit, one.macs) == (found.labels[row], found.exits[row], found.macs[row])
    np.testing.assert_array_equal(one.probabilities, found.probabilities[row])


@pytest.mark.parametrize('score', ['max_prob', 'entropy', 'margin'])
@pytest.mark.filterwarnings('ignore:invalid value')
def test_images_without_finite_logits_are_not_sure_and_do_not_change_others(score):
  logits = np.array([[np.nan, 0, 1], [0, 1e4, 0], [0, np.inf, 1], [-np.inf, np.nan, 0], [0, 1, 2]], np.float32)
  confidences, probabilities = runtime.confidence(logits, score), runtime.softmax(logits, 1.0)
  assert np.isnan(probabilities).all(1).tolist() == [True, False, True, True, False]
  assert (confidences == 0).tolist() == [True, False, True, True, False]
  for row in (1, 4):
    assert confidences[row] == runtime.confidence(logits[row], score)
    np.testing.assert_array_equal(probabilities[row : row + 1], runtime.softmax(logits[row : row + 1], 1.0))


@pytest.mark.filterwarnings('ignore:invalid value')
def test_images_that_diverge_leave_at_the_last_exit(monkeypatch):
  logits = LOGITS.copy()
  logits[0, 3], logits[0, 4], logits[0, 5] = np.nan, [np.inf, *[0] * (CLASSES - 1)], 1e4 * np.arange(CLASSES)
  monkeypatch.setattr(sys.modules[__name__], 'LOGITS', logits)
  bundle = adaptive((500.0, None, 0.0))
  assert bundle.predict(IMAGES).exits[:6].tolist() == [EXITS[-1]] * 5 + [EXITS[0]]
  assert [bundle.predict_one(IMAGES[row]).exit for row in (3, 4, 5)] == [EXITS[-1], EXITS[-1], EXITS[0]]


@pytest.mark.parametrize('score', ['max_prob', 'entropy', 'margin'])
@pytest.mark.filterwarnings('ignore:invalid value')
def test_images_that_diverge_keep_the_limit_of_the_cost(monkeypatch, score):
  """A threshold of 0, as of --max-macs and --threshold=0, lets every image leave; with --reject, it is unknown."""
  logits = LOGITS.copy()
  logits[:, 3], logits[:, 4] = np.nan, [np.inf, *[0] * (CLASSES - 1)]
  monkeypatch.setattr(sys.modules[__name__], 'LOGITS', logits)
  for bundle in (adaptive((500.0, 0.0, 0.0), score=score), adaptive((500.0, None, 0.0), score=score).with_threshold(0)):
    number = EXITS[1] if bundle.as_calibrated else EXITS[0]
    found = bundle.predict(IMAGES)
    assert found.exits.tolist() == [number] * COUNT
    assert np.flatnonzero(~found.finite).tolist() == [3, 4]
    assert [bundle.predict_one(IMAGES[row]).exit for row in (0, 3, 4)] == [number] * 3
  rejecting = adaptive((500.0, 0.0, 0.0), score=score, reject=REJECT)
  assert rejecting.predict(IMAGES).unknown.nonzero()[0].tolist() == [3, 4]


def test_logits_of_other_kinds():
  bundle = adaptive((0.7, 0.7, 0.0))
  expected = bundle.answers(EXITS[0], LOGITS[0])
  for logits in (LOGITS[0].tolist(), jnp.asarray(LOGITS[0])):
    assert bundle.leaves(EXITS[0], logits, {}).tolist() == bundle.leaves(EXITS[0], LOGITS[0], {}).tolist()
    np.testing.assert_allclose(bundle.answers(EXITS[0], logits).probabilities, expected.probabilities, rtol=1e-6)
  assert isinstance(runtime.confidence(LOGITS[0, 0], 'max_prob'), float)


REJECT = {'risk': 0.1, 'delta': 0.1, 'confidence_threshold': 0.9}
SETS = {'coverage': 0.9, 'penalty': 0.05, 'free': 2, 'limits': [0.3, 0.6, None], 'anytime': 0.7}


def sure(k, row, at):
  return confidence_of(LOGITS[k, row], 'max_prob', TEMPERATURES[k]) >= at


@pytest.mark.parametrize('reject', [0.9, None])
def test_an_unsure_image_is_unknown(reject):
  bundle = adaptive((0.7, 0.7, 0.0), reject=REJECT | {'confidence_threshold': reject})
  plain, found = adaptive((0.7, 0.7, 0.0)).predict(IMAGES), bundle.predict(IMAGES)
  unknown = [exit == 4 and not (reject and sure(2, row, reject)) for row, exit in enumerate(plain.exits)]
  assert bundle.rejects and found.unknown.tolist() == unknown and 0 < sum(unknown)
  np.testing.assert_array_equal(found.labels, np.where(unknown, CLASSES, plain.labels))
  for before, after in zip(plain[1:], found[1:], strict=True):
    np.testing.assert_array_equal(before, after)
  assert [bundle.predict_one(image).unknown for image in IMAGES[:20]] == unknown[:20]
  assert not adaptive((0.7, 0.7, 0.0)).predict(IMAGES).unknown.any()


def test_an_image_that_is_stopped_before_it_is_sure_is_unknown():
  whole = adaptive((0.7, None, 0.0), visited=(1, 4), reject=REJECT)
  for bundle, last in ((whole.with_budget(100), 0), (adaptive((0.7, 0.7, 0.0), reject=REJECT).with_budget(200), 1)):
    found = bundle.predict(IMAGES)
    expected = [not any(sure(k, row, 0.7) for k in range(last + 1)) for row in range(COUNT)]
    assert found.unknown.tolist() == expected and not bundle.as_calibrated
  answers = list(whole.anytime(IMAGES[0]))  # No image exits at exit 2.
  assert [answer.unknown for answer in answers] == [not sure(0, 0, 0.7), True, not sure(2, 0, 0.9)]


def held(k, row, limit):
  """The classes within a limit at an exit, one after the other."""
  probabilities, found = softmax(LOGITS[k, row], TEMPERATURES[k]), set()
  for rank, label in enumerate(np.argsort(-probabilities)):
    before = sum(sorted(probabilities)[::-1][:rank]) + 0.05 * max(rank + 1 - 2, 0)
    found |= {int(label)} if before <= limit else set()
  return found


def test_sets():
  bundle = adaptive((0.7, 0.7, 0.0), sets=SETS)
  found = bundle.predict(IMAGES)
  places, limits = {1: 0, 2: 1, 4: 2}, {1: 0.3, 2: 0.6, 4: np.inf}
  expected = [held(places[exit], row, limits[exit]) for row, exit in enumerate(found.exits)]
  assert [set(np.flatnonzero(each)) for each in bundle.sets(found)] == expected
  assert {1, CLASSES} <= {len(each) for each in expected} and bundle.coverage == 0.9
  # Where something else stops images, the limit of all exits holds.
  expected = [held(places[exit], row, 0.7) for row, exit in enumerate(found.exits)]
  assert [set(np.flatnonzero(each)) for each in bundle.sets(found, any_exit=True)] == expected
  other = bundle.with_threshold(0.8)
  found = other.predict(IMAGES)
  expected = [held(places[exit], row, 0.7) for row, exit in enumerate(found.exits)]
  assert [set(np.flatnonzero(each)) for each in other.sets(found)] == expected


def test_sets_only_shrink():
  bundle, sizes = adaptive((0.7, 0.7, 0.0), sets=SETS), []
  for row in range(40):
    before, expected = np.full(CLASSES, True), set(range(CLASSES))
    for k, (answer, now) in enumerate(bundle.anytime_sets(IMAGES[row])):
      expected &= held(k, row, 0.7)
      assert answer.exit == EXITS[k] and set(np.flatnonzero(now)) == expected and not (now & ~before).any()
      before = now
    sizes.append(len(expected))
  assert len(set(sizes)) > 2


def test_without_sets():
  bundle = adaptive((0.7, 0.7, 0.0))
  for ask in (lambda: bundle.sets(bundle.predict(IMAGES)), lambda: bundle.anytime_sets(IMAGES[0])):
    with pytest.raises(BundleError, match='^expected sets of classes in exits.json, found none; calibrate '):
      ask()
  assert bundle.coverage is None and not bundle.rejects


def test_images_that_have_exited_are_not_computed():
  bundle = adaptive((0.7, 0.7, 0.0))
  found = bundle.predict(IMAGES)
  tables = [bundle._stages[number] for number in EXITS]
  assert [sum(table.batches) for table in tables] == [(found.exits >= number).sum() for number in EXITS]
  assert max(tables[0].batches) == runtime.WAVE
  all_at_first = adaptive((0.0, 0.0, 0.0))
  all_at_first.predict(IMAGES)
  assert all_at_first._stages[2].batches == []


@pytest.mark.parametrize(('score', 'thresholds'), [('max_prob', (0.7, 0.7, 0.0)), ('patience', (2, 2, 0.0))])
def test_stage_by_stage_with_joined_requests(score, thresholds):
  """Two requests run in one batch, and each gets the answers that it would get alone."""
  bundle, count = adaptive(thresholds, score), 40
  expected = bundle.predict(IMAGES[:count])
  parts, answers = [bundle.begin(IMAGES[:15]), bundle.begin(IMAGES[15:count])], {}
  rows, carried = np.arange(count), None
  for number in bundle.visited:
    carried = runtime.join(parts) if carried is None else carried
    carried, logits = bundle.stage(number)(carried)
    exiting = bundle.leaves(number, logits, carried)
    found = bundle.answers(number, logits[exiting])
    answers |= dict(zip(rows[exiting].tolist(), zip(*found, strict=True), strict=True))
    rows, carried = rows[~exiting], runtime.select(carried, ~exiting)
  for row in range(count):
    label, probabilities, exit, macs = answers[row]
    assert (label, exit, macs) == (expected.labels[row], expected.exits[row], expected.macs[row])
    np.testing.assert_array_equal(probabilities, expected.probabilities[row])


def test_a_score_that_there_is_not():
  with pytest.raises(ValueError, match='^not a probability score: patience$'):
    runtime.confidence(LOGITS, 'patience')


def test_no_images():
  found = adaptive((0.7, 0.7, 0.0)).predict(IMAGES[:0])
  assert [part.shape for part in found] == [(0,), (0, CLASSES), (0,), (0,)]


@pytest.mark.parametrize('dtype', [np.float16, np.float64])
def test_normalized_images(dtype):
  bundle = adaptive((0.7, 0.7, 0.0))
  normalized = ((IMAGES / 255 - 0.5) / 0.25).astype(dtype)
  np.testing.assert_array_equal(bundle.predict(normalized).labels, bundle.predict(IMAGES).labels)


def test_anytime():
  for visited in (EXITS, (1, 4)):
    answers = list(adaptive((0.0, 0.0, 0.0), visited=visited).anytime(IMAGES[3]))
    assert [answer.exit for answer in answers] == list(EXITS)
    assert [answer.macs for answer in answers] == list(MACS)
    assert [answer.label for answer in answers] == LOGITS[:, 3].argmax(-1).tolist()


@pytest.mark.parametrize(
  ('deadline', 'exits'), [(0.5, [1]), (14.9, [1]), (15.1, [1, 2]), (44.9, [1, 2]), (45.1, [1, 2, 4])]
)
def test_deadline(monkeypatch, deadline, exits):
  # Stages should take 1, 5 and 20 ms; the caller spends 10 and 15 ms between them.
  bundle, now, found = adaptive((0.0, 0.0, 0.0)), [0.0], []
  monkeypatch.setattr(bundle, 'stage_ms', lambda dtype: (1.0, 5.0, 20.0))
  monkeypatch.setattr(runtime.time, 'perf_counter', lambda: now[0])
  for answer in bundle.anytime(IMAGES[0], deadline_ms=deadline):
    found.append(answer.exit)
    now[0] += 0.010 if answer.exit == 1 else 0.015
  assert found == exits


def test_latencies_are_measured_once():
  bundle = adaptive((0.0, 0.0, 0.0), visited=(4,))
  first = bundle.stage_ms()
  assert len(first) == 3 and min(first) > 0 and bundle.stage_ms() == first


@pytest.mark.parametrize(
  ('score', 'threshold', 'confidence'),
  [('max_prob', 0.9, np.log(10)), ('entropy', 0.5, np.log(2)), ('max_prob', 1, np.inf), ('patience', 2, 2)],
)
def test_one_threshold_for_all_exits(score, threshold, confidence):
  bundle = adaptive((None, None, 0.0), score, visited=(4,) if score != 'patience' else EXITS).with_threshold(threshold)
  taken = exits_taken((confidence, confidence, 0.0), score)
  found = bundle.predict(IMAGES)
  assert found.exits.tolist() == [EXITS[k] for k in taken]
  assert found.macs.tolist() == [MACS[k] for k in taken]


@pytest.mark.parametrize(('budget', 'last'), [(7 * 10, 1), (7 * 59, 2), (7 * 60, 4), (1e9, 4)])
def test_no_image_costs_more_than_the_budget(budget, last):
  whole, bundle = adaptive((0.7, 0.7, 0.0)), adaptive((0.7, 0.7, 0.0)).with_budget(budget)
  found = bundle.predict(IMAGES)
  assert found.exits.tolist() == np.minimum(whole.predict(IMAGES).exits, last).tolist()
  assert found.macs.max() <= budget


@pytest.mark.parametrize(
  ('score', 'call', 'message'),
  [
    ('max_prob', lambda b: b.with_threshold(1.5), 'threshold from 0 to 1, as max_prob is, found 1.5; set --threshold'),
    ('max_prob', lambda b: b.with_threshold(float('nan')), 'threshold from 0 to 1, as max_prob is, found nan; '),
    ('max_prob', lambda b: b.with_budget(69), 'budget of 70 multiply-adds or more, found 69; set --budget=70'),
    ('patience', lambda b: b.with_threshold(-1), 'threshold of 0 or more equal labels, as patience is, found -1; '),
    ('patience', lambda b: b.with_threshold(0.9), 'threshold of 0 or more equal labels, as patience is, found 0.9; '),
  ],
)
def test_wrong_thresholds_and_budgets(score, call, message):
  with pytest.raises(BundleError, match=f'^expected a {message}'):
    call(adaptive((1, 1, 0.0), score))


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda b: b.predict(IMAGES[0]), 'expected images [N, 2, 2, 1], found [2, 2, 1]'),
    (lambda b: b.predict_one(IMAGES), 'expected images [2, 2, 1], found [150, 2, 2, 1]'),
    (lambda b: b.begin(IMAGES[:, :1]), 'expected images [N, 2, 2, 1], found [150, 1, 2, 1]'),
    (
      lambda b: b.predict(IMAGES.astype(np.int32)),
      'expected uint8 images, or normalized ones of floating point, found int32',
    ),
    (lambda b: b.anytime(IMAGES[0], deadline_ms=0), 'expected a deadline of more than 0 ms, found 0'),
    (lambda b: b.anytime(IMAGES), 'expected images [2, 2, 1], found [150, 2, 2, 1]'),
  ],
)
def test_wrong_images_and_deadlines(call, message):
  with pytest.raises(ValueError) as error:
    call(adaptive((0.7, 0.7, 0.0)))
  assert str(error.value) == message


EXPECTED = 'expected uint8 images, or floats (pixel / 255 - mean) / std, which are from -2 to 2, found '
FIX = '; give uint8 images, or normalize them by mean and std'
GRID = np.arange(256, dtype=np.float32).reshape(64, 2, 2, 1) / 255  # Every pixel value, from 0 to 1.
NOT_PIXELS = {
  'from 0 to 1': (GRID, '0 to 1'),
  'resampled, from 0 to 1': (GRID**1.1, '0 to 1'),
  'from -1 to 1': (2 * GRID - 1, '-1 to 1'),
  'from -0.5 to 0.5': (GRID - 0.5, '-0.5 to 0.5'),
  'from 0 to 255': (255 * GRID, '0 to 255'),
  'too large': ((GRID - 0.5) / 0.2, '-2.5 to 2.5'),
  'NaN': (np.where(GRID == 0, np.nan, 0), 'NaN or infinity'),
  'infinite': (np.where(GRID == 0, -np.inf, 0), 'NaN or infinity'),
}


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize(('images', 'found'), NOT_PIXELS.values(), ids=NOT_PIXELS)
def test_floats_that_no_pixels_have(images, found, dtype):
  bundle, images = adaptive((0.7, 0.7, 0.0)), images.astype(dtype)
  odd = images[0]  # Has pixels of 0, where the odd values are.
  calls = [bundle.predict, bundle.begin]
  calls += [lambda _: bundle.predict_one(odd), lambda _: next(bundle.anytime(odd))] if 'N' in found else []
  for call in calls:
    with pytest.raises(ValueError) as error:
      call(images)
    assert str(error.value) == EXPECTED + found + FIX


FLOATS = {
  'of all pixels': (GRID - 0.5) / 0.25,
  'of bright pixels': (GRID[33:45] - 0.5) / 0.25,  # From 0.07 to 0.8.
  'resampled': (GRID**1.1 - 0.5) / 0.25,
  'of one color': np.zeros((3, 2, 2, 1), np.float32),
  'none': np.zeros((0, 2, 2, 1), np.float32),
}


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
@pytest.mark.parametrize('images', FLOATS.values(), ids=FLOATS)
def test_floats_that_pixels_have(images, dtype):
  adaptive((0.7, 0.7, 0.0)).begin(images.astype(dtype))


def test_floats_of_unknown_normalization():
  bundle = adaptive((0.7, 0.7, 0.0))
  bundle._mean, bundle._std = np.zeros(1), np.ones(1)  # The defaults of EarlyExit.
  bundle.begin(10 * GRID - 5)
  with pytest.raises(ValueError, match='found NaN or infinity'):
    bundle.begin(np.full_like(GRID, np.nan))


def test_agreement():
  thresholds = (0.7, 0.7, 0.0)
  bundle = adaptive(thresholds)
  floors = np.array([0.7, 0.7, -np.inf])
  plan = SimpleNamespace(score='max_prob', temperatures=TEMPERATURES, confidence_floors=floors, exits=EXITS)
  other_labels, at_first = LOGITS.copy(), LOGITS.copy()
  other_labels[:, :30] = np.roll(LOGITS[:, :30], 1, axis=-1)  # 30 of 150 images, as confident as before.
  at_first[:, 60:] = 9, 0, 0, 0  # So confident that 90 images exit at exit 1, with label 0.
  theirs, same = bundle.predict(IMAGES), np.arange(COUNT) < 60
  labels, exits = np.mean(same | (theirs.labels == 0)), np.mean(same | (theirs.exits == 1))
  assert labels < 1 and exits < 1
  for logits, *expected, exit_labels in (
    (LOGITS, 1, 1, [1, 1, 1]),
    (other_labels, 0.8, 1, [0.8, 0.8, 0.8]),
    (at_first, labels, exits, np.mean(same | (LOGITS.argmax(-1) == 0), axis=-1).tolist()),
  ):
    found = agreement(logits, plan, bundle, IMAGES)
    assert [found['images'], found['labels'], found['exits']] == [COUNT, *expected]
    assert found['exit_labels'] == pytest.approx(exit_labels)
    assert found['logits'] == pytest.approx(np.abs(logits - LOGITS).max() / np.abs(logits).max())


@pytest.mark.parametrize('stream', [None, '/dev/full'])
def test_stderr_that_takes_nothing(monkeypatch, capsys, stream):
  with contextlib.nullcontext() if stream is None else open(stream, 'w') as stderr:
    monkeypatch.setattr(runtime.sys, 'stderr', stderr)
    assert runtime.main([]) == 2
  assert capsys.readouterr().out == ''


def test_what_the_file_imports():
  """The standard library and NumPy at the top; other packages only inside the functions that need them."""
  tree = ast.parse(Path(runtime.__file__).read_text())

  def names(nodes):
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition('.')[0] for name in found} - sys.stdlib_module_names

  assert names(tree.body) == {'numpy'}
  assert names(list(ast.walk(tree))) == {'numpy', 'onnxruntime', 'openvino', 'PIL'}


@pytest.mark.parametrize(
  ('precision', 'threads', 'expected'),
  [
    ('float32', 0, {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32'}),
    ('auto', 2, {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_NUM_THREADS': 2}),
  ],
)
def test_the_precision_of_openvino(monkeypatch, precision, threads, expected):
  class Core:
    def compile_model(self, *arguments):
      assert arguments == ('stage_1.onnx', 'CPU', expected)

  monkeypatch.setitem(sys.modules, 'openvino', SimpleNamespace(Core=Core))
  assert callable(runtime._maker('openvino', threads, precision)(Path('stage_1.onnx')))


def test_a_request_of_openvino_serves_one_thread(monkeypatch):
  requests = []

  class Request:
    def infer(self, inputs):
      self.outputs = {'sum': inputs['x'].sum(keepdims=True)}  # Its memory is used again in the next call.
      return self.outputs

  def create_infer_request():
    requests.append(Request())
    return requests[-1]

  core = SimpleNamespace(compile_model=lambda *_: SimpleNamespace(create_infer_request=create_infer_request))
  monkeypatch.setitem(sys.modules, 'openvino', SimpleNamespace(Core=lambda: core))
  session = runtime._maker('openvino', 0, 'auto')(Path('stage_1.onnx'))
  for _ in range(2):
    (found,) = session(['sum'], {'x': np.arange(3.0)})
    assert found.tolist() == [3] and found is not requests[0].outputs['sum']
  assert len(requests) == 1
  other = threading.Thread(target=session, args=(['sum'], {'x': np.ones(2)}))
  other.start()
  other.join()
  assert [request.outputs['sum'].tolist() for request in requests] == [[3], [2]]


def test_threads_of_a_stage_leave_the_cores_to_the_next(monkeypatch):
  class Session:
    def __init__(self, path, options, providers):
      self.run = options.get_session_config_entry('session.force_spinning_stop')

  monkeypatch.setattr(onnxruntime, 'InferenceSession', Session)
  assert runtime._onnxruntime(2, Path('stage_1.onnx')) == '1'
