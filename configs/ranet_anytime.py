"""RANet with eight exits on CIFAR-100, for anytime prediction (Yang et al. 2020, section 4; the authors' command)."""

from paranet_jax.base_config import base_config


def get_config():
  config = base_config('RANet-anytime', family='ranet')
  config.train.epochs = 300.0
  config.train.drops = (0.5, 0.75)
  return config
