"""The network's variables as safetensors."""

from pathlib import Path
from typing import Any

import jax
import numpy as np


def save_weights(path: Path, variables: Any) -> None:
  """Writes `params` and `batch_stats`, each array by its path, such as params/exit_1/classifier/kernel."""
  from safetensors.numpy import save

  leaves = jax.tree_util.tree_leaves_with_path(variables)
  names = (jax.tree_util.keystr(place, simple=True, separator='/') for place, _ in leaves)
  arrays = (np.ascontiguousarray(leaf) for _, leaf in leaves)
  path.write_bytes(save(dict(zip(names, arrays, strict=True)), {'format': 'flax'}))
