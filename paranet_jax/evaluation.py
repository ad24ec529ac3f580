"""Accuracy and loss of every exit on a whole split, exact for any number of images.

Of images without labels, all that can be measured is how often an exit agrees with the last one.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from paranet_jax import devices as devices_lib
from paranet_jax.data.batches import eval_batches
from paranet_jax.data.dataset import Split
from paranet_jax.feed import placed
from paranet_jax.frozen import logits_from_features, on_disk
from paranet_jax.host.kept_programs import Kept
from paranet_jax.host.machine import Device
from paranet_jax.host.processes import Coordinator
from paranet_jax.steps import make_eval_step
from paranet_jax.targets import trained_exits
from paranet_jax.task import Task

MEASURES = ('accuracy', 'balanced_accuracy', 'top5', 'loss', 'nll')
AGREEMENT = 'agreement'
MOST_CLASSES = 2000
"""There is no confusion matrix of more classes than this: it would have more than four million cells."""
INLINE_CLASSES = 100
"""A confusion matrix of more classes than this is not written as JSON."""

_SUMS = ('count', 'weight', 'accuracy', 'top5', 'loss', 'nll')
_AHEAD = 2  # Batches that may be waiting for the device.

Batch = tuple[Any, jax.Array, jax.Array]
"""Images (or features of a frozen backbone), labels and mask (see `steps.make_eval_step`)."""


class Evaluator:
  """Evaluates the exits of a task, each with its own jitted function; splits are placed on the devices once.

  In a multi-process run, each process evaluates its share of the batches, and the sums are added up.
  """

  def __init__(self, task: Task, devices: list[Device]):
    self._task = task
    self._devices = devices
    self._processes = Coordinator()
    options = task.preprocessing, task.config.loss.label_smoothing, task.class_weights

    def step(number: int) -> Callable:
      of_features = functools.partial(logits_from_features, task.model, number) if task.frozen else None
      made = functools.partial(make_eval_step, task.model, number, *options, of_features)
      if of_features:
        return jax.jit(made())
      return Kept(f'eval_step_{number}', lambda: jax.jit(made()), lambda: (task.model, number, *options))

    self._steps = {number: step(number) for number in trained_exits(task.targets)}
    named = {'held_out': task.dataset.held_out, 'test': task.dataset.test}
    self._named = {name: split for name, split in named.items() if split is not None}
    self._size = self._batch_size(list(self._named.values()))
    self._splits = {} if task.frozen else {name: self._place(split) for name, split in self._named.items()}

  def evaluate(
    self, params: Any, batch_stats: Any, confusion: bool = False, look: Callable[[], None] = lambda: None
  ) -> dict[str, list[dict]]:
    """Evaluates every split.

    Args:
      confusion: also return confusion matrices.
      look: called before every batch, also of the features of a frozen backbone, and before the first one comes.

    Returns:
      {'held_out' (if there is such a split), 'test': one dict per exit, in which all but the first two are None if the
      exit is not trained}:
        `exit`, `trained`;
        `accuracy`, `top5`, and `balanced_accuracy`, the mean accuracy of the classes in the split (fractions);
        `loss`, `nll` (nats);
        `class_accuracy`: by class, rounded to 6 digits; None for a class that the split does not have;
        `confusion`, if asked for: the number of images by class and prediction, int [classes, classes]; None if there
        are more than MOST_CLASSES.
      Of images without labels all of these are None, and there is `agreement`: the share of the images that the exit
      answers as the last trained one does.
    """
    if not self._splits:  # What a frozen backbone computes is the same at every evaluation.
      variables = {'params': params, 'batch_stats': batch_stats}
      self._splits = {
        name: self._place(split, self._task.keep_features(split, variables, name.replace('_', '-'), look))
        for name, split in self._named.items()
      }
    return {
      name: list(self._exits(params, batch_stats, batches, confusion, look)) for name, batches in self._splits.items()
    }

  def _exits(
    self,
    params: Any,
    batch_stats: Any,
    batches: Callable[[], Iterator[Batch]],
    confusion: bool,
    look: Callable[[], None],
  ) -> Iterator[dict]:
    sums = {number: [] for number in self._steps}
    look()  # The first batch of streamed images comes when their workers have started.
    for batch in batches():
      look()
      for number, step in self._steps.items():
        sums[number].append(step(params, batch_stats, *batch))
      # A streamed batch holds memory until its turn comes.
      jax.block_until_ready([own[-_AHEAD] for own in sums.values() if len(own) >= _AHEAD])
    found = {number: _Counts(jax.device_get(own), self._task.model.num_classes) for number, own in sums.items()}
    labeled, last = self._task.dataset.labeled, found[max(found)]
    counted = [own.totals if labeled else own.agreement(last) for own in found.values()]
    totals = dict(zip(found, self._processes.summed(np.array(counted)), strict=True))
    for number in range(1, self._task.model.num_exits + 1):
      trained = number in totals
      row: dict[str, Any] = dict.fromkeys((*MEASURES, 'class_accuracy'))
      if trained and labeled:
        row = _measured(totals[number])
      elif not labeled:
        row[AGREEMENT] = float(np.divide(*totals[number])) if trained else None
      if confusion:
        matrix = found[number].confusion() if trained and labeled else None
        row['confusion'] = None if matrix is None else self._processes.summed(matrix).astype(int)
      yield {'exit': number, 'trained': trained, **row}

  def _batch_size(self, splits: list[Split]) -> int:
    """One size for all splits, because each size is compiled: the largest that one of them needs."""
    most, each = self._task.config.eval.batch_size, len(devices_lib.of_this_process(self._devices))
    needed = max(-(-len(split) // -(-len(split) // most)) for split in splits)
    return -(-needed // each) * each

  def _place(self, split: Split, features: Any = None) -> Callable[[], Iterator[Batch]]:
    shared, batch_size = devices_lib.shared(self._devices), self._size
    if split.streamed and features is None:
      return functools.partial(_streamed, split, batch_size, self._task.config.data.workers, shared)
    own = slice(self._processes.index, None, self._processes.count)
    indices, mask = (every[own] for every in eval_batches(len(split), batch_size))
    if features is not None and on_disk(features):
      data = features, np.asarray(split.labels)
      return functools.partial(_gathered, data, indices, mask, shared)
    batches = [jax.device_put(batch, shared) for batch in zip(indices, mask, strict=True)]
    whole = placed(split, self._devices, features)
    # Not in the evaluation itself, which would be compiled for the shape of every split.
    take = jax.jit(lambda whole, chosen: jax.tree.map(lambda each: each[chosen], whole), out_shardings=shared)
    return lambda: ((*take(whole, chosen), mask) for chosen, mask in batches)


def _streamed(split: Split, batch_size: int, workers: int | None, place: jax.sharding.Sharding) -> Iterator[Batch]:
  from paranet_jax.data.stream import EvalBatches, Stream  # grain takes half a second to import.

  share = EvalBatches(split, batch_size, jax.process_index(), jax.process_count())
  with Stream(share, workers, place) as batches:
    for batch in batches:
      yield batch['images'], batch['labels'], batch['mask']


def _gathered(data: Any, indices: np.ndarray, mask: np.ndarray, place: jax.sharding.Sharding) -> Iterator[Batch]:
  for rows, own in zip(indices, mask, strict=True):
    images, labels = jax.tree.map(lambda leaf, rows=rows: leaf[rows], data)
    images, labels, own = jax.device_put((images, labels, own), place)
    yield images, labels, own


class _Counts:
  """What this process has counted at one exit, from the results of `steps.make_eval_step`."""

  def __init__(self, batches: list[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]], num_classes: int):
    self._classes = num_classes
    real = [np.zeros((2, 0), int), *(np.stack(both)[:, both[0] >= 0] for _, *both in batches)]
    self._labels, self._predictions = np.concatenate(real, axis=1)
    # Summed on the host in float64: a count of images in float32 is exact only up to 2^24.
    sums = [float(sum(np.float64(batch[0][name]) for batch in batches)) for name in _SUMS]
    self.totals = [*sums, *self._count(self._labels), *self._count(self._labels[self._labels == self._predictions])]
    """`_SUMS`, then the images and the right predictions of each class."""

  def agreement(self, other: '_Counts') -> list[float]:
    """The number of images that another exit answers in the same way, and of all images."""
    return [float(np.sum(self._predictions == other._predictions)), float(len(self._predictions))]

  def confusion(self) -> np.ndarray | None:
    """The number of images by class and prediction, float64 [classes, classes]; None: too many classes."""
    if self._classes > MOST_CLASSES:
      return None
    cells = np.bincount(self._labels * self._classes + self._predictions, minlength=self._classes**2)
    return cells.reshape(self._classes, self._classes).astype(np.float64)

  def _count(self, labels: np.ndarray) -> np.ndarray:
    return np.bincount(labels, minlength=self._classes)


def _measured(totals: np.ndarray) -> dict[str, Any]:
  sums = dict(zip(_SUMS, totals, strict=False))
  images, right = np.split(totals[len(_SUMS) :], 2)
  by_class = right[images > 0] / images[images > 0]
  means = {name: float(sums[name] / sums['weight' if name == 'loss' else 'count']) for name in _SUMS[2:]}
  means['balanced_accuracy'] = float(np.mean(by_class))
  return {name: means[name] for name in MEASURES} | {
    'class_accuracy': [round(float(r / n), 6) if n else None for r, n in zip(right, images, strict=True)]
  }


def as_json(evaluations: dict[str, list[dict]]) -> dict[str, list[dict]]:
  """Evaluations with their confusion matrices as lists; None if there are more than INLINE_CLASSES."""

  def listed(matrix: np.ndarray | None) -> list[list[int]] | None:
    return None if matrix is None or len(matrix) > INLINE_CLASSES else matrix.tolist()

  return {
    split: [row | {'confusion': listed(row['confusion'])} if 'confusion' in row else row for row in exits]
    for split, exits in evaluations.items()
  }


def as_metrics(exits: list[dict]) -> dict[str, float]:
  """One split's evaluation as the values of a metrics line: `exit_1/accuracy`, ... or `exit_1/agreement`."""
  return {
    f'exit_{row["exit"]}/{name}': row[name]
    for row in exits
    if row['trained']
    for name in ((AGREEMENT,) if AGREEMENT in row else MEASURES)
  }
