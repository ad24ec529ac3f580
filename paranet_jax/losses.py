"""Cross-entropy, logit matching and distillation: losses an image, in nats or squared logits."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax

from paranet_jax.targets import LABELS

NO_TEACHERS: Mapping[int, Sequence[int]] = MappingProxyType({})


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
  """Cross-entropy with the true label.

  Args:
    logits: [B, classes].
    labels: int [B], or float [B, classes], the shares of blended labels.
    label_smoothing: share of the target spread evenly over all classes, 0 <= s < 1.

  Returns:
    float32 [B], nats.
  """
  logits = logits.astype(jnp.float32)
  shares = labels if labels.ndim == 2 else jax.nn.one_hot(labels, logits.shape[-1])
  return optax.softmax_cross_entropy(logits, optax.smooth_labels(shares, label_smoothing))


def squared_error(student: jax.Array, teacher: jax.Array) -> jax.Array:
  """Logit matching: mean over classes of (student - stop_gradient(teacher))^2 (paper, section 3.4).

  Args:
    student: logits [B, classes].
    teacher: logits [B, classes].

  Returns:
    float32 [B].
  """
  difference = student.astype(jnp.float32) - jax.lax.stop_gradient(teacher.astype(jnp.float32))
  return jnp.mean(jnp.square(difference), axis=-1)


def distillation(student: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
  """T^2 KL(softmax(teacher / T) || softmax(student / T)), the teacher stopped (Hinton et al. 2015).

  Args:
    student: logits [B, classes].
    teacher: logits [B, classes].
    temperature: T > 0.

  Returns:
    float32 [B], nats.
  """
  teacher = jax.lax.stop_gradient(teacher.astype(jnp.float32))
  log_student = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
  log_teacher = jax.nn.log_softmax(teacher / temperature)
  return temperature**2 * jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)


def exit_losses(
  logits: Sequence[jax.Array | None],
  labels: jax.Array,
  targets: Sequence[int | None],
  *,
  matching: str = 'squared_error',
  temperature: float = 1.0,
  hard_label_weight: float = 0.0,
  label_smoothing: float = 0.0,
  teachers: Mapping[int, Sequence[int]] = NO_TEACHERS,
) -> dict[int, jax.Array]:
  """The loss of every trained exit, mean over the batch.

  Args:
    logits: one [B, classes] an exit; None where the exit was not computed.
    labels: as for `cross_entropy`.
    targets: an exit each: 0 = the true label, q = match exit q's logits, None = no loss.
    matching: 'squared_error' or 'kl'.
    temperature: T of 'kl' and of the teachers.
    hard_label_weight: w in (1 - w) kl + w cross-entropy, of 'kl' and of exits with teachers.
    label_smoothing: of every cross-entropy.
    teachers: of exits with target 0, the exits they also learn from: kl is the mean of their `distillation`.

  Returns:
    {1-based exit: scalar}, trained exits only.
  """
  losses = {}
  for number, target in enumerate(targets, 1):
    if target is None:
      continue
    student = logits[number - 1]
    own_teachers = teachers.get(number, ()) if target == LABELS else (target,)
    if not own_teachers:
      loss = cross_entropy(student, labels, label_smoothing)
    elif target != LABELS and matching == 'squared_error':
      loss = squared_error(student, logits[target - 1])
    else:
      soft = sum(distillation(student, logits[teacher - 1], temperature) for teacher in own_teachers)
      hard = cross_entropy(student, labels, label_smoothing)
      loss = (1 - hard_label_weight) * soft / len(own_teachers) + hard_label_weight * hard
    losses[number] = jnp.mean(loss)
  return losses


def total_loss(losses: Mapping[int, jax.Array], exit_weights: Sequence[float]) -> jax.Array:
  """Sum of the exits' losses, each times its weight (one weight for every exit, trained or not)."""
  return sum(exit_weights[number - 1] * loss for number, loss in losses.items())
