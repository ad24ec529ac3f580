"""EarlyExit answers like the full pass, wherever samples exit, and never recompiles; `run_test` covers the walker."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from paranet_jax.costs import exit_costs
from paranet_jax.early.chunks import Sizes
from paranet_jax.early.exit_plan import CheckpointId, full_network_plan
from paranet_jax.early.path_costs import mac_costs
from paranet_jax.early.runtime import EarlyExit

MODEL = tiny.network(3)
SHAPE = (tiny.SIDE, tiny.SIDE, 3)
MEAN, STD = tiny.PLAIN.mean, tiny.PLAIN.std
EXITS = (1, 2, 3)
TEMPERATURES = (1.5, 0.7, 2.0)
SPLIT = Sizes((1, 4), split=True, wave=6, on_host=True)
WHOLE = Sizes((3, 6), split=False, wave=6, on_host=False)
# Of one color each, so that they differ after pooling.
IMAGES = np.random.default_rng(3).integers(0, 256, (13, 1, 1, 3), np.uint8).repeat(8, 1).repeat(8, 2)
NORMALIZED = (IMAGES / np.float32(255) - np.float32(MEAN)) / np.float32(STD)


def _undecided(variables):
  """Biases that make every exit's mean logits 0, so that labels differ between images and between exits."""
  params = dict(variables['params'])
  for number, logits in enumerate(MODEL.apply(variables, NORMALIZED), 1):
    classifier = params[f'exit_{number}']['classifier']
    bias = classifier['bias'] - np.asarray(logits).mean(0)
    params[f'exit_{number}'] = params[f'exit_{number}'] | {'classifier': classifier | {'bias': bias}}
  return variables | {'params': params}


VARIABLES = _undecided(tiny.variables(MODEL))
MACS = mac_costs(MODEL, SHAPE, EXITS)


def plan(thresholds, score='max_prob'):
  """Thresholds on the confidence scale; None: no exit. With patience every stage is run."""
  path = tuple(k for k, at in enumerate(thresholds) if at is not None or score == 'patience')
  costs = dict(zip(path, MACS.cumulative(path), strict=True))
  full = full_network_plan(CheckpointId('PN3-ddd', 'digits', 1, ''), EXITS, [int(cost) for cost in MACS.alone()])
  return dataclasses.replace(
    full,
    score=score,
    temperatures=TEMPERATURES,
    confidence_thresholds=tuple(thresholds),
    visited=tuple(EXITS[k] for k in path),
    macs=tuple(int(costs[k]) if k in costs else None for k in range(3)),
  )


@pytest.fixture(scope='module', params=[SPLIT, WHOLE], ids=['split', 'whole'])
def shared(request):
  """A warm runtime, whose programs the tests share through `with_plan`."""
  runtime = EarlyExit(MODEL, VARIABLES, plan((0.75, 1.7, 0.0)), SHAPE, MEAN, STD, ('a', 'b', 'c'), request.param)
  runtime.warm_up()
  return runtime


@pytest.fixture(scope='module')
def logits():
  """Of the full pass: float64 [3, 13, 3]."""
  return np.stack(MODEL.apply(VARIABLES, NORMALIZED)).astype(np.float64)


def _scores(logits, score, temperature):
  """Of one sample, straight from the definitions: -log(1 - score)."""
  powers = np.exp((logits - logits.max()) / temperature)
  p = np.sort(powers / powers.sum())[::-1]
  value = {'max_prob': p[0], 'entropy': 1 + (p * np.log(p)).sum() / np.log(len(p)), 'margin': p[0] - p[1]}[score]
  return -np.log1p(-value)


def _expected(logits, thresholds, score):
  """The exit index and label of each sample, one at a time."""
  exits = []
  for sample in logits.transpose(1, 0, 2):
    streak, before, taken = 0, None, 2
    for k in range(2):
      label = sample[k].argmax()
      streak, before = (streak + 1 if label == before else 1), label
      sure = streak if score == 'patience' else _scores(sample[k], score, TEMPERATURES[k])
      if thresholds[k] is not None and sure >= thresholds[k]:
        taken = k
        break
    exits.append(taken)
  return np.array(exits), logits[exits, np.arange(logits.shape[1])].argmax(-1)


