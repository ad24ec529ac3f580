"""The train state, the training step and the evaluation of one exit, as pure functions."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jaxtyping import Float, Int32, Key, UInt8

from paranet_jax.costs import abstract_variables
from paranet_jax.data.augment import augment, image_keys, mixup, normalize
from paranet_jax.losses import NO_TEACHERS, cross_entropy, exit_losses, label_weights, total_loss
from paranet_jax.targets import LABELS, Targets, trained_exits

_MODEL_STREAM = 3  # Separates these random numbers from those of shuffling and augmentation.


@struct.dataclass
class TrainState:
  """Everything that a run needs to resume: `step` (steps done) and `seed`, both int32 scalars, and the trees."""

  step: jax.Array
  seed: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any


class Preprocessing(NamedTuple):
  """How uint8 images become the network's input: per-channel `mean` and `std` in 0..1, and training augmentation.

  `crop_padding` and `cutout` are in pixels, `mixup` is alpha; 0 turns each off.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  crop_padding: int
  flip: bool
  cutout: int = 0
  mixup: float = 0.0


class Objective(NamedTuple):
  """The loss (see `losses.exit_losses`)."""

  targets: Targets
  exit_weights: Sequence[float]
  matching: str = 'squared_error'
  temperature: float = 1.0
  hard_label_weight: float = 0.0
  label_smoothing: float = 0.0
  teachers: Mapping[int, Sequence[int]] = NO_TEACHERS
  class_weights: Sequence[float] | None = None


def init_state(
  model: Any,
  optimizer: optax.GradientTransformation,
  seed: int,
  image_shape: tuple[int, int, int],
  frozen: Collection[tuple[str, ...]] = (),
) -> TrainState:
  """Makes a fresh state.

  A model that draws its own variables (`model.initial_variables(shapes, seed)`) needs no compilation; otherwise its
  `init` is compiled as one program.

  Args:
    image_shape: (H, W, C).
    frozen: paths of the variables that the optimizer has no state for.
  """
  if hasattr(model, 'initial_variables'):
    variables = jax.device_put(model.initial_variables(abstract_variables(model, image_shape), seed))
  else:
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *image_shape)))
  params = variables['params']
  opt_state = jax.jit(optimizer.init)(learning(params, frozen) if frozen else params)
  return TrainState(jnp.int32(0), jnp.int32(seed), params, variables.get('batch_stats', {}), opt_state)


def learning(params: Any, frozen: Collection[tuple[str, ...]]) -> dict[str, Any]:
  """The parameters whose paths, starting at the collection, are not frozen."""
  leaves = flatten_dict(dict(params))
  return unflatten_dict({path: leaf for path, leaf in leaves.items() if ('params', *path) not in frozen})


