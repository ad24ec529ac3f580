"""Parameters and multiply-adds of every exit, counted on abstract shapes: nothing is computed or compiled.

This works for any model with the multi-exit interface. Multiply-adds are those of convolutions and matrix products, per
image, in inference, in the program that exporters get: on some backends, layers compute a convolution in another way,
such as a depthwise one as a sum of shifted copies.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr
from ml_collections import ConfigDict

from paranet_jax import config as config_lib
from paranet_jax.data.known import known_dataset
from paranet_jax.host.errors import UserError
from paranet_jax.host.kept_programs import remembered
from paranet_jax.models.layers.backend import SHAPES, compiling_for, plain_operations
from paranet_jax.targets import describe_target

Paths = dict[tuple[str, ...], int]


def exit_costs(model: Any, image_shape: tuple[int, int, int]) -> list[dict[str, int]]:
  """The costs of each exit (spec: Reference counts).

  Args:
    model: a multi-exit model.
    image_shape: (H, W, C).

  Returns:
    For each exit: `exit` (1-based); `own_macs`, `own_params`: what its stage adds; `macs`, `params`: cumulative over
    the exits up to it; `macs_alone`: what the exit alone needs.
  """
  count = _counted if _hashable(model) else _counted.__wrapped__
  return [dict(cost) for cost in count(model, image_shape)]


@functools.lru_cache(maxsize=32)  # Each seed of an experiment asks for the same.
def _counted(model: Any, image_shape: tuple[int, int, int]) -> list[dict[str, int]]:
  return remembered('costs', lambda: _count(model, image_shape), (model, image_shape))


def _count(model: Any, image_shape: tuple[int, int, int]) -> list[dict[str, int]]:
  image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  variables = abstract_variables(model, image_shape)

  def all_stages(variables, image):
    carry, logits = {}, []
    for number in range(1, model.num_exits + 1):
      exit_logits, carry = model.apply(variables, image, carry, number, method='stage')
      logits.append(exit_logits)
    return logits

  with plain_operations():
    program = jax.make_jaxpr(all_stages)(variables, image).jaxpr  # Once: to trace a large network takes seconds.
  costs, macs, params = [], 0, 0
  for number in range(1, model.num_exits + 1):
    macs_so_far, params_so_far = _needed(program, variables, range(1, number + 1))
    costs.append(
      {
        'exit': number,
        'own_macs': macs_so_far - macs,
        'own_params': params_so_far - params,
        'macs': macs_so_far,
        'params': params_so_far,
        'macs_alone': _needed(program, variables, (number,))[0],
      }
    )
    macs, params = macs_so_far, params_so_far
  return costs


def describe(config: ConfigDict, num_classes: int | None = None) -> dict[str, Any]:
  """Describes what a configuration would train, for `--mode=describe` and summary.json, without reading its data.

  Args:
    num_classes: number of classes of the data set, if it is known.

  Returns:
    `name`, `dataset`, `seed`, `image_shape` (H, W, C), `num_classes`, and `exits`: for each `exit`, `trained`,
    `learns_from`, and its costs (see `exit_costs`).

  Raises:
    UserError: the configuration is wrong, or the number of classes is unknown without the data.
  """
  config_lib.validate(config)
  num_classes = config.model.num_classes or num_classes or known_dataset(config.data.name).num_classes
  if num_classes is None:
    raise UserError(
      f"the number of classes of data set '{config.data.name}' is not known without reading it; "
      'set --config.model.num_classes'
    )
  model = config_lib.build_model(config, num_classes)
  image_shape = config_lib.image_shape(config)
  targets = config_lib.targets(config)
  teachers = config_lib.teachers(config)
  exits = []
  for cost, target in zip(exit_costs(model, image_shape), targets, strict=True):
    share = config_lib.hard_label_weight(config, target)
    learns_from = describe_target(target, teachers.get(cost['exit'], ()), share)
    exits.append({'exit': cost['exit'], 'trained': target is not None, 'learns_from': learns_from, **cost})
  return {
    'name': config.name,
    'dataset': config.data.name,
    'seed': config.seed,
    'image_shape': list(image_shape),
    'num_classes': num_classes,
    'exits': exits,
  }


def abstract_variables(model: Any, image_shape: tuple[int, int, int], exits: tuple[int, ...] | None = None) -> Any:
  """Shapes of the variables that these exits (None: all) use, as a tree of ShapeDtypeStruct. Not to be changed."""
  trace = _traced_variables if _hashable(model) else _traced_variables.__wrapped__
  return trace(model, image_shape, exits)


def _hashable(model: Any) -> bool:
  try:
    hash(model)
  except TypeError:  # A field is a list.
    return False
  return True


@functools.lru_cache(maxsize=32)  # To trace a large network takes seconds, and a run asks several times.
def _traced_variables(model: Any, image_shape: tuple[int, int, int], exits: tuple[int, ...] | None) -> Any:
  def trace() -> Any:
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with compiling_for(SHAPES):
      # The key is a part of what is traced: to make one compiles two programs.
      return jax.eval_shape(lambda image: model.init(jax.random.key(0), image, exits=exits), image)

  return remembered('shapes', trace, (model, image_shape, exits))


def parameter_sizes(model: Any, image_shape: tuple[int, int, int], *exits: int) -> Paths:
  """Sizes, by path, of the parameters that these exits use."""
  params = abstract_variables(model, image_shape, exits)['params']
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {tuple(key.key for key in path): leaf.size for path, leaf in leaves}


def variable_paths(model: Any, image_shape: tuple[int, int, int], *exits: int) -> frozenset[tuple[str, ...]]:
  """Paths, from the collection on, of the parameters and running statistics that these exits use."""
  leaves = jax.tree_util.tree_leaves_with_path(abstract_variables(model, image_shape, exits))
  return frozenset(tuple(key.key for key in path) for path, _ in leaves)


def multiply_adds(function: Callable, *args: Any) -> tuple[int, Any]:
  """Multiply-adds of the convolutions and matrix products in `function(*args)`, and the shapes it returns."""
  jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
  return _program_macs(jaxpr.jaxpr), shapes


def largest_operation(function: Callable, *args: Any) -> core.JaxprEqn | None:
  """The convolution or matrix product in `function(*args)` with the most multiply-adds; None: there is none."""
  found = [equation for equation, _ in _equations(jax.make_jaxpr(function)(*args).jaxpr) if _equation_macs(equation)]
  return max(found, key=_equation_macs, default=None)


def _program_macs(program: core.Jaxpr) -> int:
  return sum(_equation_macs(equation) * times for equation, times in _equations(program))


def _needed(program: core.Jaxpr, variables: Any, exits: Collection[int]) -> tuple[int, int]:
  """Multiply-adds and parameters that these exits need of a program from (variables, image) to the logits of all."""
  part, inputs = dce_jaxpr(program, [number in exits for number in range(1, len(program.outvars) + 1)])
  leaves = zip(jax.tree_util.tree_leaves_with_path(variables), inputs, strict=False)  # The last input is the image.
  return _program_macs(part), sum(leaf.size for (path, leaf), used in leaves if used and path[0].key == 'params')


def _equations(jaxpr: core.Jaxpr, times: int = 1) -> Iterator[tuple[core.JaxprEqn, int]]:
  for equation in jaxpr.eqns:
    yield equation, times
    inner = times * equation.params.get('length', 1) if equation.primitive.name == 'scan' else times
    for value in equation.params.values():
      if isinstance(value, core.ClosedJaxpr):
        yield from _equations(value.jaxpr, inner)
      elif isinstance(value, core.Jaxpr):
        yield from _equations(value, inner)


def _equation_macs(equation: core.JaxprEqn) -> int:
  # jax declares AbstractValue, but the operands of these operations have shapes.
  inputs: list[Any] = [value.aval for value in equation.invars]
  outputs: list[Any] = [value.aval for value in equation.outvars]
  if equation.primitive.name == 'dot_general':
    (contracted, _), _ = equation.params['dimension_numbers']
    return outputs[0].size * math.prod(inputs[0].shape[axis] for axis in contracted)
  if equation.primitive.name == 'conv_general_dilated':
    kernel = inputs[1]
    features_out = kernel.shape[equation.params['dimension_numbers'].rhs_spec[0]]
    return outputs[0].size * kernel.size // features_out
  return 0
