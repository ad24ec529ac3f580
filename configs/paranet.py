"""Any name of the language: `--config=configs/paranet.py:PN4-444d`."""

from paranet_jax.base_config import base_config


def get_config(name: str = 'PN3-ddd'):
  return base_config(name)
