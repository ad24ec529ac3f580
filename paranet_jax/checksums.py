"""What a tree of arrays is, without its values: the shape and the checksum of every leaf, by its path."""

import zlib
from typing import Any

import jax
import numpy as np


def leaf_shapes(tree: Any) -> dict[str, list[int]]:
  """The shape of every leaf, by its path `params/exit_1/...`."""
  return {path: list(leaf.shape) for path, leaf in _leaves(tree)}


def leaf_checksums(tree: Any) -> dict[str, int]:
  """CRC-32 of the bytes of every leaf, by its path."""
  return {path: _checksum(np.asarray(leaf)) for path, leaf in _leaves(tree)}


def _checksum(leaf: np.ndarray) -> int:
  return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))


def _leaves(tree: Any) -> list[tuple[str, Any]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf) for path, leaf in leaves]
