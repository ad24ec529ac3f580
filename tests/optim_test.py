"""Tests of schedules at points computed by hand, and of optimizers against a loop in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from flax import nnx

from paranet_jax.models.adopted.vit import _NETWORKS
from paranet_jax.models.nnx_stage import NNXStage
from paranet_jax.optim import conflict_averse, decay_mask, least_gain_weights, make_optimizer, make_schedule

PAPER = {'epochs': 130, 'updates_per_epoch': 781, 'drop_epochs': (50, 100)}
SHORT = {'epochs': 10, 'updates_per_epoch': 10}


@pytest.mark.parametrize(
  'kind, options, expected',
  [
    ('step', PAPER, {0: 0.1, 39_049: 0.1, 39_050: 0.01, 78_099: 0.01, 78_100: 0.001, 101_530: 0.001}),
    # Two steps are averaged into an update: 390.5 updates per epoch.
    ('step', PAPER | {'updates_per_epoch': 390.5}, {19_524: 0.1, 19_525: 0.01, 39_049: 0.01, 39_050: 0.001}),
    ('step', SHORT | {'drop_epochs': (2, 2.5), 'drop_factor': 0.5}, {19: 0.1, 20: 0.05, 24: 0.05, 25: 0.025}),
    ('step', SHORT | {'drop_epochs': (2, 2), 'drop_factor': 0.5}, {19: 0.1, 20: 0.025}),
    ('step', SHORT | {'drop_epochs': ()}, {0: 0.1, 99: 0.1}),
    ('cosine', SHORT, {0: 0.1, 25: 0.05 + 0.05 * 0.5**0.5, 50: 0.05, 100: 0.0, 120: 0.0}),
    ('one_cycle', SHORT, {0: 0.004, 15: 0.052, 30: 0.1, 65: 0.05, 100: 0.0}),
    ('one_cycle', SHORT | {'warmup_epochs': 5}, {0: 0.004, 30: 0.1}),
    ('constant', SHORT, {0: 0.1, 99: 0.1}),
    ('constant', SHORT | {'warmup_epochs': 0.5}, {0: 0.02, 1: 0.04, 4: 0.1, 5: 0.1, 99: 0.1}),
    ('step', SHORT | {'warmup_epochs': 1, 'drop_epochs': (0.5,)}, {4: 0.05, 5: 0.006, 9: 0.01, 10: 0.01}),
    ('cosine', {'epochs': 0.001, 'updates_per_epoch': 10}, {0: 0.1, 1: 0.0}),
    ('one_cycle', {'epochs': 1, 'updates_per_epoch': 1}, {0: 0.004, 1: 0.0}),
  ],
)
def test_schedules(kind, options, expected):
  schedule = make_schedule(kind, 0.1, **options)
  counts, rates = list(expected), list(expected.values())
  np.testing.assert_allclose([schedule(count) for count in counts], rates, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(counts)), rates, rtol=1e-5, atol=1e-6)


PARAMS = {'kernel': np.array([1.0, -2.0]), 'bias': np.array([0.5])}
GRADIENTS = [
  {'kernel': np.array([3.0, -1.0]) * scale, 'bias': np.array([4.0]) / scale} for scale in (1.0, 0.1, -2.0, 0.5)
]
RATES = [0.1, 0.1, 0.01, 0.01]


def train(optimizer, gradients=GRADIENTS):
  """Parameters after each gradient."""
  params = jax.tree.map(jnp.float32, PARAMS)
  state, every = optimizer.init(params), []
  update = jax.jit(optimizer.update)
  for gradient in gradients:
    updates, state = update(jax.tree.map(jnp.float32, gradient), state, params)
    params = jax.tree.map(jnp.add, params, updates)
    every.append(params)
  return every


def check(found, expected):
  for ours, wanted in zip(found, expected, strict=True):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, wanted)


def sgd(decay, momentum, nesterov, gradients=GRADIENTS):
  """PyTorch's rule, as used for DenseNet: decay adds to the gradient; momentum accumulates gradients, not updates."""
  params, velocity, every = dict(PARAMS), dict.fromkeys(PARAMS, 0.0), []
  for gradient, rate in zip(gradients, RATES, strict=False):
    for name in params:
      slope = gradient[name] + decay[name] * params[name]
      velocity[name] = momentum * velocity[name] + slope
      params[name] = params[name] - rate * (slope + momentum * velocity[name] if nesterov else velocity[name])
    every.append(dict(params))
  return every


ALL = {'kernel': 0.01, 'bias': 0.01}
SCHEDULE = {'epochs': 4, 'updates_per_epoch': 1, 'drop_epochs': (2,)}


