"""The train state, the training step and the evaluation of one exit, as pure functions."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.extend import core
from jaxtyping import Bool, Float, Int32, Key, UInt8

from paranet_jax.costs import abstract_variables
from paranet_jax.data.augment import alternately_mirrored, augment, cutmix, image_keys, mixup, normalize
from paranet_jax.data.auto_augment import auto_augment
from paranet_jax.losses import NO_TEACHERS, cross_entropy, exit_losses, label_weights, total_loss
from paranet_jax.optim import conflict_averse
from paranet_jax.targets import LABELS, Targets, trained_exits

_AUTO_AUGMENT = 5  # Folded into an image's key; `data.augment` uses the numbers before it.
_MODEL_STREAM = 3  # Separates these random numbers from those of shuffling and augmentation.


@struct.dataclass
class TrainState:
  """Everything that a run needs to resume: `step` (steps done) and `seed`, both int32 scalars, and the trees."""

  step: jax.Array
  seed: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any


class Beside(NamedTuple):
  """What a state holds beside its optimizer's, in place of `opt_state`: variables of two networks; {}: of none.

  Attributes:
    average: moving averages of the parameters and running statistics.
    teacher: a finished network, which does not change.
  """

  optimizer: Any
  average: Any
  teacher: Any


class Preprocessing(NamedTuple):
  """How uint8 images become the network's input: per-channel `mean` and `std` in 0..1, and training augmentation.

  `crop_padding` and `cutout` are in pixels, `mixup` and `cutmix` are alpha; 0 turns each off. `alternate_flip` mirrors
  every image in every other epoch. `auto_augment` is 'none' or a kind of `data.auto_augment`, with `operations` and
  `magnitude` of 'rand'.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  crop_padding: int
  flip: bool
  cutout: int = 0
  mixup: float = 0.0
  cutmix: float = 0.0
  alternate_flip: bool = False
  auto_augment: str = 'none'
  operations: int = 2
  magnitude: int = 9


class Objective(NamedTuple):
  """The loss (see `losses.exit_losses`).

  Attributes:
    teacher: whose logits exits learn from: 'network', its own; 'average' or 'teacher', those of `Beside`.
  """

  targets: Targets
  exit_weights: Sequence[float]
  matching: str = 'squared_error'
  temperature: float = 1.0
  hard_label_weight: float = 0.0
  label_smoothing: float = 0.0
  teachers: Mapping[int, Sequence[int]] = NO_TEACHERS
  class_weights: Sequence[float] | None = None
  match_scale: str = 'mean'
  match_centered: bool = False
  teacher: str = 'network'
  sample_weight: float = 0.0
  leaving: float = 1.0


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
  opt_state = _opt_state(optimizer, learning(params, frozen) if frozen else params)
  counted, drawn = jax.device_put((np.int32(0), np.int32(seed)))
  return TrainState(counted, drawn, params, variables.get('batch_stats', {}), opt_state)


