"""Checks that this machine's jax computes right numbers: our kernels and known faults, against NumPy in float64.

A check runs once per jaxlib, processor, XLA flags and shapes, and is remembered in PARANET_CACHE_DIR. The versions that
are known to be wrong, and the flags that avoid it, are in `host/known_faults.py`.
"""

import functools
import importlib.metadata
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from paranet_jax.host.errors import UserError, say
from paranet_jax.host.kept_programs import remembered
from paranet_jax.host.known_faults import VARIABLE, faults_of, jaxlib_version, wrong_numbers_accepted
from paranet_jax.host.machine import cpu_name, machine_key
from paranet_jax.host.native import VARIABLE as NATIVE
from paranet_jax.host.remembered import remember, remembered_file
from paranet_jax.models.layers import native_dense
from paranet_jax.models.layers.backend import SHAPES, backend, compiling_for
from paranet_jax.models.layers.dense import DenseBlock, averaged_activation, max_pooled_stem
from paranet_jax.models.layers.dense_block import (
  EPSILON,
  SCAN_LAYERS,
  Layer,
  dense_block_inference,
  dense_block_training,
  image_conv3x3,
  inference_kernels,
  kernels,
)
from paranet_jax.models.layers.native_inference import entry_kernels, pooling_kernels

EXACT = 1e-4
"""Largest error of a number in float32 on a CPU, relative to the largest of its output. Right ones stay below 1e-5."""

ROUGH = 0.5
"""Largest relative error of an output's norm in bfloat16, or on devices that shorten float32 operands (TPU, TF32).

Gradients differ by 0.2 where ReLUs near 0 flip, so this finds only gross faults.
"""

LEAST_PIXELS = 16
"""Pixels of a batch whose gradients are compared. Batch normalization of two leaves differences of nearly equal
numbers, which rounding changes by more than `EXACT`, and of one it leaves nothing.
"""

_BY_KERNELS = ' by kernels in C++'

_Layer: Any = Layer  # Its fields are jax's arrays; here they are NumPy's.


class Program(NamedTuple):
  """A program whose outputs, arrays, are compared with `expected()`, the same in NumPy's float64."""

  name: str
  compute: Callable[[], Sequence[jax.Array]]
  expected: Callable[[], Sequence[np.ndarray]]
  dtype: Any = jnp.float32
  native: bool = False  # By kernels in C++.

  @property
  def exact(self) -> bool:
    """Whether products have full float32 precision; otherwise ReLUs near 0 flip, and with them single gradients."""
    return jax.default_backend() == 'cpu' and self.dtype == jnp.float32


class Finding(NamedTuple):
  """The largest error of a program (see `EXACT` and `ROUGH`), and the numbers where a single one is most wrong."""

  program: Program
  error: float
  found: float
  expected: float

  @property
  def right(self) -> bool:
    return self.error <= (EXACT if self.program.exact else ROUGH)

  def __str__(self) -> str:
    """One line: what is wrong, on what, and what to do."""
    known = faults_of(jaxlib_version())
    version = importlib.metadata.version('jaxlib')
    flags = ' '.join(sorted({fault.flag for fault in known}))
    fix = f"set {VARIABLE}='{flags}' before jax starts ({known[0].issue})" if known else 'install another jaxlib'
    if self.program.native:
      fix = f'set {NATIVE}=off, which leaves the computation to XLA'
    return (
      f'expected {self.expected:.9g} in {self.program.name}, found {self.found:.9g}: jaxlib {version} '
      f'computes wrong numbers on {cpu_name()} with {VARIABLE}={os.environ.get(VARIABLE, "")!r}; {fix}, or go on '
      'with --accept_wrong_numbers'
    )


def prepare_kernels(model: Any, image_shape: tuple[int, int, int], batch_size: int) -> None:
  """Compiles the kernels in C++ for the largest dense block, if any, which takes seconds of another core."""

  def find() -> tuple | None:
    found = largest_block(model, image_shape, batch_size)
    if found is None:
      return None
    block, shape = found
    return shape, block.num_layers, block.growth_rate * block.bn_size, block.growth_rate, str(jnp.dtype(_dtype(model)))

  needed = remembered('kernels', find, (model, image_shape, batch_size))
  if needed:
    kernels(*needed)


def check_training(model: Any, image_shape: tuple[int, int, int], batch_size: int) -> None:
  """Checks the programs of a run's training step at its shapes, for one device.

  Raises:
    UserError: a program computes wrong numbers, which were not accepted (see `known_faults.accept_wrong_numbers`).
  """
  check_once(model, image_shape, batch_size, train=True)


def check_inference(model: Any, image_shape: tuple[int, int, int], batch_size: int) -> None:
  """As `check_training`, for a forward pass with running statistics."""
  check_once(model, image_shape, batch_size, train=False)


