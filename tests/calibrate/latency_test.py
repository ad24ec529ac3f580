"""How latency is measured, on a fake clock."""

import itertools

import jax
import numpy as np
import pytest
import tiny

from paranet_jax.calibrate import latency
from paranet_jax.calibrate.latency import EnergyCosts, LatencyCosts, latency_record, median_seconds
from paranet_jax.costs import abstract_variables
from paranet_jax.early.chunks import cover, default_sizes
from paranet_jax.host.machine import cpu_name

IMAGE = (2, 2, 3)
MODEL = tiny.dense(3)
VARIABLES = tiny.filled(abstract_variables(MODEL, IMAGE))


@pytest.fixture
def timed(monkeypatch):
  """Collects (rows, score, runs) of what is timed; a stage takes 1 ms per row."""
  calls = []

  def pretended(function, runs):
    _, (images, _), score = function.args
    calls.append((len(images), score, runs))
    return len(images) * 1e-3

  monkeypatch.setattr(latency, 'median_seconds', pretended)
  return calls


def test_the_median_of_the_timed_calls(monkeypatch):
  calls, clock = itertools.count(), iter([0, 5, 10, 11, 20, 22])
  monkeypatch.setattr(latency.time, 'perf_counter', lambda: next(clock))
  assert median_seconds(lambda: next(calls), runs=3) == 2  # Of 5, 1 and 2.
  assert next(calls) == 6  # Three warm-up calls first, before the clock is read.


def test_the_clock_waits_for_the_result(monkeypatch):
  waited = []
  monkeypatch.setattr(jax, 'block_until_ready', waited.append)
  median_seconds(lambda: 'result', runs=2)
  assert waited == ['result'] * 5


@pytest.mark.parametrize('batch_size', [1, 4, 70])
def test_a_batch_takes_the_sizes_that_the_runtime_computes(timed, batch_size):
  costs = LatencyCosts(MODEL, VARIABLES, IMAGE, (1, 3), batch_size, runs=7)
  sizes = cover(batch_size, default_sizes())
  # A stage takes 1 ms per row, so an image takes 1 ms, and more where rows are padding.
  np.testing.assert_allclose(costs.cumulative((0, 1)), np.array([1, 2]) * sum(sizes) / batch_size)
  distinct = list(dict.fromkeys(sizes))
  assert timed == [(size, score, 7) for score in ('max_prob', None) for size in distinct]


@pytest.mark.parametrize(('score', 'times'), [('entropy', 4), ('patience', 0)])  # Patience compares answers.
def test_a_stage_is_measured_with_the_ranking_after_it(monkeypatch, score, times):
  ranked = []
  monkeypatch.setattr(latency, 'confidence', lambda logits, score: ranked.append((type(logits), score)))
  costs = LatencyCosts(MODEL, VARIABLES, IMAGE, (1, 3), 1, score=score, runs=1)
  costs.cumulative((0, 1))
  assert ranked == [(np.ndarray, score)] * times  # Three warm-up runs and one; the last exit ranks nothing.


def test_the_measured_stage_is_the_stage():
  images = np.random.default_rng(0).integers(0, 256, (2, *IMAGE), np.uint8)
  stages = LatencyCosts(MODEL, VARIABLES, IMAGE, (1, 3), 2)._stages
  _, carry = latency.compiled_stage(stages, 0)(images, {})
  logits, _ = latency.compiled_stage(stages, 1)(images, carry)
  expected = jax.jit(MODEL.apply)(VARIABLES, images.astype(np.float32))[2]
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_what_is_recorded(timed):
  record = latency_record(LatencyCosts(MODEL, VARIABLES, IMAGE, (1, 2), 4, runs=5))
  assert record['device'] == jax.local_devices()[0].device_kind and record['cpu'] == cpu_name()
  assert record['runs'] == 5 and record['date'].endswith('+00:00')
  assert record['batch_sizes'] == [{'batch_size': 4, 'ms_stages': [1.0, 1.0], 'ms_alone': [1.0, 1.0]}]


def test_joules_are_recorded_beside_milliseconds(timed):
  class Told:
    sources = ('package-0',)

    def a_call(self, function, seconds):
      assert seconds == latency.ENERGY_SECONDS and not function()  # Nothing is carried on after the last stage.
      return 0.25

  ms = LatencyCosts(MODEL, VARIABLES, IMAGE, (3,), 1)
  joules = EnergyCosts(Told(), MODEL, VARIABLES, IMAGE, (3,), 1)
  record = latency_record(ms, joules)
  assert record['energy'] == ['package-0'] and 'energy' not in latency_record(ms)
  assert record['batch_sizes'] == [
    {'batch_size': 1, 'ms_stages': [1.0], 'ms_alone': [1.0], 'joules_stages': [0.25], 'joules_alone': [0.25]}
  ]


@pytest.mark.parametrize(
  ('text', 'name'),
  [('processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: Other\n', 'Some CPU @ 2 GHz'), ('flags : a', None)],
)
def test_the_name_of_the_processor(tmp_path, text, name):
  path = tmp_path / 'cpuinfo'
  assert cpu_name(path)
  path.write_text(text)
  assert cpu_name(path) == name or name is None and cpu_name(path) == cpu_name(tmp_path / 'none')
