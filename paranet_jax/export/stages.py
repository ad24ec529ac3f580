"""A network cut at its exits, as functions of named arrays: what each stage takes, gives and lets pass."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from paranet_jax.models.layers.backend import PLAIN, compiling_for

IMAGES = 'images'
_BATCH = 2  # Of the shapes that stages are looked at with; the batch is free in what is exported.


class Tensor(NamedTuple):
  """`name`, and the shape of one image's part: (H, W, C), or (C,)."""

  name: str
  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class StageSpec:
  """What is run from one exit to another.

  Attributes:
    name: of its files.
    number: of its exit, 1-based.
    function: arrays [B, *shape], in the order of `takes`, -> logits [B, classes], then the arrays of `gives`.
    takes: of what is carried, what it reads.
    gives: what it adds to what is carried.
    keeps: names of what is carried before it and read by a later stage.
  """

  name: str
  number: int
  function: Callable[..., tuple[Array, ...]]
  takes: tuple[Tensor, ...]
  gives: tuple[Tensor, ...]
  keeps: tuple[str, ...] = ()


class Stages(NamedTuple):
  """All that is exported of a network: the stages by name, and the names along two paths.

  visited: of the exits that `predict` runs. all: of every usable exit.
  """

  specs: dict[str, StageSpec]
  visited: tuple[str, ...]
  all: tuple[str, ...]


def cut(
  model: Any, variables: Any, image_shape: tuple[int, int, int], exits: Sequence[int], visited: Sequence[int]
) -> Stages:
  """Cuts a network at its exits.

  Args:
    model: with the multi-exit interface, computing in float32.
    variables: its parameters and running statistics.
    image_shape: (H, W, C).
    exits: numbers of the usable exits, 1-based and increasing.
    visited: those that `predict` runs; a stage after another exit than in `exits` is another stage.
  """
  paths = {tuple(exits): _walk(model, variables, image_shape, exits, exits)}
  paths[tuple(visited)] = paths.get(tuple(visited)) or _walk(model, variables, image_shape, exits, visited)
  specs, read_later = {}, {}
  for path in paths.values():
    carried = {IMAGES}
    for index, spec in enumerate(path):
      specs[spec.name] = spec
      later = {tensor.name for following in path[index + 1 :] for tensor in following.takes}
      read_later[spec.name] = read_later.get(spec.name, set()) | carried & later
      carried |= {tensor.name for tensor in spec.gives}
  for name, spec in specs.items():
    specs[name] = dataclasses.replace(spec, keeps=tuple(sorted(read_later[name])))
  names = [tuple(spec.name for spec in paths[tuple(path)]) for path in (visited, exits)]
  return Stages(specs, *names)


@contextlib.contextmanager
def tracing() -> Iterator[None]:
  """How stages are traced: in the operations that exporters know, of which flax's pools divide by an integer."""
  with compiling_for(PLAIN), jax.numpy_dtype_promotion('standard'):
    yield


def _walk(model, variables, image_shape, exits, path) -> list[StageSpec]:
  """The stages along a path, in order."""
  specs, carry, names = [], {}, []
  for index, number in enumerate(path):
    name = _name(number, path[:index], [other for other in exits if other < number])
    spec, carry, names = _stage(model, variables, image_shape, name, number, carry, names)
    specs.append(spec)
  return specs


def _name(number: int, before: Sequence[int], usual: Sequence[int]) -> str:
  if list(before) == list(usual):
    return f'stage_{number}'
  return f'stage_{number}_after_{"_".join(map(str, before))}' if before else f'stage_{number}_alone'


def _stage(model, variables, image_shape, name, number, carry, names) -> tuple[StageSpec, Any, list[str]]:
  """A stage after what is carried (shapes, and a name for each leaf), and what is carried after it, with its names."""
  images = jax.ShapeDtypeStruct((_BATCH, *image_shape), jnp.float32)

  def whole(images, carry):
    return model.apply(variables, images, carry, number, method='stage')

  with tracing():
    program, (_, after) = jax.make_jaxpr(whole, return_shape=True)(images, carry)
  jaxpr = program.jaxpr
  given = dict(zip(jaxpr.invars, [IMAGES, *names], strict=True))
  read = {value for equation in jaxpr.eqns for value in equation.invars if isinstance(value, jax.extend.core.Var)}
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
    # What no operation reads may be anything.
    images, *filled = (found.get(label, np.float32(0)) for label in [IMAGES, *names])
    logits, left = whole(images, structure.unflatten(filled))
    left = jax.tree.leaves(left)
    return (logits, *(left[place] for place in made))

  return StageSpec(name, number, function, tuple(takes), tuple(made.values())), after, names_after


def _label(path: tuple, number: int, taken: Sequence[str]) -> str:
  """A name for a leaf of what is carried, such as features_1_2 of block (1, 2)."""
  parts = re.findall(r'\w+', jax.tree_util.keystr(path))
  label = '_'.join(['features', *(part for part in parts if part != 'values')])
  return label if label not in taken else f'{label}_after_exit_{number}'
