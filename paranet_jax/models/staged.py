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
  """Stages in sequence, each mapping features to features, with exits after some of them.

  A stage or head is called with `train` and `axis_name`, the device axis over which batch statistics are shared, if its
  `__call__` has parameters with these names. Features may be any tree of arrays; only a default head needs
  [B, H, W, C]. The modules' own initializers draw the variables.

  Attributes:
    stages: the backbone's modules, in order; the first reads the images.
    exits: 1-based number of the stage that each exit follows, ascending; the last must be the last stage.
    num_classes: width of every exit.
    heads: one module per exit, features -> logits [B, num_classes]; None: global average pool and linear layer.
    dtype: dtype to which the images are cast; the modules choose their own. Logits are float32.
    axis_name: device axis over which batch statistics are shared in training.

  Raises:
    ValueError: exits or heads do not fit the stages, or batch statistics could not be shared; the message is one line.
  """

  stages: Sequence[nn.Module]
  exits: Sequence[int]
  num_classes: int
  heads: Sequence[nn.Module] | None = None
  dtype: Any = jnp.float32
  axis_name: str | None = None

  exits_apart = True

  def setup(self):
    rising = all(before < after for before, after in zip((0, *self.exits), self.exits, strict=False))
    if not self.exits or not rising or self.exits[-1] != len(self.stages):
      raise ValueError(
        f'exits must be ascending stage numbers that end with the last stage, {len(self.stages)}, '
        f'found {tuple(self.exits)}'
      )
    if self.heads is not None and len(self.heads) != len(self.exits):
      raise ValueError(f'expected {len(self.exits)} heads, one per exit, found {len(self.heads)}; or set heads=None')
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
        'and pass it to its nn.BatchNorm'
      )
    return module(x, **{name: value for name, value in options.items() if name in taken})
