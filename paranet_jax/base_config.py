"""The base configuration: every field with its default, its unit and its rule. Files in `configs/` change a few fields.

The fields of `model` that belong to one family of networks are in `paranet_jax/models/registry.py`.
"""

import os

from ml_collections import ConfigDict

from paranet_jax.host.errors import UserError
from paranet_jax.host.fields import (
  POSITIVE,
  RATE,
  SHARE,
  Field,
  Fields,
  Rule,
  at_least,
  derived,
  new_config,
  numbers,
  one_of,
  tuple_of,
)
from paranet_jax.models.registry import COMMON, family_names, find_family
from paranet_jax.targets import EXIT_TARGETS, REGIMES

RENAMED = {'train.body_epochs': 'train.backbone_epochs'}
"""Old field names, still accepted on the command line and in a saved configuration."""

_EPOCHS = Rule(lambda value: 0 < value <= 1e6, 'more than 0 and at most 1,000,000')
_TIMES = tuple_of((int, float), 0)
_INT32 = Rule(lambda value: -(2**31) <= value < 2**31, 'an integer of 32 bits')
_INSIDE = Rule(lambda value: 0 < value < 1, 'between 0 and 1')
_DROPS = Rule(
  lambda values: _TIMES.holds(values) and max(values, default=0) <= 1, 'shares from 0 to 1, such as "(0.5,0.75)"'
)

_CLASS_WEIGHTS = Rule(
  lambda value: value in ('none', 'balanced') or all(1e-6 <= weight <= 1e6 for weight in numbers(value) or (0,)),
  'none, balanced, or a number from 0.000001 to 1,000,000 for each class, such as "1,2.5"',
)