def make_train_step(
  model: Any,
  optimizer: optax.GradientTransformation,
  objective: Objective,
  preprocessing: Preprocessing,
  axis_name: str | None = None,
  *,
  frozen: Collection[tuple[str, ...]] = (),
  users: Any = None,
) -> Callable:
  """Makes the body of a training step for one device, or for each device of `axis_name`.

  Args:
    frozen: paths, starting at the collection, of the parameters and running statistics that do not change. Their layers
      still use the batch's statistics, as in training.
    users: a tree like the parameters with the number of trained exits that use each one: gradients become means over
      those exits. Since a gradient is linear in the contribution of each exit, this equals scaling the gradient at
      every tensor that exits share (gradient equilibrium, Li et al. 2019). None: gradients are sums.

  Returns:
    step(state, totals, images, labels, order) -> (state, totals):
      images, labels: the whole training set, uint8 [N, H, W, C] and int32 [N], or this device's share of the batch;
      order: int32 [steps per epoch, b], the indices of this device's share of every batch of this epoch;
      totals: {metric: float32 scalar}, to which this step's metrics are added.
    Gradients, statistics and metrics are those of the global batch.
  """
  model = model.clone(axis_name=axis_name)
  exits = computed_exits(objective)
  options = objective._asdict()
  exit_weights = options.pop('exit_weights')

  def loss_fn(params, batch_stats, images, labels, rngs):
    variables = {'params': params, 'batch_stats': batch_stats}
    if frozen:
      variables = _restored(variables, jax.lax.stop_gradient(variables), frozen)
    logits, updated = model.apply(variables, images, train=True, exits=exits, mutable=['batch_stats'], rngs=rngs)
    losses = exit_losses(logits, labels, axis_name=axis_name, **options)
    loss = total_loss(losses, exit_weights)
    return loss, (updated.get('batch_stats', {}), train_metrics(logits, labels, losses, loss))

  def train_step(state, totals, images, labels, order):
    steps_per_epoch, local_size = order.shape
    epoch, step = state.step // steps_per_epoch, state.step % steps_per_epoch
    first = jax.lax.axis_index(axis_name) * local_size if axis_name else 0
    indices = order[step]
    keys = image_keys(state.seed, epoch, step, first + jnp.arange(local_size))
    batch = augmented(keys, images[indices], labels[indices], preprocessing, model.num_classes, axis_name)
    gradients, (batch_stats, metrics) = jax.grad(loss_fn, has_aux=True)(
      state.params, state.batch_stats, *batch, model_rngs(model, state.seed, state.step)
    )
    if axis_name:
      gradients, metrics = jax.lax.pmean((gradients, metrics), axis_name)
    if users is not None:
      gradients = jax.tree.map(lambda gradient, number: gradient / max(number, 1), gradients, users)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    variables = {'params': optax.apply_updates(state.params, updates), 'batch_stats': batch_stats}
    before = {'params': state.params, 'batch_stats': state.batch_stats}
    totals = jax.tree.map(jnp.add, totals, metrics)
    return state.replace(step=state.step + 1, opt_state=opt_state, **_restored(variables, before, frozen)), totals

  return train_step


def augmented(
  keys: Key[Array, ' B'],
  images: UInt8[Array, 'B H W C'],
  labels: Int32[Array, ' B'],
  preprocessing: Preprocessing,
  num_classes: int,
  axis_name: str | None = None,
) -> tuple[Float[Array, 'B H W C'], Array]:
  """Augments a training batch, or a device's share of it.

  Args:
    keys: from `image_keys`.
    axis_name: as in `make_train_step`.

  Returns:
    The images, and the labels or, if blended, the share of each class [B, num_classes].
  """
  images = normalize(images, preprocessing.mean, preprocessing.std)
  images = augment(
    keys, images, crop_padding=preprocessing.crop_padding, flip=preprocessing.flip, cutout=preprocessing.cutout
  )
  if not preprocessing.mixup:
    return images, labels
  one_hot = jax.nn.one_hot(labels, num_classes)
  return mixup(keys, images, one_hot, alpha=preprocessing.mixup, axis_name=axis_name)


def computed_exits(objective: Objective) -> tuple[int, ...]:
  """The trained exits and the exits that they learn from."""
  trained = trained_exits(objective.targets)
  sources = {source for number in trained for source in objective.teachers.get(number, ())}
  return tuple(sorted({*trained, *sources, *(objective.targets[number - 1] for number in trained)} - {LABELS}))


def _restored(variables: Any, before: Any, paths: Collection[tuple[str, ...]]) -> Any:
  """The variables, with those at `paths` reset to `before`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, new, old: old if tuple(key.key for key in path) in paths else new, variables, before
  )


def model_rngs(model: Any, seed: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
  """The random keys of one training step, one for each of the model's `rng_names`, the same on every device."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _MODEL_STREAM), step)
  return {name: jax.random.fold_in(key, number) for number, name in enumerate(getattr(model, 'rng_names', ()))}


