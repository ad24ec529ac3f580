"""What is measured: PN3-ddd, its weights, noise for images, and the package's own step and forward pass on them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.linen_paranet import LinenParaNet
from paranet_jax.base_config import base_config
from paranet_jax.config import build_model
from paranet_jax.costs import abstract_variables
from paranet_jax.devices import place_order, replicated, run_on
from paranet_jax.models.paranet import ParaNet
from paranet_jax.optim import make_optimizer, make_schedule
from paranet_jax.steps import Objective, Preprocessing, TrainState, make_train_step, zero_totals
from paranet_jax.targets import parse_name

NAME = 'PN3-ddd'
NUM_CLASSES = 100
BATCHES = 4
"""Batches that the noise on the device holds, taken in turn."""
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-4
TORCH_SGD = {'lr': LEARNING_RATE, 'momentum': MOMENTUM, 'weight_decay': WEIGHT_DECAY, 'nesterov': True}

TARGETS = parse_name(NAME).targets
OBJECTIVE = Objective(TARGETS, (1.0, 1.0, 1.0), 'squared_error', 1.0, 0.0, 0.0)
CIFAR_100 = Preprocessing(
  (0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047), crop_padding=4, flip=True
)


@dataclasses.dataclass(frozen=True)
class Size:
  """The size of the network and of a batch."""

  layers: int = 16
  growth_rate: int = 12
  side: int = 32
  batch: int = 64

  HELP: ClassVar[dict[str, str]] = {
    'layers': 'dense layers a block',
    'growth_rate': 'k, channels that a layer adds',
    'side': 'of the images, pixels',
    'batch': 'images a step',
  }

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C)."""
    return (self.side, self.side, 3)


def our_network(size: Size, dtype: str = 'float32') -> ParaNet:
  """The package's PN3; `dtype` is a value of `model.dtype`."""
  config = base_config(NAME)
  config.model.dtype = dtype
  config.model.layers_per_block = size.layers
  config.model.growth_rate = size.growth_rate
  config.model.image_side = size.side
  return build_model(config, NUM_CLASSES)


def linen_network(size: Size) -> LinenParaNet:
  """The straightforward PN3."""
  return LinenParaNet(3, NUM_CLASSES, size.layers, size.growth_rate)


def random_variables(size: Size, seed: int = 0) -> dict[str, Any]:
  """Parameters and running statistics of either, all of them random, as a tree of float32 numpy arrays."""
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    if path[-1].key == 'kernel':
      return rng.normal(0, math.sqrt(2 / math.prod(leaf.shape[:-1])), leaf.shape).astype(np.float32)
    if path[-1].key in ('scale', 'var'):
      return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    return rng.normal(0, 0.1, leaf.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(fill, abstract_variables(our_network(size), size.image_shape))


def random_images(size: Size, number: int, seed: int = 1) -> np.ndarray:
  """Noise with mean 0 and variance 1, as normalized images have: float32 [number, S, S, 3]."""
  return np.random.default_rng(seed).normal(size=(number, *size.image_shape)).astype(np.float32)


def random_labels(number: int) -> np.ndarray:
  """int32 [number]."""
  return np.random.default_rng(2).integers(0, NUM_CLASSES, number, np.int32)


def optimizer() -> Any:
  """DenseNet's SGD, at a constant learning rate."""
  schedule = make_schedule('constant', LEARNING_RATE, epochs=1, updates_per_epoch=1)
  return make_optimizer('sgd', schedule, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def random_state(size: Size) -> TrainState:
  """The state that starts from the random variables."""

  @jax.jit
  def state(variables):
    params = variables['params']
    return TrainState(jnp.int32(0), jnp.int32(0), params, variables['batch_stats'], optimizer().init(params))

  return state(random_variables(size))


def compiled_step(model: Any, devices: Sequence[jax.Device]) -> Callable:
  """The package's training step, as a run makes it: step(state, totals, images, labels, order) -> (state, totals)."""
  return run_on(list(devices), partial(make_train_step, model, optimizer(), OBJECTIVE, CIFAR_100))


def step_arguments(size: Size, state: Any) -> tuple:
  """The arguments of a step: images are uint8 noise, labels random, order is int32 [steps, B]."""
  number = BATCHES * size.batch
  images = np.random.default_rng(1).integers(0, 256, (number, *size.image_shape), np.uint8)
  order = np.arange(number, dtype=np.int32).reshape(BATCHES, size.batch)
  return state, zero_totals(TARGETS), images, random_labels(number), order


def our_training_step(model: Any, size: Size, state: Any, devices: Sequence[jax.Device]) -> Callable[[], None]:
  """A function that trains for one step more and waits for its end.

  It takes the batch out of the uint8 images, normalizes, crops and mirrors it, and counts the metrics.
  """
  step, devices = compiled_step(model, devices), list(devices)
  *whole, order = step_arguments(size, state)
  state, totals, images, labels = jax.device_put(whole, replicated(devices))
  order = place_order(order, devices)

  def run():
    nonlocal state, totals
    state, totals = jax.block_until_ready(step(state, totals, images, labels, order))

  return run


def our_forward(model: ParaNet, variables: dict[str, Any], exits: Sequence[int]) -> Callable[[Any], list[jax.Array]]:
  """The package's forward pass in inference mode: normalized images [B, S, S, 3] to the logits of these exits."""
  variables = jax.device_put(variables)  # Constants of the program, as in `EarlyExit`.
  return _waiting(jax.jit(lambda images: model.apply(variables, images, exits=tuple(exits))))


def applied_forward(model: Any, variables: dict[str, Any], exits: Sequence[int]) -> Callable[[Any], list[jax.Array]]:
  """The same by the model's own `apply`, compiled."""
  apply = jax.jit(lambda variables, images: model.apply(variables, images, exits=tuple(exits)))
  variables = jax.device_put(variables)
  return _waiting(lambda images: apply(variables, images))


def _waiting(apply: Callable[[Any], list[Any]]) -> Callable[[Any], list[jax.Array]]:
  def forward(images):
    return [logits for logits in jax.block_until_ready(apply(images)) if logits is not None]

  return forward
