"""A stage as an ONNX model: features channels first, batch norms folded or one operation, only images transposed."""

from typing import Any

from paranet_jax.export.onnx_graph import clean
from paranet_jax.export.quiet import quiet
from paranet_jax.export.stages import IMAGES, StageSpec, Tensor, tracing

OPSET = 18
LOGITS = 'logits'


def onnx_stage(spec: StageSpec) -> Any:
  """The ONNX model of a stage.

  Its inputs are `takes`: images [batch, H, W, C], normalized, features [batch, C, H, W]. Its outputs are the logits
  [batch, classes] and `gives`.
  """
  with quiet(), tracing():
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
  return clean(model)


def is_nchw(tensor: Tensor) -> bool:
  """Whether a stage has it channels first: features are, images and what has no sides are not."""
  return tensor.name != IMAGES and len(tensor.shape) == 3
