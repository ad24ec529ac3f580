"""Exits that learn on a frozen backbone: what they read of it, kept, and their training step.

The backbone and the last exit run in inference mode, with their running statistics, and never change. Unless images are
cropped or blended, their results are therefore computed once, also for mirrored images.
"""

import functools
import math
import os
import tempfile
import time
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key

from paranet_jax.data.augment import image_keys, normalize
from paranet_jax.data.dataset import Split
from paranet_jax.host.arguments import cache_folder
from paranet_jax.host.errors import NO_ROOM, UserError, say
from paranet_jax.losses import exit_losses, feature_error, total_loss
from paranet_jax.models.adopted.heads import INTERMEDIATES
from paranet_jax.models.adopted.layers import pooled
from paranet_jax.models.layers.backend import SHAPES, compiling_for
from paranet_jax.steps import (
  Objective,
  Preprocessing,
  augmented,
  learning,
  model_rngs,
  train_metrics,
)
from paranet_jax.targets import trained_exits

VariablePath = tuple[str, ...]
Features = dict[int, Any]
"""By number, what an exit that learns reads (see `Chain.exit_features`); by LOGITS, those of the given last one;
by POOLED, the means over height and width of what that one reads, if exits match them."""
LOGITS, POOLED = 0, -1

IN_MEMORY = 2 * 10**9
"""Bytes of kept features of a split above which they are kept on disk."""


def features_of(model: Any, variables: Any, images: jax.Array, exits: Collection[int]) -> Features:
  """Runs the frozen backbone on normalized images.

  Args:
    exits: that learn, and POOLED if that is wanted.
  """
  features, carry = {}, {}
  for number in range(1, model.num_exits + 1):
    logits, carry = model.apply(variables, images, carry, (number,), False, method='_evaluate')
    if number in exits:  # What is not used is not computed.
      features[number] = model.exit_features(carry[number], number)
    elif number == model.num_exits:
      features[LOGITS] = logits[number]
      if POOLED in exits:
        features[POOLED] = pooled(carry[number])
  return features


def logits_from_features(model: Any, number: int, variables: Any, features: Features) -> jax.Array:
  """Logits of an exit in inference."""
  if number not in features:
    return features[LOGITS]
  return exit_from_features(model, variables, features, number)[0]


def exit_from_features(model: Any, variables: Any, features: Features, number: int, **options: Any) -> Any:
  """What `model.apply(variables, images, ..., method='stage', **options)` returns for an exit; given: its features."""
  x = jax.tree.map(lambda leaf: leaf.astype(model.dtype), features[number])
  unread = jnp.zeros((1, 1, 1, 1), jnp.float32)
  return model.apply(variables, unread, {number: x}, number, method='stage', **options)


