"""The interface of every multi-exit model here.

`num_exits`;
`model.apply(variables, images, exits=...)`: logits of the exits asked for, computing only what they need;
`model.apply(variables, images, carry, number, method='stage')`: exit `number` and what later stages need, so that
stopping early skips the rest. Both give the same logits;
`rng_names`, where training draws random numbers: the keys it needs in `rngs`, the same ones on every device.
"""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
from jax import Array


class MultiExit(nn.Module):
  """Base of the models: they give `num_exits` and `_evaluate`, and `_carried` if not all features are carried on.

  `_evaluate(images, carry, exits, train)` returns the logits of these exits by their number, and the features that are
  there then, those of `carry` included.
  """

  def __call__(self, images: Array, train: bool = False, exits: Iterable[int] | None = None) -> list[Array | None]:
    """Logits of the exits asked for.

    Args:
      images: [B, H, W, channels], normalized.
      train: normalize with the batch's statistics and update the running ones.
      exits: 1-based; None: all.

    Returns:
      One float32 [B, num_classes] an exit; None for those not asked for.
    """
    numbers = range(1, self.num_exits + 1)
    logits, _ = self._evaluate(images, {}, numbers if exits is None else tuple(exits), train)
    return [logits.get(number) for number in numbers]

  def stage(self, images: Array, carry: Any, number: int, train: bool = False) -> tuple[Array, Any]:
    """Runs what exit `number` still needs.

    Args:
      images: [B, H, W, channels], normalized; the same at every stage.
      carry: {} at first, then what the stage before returned. Stages may be skipped, not repeated.
      number: 1-based exit.
      train: as in `__call__`.

    Returns:
      float32 logits [B, num_classes], and what later exits still need: the model's `Carry`, {} after the last exit.
    """
    logits, features = self._evaluate(images, carry, (number,), train)
    return logits[number], self._carried(features, number) if number < self.num_exits else {}

  def _carried(self, features: Any, number: int) -> Any:
    """Of the features that are there after exit `number`, those that later exits need."""
    return features
