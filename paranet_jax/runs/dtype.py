"""The dtype in which a run computes: the one it started with, or, at its start, the faster one on this machine.

`calibrate --dtype` chooses another one for what has been trained.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from paranet_jax.config import build_model, image_shape
from paranet_jax.dtype_timing import dtype_timing
from paranet_jax.host.errors import UserError, say
from paranet_jax.host.machine import Device
from paranet_jax.host.processes import Coordinator
from paranet_jax.models.registry import BFLOAT16, INSISTED
from paranet_jax.models.staged import StagedModel
from paranet_jax.runs.workdir import saved_dtype


def with_dtype(
  config: ConfigDict, devices: list[Device], workdir: Path | None = None, report: Callable[[str], None] = say
) -> ConfigDict:
  """The configuration with 'bfloat16!' or 'float32' in place of a `model.dtype` of 'bfloat16'.

  A run goes on as it began, on whatever machine. A new one computes in float32 where that is faster. Process 0 decides.

  Args:
    workdir: absolute; None: a new run.
    report: is called with one line if float32 takes the place of bfloat16.

  Raises:
    UserError: the saved configuration cannot be read.
  """
  if config.model.dtype != BFLOAT16:
    return config
  processes = Coordinator()
  kept = processes.once(saved_dtype, workdir) if workdir else None
  if kept == 'float32':
    report(f'model.dtype bfloat16: the run in {workdir} began in float32, and goes on so')
  chosen = processes.from_first(kept or processes.once(_faster, config, devices, report))
  return _with(config, 'float32' if chosen == 'float32' else INSISTED)


def with_saved_dtype(config: ConfigDict, workdir: Path) -> ConfigDict:
  """As `with_dtype`, for what a run has computed: nothing is measured or reported."""
  if config.model.dtype != BFLOAT16:
    return config
  processes = Coordinator()
  return _with(config, processes.from_first(processes.once(saved_dtype, workdir)) or BFLOAT16)


def has_dtype(model: Any) -> bool:
  """Whether a network has a field `dtype`, and not only the attribute of its base."""
  fields = dataclasses.fields(model) if dataclasses.is_dataclass(model) else ()
  return any(field.name == 'dtype' for field in fields)


def in_dtype(model: Any, dtype: str | None) -> Any:
  """The network with the same parameters, computing in 'float32' or 'bfloat16'; None: as it is.

  Raises:
    UserError: it has no field `dtype`, or its layers do not follow it: the stages of a `StagedModel` choose their own.
  """
  if dtype is None:
    return model
  if not has_dtype(model) or isinstance(model, StagedModel):
    raise UserError(
      f'expected a network whose layers follow its field dtype for --dtype={dtype}, found a {type(model).__name__}; '
      'leave it out'
    )
  return model.clone(dtype=jnp.dtype(dtype))


def _with(config: ConfigDict, dtype: str) -> ConfigDict:
  config = config.copy_and_resolve_references()
  config.model.dtype = dtype
  return config


def _faster(config: ConfigDict, devices: list[Device], report: Callable[[str], None]) -> str:
  model = build_model(config, num_classes=config.model.num_classes or 2)
  if devices[0].platform != 'cpu' or not has_dtype(model):
    return INSISTED
  timing = dtype_timing(model, image_shape(config), config.train.batch_size // len(devices))
  if timing is None or not timing.slower:
    return INSISTED
  report(f'model.dtype bfloat16 is slower here, so this run computes in float32: {timing}; set bfloat16! to insist')
  return 'float32'
