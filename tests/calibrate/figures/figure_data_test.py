"""Tests of the numbers in the figures, against slow references on made-up logits."""

import dataclasses

import numpy as np
import pytest

from paranet_jax.calibrate.figures.figure_data import SPLITS, FigureData, figure_data
from paranet_jax.early.exit_plan import CheckpointId, ExitPlan, full_network_plan
from paranet_jax.early.logits import Outputs
from paranet_jax.early.path_costs import PathCosts
from paranet_jax.early.scores import confidences

OWN = np.array([10.0, 20.0, 30.0])  # What each exit adds to the cost of all before it.
CLASSES = 4


def outputs(seed: int, images: int) -> Outputs:
  """Three exits, each more confident and more accurate than the one before."""
  draw = np.random.default_rng(seed)
  labels = draw.integers(0, CLASSES, images)
  logits = draw.normal(size=(3, images, CLASSES)).astype(np.float32)
  logits[:, np.arange(images), labels] += np.array([[0.5], [1.0], [2.0]], np.float32)
  return Outputs(logits, labels)


HELD_OUT, TEST = outputs(1, 300), outputs(2, 400)
IMAGES = np.arange(400, dtype=np.uint16).view(np.uint8).reshape(400, 2, 1, 1)
PLAN = dataclasses.replace(
  full_network_plan(CheckpointId('PN3', 'toy', 7, 'abc'), (1, 2, 4), (10, 30, 60)),
  policy='ltt',
  target={'risk': 0.05, 'loss': 'gap'},
  temperatures=(0.8, 1.0, 1.5),
  confidence_thresholds=(1.0, None, 0.0),
)


def data_of(plan: ExitPlan, **changes) -> FigureData:
  # A skipped exit costs nothing here.
  costs = PathCosts(3, lambda before, index: OWN[index] + (OWN[:index].sum() if not before else 0))
  return figure_data(plan, HELD_OUT, TEST, costs, IMAGES, 'abcd', **changes)


@pytest.fixture(scope='module')
def data() -> FigureData:
  return data_of(PLAN)


def exits_of(plan: ExitPlan, split) -> list[int]:
  """The exit of each image, one image after the other."""
  ranked = confidences(split[0], plan.score, plan.temperatures)
  thresholds = [np.inf if threshold is None else threshold for threshold in plan.confidence_thresholds]
  return [next(k for k in range(3) if k == 2 or ranked[k, image] >= thresholds[k]) for image in range(len(split[1]))]


@pytest.mark.parametrize(('name', 'split'), [('held_out', HELD_OUT), ('test', TEST)])
def test_the_plan_is_applied_to_both_splits(data, name, split):
  logits, labels = split
  taken = exits_of(PLAN, split)
  right = [logits[k, image].argmax() == labels[image] for image, k in enumerate(taken)]
  shares = np.bincount(taken, minlength=3) / len(taken)
  assert shares[1] == 0 < shares[0] < 1
  np.testing.assert_allclose(data.shares[name], shares)
  # Exit 2 is skipped: the last costs 10 + 30.
  np.testing.assert_allclose(data.chosen[name].cost, [10 * shares[0] + 40 * shares[2]])
  np.testing.assert_allclose(data.chosen[name].accuracy, [np.mean(right)])
  early, late = ([good for good, k in zip(right, taken, strict=True) if k == at] for at in (0, 2))
  np.testing.assert_allclose(data.accuracy_there[name], [np.mean(early), np.nan, np.mean(late)])
  np.testing.assert_allclose(data.accuracy[name], [np.mean(logits[k].argmax(1) == labels) for k in range(3)])
  assert data.images[name] == len(labels)


def test_facts_from_the_plan(data):
  assert (data.run, data.dataset, data.unit, data.ms) == ('PN3', 'toy', 'macs', None)
  assert data.exits.tolist() == [1, 2, 4]
  assert data.macs.tolist() == data.alone.tolist() == [10, 30, 60]
  assert data.class_names == tuple('abcd')


def test_families_are_chosen_on_the_held_out_split(data):
  assert set(data.families) == {'quota', 'envelope', 'optimal', 'oracle'}
  envelope, optimal = (data.families[family]['held_out'] for family in ('envelope', 'optimal'))
  assert (np.diff(envelope.cost) > 0).all() and (np.diff(envelope.accuracy) > 0).all()
  assert (np.diff(data.families['envelope']['test'].accuracy) <= 0).any()
  assert len(data.families['quota']['test'].cost) == 39 and len(optimal.cost) == 25
  # The budgets go from the first exit alone to the last alone.
  budgets = np.geomspace(10, 60, 25)
  assert (optimal.cost <= budgets + 1e-9).all() and optimal.cost[0] == 10
  for cost, accuracy in zip(*envelope, strict=True):
    assert optimal.accuracy[budgets >= cost].max() >= accuracy
  for split in SPLITS:
    assert data.families['oracle'][split].accuracy[-1] > data.accuracy[split].max()


