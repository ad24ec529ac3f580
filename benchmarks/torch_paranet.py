"""The peer: PN3 as a PyTorch user writes it, with DenseNet's layers, channels_last (its fastest here)."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAVES = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}


class DenseLayer(nn.Module):
  """The k new features [B, k, H, W] of features [B, C, H, W]."""

  def __init__(self, channels: int, growth_rate: int):
    super().__init__()
    self.norm1 = nn.BatchNorm2d(channels)
    self.conv1 = nn.Conv2d(channels, 4 * growth_rate, 1, bias=False)
    self.norm2 = nn.BatchNorm2d(4 * growth_rate)
    self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, 3, padding=1, bias=False)

  def forward(self, x: Tensor) -> Tensor:
    x = self.conv1(F.relu(self.norm1(x), inplace=True))
    return self.conv2(F.relu(self.norm2(x), inplace=True))


class DenseBlock(nn.ModuleDict):
  """Every layer reads all features before it: [B, C, H, W] -> [B, C + layers k, H, W]."""

  def __init__(self, channels: int, layers: int, growth_rate: int):
    super().__init__({f'layer_{i + 1}': DenseLayer(channels + i * growth_rate, growth_rate) for i in range(layers)})

  def forward(self, x: Tensor) -> Tensor:
    for layer in self.values():
      x = torch.concat([x, layer(x)], 1)
    return x


class Transition(nn.Module):
  """Halves the side. `pool_first` is the same function at a quarter of the convolution's work."""

  def __init__(self, channels: int, pool_first: bool):
    super().__init__()
    self.norm = nn.BatchNorm2d(channels)
    self.conv = nn.Conv2d(channels, channels, 1, bias=False)
    self.pool_first = pool_first

  def forward(self, x: Tensor) -> Tensor:
    x = F.relu(self.norm(x), inplace=True)
    if self.pool_first:
      return self.conv(F.avg_pool2d(x, 2))
    return F.avg_pool2d(self.conv(x), 2)


class Exit(nn.Module):
  """Logits [B, num_classes]."""

  def __init__(self, channels: int, num_classes: int):
    super().__init__()
    self.norm = nn.BatchNorm2d(channels)
    self.classifier = nn.Linear(channels, num_classes)

  def forward(self, x: Tensor) -> Tensor:
    return self.classifier(F.relu(self.norm(x), inplace=True).mean((2, 3)))


