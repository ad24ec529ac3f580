"""From a target to thresholds, on the images held out."""

from typing import NamedTuple

import numpy as np

from paranet_jax.calibrate.flags import Request
from paranet_jax.early.path_costs import PathCosts
from paranet_jax.early.policies import Choice, Samples
from paranet_jax.early.scores import confidences
from paranet_jax.host.errors import UserError


class Ranked(NamedTuple):
  """What thresholds see of a split: float64, int and bool [K, N]."""

  confidences: np.ndarray
  predictions: np.ndarray
  correct: np.ndarray


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
  """Chooses thresholds for the target of the request, by its policy.

  Args:
    request: with one target; a budget has been checked.
    ranked: the images to choose on; of risk control, none that the temperatures were fitted on.
    costs: in the unit of the budget.
  """
  target = request.target
  if request.budget:  # One in milliseconds may be below the first exit's cost by rounding.
    target['budget'] = max(request.budget.value, costs.alone()[0])
  return request.policy.choose(Samples(*ranked, request.score, costs), target)


def in_unit(cost: float, unit: str) -> str:
  """A cost to be read, and precise enough to be set again: `3.413088M` multiply-adds, or `1.234ms`."""
  return f'{cost:.4g}ms' if unit == 'ms' else f'{round(cost) / 1e6:.10g}M'
