"""DenseNet with seven exits on CIFAR-100, a baseline of MSDNet, trained like it (Huang et al. 2018, section 5)."""

from paranet_jax.base_config import base_config


def get_config():
  config = base_config('DenseNet-MC', family='densenet')
  config.model.depth = 52
  config.model.bottleneck = False
  config.model.compression = 1.0
  config.model.exits = '6,12'
  config.train.epochs = 300.0
  config.train.drops = (0.5, 0.75)
  return config
