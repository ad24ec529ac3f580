"""What a plan promises of new images, in sentences, and what it does not."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from paranet_jax.display.tables import human_count
from paranet_jax.early.exit_plan import FULL, ExitPlan
from paranet_jax.early.policies.risk import LOSSES
from paranet_jax.early.units import UNITS

_ALIKE = 'This assumes that new images are drawn like the held-out ones: not from another camera, place or season.'
_OF = {
  'marginal': 'new images',
  'selective': 'the new images that leave at each early exit',
  'class': 'the new images of each class that had enough held-out ones',
}


def promises(plan: ExitPlan) -> list[str]:
  """The sentences: what is promised, then what it came to on the test images."""
  if plan.policy == FULL:
    return [f'Nothing was calibrated: every image goes to exit {plan.exits[-1]}, at its full cost.']
  answers = [*_rejection(plan), *_sets(plan)]
  return [*_target(plan), *answers, *([_ALIKE] if answers or 'risk' in plan.target else []), *_audit(plan)]


def shown_threshold(plan: ExitPlan, k: int, score: str = '') -> str:
  """From where images leave at exit k, in a cell of a table; `score` stands before a number."""
  threshold, confidence = plan.thresholds[k], plan.confidence_thresholds[k]
  if threshold is None or confidence is None:
    return 'no image'
  if threshold == 0:
    return 'all images'
  if plan.score == 'patience':
    return f'{threshold:g} equal'
  # Near 1 the distance from 1 says more.
  return score + (f'1 - {math.exp(-confidence):.1e}' if threshold > 0.9999 else f'{threshold:.4f}')


def watch_sentence(plan: ExitPlan) -> str | None:
  """What the watch of a bundle promises; None: it has none."""
  if plan.seen is None:
    return None
  return (
    '`run.py --watch=STATE.json` tests whether answers still look as in calibration. While images stay alike, the '
    'probability that it ever alarms is at most `--alpha` (0.01).'
  )


def is_another_network(bundle: Mapping[str, Any]) -> bool:
  """Whether a bundle is in another dtype than the network that was calibrated, so that nothing is promised of it.

  Args:
    bundle: contents of bundle.json.
  """
  return bundle.get('calibrated_dtype') not in (None, bundle.get('dtype'))


def not_promised(bundle: Mapping[str, Any]) -> str:
  """What is said of promises before those of a bundle that `is_another_network`."""
  return (
    f'This was promised of the network in {bundle["calibrated_dtype"]}. The bundle is in {bundle["dtype"]}, and '
    'nothing is promised of it.'
  )


def _target(plan: ExitPlan) -> Iterator[str]:
  target, count = plan.target, (plan.splits or {}).get('thresholds', 0)
  if 'risk' in target:
    loss, of = target.get('loss', ''), _OF[target.get('of', 'marginal')]
    lost = LOSSES.get(loss, 'answered worse than by the last exit')
    often = f'With probability {1 - target["delta"]:g}' if 'delta' in target else 'On average'
    yield (
      f'{often} over the draw of the {count:,} held-out images, at most {_percent(target["risk"])} of {of} lose their '
      f'answer by exiting early ({lost}).'
    )
    yield from _measured(plan, loss, lambda value: f'of all it was {_percent(value)}')
    return
  if 'budget' in target:
    unit = target.get('unit', 'macs')
    cost = human_count(round(target['budget'])) if unit == 'macs' else f'{target["budget"]:g}'
    cost = f'{cost} {UNITS.get(unit, unit)}'
    yield (
      f'Thresholds were chosen so that the {count:,} held-out images cost a mean of {cost} at most. New ones '
      'should cost about as much; no bound is promised.'
    )
  else:
    yield 'Thresholds were set by hand: no mean cost and no accuracy is promised.'
  yield f'A single image costs at most {human_count(round(plan.most_macs))} multiply-adds.'
  yield from _measured(plan, 'cost_macs', lambda value: f'the mean was {human_count(round(value))} multiply-adds')


def _rejection(plan: ExitPlan) -> Iterator[str]:
  if reject := plan.reject:
    count = (plan.splits or {}).get('promises', 0)
    yield (
      f'Images of which the network is too unsure are answered "unknown". With probability {1 - reject["delta"]:g} '
      f'over the draw of {count:,} other held-out images, at most {_percent(reject["risk"])} of the answers to '
      'all other new images are wrong.'
    )
    yield from _measured(plan, 'answered', lambda value: f'{_percent(value)} were answered')
    yield from _measured(plan, 'answered_error', lambda value: f'{_percent(value)} of the answers were wrong')


def _sets(plan: ExitPlan) -> Iterator[str]:
  if sets := plan.sets:
    yield (
      f'The set of classes of a new image holds the right one with a probability of at least '
      f'{_percent(sets["coverage"])}, at whichever exit it leaves{_together(plan, sets.get("limits", ()))}.'
    )
    yield from _measured(plan, 'covered', lambda value: f'{_percent(value)} of the sets held it')


def _together(plan: ExitPlan, limits: Sequence[float | None]) -> str:
  """Names the exits whose sets keep the coverage among their images together, not at each one."""
  used = [pair for *pair, at in zip(plan.exits, limits, plan.confidence_thresholds, strict=False) if at is not None]
  # Without a limit, all classes are in the sets.
  sharing = (same for limit, same in itertools.groupby(used, lambda pair: pair[1]) if limit is not None)
  groups = [[number for number, _ in same] for same in sharing]
  return ''.join(
    f'; exits {", ".join(map(str, group[:-1]))} and {group[-1]} share a limit, and keep it together'
    for group in groups
    if len(group) > 1
  )


def _audit(plan: ExitPlan) -> Iterator[str]:
  if audit := plan.audit:
    clean, hardest, attack = (audit[name]['cost_macs'] for name in ('clean', 'hardest', 'attack'))
    alone, name = plan.macs_alone[-1], audit['hardest']['name']
    yield (
      f'Harder images cost more. Of {len(audit["corruptions"])} corruptions of {audit["images"]:,} test images, the '
      f'worst ({name}) makes the mean {hardest / clean:.2f} times as high, and an adversary who changes pixels by '
      f'{audit["within"]} of 255 at most makes it {attack / clean:.2f} times as high: the speed-up falls from '
      f'{alone / clean:.2f} to {alone / hardest:.2f} and {alone / attack:.2f}.'
    )


def _measured(plan: ExitPlan, field: str, words: Callable[[float], str]) -> Iterator[str]:
  test = plan.test or {}
  if test.get(field) is not None:
    count = (plan.splits or {}).get('test') or test.get('images', 0)
    yield f'On {count:,} test images, which chose nothing, {words(test[field])}.'


def _percent(share: float) -> str:
  return f'{round(100 * share, 2):g} %'
