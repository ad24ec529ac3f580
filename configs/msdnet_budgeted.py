"""MSDNet with five exits on CIFAR-100, for a budget over many images (Huang et al. 2018, section 5)."""

from paranet_jax.base_config import base_config


def get_config():
  config = base_config('MSDNet-budgeted', family='msdnet')
  config.model.num_blocks = 5
  config.model.base = 1
  config.model.step_mode = 'lin_grow'
  config.model.step = 1
  config.data.held_out = 5000
  config.train.epochs = 300.0
  config.train.drops = (0.5, 0.75)
  return config
