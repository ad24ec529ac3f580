"""PN3cut-ddd on CIFAR-100. Without the cascade, every exit learns from the labels (paper, Table 1)."""

from paranet_jax.base_config import base_config


def get_config():
  return base_config('PN3cut-ddd')