CASES = [
  ('max_prob', (0.0, 0.0, 0.0)),
  ('max_prob', (0.75, 1.7, 0.0)),
  ('max_prob', (None, 1.7, 0.0)),
  ('max_prob', (0.75, None, 0.0)),
  ('max_prob', (None, None, 0.0)),
  ('entropy', (0.08, 0.8, 0.0)),
  ('margin', (0.27, 1.2, 0.0)),
  ('patience', (2, 2, 0.0)),
  ('patience', (None, 2, 0.0)),
]


def test_nothing_is_traced_after_warm_up(shared):  # The first test: what others trace would hide what is missing.
  runtime, before = shared.with_plan(shared.plan), shared.num_traces
  # Three stages for one image and for 4, or for one, 3 and 6; and packing from 6 to 3 after two of them.
  assert before == (6 if runtime._packing.sizes == SPLIT.sizes else 11)
  for at in (0.0, 0.6, 0.75, 1.0, 40.0):
    chosen = shared.with_plan(plan((at, at, 0.0)))
    for count in (*range(8), 13):
      chosen.predict(IMAGES[:count])
    chosen.predict_one(IMAGES[0])
    list(chosen.anytime(IMAGES[0], deadline_ms=1e6))
  assert shared.num_traces == before
  shared.with_plan(plan((0.0, 0.0, 0.0))).predict_one(NORMALIZED[0])  # Not what was warmed up: the count can rise.
  assert shared.num_traces == before + 1


def test_nothing_is_compiled_after_warm_up():
  # Restored variables are committed to a device, and packed rows are not: two programs, if the runtime let them be.
  committed = jax.device_put(VARIABLES, jax.devices()[0])
  runtime = EarlyExit(MODEL, committed, plan((0.75, 1.7, 0.0)), SHAPE, MEAN, STD, sizes=SPLIT)
  runtime.warm_up()
  events = []

  def listen(event, seconds, **_):
    events.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    for count in (1, 3, 6, 13):
      runtime.predict(IMAGES[:count])
    runtime.predict_one(IMAGES[0])
    list(runtime.anytime(IMAGES[0], deadline_ms=1e6))
    assert events == []
    jax.jit(lambda number: number + 1)(np.float32(len(events)))
    assert events
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(('score', 'thresholds'), CASES)
def test_equals_the_full_pass(shared, logits, score, thresholds):
  runtime = shared.with_plan(plan(thresholds, score))
  found = runtime.predict(IMAGES)
  exits, labels = _expected(logits, thresholds, score)
  np.testing.assert_array_equal(found.exits, exits + 1)
  np.testing.assert_array_equal(found.labels, labels)
  # The calibrated log-probabilities are the logits but for a constant: within 1e-5 of the largest logit.
  taken = logits[exits, np.arange(13)] / np.array(TEMPERATURES)[exits][:, None]
  log_probabilities = np.log(found.probabilities.astype(np.float64))
  difference = log_probabilities - taken
  assert np.ptp(difference, axis=1).max() <= 1e-5 * np.abs(logits).max() + 1e-6
  np.testing.assert_array_equal(found.macs, [runtime.plan.macs[k] for k in exits])
  one = [runtime.predict_one(image) for image in IMAGES]
  assert [(row.label, row.exit, row.macs) for row in one] == [*zip(labels, exits + 1, found.macs, strict=True)]
  np.testing.assert_allclose([row.probabilities for row in one], found.probabilities, rtol=1e-5, atol=1e-7)


def test_the_cases_exit_everywhere(logits):
  mixed = [score for score, thresholds in CASES if set(_expected(logits, thresholds, score)[0]) == {0, 1, 2}]
  assert mixed == ['max_prob', 'entropy', 'margin']
  assert set(_expected(logits, (2, 2, 0.0), 'patience')[0]) == {1, 2}


def test_thresholds_and_budgets_in_place_of_the_plan(shared):
  every = shared.with_thresholds((0.75, 1.7, 0.0))
  np.testing.assert_array_equal(
    every.predict(IMAGES).exits, shared.with_plan(plan((0.75, 1.7, 0.0))).predict(IMAGES).exits
  )
  second = every.with_budget(every.macs[2])
  np.testing.assert_array_equal(second.predict(IMAGES).exits, np.minimum(every.predict(IMAGES).exits, 2))
  assert set(shared.with_threshold(1).predict(IMAGES).exits) == {3}
  assert second.with_plan(plan((None, None, 0.0))).predict_one(IMAGES[0]).exit == 3


