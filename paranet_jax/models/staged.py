"""A user's own Flax backbone as a multi-exit model, by listing its stages.

For example, a small convolutional network with exits after its first and its last stage:

    import flax.linen as nn
    from paranet_jax.models.staged import StagedModel

    class Stage(nn.Module):
      features: int

      @nn.compact
      def __call__(self, x, train, axis_name=None):
        x = nn.Conv(self.features, (3, 3), strides=2, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=axis_name)(x)
        return nn.relu(x)

    model = StagedModel(
      stages=[Stage(16), Stage(32), Stage(64)],
      exits=(1, 3),
      num_classes=10,
    )
    variables = model.init(jax.random.key(0), images)  # images [B, H, W, C]
    early, late = model.apply(variables, images)  # logits [B, 10] each
    early, carry = model.apply(variables, images, {}, 1, method='stage')
    late, _ = model.apply(variables, images, carry, 2, method='stage')
"""

import inspect
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from paranet_jax.models.layers.conv import Classifier
from paranet_jax.models.multi_exit import Chain, Logits


class StagedModel(Chain):
  """Stages one after another, each from features to features, with exits after some of them.

  A stage or a head is called with `train` if its `__call__` takes an argument of that name, and with `axis_name`, the
  device axis over which batch statistics are to be shared, likewise. Features may be any tree of arrays; only a default
  head needs [B, H, W, C]. Variables are drawn by the modules' own initializers.

  Attributes:
    stages: the backbone's modules, in order; the first reads the images.
    exits: for each exit the number of the stage it follows, 1-based and rising, the last one being the last stage.
    num_classes: width of every exit.
    heads: one module an exit, features -> logits [B, num_classes]; None: global average pool and a linear layer each.
    dtype: to which the images are cast; the modules have their own. Logits are float32.
    axis_name: device axis over which batch statistics are shared in training.

  Raises:
    ValueError: exits or heads do not fit the stages, or batch statistics could not be shared, in one line.
  """

  stages: Sequence[nn.Module]
  exits: Sequence[int]
  num_classes: int
  heads: Sequence[nn.Module] | None = None
  dtype: Any = jnp.float32
  axis_name: str | None = None

  def setup(self):
    rising = all(before < after for before, after in zip((0, *self.exits), self.exits, strict=False))
    if not self.exits or not rising or self.exits[-1] != len(self.stages):
      raise ValueError(
        f'exits {tuple(self.exits)} must be stage numbers, rising from 1 or more to the last stage, {len(self.stages)}'
      )
    if self.heads is not None and len(self.heads) != len(self.exits):
      raise ValueError(f'{len(self.heads)} heads do not fit {len(self.exits)} exits: give one for each, or None')
    if self.heads is None:
      self.default_heads = [Classifier(self.num_classes) for _ in self.exits]

  @property
  def exit_positions(self) -> tuple[int, ...]:
    """The stage that each exit follows."""
    return tuple(self.exits)

  def segment(self, x: Any, start: int, end: int, train: bool) -> Any:
    """Stages start + 1 to end."""
    for stage in self.stages[start:end]:
      x = self._call(stage, x, train)
    return x

  def exit_logits(self, x: Any, number: int, train: bool) -> Logits:
    """The exit's head."""
    heads = self.default_heads if self.heads is None else self.heads
    return self._call(heads[number - 1], x, train).astype(jnp.float32)

  def _call(self, module: nn.Module, x: Any, train: bool) -> Any:
    options = {'train': train, 'axis_name': self.axis_name}
    taken = inspect.signature(type(module).__call__).parameters
    if train and self.axis_name and 'axis_name' not in taken and 'batch_stats' in module.variables:
      raise ValueError(
        f'{type(module).__name__} has batch statistics: to train on several devices its __call__ must take axis_name '
        'and give it to its nn.BatchNorm'
      )
    return module(x, **{name: value for name, value in options.items() if name in taken})