def train_metrics(logits: Sequence, labels: jax.Array, losses: dict[int, jax.Array], loss: jax.Array) -> dict:
  """The values of a training line: the total loss, and the loss, cross-entropy and accuracy of each exit.

  With blended labels, float [B, classes], the accuracy is the share of the predicted class.
  """
  metrics = {'loss': loss}
  for number, own in losses.items():
    exit_logits = logits[number - 1]
    metrics[f'exit_{number}/loss'] = own
    metrics[f'exit_{number}/nll'] = jnp.mean(cross_entropy(exit_logits, labels))
    predicted = jnp.argmax(exit_logits, -1)
    if labels.ndim == 2:
      right = jnp.take_along_axis(labels, predicted[:, None], axis=-1)
    else:
      right = (predicted == labels).astype(jnp.float32)
    metrics[f'exit_{number}/accuracy'] = jnp.mean(right)
  return metrics


def zero_totals(targets: Targets, labeled: bool = True) -> dict[str, jax.Array]:
  """Totals before the first step of a log interval.

  Args:
    labeled: whether images have labels; otherwise only exits learn, and their agreement with the last one is measured.
  """
  numbers, measures = trained_exits(targets), ('loss', 'nll', 'accuracy') if labeled else ('loss', 'agreement')
  names = ['loss', *(f'exit_{number}/{what}' for number in numbers for what in measures)]
  return {name: jnp.float32(0) for name in names}


def make_eval_step(
  model: Any,
  number: int,
  preprocessing: Preprocessing,
  label_smoothing: float,
  class_weights: Sequence[float] | None = None,
  logits_of: Callable | None = None,
) -> Callable:
  """Makes the evaluation of exit `number` on one batch, which computes only what that exit needs.

  Args:
    logits_of: function from the variables and `images` to the exit's logits, where these are other trees of arrays
      than images; None: the model's.

  Returns:
    step(params, batch_stats, images, labels, mask) -> (sums, labels, predictions):
      sums: {'count', 'weight', 'accuracy', 'top5', 'loss', 'nll'} over the images whose mask, float32 [B], is 1;
      labels, predictions: int32 [B]; the labels of other images are -1.
    `loss` is the cross-entropy smoothed and weighted as in training, to be divided by `weight`; `nll` is the plain one.
  """

  def of_images(variables, images):
    batch = normalize(images, preprocessing.mean, preprocessing.std)
    return model.apply(variables, batch, exits=(number,))[number - 1]

  def eval_step(params, batch_stats, images, labels, mask):
    logits = (logits_of or of_images)({'params': params, 'batch_stats': batch_stats}, images)
    rank = label_rank(logits, labels)
    values = {
      'count': jnp.ones_like(mask),
      'weight': label_weights(labels, class_weights),
      'accuracy': rank < 1,
      'top5': rank < 5,
      'loss': cross_entropy(logits, labels, label_smoothing, class_weights),
      'nll': cross_entropy(logits, labels),
    }
    sums = {name: jnp.sum(mask * value.astype(mask.dtype)) for name, value in values.items()}
    # Exactly what counts as right predicts the label, also among logits that are not finite.
    others = jnp.where(jnp.arange(logits.shape[-1]) == labels[:, None], -jnp.inf, jnp.nan_to_num(logits, nan=-jnp.inf))
    predictions = jnp.where(rank < 1, labels, jnp.argmax(others, axis=-1))
    return sums, jnp.where(mask > 0, labels, -1), predictions

  return eval_step


def label_rank(logits: Float[Array, 'B classes'], labels: Int32[Array, ' B']) -> Int32[Array, ' B']:
  """The number of classes that rank before the label: larger logits and, among equal ones, lower class numbers.

  Rank 0 is the prediction of argmax. A label whose logit is NaN ranks last.
  """
  own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
  itself_and_after = (logits == own) & (jnp.arange(logits.shape[-1]) >= labels[:, None])
  return jnp.sum(~(logits < own) & ~itself_and_after, axis=-1)