def make_exits_step(
  model: Any,
  optimizer: optax.GradientTransformation,
  objective: Objective,
  preprocessing: Preprocessing,
  axis_name: str | None = None,
  *,
  frozen: Collection[VariablePath],
  kept: bool,
  labeled: bool = True,
  shift: float = 0.0,
  match_mirrored: bool = False,
  match_features: float = 0.0,
) -> Callable:
  """Makes the body of a training step of the exits alone (see `steps.make_train_step`).

  Args:
    optimizer: of the parameters that are not frozen.
    frozen: paths, starting at the collection, of the backbone and the last exit.
    kept: the step's images are `Features` of the whole training set, or of the batch, [N, 2, ...] each with those of
      the mirrored images, if images are mirrored.
    labeled: whether images have labels; otherwise the metrics have each exit's agreement with the last one.
    shift: of kept features, as a share of their side.
    match_mirrored: exits learn from the mean of the last exit's logits for an image and for its mirror image.
    match_features: weight of `feature_error` between the last features of an exit of copied blocks and the backbone's.
  """
  model = model.clone(axis_name=axis_name)
  last = model.num_exits
  trained = trained_exits(objective.targets)
  options = objective._asdict()
  exit_weights = options.pop('exit_weights')
  del options['teacher']  # The given exit of the network itself.
  mutable = ['batch_stats', *([INTERMEDIATES] if match_features else [])]

  def loss_fn(own, state, features, labels, rngs):
    params = _updated(state.params, own)
    batch_stats, logits, own_features = state.batch_stats, [None] * last, {}
    if LOGITS in features:
      logits[last - 1] = features[LOGITS]
    for number in trained:
      (logits[number - 1], _), updated = exit_from_features(
        model,
        {'params': params, 'batch_stats': batch_stats},
        features,
        number,
        train=True,
        mutable=mutable,
        rngs=rngs,
      )
      batch_stats = updated.get('batch_stats', batch_stats)
      own_features[number] = updated.get(INTERMEDIATES)
    losses = exit_losses(logits, labels, axis_name=axis_name, **options)
    if match_features:
      for number in trained:
        (found,) = jax.tree.leaves(own_features[number])
        losses[number] += match_features * jnp.mean(feature_error(found, features[POOLED]))
    loss = total_loss(losses, exit_weights)
    return loss, (batch_stats, metrics_of(logits, features, labels, losses, loss))

  def metrics_of(logits, features, labels, losses, loss):
    if labeled:
      return train_metrics(logits, labels, losses, loss)
    found = train_metrics(logits, jnp.argmax(features[LOGITS], -1), losses, loss)
    return {name.replace('/accuracy', '/agreement'): found[name] for name in found if not name.endswith('/nll')}

  def exits_step(state, totals, images, labels, order):
    steps_per_epoch, local_size = order.shape
    epoch, step = state.step // steps_per_epoch, state.step % steps_per_epoch
    indices = order[step]
    features, labels = jax.tree.map(lambda leaf: leaf[indices], (images, labels))
    first = jax.lax.axis_index(axis_name) * local_size if axis_name else 0
    keys = image_keys(state.seed, epoch, step, first + jnp.arange(local_size))
    if kept:
      features = vary(keys, features, preprocessing.flip, shift, match_mirrored)
    else:
      features, labels = augmented(keys, features, labels, preprocessing, model.num_classes, axis_name)
      variables = {'params': state.params, 'batch_stats': state.batch_stats}
      wanted = (POOLED,) if match_features else ()
      batch, features = features, features_of(model, variables, features, (*trained, *wanted))
      if match_mirrored:
        mirrored = features_of(model, variables, batch[:, :, ::-1], wanted)
        features |= {number: (features[number] + mirrored[number]) / 2 for number in (LOGITS, *wanted)}
      features = jax.lax.stop_gradient(features)
    own = learning(state.params, frozen)
    rngs = model_rngs(model, state.seed, state.step)
    gradients, (batch_stats, metrics) = jax.grad(loss_fn, has_aux=True)(own, state, features, labels, rngs)
    if axis_name:
      gradients, metrics = jax.lax.pmean((gradients, metrics), axis_name)
    updates, opt_state = optimizer.update(gradients, state.opt_state, own)
    params = _updated(state.params, optax.apply_updates(own, updates))
    totals = jax.tree.map(jnp.add, totals, metrics)
    return state.replace(step=state.step + 1, opt_state=opt_state, params=params, batch_stats=batch_stats), totals

  return exits_step


def vary(
  keys: Key[Array, ' B'], features: Features, mirrored: bool, shift: float, match_mirrored: bool = False
) -> Features:
  """Draws which of an image's features a step reads, the mirrored ones or not, and shifts them.

  A shifted image has shifted features, except at its border, and nearly the same logits.

  Args:
    keys: one per image.
    features: [B, 2, ...] if `mirrored`, else [B, ...].
    shift: at most, as a share of the side; the border that it uncovers is 0.
    match_mirrored: both images of a mirrored pair have the mean of their LOGITS and POOLED.
  """
  if match_mirrored:
    pairs = {number: features[number] for number in (LOGITS, POOLED) if number in features}
    features = features | {
      number: jnp.broadcast_to(pair.mean(1, keepdims=True), pair.shape) for number, pair in pairs.items()
    }

  def one(key: jax.Array, own: Features) -> Features:
    flip_key, shift_key = jax.random.split(key)
    if mirrored:
      own = jax.tree.map(lambda leaf: leaf[jax.random.bernoulli(flip_key).astype(jnp.int32)], own)
    share = jax.random.uniform(shift_key, (2,))
    return jax.tree.map(lambda leaf: shifted(leaf, share), own)

  def shifted(x: jax.Array, share: jax.Array) -> jax.Array:
    most = places_shifted(shift, x.shape[0]) if x.ndim == 3 else 0
    if not most:
      return x
    padded = jnp.pad(x, ((most, most), (most, most), (0, 0)))
    row, column = jnp.floor(share * (2 * most + 1)).astype(jnp.int32)
    return jax.lax.dynamic_slice(padded, (row, column, jnp.zeros_like(row)), x.shape)

  return jax.vmap(one)(keys, features)


