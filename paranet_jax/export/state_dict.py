"""The weights of a run as a PyTorch state dict, for those networks that PyTorch has too."""

from pathlib import Path

import numpy as np

from paranet_jax.early.loaded_run import LoadedRun
from paranet_jax.models.adopted.tensors import to_state_dict
from paranet_jax.weights.cifar_resnet import FIELDS, whole_table
from paranet_jax.weights.state_dict import from_variables

STATE_DICT = 'model.safetensors'
"""The name that model hubs expect, and that `hf:OWNER/NAME` takes first."""


def pytorch_tensors(run: LoadedRun) -> dict[str, np.ndarray] | None:
  """Tensors by PyTorch's names, without the exits that were added; None: PyTorch has no such network.

  An adopted network has the names of its architecture, and a CIFAR ResNet of the family `resnet` with zeros on both
  sides those of `weights.cifar_resnet`, its last exit as the classifier. The values are those of the run, bit for bit.
  """
  model = run.config.model
  if model.boost or model.transfer:  # The answer of the last exit is not that of its classifier.
    return None
  if model.family == 'adopted':
    return to_state_dict(run.variables)
  if model.family == 'resnet' and all(model[name] == value for name, value in FIELDS.items()):
    classes = len(run.dataset.class_names)
    return from_variables(run.variables, whole_table(model.depth, model.channels, classes, run.model.num_exits))
  return None


def save_state_dict(path: Path, tensors: dict[str, np.ndarray]) -> None:
  """Writes a state dict as safetensors."""
  from safetensors.numpy import save

  path.write_bytes(save(tensors, {'format': 'pt'}))
