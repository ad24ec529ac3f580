"""From the logits of two splits and a plan to everything the figures show."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from paranet_jax.calibrate.choice import Ranked, rank
from paranet_jax.calibrate.figures.figure_types import (
  SPLITS,
  Bins,
  Curve,
  FigureData,
  Reliability,
  Risk,
  RiskCurve,
  Sheet,
)
from paranet_jax.calibrate.measures import ece, reliability
from paranet_jax.calibrate.split_report import top_probability
from paranet_jax.early.exit_plan import ExitPlan
from paranet_jax.early.logits import Outputs
from paranet_jax.early.policies.optimal import optimal_curve, oracle_curve
from paranet_jax.early.policies.quota import QS, envelope, quota_thresholds
from paranet_jax.early.policies.risk import disagreement, performance_gap
from paranet_jax.early.policies.shared import shared_thresholds
from paranet_jax.early.scores import confidence, to_score
from paranet_jax.early.thresholds import Costs, OperatingPoint, alone, exits_taken, operating_point

BUDGETS = 25  # of the optimal curve
SHARED = 100  # thresholds of the risk curve
EACH = 5  # easiest images of an exit, and as many of the hardest


def figure_data(
  plan: ExitPlan,
  held_out: Outputs,
  test: Outputs,
  costs: Costs,
  images: np.ndarray,
  class_names: Sequence[str],
  ms: np.ndarray | None = None,
  measured: str = '',
) -> FigureData:
  """Every family of thresholds is chosen on the held-out split and then applied to both.

  Args:
    plan: temperatures, thresholds and score, for K exits.
    held_out: of the images that the thresholds were chosen on.
    test: of the test split.
    costs: in the plan's unit: ms where a time was budgeted, else multiply-adds.
    images: uint8 [N, H, W, C] of the test split.
    class_names: one a class.
    ms: [K] milliseconds an image of each exit alone, where measured.
    measured: how, such as 'batch size 1, NVIDIA H100'.
  """
  temperatures = np.array(plan.temperatures)
  pairs = zip(SPLITS, (held_out, test), strict=True)
  splits = {name: _Split(rank(*outputs, plan.score, temperatures), costs, plan.score) for name, outputs in pairs}
  thresholds = _plan_thresholds(plan)
  chosen = {name: split.point(thresholds) for name, split in splits.items()}
  return FigureData(
    run=plan.name,
    dataset=plan.dataset,
    images={name: split.ranked.correct.shape[1] for name, split in splits.items()},
    exits=np.array(plan.exits),
    class_names=tuple(class_names),
    unit=plan.target.get('unit', 'macs'),
    macs=np.array(plan.macs_alone, dtype=np.float64),
    ms=ms,
    measured=measured,
    accuracy={name: split.ranked.correct.mean(axis=1) for name, split in splits.items()},
    alone=alone(costs),
    families=_families(splits, costs),
    chosen={name: _curve([point]) for name, point in chosen.items()},
    risk=_risk(plan, splits, thresholds),
    reliability=tuple(_reliability(*exit_, test.labels) for exit_ in zip(test.logits, temperatures, strict=True)),
    shares={name: point.shares for name, point in chosen.items()},
    accuracy_there={name: split.accuracy_there(thresholds) for name, split in splits.items()},
    sheet=_sheet(test, temperatures, splits['test'].taken(thresholds), images),
  )


class _Split(NamedTuple):
  ranked: Ranked
  costs: Costs
  score: str

  def point(self, thresholds: np.ndarray) -> OperatingPoint:
    keep_all = self.score == 'patience'
    return operating_point(thresholds, self.ranked.confidences, self.ranked.correct, self.costs, keep_all)

  def taken(self, thresholds: np.ndarray) -> np.ndarray:
    return exits_taken(self.ranked.confidences, thresholds)

  def accuracy_there(self, thresholds: np.ndarray) -> np.ndarray:
    taken = self.taken(thresholds)
    leaving = [correct[taken == k] for k, correct in enumerate(self.ranked.correct)]
    return np.array([correct.mean() if len(correct) else np.nan for correct in leaving])

  def risk_curve(self, family: Sequence[np.ndarray], loss: str) -> RiskCurve:
    gap = loss == 'gap'
    losses = performance_gap(self.ranked.correct) if gap else disagreement(self.ranked.predictions)
    everyone = np.arange(losses.shape[1])
    cost = np.array([self.point(thresholds).cost for thresholds in family])
    risk = np.array([losses[self.taken(thresholds), everyone].mean() for thresholds in family])
    return RiskCurve(alone(self.costs)[-1] / cost, risk)


def _plan_thresholds(plan: ExitPlan) -> np.ndarray:
  early = [np.inf if threshold is None else threshold for threshold in plan.confidence_thresholds[:-1]]
  return np.array([*early, -np.inf])


def _curve(points: Sequence[OperatingPoint]) -> Curve:
  return Curve(np.array([point.cost for point in points]), np.array([point.accuracy for point in points]))


def _families(splits: dict[str, _Split], costs: Costs) -> dict[str, dict[str, Curve]]:
  families = {
    family: {name: _curve([split.point(each) for each in chosen]) for name, split in splits.items()}
    for family, chosen in _chosen_families(splits['held_out'], costs).items()
  }
  oracle = {name: Curve(*oracle_curve(split.ranked.correct, costs)) for name, split in splits.items()}
  return families | {'oracle': oracle}


def _chosen_families(held_out: _Split, costs: Costs) -> dict[str, list[np.ndarray]]:
  if held_out.score == 'patience':
    return {'patience': [shared_thresholds(times, costs.num_exits) for times in range(1, costs.num_exits + 1)]}
  confidences, _, correct = held_out.ranked
  quota = [held_out.point(quota_thresholds(confidences, q)) for q in QS]
  exit_costs = alone(costs)
  # Denser where it is cheap, as there accuracy rises fastest.
  budgets = np.unique(np.maximum(np.geomspace(exit_costs[0], exit_costs.max(), BUDGETS), exit_costs[0]))
  points = {
    'quota': quota,
    'envelope': envelope(quota),
    'optimal': optimal_curve(confidences, correct, costs, budgets),
  }
  return {family: [point.thresholds for point in chosen] for family, chosen in points.items()}


def _risk(plan: ExitPlan, splits: dict[str, _Split], thresholds: np.ndarray) -> Risk:
  loss, num_exits = plan.target.get('loss', 'gap'), len(plan.exits)
  grid = _shared_grid(splits['held_out'])
  family = [shared_thresholds(threshold, num_exits) for threshold in grid]
  return Risk(
    loss=loss,
    thresholds=np.where(grid < np.inf, to_score(grid, plan.score), np.nan),
    curves={name: split.risk_curve(family, loss) for name, split in splits.items()},
    chosen={name: split.risk_curve([thresholds], loss) for name, split in splits.items()},
    epsilon=plan.target.get('risk'),
  )


def _shared_grid(held_out: _Split) -> np.ndarray:
  """Thresholds from +inf, where nobody leaves, down to where everybody does."""
  early = held_out.ranked.confidences[:-1]
  if not early.size:
    return np.array([np.inf])
  quantiles = np.quantile(early, np.linspace(0, 1, SHARED), method='nearest')
  return np.array([np.inf, *np.unique(quantiles)[::-1]])


def _reliability(logits: np.ndarray, temperature: float, labels: np.ndarray) -> Reliability:
  correct = logits.argmax(-1) == labels

  def bins(divisor: float) -> Bins:
    probabilities = top_probability(logits, divisor)
    return Bins(*reliability(probabilities, correct), ece(probabilities, correct))

  return Reliability(float(temperature), bins(1.0), bins(temperature))


def _sheet(test: Outputs, temperatures: np.ndarray, taken: np.ndarray, images: np.ndarray) -> Sheet:
  logits, labels = test
  exits, hard, numbers, sure = [], [], [], []
  for k, temperature in enumerate(temperatures):
    there = np.flatnonzero(taken == k)
    confidences = confidence(logits[k, there], 'max_prob', temperature)
    ranking = np.argsort(-confidences, kind='stable')
    shown = min(2 * EACH, len(there))
    # Of an odd number the one in the middle counts as easy.
    order = np.concatenate([ranking[: shown - shown // 2], ranking[::-1][: shown // 2]])
    exits += [k] * shown
    hard += [False] * (shown - shown // 2) + [True] * (shown // 2)
    numbers += there[order].tolist()
    sure += to_score(confidences[order], 'max_prob').tolist()
  return Sheet(
    exits=np.array(exits),
    hard=np.array(hard),
    numbers=np.array(numbers),
    labels=labels[numbers],
    predictions=logits[exits, numbers].argmax(-1),
    probabilities=np.array(sure),
    images=images[numbers],
  )
