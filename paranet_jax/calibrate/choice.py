"""From a target to thresholds, on the images held out."""

import math
from typing import NamedTuple

import numpy as np

from paranet_jax.calibrate.flags import Request
from paranet_jax.early.path_costs import PathCosts
from paranet_jax.early.policies import risk
from paranet_jax.early.policies.optimal import optimal_for_budget
from paranet_jax.early.policies.quota import quota_for_budget
from paranet_jax.early.policies.shared import patience_for_budget, shared_thresholds
from paranet_jax.early.scores import confidences, to_confidence
from paranet_jax.host.errors import UserError


class Ranked(NamedTuple):
  """What thresholds see of a split: float64, int and bool [K, N]."""

  confidences: np.ndarray
  predictions: np.ndarray
  correct: np.ndarray


class Choice(NamedTuple):
  """Thresholds [K] on the confidence scale, how they were chosen, and what was amiss (then nobody leaves early)."""

  thresholds: np.ndarray
  policy: str
  problem: str | None = None


def rank(logits: np.ndarray, labels: np.ndarray, score: str, temperatures: np.ndarray) -> Ranked:
  """Ranks the samples of a split at every exit.

  Args:
    logits: [K, N, C].
    labels: int [N].
    score: see `scores.SCORES`.
    temperatures: [K].
  """
  predictions = logits.argmax(-1)
  return Ranked(confidences(logits, score, temperatures), predictions, predictions == labels)


def check_budget(request: Request, costs: PathCosts, exits: tuple[int, ...]) -> None:
  """Refuses a budget that no thresholds can spend.

  Args:
    request: with a budget, or without one.
    costs: in the unit of the budget.
    exits: numbers of the usable exits, 1-based.

  Raises:
    UserError: the budget is below the first exit's cost, or above the last one's; or the first costs more.
  """
  if not request.budget:
    return
  value, unit = request.budget
  low, high = costs.alone()[[0, -1]]
  if low > high:
    raise UserError(
      f'no budget is within reach: exit {exits[0]} alone takes {in_unit(low, unit)}, more than exit {exits[-1]} alone '
      f'with {in_unit(high, unit)}; set --batch-size, or a --budget of multiply-adds'
    )
  # Milliseconds are shown rounded, and what is shown must be accepted.
  slack = 1e-3 if unit == 'ms' else 0
  if not low * (1 - slack) <= value <= high * (1 + slack):
    raise UserError(
      f'budget must be from {in_unit(low, unit)} (exit {exits[0]} alone) to {in_unit(high, unit)} '
      f'(exit {exits[-1]} alone), found {in_unit(value, unit)}; set --budget'
    )


def choose(request: Request, ranked: Ranked, costs: PathCosts) -> Choice:
  """Chooses thresholds for the target that is asked for.

  Args:
    request: with one target; a budget has been checked.
    ranked: the images to choose on; of risk control, none that the temperatures were fitted on.
    costs: in the unit of the budget.
  """
  if request.budget:
    return _for_budget(request, ranked, costs)
  if request.risk is not None:
    return _for_risk(request, ranked, costs.num_exits)
  confidence = float(to_confidence(request.threshold, request.score))
  return Choice(shared_thresholds(confidence, costs.num_exits), 'shared')


def in_unit(cost: float, unit: str) -> str:
  """A cost to be read, and precise enough to be set again: `3.413088M` multiply-adds, or `1.234ms`."""
  return f'{cost:.4g}ms' if unit == 'ms' else f'{round(cost) / 1e6:.10g}M'


def _for_budget(request: Request, ranked: Ranked, costs: PathCosts) -> Choice:
  samples = ranked.confidences, ranked.correct, costs, max(request.budget.value, costs.alone()[0])
  if request.score == 'patience':
    return Choice(patience_for_budget(*samples).thresholds, 'shared')
  for_budget = quota_for_budget if request.policy == 'quota' else optimal_for_budget
  return Choice(for_budget(*samples).thresholds, request.policy)


def _for_risk(request: Request, ranked: Ranked, num_exits: int) -> Choice:
  epsilon, images = request.risk, ranked.correct.shape[1]
  gap = request.risk_loss == 'gap'
  losses = risk.performance_gap(ranked.correct) if gap else risk.disagreement(ranked.predictions)
  if request.guarantee == 'ltt':
    confidence = risk.ltt(ranked.confidences, losses, epsilon, request.delta)
    needed = risk.images_needed_ltt(epsilon, request.delta)
  else:
    confidence = risk.crc(ranked.confidences, losses, epsilon)
    needed = risk.images_needed_crc(epsilon)
  thresholds = shared_thresholds(confidence, num_exits)
  if confidence < math.inf or num_exits == 1:
    return Choice(thresholds, request.guarantee)
  lost = 'would do if the surest images lost nothing, and they do'
  why = f'it would need {needed:,}' if images < needed else f'{needed:,} {lost}'
  return Choice(
    thresholds,
    request.guarantee,
    f'risk {epsilon} cannot be promised from {images:,} held-out images: {why}; exits.json keeps the full network; '
    'raise --risk, or hold out more images in a new run',
  )