class TorchParaNet(nn.Module):
  """PN<P> with the cascade, its parts named as the package names their parameters.

  Takes normalized images [B, C, S, S] and the 1-based exits to compute; gives their logits.
  """

  def __init__(self, num_pipelines: int, num_classes: int, layers: int, growth_rate: int, pool_first: bool = False):
    super().__init__()
    self.num_pipelines = num_pipelines
    parts, width = OrderedDict(), {}
    for p in range(1, num_pipelines + 1):
      channels = 2 * growth_rate
      parts[f'pipeline_{p}_stem'] = nn.Conv2d(3, channels, 3, padding=1, bias=False)
      for b in range(1, p + 1):
        if b > 1:
          parts[f'pipeline_{p}_transition_{b - 1}'] = Transition(channels, pool_first)
          channels += width[p - 1, b - 1]
        parts[f'pipeline_{p}_block_{b}'] = DenseBlock(channels, layers, growth_rate)
        channels = width[p, b] = channels + layers * growth_rate
      parts[f'exit_{p}'] = Exit(channels, num_classes)
    self.parts = nn.ModuleDict(parts)

  def forward(self, images: Tensor, exits: Sequence[int]) -> list[Tensor]:
    features, last = {}, {}
    for p in range(1, max(exits) + 1):
      features = self.blocks(p, images, features)
      last[p] = features[f'block_{p}']
    return [self.parts[f'exit_{p}'](last[p]) for p in exits]

  def pipeline(self, p: int, images: Tensor, features: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of exit p and the features of its pipeline, from those of the pipeline before."""
    features = self.blocks(p, images, features)
    return self.parts[f'exit_{p}'](features[f'block_{p}']), features

  def blocks(self, p: int, images: Tensor, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The features of pipeline p's blocks, from those of the pipeline before."""
    features, x = {}, self.parts[f'pipeline_{p}_stem'](images)
    for _ in range(self.num_pipelines + 1 - p):
      x = F.max_pool2d(x, 2)
    for b in range(1, p + 1):
      if b > 1:
        x = torch.concat([self.parts[f'pipeline_{p}_transition_{b - 1}'](x), before[f'block_{b - 1}']], 1)
      x = features[f'block_{b}'] = self.parts[f'pipeline_{p}_block_{b}'](x)
    return features


def torch_network(variables: dict[str, Any], *, pool_first: bool = False) -> TorchParaNet:
  """The peer with the package's variables.

  Args:
    variables: `params` and `batch_stats` of a PN<P> with the cascade.
    pool_first: transitions pool, then convolve; otherwise as DenseNet's code does.
  """
  params = variables['params']
  num_pipelines = sum(name.startswith('exit_') for name in params)
  growth_rate = params['pipeline_1_stem']['kernel'].shape[-1] // 2
  num_classes = params['exit_1']['classifier']['bias'].size
  network = TorchParaNet(num_pipelines, num_classes, len(params['pipeline_1_block_1']), growth_rate, pool_first)
  counters = {name: value for name, value in network.state_dict().items() if name.endswith('num_batches_tracked')}
  network.load_state_dict(counters | torch_weights(variables))
  return network


def torch_weights(variables: dict[str, Any]) -> dict[str, Tensor]:
  """The variables (or gradients in their place) by the peer's names and in its axis order."""
  named = {path: leaf for tree in variables.values() for path, leaf in _leaves(tree)}
  orders = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # Convolution, linear layer, vector.
  return {
    '.'.join(('parts', *path[:-1], LEAVES[path[-1]])): torch.from_numpy(leaf.transpose(orders[leaf.ndim]).copy())
    for path, leaf in named.items()
  }


def _leaves(tree: dict[str, Any], *path: str) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
  # Not by jax, which what is only run does not need.
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from _leaves(value, *path, name)
    else:
      yield (*path, name), np.array(value)


def training_step(
  network: TorchParaNet,
  images: np.ndarray,
  labels: np.ndarray,
  optimizer: dict[str, Any],
  *,
  compiled: str = '',
  bfloat16: bool = False,
) -> Callable[[], None]:
  """A function that trains the network for one step more, on a batch that is normalized and in place.

  Args:
    images: normalized float32 [B, S, S, C].
    labels: int [B].
    optimizer: of `torch.optim.SGD`.
    compiled: mode of torch.compile; '': eager.
    bfloat16: the forward pass and the losses under autocast.
  """
  network = network.to(memory_format=torch.channels_last).train()
  exits = range(1, network.num_pipelines + 1)
  forward = torch.compile(network, mode=compiled) if compiled else network
  sgd = torch.optim.SGD(network.parameters(), **optimizer)
  images, labels = channels_last(images), torch.from_numpy(labels).long()

  def run():
    sgd.zero_grad(set_to_none=True)
    with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
      loss = sum(F.cross_entropy(logits, labels) for logits in forward(images, exits))
    loss.backward()
    sgd.step()

  return run


def forward(
  network: TorchParaNet, exits: Sequence[int], *, compiled: str = '', bfloat16: bool = False
) -> Callable[[np.ndarray], list[np.ndarray]]:
  """The forward pass in inference mode: normalized images [B, S, S, C] to the logits of these exits."""
  network = network.to(memory_format=torch.channels_last).eval()
  network = torch.compile(network, mode=compiled) if compiled else network

  @torch.inference_mode()
  def run(images):
    with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
      found = network(channels_last(images), exits)
    return [logits.float().numpy() for logits in found]

  return run


def channels_last(images: np.ndarray) -> Tensor:
  """[B, H, W, C] as PyTorch's [B, C, H, W] in the channels_last memory format, without a copy."""
  return torch.from_numpy(images).permute(0, 3, 1, 2)