def _opt_state(optimizer: optax.GradientTransformation, params: Any) -> Any:
  """What `optimizer.init` gives. It only fills arrays with constants as a rule, and then nothing is compiled."""
  program, shapes = jax.make_jaxpr(optimizer.init, return_shape=True)(params)
  values = {}
  for equation in program.jaxpr.eqns:
    value = equation.invars[0] if len(equation.invars) == 1 else None
    if equation.primitive.name != 'broadcast_in_dim' or not isinstance(value, core.Literal):
      return jax.jit(optimizer.init)(params)
    (result,) = equation.outvars
    shape: Any = result.aval  # jax declares AbstractValue.
    values[result] = np.full(shape.shape, value.val, shape.dtype)
  leaves = program.jaxpr.outvars
  if not all(isinstance(leaf, core.Literal) or leaf in values for leaf in leaves):
    return jax.jit(optimizer.init)(params)
  filled = [
    np.asarray(leaf.val, shape.dtype) if isinstance(leaf, core.Literal) else values[leaf]
    for leaf, shape in zip(leaves, jax.tree.leaves(shapes), strict=True)
  ]
  return jax.device_put(jax.tree.unflatten(jax.tree.structure(shapes), filled))


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
  conflict: float = 0.0,
  average: float = 0.0,
) -> Callable:
  """Makes the body of a training step for one device, or for each device of `axis_name`.

  Args:
    frozen: paths, starting at the collection, of the parameters and running statistics that do not change. Their layers
      still use the batch's statistics, as in training.
    users: a tree like the parameters with the number of trained exits that use each one: gradients become means over
      those exits. Since a gradient is linear in the contribution of each exit, this equals scaling the gradient at
      every tensor that exits share (gradient equilibrium, Li et al. 2019). None: gradients are sums.
    conflict: instead of the mean, `optim.conflict_averse` of this radius for parameters that several exits use. It
      needs a backward pass and the memory of a gradient for each exit.
    average: decay of the averages of the state's `Beside`; 0: there are none.

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
  exit_weights, teacher = options.pop('exit_weights'), options.pop('teacher')
  sources = teaching_exits(objective)
  trained = trained_exits(objective.targets)
  apart = trained if conflict and len(trained) > 1 else (None,)

  def loss_fn(params, batch_stats, images, labels, rngs, teacher_logits, only):
    variables = {'params': params, 'batch_stats': batch_stats}
    if frozen:
      variables = _restored(variables, jax.lax.stop_gradient(variables), frozen)
    logits, updated = model.apply(variables, images, train=True, exits=exits, mutable=['batch_stats'], rngs=rngs)
    losses = exit_losses(logits, labels, teacher_logits=teacher_logits, axis_name=axis_name, **options)
    loss = total_loss(losses, exit_weights)
    aside = updated.get('batch_stats', {}), train_metrics(logits, labels, losses, loss)
    return loss if only is None else total_loss({only: losses[only]}, exit_weights), aside

  def train_step(state, totals, images, labels, order):
    steps_per_epoch, local_size = order.shape
    epoch, step = state.step // steps_per_epoch, state.step % steps_per_epoch
    first = jax.lax.axis_index(axis_name) * local_size if axis_name else 0
    indices = order[step]
    keys = image_keys(state.seed, epoch, step, first + jnp.arange(local_size))
    mirrored = alternately_mirrored(state.seed, epoch, indices) if preprocessing.alternate_flip else None
    batch = augmented(keys, images[indices], labels[indices], preprocessing, model.num_classes, axis_name, mirrored)
    beside = state.opt_state if isinstance(state.opt_state, Beside) else None
    teacher_logits = None
    if beside and sources and teacher != 'network':
      teacher_logits = model.apply(getattr(beside, teacher), batch[0], exits=sources)
    arguments = state.params, state.batch_stats, *batch, model_rngs(model, state.seed, state.step), teacher_logits
    # All but the gradient is the same for every exit, and compiled once.
    found = [jax.grad(loss_fn, has_aux=True)(*arguments, only) for only in apart]
    gradients, (batch_stats, metrics) = [own for own, _ in found], found[0][1]
    if axis_name:
      gradients, metrics = jax.lax.pmean((gradients, metrics), axis_name)
    if len(gradients) > 1:
      shared = jax.tree.map(lambda number: number > 1, users)
      gradients = conflict_averse(gradients, shared, conflict)
    else:
      gradients = gradients[0]
    if users is not None and not conflict:
      gradients = jax.tree.map(lambda gradient, number: gradient / max(number, 1), gradients, users)
    inner = beside.optimizer if beside else state.opt_state
    updates, opt_state = optimizer.update(gradients, inner, state.params)
    variables = {'params': optax.apply_updates(state.params, updates), 'batch_stats': batch_stats}
    before = {'params': state.params, 'batch_stats': state.batch_stats}
    variables = _restored(variables, before, frozen)
    if beside:
      averages = averaged(beside.average, variables, average, state.step) if average else beside.average
      opt_state = Beside(opt_state, averages, beside.teacher)
    totals = jax.tree.map(jnp.add, totals, metrics)
    return state.replace(step=state.step + 1, opt_state=opt_state, **variables), totals

  return train_step


def augmented(
  keys: Key[Array, ' B'],
  images: UInt8[Array, 'B H W C'],
  labels: Int32[Array, ' B'],
  preprocessing: Preprocessing,
  num_classes: int,
  axis_name: str | None = None,
  mirrored: Bool[Array, ' B'] | None = None,
) -> tuple[Float[Array, 'B H W C'], Array]:
  """Augments a training batch, or a device's share of it.

  Args:
    keys: from `image_keys`.
    axis_name: as in `make_train_step`.
    mirrored: which images are mirrored; None: drawn.

  Returns:
    The images, and the labels or, if blended, the share of each class [B, num_classes].
  """
  if preprocessing.auto_augment != 'none':
    own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, _AUTO_AUGMENT)
    kind, operations, magnitude = preprocessing.auto_augment, preprocessing.operations, preprocessing.magnitude
    images = auto_augment(own, images, kind=kind, operations=operations, magnitude=magnitude)
  images = normalize(images, preprocessing.mean, preprocessing.std)
  images = augment(
    keys,
    images,
    crop_padding=preprocessing.crop_padding,
    flip=preprocessing.flip,
    cutout=preprocessing.cutout,
    mirrored=mirrored,
  )
  if not (preprocessing.mixup or preprocessing.cutmix):
    return images, labels
  one_hot = jax.nn.one_hot(labels, num_classes)
  blend, alpha = (mixup, preprocessing.mixup) if preprocessing.mixup else (cutmix, preprocessing.cutmix)
  return blend(keys, images, one_hot, alpha=alpha, axis_name=axis_name)


def averaged(average: Any, variables: Any, decay: float, step: jax.Array) -> Any:
  """Moving averages after a step.

  The decay is at most (1 + s) / (10 + s) after s steps, so that the first weights are soon forgotten.

  Args:
    step: steps done before.
  """
  done = step.astype(jnp.float32)
  kept = jnp.minimum(jnp.float32(decay), (1 + done) / (10 + done))
  return jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, average, variables)


def computed_exits(objective: Objective) -> tuple[int, ...]:
  """The trained exits and, if their own network teaches, the exits that they learn from."""
  trained = trained_exits(objective.targets)
  return tuple(sorted({*trained, *(teaching_exits(objective) if objective.teacher == 'network' else ())}))


def teaching_exits(objective: Objective) -> tuple[int, ...]:
  """The exits that trained exits learn from."""
  trained = trained_exits(objective.targets)
  sources = {source for number in trained for source in objective.teachers.get(number, ())}
  return tuple(sorted({*sources, *(objective.targets[number - 1] for number in trained)} - {LABELS}))


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


def zero_totals(targets: Targets, labeled: bool = True) -> dict[str, Any]:
  """Totals before the first step of a log interval.

  Args:
    labeled: whether images have labels; otherwise only exits learn, and their agreement with the last one is measured.
  """
  numbers, measures = trained_exits(targets), ('loss', 'nll', 'accuracy') if labeled else ('loss', 'agreement')
  names = ['loss', *(f'exit_{number}/{what}' for number in numbers for what in measures)]
  return {name: np.float32(0) for name in names}


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
