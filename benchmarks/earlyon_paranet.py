"""The PyTorch peer with early exits by earlyon (https://github.com/sohams25/earlyon), which cuts an `nn.Sequential`.

A ParaNet is none, since later pipelines read the images and several blocks of the pipeline before. But its pipelines
are, if they hand on all of these as one value: earlyon does not look into what its stages exchange.
"""

import math
from collections.abc import Sequence

from earlyon.core.types import EarlyExitConfig, ExitPoint
from earlyon.core.wrappers import EarlyExitWrapper
from earlyon.staged import staged_model
from torch import Tensor, nn

from benchmarks.torch_paranet import TorchParaNet

Carry = tuple[Tensor, dict[str, Tensor]]
"""The images, and the features of a pipeline's blocks."""


class Pipeline(nn.Module):
  """Pipeline p: images, or what the pipeline before has handed on, to what this one does."""

  def __init__(self, network: TorchParaNet, p: int):
    super().__init__()
    self.network, self.p = network, p

  def forward(self, x: Tensor | Carry) -> Carry:
    images, before = x if isinstance(x, tuple) else (x, {})
    return images, self.network.blocks(self.p, images, before)


class Head(nn.Module):
  """The logits of exit p."""

  def __init__(self, network: TorchParaNet, p: int):
    super().__init__()
    self.exit, self.p = network.parts[f'exit_{p}'], p

  def forward(self, x: Carry) -> Tensor:
    return self.exit(x[1][f'block_{self.p}'])


class EarlyOnParaNet:
  """Answers normalized images with early exits: one by stages, several by earlyon's `forward_inference_batched`.

  The latter lets a batch leave as a whole, where its least confident image may.
  """

  def __init__(self, network: TorchParaNet, num_classes: int, image_shape: tuple[int, int, int]):
    height, width, channels = image_shape
    numbers = range(1, network.num_pipelines + 1)
    backbone = nn.Sequential(*(Pipeline(network, p) for p in numbers), Head(network, numbers[-1]))
    early = numbers[:-1]
    self._config = EarlyExitConfig('ParaNet', num_classes, [ExitPoint(f'exit_{p}', str(p - 1), 1) for p in early])
    heads = {f'exit_{p}': Head(network, p) for p in early}
    wrapper = EarlyExitWrapper(
      backbone, heads, nn.Identity(), self._config, input_shape=(1, channels, height, width)
    ).eval()
    self._together, self._one = wrapper.forward_inference_batched, staged_model(wrapper).infer

  def set_thresholds(self, thresholds: Sequence[float | None], last: int) -> None:
    """Sets when images leave, as a `Point` says."""
    early = range(len(self._config.exit_points))
    chosen = [0.0 if k == last else thresholds[k] for k in early]
    self._config.enabled_exits = [at is not None for at in chosen]
    self._config.confidence_thresholds = [0.0 if at is None else -math.expm1(-at) for at in chosen]

  def __call__(self, images: Tensor) -> tuple[Tensor, int]:
    """Logits [B, classes], and the index of the exit.

    Args:
      images: normalized, [B, C, H, W].
    """
    if len(images) == 1:
      found = self._one(images)
      logits, taken = found.prediction, found.exit_taken
    else:
      batched = self._together(images)
      logits, taken = batched.predictions, batched.exit_taken
    return logits, len(self._config.exit_points) if taken == -1 else taken
