"""Cross-entropy, logit matching and distillation losses per image, in nats or squared logits."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int

from paranet_jax.targets import LABELS

Logits = Float[Array, 'B classes']
Losses = Float[Array, ' B']
Labels = Int[Array, ' B'] | Float[Array, 'B classes']
"""The class of each image, or the class shares of blended images."""

NO_TEACHERS: Mapping[int, Sequence[int]] = MappingProxyType({})


def cross_entropy(
  logits: Logits, labels: Labels, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None
) -> Losses:
  """Cross-entropy with the true label, float32, in nats.

  Args:
    label_smoothing: share of the target spread evenly over all classes, from 0 to less than 1.
    class_weights: factor of each class's part of the target, smoothed or not; None: 1. The mean of a batch is the sum
      of these losses divided by the sum of `label_weights`, as in PyTorch.
  """
  logits = logits.astype(jnp.float32)
  shares = labels if labels.ndim == 2 else jax.nn.one_hot(labels, logits.shape[-1])
  shares = optax.smooth_labels(shares, label_smoothing)
  if class_weights is not None:
    shares = shares * jnp.asarray(class_weights, jnp.float32)
  return optax.softmax_cross_entropy(logits, shares)


def label_weights(labels: Labels, class_weights: Sequence[float] | None) -> Losses:
  """The weight of each image: its class's, or the mean over the classes that it is blended from; None: 1."""
  if class_weights is None:
    return jnp.ones(len(labels), jnp.float32)
  weights = jnp.asarray(class_weights, jnp.float32)
  return jnp.sum(labels * weights, axis=-1) if labels.ndim == 2 else weights[labels]


def squared_error(student: Logits, teacher: Logits, scale: str = 'mean', centered: bool = False) -> Losses:
  """Logit matching: (student - stop_gradient(teacher))^2, float32 (paper, section 3.4).

  Args:
    scale: 'mean' over the classes, or 'half_sum': half their sum (Ba and Caruana 2014).
    centered: subtract from each image's logits their mean over the classes first, which no probability depends on.
  """
  difference = student.astype(jnp.float32) - jax.lax.stop_gradient(teacher.astype(jnp.float32))
  if centered:
    difference = difference - jnp.mean(difference, axis=-1, keepdims=True)
  squares = jnp.square(difference)
  return jnp.mean(squares, axis=-1) if scale == 'mean' else jnp.sum(squares, axis=-1) / 2


def feature_error(student: Float[Array, 'B C'], teacher: Float[Array, 'B C']) -> Losses:
  """|student - stop_gradient(teacher)|^2 / |teacher|^2, float32: 1 for features that are all 0."""
  student, teacher = student.astype(jnp.float32), jax.lax.stop_gradient(teacher.astype(jnp.float32))
  squares = jnp.sum(jnp.square(teacher), axis=-1)
  return jnp.sum(jnp.square(student - teacher), axis=-1) / jnp.maximum(squares, jnp.finfo(jnp.float32).tiny)


def distillation(student: Logits, teacher: Logits, temperature: float) -> Losses:
  """T^2 KL(softmax(teacher / T) || softmax(student / T)), float32, in nats (Hinton et al. 2015).

  The teacher receives no gradient.
  """
  teacher = jax.lax.stop_gradient(teacher.astype(jnp.float32))
  log_student = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
  log_teacher = jax.nn.log_softmax(teacher / temperature)
  return temperature**2 * jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)


