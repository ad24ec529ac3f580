"""What each exit learns from, and when: the name language, distillation and training regimes.

`PN3-x3d` names a network and the target of each of its exits.
`PN<P>[cut]-<suffix>`: P pipelines, with the cascade or without it (`cut`), and one character per pipeline:
`d` = the true label, a digit q = the logits of pipeline q, `x` = nothing (paper, section 3.4).
"""

import dataclasses
import re
from typing import NamedTuple

from paranet_jax.host.errors import UserError

LABELS = 0
"""Target of an exit with `d`; one that matches another exit has its 1-based number, and one with `x` has None."""

GIVEN = -1
"""Target of an exit that came trained and does not change."""

Targets = tuple[int | None, ...]

REGIMES = ('joint', 'disjoint', 'mixed', 'exits')
"""Which exits train when: all together, or the backbone with the last exit first (Kubaty et al. 2025), or all but the
last one, which came trained with the backbone."""

EXIT_TARGETS = ('last', 'labels', 'both')
"""What the exits learn from under the regime 'exits': the last exit's logits, the labels, or both."""

_NAME = re.compile(r'PN([1-9])(cut)?-(.*)', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class ModelName:
  """A parsed name: `num_pipelines` P, `cascade` (False for `cut`), `targets` with one entry per pipeline."""

  num_pipelines: int
  cascade: bool
  targets: Targets


def parse_name(name: str) -> ModelName:
  """Parses `PN<P>[cut]-<suffix>`, for example `PN3-ddd`, `PN3cut-33d`, `PN4-444d`; P is 1 to 9.

  Raises:
    UserError: the name has another form, or its suffix is invalid (see `parse_suffix`).
  """
  match = _NAME.fullmatch(name)
  if not match:
    raise UserError(
      f'name {name!r} does not have the form PN<P>[cut]-<suffix> with P from 1 to 9, such as PN3-ddd or PN3cut-33d; '
      'set --config.name'
    )
  num_pipelines = int(match[1])
  return ModelName(num_pipelines, match[2] is None, parse_suffix(match[3], num_pipelines, name))


def parse_suffix(suffix: str, num_pipelines: int, name: str) -> Targets:
  """Parses a suffix to one target per pipeline: `LABELS`, a teacher's number, or None.

  Args:
    name: the whole name, for messages.

  Raises:
    UserError: wrong length, an unknown character, a pipeline that matches itself, all `x`, or a teacher whose own exit
      no true label reaches directly or through its teachers.
  """
  if len(suffix) != num_pipelines:
    raise UserError(
      f'name {name!r}: the suffix needs {num_pipelines} characters, one per pipeline, and {suffix!r} has '
      f'{len(suffix)}; set --config.name'
    )
  targets = tuple(
    _parse_character(character, position, num_pipelines, name) for position, character in enumerate(suffix, 1)
  )
  if all(target is None for target in targets):
    raise UserError(f"name {name!r}: every exit is 'x', so nothing would be trained; give one exit 'd'")
  for position, teacher in enumerate(targets, 1):
    if teacher and not _label_reaches(teacher, targets):
      raise UserError(
        f'name {name!r}: {suffix[position - 1]!r} at position {position} makes pipeline {position} match pipeline '
        f"{teacher}, whose own exit no true label reaches; give pipeline {teacher} a 'd' or another teacher"
      )
  return targets


def trained_exits(targets: Targets) -> tuple[int, ...]:
  """1-based numbers of the exits that have a loss."""
  return tuple(number for number, target in enumerate(targets, 1) if target is not None)


def matches_exits(targets: Targets) -> bool:
  """Whether an exit matches the logits of another one."""
  return any(target is not None and target > 0 for target in targets)


def exits_targets(num_exits: int, learn_from: str, new_last: bool = False) -> Targets:
  """The targets of the regime 'exits'.

  Args:
    learn_from: one of EXIT_TARGETS; with 'both' the last exit is a teacher besides the labels.
    new_last: the last exit is new, and learns from the labels.
  """
  return (*[num_exits if learn_from == 'last' else LABELS] * (num_exits - 1), LABELS if new_last else GIVEN)


def distill_teachers(
  targets: Targets, distill: str, hard_label_weight: float, name: str, given: bool = False
) -> dict[int, tuple[int, ...]]:
  """The teachers of each exit that learns from labels and later exits.

  Args:
    targets: one per exit.
    distill: 'none', 'last' (the last trained exit), 'next' (the next one), 'later' (all later ones) or 'all' (the last
      trained exit, which every exit learns from, itself too).
    hard_label_weight: share of the labels in the loss of an exit with teachers.
    name: name of the network, for messages.
    given: the teachers are those of another network, which is trained.

  Returns:
    {exit: its teachers}, both 1-based, for exits that have teachers.

  Raises:
    UserError: no exit would have a teacher, or one would learn from no label, directly or through its teachers.
  """
  if distill == 'none':
    return {}
  teachers, trained = {}, trained_exits(targets)
  for number in trained:
    later = tuple(other for other in trained if other > number)
    if targets[number - 1] == LABELS and (later or distill == 'all'):
      teachers[number] = {'last': later[-1:], 'next': later[:1], 'later': later, 'all': trained[-1:]}[distill]
  if not teachers:
    raise UserError(
      f'loss.distill {distill!r} needs an exit that learns from labels and a trained exit after it, and {name} has '
      'none; set --config.loss.distill'
    )
  if given:
    return teachers
  sources = {number: teachers.get(number, (targets[number - 1],)) for number in trained}
  taught = {LABELS, GIVEN} | (set(teachers) if hard_label_weight else set())
  for _ in trained:
    taught |= {number for number in trained if taught.intersection(sources[number])}
  for number in trained:
    if number not in taught:
      raise UserError(
        f'loss.distill {distill!r}: exit {number} of {name} would learn from no label, directly or through its '
        'teachers; raise --config.loss.hard_label_weight, or set --config.loss.distill'
      )
  return teachers


class Phase(NamedTuple):
  """A part of a run in which the same exits train.

  Attributes:
    end: index of the step after the phase's last one, counted from 0.
    targets: what each exit learns from; None: it does not train.
    frozen: the exit whose parameters and running statistics, including its backbone, do not change.
  """

  end: int
  targets: Targets
  frozen: int | None = None


def make_phases(
  regime: str,
  targets: Targets,
  backbone_steps: int,
  total_steps: int,
  *,
  match_step: int = 0,
  match_before: str = 'labels',
) -> tuple[Phase, ...]:
  """The phases of a run.

  Args:
    regime: 'joint': all exits from the start; 'disjoint': the last trained exit alone, then the others, with all that
      the last one uses frozen; 'mixed': the last trained exit alone, then all exits; 'exits': all but the last, with
      all that the last one uses frozen.
    backbone_steps: length of the first of two phases.
    total_steps: length of the run.
    match_step: from which exits match others, under the regime 'joint'.
    match_before: what these learn from before: 'labels' or 'nothing'.
  """
  if regime == 'joint' and match_step:
    before = LABELS if match_before == 'labels' else None
    return (
      Phase(match_step, tuple(before if target else target for target in targets)),
      Phase(total_steps, targets),
    )
  if regime == 'joint':
    return (Phase(total_steps, targets),)
  last = trained_exits(targets)[-1]
  backbone = tuple(target if number == last else None for number, target in enumerate(targets, 1))
  if regime == 'mixed':
    return (Phase(backbone_steps, backbone), Phase(total_steps, targets))
  others = tuple(None if number == last else target for number, target in enumerate(targets, 1))
  if regime == 'exits':
    given = targets[-1] == GIVEN
    return (Phase(total_steps, others if given else targets, frozen=last if given else None),)
  return (Phase(backbone_steps, backbone), Phase(total_steps, others, frozen=last))


def check_regime(regime: str, targets: Targets, name: str) -> None:
  """Raises UserError if a regime with two phases has one exit to train, or its last exit learns from another exit.

  Args:
    name: name of the network, for messages.
  """
  trained = trained_exits(targets)
  if regime == 'joint':
    return
  if regime == 'exits' and targets == (GIVEN,):
    raise UserError(
      f"train.regime 'exits' trains the exits before the last one, and {name} has none; set --config.model.exits, or "
      '--config.train.regime'
    )
  if regime == 'exits':
    return
  if len(trained) == 1:
    raise UserError(
      f'train.regime {regime!r} trains the last exit first and then others, and {name} trains exit {trained[0]} alone; '
      'set --config.train.regime'
    )
  if targets[trained[-1] - 1] != LABELS:
    raise UserError(
      f'train.regime {regime!r} trains the last exit alone first, from labels, and exit {trained[-1]} of {name} learns '
      f'from exit {targets[trained[-1] - 1]}; set --config.train.regime'
    )


def describe_target(target: int | None, teachers: tuple[int, ...] = (), hard_label_weight: float = 0.0) -> str:
  """What an exit learns from, in words: 'labels', 'exit 3', 'labels, exits 2 3', 'given' or 'nothing'.

  Args:
    target: target of the exit.
    teachers: teachers of an exit with labels (see `distill_teachers`).
    hard_label_weight: share of the labels in the loss of an exit that learns from exits; 0: it learns from them alone.
  """
  if target is None:
    return 'nothing'
  if target == GIVEN:
    return 'given'
  teachers = teachers if target == LABELS else (target,)
  labels = ['labels'] if hard_label_weight or not teachers else []
  exits = [f'exit{"s" * (len(teachers) > 1)} {" ".join(map(str, teachers))}'] if teachers else []
  return ', '.join(labels + exits)


def _parse_character(character: str, position: int, num_pipelines: int, name: str) -> int | None:
  if character == 'd':
    return LABELS
  if character == 'x':
    return None
  if character not in '123456789'[:num_pipelines]:
    raise UserError(
      f'name {name!r}: {character!r} at position {position} is none of d, x, 1 to {num_pipelines}; set --config.name'
    )
  if int(character) == position:
    raise UserError(
      f"name {name!r}: {character!r} at position {position} makes pipeline {position} match itself; give it 'd', 'x' "
      'or another pipeline'
    )
  return int(character)


def _label_reaches(exit_number: int, targets: Targets) -> bool:
  seen = set()
  target: int | None = exit_number
  while target and target not in seen:
    seen.add(target)
    target = targets[target - 1]
  return target == LABELS