@pytest.mark.parametrize('count', [0, 1, 2, 5, 6, 7, 12, 13])
def test_any_batch_size_and_kind_of_array(shared, count):
  whole, images = shared.predict(IMAGES), IMAGES[:count]
  normalized = NORMALIZED[:count]
  for given in (images, jnp.asarray(images), normalized, normalized.astype(np.float64)):
    found = shared.predict(given)
    np.testing.assert_array_equal(found.exits, whole.exits[:count])
    np.testing.assert_array_equal(found.labels, whole.labels[:count])
    np.testing.assert_allclose(found.probabilities, whole.probabilities[:count], rtol=1e-4, atol=1e-6)
    assert found.probabilities.shape == (count, 3) and found.macs.shape == (count,)


def test_stages_that_no_sample_needs_are_not_run(shared, monkeypatch):
  run = []
  stages = {number: lambda *args, number=number, stage=stage: run.append(number) or stage(*args)
            for number, stage in shared._stages.items()}  # fmt: skip
  monkeypatch.setattr(shared, '_stages', stages)
  for thresholds, score, numbers in (
    ((None, None, 0.0), 'max_prob', {3}),
    ((None, 40.0, 0.0), 'max_prob', {2, 3}),
    ((0.0, 0.3, 0.0), 'max_prob', {1}),
    ((None, None, 0.0), 'patience', {1, 2, 3}),
  ):
    run.clear()
    shared.with_plan(plan(thresholds, score)).predict(IMAGES)
    assert set(run) == numbers


def test_threads():
  runtime = EarlyExit(MODEL, VARIABLES, plan((0.75, 1.7, 0.0)), SHAPE, MEAN, STD, sizes=SPLIT)
  with ThreadPoolExecutor(4) as pool:  # While nothing is compiled yet.
    cold = list(pool.map(runtime.predict, [IMAGES] * 4))
  whole = runtime.predict(IMAGES)
  assert all(np.array_equal(found.labels, whole.labels) for found in cold)

  def predict(first):
    return first, runtime.predict(IMAGES[first:]), runtime.predict_one(IMAGES[first])

  with ThreadPoolExecutor(4) as pool:
    for first, found, one in pool.map(predict, [*range(13)] * 2):
      np.testing.assert_array_equal(found.exits, whole.exits[first:])
      np.testing.assert_array_equal(found.labels, whole.labels[first:])
      assert (one.label, one.exit) == (whole.labels[first], whole.exits[first])


def test_anytime(shared, logits):
  costs = exit_costs(MODEL, SHAPE)
  for place in range(3):
    answers = list(shared.anytime(IMAGES[place]))
    assert [answer.exit for answer in answers] == [1, 2, 3]
    assert [answer.label for answer in answers] == logits[:, place].argmax(-1).tolist()
    assert [answer.macs for answer in answers] == [cost['macs'] for cost in costs]


def test_a_plan_of_other_exits(shared):
  with pytest.raises(ValueError) as error:
    shared.with_plan(dataclasses.replace(shared.plan, exits=(1, 3)))
  assert str(error.value) == 'expected a plan of the exits (1, 2, 3), found (1, 3)'


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, np.float64])
def test_images_of_any_floating_point(shared, dtype):
  images = NORMALIZED.astype(dtype)
  found = shared.predict(jnp.asarray(images))
  np.testing.assert_array_equal(found.labels, shared.predict(images.astype(np.float32)).labels)


def test_bfloat16():
  model = tiny.network(3, dtype=jnp.bfloat16)
  runtime = EarlyExit(model, VARIABLES, plan((0.75, 1.7, 0.0)), SHAPE, MEAN, STD, sizes=SPLIT)
  whole = np.stack(jax.jit(model.apply)(VARIABLES, NORMALIZED))
  found = runtime.predict(IMAGES)
  assert len(set(found.exits)) > 1
  taken = whole[found.exits - 1, np.arange(13)] / np.array(TEMPERATURES)[found.exits - 1][:, None]
  powers = np.exp(taken - taken.max(-1, keepdims=True))
  np.testing.assert_allclose(found.probabilities, powers / powers.sum(-1, keepdims=True), atol=0.03)
