"""Writes the stages of a bundle to files."""

from pathlib import Path
from typing import Any

import numpy as np

from paranet_jax.early.load import LoadedRun
from paranet_jax.export.onnx import onnx_stage
from paranet_jax.export.precision import halved, quantized
from paranet_jax.export.stablehlo import signature, stablehlo_stage
from paranet_jax.export.stages import Stages

CALIBRATION_IMAGES = 512


def write_onnx(folder: Path, run: LoadedRun, stages: Stages, dtype: str, images: np.ndarray) -> None:
  """Writes the ONNX files.

  Args:
    images: uint8 [N, H, W, C]; from those of `calibrating` int8 takes its ranges.
  """
  import onnx

  models = {name: onnx_stage(spec) for name, spec in stages.specs.items()}
  if dtype == 'float16':
    models = {name: halved(model) for name, model in models.items()}
  elif dtype == 'int8':
    models = _quantized(models, run, stages, images[: calibrating(images)])
  for name, model in models.items():
    onnx.checker.check_model(model)
    onnx.save(model, folder / f'{name}.onnx')


def calibrating(images: np.ndarray) -> int:
  """How many of the images ranges are taken from; those after them say how far the answers agree."""
  return min(CALIBRATION_IMAGES, len(images) // 2)


def _quantized(models: dict[str, Any], run: LoadedRun, stages: Stages, images: np.ndarray) -> dict[str, Any]:
  """Each stage quantized on what the float32 stages before it leave of these images."""
  import onnxruntime

  found = {}
  mean, std = np.float32(run.dataset.mean), np.float32(run.dataset.std)
  for path in dict.fromkeys((stages.all, stages.visited)):  # Often the same.
    carried = {'images': (images.astype(np.float32) / 255 - mean) / std}
    for name in path:
      takes = {tensor.name: carried[tensor.name] for tensor in stages.specs[name].takes}
      session = onnxruntime.InferenceSession(models[name].SerializeToString(), providers=['CPUExecutionProvider'])
      gives = [tensor.name for tensor in stages.specs[name].gives]
      if name not in found:
        found[name] = quantized(models[name], takes)
      if gives:
        carried |= dict(zip(gives, session.run(gives, takes), strict=True))
  return found


def write_stablehlo(folder: Path, stages: Stages) -> dict[str, Any]:
  """Writes the StableHLO files; returns the file and the signature of each stage."""
  entries = {}
  for name, spec in stages.specs.items():
    exported = stablehlo_stage(spec)
    (folder / f'{name}.stablehlo').write_bytes(exported.serialize())
    entries[name] = {'file': f'{name}.stablehlo'} | signature(exported, spec.takes, spec.gives)
  return entries
