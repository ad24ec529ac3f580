"""`EarlyExit` answers as the full pass does at every exit, and never recompiles; `run_test` covers the walk itself."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from early_samples import exit_taken, softmax

from paranet_jax.costs import abstract_variables, exit_costs
from paranet_jax.early.chunks import Sizes
from paranet_jax.early.exit_plan import CheckpointId, full_network_plan
from paranet_jax.early.path_costs import mac_costs
from paranet_jax.early.runtime import EarlyExit

MODEL = tiny.dense(3)
SHAPE = (2, 2, 3)
MEAN, STD = tiny.PLAIN.mean, tiny.PLAIN.std
EXITS = (1, 2, 3)
TEMPERATURES = (1.5, 0.7, 2.0)
SPLIT = Sizes((1, 4), split=True, wave=6, on_host=True)
WHOLE = Sizes((3, 6), split=False, wave=6, on_host=False)
# Each image has one color, so that images differ after pooling.
IMAGES = np.random.default_rng(3).integers(0, 256, (13, 1, 1, 3), np.uint8).repeat(2, 1).repeat(2, 2)
NORMALIZED = (IMAGES / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
MACS = mac_costs(MODEL, SHAPE, EXITS)
MIXED = (0.7, 0.85, 0.0)


def _undecided(variables):
  """Biases that make every exit's mean logits 0, so that labels differ between images and between exits."""
  params = dict(variables['params'])
  for index, logits in enumerate(jax.jit(MODEL.apply)(variables, NORMALIZED)):
    classifier = params[f'default_heads_{index}']['classifier']
    bias = classifier['bias'] - np.asarray(logits).mean(0)
    params[f'default_heads_{index}'] = {'classifier': classifier | {'bias': bias}}
  return variables | {'params': params}


VARIABLES = _undecided(tiny.filled(abstract_variables(MODEL, SHAPE)))


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


def runtime(sizes=SPLIT, model=MODEL, variables=VARIABLES):
  return EarlyExit(model, variables, plan(MIXED), SHAPE, MEAN, STD, ('a', 'b', 'c'), sizes)


@pytest.fixture(scope='module', params=[SPLIT, WHOLE], ids=['split', 'whole'])
def shared(request):
  """A warm runtime, whose programs the tests share through `with_plan`."""
  early = runtime(request.param)
  early.warm_up()
  return early


@pytest.fixture(scope='module')
def logits():
  """The logits of the full pass, [3, 13, 3]."""
  return np.stack(jax.jit(MODEL.apply)(VARIABLES, NORMALIZED))


def test_nothing_is_traced_after_warm_up(shared):  # The first test, as what others trace would hide what is missing.
  before = shared.num_traces
  # Three stages for 1 and 4 images, or for 1, 3 and 6; and packing from 6 to 3 after two of them.
  assert before == (6 if shared._packing.sizes == SPLIT.sizes else 11)
  for at in (0.0, 0.7, 0.85, 40.0):
    chosen = shared.with_plan(plan((at, at, 0.0)))
    for count in (*range(8), 13):
      chosen.predict(IMAGES[:count])
    chosen.predict_one(IMAGES[0])
    list(chosen.anytime(IMAGES[0], deadline_ms=1e6))
  assert shared.num_traces == before
  shared.with_plan(plan((0.0, 0.0, 0.0))).predict_one(NORMALIZED[0])  # Not warmed up, so the count can rise.
  assert shared.num_traces == before + 1


def test_copies_trace_the_model_once(monkeypatch):
  """Although nothing is warmed up: who sets another budget for each request does not wait for it."""
  counted = []
  for name in ('_classes_of_an_exit', '_macs_in_turn'):
    count = getattr(EarlyExit, name)
    monkeypatch.setattr(EarlyExit, name, lambda self, name=name, count=count: counted.append(name) or count(self))
  early = EarlyExit(MODEL, VARIABLES, plan((0.0, 0.0, 0.0)), IMAGES.shape[1:])
  for at in (0.7, 40.0):
    chosen = early.with_plan(plan((at, at, 0.0)))
    assert (chosen._num_classes, len(chosen._all_macs)) == (3, 3)
  assert sorted(counted) == ['_classes_of_an_exit', '_macs_in_turn']


def test_a_plan_that_visits_all_exits_has_their_costs(monkeypatch):
  def counted(*_):
    raise AssertionError('traced')

  names = ('a', 'b', 'c')
  early = EarlyExit(MODEL, VARIABLES, plan((0.0, 0.0, 0.0)), IMAGES.shape[1:], class_names=names)
  skipping = EarlyExit(MODEL, VARIABLES, plan((None, 0.0, 0.0)), IMAGES.shape[1:])
  expected = skipping._all_macs
  monkeypatch.setattr('paranet_jax.early.runtime.mac_costs', counted)
  monkeypatch.setattr(EarlyExit, '_classes_of_an_exit', counted)
  assert early._all_macs == expected and early._num_classes == 3


