"""A Flax NNX module as a stage or head of a `StagedModel`.

For example, `blocks` is a list of NNX modules, trained or not, each called with what the one before it returns:

    from paranet_jax.models.nnx_stage import NNXStage
    from paranet_jax.models.staged import StagedModel

    model = StagedModel(stages=[NNXStage(block) for block in blocks], exits=(1, 2), num_classes=10)
    variables = model.init(jax.random.key(0), images)  # the blocks' own values, and new heads
    early, late = model.apply(variables, images)  # images [B, H, W, C]
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


class NNXStage(nn.Module):
  """A linen module that computes what an NNX module does. The NNX module itself is never changed.

  Its `nnx.Param` become parameters and its `nnx.BatchStat` running statistics, under their paths joined by dots; `init`
  gives the values that the module has. Its other variables keep their values. It runs in the mode that `train` asks
  for, whatever mode it is in.

  Attributes:
    module: called with the features.

  Raises:
    ValueError: it has random numbers, as for dropout, and is run in training without a `dropout` key; one line.
  """

  module: nnx.Module

  @nn.compact
  def __call__(self, x: Any, train: bool) -> Any:
    graph, params, statistics, others = nnx.split(self.module, nnx.Param, nnx.BatchStat, ...)
    params = self._replaced(params, lambda name, own: self.param(name, lambda _: own))
    statistics = self._replaced(statistics, lambda name, own: self.variable('batch_stats', name, lambda: own).value)
    module = nnx.merge(graph, params, statistics, others, copy=True)  # Otherwise it shares the others' variables.
    if not train:
      module.eval()
      return module(x)
    module.train()
    if jax.tree.leaves(nnx.state(module, nnx.RngState)):
      if not self.has_rng('dropout'):
        raise ValueError(f'{type(self.module).__name__} draws random numbers in training: give a dropout key')
      nnx.reseed(module, default=self.make_rng('dropout'))
    y = module(x)
    if self.is_mutable_collection('batch_stats') and not self.is_initializing():
      for path, variable in nnx.to_flat_state(nnx.state(module, nnx.BatchStat)):
        self.put_variable('batch_stats', _name(path), variable[...])
    return y

  def _replaced(self, state: nnx.State, value: Callable[[str, Any], Any]) -> nnx.State:
    """The state with values of this module's variables, from their names and the NNX module's own values."""
    flat = [
      (path, variable.replace(jnp.asarray(value(_name(path), variable[...]))))
      for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.from_flat_state(flat)


def _name(path: tuple[Any, ...]) -> str:
  return '.'.join(map(str, path))
