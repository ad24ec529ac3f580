"""PN3-dxx on CIFAR-100. Only the first exit is trained."""

from paranet_jax.base_config import base_config


def get_config():
  return base_config('PN3-dxx')
