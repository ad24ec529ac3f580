"""Cross-entropy, logit matching and distillation: losses an image, in nats or squared logits."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

LABELS = 0


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
  """Cross-entropy with the true label.

  Args:
    logits: [B, classes].
    labels: int [B].
    label_smoothing: share of the target spread evenly over all classes, 0 <= s < 1.

  Returns:
    float32 [B], nats.
  """
  logits = logits.astype(jnp.float32)
  targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
  return optax.softmax_cross_entropy(logits, targets)


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
) -> dict[int, jax.Array]:
  """The loss of every trained exit, mean over the batch.

  Args:
    logits: one [B, classes] an exit; None where the exit was not computed.
    labels: int [B].
    targets: an exit each: 0 = the true label, q = match exit q's logits, None = no loss.
    matching: 'squared_error' or 'kl'.
    temperature: T of 'kl'.
    hard_label_weight: w in (1 - w) kl + w cross-entropy, of 'kl'.
    label_smoothing: of every cross-entropy.

  Returns:
    {1-based exit: scalar}, trained exits only.
  """
  losses = {}
  for number, target in enumerate(targets, 1):
    if target is None:
      continue
    student = logits[number - 1]
    if target == LABELS:
      loss = cross_entropy(student, labels, label_smoothing)
    elif matching == 'squared_error':
      loss = squared_error(student, logits[target - 1])
    else:
      soft = distillation(student, logits[target - 1], temperature)
      hard = cross_entropy(student, labels, label_smoothing)
      loss = (1 - hard_label_weight) * soft + hard_label_weight * hard
    losses[number] = jnp.mean(loss)
  return losses


def total_loss(losses: Mapping[int, jax.Array], exit_weights: Sequence[float]) -> jax.Array:
  """Sum of the exits' losses, each times its weight (one weight for every exit, trained or not)."""
  return sum(exit_weights[number - 1] * loss for number, loss in losses.items())