FIELDS: Fields = {
  # PN<P>[cut]-<suffix>: the network and its targets, see paranet_jax/targets.py; in other families any name of letters,
  # digits and ._-
  'name': Field(''),
  'seed': Field(0, _INT32),  # Seeds initialization, order of the images and augmentation; an integer of 32 bits.
  # Number of runs, with seeds seed, seed + 1, ..., each in WORKDIR/seed_<seed>; 1: one run, in WORKDIR itself.
  'seeds': Field(1, at_least(1, 10_000)),
  # Folder of a finished run, or file of PyTorch weights, whose backbone (all but the exits) this run starts from; '':
  # drawn from the seed.
  'init_from': Field(''),
  # 'cifar100', 'cifar10', 'digits', 'folder' (of class folders), 'images' (a folder without labels), or a prepared
  # tensorflow-datasets name.
  'data.name': Field('cifar100'),
  # Folder of prepared data sets, or of your images for 'folder' and 'images'; '': ~/tensorflow_datasets. Default:
  # PARANET_DATA_DIR.
  'data.data_dir': Field(''),
  # Number of training images in the held-out split: stratified, never trained on or augmented.
  'data.held_out': Field(0, at_least(0)),
  # Share of the images to test on, of a folder without train/ and test/, or without labels.
  'data.test_fraction': Field(0.2, _INSIDE),
  'data.on_corrupt': Field('refuse', one_of('refuse', 'skip')),  # 'refuse' or 'skip' (and count) an unreadable image.
  # Pixels to which the short side is scaled before the center is cropped to model.image_side; None: to that side.
  'data.short_side': derived(int, at_least(1, 10_000)),
  'data.interpolation': Field('bilinear', one_of('bilinear', 'bicubic')),  # Of scaling: 'bilinear' or 'bicubic'.
  # Pixels of zero padding before the random crop; None: the data set's own.
  'data.crop_padding': derived(int, at_least(0, 10_000)),
  'data.flip': derived(bool),  # Random horizontal flip; None: the data set's own (digits are not mirrored).
  # Read images from their files batch by batch; None: if they decode to 2 * 10^9 bytes or more.
  'data.streaming': derived(bool),
  # Processes that read streamed images; 0: only the training process; None: one per core, at most 16.
  'data.workers': derived(int, at_least(0, 1024)),
  # 'squared_error' or 'kl': loss of an exit that matches another exit's logits.
  'loss.matching': Field('squared_error', one_of('squared_error', 'kl')),
  # Squared error of matching: 'mean' over the classes, or 'half_sum', half their sum (Ba and Caruana 2014).
  'loss.match_scale': Field('mean', one_of('mean', 'half_sum')),
  'loss.match_centered': Field(False),  # Subtract from the logits of an image their mean before the squared error.
  # Exits of a frozen backbone match the mean of the last exit's logits for an image and for its mirror image.
  'loss.match_mirrored': Field(False),
  # Weight of the squared error, as a share of the square, by which exits of copied blocks also match what the last exit
  # of a frozen backbone reads, averaged over height and width; 0: they match its logits alone.
  'loss.match_features': Field(0.0, at_least(0)),
  'loss.match_from_epoch': Field(0.0, at_least(0)),  # Epoch from which exits match others; 0: from the start.
  # What exits that match later learn from before: 'labels' or 'nothing'.
  'loss.match_before': Field('labels', one_of('labels', 'nothing')),
  # Whose exits are matched and distilled from: 'network' (its own, as they train), 'average' (those of the averaged
  # weights, see train.average) or 'run' (those of loss.teacher_run, which do not change).
  'loss.teacher': Field('network', one_of('network', 'average', 'run')),
  'loss.teacher_run': Field(''),  # Folder of a finished run of the same network; '': none.
  'loss.temperature': Field(4.0, POSITIVE),  # T of 'kl' and of distillation (the loss is scaled by T^2).
  # w of both: (1 - w) kl + w cross-entropy, 0 to 1; 0: an exit that learns from exits learns from them alone.
  'loss.hard_label_weight': Field(0.0, SHARE),
  # 'none', or the later trained exits from which an exit learns instead of labels (both, with loss.hard_label_weight):
  # the 'last' one, the 'next' one, or the mean of all 'later' ones; 'all': every exit, the last one too, learns from
  # the last one of loss.teacher.
  'loss.distill': Field('none', one_of('none', 'last', 'next', 'later', 'all')),
  # Scale each parameter's gradient to the mean, instead of the sum, over the exits that use it.
  'loss.gradient_equilibrium': Field(False),
  # CAGrad: how far the gradient of shared parameters may turn toward the exit that gains least, as a share of its
  # length, such as 0.4; 0: it is the sum of the exits' gradients.
  'loss.conflict_averse': Field(0.0, RATE),
  # DFS: share of the channels at an exit that only this exit trains, and later layers read without a gradient, such as
  # 0.5; 0: none.
  'loss.own_channels': Field(0.0, SHARE),
  # L2W without its network: how much more an image weighs in the loss of the exit where it would leave, as a share,
  # such as 0.3; 0: images weigh the same.
  'loss.sample_weight': Field(0.0, RATE),
  'loss.leaving': Field(0.75, POSITIVE),  # How many images leave at an exit, relative to the exit before it.
  'loss.exit_weights': derived(tuple, _TIMES),  # One factor per exit; None: 1 each.
  'loss.label_smoothing': Field(0.0, RATE),  # Share of the label spread over all classes, 0 to less than 1.
  # Weights of the classes, in the order of dataset.json, in every loss with the true label: 'none', 'balanced'
  # (inversely proportional to their training images, 1 on average over these), or a number for each class ('1,2.5').
  'loss.class_weights': Field('none', _CLASS_WEIGHTS),
  'train.epochs': Field(130.0, _EPOCHS),  # Passes over the training images, without the last partial batch.
  'train.max_steps': Field(0, at_least(0)),  # Stop after this many steps, schedule unchanged; 0: after `epochs`.
  # 'joint': all exits; 'disjoint': the last exit, then the others with all that it uses frozen; 'mixed': the last exit,
  # then all; 'exits': all but the last, with all that it uses frozen as `init_from` gives it.
  'train.regime': Field('joint', one_of(*REGIMES)),
  # What 'exits' learn from: the logits of the 'last' exit, which needs no labels, the 'labels', or 'both'.
  'train.exit_targets': Field('last', one_of(*EXIT_TARGETS)),
  # Type in which 'exits' keeps the frozen features, if images are at most mirrored: 'float32' or 'float16'.
  'train.features': Field('float32', one_of('float32', 'float16')),
  # Share of their side by which kept features are shifted at random, at most, up to 0.5: a crop costs a forward pass.
  'train.feature_shift': Field(0.0, Rule(lambda value: 0 <= value <= 0.5, 'from 0 to 0.5')),
  # Epochs in which 'disjoint' and 'mixed' train the last exit alone; None: half of `epochs`.
  'train.backbone_epochs': derived(float, _EPOCHS),
  'train.batch_size': Field(64, at_least(1, 10**7)),  # Images per step, over all devices.
  'train.learning_rate': Field(0.1, POSITIVE),  # Peak of the schedule.
  'train.schedule': Field('step', one_of('step', 'cosine', 'one_cycle', 'constant')),  # Learning rate over the run.
  # When 'step' drops, as shares of `epochs`; the paper's, 50 and 100 of 130.
  'train.drops': Field((50 / 130, 100 / 130), _DROPS),
  'train.drop_epochs': derived(tuple, _TIMES),  # When 'step' drops, in epochs; None: `drops`.
  'train.drop_factor': Field(0.1, POSITIVE),  # Factor by which each drop of 'step' multiplies the learning rate.
  'train.warmup_epochs': Field(0.0, at_least(0)),  # Epochs of linear warmup; 'one_cycle' has its own.
  # 'sgd', 'adamw', or 'muon': orthogonalized updates of kernels, 'sgd' for the rest.
  'train.optimizer': Field('sgd', one_of('sgd', 'adamw', 'muon')),
  'train.momentum': Field(0.9, RATE),  # Momentum of 'sgd' and 'muon', b1 of 'adamw'; 0 to less than 1.
  'train.nesterov': Field(True),  # Nesterov momentum, for all of them (AdamW becomes NAdamW).
  'train.weight_decay': Field(1e-4, at_least(0)),  # Coefficient.
  # Weight decay of 'sgd' as learning rate * coefficient * parameter, apart from its momentum; the others always do.
  'train.decoupled_decay': Field(False),
  'train.norm_bias_factor': Field(1.0, POSITIVE),  # Times the learning rate of the biases of normalization layers.
  # Parameters that decay: 'all', as in DenseNet's code, or only the 'kernels'.
  'train.decay': Field('all', one_of('all', 'kernels')),
  # Decay of a moving average of weights and running statistics, by step, such as 0.999, which is evaluated and saved
  # beside them; 0: none.
  'train.average': Field(0.0, RATE),
  'train.clip_norm': Field(0.0, at_least(0)),  # Maximum global gradient norm; 0: no clipping.
  'train.accumulate_steps': Field(1, at_least(1, 10**6)),  # Steps whose gradients are averaged into one update.
  # Side, in pixels, of the square cut out of every training image; 0: none.
  'train.cutout': Field(0, at_least(0, 10_000)),
  # alpha of Beta(alpha, alpha), the distribution of the weights that blend two images; 0: no blending.
  'train.mixup': Field(0.0, at_least(0)),
  # alpha of Beta(alpha, alpha) of CutMix: a box of another image in each image, with labels by area; 0: none.
  'train.cutmix': Field(0.0, at_least(0)),
  'train.alternate_flip': Field(False),  # Mirror each image in every other epoch, instead of at random.
  # Operations on training images: 'none', 'rand' (RandAugment) or 'trivial' (TrivialAugment, wide).
  'train.auto_augment': Field('none', one_of('none', 'rand', 'trivial')),
  'train.rand_augment_operations': Field(2, at_least(1, 10)),  # Operations on an image by 'rand'.
  'train.rand_augment_magnitude': Field(9, at_least(0, 30)),  # Their magnitude, from 0 to 30.
  'train.devices': Field(0, at_least(0, 10**6)),  # Devices to train on, over all processes; 0: all devices.
  'eval.every_epochs': Field(1.0, _EPOCHS),  # Epochs between evaluations; the last step is always evaluated.
  'eval.batch_size': Field(500, at_least(1, 10**7)),  # Images per batch; changes speed and memory, not the result.
  # Steps between checkpoints; the end of a run and a stop by a signal are always saved.
  'checkpoint.every_steps': Field(500, at_least(1)),
  'checkpoint.keep': Field(2, at_least(1)),  # Number of latest checkpoints to keep.
  'checkpoint.keep_every_epochs': Field(0.0, at_least(0)),  # Epochs between checkpoints that are kept forever; 0: none.
  # 'none', 'accuracy', 'balanced_accuracy', 'top5', 'loss' or 'nll' of the last exit that trains to the end, on the
  # held-out split: also keep the best checkpoint by it; every evaluation that may be the best then saves one.
  'checkpoint.keep_best': Field('none', one_of('none', 'accuracy', 'balanced_accuracy', 'top5', 'loss', 'nll')),
  'log.every_steps': Field(20, at_least(1)),  # Steps between training lines in metrics.jsonl and on the terminal.
}
"""Every field but those of `model`."""


