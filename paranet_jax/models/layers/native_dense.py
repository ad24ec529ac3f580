"""Passes of a dense layer as C++ kernels, for CPUs with AVX2 or AVX-512 (`native_dense.cc`).

XLA's CPU compiler writes the result of every operation to memory, and memory is what a training step waits for: on 2
cores of an Intel Xeon 16 to 30 GB/s, where the cores could compute 282 GFLOP/s. These passes keep activations in the
caches, and take the statistics of a result while it is there. They are optional: without a compiler, on other
processors and at other widths `dense_block.py` leaves everything to XLA.

A library is compiled for one bottleneck width, growth rate and type, when it is first needed.
"""

import ctypes
import functools
import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from paranet_jax.host.kept_programs import asked
from paranet_jax.host.native import missing, opened, shared_library

SOURCE = Path(__file__).with_suffix('.cc')
FEATURES = ('avx2', 'fma')
MIN_MACS = 100_000_000
"""Multiply-adds of a block's forward pass, a few milliseconds, from which training is worth compiling kernels for."""

WIDTHS = (16, 32, 48, 64, 96, 128)
MAX_GROWTH = 32
ELEMENTS = {'float32': 'float', 'bfloat16': 'BFloat16'}

_compiling = threading.Lock()
_PASSES = ('bottleneck', 'convolve', 'append', 'append_means', 'convolve_backward', 'bottleneck_backward', 'inference')


class Passes(NamedTuple):
  """The kernels for one bottleneck width W, growth rate k and type.

  Features x and their gradient g are [N, C_total], of which a layer reads the first C channels; images are the N pixels
  in order. Means [2, W] or [2, k] are those of a result and of its squares over the N pixels; with several devices they
  are averaged before the next pass reads them. Parameters, means and their gradients are float32.
  """

  prefix: str

  def bottleneck(self, x: Array, scale: Array, shift: Array, kernel: Array) -> tuple[Array, Array]:
    """z = relu(scale x[:, :C] + shift) kernel, and its means."""
    width = kernel.shape[1]
    results = _like(x, len(x), width), _floats(2, width)
    return self._call('bottleneck', results, x, scale, shift, kernel)

  def convolve(
    self, z: Array, z_means: Array, scale: Array, shift: Array, kernel: Array, height: int, width: int
  ) -> tuple[Array, Array]:
    """y = relu(scale z^ + shift) * kernel, a 3x3 convolution of the normalized z, and its means."""
    growth = kernel.shape[-1]
    results = _like(z, len(z), growth), _floats(2, growth)
    return self._call('convolve', results, z, z_means, scale, shift, kernel, height=height, width=width)

  def append(self, x: Array, y: Array, y_means: Array, offset: int) -> Array:
    """x with the normalized y in its k channels from `offset` on, in place."""
    return self._call('append', _like(x, *x.shape), x, y, y_means, in_place=True, offset=offset)

  def append_means(self, g: Array, x: Array, growth: int, offset: int) -> Array:
    """Means [2, k] of g and of g x over the pixels, in the k channels from `offset` on."""
    return self._call('append_means', _floats(2, growth), g, x, offset=offset)

  def convolve_backward(
    self,
    g: Array,
    x: Array,
    g_means: Array,
    y_means: Array,
    z: Array,
    z_means: Array,
    scale: Array,
    shift: Array,
    kernel: Array,
    offset: int,
    height: int,
    width: int,
  ) -> tuple[Array, Array, Array]:
    """u, the gradient of scale z^ + shift in `convolve`, means of u and u z^, and the kernel's gradient."""
    results = _like(z, *z.shape), _floats(2, z.shape[1]), _floats(*kernel.shape)
    operands = g, x, g_means, y_means, z, z_means, scale, shift, kernel
    return self._call('convolve_backward', results, *operands, offset=offset, height=height, width=width)

  def bottleneck_backward(
    self,
    g: Array,
    x: Array,
    z: Array,
    z_means: Array,
    u: Array,
    u_means: Array,
    scale: Array,
    shift: Array,
    kernel: Array,
    scale2: Array,
  ) -> tuple[Array, Array, Array, Array]:
    """g with what `bottleneck` adds to the gradient of x, in place, and the gradients of its parameters."""
    results = _like(g, *g.shape), _floats(*scale.shape), _floats(*scale.shape), _floats(*kernel.shape)
    operands = g, x, z, z_means, u, u_means, scale, shift, kernel, scale2
    return self._call('bottleneck_backward', results, *operands, in_place=True)

  def inference(self, x: Array, layers: Sequence[tuple[Array, Array, Array, Array, Array]]) -> Array:
    """A whole block on raw features [B, H, W, C], as `dense_block_inference`: a few images at a time.

    Args:
      x: features.
      layers: scale1, shift1, kernel1, shift2 and kernel2 of each layer.
    """
    channels = layers[-1][0].shape[0] + layers[-1][-1].shape[-1]
    return self._call('inference', _like(x, *x.shape[:-1], channels), x, *(leaf for layer in layers for leaf in layer))

  def _call(self, name: str, results: Any, *operands: Array, in_place: bool = False, **attributes: int) -> Any:
    call = jax.ffi.ffi_call(
      f'{self.prefix}_{name}',
      results,
      vmap_method='sequential',
      input_output_aliases={0: 0} if in_place else None,
    )
    return call(*operands, **{key: np.int64(value) for key, value in attributes.items()})


def passes(width: int, growth: int, dtype: Any) -> Passes | None:
  """The kernels for a block with this bottleneck width, growth rate and type; None: XLA does it."""
  element = jnp.dtype(dtype).name
  if width not in WIDTHS or not 0 < growth <= MAX_GROWTH or element not in ELEMENTS:
    return None
  if asked(missing, FEATURES):
    return None
  return asked(_library, width, growth, element, guess=Passes(_prefix(width, growth, element)))


def version() -> str:
  """Of all kernels, by their source; or why there are none."""
  return missing(FEATURES) or _digest()


@functools.cache
def _digest() -> str:
  files = sorted(path for path in SOURCE.parent.iterdir() if path.suffix in ('.cc', '.h'))
  return hashlib.sha256(b''.join(path.read_bytes() for path in files)).hexdigest()[:12]


def _library(width: int, growth: int, element: str) -> Passes | None:
  with _compiling:  # A second thread that needs it waits for the first.
    return _compiled(width, growth, element)


@functools.cache
def _compiled(width: int, growth: int, element: str) -> Passes | None:
  definitions = {'PARANET_WIDTH': width, 'PARANET_GROWTH': growth, 'PARANET_ELEMENT': ELEMENTS[element]}
  file = shared_library(SOURCE, definitions, jax.ffi.include_dir(), ('PARANET_PART', 2))
  library = file and opened(file)
  if library is None:
    return None
  prefix = _prefix(width, growth, element)
  register(library, prefix, _PASSES)
  return Passes(prefix)


def register(library: ctypes.CDLL, prefix: str, kernels: Sequence[str]) -> None:
  """Makes the functions of a library known to XLA, by names with this prefix."""
  for name in kernels:
    target = jax.ffi.pycapsule(getattr(library, f'paranet_{name}'))
    jax.ffi.register_ffi_target(f'{prefix}_{name}', target, platform='cpu')


def _prefix(width: int, growth: int, element: str) -> str:
  """The name by which compiled programs that are kept on disk find the kernels."""
  return f'paranet_{version()}_{width}_{growth}_{element}'


def _like(x: Array, *shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, x.dtype)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)
