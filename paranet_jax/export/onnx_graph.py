"""Cleans what an exporter leaves: constants folded, transposes cancelled, scales with shifts made one operation."""

import collections
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

_EPSILON = 1e-5


def clean(model: Any) -> Any:
  """The same function in fewer operations, all of the standard's own.

  Args:
    model: ONNX.
  """
  model = _optimized(model)
  _fuse_affine(model.graph)
  _keep_what_is_read(model.graph)
  del model.opset_import[1:]
  model.producer_name, model.producer_version = 'paranet_jax', ''
  return model


def _optimized(model: Any) -> Any:
  """By ONNX Runtime, as far as it stays within the standard: folding, and transposes pushed on until they cancel."""
  import onnx
  import onnxruntime

  with tempfile.TemporaryDirectory() as folder:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(Path(folder) / 'model.onnx')
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    return onnx.load(options.optimized_model_filepath)


def _fuse_affine(graph: Any) -> None:
  """Makes x * scale + shift a channel one batch normalization, which runtimes know to join with what is around it."""
  from onnx import helper, numpy_helper

  constants = {tensor.name: tensor for tensor in graph.initializer}
  readers = collections.defaultdict(list)
  for node in graph.node:
    for name in node.input:
      readers[name].append(node)
  outputs = {value.name for value in graph.output}

  def per_channel(node):
    """The input and the constant [C] of a node that has a constant [(1,) C, 1, 1], or None."""
    for x, name in (node.input, reversed(node.input)):
      shape = list(constants[name].dims) if name in constants else []
      if len(shape) in (3, 4) and shape[-2:] == [1, 1] and shape[:-3] in ([], [1]):
        return x, numpy_helper.to_array(constants[name]).reshape(-1)
    return None

  nodes, fused = [], set()
  for node in graph.node:
    if node.output[0] in fused:
      continue
    after = readers[node.output[0]]
    scaled = node.op_type == 'Mul' and len(after) == 1 and node.output[0] not in outputs and per_channel(node)
    shifted = scaled and after[0].op_type == 'Add' and per_channel(after[0])
    if shifted and scaled[1].shape == shifted[1].shape:
      (x, scale), (_, shift), name = scaled, shifted, after[0].output[0]
      moments = np.zeros_like(scale), np.full_like(scale, 1 - _EPSILON)
      values = dict(zip(('scale', 'shift', 'mean', 'var'), (scale, shift, *moments), strict=True))
      graph.initializer.extend(numpy_helper.from_array(value, f'{name}_{key}') for key, value in values.items())
      reads = [x, *(f'{name}_{key}' for key in values)]
      node = helper.make_node('BatchNormalization', reads, [name], epsilon=_EPSILON)
      fused.add(name)
    nodes.append(node)
  del graph.node[:]
  graph.node.extend(nodes)


def _keep_what_is_read(graph: Any) -> None:
  read = {name for node in graph.node for name in node.input}
  kept = [tensor for tensor in graph.initializer if tensor.name in read]
  for field, values in ((graph.initializer, kept), (graph.value_info, [])):
    del field[:]
    field.extend(values)
