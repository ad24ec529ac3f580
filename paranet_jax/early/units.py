"""Units in which the cost of an image is counted or measured, by their names in exits.json."""

from typing import Any

from paranet_jax.display.tables import ABSENT, human_count

UNITS = {'macs': 'multiply-adds', 'ms': 'ms', 'joules': 'joules'}
MEASURED = {'ms': 'milliseconds', 'joules': 'joules'}
"""Those that a machine measures, in words."""


def measured_units(plan: Any) -> tuple[str, ...]:
  """The units in which the exits of an `ExitPlan` were measured."""
  return tuple(unit for unit in MEASURED if getattr(plan, unit) is not None)


def shown_cost(cost: float | None, unit: str) -> str:
  """A cost in a table; a dash if it is not known."""
  if cost is None:
    return ABSENT
  return human_count(round(cost)) if unit == 'macs' else f'{cost:.3f}' if unit == 'ms' else f'{cost:.3g}'
