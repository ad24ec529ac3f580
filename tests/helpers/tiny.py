"""Networks and images small enough for tests, made without compiling anything."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from paranet_jax.base_config import base_config
from paranet_jax.costs import abstract_variables
from paranet_jax.models.paranet import ParaNet
from paranet_jax.models.staged import StagedModel
from paranet_jax.steps import Objective, Preprocessing, TrainState
from paranet_jax.targets import parse_name

NUM_CLASSES = 3
SIDE = 8

# The fields of a small network of each other family.
FAMILIES = {
  'densenet': {'depth': 10, 'growth_rate': 2, 'image_side': 8},
  'resnet': {'depth': 8, 'image_side': 8},
  'msdnet': {
    **{'num_blocks': 2, 'base': 1, 'step': 1, 'initial_channels': 2, 'image_side': 8},
    **{'growth_factors': (1, 2), 'bottleneck_factors': (1, 2)},
  },
  'ranet': {
    **{'scales': (1, 2), 'growth_factors': (2, 1), 'bottleneck_factors': (2, 1), 'base_blocks': 1, 'block_step': 1},
    **{'step': 1, 'initial_channels': 2, 'growth_rate': 4, 'image_side': 8},
  },
  'fractalnet': {'columns': 2, 'widths': (2, 3), 'image_side': 8},
  'adopted': {'arch': 'cifar_resnet20', 'image_side': 8},
}

network = partial(ParaNet, num_classes=NUM_CLASSES, layers_per_block=1, growth_rate=2, bn_size=2, image_side=SIDE)


def small(family: str, **fields) -> ConfigDict:
  """The configuration of a small network of a family."""
  config = base_config('small', family)
  config.model.update(FAMILIES[family] | fields)
  return config


def named(name: str, **fields) -> ParaNet:
  """The small network of a name."""
  parsed = parse_name(name)
  return network(parsed.num_pipelines, cascade=parsed.cascade, **fields)


def dense(exits: int, dtype=jnp.float32) -> StagedModel:
  """Dense layers, each with an exit: what compiles fastest."""
  layers = [nn.Dense(4, dtype=dtype) for _ in range(exits)]
  return StagedModel(layers, exits=tuple(range(1, exits + 1)), num_classes=NUM_CLASSES, dtype=dtype)


def variables(model: ParaNet, seed: int = 0) -> dict:
  """Random values for every parameter and statistic, so that none hides as a 0 or a 1."""
  shape = (model.image_side, model.image_side, model.channels)
  return filled(abstract_variables(model, shape), seed)


def filled(shapes: dict, seed: int = 0) -> dict:
  """The same for variables of these shapes."""
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    if path[-1].key in ('var', 'scale'):
      return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
    return rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def state(model: ParaNet, optimizer, seed: int = 0, step: int = 0) -> TrainState:
  """A train state with random parameters, the same for every seed. What optimizers keep is 0 before the first step."""
  values = jax.device_put(variables(model))
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(optimizer.init, values['params']))
  opt_state = jax.device_put(zeros)
  return TrainState(jnp.int32(step), jnp.int32(seed), values['params'], values['batch_stats'], opt_state)


def images(number: int, model: ParaNet, seed: int = 0) -> np.ndarray:
  """uint8 noise [number, S, S, channels]."""
  shape = (number, model.image_side, model.image_side, model.channels)
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def labels(number: int, seed: int = 0) -> np.ndarray:
  """int32 [number]."""
  return np.random.default_rng(seed).integers(0, NUM_CLASSES, number, dtype=np.int32)


def objective(name: str, **options) -> Objective:
  """The objective of a name, every exit with weight 1 unless said."""
  targets = parse_name(name).targets
  return Objective(targets, **({'exit_weights': (1.0,) * len(targets)} | options))


AUGMENTED = Preprocessing((0.5, 0.4, 0.6), (0.25, 0.2, 0.3), crop_padding=2, flip=True)
PLAIN = AUGMENTED._replace(crop_padding=0, flip=False)
