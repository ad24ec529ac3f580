"""PN3-23d on CIFAR-100. Each exit matches the next one's logits."""

from paranet_jax.base_config import base_config


def get_config():
  return base_config('PN3-23d')
