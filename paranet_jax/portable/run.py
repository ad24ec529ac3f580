"""Runs an exported early-exit image classifier. Needs Python 3.10, NumPy and onnxruntime; Pillow for image files.

    python run.py photo.png photos/            # one line per image: path, label, probability, exit
    python run.py --threshold=0.8 photo.png    # exit where the probability reaches 0.8

In Python, next to the bundle's files:

    import run

    bundle = run.load('.')
    # images: uint8 [N, H, W, C], or normalized floats; any N
    labels, probabilities, exits, macs = bundle.predict(images)
    answer = bundle.predict_one(images[0])
    for answer in bundle.anytime(images[0], deadline_ms=5):  # better ones, until time is up
      ...

Stage by stage, for a service that does its own batching (a stage's features are arrays whose first axis is the batch,
so `join` merges the rows of several requests and `select` takes some of them):

    carried = bundle.begin(images)
    for number in bundle.visited:
      carried, logits = bundle.stage(number)(carried)
      exiting = bundle.leaves(number, logits, carried)
      answers = bundle.answers(number, logits[exiting])
      carried = run.select(carried, ~exiting)

This file is the same in every bundle and imports nothing from the package that wrote it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import errno
import functools
import hashlib
import importlib
import io
import itertools
import json
import os
import re
import stat
import statistics
import struct
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

SCHEMA_VERSION = 1
BUNDLE, EXITS, CLASSES, PREPROCESSING = 'bundle.json', 'exits.json', 'classes.json', 'preprocessing.json'
SCORES = ('max_prob', 'entropy', 'margin', 'patience')
PROVIDERS = ('cpu', 'openvino')
PRECISIONS = ('float32', 'auto')
INTERPOLATIONS = ('bilinear', 'bicubic')
SUFFIXES = tuple('.png .jpg .jpeg .jfif .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm'.split())
"""The files of a folder that are images, in any case: for training, and for prediction."""
FORMATS = ('PNG', 'JPEG', 'GIF', 'BMP', 'PPM', 'WEBP', 'TIFF')
"""The formats of Pillow that are decoded, whatever a file's name is: common ones that start no program, as EPS does."""
BACKGROUND = (255, 255, 255)
"""The color behind transparent pixels, in training and prediction alike."""
MAX_PIXELS = 178_956_970
"""The most pixels of an image that is decoded, unless the caller sets a limit; the number at which Pillow refuses."""
MAX_MEMORY = 2**30
"""The most bytes that decoding an image may take, unless the caller sets a limit; larger JPEGs are decoded smaller."""
MAX_SCANS = 100
"""The most scans of a JPEG: each decodes all pixels again. Encoders write about ten, libtiff has the same limit."""
MAX_SLOW_PIXELS = 2**20
"""The most pixels of plain PPM and of run-length encoded BMP, which Pillow decodes in Python, one at a time."""
DIVERGED = "the network's answer is not finite"
"""Why an image whose logits overflow is reported like a file that cannot be read."""
UNKNOWN = 'unknown'
"""The label in print of an image that the network is too unsure of to answer."""
WAVE = 64
"""Images that go through the stages together."""
GONE = -1
"""The index of a row that is padding, or whose image has exited."""

_LATENCY_RUNS = 10
BROKEN_PIPE = 141  # What a shell reports for a command that SIGPIPE ended.

Carried = dict[str, Any]
"""Features from stage to stage, arrays [n, ...] by name; the network does not read names with a leading _."""

Stage = Callable[[Carried], 'tuple[Carried, Any]']
"""From the features before to the features for later stages and the logits, float32 [n, classes]."""


class BundleError(Exception):
  """One line that says what was expected, what was found, and what fixes it."""


class Predictions(NamedTuple):
  """Answers to N images, in the order given.

  labels: int [N]; the number of classes, which is no index of one, where the image is unknown. probabilities: float32
  [N, classes], calibrated with the exit's temperature. exits: int [N], the exits taken, 1-based. macs: int [N],
  multiply-adds spent.
  """

  labels: np.ndarray
  probabilities: np.ndarray
  exits: np.ndarray
  macs: np.ndarray

  @property
  def unknown(self) -> np.ndarray:
    """Which images the network was too unsure of to answer: bool [N]. None, unless calibrated with --reject."""
    return self.labels >= self.probabilities.shape[-1]

  @property
  def finite(self) -> np.ndarray:
    """Which images have an answer: bool [N]. The logits of others are not finite, and all their probabilities NaN."""
    return np.isfinite(self.probabilities[:, 0])


class Prediction(NamedTuple):
  """The answer to one image: label, probabilities float32 [classes], exit taken (1-based), multiply-adds spent."""

  label: int
  probabilities: np.ndarray
  exit: int
  macs: int

  @property
  def unknown(self) -> bool:
    """Whether the network was too unsure to answer; the label is then the number of classes."""
    return self.label >= len(self.probabilities)


class Batch(NamedTuple):
  """Rows that are computed together. rows: int [n], the index of each in the wave, or GONE."""

  rows: np.ndarray
  carried: Carried


class Packing:
  """How the images of a wave are batched: in one batch that shrinks as images exit.

  Attributes:
    wave: images that go through the stages together.
    sizes: the batch sizes that `predict` runs most.
  """

  wave: int = WAVE
  sizes: tuple[int, ...] = (WAVE,)

  def split(self, carried: Carried) -> list[Batch]:
    """The batches that enter the first stage."""
    return [Batch(np.arange(len(carried['images'])), carried)]

  def pack(self, batches: Sequence[Batch]) -> list[Batch]:
    """The batches for the next stage, some of whose rows are GONE."""
    (batch,) = batches
    stay = batch.rows != GONE
    if stay.all():
      return [batch]
    return [Batch(batch.rows[stay], select(batch.carried, stay))] if stay.any() else []

  def warm_up(self, carried: Carried) -> None:
    """Compiles what packing needs after a stage with these features."""


class Scaling(NamedTuple):
  """How images get the side of a network's input.

  Attributes:
    short_side: pixels to which the short side is scaled, before the center is cropped; None: the network's side.
    interpolation: one of INTERPOLATIONS, antialiased.
  """

  short_side: int | None = None
  interpolation: str = 'bilinear'

  def __str__(self) -> str:
    short = self.short_side or '`side`'
    return f'shorter side to {short} ({self.interpolation}, antialiased), center crop'


TO_SIDE = Scaling()
"""The short side becomes the network's side."""