@pytest.mark.parametrize('loss', ['gap', 'disagreement'])
def test_risk_of_one_threshold_for_all_exits(loss):
  shown = data_of(dataclasses.replace(PLAN, target={'risk': 0.05, 'loss': loss})).risk
  assert (shown.loss, shown.epsilon) == (loss, 0.05)
  for name, (logits, labels) in zip(SPLITS, (HELD_OUT, TEST), strict=True):
    curve = shown.curves[name]
    assert np.isnan(shown.thresholds[0]) and curve.speed_up[0] == 1 and curve.risk[0] == 0
    for point in (20, 60, 99):
      threshold = -np.log1p(-shown.thresholds[point])
      plan = dataclasses.replace(PLAN, confidence_thresholds=(threshold * (1 - 1e-9), threshold * (1 - 1e-9), 0.0))
      taken = exits_of(plan, (logits, labels))
      lost = 0
      for image, k in enumerate(taken):
        early, full = logits[k, image].argmax(), logits[2, image].argmax()
        lost += early != full if loss == 'disagreement' else early != labels[image] == full
      assert curve.risk[point] == pytest.approx(lost / len(labels))
      assert curve.speed_up[point] == pytest.approx(60 / np.mean(np.cumsum(OWN)[taken]))
    # At the lowest threshold nearly all images exit at once.
    assert curve.speed_up[-1] == pytest.approx(6, rel=0.05)
    at_first = np.mean(np.array(exits_of(PLAN, (logits, labels))) == 0)
    assert shown.chosen[name].speed_up == pytest.approx(60 / (10 * at_first + 40 * (1 - at_first)))


def test_reliability_on_the_test_split_before_and_after(data):
  logits, labels = TEST
  for k, exit_ in enumerate(data.reliability):
    assert exit_.temperature == PLAN.temperatures[k]
    for bins, temperature in ((exit_.before, 1.0), (exit_.after, PLAN.temperatures[k])):
      powers = np.exp(logits[k].astype(float) / temperature)
      confident = (powers / powers.sum(1, keepdims=True)).max(1)
      right = logits[k].argmax(1) == labels
      inside = [(low / 15 < confident) & (confident <= (low + 1) / 15) for low in range(15)]
      assert bins.counts.tolist() == [each.sum() for each in inside]
      gaps = [abs(confident[each].sum() - right[each].sum()) for each in inside]
      assert bins.ece == pytest.approx(sum(gaps) / len(labels))


def test_the_sheet_shows_the_most_and_the_least_confident_images(data):
  logits, labels = TEST
  sheet, taken = data.sheet, np.array(exits_of(PLAN, TEST))
  assert sheet.exits.tolist() == [0] * 10 + [2] * 10
  assert sheet.hard.tolist() == ([False] * 5 + [True] * 5) * 2
  for k, first in ((0, 0), (2, 10)):
    powers = np.exp(logits[k].astype(float) / PLAN.temperatures[k])
    confident = (powers / powers.sum(1, keepdims=True)).max(1)
    ranking = sorted(np.flatnonzero(taken == k), key=lambda image: -confident[image])
    numbers = [*ranking[:5], *ranking[:-6:-1]]
    rows = slice(first, first + 10)
    assert sheet.numbers[rows].tolist() == numbers
    np.testing.assert_allclose(sheet.probabilities[rows], confident[numbers])
    assert sheet.predictions[rows].tolist() == logits[k, numbers].argmax(1).tolist()
  assert sheet.labels.tolist() == labels[sheet.numbers].tolist()
  assert (sheet.images == IMAGES[sheet.numbers]).all()


def test_few_images_are_shown_once():
  ranked = confidences(TEST[0], 'max_prob', PLAN.temperatures)[0]
  third = np.sort(ranked)[-3]
  sheet = data_of(dataclasses.replace(PLAN, confidence_thresholds=(third - 1e-9, None, 0.0))).sheet
  assert sheet.exits.tolist() == [0] * 3 + [2] * 10
  assert sheet.hard[:3].tolist() == [False, False, True]
  assert sorted(sheet.numbers[:3]) == sorted(np.argsort(ranked)[-3:])


def test_the_family_of_patience():
  plan = dataclasses.replace(PLAN, score='patience', policy='shared', confidence_thresholds=(2.0, 2.0, 0.0), target={})
  data = data_of(plan)
  assert set(data.families) == {'patience', 'oracle'}
  curve = data.families['patience']['test']
  predictions = TEST[0].argmax(-1)
  twice = np.where(predictions[0] == predictions[1], 1, 2)
  np.testing.assert_allclose(curve.cost, [10, np.cumsum(OWN)[twice].mean(), 60])
  np.testing.assert_allclose(data.chosen['test'].cost, curve.cost[1:2])
  assert data.risk.thresholds[1:].tolist() == [2, 1] and data.risk.epsilon is None


def test_a_single_exit():
  plan = full_network_plan(CheckpointId('one', 'toy', 7, 'abc'), (1,), (10,))
  costs = PathCosts(1, lambda before, index: 10.0)
  held_out, test = (Outputs(logits[:1], labels) for logits, labels in (HELD_OUT, TEST))
  data = figure_data(plan, held_out, test, costs, IMAGES, 'abcd', ms=np.array([2.5]), measured='batch size 1')
  assert set(np.concatenate([curves['test'].cost for curves in data.families.values()])) == {10}
  assert data.risk.curves['test'].speed_up.tolist() == [1] and data.shares['test'].tolist() == [1]
  assert (data.ms.tolist(), data.measured) == ([2.5], 'batch size 1')
