"""ResNet-110 on CIFAR-100, trained as its paper does in 64,000 steps (He et al. 2016a, section 4.2).

Its low learning rate of the first 400 steps is a warm-up of an epoch here.
"""

from paranet_jax.base_config import base_config


def get_config():
  config = base_config('ResNet-110', family='resnet')
  config.train.epochs = 164.0
  config.train.batch_size = 128
  config.train.drops = (0.5, 0.75)
  config.train.warmup_epochs = 1.0
  config.train.nesterov = False
  return config