class Adaptive:
  """Runs stages in turn until an image may exit. Safe to share between threads if the stages are.

  Attributes:
    exits: numbers of the usable exits, 1-based, increasing.
    visited: those of them that `predict` runs.
    score: what confidences are computed from, one of SCORES.
    macs: multiply-adds of an image that exits at a visited exit, by exit number.
    thresholds: the confidence (see `confidence`; with patience the number of equal labels in a row) from which an image
      exits, by exit number; None: no image exits there.
    class_names: one per class.
    image_shape: (H, W, C).
    scaling: how the images that it was made for were scaled.
    rejects: whether images are unknown that are too unsure where they exit; at the last exit by a threshold of its own.
    coverage: with which probability `sets` hold the right class; None: there are none.
    as_calibrated: whether images exit where calibration chose, or by other thresholds or budgets.
  """

  def __init__(
    self,
    plan: Mapping[str, Any],
    stages: Mapping[int, Stage],
    all_stages: Mapping[int, Stage],
    all_macs: Sequence[int] | Callable[[], Sequence[int]],
    image_shape: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    class_names: Sequence[str],
    packing: Packing | None = None,
    scaling: Scaling = TO_SIDE,
  ):
    """
    Args:
      plan: exits.json.
      stages: for the visited exits, each run after the previous visited one.
      all_stages: for all usable exits, each run after the previous one.
      all_macs: multiply-adds to each usable exit when all are run in turn, or a function that counts them.
      mean, std: that normalize uint8 images, one per channel, in units of 0..1 pixel values.
      packing: how `predict` batches images; None: for stages that take any batch size.
      scaling: how images are to be scaled, for those who decode them.
    """
    self._set_plan(plan)
    self.scaling = scaling
    height, width, channels = image_shape
    self.class_names, self.image_shape = tuple(class_names), (height, width, channels)
    self._stages, self._all_stages = stages, all_stages
    self._count_macs = all_macs if callable(all_macs) else lambda: all_macs
    if not callable(all_macs):
      _ = self._all_macs  # Checks their number.
    self._mean, self._std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    self._packing = packing or Packing()
    self._lock = threading.Lock()
    self._measured: dict[np.dtype, tuple[float, ...]] = {}

  def with_threshold(self, threshold: float) -> Adaptive:
    """The same network with one threshold at every exit.

    Args:
      threshold: on the scale of the score: 0..1, or equal labels in a row with patience.

    Raises:
      BundleError: the threshold is not on that scale.
    """
    threshold = _checked_threshold(threshold, self.score)
    return self.with_thresholds([float(to_confidence(threshold, self.score))] * (len(self.exits) - 1) + [0.0])

  def with_thresholds(self, confidences: Sequence[float | None]) -> Adaptive:
    """The same network with a threshold for each of `exits`, all of which are run until an image exits."""
    other = copy.copy(self)
    other.as_calibrated = False
    other.visited, other._stages, other.macs = self.exits, self._all_stages, self._all_macs
    other.thresholds = dict(zip(self.exits, confidences, strict=True))
    return other

  def with_budget(self, macs: float) -> Adaptive:
    """The same network with a limit on the multiply-adds of each image, which exits at the last exit within it.

    Raises:
      BundleError: the first exit costs more.
    """
    visited = tuple(number for number in self.visited if self.macs[number] <= macs)
    if not visited:
      least = self.macs[self.visited[0]]
      raise BundleError(
        f'expected a budget of {least:,} multiply-adds or more, found {macs:,.0f}; set --budget={least}'
      )
    other = copy.copy(self)
    other.visited, other.as_calibrated = visited, self.as_calibrated and visited == self.visited
    return other

  def safe(self) -> Adaptive:
    """The same network where no image exits early: all answers are those of the last exit."""
    other = copy.copy(self)
    other.as_calibrated = False
    other.thresholds = self.thresholds | dict.fromkeys(self.visited[:-1])
    return other

  def predict(self, images: Any) -> Predictions:
    """Predicts a batch of any size, 0 included.

    Args:
      images: uint8 [N, H, W, C], or floating point and already normalized.

    Raises:
      ValueError: the images have a different shape or type, or values that no normalized pixels have.
    """
    images = self._checked(np.asarray(images), 4)
    wave = self._packing.wave
    parts = [self._predict_wave(images[first : first + wave]) for first in range(0, len(images), wave)]
    if len(parts) <= 1:
      return parts[0] if parts else self._empty(0)
    return Predictions(*map(np.concatenate, zip(*parts, strict=True)))

  def predict_one(self, image: Any) -> Prediction:
    """Predicts one image at the lowest latency.

    Args:
      image: uint8 [H, W, C], or floating point and already normalized.

    Raises:
      ValueError: the image has a different shape or type.
    """
    carried = self._begin(self._checked(np.asarray(image), 3)[None])
    for number in self.visited[:-1]:
      carried, logits = self._run(self._stages[number], carried)
      found = self._softmax(number, logits)
      if self._leaves(number, found, carried)[0]:
        return self._prediction(number, found, self.macs[number])
    number = self.visited[-1]
    _, logits = self._run(self._stages[number], carried)
    return self._prediction(number, self._softmax(number, logits), self.macs[number])

  def anytime(self, image: Any, deadline_ms: float | None = None) -> Iterator[Prediction]:
    """Yields the answer of every usable exit in turn, whatever the thresholds.

    Args:
      image: uint8 [H, W, C], or floating point and already normalized.
      deadline_ms: milliseconds from the first `next`. A stage starts only if it should finish in time, judging by
        `stage_ms`; the first always runs. The last answer yielded is the best one.

    Raises:
      ValueError: the image or the deadline does not fit.
    """
    image = self._checked(np.asarray(image), 3)[None]
    if deadline_ms is not None and not deadline_ms > 0:
      raise ValueError(f'expected a deadline of more than 0 ms, found {deadline_ms}')
    return self._anytime(image, deadline_ms)

  def sets(self, answers: Predictions, any_exit: bool = False) -> np.ndarray:
    """The classes that each image may have, of which one is right with the probability `coverage`.

    Where images exit as calibrated, this holds among those of each exit, or of the exits that share a limit together.
    Otherwise the sets are larger, and it holds whatever made an image stop where it did. The most probable class is in
    every set; images without a finite answer have an empty one.

    Args:
      answers: of `predict` or `answers`.
      any_exit: a deadline or budget of the caller's may have stopped images.

    Returns:
      bool [N, classes].

    Raises:
      BundleError: there are none.
    """
    spec = self._known_sets()
    scores = set_scores(answers.probabilities, spec['penalty'], spec['free'])
    if any_exit or not self.as_calibrated:
      limits = np.full(len(scores), _limit(spec['anytime']))
    else:
      of_exit = {number: _limit(value) for number, value in zip(self.exits, spec['limits'], strict=True)}
      limits = np.array([of_exit[number] for number in answers.exits.tolist()])
    return scores <= limits[:, None]

  def anytime_sets(self, image: Any, deadline_ms: float | None = None) -> Iterator[tuple[Prediction, np.ndarray]]:
    """Yields the answer of every usable exit in turn, as `anytime`, with the classes that the image may have.

    The sets, bool [classes], only shrink. All of them hold the right class with the probability `coverage`, so it does
    not matter after which the caller stops. One that is empty says that the exits contradict each other; such an image
    is unlike those that were calibrated on, or one of the few that the promise leaves out.

    Args:
      image: uint8 [H, W, C], or floating point and already normalized.
      deadline_ms: as `anytime`.

    Raises:
      BundleError: there are no sets.
      ValueError: the image or the deadline does not fit.
    """
    spec = self._known_sets()

    def pairs(answers: Iterator[Prediction]) -> Iterator[tuple[Prediction, np.ndarray]]:
      possible = np.full(self._num_classes, True)
      for answer in answers:
        scores = set_scores(answer.probabilities[None], spec['penalty'], spec['free'])[0]
        possible = possible & (scores <= _limit(spec['anytime']))
        yield answer, possible

    return pairs(self.anytime(image, deadline_ms))

  def begin(self, images: Any) -> Carried:
    """The input of the first stage.

    Args:
      images: uint8 [n, H, W, C], or floating point and already normalized.

    Raises:
      ValueError: the images have a different shape or type.
    """
    return self._begin(self._checked(np.asarray(images), 4))

  def stage(self, number: int) -> Stage:
    """The stage of exit `number`, one of `visited`, which reads the features of the visited exit before."""
    return functools.partial(self._run, self._stages[number])

  def leaves(self, number: int, logits: np.ndarray, carried: Carried) -> np.ndarray:
    """Which images exit at exit `number`: bool [n], from what its stage returned for them."""
    return self._leaves(number, self._softmax(number, logits), carried)

  def answers(self, number: int, logits: np.ndarray) -> Predictions:
    """The answers of exit `number` from its logits [n, classes]."""
    found, count = self._softmax(number, logits), len(logits)
    filled = np.full(count, number), np.full(count, self.macs[number])
    return Predictions(self._labels(number, found), found.probabilities(), *filled)

  def stage_ms(self, dtype: Any = np.uint8) -> tuple[float, ...]:
    """Milliseconds of each usable exit's stage for one image on this machine, run in turn; measured once.

    Args:
      dtype: of the image.
    """
    dtype = np.dtype(dtype)
    with self._lock:
      if dtype not in self._measured:
        runs = [self._time_stages(np.zeros((1, *self.image_shape), dtype)) for _ in range(_LATENCY_RUNS + 1)]
        self._measured[dtype] = tuple(1e3 * statistics.median(stage) for stage in zip(*runs[1:], strict=True))
    return self._measured[dtype]

  def warm_up(self, dtype: Any = np.uint8, batches: bool = True) -> None:
    """Runs everything that predicting needs once, so that the first answer is not the slowest.

    Args:
      dtype: of the images.
      batches: warm up `predict` too, not only `predict_one` and `anytime`.
    """
    self.stage_ms(dtype)
    for size in (1, *(self._packing.sizes if batches else ())):
      carried = self._begin(np.zeros((size, *self.image_shape), dtype))
      for number in self.visited:
        carried, _ = self._run(self._stages[number], carried)
        if number != self.visited[-1]:
          self._packing.warm_up(carried)

  def _set_plan(self, plan: Mapping[str, Any]) -> None:
    self.exits, self.visited, self.score = tuple(plan['exits']), tuple(plan['visited']), plan['score']
    self.thresholds = dict(zip(self.exits, plan['confidence_thresholds'], strict=True))
    self.macs = dict(zip(self.exits, plan['macs'], strict=True))
    self._temperatures = dict(zip(self.exits, plan['temperatures'], strict=True))
    self._reject, self._sets, self.as_calibrated = plan.get('reject'), plan.get('sets'), True
    self._seen = plan.get('seen')
    self._identity = [list(plan[name]) for name in ('confidence_thresholds', 'temperatures')]

  @property
  def rejects(self) -> bool:
    return self._reject is not None

  @property
  def coverage(self) -> float | None:
    return self._sets and self._sets['coverage']

  def _known_sets(self) -> Mapping[str, Any]:
    if self._sets is None:
      raise BundleError('expected sets of classes in exits.json, found none; calibrate the run with --coverage')
    return self._sets

  def _softmax(self, number: int, logits: np.ndarray) -> Softmax:
    return Softmax(logits, self._temperatures[number])

  def _leaves(self, number: int, found: Softmax, carried: Carried) -> np.ndarray:
    threshold = self.thresholds[number]
    if number == self.visited[-1] or threshold is None:
      return np.full(len(found.logits), number == self.visited[-1])
    if self.score == 'patience':
      return carried['_streak'] >= threshold
    return found.confidence(self.score) >= threshold

  def _labels(self, number: int, found: Softmax) -> np.ndarray:
    """The most probable classes, or the number of classes where the image is unknown."""
    if self._reject is None:
      return found.labels
    at = self._reject['confidence_threshold'] if number == self.exits[-1] else self.thresholds[number]
    sure = (found.confidence(self.score) >= _limit(at)) & found.finite()
    return np.where(sure, found.labels, found.logits.shape[-1])

  @functools.cached_property
  def _all_macs(self) -> dict[int, int]:
    return dict(zip(self.exits, self._count_macs(), strict=True))

  @functools.cached_property
  def _num_classes(self) -> int:
    return len(self.class_names)

  def _checked(self, images: np.ndarray, rank: int) -> np.ndarray:
    if images.ndim != rank or images.shape[rank - 3 :] != self.image_shape:
      wanted = ', '.join(map(str, self.image_shape))
      raise ValueError(f'expected images [{"N, " if rank == 4 else ""}{wanted}], found {list(images.shape)}')
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
      raise ValueError(f'expected uint8 images, or normalized ones of floating point, found {images.dtype}')
    if images.dtype != np.uint8 and images.size:
      self._check_values(images)
    return images

  def _check_values(self, images: np.ndarray) -> None:
    """Raises ValueError for floats that no pixels normalized by mean and std can have."""
    low, high = float(images.min()), float(images.max())
    least, most = float((-self._mean / self._std).min()), float(((1 - self._mean) / self._std).max())
    slack = (most - least) / 100  # For numbers of 16 bits.
    if not np.isfinite([low, high]).all():
      found = 'NaN or infinity'
    elif not self._mean.any() and (self._std == 1).all():  # They do not say how the caller normalizes.
      return
    elif low < least - slack or high > most + slack or self._otherwise_normalized(images, low, high):
      found = f'{low:.3g} to {high:.3g}'
    else:
      return
    raise ValueError(
      f'expected uint8 images, or floats (pixel / 255 - mean) / std, which are from {least:.3g} to {most:.3g}, '
      f'found {found}; give uint8 images, or normalize them by mean and std'
    )

  def _otherwise_normalized(self, images: np.ndarray, low: float, high: float) -> bool:
    """Whether values that could be normalized pixels are rather in 0..1, or pixels scaled to -0.5..0.5 or -1..1."""
    if not -1 <= low < high <= 1 or _integers(255 * (images * self._std + self._mean), 0.25):
      return False
    return low >= 0 or _integers(255 * (images + 0.5), 0.05) or _integers(127.5 * (images + 1), 0.05)

  def _begin(self, images: np.ndarray) -> Carried:
    carried = self._inputs(images)
    if self.score == 'patience':
      carried |= {'_label': np.full(len(images), -1), '_streak': np.zeros(len(images))}
    return carried

  def _inputs(self, images: np.ndarray) -> Carried:
    """The network's own input."""
    if images.dtype == np.uint8:
      images = images.astype(np.float32)  # In place: large arrays take longer to allocate than to compute.
      images /= 255
      images -= self._mean
      images /= self._std
    return {'images': np.ascontiguousarray(images, np.float32)}

  def _run(self, stage: Stage, carried: Carried) -> tuple[Carried, np.ndarray]:
    features, logits = stage(carried)
    logits = np.asarray(logits)
    if '_label' in carried:
      labels = logits.argmax(-1)
      features |= {'_label': labels, '_streak': np.where(carried['_label'] == labels, carried['_streak'] + 1, 1)}
    return features, logits

  def _anytime(self, image: np.ndarray, deadline_ms: float | None) -> Iterator[Prediction]:
    expected, carried = None if deadline_ms is None else self.stage_ms(image.dtype), self._begin(image)
    all_macs, started = self._all_macs, time.perf_counter()
    for index, number in enumerate(self.exits):
      spent = 1e3 * (time.perf_counter() - started)
      if index and expected and deadline_ms and spent + expected[index] > deadline_ms:
        return
      carried, logits = self._run(self._all_stages[number], carried)
      yield self._prediction(number, self._softmax(number, logits), all_macs[number])

  def _predict_wave(self, images: np.ndarray) -> Predictions:
    out, batches = self._empty(len(images)), self._packing.split(self._begin(images))
    for number in self.visited:
      batches = [self._advance(number, batch, out) for batch in batches]
      if batches and number != self.visited[-1]:
        batches = self._packing.pack(batches)
    return out

  def _advance(self, number: int, batch: Batch, out: Predictions) -> Batch:
    """Runs a stage, writes the answers of the images that exit to `out`, and marks their rows as GONE."""
    there = batch.rows != GONE
    carried, logits = self._run(self._stages[number], batch.carried)
    found = self._softmax(number, logits)
    leaving = self._leaves(number, found, carried) & there
    places = batch.rows[leaving]
    if not len(places):
      return Batch(batch.rows, carried)
    out.labels[places], out.probabilities[places] = self._labels(number, found)[leaving], found.probabilities(leaving)
    out.exits[places], out.macs[places] = number, self.macs[number]
    return Batch(np.where(leaving, GONE, batch.rows), carried)

  def _prediction(self, number: int, found: Softmax, macs: int) -> Prediction:
    return Prediction(int(self._labels(number, found)[0]), found.probabilities()[0], number, int(macs))

  def _empty(self, count: int) -> Predictions:
    ints = [np.zeros(count, np.int64) for _ in range(3)]
    return Predictions(ints[0], np.zeros((count, self._num_classes), np.float32), ints[1], ints[2])

  def _time_stages(self, image: np.ndarray) -> list[float]:
    carried, seconds = self._begin(image), []
    for number in self.exits:
      started = time.perf_counter()
      carried, _ = self._run(self._all_stages[number], carried)
      seconds.append(time.perf_counter() - started)
    return seconds


class Drift(NamedTuple):
  """Why a `Watch` alarmed. images: seen until then. test: 'answers', or 'errors' where labels were recorded.

  shares: of the recent images that took each exit, by exit number; macs: their mean multiply-adds.
  """

  images: int
  test: str
  shares: dict[int, float]
  macs: float


