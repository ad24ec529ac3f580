"""Tests of FractalNet against its recursive definition in NumPy, its costs, stages and drop-path."""

import functools

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
import reference
import tiny

from paranet_jax.costs import abstract_variables, exit_costs, multiply_adds
from paranet_jax.models import fractalnet
from paranet_jax.models.fractalnet import FractalNet
from paranet_jax.models.layers import drop

network = functools.partial(FractalNet, num_classes=tiny.NUM_CLASSES, widths=(5, 6), image_side=tiny.SIDE)
WHOLE = 4
ALL = (1, 2, 3, 4)


class PlainFractal(plain.Plain):
  """The paper's expansion rule (equation 1), in NumPy.

  f_1(z) = conv(z); f_c(z) = [conv(z)] with [f_{c-1}(join f_{c-1}(z))]. Each convolution takes all passes through it as
  one batch.
  """

  def __init__(self, model, variables, train):
    super().__init__(variables, train)
    self.model = model

  def logits(self, images, exits):
    """By exit."""
    x = dict.fromkeys(exits, images)
    for block in range(1, len(self.model.widths) + 1):
      x = self._join(self._fractal(x, self.model.columns, block, {}))
      x = {number: reference.halve(value, 1, np.max) for number, value in x.items()}
    return {number: self.pool_linear(value, 'exit', 'classifier') for number, value in x.items()}

  def _fractal(self, z, depth, block, counts):
    """Outputs of this column and the deeper ones before their join: {column: {exit: features}}."""
    column = self.model.columns - depth + 1
    counts[column] = counts.get(column, 0) + 1
    passes = {number: value for number, value in z.items() if number in (column, self.model.num_exits)}
    outputs = {}
    if passes:
      name = f'block_{block}_column_{column}_conv_{counts[column]}'
      together = self.norm_relu(self.conv(np.concatenate(list(passes.values())), name, 'conv'), name, 'norm')
      outputs[column] = dict(zip(passes, np.split(together, len(passes)), strict=True))
    if depth == 1:
      return outputs
    inner = self._join(self._fractal(z, depth - 1, block, counts))
    return outputs | self._fractal(inner, depth - 1, block, counts)

  def _join(self, outputs):
    whole = [passes[self.model.num_exits] for passes in outputs.values() if self.model.num_exits in passes]
    joined = {column: passes[column] for column, passes in outputs.items() if column in passes}
    return joined | ({self.model.num_exits: np.mean(whole, axis=0)} if whole else {})


def noise(model, number=16):
  shape = (number, model.image_side, model.image_side, model.channels)
  return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@functools.cache
def _expected(model):
  numbers = range(1, model.num_exits + 1)
  return plain.single(PlainFractal(model, tiny.variables(model), False).logits(noise(model), numbers))


def by_exit(logits):
  return dict(enumerate(logits, 1))


@pytest.mark.parametrize('model, exits', [(network(columns=2), (1, 3)), (network(columns=4, widths=(3,)), (5,))])
def test_logits_match_the_recursive_definition(model, exits):
  variables, images = tiny.variables(model), noise(model)
  found = jax.jit(lambda: model.apply(variables, images, exits=exits))()
  expected = _expected(model)
  for number, logits in by_exit(found).items():
    if number in exits:
      np.testing.assert_allclose(logits, expected[number], rtol=1e-5, atol=1e-5)
    else:
      assert logits is None


@pytest.mark.parametrize('model, exits', [(network(widths=(5,)), ALL), (network(columns=2), (2,))])
def test_training_matches_the_recursive_definition(model, exits):
  variables, images = tiny.variables(model), noise(model)
  # Without the columns that these exits do not use.
  shapes = abstract_variables(model, images.shape[1:], exits)
  used = {kind: {name: variables[kind][name] for name in tree} for kind, tree in shapes.items()}

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def found(params):
    logits, updated = model.apply(used | {'params': params}, images, train=True, exits=exits, mutable=['batch_stats'])
    logits = {number: value for number, value in by_exit(logits).items() if value is not None}
    return score(jnp, logits), (logits, updated['batch_stats'])

  def expected(params):
    fractal = PlainFractal(model, used | {'params': params}, True)
    return fractal.logits(images, exits), fractal.statistics

  gradient, outcome = found(used['params'])
  chex.assert_trees_all_close(outcome, plain.single(expected(used['params'])), rtol=1e-4, atol=1e-5)
  plain.assert_gradient(gradient, lambda params: score(np, expected(params)[0]), used['params'])


