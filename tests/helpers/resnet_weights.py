"""The weights of a CIFAR ResNet under PyTorch's names, drawn by NumPy so that PyTorch can be given the same."""

import numpy as np


def shapes(depth, classes=10):
  """Every tensor of the network of He et al. (2016a) with parameter-free shortcuts, as PyTorch names and shapes it."""
  found = {'conv1.weight': (16, 3, 3, 3), **_norm('bn1', 16)}
  channels = 16
  for stage, width in enumerate((16, 32, 64), 1):
    for block in range((depth - 2) // 6):
      prefix = f'layer{stage}.{block}.'
      found[f'{prefix}conv1.weight'] = (width, channels, 3, 3)
      found |= _norm(f'{prefix}bn1', width)
      found[f'{prefix}conv2.weight'] = (width, width, 3, 3)
      found |= _norm(f'{prefix}bn2', width)
      channels = width
  return found | {'linear.weight': (classes, 64), 'linear.bias': (classes,)}


def _norm(name, width):
  return {f'{name}.{part}': (width,) for part in ('weight', 'bias', 'running_mean', 'running_var')}


def draw(depth, classes=10, seed=0):
  """float32 arrays by name; no two tensors are alike, and activations neither vanish nor explode."""
  random = np.random.default_rng(seed)
  found = {}
  for name, shape in shapes(depth, classes).items():
    if len(shape) > 1:
      values = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    else:
      values = random.uniform(0.4, 1, shape) if name.endswith(('weight', 'var')) else random.uniform(-0.5, 0.5, shape)
    found[name] = values.astype(np.float32)
  return found


def images(count=4, seed=1):
  """Normalized images, NHWC."""
  return np.random.default_rng(seed).standard_normal((count, 32, 32, 3)).astype(np.float32)
