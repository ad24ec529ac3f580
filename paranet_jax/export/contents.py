"""bundle.json: the stages of a bundle, and how they go together."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import jax

from paranet_jax.description import environment
from paranet_jax.early.exit_plan import ExitPlan
from paranet_jax.early.load import LoadedRun
from paranet_jax.early.path_costs import mac_costs
from paranet_jax.export.onnx import is_nchw
from paranet_jax.export.stages import Stages, StageSpec, Tensor
from paranet_jax.portable import run as runtime


def describe(
  run: LoadedRun, plan: ExitPlan, stages: Stages, formats: Sequence[str], dtype: str, packages: Sequence[str]
) -> dict[str, Any]:
  """bundle.json, but for what is known when the stages are written.

  Args:
    formats: 'onnx', 'stablehlo'.
    packages: whose versions are told, besides the usual ones.
  """
  versions = environment(jax.devices()[:1])['versions']
  versions |= {name: importlib.metadata.version(name) for name in packages}
  every = tuple(range(len(plan.exits)))
  return {
    'schema_version': runtime.SCHEMA_VERSION,
    'name': run.config.name,
    'step': run.step,
    'formats': list(formats),
    'dtype': dtype,
    'num_classes': len(run.dataset.class_names),
    'stages': {name: _stage_entry(spec) for name, spec in stages.specs.items()},
    'visited_stages': list(stages.visited),
    'all_stages': list(stages.all),
    'all_macs': [int(macs) for macs in mac_costs(run.model, run.image_shape, plan.exits).cumulative(every)],
    'versions': versions,
  }


def _stage_entry(spec: StageSpec) -> dict[str, Any]:
  return {
    'exit': spec.number,
    'file': f'{spec.name}.onnx',
    'takes': [_tensor_entry(tensor) for tensor in spec.takes],
    'gives': [_tensor_entry(tensor) for tensor in spec.gives],
    'keeps': list(spec.keeps),
  }


def _tensor_entry(tensor: Tensor) -> dict[str, Any]:
  *sides, channels = tensor.shape
  shape = [channels, *sides] if is_nchw(tensor) else list(tensor.shape)
  return {'name': tensor.name, 'shape': ['batch', *shape], 'dtype': 'float32'}
