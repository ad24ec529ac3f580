"""Exits learn on a frozen backbone as they would in the whole network, and nothing else changes."""

import functools
import os
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from paranet_jax import frozen as frozen_lib
from paranet_jax.base_config import base_config
from paranet_jax.costs import abstract_variables, variable_paths
from paranet_jax.data.augment import image_keys
from paranet_jax.data.dataset import Split
from paranet_jax.devices import place_order
from paranet_jax.feed import open_feed, step_data
from paranet_jax.frozen import (
  LOGITS,
  POOLED,
  feature_shapes,
  keep_features,
  logits_from_features,
  make_exits_step,
  vary,
)
from paranet_jax.host.errors import UserError
from paranet_jax.models.adopted.network import AdoptedNetwork
from paranet_jax.steps import Objective, TrainState, learning, make_train_step, zero_totals
from paranet_jax.targets import LABELS

SHAPE = (tiny.SIDE, tiny.SIDE, 3)
MODEL = tiny.dense(3)
IMAGES, NAMES = tiny.images(8, tiny.named('PN1-d')), tiny.labels(8)
ORDER = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
VARIABLES = tiny.filled(abstract_variables(MODEL, SHAPE))
FROZEN = variable_paths(MODEL, SHAPE, 3)
OPTIMIZER = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5, 0.9))
KEPT = {
  np.dtype(kind).name: feature_shapes(MODEL, VARIABLES, SHAPE, (1, 2), kind, 8) for kind in ('float32', 'float16')
}


def state(optimizer_of):
  params = jax.tree.map(jnp.asarray, VARIABLES['params'])
  return TrainState(jnp.int32(0), jnp.int32(0), params, {}, jax.jit(OPTIMIZER.init)(optimizer_of(params)))


def kept(kind='float32'):
  return keep_features(MODEL, VARIABLES, tiny.PLAIN, Split(IMAGES, NAMES), KEPT[kind], 3, 'training')


def trained(targets, images, steps=3, labeled=True, preprocessing=tiny.PLAIN, match_mirrored=False, **options):
  objective = Objective((*targets, None), (1.0, 2.0, 1.0), **options)
  make = functools.partial(
    make_exits_step, frozen=FROZEN, kept=isinstance(images, dict), labeled=labeled, match_mirrored=match_mirrored
  )
  step = jax.jit(make(MODEL, OPTIMIZER, objective, preprocessing))
  found, totals = state(lambda params: learning(params, FROZEN)), zero_totals((*targets, None), labeled)
  for _ in range(steps):
    found, totals = step(found, totals, images, NAMES, ORDER)
  return found, totals


@pytest.mark.parametrize(
  ('targets', 'options'),
  [
    ((3, 3), {}),
    ((LABELS, 3), {'matching': 'kl', 'temperature': 2.0}),
    ((LABELS, LABELS), {'teachers': {1: (3,), 2: (3,)}, 'hard_label_weight': 0.5}),
  ],
)
def test_exits_learn_as_in_the_whole_network(targets, options):
  """Without batch normalization, inference and training are the same."""
  objective = Objective((*targets, None), (1.0, 2.0, 1.0), **options)
  step = jax.jit(make_train_step(MODEL, OPTIMIZER, objective, tiny.PLAIN, frozen=FROZEN))
  expected, totals = state(lambda params: params), zero_totals((*targets, None))
  for _ in range(3):
    expected, totals = step(expected, totals, IMAGES, NAMES, ORDER)
  found, own_totals = trained(targets, kept(), **options)
  chex.assert_trees_all_close((found.params, own_totals), (expected.params, totals), rtol=1e-5)
  assert found.step == 3
  begun = VARIABLES['params']
  for path, leaf in jax.tree_util.tree_leaves_with_path(found.params):
    names = tuple(key.key for key in path)
    before = functools.reduce(lambda node, name: node[name], names, begun)
    assert (('params', *names) in FROZEN) == np.array_equal(leaf, before), names
  chex.assert_trees_all_equal_shapes(learning(found.params, FROZEN), found.opt_state[1][0].trace)


def test_augmented_features_are_computed_in_the_step():
  for augmented, same in ((tiny.PLAIN, True), (tiny.AUGMENTED, False)):
    found, _ = trained((3, 3), IMAGES, preprocessing=augmented)
    from_kept, _ = trained((3, 3), kept())
    close = jax.tree.map(functools.partial(np.allclose, rtol=1e-4, atol=1e-6), found.params, from_kept.params)
    assert all(jax.tree.leaves(close)) == same


def test_without_labels_agreement_with_the_last_exit_is_measured():
  _, totals = trained((3, 3), kept(), labeled=False)
  logits = np.stack(MODEL.apply(VARIABLES, (IMAGES[:4] / 255.0 - tiny.PLAIN.mean) / tiny.PLAIN.std))
  assert totals.keys() == {'loss', *(f'exit_{n}/{what}' for n in (1, 2) for what in ('loss', 'agreement'))}
  _, first = trained((3, 3), kept(), steps=1, labeled=False)
  agreement = (logits[:2].argmax(-1) == logits[2].argmax(-1)).mean(1)
  np.testing.assert_allclose([first[f'exit_{n}/agreement'] for n in (1, 2)], agreement)