def base_config(name: str = 'PN3-ddd', family: str = 'paranet') -> ConfigDict:
  """The paper's training of `name` on CIFAR-100 (paper, section 4; DenseNet-BC where it is silent).

  Args:
    name: for a ParaNet, the network and the targets of its exits; in other families, only the name of the run.
    family: family of networks (see `models/registry.py`).

  A field that is None takes a value derived from the other fields. The configuration is locked: misspelling a field is
  an error.

  Raises:
    UserError: the family does not exist.
  """
  config = new_config(fields_of(family))
  config.name, config.model.family = name, family
  config.data.data_dir = os.environ.get('PARANET_DATA_DIR', '')
  return config.lock()


def fields_of(family: str) -> Fields:
  """Every field of a configuration with a network of this family.

  Raises:
    UserError: the family does not exist.
  """
  found = find_family(family)
  if found is None:
    raise UserError(f'family of base_config must be one of {", ".join(family_names())}, found {family!r}; fix --config')
  return FIELDS | {f'model.{name}': field for name, field in (COMMON | found.fields).items()}


def family_of(config: ConfigDict | dict) -> str:
  """The family whose fields a configuration should have; 'paranet' if it names no known family."""
  model = config.get('model')
  found = model.get('family') if isinstance(model, ConfigDict | dict) else None
  return found if isinstance(found, str) and find_family(found) else 'paranet'


def field_names(config: ConfigDict | dict, prefix: str = '') -> list[str]:
  """Names of a configuration's fields; a field of a section is `section.field`."""
  names = []
  for key, value in config.items():
    section = isinstance(value, ConfigDict | dict)
    names += field_names(value, f'{prefix}{key}.') if section else [prefix + key]
  return names
