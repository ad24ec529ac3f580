"""How closely a bundle's predictions match those of the network in JAX."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from paranet_jax.data.dataset import Split
from paranet_jax.early.exit_plan import ExitPlan
from paranet_jax.early.loaded_run import LoadedRun
from paranet_jax.early.logits import bundle_logits, split_logits
from paranet_jax.early.scores import confidences
from paranet_jax.early.thresholds import exits_taken
from paranet_jax.portable import run as runtime
from paranet_jax.steps import Preprocessing


def compare(folder: Path, run: LoadedRun, plan: ExitPlan, images: UInt8[np.ndarray, 'N H W C']) -> dict[str, Any]:
  """The `agreement` between the bundle in a folder and the run's network in JAX."""
  preprocessing = Preprocessing(run.dataset.mean, run.dataset.std, crop_padding=0, flip=False)
  split = Split(images, np.zeros(len(images), np.int32))
  logits = split_logits(run.model, run.variables, plan.exits, preprocessing, split, 64)
  return agreement(logits, plan, runtime.load(folder), images)


def agreement(
  logits: Float[np.ndarray, 'K N classes'],
  plan: ExitPlan,
  bundle: runtime.Adaptive,
  images: UInt8[np.ndarray, 'N H W C'],
) -> dict[str, Any]:
  """Compares the predictions for some images.

  Args:
    logits: of the usable exits, computed by JAX.
    plan: exits.json.

  Returns:
    `images`: N; `labels` and `exits`: shares of the images with the same label and the same exit; `exit_labels`: the
    share with the same label at each usable exit, if all images went there; `logits`: the largest difference between
    logits at any exit, relative to the largest logit where that is above 1.
  """
  found, theirs = bundle.predict(images), bundle_logits(bundle, images)
  taken = exits_taken(confidences(logits, plan.score, plan.temperatures), plan.confidence_floors)
  labels = logits[taken, np.arange(len(images))].argmax(-1)
  return {
    'images': len(images),
    # Of unknown images, the class that would be their label.
    'labels': float(np.mean(np.where(found.unknown, found.probabilities.argmax(-1), found.labels) == labels)),
    'exits': float(np.mean(found.exits == np.array(plan.exits)[taken])),
    'exit_labels': np.mean(theirs.argmax(-1) == logits.argmax(-1), axis=-1).tolist(),
    'logits': float(np.abs(theirs - logits).max() / max(np.abs(logits).max(), 1)),
  }