def test_mirrored_images_are_kept_too():
  shapes = feature_shapes(MODEL, VARIABLES, SHAPE, (1, 2), 'float32', 8, mirrored=True)
  both = keep_features(MODEL, VARIABLES, tiny.PLAIN, Split(IMAGES, NAMES), shapes, 8, 'training', mirrored=True)
  other = Split(IMAGES[:, :, ::-1], NAMES)
  mirrored, alone = keep_features(MODEL, VARIABLES, tiny.PLAIN, other, KEPT['float32'], 8, 'training'), kept()
  drawn = vary(jax.random.split(jax.random.key(0), 8), both, mirrored=True, shift=0.0)
  for number in (1, 2, LOGITS):
    np.testing.assert_allclose(both[number], np.stack([alone[number], mirrored[number]], axis=1), rtol=1e-5)
    taken = [np.array_equal(own, each[1]) for own, each in zip(drawn[number], both[number], strict=True)]
    assert taken == [not np.array_equal(own, each[0]) for own, each in zip(drawn[number], both[number], strict=True)]
    assert 0 < sum(taken) < 8


def test_exits_match_the_mean_of_both_mirror_images(monkeypatch):
  pairs = {1: np.zeros((8, 2, 4)), LOGITS: np.random.default_rng(0).normal(size=(8, 2, 3))}
  drawn = vary(jax.random.split(jax.random.key(0), 8), pairs, mirrored=True, shift=0.0, match_mirrored=True)
  np.testing.assert_allclose(drawn[LOGITS], pairs[LOGITS].mean(1), rtol=1e-6)

  # The same where features are computed in the step, with a last exit that tells images from their mirror images.
  plain = frozen_lib.features_of

  def features_of(model, variables, images, exits):
    found = plain(model, variables, images, exits)
    return found | {LOGITS: found[LOGITS] + images[:, 0, 0]}

  features, pixels = kept(), (IMAGES / np.float32(255) - tiny.PLAIN.mean) / tiny.PLAIN.std
  features[LOGITS] = features[LOGITS] + (pixels[:, 0, 0] + pixels[:, 0, -1]) / 2
  expected, _ = trained((3, 3), features)
  monkeypatch.setattr(frozen_lib, 'features_of', features_of)
  found, _ = trained((3, 3), IMAGES, match_mirrored=True)
  chex.assert_trees_all_close(found.params, expected.params, rtol=1e-4, atol=1e-6)


def test_exits_match_the_features_of_the_last_one():
  model = AdoptedNetwork(image_side=8, arch='cifar_resnet20', exits=('layer3.1',), head='blocks')
  variables = model.initial_variables(abstract_variables(model, SHAPE), seed=0)
  # The copied block returns what it reads: it adds 0 to it.
  copy = variables['params']['exit_1']['blocks']['layer3.2']['bn2']
  copy.update(jax.tree.map(np.zeros_like, dict(copy)))
  shapes = feature_shapes(model, variables, SHAPE, (1, POOLED), 'float32', 8, mirrored=True)
  both = keep_features(model, variables, tiny.PLAIN, Split(IMAGES, NAMES), shapes, 8, 'training', mirrored=True)
  # The classifier makes the logits of them.
  classifier = variables['params']['linear']
  np.testing.assert_allclose(both[POOLED] @ classifier['kernel'] + classifier['bias'], both[LOGITS], rtol=1e-3)

  frozen, order = variable_paths(model, SHAPE, 2), jnp.arange(8, dtype=jnp.int32)[None]
  losses = {}
  for flip, images in ((True, both), (False, IMAGES)):
    for weight in (0.0, 3.0):
      step = make_exits_step(
        model,
        optax.sgd(0.0),
        Objective((2, None), (1.0, 1.0)),
        tiny.PLAIN._replace(flip=flip),
        frozen=frozen,
        kept=flip,
        match_mirrored=True,
        match_features=weight,
      )
      begun = TrainState(jnp.int32(0), jnp.int32(0), *(variables[name] for name in ('params', 'batch_stats')), None)
      begun = begun.replace(opt_state=optax.sgd(0.0).init(learning(begun.params, frozen)))
      _, totals = jax.jit(step)(begun, zero_totals((2, None)), images, NAMES, order)
      losses[flip, weight] = float(totals['exit_1/loss'])

  def error(read):
    wanted = both[POOLED].mean(1)
    return np.mean(np.square(read.mean((1, 2)) - wanted).sum(1) / np.square(wanted).sum(1))

  mirrored = np.array(
    [np.array(jax.random.bernoulli(jax.random.split(key)[0])) for key in image_keys(0, 0, 0, order[0])]
  )
  for flip, chosen in ((True, mirrored.astype(int)), (False, np.zeros(8, int))):
    found = (losses[flip, 3.0] - losses[flip, 0.0]) / 3
    np.testing.assert_allclose(found, error(both[1][np.arange(8), chosen]), rtol=1e-4)


