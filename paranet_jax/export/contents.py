"""The files of a bundle besides its stages, without paths of this machine."""

import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paranet_jax.config import without_paths
from paranet_jax.data.scaling import scaling_of
from paranet_jax.early.bundle_folder import WEIGHTS
from paranet_jax.early.exit_plan import ExitPlan, save_plan
from paranet_jax.early.loaded_run import LoadedRun
from paranet_jax.early.path_costs import mac_costs
from paranet_jax.export.onnx import is_nchw
from paranet_jax.export.stages import Stages, StageSpec, Tensor
from paranet_jax.export.state_dict import STATE_DICT, pytorch_tensors, save_state_dict
from paranet_jax.host.files import write_json, write_text
from paranet_jax.host.machine import environment
from paranet_jax.portable import run as runtime
from paranet_jax.runs.workdir import save_config


def describe_bundle(
  run: LoadedRun, plan: ExitPlan, stages: Stages, formats: Sequence[str], dtype: str, packages: Sequence[str]
) -> dict[str, Any]:
  """bundle.json, except for the fields that are known once the stages are written.

  Args:
    formats: 'onnx', 'stablehlo'.
    packages: whose versions are listed in addition to the usual ones.
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


def write_contents(folder: Path, run: LoadedRun, plan: ExitPlan) -> None:
  """Writes exits.json, the class names, the preprocessing, the configuration, the weights and run.py.

  A network that PyTorch has too gets a state dict in PyTorch's names besides.
  """
  save_plan(folder, plan)
  write_text(folder / runtime.CLASSES, json.dumps(run.dataset.class_names, indent=2) + '\n')
  side, _, channels = run.image_shape
  scaling = scaling_of(run.config.data)
  preprocessing = {
    'side': side,
    'channels': channels,
    'mean': list(run.dataset.mean),
    'std': list(run.dataset.std),
    'resize': str(scaling),
    **scaling._asdict(),
    'normalize': '(pixel / 255 - mean) / std, a channel',
  }
  write_json(folder / runtime.PREPROCESSING, preprocessing)
  save_config(folder, without_paths(run.config))
  save_weights(folder / WEIGHTS, run.variables)
  if tensors := pytorch_tensors(run):
    save_state_dict(folder / STATE_DICT, tensors)
  shutil.copyfile(runtime.__file__, folder / 'run.py')


def save_weights(path: Path, variables: Any) -> None:
  """Writes `params` and `batch_stats` as safetensors, each array under its path (params/exit_1/classifier/kernel)."""
  from safetensors.numpy import save

  leaves = jax.tree_util.tree_leaves_with_path(variables)
  names = (jax.tree_util.keystr(place, simple=True, separator='/') for place, _ in leaves)
  arrays = (np.ascontiguousarray(leaf) for _, leaf in leaves)
  path.write_bytes(save(dict(zip(names, arrays, strict=True)), {'format': 'flax'}))
