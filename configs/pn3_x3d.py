"""PN3-x3d on CIFAR-100. The second exit matches the third's logits (paper, Table 2)."""

from paranet_jax.base_config import base_config


def get_config():
  return base_config('PN3-x3d')
