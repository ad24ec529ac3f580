"""What tells one checkpoint from another: the run's name and data set, the step, and a hash of the variables."""

import hashlib
from typing import Any, NamedTuple

import jax
import numpy as np


class CheckpointId(NamedTuple):
  """`name` of the network, `dataset` as in the configuration, `step`, and `fingerprint` of the variables."""

  name: str
  dataset: str
  step: int
  fingerprint: str


def fingerprint(variables: Any) -> str:
  """A hash over the paths, types, shapes and bytes of `params` and `batch_stats`: 16 hexadecimal digits."""
  digest = hashlib.sha256()
  kept = {'params': variables['params'], 'batch_stats': variables['batch_stats']}
  for path, leaf in jax.tree_util.tree_leaves_with_path(kept):
    values = np.ascontiguousarray(leaf)
    digest.update(f'{jax.tree_util.keystr(path)} {values.dtype} {values.shape}'.encode())
    digest.update(values)
  return digest.hexdigest()[:16]
