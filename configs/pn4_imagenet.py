"""A ParaNet for ImageNet: four pipelines, the last one like a DenseNet for it (Huang et al. 2017, Table 1, section 4).

Stem, pooling, growth rate, epochs, drops and batch size are that paper's; no paper has this network. The four pipelines
enter at sides 7, 14, 28 and 56, and all end at 7. `--config.model.layers_per_block` and `--config.model.growth_rate`
set depth and width. Images are scaled to a short side of 224, and shifted and mirrored, not cropped at random scales.
"""

from paranet_jax.base_config import base_config


def get_config():
  config = base_config('PN4-dddd')
  config.model.image_side = 224
  config.model.stem = '7x7'
  config.model.stem_norm = True
  config.model.entry_pool = 'max3x3'
  config.model.layers_per_block = 6
  config.model.growth_rate = 32
  config.data.name = 'imagenet2012'
  config.train.epochs = 90.0
  config.train.drop_epochs = (30, 60)
  config.train.batch_size = 256
  config.eval.batch_size = 250
  return config
