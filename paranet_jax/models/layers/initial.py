"""Initial variables drawn on the host, leaf by leaf from the abstract shapes: nothing is compiled."""

import math
import zlib
from typing import Any

import jax
import numpy as np

ONES = ('scale', 'var')
ZEROS = ('bias', 'mean')


def initial_variables(shapes: Any, seed: int) -> Any:
  """Draws the variables of a DenseNet as its authors' code does.

  Convolutions are normal with variance 2 / fan-out (He et al. 2015), linear layers uniform within 1 / sqrt(fan-in).
  A value depends on the seed and on its own path and shape, not on what else the model has.

  Args:
    shapes: tree of shapes and dtypes, its leaves named `kernel`, `scale`, `bias`, `mean` or `var`.
    seed: int32.

  Returns:
    The tree as numpy arrays.

  Raises:
    ValueError: a leaf of another name.
  """
  return jax.tree_util.tree_map_with_path(lambda path, leaf: _draw(path, leaf, seed), shapes)


def _draw(path: tuple, leaf: jax.ShapeDtypeStruct, seed: int) -> np.ndarray:
  name = path[-1].key
  if name in ONES:
    return np.ones(leaf.shape, leaf.dtype)
  if name in ZEROS:
    return np.zeros(leaf.shape, leaf.dtype)
  if name != 'kernel':
    raise ValueError(f'no initial value is known for {jax.tree_util.keystr(path)}')
  random = np.random.Generator(np.random.Philox([seed % 2**32, zlib.crc32(jax.tree_util.keystr(path).encode())]))
  if len(leaf.shape) == 2:
    bound = 1 / math.sqrt(leaf.shape[0])
    return random.uniform(-bound, bound, leaf.shape).astype(leaf.dtype)
  height, width, _, features = leaf.shape
  deviation = math.sqrt(2 / (height * width * features))
  return (deviation * random.standard_normal(leaf.shape)).astype(leaf.dtype)
