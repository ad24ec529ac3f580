"""Whether bfloat16 is faster than float32 on this machine: both are timed on a part of the network, at a run's shapes.

On CPUs that depends on the processor and on the network: few have matrix units for bfloat16, and XLA reaches them in
some products only. A timing takes seconds, and is kept in PARANET_CACHE_DIR for each jaxlib, processor, XLA flags and
shapes.
"""

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from paranet_jax.costs import abstract_variables, largest_operation
from paranet_jax.host.known_faults import VARIABLE
from paranet_jax.host.machine import cpu_name, machine_key
from paranet_jax.host.remembered import remember, remembered_file
from paranet_jax.models.layers import native_dense
from paranet_jax.models.layers.dense_block import normalize
from paranet_jax.models.numerics import dense_layers, largest_block

LAYERS = 2
"""Dense layers that are timed, from the middle of a block; a whole block takes half a minute to compile."""

OPERATION_MARGIN = 1.25
"""A run is taken to be slower if its largest convolution takes so many times as long in bfloat16.

Between its convolutions it reads and writes half as much. On a busy Intel Xeon with AMX, training steps of a ResNet of
14 layers and an MSDNet took 0.73 and 0.55 of their time in float32, where that convolution took 0.99 and 1.05. Two
dense layers of the quickstart took 1.44, and its step 1.45.
"""

SECONDS = 1.0
"""How long the programs of both dtypes run in turn, after the first call of each."""

_DTYPES = jnp.float32, jnp.bfloat16
_Program = Callable[[], Any]


class Timing(NamedTuple):
  """What was timed, its milliseconds in each dtype, and how many times as long bfloat16 takes at most if it is fast."""

  part: str
  float32: float
  bfloat16: float
  margin: float = 1.0

  @property
  def slower(self) -> bool:
    """Whether bfloat16 is slower."""
    return self.bfloat16 > self.margin * self.float32

  def __str__(self) -> str:
    bfloat16, float32 = (f'{float(f"{ms:.3g}"):g}' for ms in (self.bfloat16, self.float32))  # 1500, and not 1.5e+03.
    return f'{bfloat16} ms in bfloat16, {float32} ms in float32 for {self.part} on {cpu_name()}'


class Part(NamedTuple):
  """Part of a network: its programs in both dtypes, and the margin of its `Timing`."""

  name: str
  float32: _Program
  bfloat16: _Program
  margin: float


def dtype_timing(model: Any, image_shape: tuple[int, int, int], batch_size: int) -> Timing | None:
  """The timing for a network at the shapes of a training step on one device: from the cache, or else measured.

  Returns:
    None if the network has neither convolutions nor matrix products.
  """
  environment = machine_key(), os.cpu_count(), len(jax.devices()), os.environ.get(VARIABLE), native_dense.version()
  file = remembered_file('dtype', *environment, model.clone(dtype=jnp.float32), image_shape, batch_size)
  with contextlib.suppress(OSError, ValueError, TypeError):  # There is none, or it is damaged.
    if file:
      return Timing(**json.loads(file.read_text()))
  timed = programs(model, image_shape, batch_size)
  found = measure(timed) if timed else None
  if found:
    remember(file, found._asdict())
  return found


def measure(part: Part) -> Timing:
  """Runs both programs in turn; each time is the median of its calls."""
  taken: dict[_Program, list[float]] = {part.float32: [], part.bfloat16: []}
  for program in taken:
    jax.block_until_ready(program())  # Compiles.
  started = time.perf_counter()
  while not taken[part.float32] or time.perf_counter() - started < SECONDS:
    for program, own in taken.items():
      before = time.perf_counter()
      jax.block_until_ready(program())
      own.append(1e3 * (time.perf_counter() - before))
  float32, bfloat16 = map(statistics.median, taken.values())
  return Timing(part.name, float32, bfloat16, part.margin)


def programs(model: Any, image_shape: tuple[int, int, int], batch_size: int) -> Part | None:
  """What is timed, and its programs in float32 and bfloat16, each with all gradients.

  It is dense layers of the largest dense block, or in other networks the convolution or matrix product with the most
  multiply-adds, with batch normalization and ReLU.
  """
  found = largest_block(model, image_shape, batch_size)
  if found:
    block, (batch, height, width, channels) = found
    layers = min(block.num_layers, LAYERS)
    shape = (batch, height, width, channels + (block.num_layers - layers) // 2 * block.growth_rate)
    first, second = (
      dense_layers(shape, layers, block.growth_rate, block.bn_size, train=True, dtype=dtype, of=block.num_layers)
      for dtype in _DTYPES
    )
    return Part(first.name, first.compute, second.compute, 1.0)
  images = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)
  operation = largest_operation(model.apply, abstract_variables(model, image_shape), images)
  if operation is None:
    return None
  operands: list[Any] = [value.aval for value in operation.invars]  # jax declares AbstractValue.
  shapes = [operand.shape for operand in operands]
  kind = 'matrix product' if operation.primitive is lax.dot_general_p else 'convolution'
  first, second = (_with_gradients(operation, shapes, dtype) for dtype in _DTYPES)
  name = f'a {kind} of {" and ".join(str(list(shape)) for shape in shapes)} with its gradients'
  return Part(name, first, second, OPERATION_MARGIN)


def _with_gradients(operation: core.JaxprEqn, shapes: list[tuple[int, ...]], dtype: Any) -> _Program:
  random = np.random.default_rng(0)
  operands = [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]
  parameters: dict[str, Any] = operation.params

  def apply(x: jax.Array, y: jax.Array) -> jax.Array:
    if operation.primitive is lax.dot_general_p:  # As in `dense_block.product`.
      out = lax.dot_general(x, y, parameters['dimension_numbers'], preferred_element_type=jnp.float32)
      return out.astype(dtype)
    names = 'window_strides', 'padding', 'lhs_dilation', 'rhs_dilation', 'dimension_numbers', 'feature_group_count'
    return lax.conv_general_dilated(x, y, **{name: parameters[name] for name in names})

  def loss(operands: list[jax.Array]) -> jax.Array:
    out = apply(*operands)
    return jnp.sum(jax.nn.relu(normalize(out, None)[0]), dtype=jnp.float32)

  gradients = jax.jit(jax.value_and_grad(loss))
  return lambda: gradients(operands)
