"""PN3-33d on CIFAR-100. The first two exits match the third's logits."""

from paranet_jax.base_config import base_config


def get_config():
  return base_config('PN3-33d')
