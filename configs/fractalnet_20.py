"""FractalNet of 20 layers on CIFAR-100, with drop-path and dropout, trained as its paper does (Larsson et al. 2017).

The learning rate drops each time the epochs that remain have halved (section 4).
"""

from paranet_jax.base_config import base_config


def get_config():
  config = base_config('FractalNet-20', family='fractalnet')
  config.model.block_dropout = (0.0, 0.1, 0.2, 0.3, 0.4)
  config.train.epochs = 400.0
  config.train.batch_size = 100
  config.train.learning_rate = 0.02
  config.train.drops = (0.5, 0.75, 0.875, 0.9375)
  config.train.nesterov = False
  return config
