"""A stage as StableHLO, for runtimes of XLA: serialized by jax.export, for a free batch and several platforms."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from paranet_jax.export.stages import StageSpec, Tensor, tracing

PLATFORMS = ('cpu', 'cuda', 'tpu')


def stablehlo_stage(spec: StageSpec) -> export.Exported:
  """The exported function of a stage: arrays [batch, *shape] of `takes` -> logits [batch, classes], then `gives`."""
  (batch,) = export.symbolic_shape('batch')
  shapes = [jax.ShapeDtypeStruct((batch, *tensor.shape), jnp.float32) for tensor in spec.takes]
  with tracing():
    return export.export(jax.jit(spec.function), platforms=PLATFORMS)(*shapes)


def signature(exported: export.Exported, takes: tuple[Tensor, ...], gives: tuple[Tensor, ...]) -> dict[str, Any]:
  """What calls it: shapes and types by name, the platforms it was lowered for, and the calling convention."""
  return {
    'inputs': {tensor.name: str(aval) for tensor, aval in zip(takes, exported.in_avals, strict=True)},
    'outputs': {
      name: str(aval)
      for name, aval in zip(('logits', *(tensor.name for tensor in gives)), exported.out_avals, strict=True)
    },
    'platforms': list(exported.platforms),
    'calling_convention_version': exported.calling_convention_version,
  }
