"""Writes tests/fixtures/pytorch with PyTorch, in an environment that has torch and numpy.

`zip.pth` and `legacy.pth` hold `small_file()` in both formats of `torch.save`, and `logits.npy` what a ResNet-20 in
plain PyTorch computes from the weights and images of tests/helpers/resnet_weights.py. Given the folder of `resnet20.th`
and `resnet56.th`, it also writes `logits_of_trained_20.npy` and `logits_of_trained_56.npy`.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1] / 'helpers'))

import resnet_weights

FOLDER = Path(__file__).parents[1] / 'fixtures' / 'pytorch'


class Block(nn.Module):
  def __init__(self, channels, width, stride):
    super().__init__()
    self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
    self.bn2 = nn.BatchNorm2d(width)

  def forward(self, x):
    y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
    new = y.shape[1] - x.shape[1]
    if new:
      x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, new // 2, new // 2))
    return functional.relu(x + y)


class ResNet(nn.Module):
  def __init__(self, depth, classes=10):
    super().__init__()
    self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(16)
    count, channels = (depth - 2) // 6, 16
    for stage, width in enumerate((16, 32, 64), 1):
      blocks = [Block(channels, width, 2 if stage > 1 else 1), *(Block(width, width, 1) for _ in range(count - 1))]
      self.add_module(f'layer{stage}', nn.Sequential(*blocks))
      channels = width
    self.linear = nn.Linear(64, classes)

  def forward(self, x):
    x = functional.relu(self.bn1(self.conv1(x)))
    x = self.layer3(self.layer2(self.layer1(x)))
    return self.linear(x.mean((2, 3)))


def small_file():
  """A checkpoint with one tensor of every kind."""
  module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))  # Its state dict has attributes.
  state = module.state_dict()
  state['0.weight'] = nn.Parameter(torch.arange(6.0).reshape(2, 3))
  state['0.bias'] = torch.tensor([-1.5, 2.0])
  base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
  state |= {'transposed': base.T, 'part': base[1:3, 2:5:2], 'expanded': torch.tensor([7.0]).expand(3, 2)}
  state |= {'empty': torch.zeros(0, 3), 'scalar': torch.tensor(5)}
  names = (
    'float64 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 complex64 complex128 float8_e4m3fn'
  )
  for name in [*names.split(), 'float8_e5m2']:
    state[name] = torch.tensor([0.0, 1.0, 2.0, 3.0]).to(getattr(torch, name))
  state['bool'] = torch.tensor([True, False, True])
  return {'epoch': 3, 'best': 91.5, 'args': {'names': ['a', ('b', None)], 'fast': True}, 'state_dict': state}


def logits(depth, weights):
  """Of a network with these weights, for the images of tests/helpers/resnet_weights.py."""
  network = ResNet(depth).eval()
  missing, unknown = network.load_state_dict(weights, strict=False)
  assert not unknown and all(name.endswith('num_batches_tracked') for name in missing)
  with torch.no_grad():
    return network(torch.from_numpy(resnet_weights.images()).permute(0, 3, 1, 2)).numpy()


if __name__ == '__main__':
  FOLDER.mkdir(parents=True, exist_ok=True)
  torch.save(small_file(), FOLDER / 'zip.pth')
  torch.save(small_file(), FOLDER / 'legacy.pth', _use_new_zipfile_serialization=False)
  drawn = {name: torch.from_numpy(values) for name, values in resnet_weights.draw(20).items()}
  np.save(FOLDER / 'logits.npy', logits(20, drawn))
  for folder in sys.argv[1:]:
    for depth in (20, 56):
      trained = torch.load(Path(folder) / f'resnet{depth}.th', map_location='cpu')['state_dict']
      trained = {name.removeprefix('module.'): tensor for name, tensor in trained.items()}
      np.save(FOLDER / f'logits_of_trained_{depth}.npy', logits(depth, trained))
