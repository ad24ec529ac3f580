"""Matches the tensors of a PyTorch state dict with the parameters of a network here, by a table of names."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_SHOWN = 5


class Entry(NamedTuple):
  """One tensor: PyTorch's name and shape, and the path here, such as ('params', 'stem', 'conv', 'kernel')."""

  name: str
  shape: tuple[int, ...]
  path: tuple[str, ...]


def without_prefix(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors without what DataParallel puts before each name, and without the counts of batches."""
  found = under_names(tensors, lambda name: name.removeprefix('module.'))
  return {name: tensor for name, tensor in found.items() if name.split('.')[-1] != 'num_batches_tracked'}


def under_names(tensors: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
  """The tensors under new names. One whose new name another has or gets keeps its own, which no table knows."""
  names = {name: rename(name) for name in tensors}
  count = Counter(names.values())
  return {name if new in tensors or count[new] > 1 else new: tensors[name] for name, new in names.items()}


def differences(tensors: Mapping[str, np.ndarray], table: Sequence[Entry]) -> list[str]:
  """In words, and by name, what is unknown to the table, missing, or of another shape or type; empty: all fit."""
  shapes = {entry.name: entry.shape for entry in table}
  other = [
    f'{name} {_describe(tensors[name])} instead of {list(shape)}'
    for name, shape in shapes.items()
    if name in tensors and (tensors[name].shape != shape or not _is_real(tensors[name]))
  ]
  groups = {
    'unknown': [shown(name) for name in tensors if name not in shapes],
    'missing': [name for name in shapes if name not in tensors],
    'of another shape or type': other,
  }
  return [
    f'{len(names)} {what} ({", ".join(names[:_SHOWN])}{", ..." if len(names) > _SHOWN else ""})'
    for what, names in groups.items()
    if names
  ]


def shown(name: str) -> str:
  """A tensor's name as a message has it: short, and in one line."""
  return ascii(name)[1:-1][:80]


def to_variables(tensors: Mapping[str, np.ndarray], table: Sequence[Entry]) -> dict[str, Any]:
  """The tensors of the table as nested float32 variables in this package's layout: kernels HWIO or [in, out]."""
  variables: dict[str, Any] = {}
  for name, _, path in table:
    array = tensors[name].astype(np.float32)
    if path[-1] == 'kernel':
      array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    node = variables
    for part in path[:-1]:
      node = node.setdefault(part, {})
    node[path[-1]] = np.ascontiguousarray(array)
  return variables


def from_variables(variables: Mapping[str, Any], table: Sequence[Entry]) -> dict[str, np.ndarray]:
  """The tensors of the table under PyTorch's names and in its layout: the inverse of `to_variables`."""
  tensors = {}
  for name, _, path in table:
    value: Any = variables
    for part in path:
      value = value[part]
    array = np.asarray(value)
    if path[-1] == 'kernel':
      array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    tensors[name] = np.ascontiguousarray(array)
  return tensors


def not_finite(tensors: Mapping[str, np.ndarray], table: Sequence[Entry]) -> list[str]:
  """Names of tensors with NaN or infinity as float32."""
  with np.errstate(over='ignore'):
    return [entry.name for entry in table if not np.isfinite(tensors[entry.name].astype(np.float32)).all()]


def _is_real(tensor: np.ndarray) -> bool:
  return tensor.dtype.kind not in 'iubc'


def _describe(tensor: np.ndarray) -> str:
  return f'{list(tensor.shape)}' if _is_real(tensor) else f'{tensor.dtype} {list(tensor.shape)}'
