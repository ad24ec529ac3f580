"""Numbers that are no longer finite: how a run ends then, and that they are not saved."""

from typing import Any

import jax
import numpy as np

from paranet_jax.host.errors import UserError


def is_finite(tree: Any) -> bool:
  """Whether every number of a tree of arrays on the host is finite."""
  return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def not_finite(what: str, step: int, saved_step: int | None) -> UserError:
  """The error of a run whose loss or state is not finite.

  Args:
    step: at which it was found.
    saved_step: of the latest checkpoint; None: there is none.
  """
  saved = 'nothing is saved' if saved_step is None else f'the last checkpoint is of step {saved_step}'
  return UserError(
    f'{what} is no longer finite at step {step}, and {saved}; '
    'lower --config.train.learning_rate or set --config.train.clip_norm, in a new --workdir'
  )
