"""What `calibrate` prints of a plan: plain tables, at most 100 columns wide."""

import math
from collections.abc import Iterator
from typing import Any

from paranet_jax.early.exit_plan import ExitPlan
from paranet_jax.early.policies import find_policy
from paranet_jax.report.tables import ABSENT, align, human_count

_UNITS = {'macs': 'multiply-adds', 'ms': 'ms'}
_LOSSES = {'gap': 'wrong where the last exit is right', 'disagreement': 'another answer than the last exit'}

Row = tuple[str, str, str]


def report(plan: ExitPlan) -> str:
  """Returns what was chosen, where the test images leave, what that gains, and how well the confidences fit.

  Args:
    plan: as `calibration.calibrate` writes it, with `expected`, `test` and `splits`.
  """
  return '\n\n'.join(['\n'.join(_title(plan)), _exit_table(plan), _gains(plan), _calibration_table(plan)])


def _title(plan: ExitPlan) -> list[str]:
  splits = plan.splits
  return [
    f'{plan.name} on {plan.dataset}, step {plan.step}: {_chosen(plan)}',
    f'images are ranked by {plan.score}; temperatures from {splits["temperature"]:,} held-out images, thresholds from '
    f'{splits["thresholds"]:,}',
  ]


def _chosen(plan: ExitPlan) -> str:
  policy, target = find_policy(plan.policy), plan.target
  what = policy.description if policy else f'thresholds by {plan.policy}'
  if 'budget' in target:
    at = f' at batch size {target["batch_size"]}' if 'batch_size' in target else ''
    return f'{what}, for a mean of {_cost(target["budget"], target["unit"])} {_UNITS[target["unit"]]}{at}'
  if 'risk' in target:
    often = f'with probability {1 - target["delta"]:g}' if 'delta' in target else 'on average'
    return f'{what}, so that {often} the risk is at most {target["risk"]:g}'
  return f'{what}, {target["threshold"]:g}'


def _exit_table(plan: ExitPlan) -> str:
  test, units = plan.test, _units(plan)
  header = ('exit', 'leaves from', 'images', 'share (%)', 'accuracy (%)', 'confidence', *(_UNITS[u] for u in units))
  rows = []
  for index, row in enumerate(test['exits']):
    costs = (_cost(getattr(plan, unit)[index], unit) for unit in units)
    shown = (str(row['images']), _percent(test['shares'][index], 1), _percent(row['accuracy']))
    rows.append((str(plan.exits[index]), _threshold(plan, index), *shown, _number(row['confidence'], 3), *costs))
  means = (_cost(test[f'cost_{unit}'], unit) for unit in units)
  rows.append(('all', '', str(test['images']), '100.0', _percent(test['accuracy']), '', *means))
  return '\n'.join(
    ['where the test images leave (costs: an image; confidence: mean calibrated probability)', *align(header, rows, ())]
  )


def _threshold(plan: ExitPlan, index: int) -> str:
  if index == len(plan.exits) - 1:
    return 'the rest'
  threshold = plan.thresholds[index]
  if threshold is None:
    return 'nobody'
  if threshold == 0:
    return 'everybody'
  if plan.score == 'patience':
    return f'{threshold:g} equal'
  # Near 1 the distance from it tells more.
  near = threshold > 0.9999
  return f'{plan.score} {f"1 - {math.exp(-plan.confidence_thresholds[index]):.1e}" if near else f"{threshold:.4f}"}'


def _gains(plan: ExitPlan) -> str:
  splits = (plan.expected, plan.test)
  last = plan.exits[-1]
  rows = [
    ('accuracy (%)', *(_percent(split['accuracy']) for split in splits)),
    (f'accuracy of exit {last} on all images (%)', *(_percent(split['exit_accuracy'][-1]) for split in splits)),
  ]
  for unit in _units(plan):
    rows += _gains_in(plan, unit)
  rows += _risk_rows(plan)
  return '\n'.join(align(('', 'held-out images', 'test images'), rows, left=(0,)))


def _gains_in(plan: ExitPlan, unit: str) -> Iterator[Row]:
  means = [split[f'cost_{unit}'] for split in (plan.expected, plan.test)]
  yield (f'mean {_UNITS[unit]}', *(_cost(mean, unit) for mean in means))
  if plan.target.get('unit') == unit:
    budget = plan.target['budget']
    yield ('  off the budget by', *(f'{100 * (mean / budget - 1):+.2f} %' for mean in means))
    if 'measured_ms' in plan.expected:
      yield ('  as measured with the runtime', _cost(plan.expected['measured_ms'], 'ms'), ABSENT)
  alone = dict(zip(plan.exits, _alone(plan, unit), strict=True))
  last, best = plan.exits[-1], plan.expected['single_best']
  yield (f'  speed-up against exit {last} alone ({_cost(alone[last], unit)})', *_times(alone[last], means))
  if best is None:
    yield ('  no single exit is as accurate on the held-out images', '', '')
  elif best != last:
    words = f'  against exit {best} alone ({_cost(alone[best], unit)}), the cheapest as accurate'
    yield (words, *_times(alone[best], means))


def _risk_rows(plan: ExitPlan) -> Iterator[Row]:
  if 'loss' not in plan.target:
    return
  loss, asked = plan.target['loss'], plan.target['risk']
  risks = [split[loss] for split in (plan.expected, plan.test)]
  yield (f'risk: {_LOSSES[loss]}', *(f'{risk:.4f}' for risk in risks))
  yield (f'  off the {asked:g} asked for by', *(f'{risk - asked:+.4f}' for risk in risks))


def _calibration_table(plan: ExitPlan) -> str:
  rows = []
  for index, number in enumerate(plan.exits):
    row = plan.test['exits'][index]
    for whose, images in (('all', plan.test['images']), ('leaving', row['images'])):
      first = whose == 'all'
      measured = row['calibration'][whose]
      rows.append(
        (
          str(number) if first else '',
          f'{plan.temperatures[index]:.3f}' if first else '',
          f'{whose} {images:,}',
          *(_change(measured, name, scale) for name, scale in (('ece', 100), ('nll', 1), ('brier', 1))),
          _number(measured and measured['auroc'], 3),
        )
      )
  header = ('exit', 'temperature', 'images', 'ECE (%)', 'NLL (nats)', 'Brier', 'AUROC')
  title = 'how well confidences fit, on test images, before -> after the temperature (AUROC: right above wrong)'
  return '\n'.join([title, *align(header, rows, left=(2,))])


def _units(plan: ExitPlan) -> tuple[str, ...]:
  return ('macs',) if plan.ms is None else ('macs', 'ms')


def _alone(plan: ExitPlan, unit: str) -> list[float]:
  return plan.macs_alone if unit == 'macs' else plan.latency['batch_sizes'][0]['ms_alone']


def _times(alone: float, means: list[float]) -> Iterator[str]:
  return (f'{alone / mean:.2f} x' for mean in means)


def _cost(cost: float | None, unit: str) -> str:
  if cost is None:
    return ABSENT
  return human_count(round(cost)) if unit == 'macs' else f'{cost:.3f}'


def _percent(share: float | None, digits: int = 2) -> str:
  return ABSENT if share is None else f'{100 * share:.{digits}f}'


def _number(value: float | None, digits: int) -> str:
  return ABSENT if value is None else f'{value:.{digits}f}'


def _change(measured: dict[str, Any] | None, name: str, scale: float) -> str:
  if measured is None:
    return ABSENT
  before, after = (scale * value for value in measured[name])
  digits = 2 if scale == 100 else 3
  return f'{before:.{digits}f} -> {after:.{digits}f}'
