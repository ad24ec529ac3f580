"""Tests of the losses against numbers computed by hand."""

from math import log

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paranet_jax.losses import cross_entropy, distillation, exit_losses, leaving_weights, squared_error, total_loss

# Softmax gives 1/8, 2/8, 5/8 and 1/4, 1/4, 1/2.
LOGITS = jnp.log(jnp.array([[1.0, 2.0, 5.0], [3.0, 3.0, 6.0]]))


@pytest.mark.parametrize(
  'label_smoothing, expected',
  [
    (0.0, [log(8 / 5), log(4)]),
    # Targets 0.1, 0.1, 0.8 and 0.8, 0.1, 0.1.
    (0.3, [0.1 * log(8) + 0.1 * log(4) + 0.8 * log(8 / 5), 0.9 * log(4) + 0.1 * log(2)]),
  ],
)
def test_cross_entropy(label_smoothing, expected):
  np.testing.assert_allclose(cross_entropy(LOGITS, jnp.array([2, 0]), label_smoothing), expected, rtol=1e-6)


def test_cross_entropy_of_blended_labels():
  shares = jnp.array([[0.0, 0.25, 0.75], [0.5, 0.5, 0.0]])
  expected = [0.25 * log(4) + 0.75 * log(8 / 5), log(4)]
  np.testing.assert_allclose(cross_entropy(LOGITS, shares), expected, rtol=1e-6)
  # 0.3 of each is spread evenly: 0.1, 0.275, 0.625 and 0.45, 0.45, 0.1.
  expected = [0.1 * log(8) + 0.275 * log(4) + 0.625 * log(8 / 5), 0.9 * log(4) + 0.1 * log(2)]
  np.testing.assert_allclose(cross_entropy(LOGITS, shares, 0.3), expected, rtol=1e-6)


WEIGHTS = (3.0, 1.0, 0.5)


@pytest.mark.parametrize(
  ('labels', 'label_smoothing', 'expected'),
  [
    # As torch.nn.functional.cross_entropy(weight=WEIGHTS): the weights of the labels are 0.5 and 3.
    ([2, 0], 0.0, (0.5 * log(8 / 5) + 3 * log(4)) / 3.5),
    # And with label_smoothing=0.3: targets 0.1, 0.1, 0.8 and 0.8, 0.1, 0.1, each class times its weight.
    (
      [2, 0],
      0.3,
      (3 * 0.1 * log(8) + 0.1 * log(4) + 0.5 * 0.8 * log(8 / 5) + 3 * 0.8 * log(4) + 0.1 * log(4) + 0.05 * log(2))
      / 3.5,
    ),
    # Blended labels: the weights are (1 + 0.5) / 2 and (3 + 1) / 2.
    ([[0.0, 0.5, 0.5], [0.5, 0.5, 0.0]], 0.0, (0.5 * log(4) + 0.25 * log(8 / 5) + 2 * log(4)) / 2.75),
  ],
)
def test_class_weights(labels, label_smoothing, expected):
  options = {'label_smoothing': label_smoothing, 'class_weights': WEIGHTS}

  @jax.jit
  def outcomes(logits, labels):
    def first(targets, logits=logits, labels=labels, shift=0.0, **given):
      return exit_losses([logits, logits + shift], labels, targets, **options, **given)[1]

    # On two devices with an image each, the mean of their losses and gradients is that of the whole batch.
    part = jax.value_and_grad(lambda logits, labels: first((0, 0), logits, labels, axis_name='devices'))
    parts = jax.vmap(part, axis_name='devices')(logits[:, None], labels[:, None])
    gradients = parts[1][:, 0] / 2 - jax.grad(lambda logits: first((0, 0), logits))(logits)
    # Matching is not weighted, its part with the label is; the logits match themselves.
    matched = first((2, 0), matching='kl', hard_label_weight=0.25)
    taught = first((0, 0), teachers={1: (2,)}, hard_label_weight=0.5)
    return [first((0, 0)), parts[0].mean(), matched, taught, first((2, 0), shift=2.0)], gradients

  losses, differences = outcomes(LOGITS, jnp.array(labels))
  np.testing.assert_allclose(losses, [expected, expected, expected / 4, expected / 2, 4], rtol=1e-6)
  np.testing.assert_allclose(differences, np.zeros((2, 3)), atol=1e-7)


def test_squared_error_is_a_mean_over_classes():
  student, teacher = jnp.array([[1.0, 2.0, 4.0], [0.0, 0.0, 3.0]]), jnp.array([[0.0, 4.0, 2.0], [0.0, 0.0, 0.0]])
  np.testing.assert_allclose(squared_error(student, teacher), [3.0, 3.0])


def test_distillation_softens_both_and_scales_by_the_squared_temperature():
  # At T = 2 the teacher gives 1/4, 3/4 and the student 1/2, 1/2.
  student, teacher = jnp.zeros((1, 2)), jnp.array([[0.0, 2 * log(3)]])
  np.testing.assert_allclose(distillation(student, teacher, 2.0), [4 * (0.25 * log(0.5) + 0.75 * log(1.5))], rtol=1e-6)
  np.testing.assert_allclose(distillation(teacher, teacher, 2.0), [0.0], atol=1e-7)


