"""Which exits train when: all together, or the body with the last exit first (Kubaty et al. 2025)."""

from typing import NamedTuple

from paranet_jax.host.errors import UserError
from paranet_jax.targets import LABELS, Targets, trained_exits

REGIMES = ('joint', 'disjoint', 'mixed')


class Phase(NamedTuple):
  """Steps of a run in which the same exits train.

  Attributes:
    end: the phase's last step plus 1, counted from 0.
    targets: what each exit learns from in it; None: it does not train.
    frozen: the exit whose parameters and running statistics, those of the body among them, stay as they are.
  """

  end: int
  targets: Targets
  frozen: int | None = None


def make_phases(regime: str, targets: Targets, body_steps: int, total_steps: int) -> tuple[Phase, ...]:
  """The phases of a run.

  Args:
    regime: 'joint': all exits from the start; 'disjoint': the last trained exit alone, then, with all that it uses
      frozen, the others; 'mixed': the last trained exit alone, then all.
    targets: what each exit learns from.
    body_steps: length of the first of two phases.
    total_steps: length of the run.
  """
  if regime == 'joint':
    return (Phase(total_steps, targets),)
  last = trained_exits(targets)[-1]
  body = tuple(target if number == last else None for number, target in enumerate(targets, 1))
  if regime == 'mixed':
    return (Phase(body_steps, body), Phase(total_steps, targets))
  others = tuple(None if number == last else target for number, target in enumerate(targets, 1))
  return (Phase(body_steps, body), Phase(total_steps, others, frozen=last))


def check_regime(regime: str, targets: Targets, name: str) -> None:
  """Refuses a regime of two phases for exits that do not allow it.

  Args:
    regime: as in `make_phases`.
    targets: what each exit learns from.
    name: of the network, for the messages.

  Raises:
    UserError: one exit alone is trained, or the last one learns from another exit.
  """
  trained = trained_exits(targets)
  if regime == 'joint':
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
