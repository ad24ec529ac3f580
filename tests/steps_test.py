"""Tests of the training step, and of how it depends on the seed, the epoch and the step."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import tiny

from paranet_jax.costs import multiply_adds
from paranet_jax.steps import init_state, label_rank, make_train_step, model_rngs, train_metrics, zero_totals
from paranet_jax.targets import parse_name

NAME = 'PN2-2d'
BATCH = 8
IMAGES = tiny.images(16, tiny.named(NAME))
LABELS = tiny.labels(16)
ORDER = np.random.default_rng(3).permutation(16).astype(np.int32).reshape(2, BATCH)


def build(name=NAME, preprocessing=tiny.AUGMENTED, optimizer=None, fields=None, **options):
  """A jitted step and a function from (seed, step) to its state."""
  model = tiny.named(name, **(fields or {}))
  optimizer = optimizer or optax.sgd(0.05, 0.9, True)
  step = jax.jit(make_train_step(model, optimizer, tiny.objective(name, **options), preprocessing))
  totals = zero_totals(parse_name(name).targets)

  def run(state, steps=1, order=ORDER, images=IMAGES, labels=LABELS):
    sums = totals
    for _ in range(steps):
      state, sums = step(state, sums, images, labels, order)
    return state, sums

  return run, lambda **where: tiny.state(model, optimizer, **where)


@pytest.fixture(scope='module')
def augmented():
  return build()


@pytest.fixture(scope='module')
def plain():
  return build(preprocessing=tiny.PLAIN, optimizer=optax.sgd(0.1), exit_weights=(0.5, 2.0))


def log_softmax(logits):
  return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


@pytest.mark.parametrize('first_step', [0, 1, 2, 5])
def test_one_step(plain, first_step):
  """Batch, losses, metrics, statistics and the update of a bias, all worked out from the reference's logits."""
  run, state = plain
  before = state(step=first_step)
  after, metrics = run(before)
  indices = ORDER[first_step % 2]
  pixels = (IMAGES[indices] / 255 - np.array(tiny.PLAIN.mean)) / np.array(tiny.PLAIN.std)
  variables = {'params': before.params, 'batch_stats': before.batch_stats}
  geometry = {'blocks': (1, 2), 'halvings': (2, 1), 'cascade': ((2, 2),)}
  (student, teacher), statistics = reference.paranet(variables, pixels, train=True, **geometry)
  one_hot = np.eye(tiny.NUM_CLASSES)[LABELS[indices]]
  nll = {number: -np.sum(one_hot * log_softmax(logits), -1).mean() for number, logits in ((1, student), (2, teacher))}
  right = {number: np.mean(logits.argmax(-1) == LABELS[indices]) for number, logits in ((1, student), (2, teacher))}
  matching = np.mean((student - teacher) ** 2)
  expected = {
    'loss': 0.5 * matching + 2.0 * nll[2],
    'exit_1/loss': matching,
    'exit_1/nll': nll[1],
    'exit_1/accuracy': right[1],
    'exit_2/loss': nll[2],
    'exit_2/nll': nll[2],
    'exit_2/accuracy': right[2],
  }
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
  chex.assert_trees_all_close(after.batch_stats, jax.tree.map(np.float32, statistics), rtol=1e-4, atol=1e-4)
  slope = 2.0 * np.mean(np.exp(log_softmax(teacher)) - one_hot, axis=0)
  old, new = (each.params['exit_2']['classifier']['bias'] for each in (before, after))
  np.testing.assert_allclose(new, old - 0.1 * slope, rtol=1e-4, atol=1e-5)
  assert (after.step, after.seed) == (first_step + 1, 0)


def test_totals_add_up(augmented):
  run, state = augmented
  after_one, first = run(state())
  _, second = run(after_one)
  _, both = run(state(), steps=2)
  chex.assert_trees_all_close(both, jax.tree.map(jnp.add, first, second), rtol=1e-6)


def test_the_same_state_gives_the_same_result(augmented):
  run, state = augmented
  chex.assert_trees_all_equal(run(state(seed=5), steps=3), run(state(seed=5), steps=3))


@pytest.mark.parametrize(
  'where, changes',
  [
    ({'seed': 1}, True),
    ({'seed': -1}, True),
    ({'step': 1}, True),  # The next step of the epoch.
    ({'step': 2}, True),  # The next epoch.
    ({}, False),
  ],
)
def test_augmentation_depends_on_seed_epoch_and_step(augmented, where, changes):
  """The two rows of the order are the same batch here, so only the augmentation can differ."""
  run, state = augmented
  order = np.stack([ORDER[0], ORDER[0]])
  _, metrics = run(state(), order=order)
  _, others = run(state(**where), order=order)
  assert (metrics['loss'] != others['loss']) == changes


def test_the_loss_falls(plain):
  """Brighter classes are learned from a few images."""
  run, state = plain
  images = np.uint8(IMAGES // 4 + 90 * LABELS[:, None, None, None])
  now, losses = state(), []
  for _ in range(20):
    now, metrics = run(now, images=images)
    losses.append(float(metrics['exit_2/loss']))
  assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:4])


