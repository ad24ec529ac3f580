"""The numbers in the figures, computed from the logits of two splits and a plan.

Accuracies and shares are fractions, 0..1. K counts the usable exits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from paranet_jax.calibrate.measures import PerExit, ece, rank, reliability, top_probability
from paranet_jax.data.dataset import Images, StoredImages
from paranet_jax.early.exit_plan import ExitPlan
from paranet_jax.early.logits import Outputs
from paranet_jax.early.path_costs import PathCosts
from paranet_jax.early.policies.optimal import optimal_curve, oracle_curve
from paranet_jax.early.policies.quota import QS, envelope, quota_thresholds
from paranet_jax.early.policies.risk import losses_of
from paranet_jax.early.policies.shared import shared_thresholds
from paranet_jax.early.scores import confidence, to_score
from paranet_jax.early.thresholds import OperatingPoint, Samples, exits_taken, operating_point

SPLITS = ('held_out', 'test')
BUDGETS = 25  # Points on the optimal curve.
SHARED = 100  # Thresholds on the risk curve.
EACH = 5  # Easiest images shown per exit, and as many of the hardest.


class Curve(NamedTuple):
  """Mean cost per image and accuracy of one family of thresholds on one split."""

  cost: Float[np.ndarray, ' M']
  accuracy: Float[np.ndarray, ' M']


class RiskCurve(NamedTuple):
  """Operating points of thresholds shared by all exits, on one split.

  Attributes:
    speed_up: cost of the last exit alone divided by the mean cost.
    risk: mean loss against the last exit.
  """

  speed_up: Float[np.ndarray, ' M']
  risk: Float[np.ndarray, ' M']


class Bins(NamedTuple):
  """A reliability diagram, see `measures.reliability`, and its expected calibration error."""

  counts: Int[np.ndarray, ' bins']
  confidence: Float[np.ndarray, ' bins']
  accuracy: Float[np.ndarray, ' bins']
  ece: float


class Reliability(NamedTuple):
  """One exit on the test split, before and after dividing its logits by the temperature."""

  temperature: float
  before: Bins
  after: Bins


@dataclass(frozen=True)
class Risk:
  """Risk against speed-up.

  Attributes:
    loss: 'gap' or 'disagreement', see `policies.risk`.
    thresholds: shared by all exits, on the scale of the score; NaN: no sample exits early.
    curves, chosen: by split: one point per threshold; the plan's own point.
    epsilon: the target risk; None without risk control.
  """

  loss: str
  thresholds: Float[np.ndarray, ' M']
  curves: dict[str, RiskCurve]
  chosen: dict[str, RiskCurve]
  epsilon: float | None


@dataclass(frozen=True)
class Sheet:
  """The test images that exit with the highest and the lowest calibrated probability, grouped by exit.

  Attributes:
    exits: index of the exit, 0-based, ascending.
    hard: False for the most confident images of an exit, best first; True for the least confident, worst first.
    numbers: index of the image in the test split.
    labels, predictions: class indices.
    probabilities: of the predicted class.
  """

  exits: Int[np.ndarray, ' M']
  hard: Bool[np.ndarray, ' M']
  numbers: Int[np.ndarray, ' M']
  labels: Int[np.ndarray, ' M']
  predictions: Int[np.ndarray, ' M']
  probabilities: Float[np.ndarray, ' M']
  images: UInt8[np.ndarray, 'M H W C']


@dataclass(frozen=True)
class FigureData:
  """Everything that is drawn.

  Attributes:
    run, dataset: names for the titles.
    images: number of images in each split.
    exits: exit numbers, 1-based.
    unit: of `alone`, `families` and `chosen`: 'macs' (multiply-adds), 'ms' or 'joules'.
    macs, ms: multiply-adds and milliseconds per image of each exit alone; ms None: not measured.
    measured: how `ms` was measured: 'batch size 1, NVIDIA H100'.
    accuracy: by split, of each exit on all images.
    alone: cost of each exit alone.
    families: by name ('quota', 'envelope' and 'optimal', or 'patience'; and 'oracle'), then by split.
    chosen: by split, the plan's own point.
    shares: by split, of the images that exit at each exit.
    accuracy_there: by split, of those images; NaN where no image exits.
    labeled: whether the images have labels; otherwise all that is called accuracy is agreement with the last exit.
  """

  run: str
  dataset: str
  images: dict[str, int]
  exits: Int[np.ndarray, ' K']
  class_names: tuple[str, ...]
  unit: str
  macs: PerExit
  ms: PerExit | None
  measured: str
  accuracy: dict[str, PerExit]
  alone: PerExit
  families: dict[str, dict[str, Curve]]
  chosen: dict[str, Curve]
  risk: Risk
  reliability: tuple[Reliability, ...]
  shares: dict[str, PerExit]
  accuracy_there: dict[str, PerExit]
  sheet: Sheet
  labeled: bool = True

  @property
  def kind(self) -> str:
    """What was measured, as the figures and their numbers call it."""
    return 'accuracy' if self.labeled else 'agreement'

  @property
  def axis(self) -> str:
    """The same as the label of an axis."""
    return 'accuracy (%)' if self.labeled else f'same answer as exit {self.exits[-1]} (%)'


def figure_data(
  plan: ExitPlan,
  held_out: Outputs,
  test: Outputs,
  costs: PathCosts,
  images: Images | StoredImages,
  class_names: Sequence[str],
  ms: PerExit | None = None,
  measured: str = '',
  labeled: bool = True,
) -> FigureData:
  """Chooses every family of thresholds on the held-out split and applies it to both splits.

  Args:
    held_out: outputs for the images that the thresholds were chosen on.
    test: outputs for the test split.
    costs: in the plan's unit: ms or joules for a budget of them, else multiply-adds.
    images: of the test split.
    ms, measured, labeled: see `FigureData`.
  """
  temperatures = np.array(plan.temperatures)
  pairs = zip(SPLITS, (held_out, test), strict=True)
  splits = {name: rank(*outputs, plan.score, temperatures, costs) for name, outputs in pairs}
  thresholds = plan.confidence_floors
  chosen = {name: operating_point(split, thresholds) for name, split in splits.items()}
  return FigureData(
    run=plan.name,
    dataset=plan.dataset,
    images={name: split.correct.shape[1] for name, split in splits.items()},
    exits=np.array(plan.exits),
    class_names=tuple(class_names),
    unit=plan.target.get('unit', 'macs'),
    macs=np.array(plan.macs_alone, dtype=np.float64),
    ms=ms,
    measured=measured,
    accuracy={name: split.correct.mean(axis=1) for name, split in splits.items()},
    alone=costs.alone(),
    families=_families(splits),
    chosen={name: _curve([point]) for name, point in chosen.items()},
    risk=_risk(plan, splits, thresholds, labeled),
    reliability=tuple(_reliability(*exit_, test.labels) for exit_ in zip(test.logits, temperatures, strict=True)),
    shares={name: point.shares for name, point in chosen.items()},
    accuracy_there={name: _accuracy_there(split, thresholds) for name, split in splits.items()},
    sheet=_sheet(test, temperatures, exits_taken(splits['test'].confidences, thresholds), images),
    labeled=labeled,
  )


def _accuracy_there(split: Samples, thresholds: np.ndarray) -> PerExit:
  taken = exits_taken(split.confidences, thresholds)
  exiting = [correct[taken == k] for k, correct in enumerate(split.correct)]
  return np.array([correct.mean() if len(correct) else np.nan for correct in exiting])


def _curve(points: Sequence[OperatingPoint]) -> Curve:
  return Curve(np.array([point.cost for point in points]), np.array([point.accuracy for point in points]))


def _families(splits: dict[str, Samples]) -> dict[str, dict[str, Curve]]:
  families = {
    family: {name: _curve([operating_point(split, each) for each in chosen]) for name, split in splits.items()}
    for family, chosen in _chosen_families(splits['held_out']).items()
  }
  return families | {'oracle': {name: Curve(*oracle_curve(split)) for name, split in splits.items()}}


def _chosen_families(held_out: Samples) -> dict[str, list[np.ndarray]]:
  num_exits, exit_costs = held_out.costs.num_exits, held_out.costs.alone()
  if held_out.score == 'patience':
    return {'patience': [shared_thresholds(times, num_exits) for times in range(1, num_exits + 1)]}
  quota = [operating_point(held_out, quota_thresholds(held_out.confidences, q)) for q in QS]
  # Denser at low cost, where accuracy rises fastest.
  budgets = np.unique(np.maximum(np.geomspace(exit_costs[0], exit_costs.max(), BUDGETS), exit_costs[0])).tolist()
  points = {'quota': quota, 'envelope': envelope(quota), 'optimal': optimal_curve(held_out, budgets)}
  return {family: [point.thresholds for point in chosen] for family, chosen in points.items()}


def _risk_curve(split: Samples, family: Sequence[np.ndarray], loss: str) -> RiskCurve:
  losses, samples = losses_of(split, loss), np.arange(split.correct.shape[1])
  cost = np.array([operating_point(split, thresholds).cost for thresholds in family])
  risk = np.array([losses[exits_taken(split.confidences, thresholds), samples].mean() for thresholds in family])
  return RiskCurve(split.costs.alone()[-1] / cost, risk)


def _risk(plan: ExitPlan, splits: dict[str, Samples], thresholds: np.ndarray, labeled: bool) -> Risk:
  loss = plan.target.get('loss', 'gap' if labeled else 'disagreement')
  # From +inf, where no sample exits early, down to where all exit at once.
  grid, early = np.array([np.inf]), splits['held_out'].confidences[:-1]
  if early.size:
    quantiles = np.quantile(early, np.linspace(0, 1, SHARED), method='nearest')
    grid = np.array([np.inf, *np.unique(quantiles)[::-1]])
  family = [shared_thresholds(threshold, len(plan.exits)) for threshold in grid]
  return Risk(
    loss=loss,
    thresholds=np.where(grid < np.inf, to_score(grid, plan.score), np.nan),
    curves={name: _risk_curve(split, family, loss) for name, split in splits.items()},
    chosen={name: _risk_curve(split, [thresholds], loss) for name, split in splits.items()},
    epsilon=plan.target.get('risk'),
  )


def _reliability(logits: np.ndarray, temperature: float, labels: np.ndarray) -> Reliability:
  correct = logits.argmax(-1) == labels

  def bins(divisor: float) -> Bins:
    probabilities = top_probability(logits, divisor)
    return Bins(*reliability(probabilities, correct), ece(probabilities, correct))

  return Reliability(float(temperature), bins(1.0), bins(temperature))


def _sheet(test: Outputs, temperatures: np.ndarray, taken: np.ndarray, images: Images | StoredImages) -> Sheet:
  logits, labels = test
  exits, hard, numbers, probabilities = [], [], [], []
  for k, temperature in enumerate(temperatures):
    there = np.flatnonzero(taken == k)
    confidences = confidence(logits[k, there], 'max_prob', temperature)
    ranking = np.argsort(-confidences, kind='stable')
    shown = min(2 * EACH, len(there))
    hardest = shown // 2  # The middle one of an odd number counts as easy.
    order = np.concatenate([ranking[: shown - hardest], ranking[::-1][:hardest]])
    exits += [k] * shown
    hard += [False] * (shown - hardest) + [True] * hardest
    numbers += there[order].tolist()
    probabilities += to_score(confidences[order], 'max_prob').tolist()
  return Sheet(
    exits=np.array(exits),
    hard=np.array(hard),
    numbers=np.array(numbers),
    labels=labels[numbers],
    predictions=logits[exits, numbers].argmax(-1),
    probabilities=np.array(probabilities),
    images=images[np.array(numbers)],
  )