@pytest.mark.parametrize(
  'loss, expected',
  [
    # 2 (student - teacher) / 2 classes.
    (lambda student, teacher: squared_error(student, teacher), [[0.0, -2 * log(3)]]),
    # T (softmax(student / T) - softmax(teacher / T)).
    (lambda student, teacher: distillation(student, teacher, 2.0), [[0.5, -0.5]]),
  ],
  ids=['squared_error', 'kl'],
)
def test_only_the_student_receives_a_gradient(loss, expected):
  student, teacher = jnp.zeros((1, 2)), jnp.array([[0.0, 2 * log(3)]])
  to_student, to_teacher = jax.grad(lambda *logits: jnp.sum(loss(*logits)), argnums=(0, 1))(student, teacher)
  np.testing.assert_allclose(to_student, expected, rtol=1e-6)
  np.testing.assert_array_equal(to_teacher, jnp.zeros((1, 2)))


@pytest.mark.parametrize('loss', [squared_error, lambda *logits: distillation(*logits, 4.0)])
def test_half_precision_logits_give_float32_losses(loss):
  half = LOGITS.astype(jnp.bfloat16)
  assert loss(half, half).dtype == cross_entropy(half, jnp.array([2, 0])).dtype == jnp.float32


@pytest.mark.parametrize(
  'options, matched',
  [
    # log 2 - log 1, log 2 - log 2, log 4 - log 5.
    ({'matching': 'squared_error'}, (log(2) ** 2 + log(4 / 5) ** 2) / 3),
    ({'matching': 'kl', 'temperature': 1.0}, 0.125 * log(0.5) + 0.625 * log(1.25)),
    (
      {'matching': 'kl', 'temperature': 1.0, 'hard_label_weight': 0.25},
      0.75 * (0.125 * log(0.5) + 0.625 * log(1.25)) + 0.25 * log(2),
    ),
    (
      {'matching': 'kl', 'temperature': 1.0, 'hard_label_weight': 1.0, 'label_smoothing': 0.3},
      0.2 * log(4) + 0.8 * log(2),
    ),
  ],
)
def test_exit_losses(options, matched):
  """Exit 1 matches exit 3, exit 2 is not trained, exit 3 learns from the label 2."""
  labels = jnp.array([2])
  # Softmax of the student: 1/4, 1/4, 1/2; of the teacher: 1/8, 2/8, 5/8.
  student, teacher = jnp.log(jnp.array([[2.0, 2.0, 4.0]])), jnp.log(jnp.array([[1.0, 2.0, 5.0]]))
  losses = exit_losses([student, None, teacher], labels, (3, None, 0), **options)
  smoothing = options.get('label_smoothing', 0.0)
  assert losses.keys() == {1, 3}
  np.testing.assert_allclose(losses[3], cross_entropy(teacher, labels, smoothing)[0], rtol=1e-6)
  np.testing.assert_allclose(losses[1], matched, rtol=1e-5)


# Softmax of the student: 1/4, 1/4, 1/2; of teacher 2: 1/2, 1/4, 1/4; of teacher 3: 1/8, 2/8, 5/8.
KL_2, KL_3 = 0.25 * log(2), 0.125 * log(0.5) + 0.625 * log(1.25)


@pytest.mark.parametrize(
  ('teachers', 'weight', 'expected'),
  [
    ((), 0.25, log(2)),
    ((3,), 0.0, KL_3),
    ((2,), 0.25, 0.75 * KL_2 + 0.25 * log(2)),
    ((2, 3), 0.25, 0.75 * (KL_2 + KL_3) / 2 + 0.25 * log(2)),
    ((2, 3), 1.0, log(2)),
  ],
)
@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_exits_with_teachers(teachers, weight, temperature, expected):
  """The mean over the teachers and over two equal images, times T^2 at temperature T."""
  rows = [[2.0, 2.0, 4.0], [4.0, 2.0, 2.0], [1.0, 2.0, 5.0]]
  logits = [temperature * jnp.log(jnp.array([row, row])) for row in rows]
  losses = exit_losses(
    logits,
    jnp.array([2, 2]),
    (0, 0, 0),
    temperature=temperature,
    hard_label_weight=weight,
    teachers={1: teachers} if teachers else {},
  )
  # At temperature T the logits are T times as large, so only the labels' part differs from that at 1.
  hard = cross_entropy(logits[0], jnp.array([2, 2]))[0]
  share = weight if teachers else 1.0
  expected = temperature**2 * (expected - share * log(2)) + share * hard
  np.testing.assert_allclose(losses[1], expected, rtol=1e-5, atol=1e-6)
  for number in (2, 3):
    np.testing.assert_allclose(losses[number], cross_entropy(logits[number - 1], jnp.array([2, 2]))[0], rtol=1e-6)