def check_once(model: Any, image_shape: tuple[int, int, int], batch_size: int, train: bool) -> None:
  environment = machine_key(), jax.devices()[0].device_kind, os.environ.get(VARIABLE), native_dense.version()
  file = remembered_file('numerics', *environment, model, image_shape, batch_size, train)
  if file and os.path.exists(file):
    return
  findings = [measure(program) for program in programs(model, image_shape, batch_size, train)]
  wrong = next((finding for finding in findings if not finding.right), None)
  if wrong:
    if not wrong_numbers_accepted():
      raise UserError(str(wrong))
    say(f'warning: {wrong}')
  else:
    remember(file, {finding.program.name: finding.error for finding in findings})


def measure(program: Program) -> Finding:
  """Runs a program and finds its largest error."""
  worst = Finding(program, -1.0, 0.0, 0.0)
  for output, expected in zip(jax.device_get(program.compute()), program.expected(), strict=True):
    found = np.asarray(output, np.float64)
    errors = np.where(np.isfinite(found), np.abs(found - expected), np.inf)
    place = np.unravel_index(np.argmax(errors), errors.shape)
    size = np.abs(expected).max() if program.exact else np.linalg.norm(expected)
    error = (errors[place] if program.exact else np.linalg.norm(errors)) / size
    if error > worst.error:
      worst = Finding(program, float(error), float(found[place]), float(expected[place]))
  return worst


