"""ResNet-110 with pre-activation on CIFAR-100, trained like ResNet-110 (He et al. 2016b, appendix)."""

from paranet_jax.base_config import base_config


def get_config():
  config = base_config('PreAct-ResNet-110', family='resnet')
  config.model.block = 'preactivation'
  config.train.epochs = 164.0
  config.train.batch_size = 128
  config.train.drops = (0.5, 0.75)
  config.train.warmup_epochs = 1.0
  config.train.nesterov = False
  return config