class Watch:
  """Tests, image by image and without labels, whether the answers still look like those of calibration.

  What is tested is that the answers to the test images of calibration (`seen` of exits.json) and those since then are
  exchangeable: in which exit images leave with how large a probability, and which classes they get. Each answer gets a
  p-value, its rank among all answers before; if nothing has changed, these are independent and uniform, however few
  images calibration saw (conformal prediction: Vovk, Nouretdinov and Gammerman, "Testing Exchangeability On-Line",
  2003). A gambler bets against that with a capital of 1 by what the last p-values were. An alarm is a capital of
  2 / alpha. By Ville's inequality the probability that this ever happens, in a run of any length, is at most alpha / 2
  if nothing changes, and as much is left for `record`, which tests in the same way whether answers are as often wrong.
  So false alarms have a probability of alpha, over the draw of the test images and of all images since.

  Part of the capital is kept for changes that come late. Images are tested in blocks of up to `BLOCK`. Nothing is
  tested any more after an alarm, until the bundle is calibrated again or the state is removed.

  Attributes:
    images: seen so far, of which `labeled` have been recorded.
    alarm: None, until there is one.
  """

  BLOCK, SAVED_EVERY = 128, 1024

  def __init__(self, bundle: Adaptive, path: str | os.PathLike[str] | None = None, alpha: float = 0.01):
    """Continues from the state in a file, if there is one.

    Args:
      bundle: that answers as calibrated.
      path: of the state, a JSON file; None: nothing is kept.
      alpha: probability of a false alarm, between 0 and 1.

    Raises:
      BundleError: exits.json does not say what calibration saw, or the state is damaged, belongs to other exits or
        cannot be written.
    """
    seen = bundle._seen
    if seen is None:
      raise BundleError(
        'expected what calibration saw in exits.json, found none; calibrate the bundle on images of yours (python -m '
        'paranet_jax.calibrate --bundle=DIR --images=FOLDER), or calibrate and export the run again, in float32'
      )
    if not 0 < alpha < 1:
      raise BundleError(f'expected an alpha between 0 and 1, found {alpha}; set --alpha')
    self.path = None if path is None else Path(path)
    self.alpha, self.images, self.labeled = alpha, 0, 0
    self.alarm: Drift | None = None
    self._exits, self._macs = bundle.exits, np.array([bundle.macs[number] or 0 for number in bundle.exits], np.float64)
    edges = seen['edges']
    self._edges = np.full((len(edges), max(map(len, edges))), np.inf)
    for row, each in zip(self._edges, edges, strict=True):
      row[: len(each)] = each
    self._first = np.cumsum([0, *(len(each) + 1 for each in edges[:-1])])
    rng, classes = np.random.default_rng(0), np.array(seen['classes'])
    orders = [rng.permutation(len(classes)) for _ in range(_CLASS_ORDERS)]
    deep = np.concatenate([np.array(each) for each in seen['counts']])
    self._orders = [np.arange(len(deep)), *orders]
    self._answers = _Gambler([deep, *(_reordered(classes, order) for order in orders)])
    wrong, answered = seen['wrong'], seen.get('answered', None if bundle.rejects else seen['images'])
    self._errors = None if None in (wrong, answered) else _Gambler([np.array([answered - wrong, wrong])])
    self._recent = np.zeros(len(self._exits))
    self._pending: list[tuple[int, float, int]] = []
    self._pending_errors: list[int] = []
    self._last: Prediction | None = None
    self._saved, self._written = 0, None
    self._writer = os.urandom(8).hex()  # Tells its states from equal ones of another process.
    self._identity = hashlib.sha256(json.dumps([seen, alpha, bundle._identity]).encode()).hexdigest()[:16]
    if self.path:
      self._restore(self.path)
      self.save()

  @property
  def takes_labels(self) -> bool:
    """Whether `record` can be called: calibration knew which of the images that it answered were wrong."""
    return self._errors is not None

  def see(self, answers: Predictions) -> None:
    """Sees the answers of the bundle, in the order given. Those that are not finite do not count.

    Those that a deadline or budget forced must be left out.
    """
    probabilities, exits = answers.probabilities, answers.exits.tolist()
    if exits:
      self._last = Prediction(*(column[-1] for column in answers))
    if len(exits) == 1:  # Twice as fast as the general way, which is what an image at a time pays.
      best = int(probabilities.argmax())
      return self.add([(exits[0], float(probabilities[0, best]), best)])
    classes = probabilities.argmax(-1)
    tops = probabilities[np.arange(len(classes)), classes]
    self.add(zip(exits, tops.tolist(), classes.tolist(), strict=True))

  def add(self, answers: Any) -> None:
    """Sees answers: exit, largest probability and most probable class of each."""
    if self.alarm:
      return
    # Without finite answers (their largest probability is NaN), which calibration leaves out or refuses.
    self._pending += [answer for answer in answers if answer[1] == answer[1]]
    while len(self._pending) >= self.BLOCK and not self.alarm:
      self._test(self.BLOCK)
    if self.images + self.labeled - self._saved >= self.SAVED_EVERY:
      self.save()

  def record(self, label: int, answer: Prediction | None = None) -> None:
    """Records the right class of an image, for a test of how often answers are wrong.

    Images that are unknown or have no finite answer do not count.

    Args:
      label: the right class.
      answer: to that image; None: the one that was seen last.

    Raises:
      BundleError: calibration had no labels.
      ValueError: no answer was seen yet.
    """
    if self._errors is None:
      raise BundleError(
        'expected errors that calibration saw, found a run without labels, or one with --reject that did not count the '
        'answered images; leave out the labels, or calibrate again'
      )
    answer = self._last if answer is None else answer
    if answer is None:
      raise ValueError('expected an answer before its label, found none')
    if self.alarm or answer.unknown or np.isnan(answer.probabilities[0]):
      return
    self._pending_errors.append(int(answer.label != label))
    self.labeled += 1
    if len(self._pending_errors) >= self.BLOCK:
      self._test_errors()
      if self.images + self.labeled - self._saved >= self.SAVED_EVERY:
        self.save()

  def flush(self) -> None:
    """Tests what is left of the last block, and saves the state."""
    if self._pending and not self.alarm:
      self._test(len(self._pending))
    if self._pending_errors and not self.alarm:
      self._test_errors()
    self.save()

  @property
  def evidence(self) -> float:
    """The larger of the two capitals now; an alarm is 2 / alpha."""
    logs = [self._answers.log_capital, *([self._errors.log_capital] if self._errors else [])]
    return float(np.exp(min(max(logs), 700.0)))

  def line(self) -> str:
    """One line on the alarm."""
    if not self.alarm:
      return f'no drift in {self.images:,} images'
    shares = ', '.join(f'exit {number}: {100 * share:.1f} %' for number, share in self.alarm.shares.items())
    what = 'answers are not wrong as often as' if self.alarm.test == 'errors' else 'answers differ from'
    return (
      f'drift: after {self.alarm.images:,} images, {what} those that calibration saw (a false alarm has a '
      f'probability of at most {self.alpha:g}); lately {shares}, {self.alarm.macs:,.0f} multiply-adds an image; '
      'look at the images, and calibrate again'
    )

  def save(self) -> None:
    """Writes the state, in one step: a reader finds the old or the new one.

    Raises:
      BundleError: it cannot be written, or another process has written it.
    """
    if self.path is None:
      return
    self._check_alone(self.path)
    self._saved = self.images + self.labeled
    state = {
      'schema_version': SCHEMA_VERSION,
      'identity': self._identity,
      'writer': self._writer,
      'images': self.images,
      'labeled': self.labeled,
      'alarm': self.alarm and self.alarm._asdict(),
      'recent': self._recent.tolist(),
      'answers': self._answers.state(),
      'errors': self._errors and self._errors.state(),
    }
    content = json.dumps(state).encode()
    temporary = self.path.with_name(f'.{self.path.name}.{os.getpid()}')
    try:
      try:
        temporary.write_bytes(content)
        os.replace(temporary, self.path)
        self._written = content
      finally:
        temporary.unlink(missing_ok=True)
    except OSError as error:
      raise BundleError(f'{self.path} cannot be written ({error.strerror}); set --watch to another file') from error

  def _check_alone(self, path: Path) -> None:
    """Of two processes with one state, each would undo what the other has seen, an alarm too."""
    found = self._read(path)
    if found not in (None, self._written):
      raise BundleError(
        f'expected {path} as this watch has written it, found the state of another process; let one process at a time '
        'use it, and set --watch to another file for others'
      )

  def _read(self, path: Path) -> bytes | None:
    try:
      with _open(path) as file:
        return file.read(2**26)
    except FileNotFoundError:
      return None
    except OSError as error:
      raise BundleError(f'{path} cannot be read ({error.strerror}); set --watch to another file') from error

  def _restore(self, path: Path) -> None:
    content = self._written = self._read(path)
    if content is None:
      return
    again = 'remove it to start again, or set --watch to another file'
    try:
      state = json.loads(content)
      if state['identity'] != self._identity:
        raise BundleError(f'{path} is the state of another bundle, calibration or --alpha; {again}')
      self.images, self.labeled = _saved_count(state['images']), _saved_count(state['labeled'])
      self._recent = _saved_numbers(state['recent'], len(self._exits))
      self._answers.restore(state['answers'])
      if self._errors:
        self._errors.restore(state['errors'])
      if state['alarm']:
        self.alarm = self._saved_alarm(**state['alarm'])
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
      raise BundleError(f'{path} is not the state of a watch; {again}') from error

  def _saved_alarm(self, images: Any, test: Any, shares: Any, macs: Any) -> Drift:
    numbers = _saved_numbers(list(shares.values()), len(self._exits)).tolist()
    if tuple(shares) != tuple(map(str, self._exits)) or test not in ('answers', 'errors'):
      raise ValueError('no alarm of this bundle')
    by_exit = dict(zip(self._exits, numbers, strict=True))
    return Drift(_saved_count(images), test, by_exit, float(_saved_numbers(macs, ())))

  def _test(self, count: int) -> None:
    block, self._pending = self._pending[:count], self._pending[count:]
    numbers, tops, classes = map(np.array, zip(*block, strict=True))
    exits = np.searchsorted(self._exits, numbers)
    deep = self._first[exits] + (self._edges[exits] <= tops[:, None]).sum(-1)
    self._recent = self._recent * np.exp(-count / _RECENT) + np.bincount(exits, minlength=len(self._exits))
    self.images += count
    self._answers.bet([self._orders[0][deep], *(order[classes] for order in self._orders[1:])])
    self._check('answers', self._answers)

  def _test_errors(self) -> None:
    assert self._errors is not None
    errors, self._pending_errors = np.array(self._pending_errors), []
    self._errors.bet([errors])
    self._check('errors', self._errors)

  def _check(self, test: str, gambler: _Gambler) -> None:
    if gambler.log_capital < np.log(2 / self.alpha):
      return
    shares = self._recent / max(self._recent.sum(), 1.0)
    by_exit = dict(zip(self._exits, np.round(shares, 6).tolist(), strict=True))
    self.alarm = Drift(self.images, test, by_exit, float(shares @ self._macs))
    self.save()


_CLASS_ORDERS, _RECENT = 2, 500.0
_PART = 32
_BEFORE, _ONES = np.tri(_PART, k=-1, dtype=bool), np.ones(_PART, np.float32)
_P_BINS, _PRIOR, _MEMORIES = 8, 3.0, (100.0, 800.0, 6400.0)


def _saved_count(value: Any) -> int:
  if not _is_count(value):
    raise ValueError('no count')
  return value


def _saved_numbers(values: Any, shape: Any, least: float = 0) -> np.ndarray:
  numbers = np.array(values, np.float64).reshape(shape)
  if not (np.isfinite(numbers).all() and (numbers >= least).all()):
    raise ValueError('no numbers')
  return numbers


def _reordered(counts: np.ndarray, order: np.ndarray) -> np.ndarray:
  found = np.empty_like(counts)
  found[order] = counts
  return found


