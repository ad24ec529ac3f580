"""Tests of the training step on several devices: it must be the step of one device on the same global batch."""

import functools

import chex
import jax
import numpy as np
import optax
import pytest
import tiny

from paranet_jax.devices import pick_devices, place_order, replicated, run_on, shared
from paranet_jax.host.errors import UserError
from paranet_jax.steps import make_train_step, zero_totals

STEPS, BATCH = 2, 16
TARGETS = (0,)
EVERYTHING = tiny.AUGMENTED._replace(cutout=3, mixup=0.5)


def needs(count: int):
  return pytest.mark.skipif(len(jax.devices()) < count, reason=f'needs {count} devices, found {len(jax.devices())}')


class Training:
  """A few steps of a run, fed as `train.py` does; counts how often the step is traced."""

  def __init__(self, count: int):
    self.traces = 0
    self._devices = pick_devices(count)
    self._whole = replicated(self._devices)
    model = tiny.named('PN1-d')
    optimizer = optax.sgd(0.05, 0.9, True)
    self._step = run_on(
      self._devices,
      lambda axis: self._counted(make_train_step(model, optimizer, tiny.objective('PN1-d'), EVERYTHING, axis)),
    )
    self._data = jax.device_put((tiny.images(STEPS * BATCH, model), tiny.labels(STEPS * BATCH)), self._whole)
    self.state = jax.device_put(tiny.state(model, optimizer), self._whole)
    self.totals = self.zeros()

  def _counted(self, inner):
    def step(*arguments):
      self.traces += 1
      return inner(*arguments)

    return step

  def zeros(self):
    return jax.device_put(jax.tree.map(np.asarray, zero_totals(TARGETS)), self._whole)

  def step(self, epoch: int = 0):
    order = np.random.default_rng(epoch).permutation(STEPS * BATCH).astype(np.int32).reshape(STEPS, BATCH)
    order = place_order(jax.numpy.asarray(order), self._devices)
    self.state, self.totals = self._step(self.state, self.totals, *self._data, order)


@functools.cache
def trained(count: int):
  """A training after three steps, over the end of an epoch, and its result."""
  training = Training(count)
  for epoch in (0, 0, 1):
    training.step(epoch)
  return training, jax.device_get((training.state, training.totals))


@needs(4)
def test_several_devices_equal_one():
  training, result = trained(4)
  chex.assert_trees_all_close(result, trained(1)[1], rtol=1e-5, atol=1e-5)
  assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(training.state)} == {4}


@pytest.fixture
def compilations():
  """Grows with every compilation."""
  events = []

  def listen(event, _, **__):
    if event == '/jax/core/compile/backend_compile_duration':
      events.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  jax.jit(lambda x: x + 1)(1.0)
  assert len(events) == 1
  yield events
  jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize('count', [1, pytest.param(4, marks=needs(4))])
def test_one_compilation_and_donated_buffers(count, compilations):
  training, _ = trained(count)
  traces, compiled = training.traces, len(compilations)
  training.step(epoch=1)  # Gives away what the result above still reads, which is therefore copied.
  for epoch in (2, 2):
    given = jax.tree.leaves((training.state, training.totals))
    training.step(epoch)
    assert all(leaf.is_deleted() for leaf in given)
  training.totals = training.zeros()
  training.step(epoch=3)
  assert (training.traces, len(compilations)) == (traces, compiled)
  assert training.state.step == 7


def test_pick_devices():
  count = len(jax.local_devices())
  assert pick_devices(0) == jax.local_devices()
  assert pick_devices(1) == jax.local_devices()[:1]
  with pytest.raises(UserError) as error:
    pick_devices(count + 1)
  assert str(error.value) == (
    f'train.devices asks for {count + 1} devices and {count} are here; set --config.train.devices'
  )


@needs(4)
def test_each_device_has_its_part_of_every_batch():
  order = np.arange(24, dtype=np.int32).reshape(3, 8)
  placed = place_order(jax.numpy.asarray(order), pick_devices(4))
  for shard in placed.addressable_shards:
    place = shard.device.id
    np.testing.assert_array_equal(shard.data, order[None, :, 2 * place : 2 * place + 2])
  np.testing.assert_array_equal(place_order(jax.numpy.asarray(order), pick_devices(1)), order)


@needs(4)
def test_placements():
  devices = pick_devices(4)
  whole, parts = (jax.device_put(np.arange(8), place(devices)) for place in (replicated, shared))
  assert [shard.data.tolist() for shard in whole.addressable_shards] == [list(range(8))] * 4
  assert [shard.data.tolist() for shard in parts.addressable_shards] == [[0, 1], [2, 3], [4, 5], [6, 7]]