def exit_losses(
  logits: Sequence[Logits | None],
  labels: Labels,
  targets: Sequence[int | None],
  *,
  matching: str = 'squared_error',
  match_scale: str = 'mean',
  match_centered: bool = False,
  temperature: float = 1.0,
  hard_label_weight: float = 0.0,
  label_smoothing: float = 0.0,
  teachers: Mapping[int, Sequence[int]] = NO_TEACHERS,
  class_weights: Sequence[float] | None = None,
  teacher_logits: Sequence[Logits | None] | None = None,
  sample_weight: float = 0.0,
  leaving: float = 1.0,
  axis_name: str | None = None,
) -> dict[int, Float[Array, '']]:
  """Mean loss over the batch for each trained exit, by 1-based exit number.

  With class weights, every cross-entropy is a weighted mean (see `cross_entropy`); what exits learn from each other is
  not weighted.

  Args:
    logits: one array per exit; None if the exit was not computed.
    targets: one per exit: 0 = the true label, q = match exit q's logits, None = no loss.
    matching: 'squared_error' or 'kl'.
    match_scale, match_centered: of `squared_error`.
    temperature: T of 'kl' and of the teachers.
    hard_label_weight: w in (1 - w) kl + w cross-entropy, for 'kl' and for exits with teachers.
    label_smoothing: applies to every cross-entropy.
    teachers: for exits with target 0, the exits they also learn from: kl is the mean of their `distillation`.
    class_weights: one per class; None: images weigh the same.
    teacher_logits: like `logits`, what exits learn from instead; None: from these.
    sample_weight, leaving: of `leaving_weights`, for the exits with target 0 together; 0: images weigh the same.
    axis_name: device axis that the batch is split over; the mean of the devices' losses is that of the whole batch.
  """
  mean_weight = None
  if class_weights is not None:
    mean_weight = jnp.mean(label_weights(labels, class_weights))
    mean_weight = jax.lax.pmean(mean_weight, axis_name) if axis_name else mean_weight

  def from_labels(student: Logits) -> Losses:
    loss = cross_entropy(student, labels, label_smoothing, class_weights)
    return loss if mean_weight is None else loss / mean_weight

  computed = {number: values for number, values in enumerate(logits, 1) if values is not None}
  taught = computed
  if teacher_logits is not None:
    taught = {number: values for number, values in enumerate(teacher_logits, 1) if values is not None}
  weights: dict[int, Losses] = {}
  if sample_weight:
    labeled = [number for number, target in enumerate(targets, 1) if target == LABELS]
    found = leaving_weights([computed[number] for number in labeled], sample_weight, leaving, axis_name)
    weights = dict(zip(labeled, found, strict=True))
  losses = {}
  for number, target in enumerate(targets, 1):
    if target is None:
      continue
    student = computed[number]
    own_teachers = teachers.get(number, ()) if target == LABELS else (target,)
    if not own_teachers:
      loss = from_labels(student)
    elif target != LABELS and matching == 'squared_error':
      loss = squared_error(student, taught[target], match_scale, match_centered)
    else:
      soft = sum(distillation(student, taught[teacher], temperature) for teacher in own_teachers)
      loss = (1 - hard_label_weight) * soft / len(own_teachers) + hard_label_weight * from_labels(student)
    losses[number] = jnp.mean(weights[number] * loss if number in weights else loss)
  return losses


def leaving_weights(
  logits: Sequence[Logits], strength: float, leaving: float, axis_name: str | None = None
) -> Float[Array, 'K B']:
  """The weight of each image in the loss of each of K exits: more where the image would leave.

  1 + strength (s - 1 / K), where s is 1 at the exit where an image leaves and 0 at others: the mean weight is 1. A
  share proportional to leaving^k of the images leaves at exit k: at each exit the most confident ones that are left,
  and at the last one all. "Learning to Weight Samples for Dynamic Early-Exiting Networks" (L2W, Han et al. 2022,
  section 3.2) assigns images to exits in this way in the loss by which it trains a network that predicts weights
  1 + strength v, with v of mean 0. Here the assignment itself takes the place of v, and nothing is learned.

  Args:
    logits: one array per exit, without gradient.
    strength: from 0 to less than 1; the paper's delta, 0.3 in the authors' command.
    leaving: the paper's q; 1: as many images leave at each exit.
    axis_name: device axis that the batch is split over.
  """
  confidence = jnp.stack([jnp.max(jax.nn.softmax(jax.lax.stop_gradient(own)), axis=-1) for own in logits])
  own = confidence.shape[1]
  if axis_name:
    confidence = jax.lax.all_gather(confidence, axis_name, axis=1, tiled=True)
  exits, count = confidence.shape
  shares = [leaving**number for number in range(exits)]
  alive, leaves = jnp.ones(count, bool), []
  for number in range(exits - 1):
    # The least float64 error must not cost an image.
    leaving_here = int(count * shares[number] / sum(shares) + 1e-9)
    order = jnp.argsort(jnp.where(alive, -confidence[number], jnp.inf), stable=True)
    leaves.append(jnp.zeros(count, bool).at[order[:leaving_here]].set(True))
    alive &= ~leaves[-1]
  selected = jnp.stack([*leaves, alive]).astype(jnp.float32)
  weights = 1 + strength * (selected - 1 / exits)
  if axis_name:
    weights = jax.lax.dynamic_slice_in_dim(weights, jax.lax.axis_index(axis_name) * own, own, axis=1)
  return weights


def total_loss(losses: Mapping[int, Float[Array, '']], exit_weights: Sequence[float]) -> Float[Array, '']:
  """Weighted sum of the exits' losses; `exit_weights` has an entry for every exit, trained or not."""
  return jnp.asarray(sum(exit_weights[number - 1] * loss for number, loss in losses.items()))
