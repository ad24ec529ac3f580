"""The adaptive runtime: stages run one after the other, and whoever is sure enough leaves.

Each stage is one jitted function for a few fixed batch sizes, with the variables as constants. After a stage the
samples that leave are dropped and the rest are packed into fixed sizes again, so nothing recompiles after warm-up.
"""

import copy
import functools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paranet_jax.data.augment import normalize
from paranet_jax.early import chunks as chunks_lib
from paranet_jax.early.chunks import NOBODY, Chunk, Sizes, default_sizes
from paranet_jax.early.exit_plan import ExitPlan
from paranet_jax.early.path_costs import mac_costs
from paranet_jax.early.scores import confidence
from paranet_jax.portable.run import Prediction, Predictions, softmax

_LATENCY_RUNS = 10


class EarlyExit:
  """Predicts with a model that may answer early. Safe to share between threads.

  Attributes:
    plan: when a sample leaves.
    class_names: one a class; empty if not known.
    image_shape: (H, W, C) of every image.
  """

  def __init__(
    self,
    model: Any,
    variables: Any,
    plan: ExitPlan,
    image_shape: tuple[int, int, int],
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    class_names: Sequence[str] = (),
    sizes: Sizes | None = None,
  ):
    """
    Args:
      model: with the multi-exit interface.
      variables: its parameters and running statistics.
      plan: of exits.json, or `exits_file.full_network_plan`.
      image_shape: (H, W, C).
      mean, std: with which uint8 images are normalized, in units of 0..1 pixel values.
      class_names: one a class.
      sizes: batch sizes to compile for; None: what the device is best at.
    """
    self.class_names = tuple(class_names)
    self.image_shape = tuple(image_shape)
    self._model = model
    # By way of the host: what is committed to a device compiles once for its own results and once for NumPy's arrays.
    self._variables = jax.device_put(jax.device_get(variables))
    self._normalization = tuple(mean), tuple(std)
    self._sizes = sizes or default_sizes()
    self._lock = threading.RLock()
    self._traces: list[None] = []
    self._measured: dict[Any, list[float]] = {}
    self._stages = {number: self._compiled(number) for number in plan.exits}
    self._take = jax.jit(self._traced(lambda tree, rows: jax.tree.map(lambda leaf: leaf[rows], tree)))
    self._set_plan(plan)

  @classmethod
  def load(cls, workdir: str | Path, step: int | None = None) -> 'EarlyExit':
    """The runtime of a calibrated run.

    Args:
      workdir: of the run.
      step: of the checkpoint; None: the one that exits.json was made for.

    Raises:
      UserError: there is no run, or no exits.json, or it belongs to another checkpoint.
    """
    from paranet_jax.early.load import load_early_exit  # It builds this class.

    return load_early_exit(workdir, step)

  def with_plan(self, plan: ExitPlan) -> 'EarlyExit':
    """The same network by another plan, sharing what is compiled.

    Args:
      plan: of the same usable exits.

    Raises:
      ValueError: its exits are others.
    """
    if plan.exits != self.plan.exits:
      raise ValueError(f'expected a plan of the exits {self.plan.exits}, found {plan.exits}')
    other = copy.copy(self)
    other._set_plan(plan)
    return other

  @property
  def num_traces(self) -> int:
    """Programs traced so far; it stays as it is after `warm_up`."""
    return len(self._traces)

  def warm_up(self, dtype: Any = np.uint8, batches: bool = True) -> None:
    """Compiles what predicting needs, so that the first answer is not the slowest.

    Args:
      dtype: of the images.
      batches: for `predict` too, not only for one image at a time.
    """
    dtype = np.dtype(dtype)
    self._stage_ms(dtype)
    _ = self._num_classes, self._all_macs  # Each traces the model, and is kept.
    self._warm_up_size(np.zeros((1, *self.image_shape), dtype))
    for size in self._sizes.sizes if batches else ():
      self._warm_up_size(np.zeros((size, *self.image_shape), dtype))

  def predict(self, images: Any) -> Predictions:
    """Predicts a batch of any size, 0 included.

    Args:
      images: uint8 [N, H, W, C], or floating point and already normalized; NumPy or jax.

    Raises:
      ValueError: the images have another shape or type.
    """
    images = self._checked(np.asarray(images), 4)
    wave = self._sizes.wave
    parts = [self._predict_wave(images[first : first + wave]) for first in range(0, len(images), wave)]
    if not parts:
      return self._empty(0)
    return Predictions(*map(np.concatenate, zip(*parts, strict=True)))

  def predict_one(self, image: Any) -> Prediction:
    """Predicts one image at the lowest latency.

    Args:
      image: uint8 [H, W, C], or floating point and already normalized.

    Raises:
      ValueError: the image has another shape or type.
    """
    image = self._checked(np.asarray(image), 3)[None]
    carry, streaks = {}, _Streaks(1)
    for number in self.plan.visited:
      logits, carry = self._stages[number](image, carry)
      logits = np.asarray(logits)
      if self._leave(number, logits, streaks, np.zeros(1, int))[0]:
        break
    return self._prediction(number, logits, self._macs[number])

  def anytime(self, image: Any, deadline_ms: float | None = None) -> Iterator[Prediction]:
    """Yields the answer of every usable exit in turn, whatever the thresholds.

    Args:
      image: uint8 [H, W, C], or floating point and already normalized.
      deadline_ms: milliseconds from the first `next`. A stage is begun only if it is expected to be done by then, as
        it took on this machine when first asked; the first is always run. The last answer yielded is the best there is.

    Raises:
      ValueError: the image or the deadline does not fit.
    """
    image = self._checked(np.asarray(image), 3)[None]
    if deadline_ms is not None and not deadline_ms > 0:
      raise ValueError(f'expected a deadline of more than 0 ms, found {deadline_ms}')
    return self._anytime(image, deadline_ms)

  def _set_plan(self, plan: ExitPlan) -> None:
    self.plan = plan
    self._temperatures = dict(zip(plan.exits, plan.temperatures, strict=True))
    self._thresholds = dict(zip(plan.exits, plan.confidence_thresholds, strict=True))
    self._macs = dict(zip(plan.exits, plan.macs, strict=True))

  def _anytime(self, image: np.ndarray, deadline_ms: float | None) -> Iterator[Prediction]:
    expected = self._stage_ms(image.dtype) if deadline_ms is not None else None
    macs, carry = self._all_macs, {}
    started = time.perf_counter()
    for index, number in enumerate(self.plan.exits):
      spent = 1e3 * (time.perf_counter() - started)
      if index and expected is not None and spent + expected[index] > deadline_ms:
        return
      logits, carry = self._stages[number](image, carry)
      yield self._prediction(number, np.asarray(logits), int(macs[index]))

  def _predict_wave(self, images: np.ndarray) -> Predictions:
    out, streaks = self._empty(len(images)), _Streaks(len(images))
    chunks = chunks_lib.split(images, self._sizes)
    for number in self.plan.visited:
      chunks = [self._run(number, chunk, streaks, out) for chunk in chunks]
      if number != self.plan.visited[-1]:
        chunks = chunks_lib.pack(chunks, self._sizes, self._take)
    return out

  def _run(self, number: int, chunk: Chunk, streaks: '_Streaks', out: Predictions) -> Chunk:
    """Runs a stage, writes down who leaves, and returns the chunk without them."""
    logits, carry = self._stages[number](chunk.images, chunk.carry)
    here = np.flatnonzero(chunk.rows != NOBODY)
    logits = np.asarray(logits)[here]
    leave = self._leave(number, logits, streaks, chunk.rows[here])
    places = chunk.rows[here[leave]]
    if len(places):
      out.labels[places] = logits[leave].argmax(-1)
      out.probabilities[places] = softmax(logits[leave], self._temperatures[number])
      out.exits[places] = number
      out.macs[places] = self._macs[number]
    rows = chunk.rows.copy()
    rows[here[leave]] = NOBODY
    return Chunk(rows, chunk.images, carry)

  def _leave(self, number: int, logits: np.ndarray, streaks: '_Streaks', places: np.ndarray) -> np.ndarray:
    """Which of these samples leave: bool [n], from their logits [n, classes]."""
    if number == self.plan.visited[-1]:
      return np.ones(len(logits), bool)
    if self.plan.score == 'patience':
      sure = streaks.update(places, logits.argmax(-1))
    else:
      sure = confidence(logits, self.plan.score, self._temperatures[number])
    threshold = self._thresholds[number]
    return np.zeros(len(logits), bool) if threshold is None else sure >= threshold

  def _prediction(self, number: int, logits: np.ndarray, macs: int) -> Prediction:
    probabilities = softmax(logits, self._temperatures[number])[0]
    return Prediction(int(logits[0].argmax()), probabilities, number, macs)

  def _empty(self, count: int) -> Predictions:
    ints = [np.zeros(count, np.int64) for _ in range(3)]
    return Predictions(ints[0], np.zeros((count, self._num_classes), np.float32), ints[1], ints[2])

  @functools.cached_property
  def _num_classes(self) -> int:
    image = jax.ShapeDtypeStruct((1, *self.image_shape), np.float32)
    number = self.plan.visited[-1]
    apply = functools.partial(self._model.apply, exits=(number,))
    return jax.eval_shape(apply, self._variables, image)[number - 1].shape[-1]

  @functools.cached_property
  def _all_macs(self) -> np.ndarray:
    every = tuple(range(len(self.plan.exits)))
    return mac_costs(self._model, self.image_shape, self.plan.exits).cumulative(every)

  def _stage_ms(self, dtype: Any) -> list[float]:
    """Milliseconds of each usable exit's stage for one image, all in turn; measured once."""
    with self._lock:
      if dtype not in self._measured:
        runs = [self._time_stages(np.zeros((1, *self.image_shape), dtype)) for _ in range(_LATENCY_RUNS + 1)]
        self._measured[dtype] = [1e3 * statistics.median(stage) for stage in zip(*runs[1:], strict=True)]
      return self._measured[dtype]

  def _time_stages(self, image: np.ndarray) -> list[float]:
    carry, seconds = {}, []
    for number in self.plan.exits:
      started = time.perf_counter()
      logits, carry = self._stages[number](image, carry)
      np.asarray(logits)
      seconds.append(time.perf_counter() - started)
    return seconds

  def _warm_up_size(self, images: np.ndarray) -> None:
    carry = {}
    for number in self.plan.visited:
      _, carry = jax.block_until_ready(self._stages[number](images, carry))
      packed = not self._sizes.on_host and number != self.plan.visited[-1]
      for size in self._sizes.sizes if packed else ():
        if size < len(images):
          self._take((images, carry), np.zeros(size, np.int32))

  def _checked(self, images: np.ndarray, rank: int) -> np.ndarray:
    if images.ndim != rank or images.shape[rank - 3 :] != self.image_shape:
      wanted = ', '.join(map(str, self.image_shape))
      raise ValueError(f'expected images [{"N, " if rank == 4 else ""}{wanted}], found {list(images.shape)}')
    if images.dtype == np.uint8:
      return images
    if not jnp.issubdtype(images.dtype, jnp.floating):
      raise ValueError(f'expected uint8 images, or normalized ones of floating point, found {images.dtype}')
    return images.astype(np.float32, copy=False)

  def _compiled(self, number: int) -> Callable[[Any, Any], tuple[Any, Any]]:
    mean, std = self._normalization

    def stage(images, carry):
      images = normalize(images, mean, std) if images.dtype == np.uint8 else images
      return self._model.apply(self._variables, images, carry, number, method='stage')

    return jax.jit(self._traced(stage))

  def _traced(self, function: Callable) -> Callable:
    @functools.wraps(function)
    def counted(*args):
      self._traces.append(None)  # One operation, whatever the number of threads.
      return function(*args)

    return counted


class _Streaks:
  """For patience: how often in a row each of n samples was given the same label."""

  def __init__(self, count: int):
    self._labels = np.full(count, -1)
    self._lengths = np.zeros(count)

  def update(self, places: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The lengths float64 [m] of these samples, after one more exit."""
    self._lengths[places] = np.where(self._labels[places] == labels, self._lengths[places] + 1, 1)
    self._labels[places] = labels
    return self._lengths[places]
