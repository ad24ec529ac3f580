"""A network cut at its exits into functions of named arrays: what each stage takes, gives and passes on."""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Var

from paranet_jax.models.layers.backend import plain_operations

IMAGES = 'images'
_BATCH = 2  # For tracing only; exported stages take any batch size.


class Tensor(NamedTuple):
  """`name`, and the shape without the batch: (H, W, C), or (C,)."""

  name: str
  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class StageSpec:
  """The computation between two exits.

  Attributes:
    name: its file name without the extension.
    number: its exit, 1-based.
    function: arrays [B, *shape], in the order of `takes`, -> logits [B, classes], then the arrays of `gives`.
    takes: the features that it reads.
    gives: the features that it adds.
    keeps: names of the features that exist before it and that a later stage reads.
  """

  name: str
  number: int
  function: Callable[..., tuple[Array, ...]]
  takes: tuple[Tensor, ...]
  gives: tuple[Tensor, ...]
  keeps: tuple[str, ...] = ()


class Stages(NamedTuple):
  """The stages of a network by name, and their names along two paths.

  `visited` leads through the exits that `predict` runs, `all` through every usable exit.
  """

  specs: dict[str, StageSpec]
  visited: tuple[str, ...]
  all: tuple[str, ...]


def cut(
  model: Any, variables: Any, image_shape: tuple[int, int, int], exits: Sequence[int], visited: Sequence[int]
) -> Stages:
  """Cuts a network at its exits.

  Args:
    model: has the multi-exit interface and computes in float32.
    variables: its parameters and batch_stats.
    image_shape: (H, W, C).
    exits: the usable exits, 1-based and increasing.
    visited: the exits that `predict` runs; where it skips one, the stage after it differs from that in `exits`.
  """
  paths = {tuple(exits): _walk(model, variables, image_shape, exits, exits)}
  paths[tuple(visited)] = paths.get(tuple(visited)) or _walk(model, variables, image_shape, exits, visited)
  specs, read_later = {}, {}
  for path in paths.values():
    carry = {IMAGES}
    for index, spec in enumerate(path):
      specs[spec.name] = spec
      later = {tensor.name for following in path[index + 1 :] for tensor in following.takes}
      read_later[spec.name] = read_later.get(spec.name, set()) | carry & later
      carry |= {tensor.name for tensor in spec.gives}
  for name, spec in specs.items():
    specs[name] = dataclasses.replace(spec, keeps=tuple(sorted(read_later[name])))
  names = [tuple(spec.name for spec in paths[tuple(path)]) for path in (visited, exits)]
  return Stages(specs, *names)


def _walk(
  model: Any, variables: Any, image_shape: tuple[int, int, int], exits: Sequence[int], path: Sequence[int]
) -> list[StageSpec]:
  """The stages along a path, in order."""
  specs, carry, names = [], {}, []
  images = jax.ShapeDtypeStruct((_BATCH, *image_shape), jnp.float32)
  for index, number in enumerate(path):
    name = _name(number, path[:index], [other for other in exits if other < number])
    run = functools.partial(model.apply, variables, number=number, method='stage')
    spec, carry, names = _stage(run, images, name, number, carry, names)
    specs.append(spec)
  return specs


def _name(number: int, before: Sequence[int], usual: Sequence[int]) -> str:
  if list(before) == list(usual):
    return f'stage_{number}'
  return f'stage_{number}_after_{"_".join(map(str, before))}' if before else f'stage_{number}_alone'


def _stage(
  run: Callable, images: jax.ShapeDtypeStruct, name: str, number: int, carry: Any, names: Sequence[str]
) -> tuple[StageSpec, Any, list[str]]:
  """A stage, and the shapes and names of the carry after it.

  Args:
    run: (images, carry) -> logits and the carry after it.
    carry: shapes of the carry before it.
    names: of the leaves of `carry`.
  """
  with plain_operations():
    program, (_, after) = jax.make_jaxpr(run, return_shape=True)(images, carry)
  jaxpr = program.jaxpr
  given = dict(zip(jaxpr.invars, [IMAGES, *names], strict=True))
  read = {value for equation in jaxpr.eqns for value in equation.invars if isinstance(value, Var)}
  leaves, structure = jax.tree.flatten(carry)
  takes = [
    Tensor(given[variable], leaf.shape[1:])
    for variable, leaf in zip(jaxpr.invars, [images, *leaves], strict=True)
    if variable in read
  ]
  made, names_after = {}, []
  for place, (variable, (path, leaf)) in enumerate(
    zip(jaxpr.outvars[1:], jax.tree_util.tree_leaves_with_path(after), strict=True)
  ):
    label = given.get(variable) or _label(path, number, given.values())
    names_after.append(label)
    if variable not in given:
      made[place] = Tensor(label, leaf.shape[1:])

  def function(*arrays):
    found = dict(zip([tensor.name for tensor in takes], arrays, strict=True))
    # Inputs that no operation reads may have any value.
    images, *filled = (found.get(label, np.float32(0)) for label in [IMAGES, *names])
    logits, left = run(images, structure.unflatten(filled))
    left = jax.tree.leaves(left)
    return (logits, *(left[place] for place in made))

  return StageSpec(name, number, function, tuple(takes), tuple(made.values())), after, names_after


def _label(path: tuple, number: int, taken: Collection[str]) -> str:
  """A name for a leaf of the carry, such as features_1_2 for block (1, 2)."""
  parts = re.findall(r'\w+', jax.tree_util.keystr(path))
  label = '_'.join(['features', *(part for part in parts if part != 'values')])
  return label if label not in taken else f'{label}_after_exit_{number}'
