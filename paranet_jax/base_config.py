"""The base configuration: every field, its default and its unit. Files in `configs/` change a few of them."""

import os

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from paranet_jax.host.errors import UserError


def base_config(name: str = 'PN3-ddd', family: str = 'paranet') -> ConfigDict:
  """The paper's training of `name` on CIFAR-100 (paper, section 4; DenseNet-BC where it is silent).

  Args:
    name: of a ParaNet, what it is and what its exits learn from; of another family, what the run is called.
    family: of networks, one of FAMILIES.

  A field that says None takes a derived value, which follows what else is set. The configuration is locked: a
  misspelt field is an error.

  Raises:
    UserError: there is no such family.
  """
  if family not in FAMILIES:
    raise UserError(f'family of base_config must be one of {", ".join(FAMILIES)}, found {family!r}; mend --config')
  config = ConfigDict()
  # PN<P>[cut]-<suffix>: network and targets, see paranet_jax/targets.py; of other families free: letters, digits, ._-
  config.name = name
  config.seed = 0  # Of initialisation, order of the images and augmentation; an integer of 32 bits.
  config.seeds = 1  # Runs with the seeds seed, seed + 1, ..., each in WORKDIR/seed_<seed>; 1: one, in WORKDIR itself.
  # Folder of a finished run whose body (all but the exits) this one starts from; '': drawn from the seed.
  config.init_from = ''

  config.model = model = FAMILIES[family]()
  model.family = family  # One of FAMILIES; it says which other fields `model` has, so it is not changed afterwards.
  model.num_classes = placeholder(int)  # Width of an exit; None: the data set's number of classes.
  model.image_side = 32  # Pixels; images of another size are resized.
  model.channels = 3  # 3 (RGB) or 1 (grey).
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
  # Images stay in their files and are read a batch at a time; None: from 2 * 10^9 bytes of decoded images on.
  data.streaming = placeholder(bool)
  data.workers = placeholder(int)  # Processes that read them, 0: this one alone; None: one a core, at most 16.

  config.loss = loss = ConfigDict()
  loss.matching = 'squared_error'  # 'squared_error' or 'kl': what an exit that matches another minimises.
  loss.temperature = 4.0  # T of 'kl' and of distillation (the loss is scaled by T^2).
  loss.hard_label_weight = 0.0  # w of both: (1 - w) kl + w cross-entropy, 0 to 1.
  # 'none', 'last', 'next' or 'later': the trained exits after it from which one with labels also learns, by their mean.
  loss.distill = 'none'
  loss.gradient_equilibrium = False  # A parameter's gradient: the mean, not the sum, of the exits' that use it.
  loss.exit_weights = placeholder(tuple)  # One factor an exit; None: 1 each.
  loss.label_smoothing = 0.0  # Share of the label spread over all classes, 0 to 1.

  config.train = train = ConfigDict()
  train.epochs = 130.0  # Passes over the training images, each without the last partial batch.
  train.max_steps = 0  # Stop after this many steps, schedule unchanged; 0: after `epochs`.
  # 'joint': all exits; 'disjoint': the last one, then the others, all it uses frozen; 'mixed': the last one, then all.
  train.regime = 'joint'
  train.body_epochs = placeholder(float)  # Of the last exit alone, of 'disjoint' and 'mixed'; None: half of `epochs`.
  train.batch_size = 64  # Images a step, over all devices together.
  train.learning_rate = 0.1  # The highest of the schedule.
  train.schedule = 'step'  # 'step', 'cosine', 'one_cycle' or 'constant'.
  train.drops = (50 / 130, 100 / 130)  # Of 'step', as shares of `epochs`; the paper's, 50 and 100 of 130.
  train.drop_epochs = placeholder(tuple)  # Of 'step', in epochs; None: `drops`.
  train.drop_factor = 0.1  # Of 'step': what each drop multiplies the learning rate with.
  train.warmup_epochs = 0.0  # Linear warm-up, in epochs.
  train.optimizer = 'sgd'  # 'sgd' or 'adamw'.
  train.momentum = 0.9  # Of 'sgd'; b1 of 'adamw'.
  train.nesterov = True  # Nesterov momentum, of both (AdamW is NAdamW then).
  train.weight_decay = 1e-4  # Coefficient.
  train.decay = 'all'  # 'all' parameters decay, as in DenseNet's code, or the 'kernels' alone.
  train.clip_norm = 0.0  # Largest global norm of the gradient; 0: not clipped.
  train.accumulate_steps = 1  # Steps whose gradients are averaged into one update.
  train.cutout = 0  # Pixels, side of a square cut out of every training image; 0: none.
  train.mixup = 0.0  # alpha of Beta(alpha, alpha), the shares in which two images are blended; 0: not blended.
  train.devices = 0  # Devices to train on, of all processes together; 0: all there are.

  config.eval = evaluation = ConfigDict()
  evaluation.every_epochs = 1.0  # Epochs between evaluations; the last step is always evaluated.
  evaluation.batch_size = 500  # Images a batch; changes speed and memory, not the result.

  config.checkpoint = checkpoint = ConfigDict()
  checkpoint.every_steps = 500  # Steps between checkpoints; the end of a run and a stop by signal are always saved.
  checkpoint.keep = 2  # Latest checkpoints kept.
  checkpoint.keep_every_epochs = 0.0  # Epochs between checkpoints that are kept for good; 0: none.
  # 'none', 'accuracy', 'top5', 'loss' or 'nll': of the last trained exit on the images held out, by which the best
  # checkpoint is kept too; every evaluation ends with a checkpoint then.
  checkpoint.keep_best = 'none'

  config.log = log = ConfigDict()
  log.every_steps = 20  # Steps between training lines in metrics.jsonl and on the terminal.
  return config.lock()


