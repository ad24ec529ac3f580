"""PN3cut-33d on CIFAR-100. Without the cascade, the first two exits match the third's logits."""

from paranet_jax.base_config import base_config


def get_config():
  return base_config('PN3cut-33d')
