"""The cost of each exit along the exits that are run: skipping a stage may be cheaper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
  import jax

# Functions import jax themselves: a bundle is calibrated without it.

StepCost = Callable[[tuple[int, ...], int], float]


class PathCosts:
  """The cost of exiting at each visited exit, in any unit.

  Args:
    num_exits: K usable exits.
    step_cost: from the exits visited before and the next one (indices 0..K-1) to the cost that the next one adds.
      Called once for each path.
  """

  def __init__(self, num_exits: int, step_cost: StepCost):
    self.num_exits = num_exits
    self._step_cost = step_cost
    self._steps: dict[tuple[int, ...], float] = {}

  def cumulative(self, visited: tuple[int, ...]) -> Float[np.ndarray, ' visited']:
    """The cost of exiting at each visited exit when exactly these are run in turn.

    Args:
      visited: increasing indices, 0..K-1.
    """
    return np.cumsum([self._step(tuple(visited[: position + 1])) for position in range(len(visited))], dtype=np.float64)

  def alone(self) -> Float[np.ndarray, ' K']:
    """The cost of each exit alone."""
    return np.array([self._step((k,)) for k in range(self.num_exits)])

  def _step(self, path: tuple[int, ...]) -> float:
    if path not in self._steps:
      self._steps[path] = float(self._step_cost(path[:-1], path[-1]))
    return self._steps[path]


class Stages:
  """The stages of a multi-exit model along any path, as functions and shapes.

  Args:
    model: with the multi-exit interface.
    variables: its parameters and statistics, arrays or shapes.
    exits: numbers of the usable exits, 1-based and increasing; paths are indices into them.
    images: shape and type of a batch [B, H, W, C].
  """

  def __init__(self, model: Any, variables: Any, exits: Sequence[int], images: jax.ShapeDtypeStruct):
    self.model, self.variables, self.exits, self.images = model, variables, tuple(exits), images
    self._carries: dict[tuple[int, ...], Any] = {(): {}}

  def function(self, index: int) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """(variables, images, carry) -> (logits, carry) of a usable exit's stage."""
    number = self.exits[index]
    return lambda variables, images, carry: self.model.apply(variables, images, carry, number, method='stage')

  def carry(self, path: tuple[int, ...]) -> Any:
    """The shapes of the features that later stages read after a path."""
    import jax

    if path not in self._carries:
      before = self.carry(path[:-1])
      _, self._carries[path] = jax.eval_shape(self.function(path[-1]), self.variables, self.images, before)
    return self._carries[path]

  def by_carry(self, cost: Callable[[int, Any], float]) -> StepCost:
    """A step cost from the cost of (index, carry), called once for all paths with the same shapes of features."""
    import jax

    known: dict[Any, float] = {}

    def step_cost(before: tuple[int, ...], index: int) -> float:
      carry = self.carry(before)
      leaves, structure = jax.tree.flatten(carry)
      key = index, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
      if key not in known:
        known[key] = cost(index, carry)
      return known[key]

    return step_cost


def mac_costs(model: Any, image_shape: tuple[int, int, int], exits: Sequence[int]) -> PathCosts:
  """Multiply-adds per image along any path, counted on abstract shapes like `paranet_jax.costs`.

  Args:
    model: with the multi-exit interface.
    image_shape: (H, W, C).
    exits: numbers of the usable exits, 1-based and increasing.
  """
  import jax
  import jax.numpy as jnp

  from paranet_jax.costs import abstract_variables, multiply_adds
  from paranet_jax.models.layers.backend import plain_operations

  image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  stages = Stages(model, abstract_variables(model, image_shape), exits, image)

  def cost(index: int, carry: Any) -> int:
    with plain_operations():  # As `paranet_jax.costs`.
      return multiply_adds(stages.function(index), stages.variables, image, carry)[0]

  return PathCosts(len(stages.exits), stages.by_carry(cost))
