"""MSDNet with ten exits on CIFAR-100, for anytime prediction (Huang et al. 2018, section 5).

`--config.model.num_blocks=7` is the smaller one of the authors' code.
"""

from paranet_jax.base_config import base_config


def get_config():
  config = base_config('MSDNet-anytime', family='msdnet')
  config.model.num_blocks = 10
  config.train.epochs = 300.0
  config.train.drops = (0.5, 0.75)
  return config