@functools.cache
def work(name, **fields):
  """Multiply-adds of a training step."""
  run, state = build(name, fields=fields)
  return multiply_adds(run, jax.eval_shape(state))[0]


@pytest.mark.parametrize(
  'name, smaller, fields',
  [
    ('PN3-dxx', 'PN1-d', {'halvings': (3,)}),
    ('PN3-xdx', 'PN2-xd', {'halvings': (3, 2)}),
    ('PN3cut-xdx', 'PN1-d', {'blocks': (2,), 'halvings': (2,)}),
  ],
)
def test_what_no_loss_reaches_is_not_computed(name, smaller, fields):
  """A step's work is that of a network without the pipelines that no loss reaches."""

  assert 0 < work(name) == work(smaller, **fields) < work('PN3cut-ddd')


def test_half_precision_keeps_a_float32_state(standard_promotion):
  run, state = build('PN1-d', fields={'dtype': jnp.bfloat16})
  after, metrics = run(state())
  chex.assert_trees_all_equal_shapes_and_dtypes(after, state())
  assert np.isfinite(metrics['loss'])


def test_init_state():
  model, optimizer = tiny.network(1), optax.sgd(0.1, 0.9)
  first, same, other = (init_state(model, optimizer, seed, (tiny.SIDE, tiny.SIDE, 3)) for seed in (3, 3, -4))
  chex.assert_trees_all_equal_shapes_and_dtypes(first, tiny.state(model, optimizer))
  chex.assert_trees_all_equal(first, same)
  assert (first.step, first.seed, other.seed) == (0, 3, -4)
  assert not np.array_equal(first.params['pipeline_1_stem']['kernel'], other.params['pipeline_1_stem']['kernel'])


@pytest.mark.parametrize(
  'init',
  [
    lambda params: {'sums': jax.tree.map(jnp.zeros_like, params), 'number': jnp.int32(4), 'scale': jnp.ones(3)},
    lambda params: (params, jnp.zeros(2)),  # Some parts are the parameters themselves.
    lambda params: jax.tree.map(lambda leaf: 2 * leaf, params),
    lambda params: jnp.arange(3.0) + 1,
  ],
  ids=['constants', 'parameters', 'computed of parameters', 'computed'],
)
def test_the_first_state_of_an_optimizer(init):
  optimizer = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
  model = tiny.dense(1)
  found = init_state(model, optimizer, 0, (tiny.SIDE, tiny.SIDE, 3))
  chex.assert_trees_all_equal(found.opt_state, init(found.params), strict=True)


@pytest.mark.parametrize(
  'labels, nll, accuracy',
  [
    ([1, 1], (np.log(4 / 3) + np.log(4)) / 2, 0.5),
    # Blended: predicted are class 1, whose share is 0.75, and class 0, all of the second image.
    ([[0.25, 0.75], [1.0, 0.0]], (0.25 * np.log(4) + 1.75 * np.log(4 / 3)) / 2, 0.875),
  ],
)
def test_train_metrics(labels, nll, accuracy):
  logits = [jnp.log(jnp.array([[1.0, 3.0], [3.0, 1.0]])), None]
  metrics = train_metrics(logits, jnp.array(labels), {1: jnp.float32(7.0)}, jnp.float32(8.0))
  expected = {'loss': 8.0, 'exit_1/loss': 7.0, 'exit_1/nll': nll, 'exit_1/accuracy': accuracy}
  assert metrics.keys() == expected.keys() == zero_totals((0, None)).keys()
  chex.assert_trees_all_close(metrics, expected, rtol=1e-6)


@pytest.mark.parametrize(
  'logits, label, rank',
  [
    ([1, 2, 3], 2, 0),
    ([1, 2, 3], 1, 1),
    ([1, 2, 3], 0, 2),
    # Of equal ones the first goes first, as argmax says.
    ([3, 3, 1], 0, 0),
    ([3, 3, 1], 1, 1),
    ([3, 3, 3], 2, 2),
    ([1, 5, 5], 0, 2),
    # What is not a number goes before every label, and as a label goes last.
    ([np.nan, 2, 1], 1, 1),
    ([np.nan, 2, 1], 0, 3),
    ([np.nan, np.nan, np.nan], 0, 3),
    ([np.inf, 2, np.inf], 2, 1),
    ([-np.inf, 2, 1], 0, 2),
  ],
)
def test_label_rank(logits, label, rank):
  assert label_rank(jnp.float32([logits]), jnp.array([label])).tolist() == [rank]


def test_resumed_runs_keep_the_random_keys_of_their_model():
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 3), 11)
  found = model_rngs(types.SimpleNamespace(rng_names=('first', 'second')), jnp.int32(5), jnp.int32(11))
  assert found == {'first': jax.random.fold_in(key, 0), 'second': jax.random.fold_in(key, 1)}