def score(numpy, logits):
  """A fixed function of the logits."""
  return sum(number * numpy.mean(numpy.sin(value)) for number, value in logits.items())


@functools.cache
def _stage(number):
  model = network()
  return jax.jit(lambda carry: model.apply(tiny.variables(model), noise(model), carry, number, method='stage'))


@pytest.mark.parametrize(
  'numbers, kept',
  [
    ((1, 2, 3, 4), [{1}, {1, 2}, {1, 2, 3}, set()]),
    ((2, 4), [{2}, set()]),
    ((1, 3, 4), [{1}, {1, 3}, set()]),
    ((4,), [set()]),
  ],
)
def test_stages_match_the_full_pass_and_carry_what_the_whole_network_needs(numbers, kept):
  expected = _expected(network())
  carry = {}
  for number, columns in zip(numbers, kept, strict=True):
    found, carry = _stage(number)(carry)
    np.testing.assert_allclose(found, expected[number], rtol=1e-5, atol=1e-5)
    assert set(carry) == columns


def listed(columns, widths, side, channels, classes):
  """(Parameters, cumulative multiply-adds, multiply-adds alone) of each exit, summed layer by layer."""
  params, macs, of_first_join = [], [], []
  for column in range(1, columns + 1):
    own_params, own_macs, given, area = 0, 0, channels, side**2
    for width in widths:
      for conv in range(2 ** (column - 1)):
        read = given if conv == 0 else width
        own_params += 9 * read * width + 2 * width
        own_macs += area * 9 * read * width
        if width == widths[0] and given == channels and (conv == 0 or (conv == 1 and column == columns)):
          of_first_join.append(area * 9 * read * width)
      given, area = width, area // 4
    params.append(own_params)
    macs.append(own_macs)
  head = widths[-1] * classes
  alone = [own + head for own in macs] + [sum(macs) + head]
  cumulative = list(np.cumsum(alone))
  cumulative[-1] -= sum(of_first_join)
  params = [sum(params[:column]) + head + classes for column in range(1, columns + 1)]
  return list(zip([*params, params[-1]], cumulative, alone, strict=True))


def test_costs_equal_a_sum_over_layers():
  model = FractalNet(columns=4, widths=(2, 3), image_side=16, channels=1, num_classes=7)
  found = [(cost['params'], cost['macs'], cost['macs_alone']) for cost in exit_costs(model, (16, 16, 1))]
  assert found == listed(model.columns, model.widths, model.image_side, model.channels, model.num_classes)


def test_the_full_pass_computes_nothing_twice_or_for_other_exits():
  model = network()
  shape = (tiny.SIDE, tiny.SIDE, 3)
  variables, image = abstract_variables(model, shape), jnp.zeros((1, *shape))
  costs = exit_costs(model, shape)

  def macs(exits):
    return multiply_adds(lambda variables: model.apply(variables, image, exits=exits), variables)[0]

  assert macs(None) == costs[-1]['macs']
  assert macs((1, 2)) == costs[0]['macs_alone'] + costs[1]['macs_alone']
  assert macs(()) == 0


@functools.cache
def _train_step(local_drop_path, global_drop_path, exits):
  model = network(widths=(4,), local_drop_path=local_drop_path, global_drop_path=global_drop_path)
  variables, images = tiny.variables(model), noise(model)

  def train(key):
    rngs = None if key is None else {'drop_path': key}
    logits, _ = model.apply(variables, images, train=True, exits=exits, mutable=['batch_stats'], rngs=rngs)
    return logits

  return jax.jit(train)


COLUMNS = (1, 2, 3)


def test_global_drop_path_trains_one_column():
  alone = _train_step(0.5, 0.5, COLUMNS)(None)
  seen = set()
  for seed in range(8):
    logits = _train_step(0.15, 1.0, (WHOLE,))(jax.random.key(seed))[-1]
    same = [column for column in COLUMNS if np.allclose(logits, alone[column - 1], rtol=1e-4, atol=1e-4)]
    assert len(same) == 1
    seen.update(same)
  assert seen == {1, 2, 3}