def test_features_are_shifted_as_their_images_would_be():
  x = np.arange(1, 33, dtype=np.float32).reshape(1, 4, 4, 2).repeat(50, axis=0)
  keys = jax.random.split(jax.random.key(1), 50)
  found = vary(keys, {1: x, LOGITS: x[:, 0, 0]}, mirrored=False, shift=0.25)
  np.testing.assert_array_equal(found[LOGITS], x[:, 0, 0])
  padded = np.pad(x[0], ((1, 1), (1, 1), (0, 0)))
  expected = {padded[row : row + 4, column : column + 4].tobytes() for row in range(3) for column in range(3)}
  assert {np.asarray(each).tobytes() for each in found[1]} == expected


@pytest.mark.parametrize(('kind', 'in_memory'), [('float32', True), ('float16', True), ('float32', False)])
def test_kept_features(monkeypatch, tmp_path, capsys, kind, in_memory):
  monkeypatch.setenv('PARANET_CACHE_DIR', str(tmp_path))
  monkeypatch.setattr(frozen_lib, 'IN_MEMORY', 10**9 if in_memory else 0)
  features = kept(kind)
  assert isinstance(features[1], np.memmap) != in_memory and list(tmp_path.iterdir()) == []
  assert [features[n].dtype.name for n in (1, 2, LOGITS)] == [kind, kind, 'float32']
  size = sum(leaf.nbytes for leaf in features.values())
  where = 'in memory' if in_memory else 'on disk'
  assert f'features of 8 training images: {size / 1e6:,.0f} MB kept {where}, ' in capsys.readouterr().out
  expected = MODEL.apply(VARIABLES, (IMAGES / np.float32(255) - tiny.PLAIN.mean) / tiny.PLAIN.std)
  for number, logits in enumerate(expected, 1):
    found = logits_from_features(MODEL, number, VARIABLES, features)
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-2 if kind == 'float16' else 1e-5)


def test_no_room_for_kept_features(monkeypatch, tmp_path):
  """Writing to a map of a file that has no room would end the process by SIGBUS."""
  monkeypatch.setenv('PARANET_CACHE_DIR', str(tmp_path))
  monkeypatch.setattr(frozen_lib, 'IN_MEMORY', 0)
  asked = []

  def full(file, start, size):
    asked.append(size)
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'posix_fallocate', full)
  with pytest.raises(UserError) as error:
    kept('float32')
  assert str(error.value) == (
    f'expected 0.0 GB for features in {tmp_path}, found: No space left on device; make room, set PARANET_CACHE_DIR to '
    'another disk, or --config.train.features=float16'
  )
  assert asked[0] == jax.tree.leaves(KEPT['float32'])[0].size * 4 and not list(tmp_path.iterdir())


@pytest.mark.skipif(len(jax.devices()) < 2, reason='needs 2 devices')
@pytest.mark.parametrize('count', [1, 2])
def test_a_step_reads_the_same_features_from_disk_and_from_memory(count):
  """And its time is measured on data of the same kind."""
  devices, rows = jax.devices()[:count], np.random.default_rng(0).permutation(8).astype(np.int32).reshape(2, 4)
  features, batches = {1: np.arange(16, dtype=np.float32).reshape(8, 2), LOGITS: np.arange(8, dtype=np.float32)}, {}
  for streams in (False, True):
    task = types.SimpleNamespace(
      config=base_config(),
      dataset=types.SimpleNamespace(train=Split(IMAGES, NAMES)),
      keeps_features=True,
      streams=streams,
      steps_per_epoch=2,
      keep_features=lambda *_: features,
      feature_shapes=lambda _: jax.eval_shape(lambda: features),
    )
    task.config.train.batch_size = 4
    with open_feed(task, devices, lambda _: place_order(rows, devices), 0, {}) as feed:
      batches[streams] = [own for step in (0, 1) for own in read(feed(step), step, count, streams)]
      timed, trained = (
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), data)
        for data in (step_data(task, devices), feed(0))
      )
      assert timed == trained
  for found, expected, own in zip(batches[True], batches[False], rows.reshape(2 * count, -1), strict=True):
    chex.assert_trees_all_equal(found, expected)
    np.testing.assert_array_equal(found[0][1], features[1][own])


def read(data, step, count, streams):
  """Features and labels of each device's share of a step, as the body of the step takes them."""
  features, labels, order = jax.device_get(data)

  def share(leaf, device):
    own = leaf[device] if streams and count > 1 else leaf
    return own[order[device, step] if count > 1 else order[step]]

  return [jax.tree.map(functools.partial(share, device=device), (features, labels)) for device in range(count)]
