"""ONNX stages in fewer bits: float16 weights, or int8 weights and activations."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from paranet_jax.export.onnx import quiet
from paranet_jax.export.stages import IMAGES, Stages

CALIBRATION_IMAGES = 512
_BATCH = 64


def calibration_count(images: UInt8[np.ndarray, 'N H W C']) -> int:
  """How many of the images calibrate the int8 ranges; the bundle is compared with JAX on the rest."""
  return min(CALIBRATION_IMAGES, len(images) // 2)


def halved(model: Any) -> Any:
  """Stores the weights of an ONNX model in float16, each cast to float32 before it is used.

  This halves the file. ONNX Runtime casts when it loads the model, and computes in float32 at the same speed.

  Args:
    model: changed in place.
  """
  from onnx import TensorProto, helper, numpy_helper

  casts = []
  for tensor in model.graph.initializer:
    if tensor.data_type == TensorProto.FLOAT:
      name, values = tensor.name, numpy_helper.to_array(tensor)
      largest = np.finfo(np.float16).max
      half = np.clip(values, -largest, largest).astype(np.float16)
      tensor.CopyFrom(numpy_helper.from_array(half, f'{name}_float16'))
      casts.append(helper.make_node('Cast', [tensor.name], [name], to=TensorProto.FLOAT))
  nodes = [*casts, *model.graph.node]
  del model.graph.node[:]
  model.graph.node.extend(nodes)
  return model


def quantized_stages(models: dict[str, Any], stages: Stages, images: Float[np.ndarray, 'N H W C']) -> dict[str, Any]:
  """Quantizes each stage to int8, its ranges taken from the outputs of the float32 stages before it.

  Args:
    models: float32 ONNX models by stage name.
    images: normalized.
  """
  import onnxruntime

  found = {}
  for path in dict.fromkeys((stages.all, stages.visited)):  # Often the same.
    carry: dict[str, np.ndarray] = {IMAGES: images}
    for name in path:
      takes = {tensor.name: carry[tensor.name] for tensor in stages.specs[name].takes}
      session = onnxruntime.InferenceSession(models[name].SerializeToString(), providers=['CPUExecutionProvider'])
      gives = [tensor.name for tensor in stages.specs[name].gives]
      if name not in found:
        found[name] = _quantized(models[name], takes)
      if gives:
        carry |= dict(zip(gives, map(np.asarray, session.run(gives, takes)), strict=True))
  return found


def _quantized(model: Any, inputs: dict[str, np.ndarray]) -> Any:
  """A model with its convolutions and classifiers in int8 (static QDQ), by ONNX Runtime's quantization.

  Args:
    inputs: arrays [N, ...] by input name, from which the ranges are taken.
  """
  import onnx
  from onnxruntime import quantization

  starts = range(0, len(next(iter(inputs.values()))), _BATCH)
  batches = ({name: values[start : start + _BATCH] for name, values in inputs.items()} for start in starts)

  class Reader(quantization.CalibrationDataReader):
    def get_next(self) -> Any:  # None after the last batch.
      return next(batches, None)

  with tempfile.TemporaryDirectory() as folder, quiet():
    source, target = Path(folder) / 'float32.onnx', Path(folder) / 'int8.onnx'
    onnx.save(model, source)
    quantization.quantize_static(
      str(source),
      str(target),
      Reader(),
      quant_format=quantization.QuantFormat.QDQ,
      op_types_to_quantize=['Conv', 'Gemm'],
      per_channel=True,
      activation_type=quantization.QuantType.QUInt8,
      weight_type=quantization.QuantType.QInt8,
    )
    return onnx.load(target)
