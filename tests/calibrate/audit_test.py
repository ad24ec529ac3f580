"""The audit of a plan: the smoothed exits, the attack and what is measured, on dense layers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from early_samples import softmax

from paranet_jax.calibrate import audit as audit_lib
from paranet_jax.calibrate.audit import Attacked, audit, smooth_confidence
from paranet_jax.calibrate.summary_text import _audit
from paranet_jax.costs import abstract_variables
from paranet_jax.data.dataset import Split
from paranet_jax.early.exit_plan import CheckpointId, full_network_plan
from paranet_jax.portable.run import confidence
from paranet_jax.steps import Preprocessing

IMAGE = (2, 2, 3)
MODEL = tiny.dense(3)
VARIABLES = tiny.filled(abstract_variables(MODEL, IMAGE))
PREPROCESSING = Preprocessing((0.5,) * 3, (0.1,) * 3, crop_padding=0, flip=False)
IMAGES = np.random.default_rng(0).integers(0, 256, (30, *IMAGE), np.uint8)
LABELS = np.random.default_rng(1).integers(0, tiny.NUM_CLASSES, 30)
PLAN = dataclasses.replace(
  full_network_plan(CheckpointId('dense', 'noise', 1, ''), (1, 2, 3), (10, 20, 30)),
  policy='shared',
  target={'threshold': 0.6},
  temperatures=(0.8, 1.0, 1.25),
  thresholds=(0.6, None, 0.0),
  confidence_thresholds=(float(-np.log(0.4)), None, 0.0),
  visited=(1, 3),
  macs=(10, None, 32),
  ms=(0.5, None, 1.5),
  expected={'cost_macs': 20.0},
)


@pytest.fixture(scope='module')
def attacked():
  return Attacked(PLAN, MODEL, VARIABLES, PREPROCESSING)


@pytest.mark.parametrize('score', ['max_prob', 'entropy', 'margin'])
def test_smooth_confidences_are_those_of_the_runtime(score):
  logits = np.random.default_rng(2).normal(0, 3, (50, 4)).astype(np.float32)
  np.testing.assert_allclose(smooth_confidence(jnp.asarray(logits), score), confidence(logits, score), rtol=2e-4)


def test_the_expected_cost(attacked):
  logits = np.random.default_rng(3).normal(0, 2, (2, 4, 3)).astype(np.float32)
  found = attacked._smooth_cost(jnp.asarray(logits))
  for row, cost in enumerate(np.asarray(found)):
    sure = -np.log(1 - softmax(logits[0, row], 0.8).max())
    leaves = 1 / (1 + np.exp(-(sure + np.log(0.4))))
    assert cost == pytest.approx(leaves * 10 / 32 + (1 - leaves), rel=1e-5)


def test_no_image_goes_past_a_threshold_of_0():
  at = (float(-np.log(0.4)), 0.0, 0.0)
  capped = dataclasses.replace(PLAN, confidence_thresholds=at, visited=(1, 2, 3), macs=(10, 20, 32))
  logits = jnp.asarray(np.random.default_rng(3).normal(0, 2, (3, 8, 3)), jnp.float32)
  assert Attacked(capped, MODEL, VARIABLES, PREPROCESSING)._smooth_cost(logits).max() < 20 / 32


def test_the_expected_cost_with_patience():
  at = (2.0, 2.0, 0.0)
  changes = {'score': 'patience', 'thresholds': at, 'confidence_thresholds': at, 'visited': (1, 2, 3)}
  other = Attacked(dataclasses.replace(PLAN, macs=(10, 20, 32), **changes), MODEL, VARIABLES, PREPROCESSING)
  logits = np.random.default_rng(4).normal(0, 2, (3, 1, 3)).astype(np.float32)
  first, second = softmax(logits[0, 0], 0.8), softmax(logits[1, 0], 1.0)
  agree = first @ second  # No image leaves at the first exit; at the second, those with two equal answers.
  assert other._smooth_cost(jnp.asarray(logits))[0] == pytest.approx(agree * 20 / 32 + 1 - agree, rel=1e-5)


def test_the_attack_stays_near_and_never_makes_an_image_cheaper(attacked):
  slowed = attacked.slowed(IMAGES, within=5, steps=4)
  assert slowed.dtype == np.uint8 and np.abs(slowed.astype(int) - IMAGES).max() == 5
  before, after = (attacked.macs[attacked.outcome(attacked.logits(each))[0]] for each in (IMAGES, slowed))
  assert (after >= before).all() and 10 < before.mean() < after.mean()
  np.testing.assert_array_equal(attacked.slowed(IMAGES, within=0, steps=1), IMAGES)


def test_what_is_measured(monkeypatch, attacked):
  monkeypatch.setattr(audit_lib, '_BATCH', 16)
  monkeypatch.setattr(audit_lib, 'STEPS', 2)
  monkeypatch.setattr(audit_lib, 'CORRUPTIONS', dict(list(audit_lib.CORRUPTIONS.items())[:3]))
  lines = []
  arguments = MODEL, VARIABLES, PREPROCESSING, Split(IMAGES, LABELS), LABELS
  found = audit(PLAN, *arguments, say=lines.append)
  taken, answers = attacked.outcome(attacked.logits(IMAGES))
  clean = found['clean']
  assert clean['shares'] == pytest.approx([np.mean(taken == 0), 0, np.mean(taken == 1)])
  assert clean['cost_macs'] == pytest.approx(attacked.macs[taken].mean())
  assert clean['cost_ms'] == pytest.approx(np.array([0.5, 1.5])[taken].mean()) and 'cost_joules' not in clean
  assert clean['accuracy'] == pytest.approx(np.mean(answers == LABELS))
  assert (found['images'], found['most_macs'], len(found['corruptions'])) == (30, 32, 3)
  assert found['hardest'] == max(found['corruptions'], key=lambda row: row['cost_macs'])
  assert found['attack']['cost_macs'] >= clean['cost_macs']
  assert lines == ['auditing 30 test images in 3 corruptions and under a slowdown attack']
  monkeypatch.setattr(audit_lib, 'IMAGES', 9)
  assert audit(PLAN, *arguments, kind='agreement')['images'] == 9


def test_what_is_printed():
  costs = {'clean': 15.0, 'hardest': 24.0, 'attack': 30.0}
  rows = {name: {'cost_macs': cost, 'accuracy': 0.5} for name, cost in costs.items()}
  rows['hardest']['name'] = 'noise, deviation 40 of 255'
  found = {'images': 1000, 'within': 8, 'most_macs': 32.0, 'corruptions': [{}] * 13, **rows}
  (text,) = _audit(dataclasses.replace(PLAN, audit=found))
  assert text.splitlines() == [
    'audit on 1,000 test images (calibration promises a speed-up of 1.50 x over exit 3)',
    'mean of an image                                      multiply-adds  factor  speed-up  accuracy (%)',
    'as they are                                                      15    1.00    2.00 x         50.00',
    'worst of 13 corruptions (noise, deviation 40 of 255)             24    1.60    1.25 x         50.00',
    'slowdown attack, at most 8 of 255 a pixel                        30    2.00    1.00 x         50.00',
    'the most expensive exit for all                                  32    2.13    0.94 x             —',
  ]
  assert list(_audit(PLAN)) == []