def places_shifted(shift: float, side: int) -> int:
  """By how many places features of this side are shifted at most (see `vary`); 0: never."""
  return int(shift * side)


def _updated(params: Any, own: Any) -> dict[str, Any]:
  return unflatten_dict(flatten_dict(dict(params)) | flatten_dict(own))


def feature_shapes(
  model: Any,
  variables: Any,
  image_shape: tuple[int, int, int],
  exits: Collection[int],
  dtype: str,
  count: int,
  mirrored: bool = False,
) -> Features:
  """Shapes of the kept features of `count` images.

  Args:
    exits: that learn.
    mirrored: also of the mirrored images, at index 1 of a second axis.
    dtype: of the features, if they take more than that in the model; the last exit's logits stay float32.
  """
  image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)

  def shape(number: int, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    narrow = number != LOGITS and np.dtype(dtype).itemsize < leaf.dtype.itemsize
    return jax.ShapeDtypeStruct((count, *[2] * mirrored, *leaf.shape[1:]), np.dtype(dtype) if narrow else leaf.dtype)

  with compiling_for(SHAPES):
    found = jax.eval_shape(functools.partial(features_of, model, exits=exits), variables, image)
  return {number: jax.tree.map(functools.partial(shape, number), own) for number, own in found.items()}


def on_disk(features: Features) -> bool:
  """Whether features of these shapes are kept on disk."""
  return bytes_of(features) > IN_MEMORY


def keep_features(
  model: Any,
  variables: Any,
  preprocessing: Preprocessing,
  split: Split,
  shapes: Features,
  batch_size: int,
  name: str,
  mirrored: bool = False,
  check: Callable[[], None] = lambda: None,
) -> Features:
  """Computes the features of a split, in memory, or memory-mapped from a file that vanishes with the process.

  Args:
    shapes: of `feature_shapes`.
    batch_size: images at a time; affects speed and memory.
    name: of the split, for messages.
    mirrored: as in `feature_shapes`.
    check: called before every batch; may raise to end the computation.
  """
  count, batch_size, started = len(split), min(batch_size, len(split)), time.monotonic()
  where = 'on disk' if on_disk(shapes) else 'in memory'
  kept = jax.tree.map(_mapped if on_disk(shapes) else lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)

  @jax.jit
  def compute(variables, images):
    images = normalize(images, preprocessing.mean, preprocessing.std)
    found = features_of(model, variables, images, shapes.keys())
    if mirrored:
      other = features_of(model, variables, images[:, :, ::-1], shapes.keys())
      found = jax.tree.map(lambda *both: jnp.stack(both, axis=1), found, other)
    return jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), found, shapes)

  for first in range(0, count, batch_size):
    check()
    rows = np.minimum(np.arange(first, first + batch_size), count - 1)  # The last batch has the size of the others.
    batch = jax.device_get(compute(variables, np.asarray(split.images[rows])))
    for whole, part in zip(jax.tree.leaves(kept), jax.tree.leaves(batch), strict=True):
      whole[first : first + batch_size] = part[: count - first]
  seconds = time.monotonic() - started
  both = ', as they are and mirrored' if mirrored else ''
  say(f'features of {count:,} {name} images{both}: {bytes_of(shapes) / 1e6:,.0f} MB kept {where}, {seconds:.1f} s')
  return kept


def bytes_of(features: Features) -> int:
  """Bytes of features of these shapes."""
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(features))


def _mapped(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
  """An array in a file that vanishes with the process.

  Raises:
    UserError: there is no room for it.
  """
  folder = cache_folder()
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryFile(dir=folder) as file:
    try:  # Before it is mapped: where there is no room, writing to a map ends the process by SIGBUS.
      os.posix_fallocate(file.fileno(), 0, bytes_of({0: leaf}))
    except OSError as error:
      if error.errno in NO_ROOM:
        raise UserError(
          f'expected {bytes_of({0: leaf}) / 1e9:,.1f} GB for features in {folder}, found: {error.strerror}; make room, '
          'set PARANET_CACHE_DIR to another disk, or --config.train.features=float16'
        ) from error
    except AttributeError:  # macOS.
      pass
    return np.memmap(file, leaf.dtype, 'w+', shape=leaf.shape)
