"""Published parameters and multiply-adds of the architectures that can be adopted."""

import pytest

from paranet_jax.costs import exit_costs
from paranet_jax.models.adopted.network import AdoptedNetwork
from paranet_jax.models.adopted.registry import find_architecture


def _wide_resnet(size, factor):
  """Parameters and multiply-adds, layer by layer, of Table 1 of Zagoruyko and Komodakis (2016), for 32 pixels."""
  params, macs, inputs = 27 * 16, 27 * 16 * 32**2, 16
  for width, side in ((16 * factor, 32), (32 * factor, 16), (64 * factor, 8)):
    for _ in range(size):
      kernels = 9 * inputs * width + 9 * width * width + (inputs * width if inputs != width else 0)
      params += kernels + 2 * inputs + 2 * width
      macs += kernels * side**2
      inputs = width
  return params + 2 * inputs + 10 * inputs + 10, macs + 10 * inputs


PUBLISHED = {
  # torchvision's table of weights: parameters, and billions of multiply-adds.
  'resnet18': (11_689_512, 1.81),
  'resnet34': (21_797_672, 3.66),
  'resnet50': (25_557_032, 4.09),
  'resnet101': (44_549_160, 7.80),
  'resnext50_32x4d': (25_028_904, 4.23),
  'mobilenet_v2': (3_504_872, 0.30),
  'mobilenet_v3_large': (5_483_032, 0.22),
  'mobilenet_v3_small': (2_542_856, 0.06),
  'efficientnet_b0': (5_288_548, 0.39),
  'convnext_tiny': (28_589_128, 4.46),
  'vit_b_16': (86_567_656, 17.56),
  # timm's model cards, in millions and billions.
  'vit_small_patch16_224': (22.1, 4.6),
  'vit_base_patch16_224': (86.6, 17.6),
  'deit_tiny_patch16_224': (5.7, 1.3),
  'tf_efficientnet_lite0': (4.7, 0.4),
  'efficientnet_lite0': (4.7, 0.4),
  # 36.5 million parameters in Table 5 of the paper.
  'wide_resnet28_10': (_wide_resnet(4, 10)[0], _wide_resnet(4, 10)[1] / 1e9),
}


def check(name):
  """The costs of the architecture, with its own classifier alone, are those published, to their last digit."""
  architecture = find_architecture(name)
  side = architecture.preprocessing.side
  (cost,) = exit_costs(AdoptedNetwork(architecture.num_classes, side, arch=name), (side, side, 3))
  params, billions = PUBLISHED[name]
  found = cost['params'] if isinstance(params, int) else round(cost['params'] / 1e6, 1)
  digits = len(str(billions).partition('.')[2])
  assert (found, round(cost['macs'] / 1e9, digits)) == (params, pytest.approx(billions)), name
