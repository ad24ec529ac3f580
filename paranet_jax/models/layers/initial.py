"""Initial variables, distributed as in the DenseNet authors' code.

Convolutions are normal with variance 2 / fan-out (He et al. 2015), linear layers uniform within 1 / sqrt(fan-in).
Training draws them on the host, leaf by leaf from abstract shapes, so nothing is compiled; `model.init` draws from the
same distributions with `kernel_init`.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paranet_jax.models.layers.backend import SHAPES, backend

ONES = ('scale', 'var')
ZEROS = ('bias', 'mean')


def initial_variables(shapes: Any, seed: int) -> Any:
  """Draws variables as NumPy arrays. Each depends on the seed, its path and its shape, not on the rest of the model.

  Args:
    shapes: tree of shapes and dtypes, its leaves named `kernel`, `scale`, `bias`, `mean` or `var`.
    seed: int32.

  Raises:
    ValueError: a leaf has another name.
  """
  return jax.tree_util.tree_map_with_path(lambda path, leaf: draw(path, leaf, seed), shapes)


def kernel_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  """Flax initializer for the kernel of a convolution or linear layer."""
  if backend() == SHAPES:
    return jnp.zeros(shape, dtype)
  if len(shape) == 2:
    return jax.random.uniform(key, shape, dtype, -_scale(shape), _scale(shape))
  return _scale(shape) * jax.random.normal(key, shape, dtype)


def _scale(shape: tuple[int, ...]) -> float:
  """Bound for a linear layer's kernel, or standard deviation for a convolution's."""
  if len(shape) == 2:
    return 1 / math.sqrt(shape[0])
  height, width, _, features = shape
  return math.sqrt(2 / (height * width * features))


def generator(path: tuple, seed: int) -> np.random.Generator:
  """The random numbers of one variable."""
  return np.random.Generator(np.random.Philox([seed % 2**32, zlib.crc32(jax.tree_util.keystr(path).encode())]))


def draw(path: tuple, leaf: jax.ShapeDtypeStruct, seed: int) -> np.ndarray:
  """Draws one variable (see `initial_variables`)."""
  name = path[-1].key
  if name in ONES:
    return np.ones(leaf.shape, leaf.dtype)
  if name in ZEROS:
    return np.zeros(leaf.shape, leaf.dtype)
  if name != 'kernel':
    raise ValueError(f'no initial value is known for {jax.tree_util.keystr(path)}')
  random = generator(path, seed)
  scale = _scale(leaf.shape)
  values = (
    random.uniform(-scale, scale, leaf.shape) if len(leaf.shape) == 2 else scale * random.standard_normal(leaf.shape)
  )
  return values.astype(leaf.dtype)
