"""ONNX stages in fewer bits: weights in float16, or weights and activations in int8."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from paranet_jax.export.quiet import quiet

_BATCH = 64


def halved(model: Any) -> Any:
  """The model with its weights stored in float16, each cast to float32 before it is used.

  Half the size, and the speed of float32: ONNX Runtime casts when it loads. What a processor computes is float32.

  Args:
    model: ONNX, changed in place.
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


def quantized(model: Any, inputs: dict[str, np.ndarray]) -> Any:
  """The model with convolutions and classifiers in int8 (QDQ, static), by ONNX Runtime's own quantization.

  Args:
    model: ONNX.
    inputs: of held-out images, by the names of the model's inputs, [N, ...], from which the ranges are taken.
  """
  import onnx
  from onnxruntime import quantization

  class Reader(quantization.CalibrationDataReader):
    def __init__(self):
      self._batches = _batches(inputs)

    def get_next(self):
      return next(self._batches, None)

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


def _batches(inputs: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
  count = len(next(iter(inputs.values())))
  for first in range(0, count, _BATCH):
    yield {name: values[first : first + _BATCH] for name, values in inputs.items()}
