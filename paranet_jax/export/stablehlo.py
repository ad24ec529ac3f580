"""Stages as StableHLO for XLA runtimes: serialized by jax.export, for any batch size and several platforms."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from paranet_jax.export.stages import Stages, StageSpec
from paranet_jax.models.layers.backend import plain_operations

PLATFORMS = ('cpu', 'cuda', 'tpu')


def write_stablehlo(folder: Path, stages: Stages) -> dict[str, Any]:
  """Writes a file for each stage; returns the file and the signature of each."""
  entries = {}
  for name, spec in stages.specs.items():
    exported = stablehlo_stage(spec)
    (folder / f'{name}.stablehlo').write_bytes(exported.serialize())
    entries[name] = {'file': f'{name}.stablehlo'} | _signature(exported, spec)
  return entries


def stablehlo_stage(spec: StageSpec) -> export.Exported:
  """The exported function of a stage: arrays [batch, *shape] of `takes` -> logits [batch, classes], then `gives`."""
  (batch,) = export.symbolic_shape('batch')
  shapes = [jax.ShapeDtypeStruct((batch, *tensor.shape), jnp.float32) for tensor in spec.takes]
  with plain_operations(), _without_source_locations():
    return export.export(jax.jit(spec.function), platforms=PLATFORMS)(*shapes)


@contextlib.contextmanager
def _without_source_locations() -> Iterator[None]:
  """Keeps the paths of this machine's source files out of the program."""
  limit = jax.config.values['jax_traceback_in_locations_limit']
  jax.config.update('jax_traceback_in_locations_limit', 0)
  try:
    yield
  finally:
    jax.config.update('jax_traceback_in_locations_limit', limit)


def _signature(exported: export.Exported, spec: StageSpec) -> dict[str, Any]:
  """What a caller needs: shapes and types by name, the target platforms and the calling convention."""
  outputs = ['logits', *(tensor.name for tensor in spec.gives)]
  return {
    'inputs': {tensor.name: str(aval) for tensor, aval in zip(spec.takes, exported.in_avals, strict=True)},
    'outputs': {name: str(aval) for name, aval in zip(outputs, exported.out_avals, strict=True)},
    'platforms': list(exported.platforms),
    'calling_convention_version': exported.calling_convention_version,
  }
