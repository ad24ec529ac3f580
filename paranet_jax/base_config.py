"""The base configuration: every field, its default and its unit. Files in `configs/` change a few of them."""

import os

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def base_config(name: str = 'PN3-ddd') -> ConfigDict:
  """The paper's training of `name` on CIFAR-100 (paper, section 4; DenseNet-BC where it is silent).

  A field that says None takes a derived value, which follows what else is set. The configuration is locked: a
  misspelt field is an error.
  """
  config = ConfigDict()
  config.name = name  # PN<P>[cut]-<suffix>: network and targets, see paranet_jax/targets.py.
  config.seed = 0  # Of initialisation, order of the images and augmentation; an integer of 32 bits.

  config.model = model = ConfigDict()
  model.layers_per_block = 16  # n, dense layers in every block: 16 is L = 100.
  model.growth_rate = 12  # k, channels that a dense layer adds.
  model.bn_size = 4  # Bottleneck width, in multiples of growth_rate.
  model.blocks = placeholder(tuple)  # Dense blocks of each pipeline; None: pipeline p has p.
  model.halvings = placeholder(tuple)  # 2x2 poolings at the entry of each pipeline; None: P + 1 - p.
  # Receiving blocks 'pipeline.block', separated by commas ('2.2,3.3'); None: all of them, or none if the name says cut.
  model.cascade = placeholder(str)
  model.stem_norm = False  # Batch normalization and ReLU after the stem's convolution.
  model.entry_pool = 'max'  # 'max' or 'avg': how a pipeline's entry halves.
  model.entry_order = 'stem_first'  # 'stem_first' or 'pool_first': convolve the image before or after halving it.
  model.num_classes = placeholder(int)  # Width of an exit; None: the data set's number of classes.
  model.image_side = 32  # Pixels; images of another size are resized.
  model.channels = 3  # 3 (RGB) or 1 (grey).
  # Dense layers compiled as one loop in training: speed, memory and compile time, not the function; None: measured
  # default of the backend.
  model.scan_layers = placeholder(int)
  model.dtype = 'float32'  # 'float32' or 'bfloat16', of the computation; parameters and statistics stay float32.

  config.data = data = ConfigDict()
  data.name = 'cifar100'  # 'cifar100', 'cifar10', 'digits', 'folder', or a prepared tensorflow-datasets name.
  # Folder of prepared data sets, or of your images for 'folder'; '': ~/tensorflow_datasets.
  data.data_dir = os.environ.get('PARANET_DATA_DIR', '')
  data.held_out = 0  # Training images held out, stratified, never trained on or augmented.
  data.test_fraction = 0.2  # Of an image folder without train/ and test/: share of the images to test on.
  data.on_corrupt = 'refuse'  # 'refuse' or 'skip' (and count) an image file that cannot be read.
  data.crop_padding = placeholder(int)  # Pixels, zero padding before the random crop; None: the data set's own.
  data.flip = placeholder(bool)  # Random horizontal flip; None: the data set's own (digits are not mirrored).

  config.loss = loss = ConfigDict()
  loss.matching = 'squared_error'  # 'squared_error' or 'kl': what an exit that matches another minimises.
  loss.temperature = 4.0  # T of 'kl' (the loss is scaled by T^2).
  loss.hard_label_weight = 0.0  # w of 'kl': (1 - w) kl + w cross-entropy, 0 to 1.
  loss.exit_weights = placeholder(tuple)  # One factor an exit; None: 1 each.
  loss.label_smoothing = 0.0  # Share of the label spread over all classes, 0 to 1.

  config.train = train = ConfigDict()
  train.epochs = 130.0  # Passes over the training images, each without the last partial batch.
  train.max_steps = 0  # Stop after this many steps, schedule unchanged; 0: after `epochs`.
  train.batch_size = 64  # Images a step, over all devices together.
  train.learning_rate = 0.1  # The highest of the schedule.
  train.schedule = 'step'  # 'step', 'cosine', 'one_cycle' or 'constant'.
  train.drop_epochs = placeholder(tuple)  # Of 'step', in epochs; None: the paper's 50 and 100 of 130, scaled.
  train.drop_factor = 0.1  # Of 'step': what each drop multiplies the learning rate with.
  train.warmup_epochs = 0.0  # Linear warm-up, in epochs.
  train.optimizer = 'sgd'  # 'sgd' or 'adamw'.
  train.momentum = 0.9  # Of 'sgd'; b1 of 'adamw'.
  train.nesterov = True  # Nesterov momentum, of both (AdamW is NAdamW then).
  train.weight_decay = 1e-4  # Coefficient.
  train.decay = 'all'  # 'all' parameters decay, as in DenseNet's code, or the 'kernels' alone.
  train.clip_norm = 0.0  # Largest global norm of the gradient; 0: not clipped.
  train.accumulate_steps = 1  # Steps whose gradients are averaged into one update.
  train.devices = 0  # Devices to train on; 0: all there are.

  config.eval = evaluation = ConfigDict()
  evaluation.every_epochs = 1.0  # Epochs between evaluations; the last step is always evaluated.
  evaluation.batch_size = 500  # Images a batch; changes speed and memory, not the result.

  config.checkpoint = checkpoint = ConfigDict()
  checkpoint.every_steps = 500  # Steps between checkpoints; the end of a run and a stop by signal are always saved.
  checkpoint.keep = 2  # Latest checkpoints kept.

  config.log = log = ConfigDict()
  log.every_steps = 20  # Steps between training lines in metrics.jsonl and on the terminal.
  return config.lock()


def field_names(config: ConfigDict | dict, prefix: str = '') -> list[str]:
  """The fields of a configuration, those of its sections as `section.field`."""
  names = []
  for key, value in config.items():
    section = isinstance(value, ConfigDict | dict)
    names += field_names(value, f'{prefix}{key}.') if section else [prefix + key]
  return names
