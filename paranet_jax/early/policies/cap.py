"""A hard limit on what each image may cost, whatever the policy: later exits are not used."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from paranet_jax.early.path_costs import PathCosts
from paranet_jax.early.policies.policy import Choice, Policy
from paranet_jax.early.thresholds import Samples, operating_point

_MOST_EXITS = 6  # All sets of so many exits are looked at; of more, the first ones only.


def choose_within(policy: Policy, samples: Samples, target: Mapping[str, Any], most: float, costs: PathCosts) -> Choice:
  """The most accurate choice of a policy among the exits that cost an image no more than a limit, if run in turn.

  All images that are left go out at the last of these exits: its threshold is 0, which every confidence reaches.

  Args:
    target: a budget or a threshold. A risk is relative to the last exit, which may not be used.
    most: in the unit of `costs`.
    costs: of all exits, for the limit; `samples.costs` are for the budget.

  Raises:
    ValueError: every exit costs more, or the budget is below what the cheapest exit costs.
  """
  choices = []
  for path in _paths(samples, most, costs):
    kept = samples._replace(
      confidences=samples.confidences[list(path)],
      predictions=samples.predictions[list(path)],
      correct=samples.correct[list(path)],
      costs=_along(samples.costs, path),
    )
    if target.get('budget', np.inf) < kept.costs.alone()[0]:
      continue
    choice = policy.choose(kept, target)
    thresholds = np.full(costs.num_exits, np.inf)
    thresholds[list(path)] = choice.thresholds
    if path[-1] < costs.num_exits - 1:
      thresholds[path[-1]], thresholds[-1] = 0.0, -np.inf
    choices.append(choice._replace(thresholds=thresholds))
  if not choices:
    raise ValueError(f'a limit of at least {costs.alone().min()} is needed, got {most}')
  return max(choices, key=lambda choice: operating_point(samples, choice.thresholds).accuracy)


def _paths(samples: Samples, most: float, costs: PathCosts) -> list[tuple[int, ...]]:
  """Sets of exits that may be run in turn, without those that are a part of another."""
  every = range(costs.num_exits)
  # Patience counts equal answers of all exits in turn.
  if samples.score == 'patience' or costs.num_exits > _MOST_EXITS:
    sets = [tuple(every[: k + 1]) for k in every]
  else:
    sets = [path for count in every for path in itertools.combinations(every, count + 1)]
  within = [path for path in sets if costs.cumulative(path)[-1] <= most]
  return [path for path in within if not any(set(path) < set(other) for other in within)]


def _along(costs: PathCosts, path: tuple[int, ...]) -> PathCosts:
  """The costs of the exits of a path, by their place in it."""

  def step_cost(before: tuple[int, ...], index: int) -> float:
    steps = costs.cumulative(tuple(path[k] for k in (*before, index)))
    return steps[-1] - (steps[-2] if before else 0.0)

  return PathCosts(len(path), step_cost)