def test_nothing_is_compiled_after_warm_up():
  # Restored variables are committed to a device and packed rows are not, which could compile two programs.
  early = runtime(variables=jax.device_put(VARIABLES, jax.devices()[0]))
  early.warm_up()
  events = []

  def listen(event, seconds, **_):
    events.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    for count in (1, 3, 6, 13):
      early.predict(IMAGES[:count])
    early.predict_one(IMAGES[0])
    list(early.anytime(IMAGES[0], deadline_ms=1e6))
    assert events == []
    jax.jit(lambda number: number + 1)(np.float32(len(events)))
    assert events
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
  ('score', 'thresholds', 'reached'),
  [
    ('max_prob', (0.0, 0.0, 0.0), {0}),
    ('max_prob', MIXED, {0, 1, 2}),
    ('max_prob', (None, 0.85, 0.0), {1, 2}),
    ('max_prob', (0.7, None, 0.0), {0, 2}),
    ('max_prob', (None, None, 0.0), {2}),
    ('entropy', (0.1, 0.14, 0.0), {0, 1, 2}),
    ('margin', (0.2, 0.43, 0.0), {0, 1, 2}),
    ('patience', (2, 2, 0.0), {1, 2}),
    ('patience', (None, 2, 0.0), {1, 2}),
  ],
)
def test_equals_the_full_pass(shared, logits, score, thresholds, reached):
  early = shared.with_plan(plan(thresholds, score))
  found = early.predict(IMAGES)
  exits = [exit_taken(logits[:, i], thresholds, score, TEMPERATURES, range(3)) for i in range(13)]
  assert set(exits) == reached
  np.testing.assert_array_equal(found.exits, np.array(exits) + 1)
  np.testing.assert_array_equal(found.macs, [early.plan.macs[k] for k in exits])
  np.testing.assert_array_equal(found.labels, [logits[k, i].argmax() for i, k in enumerate(exits)])
  expected = [softmax(logits[k, i], TEMPERATURES[k]) for i, k in enumerate(exits)]
  np.testing.assert_allclose(found.probabilities, expected, rtol=1e-5)
  one = [early.predict_one(image) for image in IMAGES]
  assert [(row.label, row.exit, row.macs) for row in one] == [*zip(found.labels, found.exits, found.macs, strict=True)]
  np.testing.assert_allclose([row.probabilities for row in one], found.probabilities, rtol=1e-5, atol=1e-7)


def test_thresholds_and_budgets_replace_the_plan(shared):
  every = shared.with_thresholds(MIXED)
  exits = shared.predict(IMAGES).exits
  np.testing.assert_array_equal(every.predict(IMAGES).exits, exits)
  second = every.with_budget(every.macs[2])
  np.testing.assert_array_equal(second.predict(IMAGES).exits, np.minimum(exits, 2))
  assert set(shared.with_threshold(1).predict(IMAGES).exits) == {3}
  assert second.with_plan(plan((None, None, 0.0))).predict_one(IMAGES[0]).exit == 3


@pytest.mark.parametrize('count', [0, 1, 2, 5, 6, 7, 12, 13])
def test_any_batch_size_and_type_of_array(shared, count):
  whole, images, normalized = shared.predict(IMAGES), IMAGES[:count], NORMALIZED[:count]
  for given in (images, jnp.asarray(images), normalized, normalized.astype(np.float64)):
    found = shared.predict(given)
    np.testing.assert_array_equal(found.exits, whole.exits[:count])
    np.testing.assert_array_equal(found.labels, whole.labels[:count])
    np.testing.assert_allclose(found.probabilities, whole.probabilities[:count], rtol=1e-4, atol=1e-6)
    assert found.probabilities.shape == (count, 3) and found.macs.shape == (count,)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_half_precision_images(shared, dtype):
  images = NORMALIZED.astype(dtype)
  found = shared.predict(jnp.asarray(images))
  np.testing.assert_array_equal(found.labels, shared.predict(images.astype(np.float32)).labels)


def test_threads():
  early = runtime()
  with ThreadPoolExecutor(4) as pool:  # Nothing is compiled yet.
    cold = list(pool.map(early.predict, [IMAGES] * 4))
  whole = early.predict(IMAGES)
  assert all(np.array_equal(found.labels, whole.labels) for found in cold)

  def predict(first):
    return first, early.predict(IMAGES[first:]), early.predict_one(IMAGES[first])

  with ThreadPoolExecutor(4) as pool:
    for first, found, one in pool.map(predict, [*range(13)] * 2):
      np.testing.assert_array_equal(found.exits, whole.exits[first:])
      np.testing.assert_array_equal(found.labels, whole.labels[first:])
      assert (one.label, one.exit) == (whole.labels[first], whole.exits[first])


def test_anytime(shared, logits):
  answers = list(shared.anytime(IMAGES[0]))
  assert [answer.exit for answer in answers] == [1, 2, 3]
  assert [answer.label for answer in answers] == logits[:, 0].argmax(-1).tolist()
  assert [answer.macs for answer in answers] == [cost['macs'] for cost in exit_costs(MODEL, SHAPE)]


def test_a_plan_with_other_exits(shared):
  with pytest.raises(ValueError) as error:
    shared.with_plan(dataclasses.replace(shared.plan, exits=(1, 3)))
  assert str(error.value) == 'expected a plan of the exits (1, 2, 3), found (1, 3)'


def test_floats_that_no_pixels_have(shared):
  for images in (IMAGES / 255, IMAGES.astype(np.float32), np.full_like(NORMALIZED, np.nan)):
    for given in (images, jnp.asarray(images, jnp.bfloat16)):
      with pytest.raises(ValueError, match='expected uint8 images, or floats .* found '):
        shared.predict(given)
  with pytest.raises(ValueError, match=r'which are from -\d.* to \d.*, found 0.* to '):
    shared.predict_one(np.linspace(0, 1, NORMALIZED[0].size).reshape(NORMALIZED[0].shape))


def test_bfloat16():
  model = tiny.dense(3, jnp.bfloat16)
  whole = np.stack(jax.jit(model.apply)(VARIABLES, NORMALIZED))
  found = runtime(model=model).predict(IMAGES)
  assert set(found.exits) == {1, 2, 3}
  expected = [softmax(whole[k - 1, i], TEMPERATURES[k - 1]) for i, k in enumerate(found.exits)]
  np.testing.assert_allclose(found.probabilities, expected, atol=0.03)