@pytest.mark.parametrize('momentum, nesterov', [(0.9, True), (0.9, False), (0.0, False)])
def test_sgd(momentum, nesterov):
  optimizer = make_optimizer(
    'sgd', make_schedule('step', 0.1, **SCHEDULE), momentum=momentum, nesterov=nesterov, weight_decay=0.01
  )
  check(train(optimizer), sgd(ALL, momentum, nesterov))


def test_sgd_by_hand():
  """Slope 3 + 0.01 * 1 = 3.01, step 0.1 (3.01 + 0.9 * 3.01); then 0.3 + 0.01 * 0.4281 on a velocity of 0.9 * 3.01."""
  optimizer = make_optimizer('sgd', make_schedule('constant', 0.1, **SCHEDULE), weight_decay=0.01)
  first, second = train(optimizer, GRADIENTS[:2])
  np.testing.assert_allclose(first['kernel'][0], 1 - 0.5719, rtol=1e-5)
  np.testing.assert_allclose(second['kernel'][0], 0.4281 - 0.1 * (0.304281 + 0.9 * (0.304281 + 2.709)), rtol=1e-5)


@pytest.mark.parametrize('kind', ['sgd', 'adamw'])
def test_only_masked_parameters_decay(kind, standard_promotion):
  """With no gradient, only decay moves a parameter: by the learning rate times the coefficient."""
  optimizer = make_optimizer(
    kind,
    make_schedule('constant', 0.1, **SCHEDULE),
    momentum=0.0,
    nesterov=False,
    weight_decay=0.01,
    decay_mask={'kernel': True, 'bias': False},
  )
  (params,) = train(optimizer, [jax.tree.map(np.zeros_like, PARAMS)])
  check([params], [{'kernel': PARAMS['kernel'] * 0.999, 'bias': PARAMS['bias']}])
  assert params['bias'] == PARAMS['bias']


@pytest.mark.parametrize('nesterov', [False, True])
def test_adamw(nesterov, standard_promotion):
  """Loshchilov and Hutter (2019): decay is decoupled from the gradient; Nesterov momentum as in Dozat (2016)."""
  b1, b2, params, every = 0.8, 0.999, dict(PARAMS), []
  first, second = dict.fromkeys(PARAMS, 0.0), dict.fromkeys(PARAMS, 0.0)
  for count, (gradient, rate) in enumerate(zip(GRADIENTS, RATES, strict=True), 1):
    for name, slope in gradient.items():
      first[name] = b1 * first[name] + (1 - b1) * slope
      second[name] = b2 * second[name] + (1 - b2) * slope**2
      mean = first[name] / (1 - b1**count)
      if nesterov:
        mean = b1 * first[name] / (1 - b1 ** (count + 1)) + (1 - b1) * slope / (1 - b1**count)
      scaled = mean / (np.sqrt(second[name] / (1 - b2**count)) + 1e-8)
      params[name] = params[name] - rate * (scaled + 0.01 * params[name])
    every.append(dict(params))
  schedule = make_schedule('step', 0.1, **SCHEDULE)
  check(train(make_optimizer('adamw', schedule, momentum=b1, nesterov=nesterov, weight_decay=0.01)), every)


def test_clipping_precedes_decay():
  """The gradient (3, -1, 4) has norm sqrt(26)."""
  options = {'momentum': 0.0, 'nesterov': False, 'weight_decay': 0.01}
  schedule = make_schedule('step', 0.1, **SCHEDULE)
  clipped = [jax.tree.map(lambda slope: slope * 2 / 26**0.5, GRADIENTS[0])]
  check(train(make_optimizer('sgd', schedule, clip_norm=2.0, **options), GRADIENTS[:1]), sgd(ALL, 0.0, False, clipped))
  check(train(make_optimizer('sgd', schedule, clip_norm=6.0, **options), GRADIENTS[:1]), sgd(ALL, 0.0, False)[:1])


def test_accumulation_averages_gradients_and_counts_updates(standard_promotion):
  """Four steps of two are two updates with the mean gradients; the learning rate drops after the first."""
  schedule = make_schedule('step', 0.1, epochs=2, updates_per_epoch=1, drop_epochs=(1,))
  optimizer = make_optimizer('sgd', schedule, weight_decay=0.01, clip_norm=3.0, accumulate_steps=2)
  means = [jax.tree.map(lambda a, b: (a + b) / 2, *GRADIENTS[start : start + 2]) for start in (0, 2)]
  expected = train(make_optimizer('sgd', schedule, weight_decay=0.01, clip_norm=3.0), means)
  found = train(optimizer)
  check(found, [PARAMS, expected[0], expected[0], expected[1]])