def programs(model: Any, image_shape: tuple[int, int, int], batch_size: int, train: bool) -> Iterator[Program]:
  """Programs of known faults and of our own kernels, at the shapes of a run on one device."""
  yield summed_products(32_769)
  yield first_layer((batch_size, *image_shape))
  largest = largest_block(model, image_shape, batch_size)
  if largest:
    block, shape = largest
    if train:
      shape = max(shape[0], -(-LEAST_PIXELS // math.prod(shape[1:3]))), *shape[1:]
    layers = min(block.num_layers, block.scan_layers or SCAN_LAYERS.get(backend(), 1), 2)  # Two are already a loop.
    dtype = _dtype(model)
    of = block.num_layers  # The whole block decides whether kernels in C++ are used.
    yield dense_layers(shape, layers, block.growth_rate, block.bn_size, train, dtype, of)
    if not train and image_shape[0] % 2 == image_shape[1] % 2 == 0:
      yield pooled_layer((batch_size, *image_shape), dtype)


def _dtype(model: Any) -> Any:
  return getattr(model, 'dtype', jnp.float32)


def summed_products(rows: int) -> Program:
  """Vmapped matrix-vector products that are squared and summed (jax issue 39103)."""
  x = np.zeros((rows, 3), np.float32)
  x[:, 0] = np.arange(rows)
  matrix = jnp.eye(3)
  compute = jax.jit(jax.vmap(lambda row: jnp.sum(jnp.square(matrix @ row))))
  return Program(
    f'the sums of {rows:,} vmapped matrix-vector products',
    lambda: [compute(x)],
    lambda: [np.square(x.astype(np.float64)).sum(1)],
  )


def first_layer(shape: tuple[int, int, int, int], features: int = 16) -> Program:
  """The 3x3 convolution of an image, its logarithmic loss per image and the kernel's gradient."""
  random = np.random.default_rng(0)
  images = random.normal(size=shape).astype(np.float32)
  kernel = random.normal(0, 0.2, (3, 3, shape[-1], features)).astype(np.float32)

  @jax.jit
  def compute(kernel, images):
    def losses(kernel):
      logits = image_conv3x3(images, kernel).mean((1, 2))
      return -jax.nn.log_softmax(logits)[:, 0]

    return losses(kernel), jax.grad(lambda kernel: losses(kernel).mean())(kernel)

  def expected():
    wide, wide_kernel = images.astype(np.float64), kernel.astype(np.float64)
    means = np.stack([part.mean((1, 2)) for part in _shifts(wide)])  # [9, B, C]: the mean and the convolution commute.
    logits = np.einsum('sbc,sck->bk', means, wide_kernel.reshape(9, *kernel.shape[2:]))
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    losses = -np.log(shares[:, 0])
    shares[:, 0] -= 1
    return losses, np.einsum('sbc,bk->sck', means, shares / len(images)).reshape(kernel.shape)

  name = f'a 3x3 convolution of {list(shape)} with its loss and gradient'
  return Program(name, lambda: compute(kernel, images), expected)


def pooled_layer(shape: tuple[int, int, int, int], dtype: Any = jnp.float32, features: int = 24) -> Program:
  """A stem in inference, its max pool and an exit's average of activations, which have kernels of their own."""
  random = np.random.default_rng(0)
  images = np.asarray(jnp.asarray(random.normal(size=shape), dtype))
  kernel = random.normal(0, 0.2, (3, 3, shape[-1], features)).astype(np.float32)
  scale, shift = random.normal(1, 0.2, (2, features)).astype(np.float32)
  native = entry_kernels(shape, features, 1, dtype) or pooling_kernels((*shape[:-1], features), dtype)

  @jax.jit
  def compute(images, kernel, scale, shift):
    x = max_pooled_stem(images, kernel, 1, train=False)
    return x, averaged_activation(x, scale, shift, train=False)

  def expected():
    x = _convolution(images.astype(np.float64), kernel.astype(np.float64))
    x = np.maximum(x[:, ::2], x[:, 1::2])
    x = np.maximum(x[:, :, ::2], x[:, :, 1::2])
    return x, np.maximum(x * scale + shift, 0).mean((1, 2))

  name = f'a stem of {list(shape)} with its pool and average{_BY_KERNELS if native else ""}'
  return Program(name, lambda: compute(images, kernel, scale, shift), expected, dtype, bool(native))


def dense_layers(
  shape: tuple[int, int, int, int],
  layers: int,
  growth_rate: int,
  bn_size: int,
  train: bool,
  dtype: Any = jnp.float32,
  of: int | None = None,
) -> Program:
  """Layers of a dense block that has `of`, by default no more; in training with batch statistics and all gradients."""
  random = np.random.default_rng(1)
  x = np.asarray(jnp.asarray(random.normal(size=shape), dtype))
  width = growth_rate * bn_size

  parameters = drawn_layers(random, shape[-1], layers, growth_rate, bn_size)
  name = f'{layers} dense layers on {list(shape)}'
  block = shape, of or layers, width, growth_rate, dtype
  if not train:
    chosen = inference_kernels(*block)
    forward = jax.jit(functools.partial(dense_block_inference, passes=chosen))
    return Program(
      f'{name} in inference{_BY_KERNELS if chosen else ""}',
      lambda: [forward(x, parameters)],
      lambda: [_inference_reference(x, parameters)],
      dtype,
      bool(chosen),
    )
  passes = kernels(*block)
  weights = random.normal(size=(*shape[:-1], shape[-1] + layers * growth_rate)).astype(np.float32)
  parameters = clear_of_zero(x, parameters)

  @jax.jit
  def compute(x, parameters):
    def block(x, parameters):
      return dense_block_training(x, parameters, layers, None, passes)[0]

    values, backward = jax.vjp(block, x, parameters)
    return values, *jax.tree.leaves(backward(jnp.asarray(weights, dtype)))

  return Program(
    f'{name} with their gradients{_BY_KERNELS if passes else ""}',
    lambda: compute(x, parameters),
    lambda: _training_reference(x, parameters, weights),
    dtype,
    bool(passes),
  )


def drawn_layers(
  random: np.random.Generator, channels: int, layers: int, growth_rate: int, bn_size: int
) -> list[Layer]:
  """Random parameters of the layers of a dense block on this many channels, as NumPy arrays."""
  width = growth_rate * bn_size

  def draw(*size, spread=0.2, mean=0.0):
    return random.normal(mean, spread, size).astype(np.float32)

  return [
    _Layer(
      draw(read, mean=1.0),
      draw(read),
      draw(read, width, spread=read**-0.5),
      draw(width, mean=1.0),
      draw(width),
      draw(3, 3, width, growth_rate, spread=(9 * width) ** -0.5),
    )
    for read in range(channels, channels + layers * growth_rate, growth_rate)
  ]


def largest_block(
  model: Any, image_shape: tuple[int, int, int], batch_size: int
) -> tuple[DenseBlock, tuple[int, int, int, int]] | None:
  """The dense block that reads the most pixels, of several the one with the most channels, and its input's shape."""
  found = []

  def record(call, args, kwargs, context):
    if isinstance(context.module, DenseBlock) and context.method_name == '__call__':
      found.append((context.module.clone(parent=None), args[0].values.shape))
    return call(*args, **kwargs)

  images = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)
  with compiling_for(SHAPES), nn.intercept_methods(record):
    jax.eval_shape(model.init, jax.random.key(0), images)
  return max(found, key=lambda block: (block[1][1], block[1][-1]), default=None)


def clear_of_zero(x: np.ndarray, parameters: Sequence[Layer]) -> list[Layer]:
  """The layers with shifts moved a little, so that in training no ReLU reads a value so near 0 that rounding flips it.

  One flip is right, too, but changes single gradients by far more than `EXACT`; without this, large blocks have some.
  """
  values, cleared = x.astype(np.float64), []
  for layer in map(_wide, parameters):
    shift1 = _between(values * layer.scale1, layer.shift1)
    z, _ = _normalized(np.maximum(values * layer.scale1 + shift1, 0) @ layer.kernel1)
    shift2 = _between(z * layer.scale2, layer.shift2)
    y, _ = _normalized(_convolution(np.maximum(z * layer.scale2 + shift2, 0), layer.kernel2))
    values = np.concatenate([values, y], -1)
    cleared.append((shift1, shift2))
  return [
    layer._replace(shift1=shift1, shift2=shift2) for layer, (shift1, shift2) in zip(parameters, cleared, strict=True)
  ]


def _between(values: np.ndarray, shifts: np.ndarray) -> Any:
  """For each channel the middle of the widest gap near its shift between those with which a value would become 0."""
  zeros = np.sort(-values.reshape(-1, values.shape[-1]), axis=0)
  reach = max(min(64, len(zeros) // 8), 1)
  found = []
  for column, shift in zip(zeros.T, shifts, strict=True):
    place = np.clip(np.searchsorted(column, shift), reach, len(column) - reach)
    near = column[place - reach : place + reach]
    widest = np.argmax(np.diff(near))
    found.append(near[widest : widest + 2].mean())
  return np.array(found, np.float32)


def _wide(layer: Layer) -> Any:
  """The same in float64, as NumPy's arrays."""
  return _Layer(*(np.asarray(leaf, np.float64) for leaf in layer))


def _inference_reference(x: np.ndarray, parameters: Sequence[Layer]) -> np.ndarray:
  values = x.astype(np.float64)
  for layer in map(_wide, parameters):
    a = np.maximum(values * layer.scale1 + layer.shift1, 0)
    h = np.maximum(a @ layer.kernel1 + layer.shift2, 0)
    values = np.concatenate([values, _convolution(h, layer.kernel2)], -1)
  return values


def _training_reference(x: np.ndarray, parameters: Sequence[Layer], weights: np.ndarray) -> list[np.ndarray]:
  """Values of the block, then gradients of sum(weights * values): of x, and of each layer's parameters in order."""
  layers = list(map(_wide, parameters))
  values, kept = x.astype(np.float64), []
  for layer in layers:
    a = np.maximum(values * layer.scale1 + layer.shift1, 0)
    z, z_std = _normalized(a @ layer.kernel1)
    h = np.maximum(z * layer.scale2 + layer.shift2, 0)
    y, y_std = _normalized(_convolution(h, layer.kernel2))
    kept.append((values, a, z, z_std, h, y, y_std))
    values = np.concatenate([values, y], -1)
  g, gradients = weights.astype(np.float64), []
  for layer, (before, a, z, z_std, h, y, y_std) in zip(reversed(layers), reversed(kept), strict=True):
    g, g_y = g[..., : before.shape[-1]], g[..., before.shape[-1] :]
    dy = _normalized_gradient(g_y, y, y_std)
    dkernel2 = np.stack([_over_pixels(part, dy) for part in _shifts(h)]).reshape(layer.kernel2.shape)
    u2 = _convolution(dy, layer.kernel2[::-1, ::-1].transpose(0, 1, 3, 2)) * (h > 0)
    dz = _normalized_gradient(u2 * layer.scale2, z, z_std)
    u1 = (dz @ layer.kernel1.T) * (a > 0)
    gradients.append(
      _Layer(
        (u1 * before).sum((0, 1, 2)),
        u1.sum((0, 1, 2)),
        _over_pixels(a, dz),
        (u2 * z).sum((0, 1, 2)),
        u2.sum((0, 1, 2)),
        dkernel2,
      )
    )
    g = g + u1 * layer.scale1
  return [values, g, *(leaf for gradient in reversed(gradients) for leaf in gradient)]


def _normalized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  std = np.sqrt(x.var((0, 1, 2)) + EPSILON)
  return (x - x.mean((0, 1, 2))) / std, std


def _normalized_gradient(g: np.ndarray, x_hat: np.ndarray, std: np.ndarray) -> np.ndarray:
  return (g - g.mean((0, 1, 2)) - x_hat * (g * x_hat).mean((0, 1, 2))) / std


def _convolution(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
  return functools.reduce(np.add, (part @ kernel[i // 3, i % 3] for i, part in enumerate(_shifts(x))))


def _over_pixels(first: np.ndarray, second: np.ndarray) -> np.ndarray:
  """Sum over images and pixels of the outer products: [B, H, W, C], [B, H, W, D] -> [C, D]."""
  return first.reshape(-1, first.shape[-1]).T @ second.reshape(-1, second.shape[-1])


def _shifts(x: np.ndarray) -> list[np.ndarray]:
  """The nine arrays [B, H, W, C] of zero-padded neighbors that a 3x3 kernel reads, as views."""
  height, width = x.shape[1:3]
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return [padded[:, i // 3 : i // 3 + height, i % 3 : i % 3 + width] for i in range(9)]