def _paranet() -> ConfigDict:
  model = ConfigDict()
  model.layers_per_block = 16  # n, dense layers in every block: 16 is L = 100.
  model.growth_rate = 12  # k, channels that a dense layer adds.
  model.bn_size = 4  # Bottleneck width, in multiples of growth_rate.
  model.blocks = placeholder(tuple)  # Dense blocks of each pipeline; None: pipeline p has p.
  model.halvings = placeholder(tuple)  # 2x2 poolings at the entry of each pipeline; None: P + 1 - p.
  # Receiving blocks 'pipeline.block', separated by commas ('2.2,3.3'); None: all of them, or none if the name says cut.
  model.cascade = placeholder(str)
  model.stem_norm = False  # Batch normalization and ReLU after the stem's convolution.
  model.stem = '3x3'  # Convolution of the image: '3x3', or '7x7', which halves it once more by its stride.
  model.entry_pool = 'max'  # 'max' or 'avg' (2x2) or 'max3x3' (overlapping): how a pipeline's entry halves.
  model.entry_order = 'stem_first'  # 'stem_first' or 'pool_first': convolve the image before or after halving it.
  model.dropout = 0.0  # Rate after each convolution but a stem's, 0 to less than 1.
  # Dense layers compiled as one loop in training: speed, memory and compile time, not the function; None: measured
  # default of the backend.
  model.scan_layers = placeholder(int)
  return model


def _densenet() -> ConfigDict:
  model = ConfigDict()
  model.depth = 100  # L, layers with weights: 6 n + 4 for n dense layers a block, 3 n + 4 without bottlenecks.
  model.growth_rate = 12  # k, channels that a dense layer adds.
  model.compression = 0.5  # theta, share of the channels that a transition keeps: more than 0, at most 1.
  model.bottleneck = True  # Dense layers begin with a 1x1 convolution, the B of DenseNet-BC.
  model.bn_size = 4  # Width of that convolution, in multiples of growth_rate.
  # 'last', 'blocks' (after each), or the layers of every block after which an exit hangs besides the last ('6,12').
  model.exits = 'last'
  model.dropout = 0.0  # Rate after each convolution but the first, 0 to less than 1.
  model.scan_layers = placeholder(int)  # As in a ParaNet; None: measured default of the backend.
  return model


def _resnet() -> ConfigDict:
  model = ConfigDict()
  model.depth = 110  # Layers with weights: 6 n + 2 for n residual blocks a stage, 9 n + 2 if they are bottlenecks.
  model.block = 'basic'  # 'basic', 'preactivation' or 'bottleneck' (of pre-activation too).
  # 'last', 'stages' (after each), or the blocks of every stage after which an exit hangs besides the last ('4,8').
  model.exits = 'last'
  return model


def _msdnet() -> ConfigDict:
  model = ConfigDict()
  model.num_blocks = 7  # Blocks of layers, with an exit after each.
  model.base = 4  # Layers of the first block.
  model.step_mode = 'even'  # 'even' or 'lin_grow': whether later blocks have `step` layers or grow by as many.
  model.step = 2  # Layers.
  model.initial_channels = 16  # Of layer 0 at the finest scale; at the others times their growth factor.
  model.growth_rate = 6  # Channels that a layer adds at the finest scale; at the others times their growth factor.
  model.growth_factors = (1, 2, 4)  # One a scale, finest first.
  model.bottleneck_factors = (1, 2, 4)  # One a scale: width of a 1x1 convolution, in multiples of what its path adds.
  model.reduction = 0.5  # Share of the channels that a transition keeps: more than 0, at most 1.
  return model


def _fractalnet() -> ConfigDict:
  model = ConfigDict()
  model.columns = 3  # C: blocks have 2^(C - 1) rows; the exits are the columns alone and the whole network.
  model.widths = (64, 128, 256, 512, 512)  # Channels of each block.
  model.block_dropout = ()  # Rate after each block's convolutions, 0 to less than 1; (): none.
  model.local_drop_path = 0.15  # Rate at which a join drops an input, in a step of local drop-path.
  model.global_drop_path = 0.5  # Share of the steps that keep one column instead.
  return model


FAMILIES = {
  'paranet': _paranet,
  'densenet': _densenet,
  'resnet': _resnet,
  'msdnet': _msdnet,
  'fractalnet': _fractalnet,
}
"""The fields of `model` that each family has; the networks are in paranet_jax/models/registry.py."""


def family_of(config: ConfigDict | dict) -> str:
  """The family whose fields a configuration should have; a ParaNet's, if it names none of those here."""
  model = config.get('model')
  found = model.get('family') if isinstance(model, ConfigDict | dict) else None
  return found if found in FAMILIES else 'paranet'


def field_names(config: ConfigDict | dict, prefix: str = '') -> list[str]:
  """The fields of a configuration, those of its sections as `section.field`."""
  names = []
  for key, value in config.items():
    section = isinstance(value, ConfigDict | dict)
    names += field_names(value, f'{prefix}{key}.') if section else [prefix + key]
  return names
