"""A stage as an ONNX model with channels-first features, batch norms folded or fused, and no needless transposes."""

import collections
import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from paranet_jax.export.stages import IMAGES, StageSpec, Tensor
from paranet_jax.models.layers.backend import plain_operations

OPSET = 18
LOGITS = 'logits'
_EPSILON = 1e-5


def onnx_stage(spec: StageSpec) -> Any:
  """The ONNX model of a stage.

  Its inputs are `takes`: normalized images [batch, H, W, C] and features [batch, C, H, W]. Its outputs are the logits
  [batch, classes] and `gives`.
  """
  with quiet(), plain_operations():
    from jax2onnx import to_onnx

    model = to_onnx(
      spec.function,
      [('batch', *tensor.shape) for tensor in spec.takes],
      model_name=spec.name,
      opset=OPSET,
      inputs_as_nchw=[place for place, tensor in enumerate(spec.takes) if is_nchw(tensor)],
      outputs_as_nchw=[place for place, tensor in enumerate(spec.gives, 1) if is_nchw(tensor)],
      input_names=[tensor.name for tensor in spec.takes],
      output_names=[LOGITS, *(tensor.name for tensor in spec.gives)],
    )
  return _cleaned(model)


def is_nchw(tensor: Tensor) -> bool:
  """Whether a stage takes or gives it channels first: feature maps are, images and vectors are not."""
  return tensor.name != IMAGES and len(tensor.shape) == 3


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps exporters off the terminal: jax2onnx prints and warns about unused plugins, ONNX Runtime logs advice."""
  level = logging.root.manager.disable
  logging.disable(logging.ERROR)
  try:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
      warnings.simplefilter('ignore')
      yield
  finally:
    logging.disable(level)


def _cleaned(model: Any) -> Any:
  """The same function in fewer operations, all from the ONNX standard."""
  model = _optimized(model)
  _fuse_affine(model.graph)
  _drop_unused(model.graph)
  del model.opset_import[1:]
  model.producer_name, model.producer_version = 'paranet_jax', ''
  return model


def _optimized(model: Any) -> Any:
  """Lets ONNX Runtime fold constants and cancel transposes, at the level that stays within the standard."""
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
  """Fuses each per-channel x * scale + shift into one batch norm, which runtimes can fuse with its neighbors."""
  from onnx import helper, numpy_helper

  constants = {tensor.name: tensor for tensor in graph.initializer}
  readers = collections.defaultdict(list)
  for node in graph.node:
    for name in node.input:
      readers[name].append(node)
  outputs = {value.name for value in graph.output}

  def per_channel(node: Any) -> tuple[str, np.ndarray] | None:
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
    scalable = node.op_type == 'Mul' and len(after) == 1 and node.output[0] not in outputs
    scaled = per_channel(node) if scalable else None
    shifted = per_channel(after[0]) if scaled and after[0].op_type == 'Add' else None
    if scaled and shifted and scaled[1].shape == shifted[1].shape:
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


def _drop_unused(graph: Any) -> None:
  """Drops constants that no node reads, and all inferred shapes."""
  read = {name for node in graph.node for name in node.input}
  kept = [tensor for tensor in graph.initializer if tensor.name in read]
  for field, values in ((graph.initializer, kept), (graph.value_info, [])):
    del field[:]
    field.extend(values)