@pytest.mark.parametrize(
  'which, decaying', [('all', {'a/kernel', 'a/scale', 'b/norm/bias'}), ('kernels', {'a/kernel'})]
)
def test_decay_mask(which, decaying):
  params = {'a': {'kernel': 1, 'scale': 1}, 'b': {'norm': {'bias': 1}, 'conv': {'kernel': 1}}, 'c': {'kernel': 1}}
  reached = {('a', 'kernel'), ('a', 'scale'), ('b', 'norm', 'bias')}
  leaves = jax.tree_util.tree_leaves_with_path(decay_mask(params, reached, which))
  assert {'/'.join(key.key for key in path) for path, decays in leaves if decays} == decaying
  assert len(leaves) == 5


@pytest.mark.parametrize('nesterov', [True, False])
def test_decoupled_decay(nesterov):
  """SGDW: the velocity has gradients alone, and a parameter loses learning rate * coefficient of itself."""
  params, velocity, every = dict(PARAMS), dict.fromkeys(PARAMS, 0.0), []
  for gradient, rate in zip(GRADIENTS, RATES, strict=True):
    for name, slope in gradient.items():
      velocity[name] = 0.9 * velocity[name] + slope
      step = slope + 0.9 * velocity[name] if nesterov else velocity[name]
      params[name] = params[name] - rate * (step + 0.01 * params[name])
    every.append(dict(params))
  schedule = make_schedule('step', 0.1, **SCHEDULE)
  check(train(make_optimizer('sgd', schedule, nesterov=nesterov, weight_decay=0.01, decoupled_decay=True)), every)


def test_biases_of_normalization_have_their_own_rate():
  params = {
    'norm': {'scale': jnp.ones(2), 'bias': jnp.ones(2)},
    'linear': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)},
  }
  schedule = make_schedule('constant', 0.1, **SCHEDULE)
  optimizer = make_optimizer('sgd', schedule, momentum=0.0, nesterov=False, weight_decay=0.0, norm_bias_factor=64.0)
  updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    expected = -6.4 if [key.key for key in path] == ['norm', 'bias'] else -0.1
    np.testing.assert_allclose(update, np.full_like(update, expected), rtol=1e-6)


def test_muon(standard_promotion):
  """Five steps of the quintic Newton-Schulz iteration on the momentum of kernels (Jordan 2024); the rest is SGD."""
  rng = np.random.default_rng(0)
  params = {'conv': {'kernel': rng.normal(size=(3, 3, 2, 4))}, 'norm': {'scale': np.ones(2), 'bias': np.ones(2)}}
  gradient = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
  schedule = make_schedule('constant', 0.1, **SCHEDULE)
  optimizer = make_optimizer('muon', schedule, momentum=0.9, nesterov=False, weight_decay=0.01)
  params, gradient = (jax.tree.map(jnp.float32, tree) for tree in (params, gradient))
  updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
  matrix = np.asarray(gradient['conv']['kernel'], np.float64).reshape(18, 4)
  matrix /= np.linalg.norm(matrix)
  for _ in range(5):
    squared = matrix.T @ matrix
    matrix = 3.4445 * matrix + matrix @ (-4.775 * squared + 2.0315 * squared @ squared)
  expected = -0.1 * (matrix.reshape(3, 3, 2, 4) + 0.01 * params['conv']['kernel'])
  np.testing.assert_allclose(updates['conv']['kernel'], expected, rtol=1e-3, atol=1e-5)
  for name in ('scale', 'bias'):
    plain = -0.1 * (gradient['norm'][name] + 0.01 * params['norm'][name])
    np.testing.assert_allclose(updates['norm'][name], plain, rtol=1e-5)


