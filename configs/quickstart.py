"""A small PN3-ddd on scikit-learn's handwritten digits: minutes on two cores, no network needed."""

from paranet_jax.base_config import base_config


def get_config():
  config = base_config('PN3-ddd')
  config.model.layers_per_block = 3
  config.data.name = 'digits'
  config.data.held_out = 300
  config.train.epochs = 12.0
  config.train.batch_size = 32
  config.train.schedule = 'cosine'
  config.eval.every_epochs = 4.0
  return config
