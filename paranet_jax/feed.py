"""What each training step reads: the whole training set on the devices, or one streamed batch after another."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paranet_jax import devices as devices_lib
from paranet_jax.data.dataset import Split
from paranet_jax.host.machine import Device
from paranet_jax.steps import TrainState, zero_totals
from paranet_jax.targets import Phase
from paranet_jax.task import Task

StepData = tuple[Any, jax.Array, jax.Array]
"""Images (or kept features), labels and order (see `steps.make_train_step`)."""

Feed = Callable[[int], StepData]
"""Returns the data of a step, given its number; steps come in turn."""


def images_axis(task: Task) -> int | None:
  """The axis of images and labels that is split over several devices (see `devices.run_on`)."""
  return 0 if task.streams else None


@contextlib.contextmanager
def open_feed(
  task: Task,
  devices: list[Device],
  order: Callable[[int], jax.Array],
  first_step: int,
  variables: Any,
  check: Callable[[], None] = lambda: None,
) -> Iterator[Feed]:
  """Opens the feed of a run that starts or resumes at `first_step`.

  Args:
    order: returns the placed order of an epoch; not used for images that are streamed.
    variables: of the run, whose frozen part computes the features that are kept, if any.
    check: called before every batch of these features; may raise in the first step.
  """
  train, config = task.dataset.train, task.config
  if task.keeps_features:
    yield _features_feed(task, devices, functools.lru_cache(maxsize=1)(order), variables, check)
    return
  if not train.streamed:
    images, labels = placed(train, devices)
    order = functools.lru_cache(maxsize=1)(order)
    yield lambda step: (images, labels, order(step // task.steps_per_epoch))
    return
  from paranet_jax.data.stream import Stream, TrainBatches  # grain takes half a second to import.

  here, place = devices_lib.of_this_process(devices), devices_lib.one_or_shared(devices)
  batches = TrainBatches(
    train,
    seed=config.seed,
    batch_size=config.train.batch_size,
    total_steps=task.total_steps,
    first_step=first_step,
    num_devices=None if len(devices) == 1 else len(here),
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  counting = jax.device_put(_counting(task, len(devices), len(here)), place)
  with Stream(batches, config.data.workers, place) as placed_batches:

    def feed(_: int) -> StepData:
      batch = next(placed_batches)
      return batch['images'], batch['labels'], counting

    yield feed


def _features_feed(
  task: Task, devices: list[Device], order: Callable[[int], jax.Array], variables: Any, check: Callable[[], None]
) -> Feed:
  train, steps, place = task.dataset.train, task.steps_per_epoch, devices_lib.one_or_shared(devices)

  @functools.cache
  def kept() -> tuple[Any, Any]:  # At the first step: a run that is at its end needs none.
    features = task.keep_features(train, variables, 'training', check)
    return (features, np.asarray(train.labels)) if task.streams else placed(train, devices, features)

  def whole(step: int) -> StepData:
    return *kept(), order(step // steps)

  def streamed(step: int) -> StepData:
    rows = np.asarray(order(step // steps))[..., step % steps, :]
    return *jax.device_put(jax.tree.map(lambda leaf: leaf[rows], kept()), place), counting

  if not task.streams:
    return whole
  counting = jax.device_put(_counting(task, len(devices), len(devices_lib.of_this_process(devices))), place)
  return streamed


def placed(split: Split, devices: list[Device], features: Any = None) -> tuple[Any, jax.Array]:
  """Images, or else these features of them, and labels of a split that is in memory, on every device."""
  images = np.asarray(split.images) if features is None else features
  return jax.device_put((images, np.asarray(split.labels)), devices_lib.replicated(devices))


def _counting(task: Task, count: int, here: int) -> np.ndarray:
  """The order of streamed batches on `here` of `count` devices: a device gets no more than its share, in order."""
  share = task.config.train.batch_size // count
  axis = () if count == 1 else (here,)
  return np.broadcast_to(np.arange(share, dtype=np.int32), (*axis, task.steps_per_epoch, share))


def step_data_shapes(task: Task, count: int) -> tuple[Any, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
  """Shapes of a step's data on `count` devices of one process."""
  train, share = task.dataset.train, task.config.train.batch_size // count
  axis, image = () if count == 1 else (count,), jax.ShapeDtypeStruct(train.images.shape, jnp.uint8)
  many = (*axis, share) if task.streams else (len(train),)
  return (
    jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct((*many, *leaf.shape[1:]), leaf.dtype),
      task.feature_shapes(train) if task.keeps_features else image,
    ),
    jax.ShapeDtypeStruct(many, jnp.int32),
    jax.ShapeDtypeStruct((*axis, task.steps_per_epoch, share), jnp.int32),
  )


def step_data(task: Task, devices: list[Device]) -> StepData:
  """Data of one step without reading ahead or shuffling, to time the step alone."""
  train, batch_size = task.dataset.train, task.config.train.batch_size
  if task.keeps_features:  # Their values do not change the time.
    *shapes, _ = step_data_shapes(task, len(devices))
    place = devices_lib.one_or_shared(devices) if task.streams else devices_lib.replicated(devices)
    data = jax.device_put(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tuple(shapes)), place)
    if task.streams:
      return *data, jax.device_put(_counting(task, len(devices), len(devices)), devices_lib.one_or_shared(devices))
    rows = np.arange(task.steps_per_epoch * batch_size, dtype=np.int32).reshape(task.steps_per_epoch, -1)
    return *data, devices_lib.place_order(rows, devices)
  if train.streamed:
    images, labels, _ = step_data_shapes(task, len(devices))
    chosen = np.arange(batch_size)
    batch = train.images[chosen].reshape(images.shape), train.labels[chosen].reshape(labels.shape)
    counting = _counting(task, len(devices), len(devices))
    return jax.device_put((*batch, counting), devices_lib.one_or_shared(devices))
  rows = np.arange(task.steps_per_epoch * batch_size, dtype=np.int32).reshape(task.steps_per_epoch, -1)
  return *placed(train, devices), devices_lib.place_order(rows, devices)


def time_steps(
  train_step: Callable[..., tuple[TrainState, Any]],
  task: Task,
  devices: list[Device],
  phase: Phase,
  *,
  seconds: float = 3.0,
  most: int = 50,
) -> tuple[float, float, TrainState]:
  """Trains from step 0 for some seconds, on data that is already on the devices.

  Args:
    train_step: of this phase, on these devices; may be compiled already.
    seconds: time spent on steps after the first; at least one is run.
    most: steps after the first.

  Returns:
    Seconds until the first step is done, seconds per later step, and the final state.
  """
  started = time.perf_counter()
  whole = devices_lib.replicated(devices)
  state, totals = jax.device_put((task.init_state(), zero_totals(phase.targets, task.labeled)), whole)
  data = step_data(task, devices)
  state, totals = jax.block_until_ready(train_step(state, totals, *data))
  ready, steps = time.perf_counter(), 0
  while steps == 0 or (steps < most and time.perf_counter() - ready < seconds):
    state, totals = jax.block_until_ready(train_step(state, totals, *data))
    steps += 1
  return ready - started, (time.perf_counter() - ready) / steps, state
