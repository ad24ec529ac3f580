"""Reads the weights of an architecture from a PyTorch file, and says what does not fit."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paranet_jax.host.errors import UserError
from paranet_jax.models.adopted.architecture import Architecture
from paranet_jax.models.adopted.network import AdoptedNetwork
from paranet_jax.models.adopted.registry import architecture_names, find_architecture
from paranet_jax.models.adopted.tensors import renamed, tensor_table
from paranet_jax.models.layers.backend import SHAPES, compiling_for
from paranet_jax.weights.pytorch_file import read_tensors
from paranet_jax.weights.state_dict import Entry, differences, not_finite, shown, to_variables, without_prefix

_TRACED = 3
"""Architectures that are compared with a file that does not fit; to trace a large one takes seconds."""


def read_weights(path: Path, architecture: Architecture, num_classes: int | None = None) -> dict[str, Any]:
  """The variables of the network as it was trained, which `AdoptedNetwork` has outside its `exit_...` modules.

  Args:
    path: see `read_tensors`.
    num_classes: of its classifier; None: as many as the file has.

  Raises:
    UserError: the file cannot be read, or holds another network; the message has the nearest one.
  """
  tensors = _named(read_tensors(path), architecture)
  expected = num_classes or classes_of(tensors, architecture)
  table = _table(architecture.name, expected)
  tensors = _fitted(tensors, table)
  if found := differences(tensors, table):
    raise UserError(
      f'{path} does not fit {architecture.name} of {expected} classes: tensors {"; ".join(found)}; '
      f'{_nearest(read_tensors(path), architecture)}'
    )
  if names := not_finite(tensors, table):
    raise UserError(f'{path} has NaN or infinity in {len(names)} tensors ({shown(names[0])}); name another file')
  return to_variables(tensors, table)


def classes_of(tensors: Mapping[str, np.ndarray], architecture: Architecture) -> int:
  """The number of classes of a file's classifier; the architecture's own where the file has none that fits."""
  own = architecture.num_classes
  for entry, larger in zip(_table(architecture.name, own), _table(architecture.name, own + 1), strict=True):
    if entry.shape == larger.shape:
      continue
    axis = [a != b for a, b in zip(entry.shape, larger.shape, strict=True)].index(True)
    found = tensors.get(entry.name)
    if found is not None and found.ndim == len(entry.shape) and found.shape[axis] >= 2:
      return found.shape[axis]
  return own


def _named(tensors: Mapping[str, np.ndarray], architecture: Architecture) -> dict[str, np.ndarray]:
  return renamed(without_prefix(tensors), architecture.renames)


def _fitted(tensors: Mapping[str, np.ndarray], table: Sequence[Entry]) -> dict[str, np.ndarray]:
  """The tensors, with the shapes of the table where those have more or fewer axes of size 1."""
  shapes, fitted = {entry.name: entry.shape for entry in table}, dict(tensors)
  for name, tensor in tensors.items():
    shape = shapes.get(name, tensor.shape)
    if [size for size in shape if size != 1] == [size for size in tensor.shape if size != 1]:
      fitted[name] = tensor.reshape(shape)
  return fitted


@functools.lru_cache(maxsize=8)
def _table(name: str, num_classes: int) -> list[Entry]:
  architecture = find_architecture(name)
  side = architecture.preprocessing.side
  model = AdoptedNetwork(num_classes, side, arch=architecture.name)
  with compiling_for(SHAPES):
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return tensor_table(jax.eval_shape(model.init, jax.random.key(0), images))


def _nearest(tensors: Mapping[str, np.ndarray], asked: Architecture) -> str:
  """What to do about a file that does not fit: the architecture of which the fewest tensors differ."""

  def outside(name: str) -> int:
    """An estimate that traces no network: tensors at no place of it, and places without a tensor."""
    other = find_architecture(name)
    modules = [tensor.rpartition('.')[0] for tensor in _named(tensors, other)]
    places = set(other.places)
    above = [[module[:end] for end, dot in enumerate(f'{module}.') if dot == '.'] for module in modules]
    used = places.intersection(*[[prefix for prefixes in above for prefix in prefixes]])
    return sum(places.isdisjoint(prefixes) for prefixes in above) + len(places) - len(used)

  def differing(name: str) -> int:
    other = find_architecture(name)
    own = _named(tensors, other)
    table = _table(name, classes_of(own, other))
    own, shapes = _fitted(own, table), {entry.name: entry.shape for entry in table}
    return sum(name not in own or name not in shapes or own[name].shape != shapes[name] for name in own | shapes)

  likely = sorted(architecture_names(), key=outside)[:_TRACED]
  best = min(likely, key=lambda name: (differing(name), name != asked.name))
  if not differing(best):
    return f'it fits {best}: set --arch={best}'
  return f'the nearest is {best}: name its weights, or set --arch'