@pytest.mark.parametrize('teachers', [(3,), (2, 3)])
def test_teachers_receive_no_gradient_from_their_students(teachers):
  def student_loss(logits):
    return exit_losses(logits, jnp.array([2, 0]), (0, 0, 0), teachers={1: teachers})[1]

  gradients = jax.grad(student_loss)([LOGITS + 1, LOGITS[::-1], 2 * LOGITS])
  assert np.any(gradients[0]) and not np.any(gradients[1]) and not np.any(gradients[2])


def test_exit_losses_are_means_over_the_batch():
  losses = exit_losses([LOGITS, LOGITS + 2], jnp.array([2, 0]), (2, 0))
  np.testing.assert_allclose(losses[1], 4.0, rtol=1e-6)
  np.testing.assert_allclose(losses[2], (log(8 / 5) + log(4)) / 2, rtol=1e-6)


def test_total_loss_weights_the_exits():
  losses = {1: jnp.float32(2.0), 3: jnp.float32(5.0)}
  assert total_loss(losses, (1.0, 1.0, 1.0)) == 7.0
  assert total_loss(losses, (0.5, 100.0, 3.0)) == 16.0


STUDENT, TEACHER = jnp.array([[1.0, 2.0, 4.0], [0.0, 0.0, 3.0]]), jnp.array([[0.0, 4.0, 2.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
  ('options', 'expected'),
  [
    ({}, [3.0, 3.0]),  # Differences 1, -2, 2 and 0, 0, 3.
    ({'scale': 'half_sum'}, [4.5, 4.5]),
    ({'centered': True}, [26 / 9, 2.0]),  # 2/3, -7/3, 5/3 and -1, -1, 2.
    ({'scale': 'half_sum', 'centered': True}, [13 / 3, 3.0]),
  ],
)
def test_scales_of_the_squared_error(options, expected):
  np.testing.assert_allclose(squared_error(STUDENT, TEACHER, **options), expected, rtol=1e-6)


def test_exits_learn_from_another_network():
  """Exit 1 matches exit 2 of the other one; exit 2 gets labels and that exit; no gradient reaches the other one."""
  labels, other = jnp.array([2, 0]), [None, TEACHER]

  def losses(logits, other):
    options = {'match_scale': 'half_sum', 'teachers': {2: (2,)}, 'hard_label_weight': 0.5, 'teacher_logits': other}
    return exit_losses([logits, LOGITS], labels, (2, 0), **options)

  found = losses(STUDENT, other)
  np.testing.assert_allclose(found[1], 4.5, rtol=1e-6)
  expected = 0.5 * (log(8 / 5) + log(4)) / 2 + 0.5 * jnp.mean(distillation(LOGITS, TEACHER, 1.0))
  np.testing.assert_allclose(found[2], expected, rtol=1e-6)
  gradient = jax.grad(lambda other: sum(losses(STUDENT, [None, other]).values()))(TEACHER)
  np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_images_weigh_more_where_they_leave():
  """Of seven images, 4, 2 and 1 leave at three exits (leaving 0.5); those that left are not counted again."""
  confidence = np.array(
    [
      [0.9, 0.2, 0.8, 0.7, 0.1, 0.6, 0.3],  # The images 0, 2, 3 and 5.
      [0.9, 0.4, 0.8, 0.7, 0.5, 0.6, 0.3],  # The images 4 and 1, of those that are left.
      [0.9, 0.4, 0.8, 0.7, 0.5, 0.6, 0.3],
    ]
  )
  logits = np.stack([confidence, np.zeros((3, 7))], -1).astype(np.float32)
  where = np.array([[1, 0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1]])
  expected = 1 + 0.3 * (where - 1 / 3)
  assert expected.mean() == pytest.approx(1)

  @jax.jit
  def both(logits):
    split = jax.vmap(lambda own: leaving_weights(list(own), 0.3, 0.5, 'devices'), axis_name='devices')
    return leaving_weights(list(logits), 0.3, 0.5), split(logits.transpose(1, 0, 2)[:, :, None])

  whole, parts = both(logits)
  np.testing.assert_allclose(whole, expected, rtol=1e-6)
  # An image on each of seven devices is ranked among all.
  np.testing.assert_allclose(parts[:, :, 0].T, expected, rtol=1e-6)


def test_losses_of_weighted_images():
  """Of two images, at exit 1 the second one leaves (it is more confident there), at exit 2 the first one."""
  labels = jnp.array([2, 2])
  first, second = jnp.log(jnp.array([[1.0, 2.0, 5.0], [1.0, 1.0, 14.0]])), LOGITS
  options = {'sample_weight': 0.5, 'leaving': 1.0}
  losses = jax.jit(lambda *logits: exit_losses(logits, labels, (0, 0), **options))(first, second)
  np.testing.assert_allclose(losses[1], (0.75 * log(8 / 5) + 1.25 * log(16 / 14)) / 2, rtol=1e-5)
  np.testing.assert_allclose(losses[2], (1.25 * log(8 / 5) + 0.75 * log(2)) / 2, rtol=1e-5)
