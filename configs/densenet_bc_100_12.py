"""DenseNet-BC (L = 100, k = 12) on CIFAR-100, trained as its paper does (Huang et al. 2017, section 4.2)."""

from paranet_jax.base_config import base_config


def get_config():
  config = base_config('DenseNet-BC-100-12', family='densenet')
  config.train.epochs = 300.0
  config.train.drops = (0.5, 0.75)
  return config
