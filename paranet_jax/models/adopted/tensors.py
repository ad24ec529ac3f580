"""Maps a PyTorch state dict to the variables of an adopted network, and back, by one rule.

The path of a variable, joined by dots, is PyTorch's name: modules are called as there. Its last part differs:
kernel -> weight, transposed (HWIO -> OIHW, [in, out] -> [out, in]); scale -> weight; mean -> running_mean; var ->
running_var. Any other keeps its name and its shape. The running variance is taken as it is: PyTorch's inference
divides by the same number.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Num

from paranet_jax.weights.state_dict import Entry, from_variables, under_names

ROOT = 'root'
"""A module of this name adds nothing to the names of what is in it: tensors of the network itself, as a class token."""

_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}
_EXIT = 'exit'  # Prefix of the modules of exits that the network did not have.


def tensor_table(shapes: Mapping[str, Any]) -> list[Entry]:
  """The tensors of the network as PyTorch has it, without the exits that were added.

  Args:
    shapes: its variables, or their shapes, by collection and nested modules.
  """
  table = []

  def add(node: Any, path: tuple[str, ...]) -> None:
    if isinstance(node, Mapping):
      for name, inner in node.items():
        if len(path) != 1 or not name.startswith(_EXIT):
          add(inner, (*path, name))
      return
    *modules, leaf = path[1:]
    shape = tuple(node.shape)
    if leaf == 'kernel':
      shape = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
    names = [name for name in modules if name != ROOT]
    table.append(Entry('.'.join([*names, _LEAVES.get(leaf, leaf)]), shape, path))

  for collection, modules in shapes.items():
    add(modules, (collection,))
  return table


def to_state_dict(variables: Mapping[str, Any]) -> dict[str, Num[np.ndarray, '...']]:
  """The tensors of the network as PyTorch has it: the inverse of `state_dict.to_variables` with `tensor_table`."""
  return from_variables(variables, tensor_table(variables))


def renamed(tensors: Mapping[str, Any], renames: Sequence[tuple[str, str]]) -> dict[str, Any]:
  """The tensors under the architecture's names (see `Architecture.renames`)."""

  def rename(name: str) -> str:
    for pattern, replacement in renames:
      name = re.sub(pattern, replacement, name)
    return name

  return under_names(tensors, rename)
