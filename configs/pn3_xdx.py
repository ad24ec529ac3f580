"""PN3-xdx on CIFAR-100. Only the second exit is trained, from the labels (paper, Table 2)."""

from paranet_jax.base_config import base_config


def get_config():
  return base_config('PN3-xdx')