def test_parameters_of_nnx_stages_are_known_by_the_ends_of_their_names(standard_promotion):
  """A stage has all of them side by side, under their paths: each moves and decays as one of a linen module does."""

  class Block(nnx.Module):
    def __init__(self):
      self.conv = nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(0))
      self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def __call__(self, x):
      return self.norm(self.conv(x))

  stage = NNXStage(Block()).init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)), train=False)['params']
  linen = {}
  for name, leaf in stage.items():
    module, _, own = name.rpartition('.')
    linen.setdefault(module, {})[own] = leaf
  schedule = make_schedule('constant', 0.1, **SCHEDULE)

  def updates(params):
    def decays(params):
      paths = {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
      return decay_mask(params, paths, 'kernels')

    optimizer = make_optimizer('muon', schedule, norm_bias_factor=64.0, weight_decay=0.5, decay_mask=decays)
    gradient = jax.tree.map(lambda leaf: jnp.sin(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape), params)
    return jax.jit(optimizer.update)(gradient, optimizer.init(params), params)[0]

  expected = {f'{module}.{name}': leaf for module, own in updates(linen).items() for name, leaf in own.items()}
  chex.assert_trees_all_close(updates(stage), expected, rtol=1e-5)


@pytest.mark.parametrize('architecture', ['vit_b_16', 'deit_tiny_patch16_224'])
def test_the_projections_of_attention_are_kernels(architecture, standard_promotion):
  """They lie as in PyTorch, outputs first: a change is that of the transposed matrix as a kernel."""
  (name, _) = _NETWORKS[architecture][1].qkv
  rng = np.random.default_rng(0)
  value, slope = rng.normal(size=(2, 6, 4)).astype(np.float32)
  optimizer = make_optimizer('muon', make_schedule('constant', 0.1, **SCHEDULE), weight_decay=0.01)

  @jax.jit
  def change(slope, value):
    return optimizer.update(slope, optimizer.init(value), value)[0]

  ours = change({name: slope}, {name: value})[name]
  np.testing.assert_allclose(ours, change({'kernel': slope.T}, {'kernel': value.T})['kernel'].T, rtol=1e-4, atol=1e-6)
  assert np.abs(ours / slope).std() > 0.01  # SGD's would be a multiple of the slope.
  assert decay_mask({name: value}, {(name,)}, 'kernels') == {name: True}
  assert decay_mask({name: value[0]}, {(name,)}, 'kernels') == {name: False}  # As a slope of PReLU.


turned = jax.jit(lambda radius, *gradients: conflict_averse(gradients, {'all': True, 'own': False}, radius))


@pytest.mark.parametrize(
  ('first', 'second', 'radius', 'expected'),
  [
    # The second exit gains least. g_0 = (1, 0.5), and 2 w + 0.5 (1 - w) + c |g_0| |(2 w, 1 - w)| grows with w: w = 0,
    # g_w = (0, 1), and d = g_0 + c |g_0| (0, 1), twice as long.
    ((2, 0), (0, 1), 0.4, (2, 1 + 0.8 * 1.25**0.5)),
    ((2, 0), (0, 1), 0.0, (2, 1)),
    # Equal ones: every w has the objective's value; d = (1 + c) g_0.
    ((1, 2), (1, 2), 0.5, (3, 6)),
    # Opposite ones: the mean is 0, and stays.
    ((1, 2), (-1, -2), 0.5, (0, 0)),
    ((0, 0), (0, 0), 0.5, (0, 0)),
    # No direction is that of an exit without a gradient.
    ((0, 0), (20, 0), 0.4, (20, 0)),
    ((0, 0), (3, 4), 0.9, (3, 4)),
    ((1e-20, 0), (20, 0), 0.4, (20, 0)),
  ],
)
def test_conflict_averse_gradients(first, second, radius, expected):
  """What only one exit uses gets the sum."""
  gradients = ({'all': np.float32(own), 'own': np.float32([1])} for own in (first, second))
  found = turned(np.float32(radius), *gradients)
  np.testing.assert_allclose(found['all'], expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found['own'], [2.0])


def test_the_weights_of_exits_minimize_the_dual_objective():
  """Against SciPy, for random gradients of 2 to 10 exits that share a direction or conflict."""
  random, find = np.random.default_rng(0), jax.jit(least_gain_weights)
  for count, shift in ((2, 0.0), (7, 1.0), (10, 0.3), (10, 0.0)):
    gradients = random.normal(size=(count, 20)) * random.uniform(0.1, 3, (count, 1)) + shift
    gram = gradients @ gradients.T

    def objective(weights, gram=gram):
      return weights @ gram.mean(1) + 0.4 * np.sqrt(gram.mean() * (weights @ gram @ weights))

    best = scipy.optimize.minimize(
      objective,
      np.full(count, 1 / count),
      bounds=[(0, 1)] * count,
      constraints={'type': 'eq', 'fun': lambda weights: weights.sum() - 1},
    )
    weights = np.asarray(find(gram.astype(np.float32), 0.4), np.float64)
    assert weights.min() >= 0 and weights.sum() == pytest.approx(1, abs=1e-5)
    assert objective(weights) == pytest.approx(best.fun, abs=1e-4 * gram.mean())
