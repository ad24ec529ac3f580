"""What the figures of a calibrated run show: plain arrays, accuracies and shares as fractions 0..1."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SPLITS = ('held_out', 'test')


class Curve(NamedTuple):
  """Operating points of one way to choose exits, on one split.

  Attributes:
    cost: [M] mean cost of an image.
    accuracy: [M].
  """

  cost: np.ndarray
  accuracy: np.ndarray


class RiskCurve(NamedTuple):
  """Operating points of one threshold shared by all exits, on one split.

  Attributes:
    speed_up: [M] cost of the last exit alone over the mean cost.
    risk: [M] mean loss against the full network.
  """

  speed_up: np.ndarray
  risk: np.ndarray


class Bins(NamedTuple):
  """One reliability diagram: `measures.reliability` and the ECE; an empty bin's means are ignored.

  Attributes:
    counts: [15] images.
    confidence: [15] mean probability of the predicted class.
    accuracy: [15].
    ece: expected calibration error.
  """

  counts: np.ndarray
  confidence: np.ndarray
  accuracy: np.ndarray
  ece: float


class Reliability(NamedTuple):
  """One exit on the test split, with its logits as they are and divided by its temperature."""

  temperature: float
  before: Bins
  after: Bins


@dataclass(frozen=True)
class Risk:
  """Risk against speed-up.

  Attributes:
    loss: 'gap' (right in full, wrong early) or 'disagreement' (another answer than in full).
    thresholds: [M] shared by all exits, as scores (0..1; equal predictions for patience); NaN: nobody leaves.
    curves: for each split.
    chosen: the plan's own point, a curve of one, for each split.
    epsilon: the risk asked for; None without risk control.
  """

  loss: str
  thresholds: np.ndarray
  curves: dict[str, RiskCurve]
  chosen: dict[str, RiskCurve]
  epsilon: float | None


@dataclass(frozen=True)
class Sheet:
  """Test images that left at each exit with the largest and the smallest calibrated probability.

  Attributes:
    exits: [M] index of the exit, 0-based, ascending.
    hard: [M] bool; False: among the most confident of their exit, best first; True: among the least, worst first.
    numbers: [M] of the image in the test split, 0-based.
    labels, predictions: [M] class index.
    probabilities: [M] of the predicted class.
    images: uint8 [M, H, W, C], C 1 or 3.
  """

  exits: np.ndarray
  hard: np.ndarray
  numbers: np.ndarray
  labels: np.ndarray
  predictions: np.ndarray
  probabilities: np.ndarray
  images: np.ndarray


@dataclass(frozen=True)
class FigureData:
  """Everything that is drawn; K usable exits.

  Attributes:
    run, dataset: names for the titles.
    images: number of images of each split.
    exits: [K] their numbers, 1-based.
    class_names: one a class.
    unit: of the costs but for `macs` and `ms`: 'macs' (multiply-adds) or 'ms'.
    macs: [K] multiply-adds an image of each exit alone.
    ms: [K] milliseconds an image of each exit alone, or None.
    measured: how `ms` was measured, such as 'batch size 1, NVIDIA H100'.
    accuracy: [K] of each exit on all images, for each split.
    alone: [K] cost in `unit` of each exit alone.
    families: name -> split -> curve: 'quota', 'envelope' and 'optimal', or 'patience'; and 'oracle'.
    chosen: the plan's own point, a curve of one, for each split.
    risk: risk against speed-up.
    reliability: one an exit.
    shares: [K] of the images that leave at each exit, for each split.
    accuracy_there: [K] of those images, NaN where nobody leaves, for each split.
    sheet: the easiest and hardest images.
  """

  run: str
  dataset: str
  images: dict[str, int]
  exits: np.ndarray
  class_names: tuple[str, ...]
  unit: str
  macs: np.ndarray
  ms: np.ndarray | None
  measured: str
  accuracy: dict[str, np.ndarray]
  alone: np.ndarray
  families: dict[str, dict[str, Curve]]
  chosen: dict[str, Curve]
  risk: Risk
  reliability: tuple[Reliability, ...]
  shares: dict[str, np.ndarray]
  accuracy_there: dict[str, np.ndarray]
  sheet: Sheet