class _Gambler:
  """A conformal test martingale: capital that has an expectation of 1 at any time if nothing changes.

  It averages the capitals of gamblers that look at one of several orders of categories each, and remember the last
  p-values for longer or shorter. Each bets the distribution of the p-values that it remembers, in bins, and keeps a
  reserve, from which it takes 1 / (n log n) before the n-th block: about 1 / (n log^2 n) of the capital is there for a
  change that comes then.
  """

  def __init__(self, counts: Sequence[np.ndarray]):
    """counts: of what calibration saw, by category, for each order."""
    self._sizes = [len(each) for each in counts]
    self._counts = self._stacked(counts)
    shape = len(counts), len(_MEMORIES)
    self._bins = np.zeros((*shape, _P_BINS))
    self._active, self._reserve, self._blocks = np.full(shape, np.log(0.5)), float(np.log(0.5)), 0
    self._decay = np.array(_MEMORIES)

  def _stacked(self, counts: Sequence[Any]) -> np.ndarray:
    """Counts of each order, [orders, categories]; an order of fewer categories ends with zeros."""
    stacked = np.zeros((len(self._sizes), max(self._sizes)))
    for row, size, each in zip(stacked, self._sizes, counts, strict=True):
      row[:size] = _saved_numbers(each, size)
    return stacked

  @property
  def log_capital(self) -> float:
    """The logarithm of the mean capital."""
    capitals = np.logaddexp(self._active, self._reserve)
    most = capitals.max()
    return float(most + np.log(np.exp(capitals - most).mean()))

  def bet(self, categories: Sequence[np.ndarray]) -> None:
    """Bets on a block of images, by their category in each order."""
    found = np.stack(categories)
    rows, count = found.shape
    rng = np.random.default_rng((self._blocks, int(self._counts[0].sum())))
    chance = rng.random((rows, count))
    seen = self._counts.sum(-1, keepdims=True) + np.arange(1, count + 1)
    above, equal = self._count(found)
    ranks = (above + chance * (equal + 1)) / seen
    places = np.minimum(ranks * _P_BINS, _P_BINS - 1).astype(int)
    if self._blocks:
      share = 1 / ((self._blocks + 2) * np.log(self._blocks + 2))
      self._active = np.logaddexp(self._active, self._reserve + np.log(share))
      self._reserve += float(np.log1p(-share))
    self._blocks += 1
    bets = self._bins + _PRIOR
    odds = np.log(_P_BINS * bets / bets.sum(-1, keepdims=True))
    hits = np.bincount((places + _P_BINS * np.arange(rows)[:, None]).ravel(), minlength=_P_BINS * rows)
    hits = hits.reshape(rows, 1, _P_BINS)
    self._active = self._active + (odds * hits).sum(-1)
    self._bins = self._bins * np.exp(-count / self._decay)[None, :, None] + hits

  def _count(self, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts a block; how many before each image are in a later category than its own, and in its own: [orders, N].

    Images are compared with each other in parts, and with the parts before by counts: N x N comparisons take longer.
    """
    (rows, count), categories = found.shape, self._counts.shape[-1]
    parts = np.zeros((rows, -(-count // _PART) * _PART), np.int32)
    parts[:, :count] = found  # What fills the last part comes after all others.
    parts = parts.reshape(-1, _PART)
    others, own, number = parts[:, None], parts[:, :, None], len(parts)
    # Products with ones count faster than sums of bools.
    above = ((others > own) & _BEFORE).astype(np.float32) @ _ONES
    equal = ((others == own) & _BEFORE).astype(np.float32) @ _ONES
    places = parts + categories * np.arange(number)[:, None]
    hits = np.bincount(places.ravel(), minlength=categories * number).reshape(rows, -1, categories)
    groups, fill = number // rows, len(parts) * _PART // rows - count
    hits[:, -1, 0] -= fill
    counts = self._counts[:, None] + _BEFORE[:groups, :groups].astype(np.float64) @ hits
    known = np.cumsum(counts, -1)
    above = above + known[..., -1].reshape(-1, 1) - known.ravel()[places]
    equal = equal + counts.ravel()[places]
    self._counts = self._counts + hits.sum(1)
    return above.reshape(rows, -1)[:, :count], equal.reshape(rows, -1)[:, :count]

  def state(self) -> dict[str, Any]:
    """What `restore` reads."""
    return {
      'counts': [each[:size].tolist() for each, size in zip(self._counts, self._sizes, strict=True)],
      'bins': self._bins.tolist(),
      'active': self._active.tolist(),
      'reserve': self._reserve,
      'blocks': self._blocks,
    }

  def restore(self, state: Mapping[str, Any]) -> None:
    """Continues from a state. Raises KeyError, TypeError or ValueError if it is none."""
    self._counts = self._stacked(state['counts'])
    self._bins = _saved_numbers(state['bins'], self._bins.shape)
    self._active = _saved_numbers(state['active'], self._active.shape, -np.inf)
    self._reserve = float(_saved_numbers(state['reserve'], (), -np.inf))
    self._blocks = _saved_count(state['blocks'])


def _integers(values: np.ndarray, tolerance: float) -> bool:
  return bool((np.abs(values - np.rint(values)) <= tolerance).all())


def select(carried: Carried, rows: Any) -> Carried:
  """The features of some rows. rows: bool [n], or int."""
  return {name: values[rows] for name, values in carried.items()}


def join(parts: Sequence[Carried]) -> Carried:
  """One batch from several that are at the same stage."""
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class Softmax:
  """The softmax of an exit's logits, with exponentials computed once for confidences and probabilities.

  After a stage, NumPy's calls take longer than what they compute for a batch, so there are few.

  Attributes:
    logits: float [n, classes].
    labels: int [n], the most probable classes.
  """

  def __init__(self, logits: Any, temperature: float):
    """
    Args:
      logits: float [n, classes], 2 classes or more. Images whose logits are not finite have probabilities of NaN.
      temperature: T > 0 that divides the logits.
    """
    self.logits = np.asarray(logits)
    self.labels = self.logits.argmax(-1)
    self._temperature = temperature
    self._computed: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

  def probabilities(self, rows: np.ndarray | None = None) -> np.ndarray:
    """float32 [rows, classes], computed in float64. rows: bool [n], some of the images."""
    if rows is not None and self._computed is None:
      return Softmax(self.logits[rows], self._temperature).probabilities()
    _, powers, rest = self._exponentials()
    labels = self.labels
    if rows is not None:
      powers, rest, labels = powers[rows], rest[rows], labels[rows]
    total = 1 + rest
    shares = powers / total[:, None]
    shares[np.arange(len(labels)), labels] = 1 / total
    return shares.astype(np.float32)

  def confidence(self, score: str) -> np.ndarray:
    """-log(1 - s) of a probability score s: float64 [n], see `confidence`; 0 where logits are not finite."""
    others, _, rest = self._exponentials()
    log_odds = np.log(np.maximum(rest, _LEAST_REST))  # log((1 - p1) / p1)
    if (rest < _LEAST_REST).any():
      log_odds = np.where(rest < _LEAST_REST, _log_sum_exp(others), log_odds)
    log_total = np.log1p(rest)  # -log p1
    if score == 'max_prob':
      log_unsure = log_odds - log_total
    elif score == 'entropy':
      log_unsure = _log_entropy(others, log_odds, log_total) - np.log(np.log(self.logits.shape[-1]))
    elif score == 'margin':
      log_unsure = np.logaddexp(log_odds, others.max(-1)) - log_total
    else:
      raise ValueError(f'not a probability score: {score}')
    return np.fmax(-log_unsure, 0.0)  # 0 in place of NaN too: a threshold of 0 limits the cost of every image.

  def finite(self) -> np.ndarray:
    """Which images have probabilities that are numbers: bool [n]."""
    return ~np.isnan(self._exponentials()[2])

  def _exponentials(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Float64, when they are first asked for.

    Returns:
      others: [n, classes], the scaled logits less the largest one's; of the most probable class -infinity.
      powers: their exponentials.
      rest: [n], what these add up to, where that of the most probable class is 1; NaN where a logit is.
    """
    if self._computed is None:
      largest = np.arange(len(self.labels)), self.labels
      others = self.logits.astype(np.float64)
      others /= self._temperature
      others -= others[largest][:, None]
      zero = others[largest]  # Or NaN, if the largest is infinite.
      others[largest] = -np.inf
      powers = np.exp(others)
      self._computed = others, powers, powers.sum(-1) + zero
    return self._computed


_LEAST_REST = 1e-290
"""Below it, numbers near the smallest ones of float64 lose digits, and a log-sum-exp takes their place."""


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
  """The softmax of logits [n, classes] divided by the temperature: float32, computed in float64."""
  return Softmax(logits, temperature).probabilities()


def set_scores(probabilities: np.ndarray, penalty: float, free: int) -> np.ndarray:
  """How little each class is in question, for sets of classes (RAPS without its random term: Angelopoulos et al. 2021).

  Args:
    probabilities: [n, classes].
    penalty: added for each class from the `free`-th on that is more probable.

  Returns:
    float64 [n, classes]: the probability that one of the more probable classes is right, and the penalties. The most
    probable class has 0.
  """
  order = np.argsort(-probabilities, axis=-1, kind='stable')
  ranked = np.take_along_axis(probabilities, order, -1).astype(np.float64)
  before = np.cumsum(ranked, -1) - ranked
  before += penalty * np.maximum(np.arange(1, ranked.shape[-1] + 1) - free, 0)
  scores = np.empty_like(before)
  np.put_along_axis(scores, order, before, -1)
  return scores


def _limit(value: float | None) -> float:
  return np.inf if value is None else value


def confidence(logits: Any, score: str, temperature: float = 1.0) -> np.ndarray:
  """-log(1 - s) of a probability score s, computed in float64.

  A softmax in float32 is exactly 1 from a logit gap of about 17, and 1 - p in float64 is 0 from about 37. These keep
  their order to any finite gap.

  Args:
    logits: [..., C], C >= 2.
    score: 'max_prob' (largest probability p1), 'entropy' (1 + sum p log p / log C) or 'margin' (p1 - p2).
    temperature: T > 0 that divides the logits.

  Returns:
    float64 [...], >= 0 and finite; higher is more confident. 0 where logits are not finite.
  """
  logits = np.asarray(logits)
  rows = logits.reshape(-1, logits.shape[-1])
  return Softmax(rows, temperature).confidence(score).reshape(logits.shape[:-1])[()]


def _log_entropy(others: np.ndarray, log_odds: np.ndarray, log_total: np.ndarray) -> np.ndarray:
  """log of -sum p log p, which is itself 0 in float64 from a logit gap of about 750."""
  tiny = log_odds < -40  # here -log p1 = log(1 + exp(log_odds)) = exp(log_odds) to the last bit
  log_surprise = np.where(tiny, log_odds, np.log(np.where(tiny, 1.0, log_total)))
  terms = others + np.log(log_total[..., None] - np.where(np.isinf(others), -1.0, others))
  return np.logaddexp(log_surprise, _log_sum_exp(terms)) - log_total


def _log_sum_exp(x: np.ndarray) -> np.ndarray:
  largest = x.max(-1, keepdims=True)
  return np.log(np.exp(x - largest).sum(-1)) + largest[..., 0]


def to_confidence(score_value: Any, score: str) -> np.ndarray:
  """From the scale of the score (0.9, or 3 labels) to that of `confidence`; probability 1 becomes +inf: no exit."""
  value = np.asarray(score_value, np.float64)
  if score == 'patience':
    return value
  with np.errstate(divide='ignore'):
    return -np.log1p(-value)


def load(
  folder: str | os.PathLike[str], provider: str = 'cpu', threads: int = 0, precision: str = 'float32'
) -> Adaptive:
  """Reads a bundle, and checks its version and the checksums of the files it needs.

  Args:
    folder: of the bundle.
    provider: 'cpu' (ONNX Runtime) or 'openvino'.
    threads: per stage, at most the number of cores; 0: one per core.
    precision: 'float32'; or 'auto', the provider's own choice: on some processors OpenVINO computes in bfloat16, which
      is faster and changes answers.

  Raises:
    BundleError: the bundle is damaged, a package is missing, or the threads or the precision are unknown.
  """
  cores, folder = os.cpu_count() or 1, Path(folder)
  if threads < 0:
    raise BundleError(f'expected 0 threads or more, found {threads}; set --threads')
  if threads > cores:  # Each takes memory; 100,000 take all of it.
    raise BundleError(f'expected {cores} threads at most, one per core, found {threads}; set --threads')
  bundle = _json(folder / BUNDLE, dict, _content(folder / BUNDLE))
  if bundle.get('schema_version') != SCHEMA_VERSION:
    found = bundle.get('schema_version')
    raise BundleError(
      f'expected {folder / BUNDLE} of schema_version {SCHEMA_VERSION}, found {_shown(found)}; '
      'use the run.py of that bundle'
    )
  known = _checked_bundle(folder, bundle)
  make = _maker(provider, threads, precision)
  paths = {name: folder / stage['file'] for name, stage in known['stages'].items()}
  stages = {
    name: (paths[name], _as_stage(make(paths[name]), stage, paths[name], known['num_classes']))
    for name, stage in known['stages'].items()
  }
  shape = known['side'], known['side'], known['channels']
  visited, every = (
    _not_damaged([stages[name] for name in known[names]], shape) for names in ('visited_stages', 'all_stages')
  )
  return Adaptive(
    known,
    dict(zip(known['visited'], visited, strict=True)),
    dict(zip(known['exits'], every, strict=True)),
    known['all_macs'],
    shape,
    known['mean'],
    known['std'],
    known['class_names'],
    scaling=Scaling(known['short_side'], known['interpolation']),
  )


def _checked_bundle(folder: Path, bundle: dict[str, Any]) -> dict[str, Any]:
  """The fields of a bundle's files, all of which `_RULES` allow; checks the checksums of those files.

  Raises:
    BundleError: the first field, file or checksum that is wrong.
  """

  def sealed(name: str) -> bytes:
    content, expected = _content(folder / name), known['checksums'].get(name, 'none')
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
      raise BundleError(
        f'{folder / name} is not what was exported: expected sha256 {expected:.12}, found {found:.12}; {_AGAIN}'
      )
    return content

  def check(name: str, fields: Mapping[str, Any], rules: Mapping[str, _Rule], prefix: str = '') -> None:
    for field, (holds, words) in rules.items():
      if field not in fields:
        raise BundleError(f'{folder / name} lacks {prefix}{field}; {_AGAIN}')
      if not holds(fields[field], known):
        found = _shown(fields[field])
        raise BundleError(
          f'{folder / name}: {prefix}{field} must be {words.format_map(known)}, found {found}; {_AGAIN}'
        )
      known[prefix + field] = fields[field]

  known: dict[str, Any] = {}
  check(BUNDLE, bundle, _RULES['bundle'])
  if 'onnx' not in known['formats']:
    formats = ', '.join(known['formats'])
    raise BundleError(f'expected ONNX stages in {folder}, found {formats}; export with --format=onnx')
  for name, stage in known['stages'].items():
    check(BUNDLE, stage, _RULES['stage'], f'stages.{name}.')
  # Bundles from before a field lack it.
  for name, optional in ((EXITS, dict.fromkeys(('thresholds', *PROMISES))), (PREPROCESSING, TO_SIDE._asdict())):
    check(name, optional | _json(folder / name, dict, sealed(name)), _RULES[name])
  check(CLASSES, {'class_names': _json(folder / CLASSES, list, sealed(CLASSES))}, _RULES[CLASSES])
  check(BUNDLE, bundle, _RULES['order'])
  for stage in known['stages'].values():
    if _has_external_data(sealed(stage['file']), folder / stage['file']):
      raise BundleError(
        f'{folder / stage["file"]} keeps weights in another file, which no checksum covers; export the run again'
      )
  return known


_Rule = tuple[Callable[[Any, Mapping[str, Any]], bool], str]
"""Whether a value is valid, given the fields before it, and what it must be."""


def _is_number(value: Any, least: float = 0, most: float = sys.float_info.max) -> bool:
  return type(value) in (int, float) and least <= value <= most  # False for NaN.


def _is_count(value: Any, least: int = 0, most: int = 2**63 - 1) -> bool:
  return type(value) is int and least <= value <= most


def _is_text(value: Any) -> bool:
  return isinstance(value, str)


def _is_object(value: Any) -> bool:
  return isinstance(value, dict)


def _is_tensor(value: Any) -> bool:
  return isinstance(value, dict) and isinstance(value.get('name'), str)


def _is_file(value: Any) -> bool:
  return isinstance(value, str) and value.endswith('.onnx') and value.isprintable() and not set(value) & set('/\\:')


def _rises(values: Sequence[float]) -> bool:
  return all(low <= high for low, high in zip(values, values[1:], strict=False))


def _each(holds: Callable[[Any], bool], counted: str = '') -> Callable[[Any, Mapping[str, Any]], bool]:
  """A rule for lists. counted: the field with the number of values, or with as many; '': any number."""

  def rule(values: Any, known: Mapping[str, Any]) -> bool:
    count = known.get(counted)
    right = count is None or isinstance(values, list) and len(values) == (count if type(count) is int else len(count))
    return right and isinstance(values, list) and all(map(holds, values))

  return rule


def _all_of(holds: Callable[[Any], bool]) -> Callable[[Any, Mapping[str, Any]], bool]:
  """A rule for objects that are not empty."""
  return lambda value, known: isinstance(value, dict) and bool(value) and all(map(holds, value.values()))


def _are_exits(values: Any, known: Mapping[str, Any]) -> bool:
  return _each(lambda value: _is_count(value, 1))(values, known) and bool(values) and values == sorted(set(values))


def _are_visited(values: Any, known: Mapping[str, Any]) -> bool:
  return _are_exits(values, known) and set(values) <= set(known['exits']) and values[-1] == known['exits'][-1]


def _are_thresholds(values: Any, known: Mapping[str, Any]) -> bool:
  if not _each(lambda value: value is None or _is_number(value), 'exits')(values, known) or values[-1] != 0:
    return False
  return {number for number, at in zip(known['exits'], values, strict=True) if at is not None} <= set(known['visited'])


def _are_scores(values: Any, known: Mapping[str, Any]) -> bool:
  if values is None:
    return True
  if not _each(lambda value: value is None or _is_number(value), 'exits')(values, known):
    return False
  for value, at in zip(values, known['confidence_thresholds'], strict=True):
    score = at if at is None or known['score'] == 'patience' else -np.expm1(-at)
    if value is not score and (value is None or score is None or abs(value - score) > 1e-9):
      return False
  return True


def _are_macs(values: Any, known: Mapping[str, Any]) -> bool:
  if not _each(lambda value: value is None or _is_number(value, most=2**63), 'exits')(values, known):
    return False
  costs = {number: cost for number, cost in zip(known['exits'], values, strict=True) if cost is not None}
  return list(costs) == known['visited'] and _rises(list(costs.values()))


def _are_in_turn(counted: str) -> Callable[[Any, Mapping[str, Any]], bool]:
  """A rule for the names of stages: each takes features that those before it gave and kept."""

  def rule(names: Any, known: Mapping[str, Any]) -> bool:
    if not _each(lambda name: isinstance(name, str) and name in known['stages'], counted)(names, known):
      return False
    if len(set(names)) < len(names):
      return False
    carried = {'images'}
    for stage in (known['stages'][name] for name in names):
      takes, gives = ({tensor['name'] for tensor in stage[side]} for side in ('takes', 'gives'))
      if not takes <= carried:
        return False
      carried = carried & set(stage['keeps']) | gives
    return True

  return rule


def _is_share(value: Any) -> bool:
  return _is_number(value) and 0 < value < 1


def _is_reject(value: Any, known: Mapping[str, Any]) -> bool:
  if value is None:
    return True
  if not isinstance(value, dict) or known['score'] == 'patience' or 'confidence_threshold' not in value:
    return False
  at = value['confidence_threshold']
  return _is_share(value.get('risk')) and _is_share(value.get('delta')) and (at is None or _is_number(at))


def _are_sets(value: Any, known: Mapping[str, Any]) -> bool:
  if value is None:
    return True
  if not isinstance(value, dict) or 'anytime' not in value or not isinstance(value.get('limits'), list):
    return False
  limits = [*value['limits'], value['anytime']]
  return (
    _is_share(value.get('coverage'))
    and _is_number(value.get('penalty'))
    and _is_count(value.get('free'), 1)
    and len(limits) == len(known['exits']) + 1
    and all(limit is None or _is_number(limit) for limit in limits)
  )


def _are_seen(value: Any, known: Mapping[str, Any]) -> bool:
  if value is None:
    return True
  names = ('images', 'edges', 'counts', 'classes', 'wrong')
  if not isinstance(value, dict) or not set(names) <= set(value):
    return False
  images, edges, counts, classes, wrong = (value[name] for name in names)
  answered = value.get('answered', images)  # Without --reject, all are.
  lists = [edges, counts, classes]
  if not (_is_count(images, 1) and all(isinstance(each, list) for each in lists)):
    return False
  if not len(edges) == len(counts) == len(known['exits']) or len(classes) != known.get('num_classes', len(classes)):
    return False
  if not all(isinstance(each, list) for each in (*edges, *counts)):
    return False
  return (
    all(_rises(each) and all(_is_number(edge, most=1) for edge in each) for each in edges)
    and all(len(each) == len(edge) + 1 and all(map(_is_count, each)) for each, edge in zip(counts, edges, strict=True))
    and all(map(_is_count, classes))
    and sum(map(sum, counts)) == sum(classes) == images
    and _is_count(answered, most=images)
    and (wrong is None or _is_count(wrong, most=answered))
  )


PROMISES: dict[str, _Rule] = {
  'reject': (
    _is_reject,
    'null, or, unless the score is patience, an object with risk and delta between 0 and 1 and a confidence_threshold '
    'of 0 or more, or null',
  ),
  'sets': (
    _are_sets,
    'null, or an object with a coverage between 0 and 1, a penalty of 0 or more, free of 1 or more, and limits of 0 or '
    'more, or null, for each exit and for anytime',
  ),
  'seen': (
    _are_seen,
    'null, or an object with the number of images, and for each exit increasing edges from 0 to 1 and counts between '
    'them, counts of classes, and wrong, a count or null, all of that many images, or wrong of answered, a count, if '
    'there is one',
  ),
}
"""Fields of exits.json that plans without such promises lack. The rules read `exits` and `score`."""

_LARGEST_SIDE = 13_377  # Squared, it is within MAX_PIXELS.
_IN_TURN = 'names of stages, one for each exit that is run, each of which takes what those before it give'
_RULES: dict[str, dict[str, _Rule]] = {
  'bundle': {
    'formats': (_each(_is_text), 'a list of names'),
    'num_classes': (lambda value, known: _is_count(value, 1), 'an integer above 0'),
    'checksums': (_all_of(_is_text), 'an object of texts'),
    'stages': (_all_of(_is_object), 'an object of objects'),
  },
  'stage': {
    'file': (lambda value, known: _is_file(value), 'the name of an .onnx file in the folder'),
    'takes': (_each(_is_tensor), 'a list of objects with a name'),
    'gives': (_each(_is_tensor), 'a list of objects with a name'),
    'keeps': (_each(_is_text), 'a list of names'),
  },
  EXITS: {
    'exits': (_are_exits, 'increasing exit numbers'),
    'visited': (_are_visited, 'increasing numbers of exits, the last included'),
    'score': (lambda value, known: value in SCORES, f'one of {", ".join(SCORES)}'),
    'temperatures': (_each(lambda value: _is_number(value, 1e-9, 1e9), 'exits'), 'a number above 0 for each exit'),
    'confidence_thresholds': (
      _are_thresholds,
      'a number of 0 or more, or null, for each exit, null where it is not visited, the last 0',
    ),
    'thresholds': (_are_scores, 'confidence_thresholds on the scale of the score, by which run.py exits'),
    'macs': (_are_macs, 'a number of 0 or more for each visited exit, none less than the one before, null for others'),
    **PROMISES,
  },
  PREPROCESSING: {
    'side': (lambda value, known: _is_count(value, 1, _LARGEST_SIDE), f'an integer from 1 to {_LARGEST_SIDE:,}'),
    'channels': (lambda value, known: type(value) is int and value in (1, 3), '1 or 3'),
    'mean': (_each(lambda value: _is_number(value, 0, 1), 'channels'), 'a number from 0 to 1 for each channel'),
    'std': (_each(lambda value: _is_number(value, 1e-9, 1), 'channels'), 'a number above 0, 1 at most, per channel'),
    'short_side': (
      lambda value, known: value is None or _is_count(value, known['side'], _LARGEST_SIDE),
      f'null, or an integer from side to {_LARGEST_SIDE:,}',
    ),
    'interpolation': (lambda value, known: value in INTERPOLATIONS, f'one of {", ".join(INTERPOLATIONS)}'),
  },
  CLASSES: {'class_names': (_each(_is_text, 'num_classes'), 'a list of {num_classes} names')},
  'order': {
    'visited_stages': (_are_in_turn('visited'), _IN_TURN),
    'all_stages': (_are_in_turn('exits'), _IN_TURN),
    'all_macs': (
      lambda values, known: _each(_is_count, 'exits')(values, known) and _rises(values),
      'an integer of 0 or more for each exit, none less than the one before',
    ),
  },
}
"""What each field must be, in the order of checking. `bundle`, `stage` and `order` are fields of bundle.json."""

_AGAIN = 'copy or export the bundle again'
_LARGEST_FILE = 2**31  # Of what Protobuf, and so ONNX, can hold.


def _shown(value: Any) -> str:
  try:
    text = json.dumps(value)
  except RecursionError:
    return 'deeply nested values'
  return text if len(text) <= 60 else text[:57] + '...'


def _open(path: str | Path) -> BinaryIO:
  """Opens a file. Raises OSError also for pipes, which would wait for a writer, and devices, which do not end."""
  mode = os.stat(path).st_mode
  if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
    raise OSError(errno.EINVAL, 'not a regular file')
  return open(path, 'rb')


def _content(path: Path) -> bytes:
  try:
    with _open(path) as file:
      if os.fstat(file.fileno()).st_size > _LARGEST_FILE:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
      return file.read()
  except FileNotFoundError as error:
    if path.name == BUNDLE:
      raise BundleError(f'expected a bundle with a {path.name} in {path.parent}, found none; set --bundle') from error
    raise BundleError(f'expected {path}, found none; {_AGAIN}') from error
  except OSError as error:
    raise BundleError(f'{path} cannot be read ({error.strerror}); {_AGAIN}') from error


def _json(path: Path, kind: type, content: bytes) -> Any:
  what = {dict: 'object', list: 'list'}[kind]
  try:
    value = json.loads(content.decode())
  except (ValueError, RecursionError) as error:
    raise BundleError(f'{path} is not a JSON {what} ({error}); {_AGAIN}') from error
  if not isinstance(value, kind):
    raise BundleError(f'{path} is not a JSON {what} (it holds {_shown(value)}); {_AGAIN}')
  return value


# Fields of ONNX's messages that lead to tensors, by number: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
_TENSORS_IN = {
  'model': {7: 'graph', 20: 'training', 25: 'function'},
  'training': {1: 'graph', 2: 'graph'},
  'function': {7: 'node', 11: 'attribute'},
  'graph': {1: 'node', 5: 'tensor', 15: 'sparse'},
  'node': {5: 'attribute'},
  'attribute': {5: 'tensor', 6: 'graph', 10: 'tensor', 11: 'graph', 22: 'sparse', 23: 'sparse'},
  'sparse': {1: 'tensor', 2: 'tensor'},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14


def _has_external_data(model: bytes, path: Path) -> bool:
  """Whether a tensor of an ONNX model is in another file, which the runtimes would read from anywhere below."""
  pending = [('model', memoryview(model))]
  try:
    while pending:
      kind, message = pending.pop()
      for field, value in _protobuf_fields(message):
        if kind == 'tensor':
          if field == _EXTERNAL_DATA or field == _DATA_LOCATION and value:
            return True
        elif isinstance(value, memoryview) and field in _TENSORS_IN[kind]:
          pending.append((_TENSORS_IN[kind][field], value))
  except (IndexError, ValueError) as error:
    raise BundleError(f'{path} is not an ONNX model; {_AGAIN}') from error
  return False


def _protobuf_fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
  """The fields of a Protobuf message: (number, integer or bytes)."""
  place = 0

  def varint() -> int:
    nonlocal place
    value = shift = 0
    while True:
      byte = message[place]
      value, place, shift = value | (byte & 127) << shift, place + 1, shift + 7
      if byte < 128:
        return value
      if shift > 63:
        raise ValueError('a number of more than 64 bits')

  while place < len(message):
    key = varint()
    if key & 7 == 0:
      yield key >> 3, varint()
      continue
    size = {1: 8, 5: 4}.get(key & 7) or varint()
    if key & 7 not in (1, 2, 5) or place + size > len(message):
      raise ValueError('truncated, or no wire type that ONNX uses')
    yield key >> 3, message[place : place + size]
    place += size


Session = Callable[[Sequence[str], Mapping[str, np.ndarray]], Sequence[Any]]
"""From the names of outputs, and inputs by name, to those outputs."""


def _as_stage(session: Session, spec: Mapping[str, Any], path: Path, num_classes: int) -> Stage:
  takes, gives = [entry['name'] for entry in spec['takes']], [entry['name'] for entry in spec['gives']]
  keeps = set(spec['keeps'])

  def stage(carried: Carried) -> tuple[Carried, np.ndarray]:
    logits, *made = session(['logits', *gives], {name: carried[name] for name in takes})
    if logits.shape[1:] != (num_classes,):
      raise BundleError(f'expected {num_classes} finite logits per image from {path}, found others; {_AGAIN}')
    kept = {name: values for name, values in carried.items() if name in keeps}
    return kept | dict(zip(gives, made, strict=True)), logits

  return stage


def _maker(provider: str, threads: int, precision: str) -> Callable[[Path], Session]:
  if provider not in PROVIDERS:
    raise BundleError(f"unknown provider '{provider}', expected one of {', '.join(PROVIDERS)}; set --provider")
  if precision not in PRECISIONS:
    raise BundleError(f"unknown precision '{precision}', expected one of {', '.join(PRECISIONS)}; set --precision")
  module = 'openvino' if provider == 'openvino' else 'onnxruntime'
  try:
    importlib.import_module(module)
  except ImportError as error:
    raise BundleError(f'expected {module} for --provider={provider}, found none; pip install {module}') from error
  open_session = functools.partial(_openvino, precision) if provider == 'openvino' else _onnxruntime

  def make(path: Path) -> Session:
    def unfit(verb: str, error: Exception) -> BundleError:  # Both raise their own exceptions.
      reason = ' '.join(str(error).split())[:300] or type(error).__name__
      return BundleError(f'{module} cannot {verb} {path} ({reason}); export the run again, or pip install -U {module}')

    try:
      run = open_session(threads, path)
    except Exception as error:
      raise unfit('load', error) from error

    def session(outputs: Sequence[str], inputs: Mapping[str, np.ndarray]) -> Sequence[Any]:
      try:
        return run(outputs, inputs)
      except Exception as error:
        raise unfit('run', error) from error

    return session

  return make


def _onnxruntime(threads: int, path: Path) -> Session:
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = threads
  options.log_severity_level = 3
  # Otherwise the threads of one stage keep spinning on the cores that the next stage needs.
  options.add_session_config_entry('session.force_spinning_stop', '1')
  return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider']).run


def _openvino(precision: str, threads: int, path: Path) -> Session:
  import openvino  # pyright: ignore[reportMissingImports]  An optional alternative, which the tests do without.

  config = {'PERFORMANCE_HINT': 'LATENCY'}
  config |= {'INFERENCE_PRECISION_HINT': 'f32'} if precision == 'float32' else {}
  config |= {'INFERENCE_NUM_THREADS': threads} if threads else {}
  model = openvino.Core().compile_model(str(path), 'CPU', config)
  mine = threading.local()  # A request serves only one thread at a time.

  def run(outputs: Sequence[str], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    if not hasattr(mine, 'request'):
      mine.request = model.create_infer_request()
    found = mine.request.infer(dict(inputs))
    return [np.array(found[name]) for name in outputs]

  return run


def _not_damaged(stages: Sequence[tuple[Path, Stage]], shape: tuple[int, int, int]) -> list[Stage]:
  """Stages in turn, with their files, which refuse weights with which no image has finite logits.

  Those of some images may overflow. Where all of a batch do, a gray image tells whether it is the weights.
  """

  def checked(last: int) -> Stage:
    path, own = stages[last]

    def stage(carried: Carried) -> tuple[Carried, np.ndarray]:
      features, logits = own(carried)
      if len(logits) and not np.isfinite(logits).all(-1).any():
        after, expected = {'images': np.zeros((1, *shape), np.float32)}, logits
        for _, each in stages[: last + 1]:
          after, expected = each(after)
        if not np.isfinite(expected).all():
          raise BundleError(f'expected {logits.shape[1]} finite logits per image from {path}, found others; {_AGAIN}')
      return features, logits

    return stage

  return [checked(index) for index in range(len(stages))]


class TooManyPixels(Exception):
  """An image is larger than a limit. Its text: what was expected and what was found. flag: that sets the limit."""

  flag = '--max-pixels'


class TooMuchMemory(TooManyPixels):
  """An image would take more memory than the limit."""

  flag = '--max-memory'


class _Refused(ValueError):
  """An image is not read although it could be; without its metadata it would not be either."""


_MOST_READS = 2**14
"""The most parts of a file, besides one per 256 bytes, that Pillow reads one by one in Python."""


class _Counted:
  """An open file of which not too many parts can be read, so that one made of tiny parts does not take long.

  Attributes:
    left: parts that may still be read.
  """

  def __init__(self, file: BinaryIO):
    self.seek, self.tell, self._read, self._file = file.seek, file.tell, file.read, file
    self.left = _MOST_READS + file.seek(0, io.SEEK_END) // 256
    file.seek(0)

  def read(self, size: int = -1) -> bytes:
    """Reads a part."""
    self.left -= 1
    if self.left < 0:
      raise _Refused('expected an image of fewer and larger parts (segments, chunks or comments); encode it again')
    return self._read(size)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._file, name)


def decode_image(
  encoded: bytes | BinaryIO,
  side: int,
  channels: int,
  max_pixels: int = MAX_PIXELS,
  max_memory: int = MAX_MEMORY,
  scaling: Scaling = TO_SIDE,
) -> np.ndarray:
  """Decodes an image from bytes or an open file, rotated by its EXIF orientation.

  Accepts the formats in FORMATS, in every mode that Pillow knows; takes the first frame of an animation. Damaged
  metadata do not matter if the pixels can be decoded. A JPEG that would take more than MAX_MEMORY is decoded at a half,
  a quarter or an eighth of its size, whatever the limit.

  Args:
    max_pixels, max_memory: limits on the pixels, and on the bytes that decoding takes.
    scaling: see `fit_image`.

  Returns:
    uint8 [side, side, channels], see `fit_image`.

  Raises:
    TooManyPixels: a limit is exceeded, which is checked before the pixels are decoded.
    Exception: any that Pillow raises for bytes that are not a complete image; see `damage`.
  """
  return _with_retry(encoded, lambda file: _decode(file, side, channels, max_pixels, max_memory, scaling))


def decoding_memory(encoded: bytes | BinaryIO, max_pixels: int = MAX_PIXELS, max_memory: int = MAX_MEMORY) -> int:
  """The bytes that `decode_image` would take at most, by the header of an image.

  Raises:
    TooManyPixels, Exception: as `decode_image`.
  """

  def memory(file: Any) -> int:
    image, taken = _opened(file, max_pixels, max_memory)
    with image:
      return taken

  return _with_retry(encoded, memory)


def _with_retry(encoded: bytes | BinaryIO, read: Callable[[Any], Any]) -> Any:
  """Reads an image; if that fails, once more without the metadata."""
  file = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
  try:
    return read(_Counted(file))
  except (TooManyPixels, _Refused):
    raise
  except Exception:
    with contextlib.suppress(Exception):
      file.seek(0)
      if file.read(4).startswith(_WITH_METADATA):  # Otherwise a huge file would be read for nothing.
        file.seek(0)
        return read(_Counted(io.BytesIO(_without_metadata(file.read()))))
    raise


def _decode(file: Any, side: int, channels: int, max_pixels: int, max_memory: int, scaling: Scaling) -> np.ndarray:
  image, _ = _opened(file, max_pixels, max_memory)
  with image:
    if image.format == 'TIFF':
      _silence_libtiff()
    halved = image.mode in ('LA', 'RGB', 'RGBA') and ';16' in str(image.tile)
    if image.tile and image.tile[0][0] == 'ppm':
      upright = _scaled_samples(image)
    else:
      _scale_transparent_color(image)
      image.load()
      if halved:
        _check_upper_bytes(image)
      upright = _upright(image, max_memory)
    if upright is not image:
      image.close()  # Frees its pixels.
    return fit_image(upright, side, channels, scaling)


def _scaled_samples(image: Any) -> Any:
  """The pixels of a binary PGM or PPM by the largest sample that it declares, which Pillow scales one by one."""
  from PIL import Image

  (_, _, offset, (_, most)), (width, height) = image.tile[0], image.size
  dtype, bands = np.dtype('>u2' if most > 255 else 'u1'), 1 if image.mode in ('L', 'I') else 3
  scaled = np.rint(np.arange(most + 1) * (255 / most)).astype(np.uint8)
  pixels = np.empty((height, width, bands), np.uint8)
  image.fp.seek(offset)
  for top in range(0, height, rows := max(_STRIP // width, 1)):
    strip = pixels[top : top + rows]
    encoded = image.fp.read(strip.size * dtype.itemsize)
    if len(encoded) < strip.size * dtype.itemsize:
      raise OSError('image file is truncated')
    samples = np.frombuffer(encoded, dtype)
    if samples.max() > most:
      raise _Refused(f'expected samples of at most {most:,}, as the file declares, found {samples.max():,}')
    strip[:] = scaled[samples].reshape(strip.shape)
  return Image.fromarray(pixels if bands == 3 else pixels[..., 0])


def _scale_transparent_color(image: Any) -> None:
  """Scales the transparent color of a PNG of 2, 4 or 3 x 16 bits, of which Pillow scales the pixels only."""
  key = image.info.get('transparency')
  if not image.tile:  # A file without pixels, which Pillow refuses when it loads them.
    return
  if image.format == 'PNG' and isinstance(key, int):
    image.info['transparency'] = key * {'L;2': 85, 'L;4': 17}.get(image.tile[0][3], 1)
  elif isinstance(key, tuple) and ';16' in str(image.tile):
    image.info['transparency'] = tuple(value >> 8 for value in key)


def _check_upper_bytes(image: Any) -> None:
  """Raises ValueError if the upper bytes, all that Pillow keeps of 16-bit colors, are those of 14 bits or fewer.

  They would be too dark, and nearly black with 12 bits. (Gray of 16 bits is kept whole and scaled by its range.)
  """
  colors = 1 if image.mode == 'LA' else 3
  largest = max(high for _, strip in _strips(image) for _, high in strip.getextrema()[:colors])
  if largest < 64:
    raise _Refused(
      f'expected 16-bit colors that use the range up to 65,535, found at most {256 * largest + 255:,}; '
      f'convert the image to 8 bits'
    )


def _opened(file: Any, max_pixels: int, max_memory: int) -> tuple[Any, int]:
  """An image whose pixels are not decoded yet, and the bytes that decoding it takes."""
  from PIL import Image

  if max_pixels > MAX_PIXELS and Image.MAX_IMAGE_PIXELS is not None:  # Beyond twice its limit, Pillow opens nothing.
    Image.MAX_IMAGE_PIXELS = max(max_pixels, Image.MAX_IMAGE_PIXELS)
  try:
    _check_tiles(file)
    image = Image.open(file, formats=FORMATS)
  except Image.DecompressionBombError as error:
    raise TooManyPixels(f'expected at most {max_pixels:,.0f} pixels, found many more') from error
  try:
    width, height = image.size
    if width * height > max_pixels:
      raise TooManyPixels(f'expected at most {max_pixels:,.0f} pixels, found {width} x {height}')
    _check_blocks(image, max_pixels)
    _check_speed(image, file)
    if image.tile and image.tile[0][0] == 'bmp_rle':
      file.left += 2 * (width + 2) * height  # Pillow reads each run.
    turned, coefficients = _is_turned(image), 0
    if 'progressive' in image.info:  # A JPEG of which libjpeg keeps all coefficients, 2 bytes each.
      coefficients = 2 * len(image.getbands()) * width * height
    if image.format in ('JPEG', 'MPO') and coefficients + _memory(image, turned) > MAX_MEMORY:
      fits = (scale for scale in (2, 4, 8) if coefficients + _memory(image, turned) / scale**2 <= MAX_MEMORY)
      scale = next(fits, 8)
      image.draft(None, (max(width // scale, 1), max(height // scale, 1)))
    memory = coefficients + _memory(image, turned)
    _check_memory(memory, max_memory, (width, height))
  except BaseException:
    image.close()
    raise
  return image, memory


def _memory(image: Any, turned: bool) -> int:
  """The bytes that pixels take at most while they are decoded, rotated, converted and resized, as measured."""
  as_stored = _BYTES_STORED.get(image.mode, 4)
  copied = turned or image.mode not in ('1', 'L', 'RGB') or 'transparency' in image.info
  pixels = image.size[0] * image.size[1]
  by_decoder = max(_DECODER_BYTES.get(image.format, 0) * pixels, _block(image)[2])
  by_decoder += _DECODED_HERE.get(image.tile[0][0] if image.tile else '', 0) * pixels
  return (as_stored + 4 * copied) * pixels + by_decoder


def _block(image: Any) -> tuple[int, int, int]:
  """Width, height and bytes of a tile or strip of a TIFF, which libtiff decodes whole, however small the image is."""
  if image.format != 'TIFF':
    return 0, 0, 0

  def tag(number: int, default: int) -> int:
    value = image.tag_v2.get(number, default)
    values = value if isinstance(value, tuple) else (value,)
    return max((int(value) for value in values if isinstance(value, int)), default=default)

  width, height = tag(322, 0), tag(323, 0)
  if not width or not height:
    width, length = tag(256, image.size[0]), tag(257, image.size[1])
    height = min(tag(278, length), length)
  return width, height, width * height * tag(277, 1) * max(tag(258, 1), 1) // 8


def _check_blocks(image: Any, max_pixels: int) -> None:
  width, height, _ = _block(image)
  if width * height > max(max_pixels, _STRIP):  # Tiles may be larger than a small image.
    raise TooManyPixels(f'expected at most {max_pixels:,.0f} pixels, found tiles or strips of {width} x {height}')


_MOST_TILES = 2**16


def _check_tiles(file: Any) -> None:
  """Raises ValueError for a TIFF of too many strips or tiles, all of which Pillow lists when it opens the file."""
  head = file.read(16)
  if head[:2] in (b'II', b'MM') and len(head) == 16:
    order, big = '<' if head[:1] == b'I' else '>', 43 in head[2:4]
    counted, entry = (order + 'Q', order + 'HHQ8x') if big else (order + 'H', order + 'HHI4x')
    (place,) = struct.unpack_from(order + ('Q' if big else 'I'), head, 8 if big else 4)
    file.seek(min(place, file.seek(0, io.SEEK_END)))
    number, size = file.read(struct.calcsize(counted)), struct.calcsize(entry)
    entries = (
      file.read(min(*struct.unpack(counted, number), 65535) * size) if len(number) == struct.calcsize(counted) else b''
    )
    for tag, _, count in struct.iter_unpack(entry, entries[: len(entries) // size * size]):
      if tag in (273, 324) and count > _MOST_TILES:
        raise _Refused(f'expected a TIFF of at most {_MOST_TILES:,} strips or tiles, found {count:,}; save it again')
  file.seek(0)


def _check_speed(image: Any, file: Any) -> None:
  """Raises ValueError for files that take long for the pixels that they have."""
  width, height = image.size
  if image.format in ('JPEG', 'MPO') and (scans := _occurrences(_SCAN, file)) > MAX_SCANS:
    raise _Refused(f'expected a JPEG of at most {MAX_SCANS} scans, found {scans:,}; encode it again')
  if image.tile and image.tile[0][0] in ('ppm_plain', 'bmp_rle') and width * height > MAX_SLOW_PIXELS:
    kind = 'plain PPM' if image.format == 'PPM' else 'run-length encoded BMP'
    raise _Refused(
      f'expected at most {MAX_SLOW_PIXELS:,} pixels in {kind}, found {width} x {height}; convert it to PNG'
    )
  # Pillow copies what follows each comment.
  if image.tile and image.tile[0][0] == 'ppm_plain' and (comments := _occurrences(_COMMENT, file)) > _MOST_COMMENTS:
    raise _Refused(f'expected a plain PPM of at most {_MOST_COMMENTS} comments, found {comments:,}; convert it to PNG')


# A scan's header: marker, length, channels. Longer than a marker: chance does not find it in a video that is appended.
_SCAN = re.compile(rb'\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)')


_COMMENT, _MOST_COMMENTS = re.compile(b'#'), 1000


def _occurrences(what: re.Pattern[bytes], file: Any) -> int:
  """How often something of 5 bytes at most is in a file."""
  place, count, rest = file.tell(), 0, b''
  file.seek(0)
  while part := file.read(2**20):
    part = rest + part
    count += len(what.findall(part))
    rest = part[-4:] if what is _SCAN else b''
  file.seek(place)
  return count


_BYTES_STORED = {'1': 2, 'L': 1, 'P': 1, 'I;16': 2, 'I;16B': 2, 'I;16L': 2, 'I;16N': 2}
"""A pixel, by Pillow's mode; all others take 4."""
_DECODER_BYTES = {'WEBP': 12, 'TIFF': 4}
"""What the libraries of these formats hold in addition, a pixel."""
_DECODED_HERE = {'ppm': 4, 'ppm_plain': 32, 'bmp_rle': 32}
"""What is held in addition, a pixel, where Python decodes: `_scaled_samples`, and Pillow, which is slow besides."""


def _check_memory(memory: int, max_memory: int, size: tuple[int, int]) -> None:
  if memory > max_memory:
    raise TooMuchMemory(
      f'expected an image that takes at most {max_memory / 2**20:,.0f} MiB to decode, '
      f'found {size[0]} x {size[1]} that takes {memory / 2**20:,.0f} MiB'
    )


def _is_turned(image: Any) -> bool:
  """Whether an image whose pixels are not decoded yet will be rotated, as far as it says so already."""
  if 'exif' not in image.info and image.format != 'TIFF':  # Of a PNG, Pillow would decode the pixels to know.
    return False
  try:
    return image.getexif().get(0x0112, 1) != 1
  except Exception:
    return False


@functools.cache
def _silence_libtiff() -> None:
  """Stops libtiff from printing on stderr: what is wrong with an image is reported by the exception."""
  with contextlib.suppress(OSError, AttributeError, StopIteration), open('/proc/self/maps') as maps:
    path = next(line.split()[-1] for line in maps if '/libtiff' in line)
    ctypes.CDLL(path).TIFFSetErrorHandler(None)


def _upright(image: Any, max_memory: int) -> Any:
  """The image rotated by its EXIF orientation; as it is if that cannot be read."""
  from PIL.Image import Transpose

  try:  # ImageOps.exif_transpose also rewrites the other tags, which fails if one is damaged.
    orientation = image.getexif().get(0x0112)
  except Exception:
    return image
  turns = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
  }
  if orientation not in turns:
    return image
  _check_memory(_memory(image, True), max_memory, image.size)  # The EXIF of a PNG may follow the pixels.
  return _usual_mode(image).transpose(turns[orientation])  # Which loses the tags of a TIFF.


def _without_metadata(encoded: bytes) -> bytes:
  """An image file without the parts that its pixels and its orientation do not need: Pillow refuses damaged ones.

  Raises:
    struct.error: it is truncated.
  """
  if encoded.startswith(b'\x89PNG'):
    return encoded[:8] + b''.join(_png_chunks(encoded))
  if encoded.startswith(b'\xff\xd8'):
    return encoded[:2] + b''.join(_jpeg_segments(encoded))
  if encoded.startswith(b'RIFF'):
    chunks = b'WEBP' + b''.join(_webp_chunks(encoded))
    return b'RIFF' + struct.pack('<I', len(chunks)) + chunks
  order = '<' if encoded.startswith(b'II') else '>'
  (place,) = struct.unpack_from(order + 'I', encoded, 4)
  (count,) = struct.unpack_from(order + 'H', encoded, place)
  entries = [encoded[start : start + 12] for start in range(place + 2, place + 2 + 12 * count, 12)]
  kept = [entry for entry in entries if struct.unpack_from(order + 'H', entry)[0] in _TIFF_TAGS]
  directory = struct.pack(order + 'H', len(kept)) + b''.join(kept) + bytes(4)
  return encoded[:place] + directory + encoded[place + len(directory) :]


_WITH_METADATA = b'\x89PNG', b'\xff\xd8', b'RIFF', b'II*\0', b'MM\0*'
# Sizes, samples, color, strips, tiles and orientation.
_TIFF_TAGS = {254, *range(256, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, 320, *range(322, 326)}
_TIFF_TAGS |= {332, 338, 339, 347, 512, 513, 514, *range(519, 522), *range(529, 533)}


_MOST_SEGMENTS, _MOST_DAMAGED = 10_000, 16  # A file that is made of small or damaged ones would take long.
_PNG_CHUNKS = re.compile(b'IHDR|PLTE|tRNS|IDAT|IEND|eXIf')


def _png_chunks(encoded: bytes) -> Iterator[bytes]:
  """The whole chunks of pixels, palette, transparency and EXIF, also behind one whose length is damaged."""
  place, damaged = 8, 0
  while place + 12 <= len(encoded) and damaged < _MOST_DAMAGED:
    (size,) = struct.unpack_from('>I', encoded, place)
    chunk = encoded[place : place + size + 12]
    if chunk[8 + size :] == struct.pack('>I', zlib.crc32(chunk[4 : 8 + size])):
      if _PNG_CHUNKS.match(chunk, 4):
        yield chunk
      place += len(chunk)
    elif found := _PNG_CHUNKS.search(encoded, place + 8):
      place, damaged = found.start() - 4, damaged + 1
    else:
      return


def _jpeg_segments(encoded: bytes) -> Iterator[bytes]:
  """All but comments and the applications' segments; JFIF, EXIF and Adobe's, which names the color space, stay."""
  place, count = 2, 0
  while encoded[place + 1] != 0xDA and count < _MOST_SEGMENTS:  # From the first scan on, everything is pixels.
    count += 1
    marker, size = struct.unpack_from('>xBH', encoded, place)
    end = place + 2 + size
    if marker >= 0xE0 and encoded[end : end + 1] != b'\xff':
      place = _after_damaged_length(encoded, place)
      continue
    keep = marker < 0xE0 or marker in (0xE0, 0xEE) or (marker == 0xE1 and encoded[place + 4 : end][:6] == b'Exif\0\0')
    if keep and marker != 0xFE:
      yield encoded[place:end]
    place = end
  yield encoded[place:]


def _after_damaged_length(encoded: bytes, place: int) -> int:
  """Where the segments of the picture begin: the largest one, as there may be a thumbnail in the damaged segment."""
  found = re.finditer(b'\xff[\xc0-\xc4\xdb\xdd]', encoded[place + 4 : place + 2**18])
  starts = [place + 4 + start.start() for start in itertools.islice(found, 1000)]
  pixels = [_jpeg_pixels(encoded, start) for start in starts]
  if not any(pixels):
    raise ValueError('no picture follows')
  return starts[pixels.index(max(pixels))]


def _jpeg_pixels(encoded: bytes, place: int) -> int:
  """Pixels of the picture whose segments continue at `place`; 0 if they do not lead to it."""
  pixels = 0
  with contextlib.suppress(struct.error):
    for _ in range(100):
      start, marker, size = struct.unpack_from('>BBH', encoded, place)
      if start != 0xFF or size < 2 or marker < 0xC0:
        return 0
      if marker == 0xDA:
        return pixels
      if marker in (0xC0, 0xC1, 0xC2):
        height, width = struct.unpack_from('>HH', encoded, place + 5)
        pixels = height * width
      place += 2 + size
  return 0


_WEBP_CHUNKS = re.compile(b'VP8[ LX]|ALPH|ANIM|ANMF|ICCP|EXIF|XMP ')


def _webp_chunks(encoded: bytes) -> Iterator[bytes]:
  """The chunks of pixels, and whole ones of EXIF, also behind one whose length is damaged."""
  place, damaged, count = 12, 0, 0
  while place + 8 <= len(encoded) and damaged < _MOST_DAMAGED and count < _MOST_SEGMENTS:
    count += 1
    (size,) = struct.unpack_from('<I', encoded, place + 4)
    kind, end = encoded[place : place + 4], place + 8 + size + size % 2
    if end != len(encoded) and not _WEBP_CHUNKS.match(encoded, end):
      found = _WEBP_CHUNKS.search(encoded, place + 4)
      if kind.startswith((b'VP8', b'AL', b'AN')):
        yield encoded[place:]
        return
      if not found:
        return
      place, damaged = found.start(), damaged + 1
      continue
    if kind == b'VP8X':
      yield encoded[place : place + 8] + bytes([encoded[place + 8] & ~0x24]) + encoded[place + 9 : end]
    elif kind.startswith((b'VP8', b'AL', b'AN', b'EXIF')):
      yield encoded[place:end]
    place = end


def fit_image(image: Any, side: int, channels: int, scaling: Scaling = TO_SIDE) -> np.ndarray:
  """Scales the short side, by default to `side`, and crops the center: uint8 [side, side, channels].

  image: a Pillow image; one that already has the size is not resampled. channels: 1 (luminance) or 3 (RGB).
  Transparent pixels are composited on BACKGROUND.
  """
  from PIL import Image, ImageOps

  image = _usual_mode(image)
  if image.has_transparency_data:
    image = _on_background(image)
  mode = 'L' if channels == 1 or image.mode in ('1', 'L') else 'RGB'
  if image.mode != mode:  # Otherwise convert() would copy it.
    image = image.convert(mode)
  method = Image.Resampling[scaling.interpolation.upper()]
  if scaling.short_side in (None, side) and image.size == (side, side):
    fitted = image
  elif scaling.short_side in (None, side):
    fitted = ImageOps.fit(image, (side, side), method)
  else:
    fitted = _scaled_and_cropped(image, side, scaling.short_side, method)
  wanted = 'L' if channels == 1 else 'RGB'
  fitted = fitted if fitted.mode == wanted else fitted.convert(wanted)
  return np.frombuffer(fitted.tobytes(), np.uint8).reshape(side, side, channels)


def _scaled_and_cropped(image: Any, side: int, short_side: int, method: Any) -> Any:
  """As torchvision: what is cropped is scaled too, and sides are rounded in its way."""
  width, height = image.size
  longest = _LONGEST * min(width, height)
  if max(width, height) > longest:  # Otherwise an image of one row could become huge.
    left, top = (max(size - longest, 0) // 2 for size in image.size)
    image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
  short = min(image.size)
  image = image.resize([short_side if size == short else short_side * size // short for size in image.size], method)
  left, top = (round((size - side) / 2) for size in image.size)
  return image.crop((left, top, left + side, top + side))


_LONGEST = 16
"""Of an image that is longer than this many times its short side, only the middle is scaled."""


def _on_background(image: Any) -> Any:
  from PIL import Image

  opaque = Image.new('RGB', image.size)
  for top, strip in _strips(image):
    white = Image.new('RGBA', strip.size, BACKGROUND)
    white.alpha_composite(strip.convert('RGBA'))
    opaque.paste(white.convert('RGB'), (0, top))
  return opaque


_STRIP = 2**20  # Pixels.


def _strips(image: Any) -> Iterator[tuple[int, Any]]:
  """An image in parts, each with its first row, so that what is computed pixel by pixel takes little memory."""
  width, height = image.size
  rows = max(_STRIP // width, 1)
  for top in range(0, height, rows):
    yield top, image.crop((0, top, width, min(top + rows, height)))


def _usual_mode(image: Any) -> Any:
  """The image, in a mode of 8 bits that Pillow converts."""
  signed = image.mode == 'L' and getattr(image, 'tag_v2', {}).get(339) == (2,)
  if signed or image.mode[0] in 'IF':
    return _to_8_bit(image)
  usual = {'La': 'LA', 'LAB': 'RGB'}.get(image.mode)  # Pillow converts LAB to nothing else.
  return image.convert(usual) if usual else image


_WHITES = (255, 1023, 4095, 16383, 65535)


def _to_8_bit(image: Any) -> Any:
  """Scales gray of other depths, which Pillow's convert() clips at 255, to 0..255: an image of mode L.

  Black is 0. White is what the file declares (12 bits in TIFF, the largest sample in PGM or in a TIFF tag) or otherwise
  the smallest of 255, 1023, 4095, 16383 and 65535, for floating-point pixels also 1, that no pixel exceeds; if none
  is, the largest pixel. The largest is also white if floating-point pixels exceed one of these by a tenth or less, as
  resampling makes them, or are up to 16 at most. If pixels are negative, black is the smallest pixel and white the
  largest. Non-finite pixels become black.
  """
  from PIL import Image

  tags = getattr(image, 'tag_v2', {})

  def gray(strip: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Its pixels, which are finite, and those as float64."""
    pixels = np.asarray(strip)
    if pixels.dtype == np.uint8:  # Pillow reads signed samples as unsigned ones, and the other way round.
      pixels = pixels.view(np.int8)
    if pixels.dtype == np.int32 and tags and tags.get(339, (1,)) == (1,):
      pixels = pixels.view(np.uint32)
    finite = np.isfinite(pixels)
    return pixels, finite, np.where(finite, pixels, 0).astype(np.float64)

  ranges = [(values.min(), values.max()) for values in (gray(strip)[2] for _, strip in _strips(image))]
  black, largest = min(*(low for low, _ in ranges), 0), max(high for _, high in ranges)
  if black < 0:
    white = largest
  else:
    declared, floats = list(_declared_whites(image, tags)), image.mode == 'F'
    scales, excess = [*declared, *((1,) if floats else ()), *_WHITES], 1.1 if floats else 1
    white = max(next((scale for scale in scales if largest <= excess * scale), largest), largest)
    if floats and white == 255 and largest < 16 and 255 not in declared:
      white = largest
  found = Image.new('L', image.size)
  for top, strip in _strips(image):
    pixels, finite, values = gray(strip)
    scaled = np.rint((values - black) * (255 / ((white - black) or 1)))
    if tags.get(262) == 0:  # White is zero. Pillow inverts 8-bit samples only.
      scaled = 255 - scaled
    scaled[~finite] = 0
    if isinstance(key := image.info.get('transparency'), int):
      scaled[pixels == key] = BACKGROUND[0]
    found.paste(Image.fromarray(scaled.astype(np.uint8)), (0, top))
  return found


def _declared_whites(image: Any, tags: Mapping[int, Any]) -> Iterator[float]:
  if image.format == 'PPM' and image.mode == 'I':
    yield 65535  # Pillow scales by the largest sample that the header declares.
  for value in (tags.get(341), tags.get(281)):  # SMaxSampleValue, MaxSampleValue.
    yield from value if isinstance(value, tuple) else [value] if value else []
  if tags.get(258) == (12,):
    yield 4095


def damage(error: Exception) -> str:
  """One line that says why `decode_image` failed."""
  from PIL import UnidentifiedImageError

  if isinstance(error, UnidentifiedImageError):  # Its message names an object in memory, not the file.
    return f'not an image in a known format ({", ".join(FORMATS)})'
  return getattr(error, 'strerror', None) or ' '.join(str(error).split()) or type(error).__name__


def read_image(
  file: str,
  side: int,
  channels: int,
  max_pixels: int = MAX_PIXELS,
  max_memory: int = MAX_MEMORY,
  scaling: Scaling = TO_SIDE,
) -> np.ndarray | str:
  """An image file decoded by `decode_image`, or the reason why it cannot be read."""
  try:
    with _open(file) as stream:
      return decode_image(stream, side, channels, max_pixels, max_memory, scaling)
  except FileNotFoundError as error:
    return _DANGLING if os.path.islink(file) else damage(error)
  except TooManyPixels as error:
    return f'{error}; set {error.flag}'
  except Exception as error:  # Damaged bytes make Pillow raise almost anything.
    return damage(error)


class Found(NamedTuple):
  """The files below a folder, sorted: each is in one of these.

  Attributes:
    images: regular files, or links to them, with one of SUFFIXES in any case.
    unreadable: (path, reason) of what has such a suffix and is no regular file, and of folders that cannot be listed.
    left_out: files with other suffixes, hidden ones, and all below hidden and system folders.
  """

  images: list[str]
  unreadable: list[tuple[str, str]]
  left_out: list[str]


_DANGLING = 'a link to a file that does not exist'
_SYSTEM = ('__MACOSX', '@eaDir', '@Recycle', '#recycle', '$RECYCLE.BIN')  # Of archives and file servers.


def is_hidden(name: str) -> bool:
  """Whether files and folders with this name are left out."""
  return name.startswith('.') or name in _SYSTEM


def is_run(names: Collection[str]) -> bool:
  """Whether a folder with these files and folders is that of a training run."""
  return 'config.json' in names and ('dataset.json' in names or 'checkpoints' in names)


def find_images(folder: str) -> Found:
  """The files below a folder. Links are followed; a folder is listed once, under its own path rather than a link's.

  Hidden folders and those of training runs, whose figures are images, are left out.
  """
  found, seen = Found([], [], []), set()
  pending, links, left = [folder], [], []  # What is left out comes last: a link elsewhere may lead to the same folder.
  while pending or links or left:
    hidden = not (pending or links)
    place = pending.pop() if pending else (links or left).pop(0)
    real = os.path.realpath(place)
    if real in seen:
      continue
    seen.add(real)
    try:
      with os.scandir(place) as listed:
        entries = sorted(listed, key=lambda entry: entry.name)
    except OSError as error:
      if hidden:
        found.left_out.append(place)
      else:
        found.unreadable.append((place, error.strerror or str(error)))
      continue
    hidden = hidden or is_run([entry.name for entry in entries])
    for entry in entries:
      out = hidden or is_hidden(entry.name)
      try:
        if entry.is_dir():
          (left if out else links if entry.is_symlink() else pending).append(entry.path)
          continue
        regular = entry.is_file()
      except OSError:  # A circle of links.
        regular = False
      if out or not entry.name.lower().endswith(SUFFIXES):
        found.left_out.append(entry.path)
      elif regular:
        found.images.append(entry.path)
      else:
        found.unreadable.append((entry.path, _DANGLING if entry.is_symlink() else 'not a regular file'))
  return Found(sorted(found.images), sorted(found.unreadable), sorted(found.left_out))


def list_images(paths: Sequence[str]) -> tuple[list[str], list[str]]:
  """The files to read, and those left out of folders.

  Files that are named are read whatever their suffix. What is unreadable in a folder is among the files to read, so
  that reading it reports the reason.

  Args:
    paths: files and folders, in the order wanted.

  Raises:
    BundleError: there are no paths, or a folder has no images.
  """
  if not paths:
    raise BundleError('expected image files or folders of images, found none; name them after the flags')
  files, left_out = [], []
  for path in paths:
    if not os.path.isdir(path):
      files.append(path)
      continue
    found = find_images(path)
    if not found.images and not found.unreadable:
      raise BundleError(f'expected images ({" ".join(SUFFIXES)}) in {path}, found none; name another folder, or files')
    files += sorted([*found.images, *(file for file, _ in found.unreadable)])
    left_out += found.left_out
  return files, left_out


def left_out_line(left_out: Sequence[str], why: str = 'hidden or without the suffix of an image') -> str:
  """One line that counts the files that were left out and names the first."""
  named, more = ', '.join(left_out[:3]), len(left_out) - 3
  files = f'{len(left_out):,} file{"s" * (len(left_out) != 1)}'
  return f'left out {files}, {why}: {named}{f" and {more:,} more" * (more > 0)}'


def printable(text: str) -> str:
  """Text for one line of a terminal: unprintable characters are written as Python's escapes."""
  return ''.join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command with these arguments, those of sys.argv if None.

  Returns:
    The exit code: 0; 1: some files could not be read, or have no finite answer; 2: a user error, nothing was predicted;
    130: interrupted; 141: the reader of standard output has stopped.
  """
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')  # File names may not fit its encoding.
  try:
    given = _parse(argv)
    files, left_out = list_images(given.files)
    if left_out:
      _note(printable(left_out_line(left_out)))
    bundle = _load(given)
    watching = None
    if given.watch is not None:
      alpha = 0.01 if given.alpha is None else given.alpha
      watching = _Watching(Watch(bundle, given.watch, alpha), given.on_drift)
    return _print(bundle, files, given.deadline_ms, (given.max_pixels, given.max_memory), watching)
  except BundleError as error:
    _note(f'error: {printable(" ".join(str(error).split()))}')
    return 2
  except BrokenPipeError:
    return BROKEN_PIPE
  except KeyboardInterrupt:
    _note('stopped at once')
    return 130


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise BundleError(f'{message}; see --help')


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = _Parser(
    prog='python run.py',
    description='Predicts the classes of image files, each at the first exit that is confident enough.',
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('files', nargs='*', metavar='FILE_OR_FOLDER', help='Images; for a folder, all images in it.')
  add('--bundle', default=os.path.dirname(os.path.abspath(__file__)), help="Folder (default: this file's).")
  add('--provider', default='cpu', help=f'One of {", ".join(PROVIDERS)} (default: cpu, which is ONNX Runtime).')
  add('--precision', default='float32', help="float32, or auto: openvino's own, which may change answers.")
  add('--threads', type=int, default=0, help='Per stage (default and maximum: one per core).')
  add('--deadline-ms', type=_milliseconds, help='Time per image: the best answer by then, whatever the thresholds.')
  add('--threshold', type=float, help='Exit where the score reaches this (default: where calibration chose).')
  add('--budget', type=_count, help='Most multiply-adds per image, such as 5M.')
  add('--watch', metavar='STATE.json', help='Test whether answers still look as in calibration; keeps its state there.')
  add('--alpha', type=float, help='Probability of a false alarm of --watch, however long (default: 0.01).')
  add('--on-drift', choices=('warn', 'safe'), help='safe: after an alarm of --watch, no image exits early.')
  add('--max-pixels', type=parse_size, default=MAX_PIXELS, help='Refuse larger images (default: 179M).')
  add(
    '--max-memory',
    type=parse_size,
    default=MAX_MEMORY,
    help='Bytes to decode an image, else refuse it (default: 1.07G).',
  )
  given = parser.parse_intermixed_args(argv)
  if given.watch is None and (given.alpha, given.on_drift) != (None, None):
    raise BundleError('--alpha and --on-drift belong to --watch, found none; set --watch, or leave them out')
  return given


def _milliseconds(text: str) -> float:
  with contextlib.suppress(ValueError):
    if float(text) > 0:
      return float(text)
  raise argparse.ArgumentTypeError(f'expected more than 0 ms, found {text}')


def _count(text: str) -> float:
  scale = {'K': 1e3, 'M': 1e6, 'G': 1e9}.get(text[-1:].upper(), 1)
  try:
    return float(text if scale == 1 else text[:-1]) * scale
  except ValueError as error:
    raise argparse.ArgumentTypeError(f'expected a number such as 5M, found {text}') from error


def parse_size(text: str) -> int:
  """A number of pixels or bytes on the command line, such as 25M."""
  value = _count(text)
  if not 1 <= value < 2**63:
    raise argparse.ArgumentTypeError(f'expected a number above 0 such as 5M, found {text}')
  return int(value)


def _checked_threshold(threshold: float, score: str) -> float:
  fits = threshold >= 0 and threshold % 1 == 0 if score == 'patience' else 0 <= threshold <= 1
  if not fits:
    scale = 'of 0 or more equal labels' if score == 'patience' else 'from 0 to 1'
    raise BundleError(f'expected a threshold {scale}, as {score} is, found {threshold}; set --threshold')
  return threshold


class _Watching:
  """A watch of the command: what it prints, and what follows. safe: after an alarm, no image exits early."""

  def __init__(self, watch: Watch, on_drift: str | None):
    self._watch, self._safe, self._told = watch, on_drift == 'safe', False

  def bundle(self, bundle: Adaptive) -> Adaptive:
    """The bundle for the next images."""
    self._tell()
    return bundle.safe() if self._watch.alarm and self._safe else bundle

  def see(self, answers: Predictions, last: bool) -> None:
    """Sees a wave of answers, the last or not."""
    try:
      self._watch.see(answers)
      if last:
        self._watch.flush()
    except BundleError:  # The state of an alarm cannot be written, and the command ends.
      self._tell()
      raise

  def _tell(self) -> None:
    if self._watch.alarm and not self._told:
      self._told = True
      _note(self._watch.line() + ('; no image exits early now' if self._safe else ''))


def _load(given: argparse.Namespace) -> Adaptive:
  if given.watch is not None and (given.threshold, given.budget, given.deadline_ms) != (None, None, None):
    raise BundleError(
      '--watch compares with the exits of calibration; leave out --threshold, --budget and --deadline-ms, or it'
    )
  if given.deadline_ms is not None and (given.threshold, given.budget) != (None, None):
    raise BundleError('--deadline-ms ignores thresholds and budgets; leave out --threshold and --budget, or it')
  bundle = load(given.bundle, given.provider, given.threads, given.precision)
  bundle = bundle if given.threshold is None else bundle.with_threshold(given.threshold)
  bundle = bundle if given.budget is None else bundle.with_budget(given.budget)
  if bundle.rejects and not (bundle.as_calibrated and given.deadline_ms is None):
    _note('no share of errors among the answers is promised with --threshold, --budget or --deadline-ms')
  return bundle


def _print(
  bundle: Adaptive,
  files: Sequence[str],
  deadline_ms: float | None,
  limits: tuple[int, int],
  watching: _Watching | None = None,
) -> int:
  """Prints a row per image at once, reports unreadable files, and summarizes where images exited."""
  try:
    importlib.import_module('PIL')
  except ImportError as error:
    raise BundleError('expected Pillow to read image files, found none; pip install pillow') from error
  width = min(60, max(map(len, ('file', *map(printable, files)))))
  names = [printable(name) for name in bundle.class_names]
  label_width = min(24, max(map(len, ('label', *names, *([UNKNOWN] if bundle.rejects else [])))))
  layout = f'{{:{width}}}  {{:{label_width}}}  {{:>11}}  {{:>4}}'
  _say(layout.format('file', 'label', 'probability', 'exit') + ('  set' if bundle.coverage else ''))
  exiting, unreadable, unknown = dict.fromkeys(bundle.exits, 0), 0, 0
  for first in range(0, len(files), WAVE):
    wave = files[first : first + WAVE]
    decoded = [_read(file, bundle, limits) for file in wave]
    images = [image for image in decoded if not isinstance(image, str)]
    bundle = watching.bundle(bundle) if watching else bundle
    answers = _predict(bundle, images, deadline_ms)
    if watching:
      watching.see(answers, first + WAVE >= len(files))
    sets = iter(_sets(bundle, answers, deadline_ms is not None, names))
    rows = itertools.starmap(Prediction, zip(*answers, strict=True))
    for file, image in zip(wave, decoded, strict=True):
      answer, held = (None, '') if isinstance(image, str) else (next(rows), next(sets))
      if answer is None or np.isnan(answer.probabilities).any():
        _note(printable(f'error: {file}: {image if answer is None else DIVERGED}'))  # Pillow may quote the file.
        unreadable += 1
        continue
      label = UNKNOWN if answer.unknown else names[answer.label]
      _say(layout.format(printable(file), label, f'{answer.probabilities.max():.3f}', answer.exit) + held)
      exiting[answer.exit] += 1
      unknown += answer.unknown
  if watching:
    watching.bundle(bundle)
  _note(_summary(exiting, unreadable, unknown))
  return int(unreadable > 0)


def _note(line: str) -> None:
  """Prints a line on stderr, if that takes it."""
  if sys.stderr is None:  # Closed. print() would take standard output.
    return
  try:
    print(line, file=sys.stderr, flush=True)
  except OSError:  # Python would try to flush the rest again when it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _say(line: str) -> None:
  try:
    print(line, flush=True)
  except OSError as error:  # Python would try to flush the rest again when it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
      raise
    raise BundleError(
      f'standard output cannot be written ({error.strerror}); make room, or send it elsewhere'
    ) from error


def _read(file: str, bundle: Adaptive, limits: tuple[int, int]) -> np.ndarray | str:
  side, _, channels = bundle.image_shape
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # Pillow warns about odd but readable files.
    return read_image(file, side, channels, *limits, bundle.scaling)


def _predict(bundle: Adaptive, images: Sequence[np.ndarray], deadline_ms: float | None) -> Predictions:
  if not images:
    return bundle._empty(0)
  if deadline_ms is None:
    return bundle.predict(np.stack(images))
  answers = [list(bundle.anytime(image, deadline_ms))[-1] for image in images]
  return Predictions(*map(np.stack, zip(*answers, strict=True)))


def _sets(bundle: Adaptive, answers: Predictions, any_exit: bool, names: Sequence[str]) -> list[str]:
  """The set of each answer, the most probable classes first, as the end of its row."""
  if bundle.coverage is None:
    return [''] * len(answers.labels)
  texts = []
  for row, probabilities in zip(bundle.sets(answers, any_exit), answers.probabilities, strict=True):
    held = [names[label] for label in ranked_classes(row, probabilities)]
    texts.append('  ' + ', '.join(held[:_NAMED]) + (f' and {len(held) - _NAMED:,} more' if len(held) > _NAMED else ''))
  return texts


_NAMED = 5


def ranked_classes(held: np.ndarray, probabilities: np.ndarray) -> list[int]:
  """The classes of a set, bool [classes], most probable first."""
  order = np.argsort(-probabilities, kind='stable')
  return order[held[order]].tolist()


def _summary(exiting: Mapping[int, int], unreadable: int, unknown: int = 0) -> str:
  count = sum(exiting.values())
  total = f'{count:,} image{"s" * (count != 1)}' + (f', {unreadable:,} unreadable' if unreadable else '')
  total += f', {unknown:,} unknown' if unknown else ''
  shares = (f'exit {number}: {100 * images / count:.1f} %' for number, images in exiting.items() if count)
  return '; '.join([total, *shares])


if __name__ == '__main__':
  sys.exit(main())
