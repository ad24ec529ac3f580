"""The forward pass in inference as C++ kernels, for batches that fill vectors with images (`native_inference.cc`).

They are optional, as those of `native_dense.py`: without a compiler, on other processors and for other batches XLA or
those compute the same. One library serves all widths, and is compiled when it is first needed. In bfloat16, blocks
have a library of their own where the processor has AMX (`native_amx.cc`).
"""

import ctypes
import functools
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from paranet_jax.host.kept_programs import asked
from paranet_jax.host.native import missing, opened, shared_library
from paranet_jax.models.layers.backend import backend
from paranet_jax.models.layers.native_dense import ELEMENTS, FEATURES, register, version

SOURCE = Path(__file__).with_suffix('.cc')
AMX_SOURCE = SOURCE.with_name('native_amx.cc')
AVX512 = ('avx512f', 'avx512bw', 'avx512dq', 'avx512vl')
AMX_FEATURES = (*AVX512, 'avx512_bf16', 'amx_tile', 'amx_bf16')
IMAGES = 16
"""A vector's images; batches are multiples of it."""
LARGE_BATCH = 64
MIN_MACS = 10_000_000
"""Multiply-adds of a large batch, a tenth of a millisecond, from which kernels are used for batches of any size."""
MIN_VALUES = 1 << 16
"""Values read from which a pooling kernel is used."""
MAX_BYTES = 8 << 20
"""Of the features of 16 images, which must fit a core's share of the last cache."""
KERNELS = ('dense_block', 'entry', 'pooled', 'averaged')

_compiling = threading.Lock()


class Kernels(NamedTuple):
  """The kernels for one type. Parameters are float32."""

  prefix: str

  def inference(self, x: Array, layers: Sequence[tuple[Array, Array, Array, Array, Array]]) -> Array:
    """A whole dense block, as `native_dense.Passes.inference`."""
    channels = layers[-1][0].shape[0] + layers[-1][-1].shape[-1]
    return self._call(
      'dense_block', (*x.shape[:-1], channels), x.dtype, x, *(leaf for layer in layers for leaf in layer)
    )

  def entry(self, x: Array, kernel: Array, halvings: int) -> Array:
    """The 3x3 convolution of images, halved by 2x2 max pools: [B, H, W, C] to [B, H / 2^halvings, ..., K]."""
    batch, height, width, _ = x.shape
    return self._call('entry', (batch, height >> halvings, width >> halvings, kernel.shape[-1]), x.dtype, x, kernel)

  def pooled(self, x: Array, scale: Array, shift: Array) -> Array:
    """The 2x2 averages of relu(scale x + shift)."""
    batch, height, width, channels = x.shape
    shape = batch, height // 2, width // 2, channels
    return self._call('pooled', shape, x.dtype, x, scale, shift, rows=2, columns=2)

  def averaged(self, x: Array, scale: Array, shift: Array) -> Array:
    """The average of relu(scale x + shift) over all pixels, in float32."""
    batch, height, width, channels = x.shape
    return self._call('averaged', (batch, channels), jnp.float32, x, scale, shift, rows=height, columns=width)

  def _call(self, name: str, shape: tuple[int, ...], dtype: Any, *operands: Array, **attributes: int) -> Array:
    call = jax.ffi.ffi_call(f'{self.prefix}_{name}', jax.ShapeDtypeStruct(shape, dtype), vmap_method='sequential')
    return call(*operands, **{key: np.int64(value) for key, value in attributes.items()})


def block_kernels(shape: Sequence[int], num_layers: int, width: int, growth: int, dtype: Any) -> Kernels | None:
  """The kernels for a dense block; None: there are none for it. Arguments as for `dense_block.kernels`."""
  batch, *side, channels = shape
  if not is_concrete(shape):
    return None
  bytes_used = 4 * IMAGES * math.prod(side) * (channels + num_layers * growth)
  if batch % IMAGES or side[1] % 4 or width % 4 or bytes_used > MAX_BYTES:
    return None
  if dtype == jnp.bfloat16 and not (width % 16 or channels % 2 or growth % 2):
    return _amx_kernels() or _kernels(dtype)
  return _kernels(dtype)


def entry_kernels(shape: Sequence[int], features: int, halvings: int, dtype: Any) -> Kernels | None:
  """The kernels for `Kernels.entry` of images of this shape [B, H, W, C]; None: there are none for them."""
  batch, height, width, channels = shape
  if not is_concrete(shape):
    return None
  macs = max(batch, LARGE_BATCH) * math.prod(shape[1:]) * 9 * features
  strip = 4 * IMAGES * (width + 2) * channels * (max(8, 1 << halvings) + 2)
  if batch % IMAGES or not halvings or features % 4 or macs < MIN_MACS or strip > MAX_BYTES:
    return None
  return None if (height | width) % (1 << halvings) else _kernels(dtype)


def pooling_kernels(shape: Sequence[int], dtype: Any) -> Kernels | None:
  """The kernels for `Kernels.pooled` and `Kernels.averaged` of features of this shape; None: there are none."""
  return _kernels(dtype) if is_concrete(shape) and math.prod(shape) >= MIN_VALUES else None


def in_float32(parameters: Iterable[Array]) -> bool:
  """Whether parameters have the type that the kernels read: XLA computes with those that were cast to another one."""
  return all(parameter.dtype == jnp.float32 for parameter in parameters)


def is_concrete(shape: Sequence[int]) -> bool:
  """Whether the batch has a size: what is exported for batches of any size runs where there are no kernels."""
  return all(isinstance(size, int) for size in shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def differentiable(kernel: Callable[..., Array], plain: Callable[..., Array], *operands: Any) -> Array:
  """kernel(*operands), whose gradient is that of `plain`, which computes the same."""
  return kernel(*operands)


def _forward(kernel, plain, *operands):
  return kernel(*operands), operands


def _backward(kernel, plain, operands, cotangent):
  return jax.vjp(plain, *operands)[1](cotangent)


differentiable.defvjp(_forward, _backward)


def _kernels(dtype: Any) -> Kernels | None:
  element = jnp.dtype(dtype).name
  if backend() != 'cpu' or element not in ELEMENTS or asked(missing, FEATURES):
    return None
  return asked(_library, element)


def _amx_kernels() -> Kernels | None:
  if backend() != 'cpu' or asked(missing, AMX_FEATURES):
    return None
  return asked(_amx_library)


def _library(element: str) -> Kernels | None:
  with _compiling:  # A second thread that needs it waits for the first.
    return _registered(SOURCE, element, KERNELS, PARANET_ELEMENT=ELEMENTS[element])


def _amx_library() -> Kernels | None:
  with _compiling:
    return _registered(AMX_SOURCE, 'amx', ('dense_block',))


@functools.cache
def _registered(source: Path, name: str, kernels: tuple[str, ...], **definitions: str) -> Kernels | None:
  file = shared_library(source, definitions, jax.ffi.include_dir())
  library = file and opened(file)
  if library is None or source == AMX_SOURCE and not _granted(library):
    return None
  prefix = f'paranet_{version()}_{name}'
  register(library, prefix, kernels)
  return Kernels(prefix)


def _granted(library: ctypes.CDLL) -> bool:
  """Whether the system lets this process use AMX, for which it has to be asked."""
  return bool(library.paranet_amx())
