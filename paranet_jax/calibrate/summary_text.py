"""The tables that `calibrate` prints, at most 100 columns wide."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from paranet_jax.display.tables import ABSENT, align
from paranet_jax.early.exit_plan import ExitPlan
from paranet_jax.early.policies import find_policy
from paranet_jax.early.policies.risk import LOSSES
from paranet_jax.early.sentences import shown_threshold
from paranet_jax.early.units import UNITS, measured_units, shown_cost

_OF = {'marginal': '', 'selective': ' at each early exit', 'class': ' of each class'}
_NAMED = 10  # Classes with too few images that are named.

Row = tuple[str, str, str]


def summary_text(plan: ExitPlan) -> str:
  """Describes the target, where the test images exit, what that saves, and how well the exits are calibrated.

  Args:
    plan: from `calibration.calibrate`, with `expected`, `test` and `splits`.
  """
  assert plan.expected and plan.test and plan.splits
  return '\n\n'.join(
    [
      _title(plan, plan.splits),
      _exit_table(plan, plan.test),
      _gains(plan, plan.expected, plan.test),
      *_audit(plan),
      _calibration_table(plan, plan.test),
      *_raised(plan, plan.expected, plan.test),
    ]
  )


def too_few_text(facts: Mapping[str, Any], class_names: Sequence[str]) -> str:
  """Names the classes that are promised no risk of their own.

  Args:
    facts: of the policy's choice, with `too_few` and `needed`.
  """
  few: list[int] = facts['too_few']
  named = ', '.join(class_names[label] for label in few[:_NAMED])
  more = f' and {len(few) - _NAMED:,} more' if len(few) > _NAMED else ''
  return (
    f'no risk of their own is promised for {len(few):,} of {len(class_names):,} classes, which have fewer than '
    f'{facts["needed"]:,} held-out images to test it: {named}{more}; they count in the overall risk'
  )


def _kind(split: dict[str, Any]) -> str:
  """What was measured: 'accuracy', or 'agreement' with the last exit where there are no labels."""
  return 'agreement' if 'agreement' in split else 'accuracy'


def _title(plan: ExitPlan, splits: dict[str, int]) -> str:
  of = f'{plan.name} on {plan.dataset}, step {plan.step}{f", in {plan.dtype}" if plan.dtype else ""}'
  return f'{of}: {_target(plan)}\nscore: {plan.score}; {_sources(plan, splits)}'


def _sources(plan: ExitPlan, splits: dict[str, int]) -> str:
  minimized = (plan.expected or {}).get('temperature', 'nll')
  if minimized == 'none':
    return f'no temperatures, thresholds from {splits["thresholds"]:,} held-out images'
  by = ' by ECE' if minimized == 'ece' else ''
  if 'promises' in splits:
    return (
      f'temperatures{by} from {splits["temperature"]:,} held-out images, thresholds from {splits["thresholds"]:,}, '
      f'promises from {splits["promises"]:,}'
    )
  return f'temperatures{by} from {splits["temperature"]:,} held-out images, thresholds from {splits["thresholds"]:,}'


def _target(plan: ExitPlan) -> str:
  text = _aim(plan)
  for unit, words in UNITS.items():
    if most := plan.target.get(f'max_{unit}'):
      text += f', at most {shown_cost(most, unit)} {words} for any image'
  return text


def _aim(plan: ExitPlan) -> str:
  policy, target = find_policy(plan.policy), plan.target
  what = policy.description if policy else f'thresholds by {plan.policy}'
  if 'budget' in target:
    at = f' at batch size {target["batch_size"]}' if 'batch_size' in target else ''
    return f'{what}, for a mean of {shown_cost(target["budget"], target["unit"])} {UNITS[target["unit"]]}{at}'
  if 'risk' in target:
    often = f'with probability {1 - target["delta"]:g}' if 'delta' in target else 'on average'
    kind = target.get('of', 'marginal')
    what = 'a threshold for each exit' if kind == 'selective' else what
    return f'{what}, so that {often} the risk{_OF[kind]} is at most {target["risk"]:g}'
  return f'{what}, {target["threshold"]:g}'


def _exit_table(plan: ExitPlan, test: dict[str, Any]) -> str:
  units = ('macs', *measured_units(plan))
  kind = _kind(test)
  words = 'accuracy (%)' if kind == 'accuracy' else f'as exit {plan.exits[-1]} (%)'
  header = ('exit', 'threshold', 'images', 'share (%)', words, 'confidence', *(UNITS[u] for u in units))
  rows = []
  for k, row in enumerate(test['exits']):
    costs = (shown_cost(getattr(plan, unit)[k], unit) for unit in units)
    shown = (str(row['images']), _percent(test['shares'][k], 1), _percent(row[kind]))
    rows.append((str(plan.exits[k]), _threshold(plan, k), *shown, _number(row['confidence'], 3), *costs))
  means = (shown_cost(test[f'cost_{unit}'], unit) for unit in units)
  rows.append(('all', '', str(test['images']), '100.0', _percent(test[kind]), '', *means))
  title = 'where the test images exit (costs per image; confidence: mean calibrated probability)'
  return '\n'.join([title, *align(header, rows, ())])


def _threshold(plan: ExitPlan, k: int) -> str:
  return 'the rest' if k == len(plan.exits) - 1 else shown_threshold(plan, k, f'{plan.score} ')


def _gains(plan: ExitPlan, *splits: dict[str, Any]) -> str:
  last = plan.exits[-1]
  if _kind(splits[0]) == 'agreement':
    rows = [_row(f'same answer as exit {last} (%)', (_percent(split['agreement']) for split in splits))]
  else:
    rows = [
      _row('accuracy (%)', (_percent(split['accuracy']) for split in splits)),
      _row(f'accuracy of exit {last} on all images (%)', (_percent(split['exit_accuracy'][-1]) for split in splits)),
    ]
  for unit in ('macs', *measured_units(plan)):
    rows += _gains_in(plan, unit, *splits)
  if 'loss' in plan.target:
    loss, target = plan.target['loss'], plan.target['risk']
    risks = [split[loss] for split in splits]
    rows.append(_row(f'risk: {LOSSES[loss]}', (f'{risk:.4f}' for risk in risks)))
    rows.append(_row(f'  difference from the target of {target:g}', (f'{risk - target:+.4f}' for risk in risks)))
    if 'risks' in splits[0]:
      where = 'at an early exit' if plan.target.get('of') == 'selective' else 'of a class'
      rows.append(_row(f'  the largest {where}', (_largest(split['risks']) for split in splits)))
  rows += _promises(plan, *splits)
  return '\n'.join(align(('', 'held-out images', 'test images'), rows, left=(0,)))


def _promises(plan: ExitPlan, *splits: dict[str, Any]) -> Iterator[Row]:
  if plan.reject:
    sure = f'{100 * (1 - plan.reject["delta"]):g} %'
    yield _row('answered, the others are unknown (%)', (_percent(split['answered']) for split in splits))
    words = f'  wrong among them (%), {sure} sure: at most {100 * plan.reject["risk"]:g}'
    yield _row(words, (_percent(split['answered_error']) for split in splits))
  if plan.sets:
    words = f'sets that hold the right class (%), promised: {100 * plan.sets["coverage"]:g}'
    yield _row(words, (_percent(split['covered']) for split in splits))
    exits = [k for k, number in enumerate(plan.exits) if number in plan.visited]
    for k in exits:
      yield _row(f'  at exit {plan.exits[k]}', (_percent(split['exit_covered'][k]) for split in splits))
    yield _row('  classes in a set, on average', (f'{split["set_size"]:.2f}' for split in splits))


def _largest(risks: list[float | None]) -> str:
  return _number(max((risk for risk in risks if risk is not None), default=None), 4)


def _gains_in(plan: ExitPlan, unit: str, expected: dict[str, Any], test: dict[str, Any]) -> Iterator[Row]:
  means = [split[f'cost_{unit}'] for split in (expected, test)]
  yield _row(f'mean {UNITS[unit]}', (shown_cost(mean, unit) for mean in means))
  if plan.target.get('unit') == unit:
    budget = plan.target['budget']
    yield _row('  difference from the budget', (f'{100 * (mean / budget - 1):+.2f} %' for mean in means))
    if f'measured_{unit}' in expected:
      yield '  measured in the runtime', shown_cost(expected[f'measured_{unit}'], unit), ABSENT
  costs = plan.macs_alone if unit == 'macs' or not plan.latency else plan.latency['batch_sizes'][0][f'{unit}_alone']
  alone = dict(zip(plan.exits, costs, strict=True))
  last, best = plan.exits[-1], expected['single_best']
  times = f'  speed-up over exit {last} alone ({shown_cost(alone[last], unit)})'
  yield _row(times, (f'{alone[last] / mean:.2f} x' for mean in means))
  if best is None:
    yield '  no single exit is as accurate on the held-out images', '', ''
  elif best != last:
    is_as_good = 'is as accurate' if _kind(expected) == 'accuracy' else 'agrees as often'
    words = f'  over exit {best} alone ({shown_cost(alone[best], unit)}), the cheapest that {is_as_good}'
    yield _row(words, (f'{alone[best] / mean:.2f} x' for mean in means))


def _audit(plan: ExitPlan) -> Iterator[str]:
  """What hard images do to the mean cost, beside the speed-up that was promised."""
  if plan.audit is None or not plan.expected:
    return
  found, kind = plan.audit, _kind(plan.audit['clean'])
  hardest, last, clean = found['hardest'], plan.exits[-1], found['clean']['cost_macs']
  rows = []
  for words, row in (
    ('as they are', found['clean']),
    (f'worst of {len(found["corruptions"])} corruptions ({hardest["name"]})', hardest),
    (f'slowdown attack, at most {found["within"]} of 255 a pixel', found['attack']),
    ('the most expensive exit for all', {'cost_macs': found['most_macs']}),
  ):
    cost = row['cost_macs']
    numbers = shown_cost(cost, 'macs'), f'{cost / clean:.2f}', f'{plan.macs_alone[-1] / cost:.2f} x'
    rows.append((words, *numbers, _percent(row.get(kind))))
  promised = plan.macs_alone[-1] / plan.expected['cost_macs']
  over = f'a speed-up of {promised:.2f} x over exit {last}'
  title = f'audit on {found["images"]:,} test images (calibration promises {over})'
  header = ('mean of an image', 'multiply-adds', 'factor', 'speed-up', f'{kind} (%)')
  yield '\n'.join([title, *align(header, rows, left=(0,))])


def _calibration_table(plan: ExitPlan, test: dict[str, Any]) -> str:
  rows = []
  for k, row in enumerate(test['exits']):
    calibration = row['calibration']
    first = str(plan.exits[k]), f'{plan.temperatures[k]:.3f}', f'all {test["images"]:,}'
    for cells, measured in (
      (first, calibration['all']),
      (('', '', f'exiting {row["images"]:,}'), calibration['leaving']),
    ):
      changes = (_change(measured, name, scale) for name, scale in (('ece', 100), ('nll', 1), ('brier', 1)))
      rows.append((*cells, *changes, _number(measured and measured['auroc'], 3)))
  header = ('exit', 'temperature', 'images', 'ECE (%)', 'NLL (nats)', 'Brier', 'AUROC')
  title = 'calibration on test images, before -> after temperature scaling (AUROC: correct ranked above wrong)'
  if _kind(test) == 'agreement':
    title = (
      f'calibration on test images without labels, as if exit {plan.exits[-1]} were right, before -> after temperature '
      'scaling'
    )
  return '\n'.join([title, *align(header, rows, left=(2,))])


def _raised(plan: ExitPlan, expected: dict[str, Any], test: dict[str, Any]) -> Iterator[str]:
  """A note on each measure that the temperature of an exit makes worse, in the digits shown."""
  lines = []
  for name, unit, scale in (('ece', ' %', 100), ('nll', ' nats', 1)):
    for k, number in enumerate(plan.exits):
      found = []
      for images, split in (('held-out', expected), ('test', test)):
        change = _change(split['exits'][k]['calibration']['all'], name, scale)
        before, after = change.split(' -> ')
        if float(after) > float(before):
          found.append(f'{images} {change}{unit}')
      if found:
        lines.append(f'  exit {number}: {name.upper()} rises, {", ".join(found)}')
  if lines:
    other = 'ece' if expected['temperature'] == 'nll' else 'nll'
    title = (
      f'what the temperatures make worse (--temperature={other} fits {other.upper()}, none leaves the logits alone)'
    )
    yield '\n'.join([title, *lines])


def _row(label: str, values: Iterator[str]) -> Row:
  held_out, test = values
  return label, held_out, test


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
