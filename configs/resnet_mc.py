"""ResNet with seven exits on CIFAR-100, a baseline of MSDNet, trained like it (Huang et al. 2018, section 5)."""

from paranet_jax.base_config import base_config


def get_config():
  config = base_config('ResNet-MC', family='resnet')
  config.model.depth = 62
  config.model.exits = '4,8'
  config.train.epochs = 300.0
  config.train.drops = (0.5, 0.75)
  return config