def test_local_drop_path_depends_only_on_its_key():
  first, again, other = (_train_step(0.5, 0.0, (WHOLE,))(jax.random.key(seed))[-1] for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 1e-3
  never = _train_step(0.0, 0.0, (WHOLE,))(jax.random.key(0))[-1]
  np.testing.assert_allclose(never, _train_step(0.0, 0.0, (WHOLE,))(None)[-1], rtol=1e-5, atol=1e-5)


def test_drop_path_does_not_change_single_columns_or_inference():
  key = jax.random.key(0)
  chex.assert_trees_all_equal(_train_step(0.5, 0.5, COLUMNS)(key), _train_step(0.5, 0.5, COLUMNS)(None))
  model = network(dropout=(0.5, 0.5))
  variables, rngs = tiny.variables(model), {'drop_path': key, 'dropout': key}
  with_keys = jax.jit(lambda: model.apply(variables, noise(model), exits=(WHOLE,), rngs=rngs))()
  np.testing.assert_allclose(with_keys[-1], _expected(network())[WHOLE], rtol=1e-5, atol=1e-5)


def test_dropout_needs_a_key_and_depends_on_it():
  model = network(columns=2, dropout=(0.0, 0.5))
  variables, images = tiny.variables(model), noise(model, 4)

  @jax.jit
  def logits(rngs):
    return model.apply(variables, images, train=True, exits=(1,), mutable=['batch_stats'], rngs=rngs)[0][0]

  first, again, other = (logits({'dropout': jax.random.key(seed)}) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 1e-3
  with pytest.raises(flax.errors.InvalidRngError, match='dropout'):
    logits({})


def test_every_join_draws_its_own_drops(monkeypatch):
  joins = []

  def recorded(state, join, columns):
    joins.append(join)
    return drop.join_weights(state, join, columns)

  monkeypatch.setattr(fractalnet, 'join_weights', recorded)
  model = network()
  variables, rngs = tiny.variables(model), {'drop_path': jax.random.key(0)}
  jax.eval_shape(lambda: model.apply(variables, noise(model), train=True, mutable=['batch_stats'], rngs=rngs))
  assert len(joins) == len(set(joins)) == 2 * 2


@pytest.mark.parametrize('share', [0.0, 0.3, 1.0])
def test_draw(share):
  keys = jax.random.split(jax.random.key(0), 4000)
  columns = jax.jit(jax.vmap(lambda key: drop.draw(key, 3, 0.15, share).column))(keys)
  expected = [1 - share, *[share / 3] * 3]
  np.testing.assert_allclose(np.bincount(columns, minlength=4) / 4000, expected, atol=0.03)


@pytest.mark.parametrize('column, expected', [(2, [1, 0]), (3, [0, 1])])
def test_join_weights_of_a_single_column(column, expected):
  weights = jax.jit(lambda column: drop.join_weights(drop.DropPath(jax.random.key(0), 0.5, column), 1, (2, 3)))
  np.testing.assert_array_equal(weights(jnp.int32(column)), expected)


@pytest.mark.parametrize('rate', [0.0, 0.3, 1.0])
def test_local_join_weights(rate):
  """Each input survives with probability 1 - rate; if none does, one of the two is kept at random."""

  def weights(key):
    state = drop.DropPath(key, rate, jnp.int32(0))
    return drop.join_weights(state, 5, (2, 3)), drop.join_weights(state, 6, (2, 3))

  one, other = jax.jit(jax.vmap(weights))(jax.random.split(jax.random.key(0), 4000))
  one, other = np.asarray(one), np.asarray(other)
  shares = [np.mean((one == pair).all(axis=1)) for pair in ((0.5, 0.5), (1, 0), (0, 1))]
  np.testing.assert_allclose(shares, [(1 - rate) ** 2, *[(1 - (1 - rate) ** 2) / 2] * 2], atol=0.03)
  assert np.all(one == other) == (rate == 0.0)


def test_half_precision(standard_promotion):
  model = network(dtype=jnp.bfloat16, dropout=(0.5, 0.5))
  variables, images = tiny.variables(model), noise(model, 2)
  rngs = {'drop_path': jax.random.key(0), 'dropout': jax.random.key(0)}
  found = jax.eval_shape(lambda: model.apply(variables, images, train=True, mutable=['batch_stats'], rngs=rngs))
  assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype('float32')}
  _, carry = jax.eval_shape(lambda: model.apply(variables, images, {}, 1, method='stage'))
  assert carry[1].dtype == jnp.bfloat16


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'image_side': 6}, 'image_side must be a multiple of 4, to be halved 2 times, found 6'),
    ({'columns': 1}, 'columns must be 2 or more, found 1: one alone is no fractal'),
    ({'dropout': (0.1,)}, r'dropout \(0.1,\) must have one rate for each of the 2 blocks, or none'),
    ({'widths': ()}, r'widths must have one entry for each of 1 or more blocks, found \(\)'),
  ],
)
def test_shapes_that_do_not_fit_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    abstract_variables(network(**fields), (tiny.SIDE, tiny.SIDE, 3))
