"""What the devices exchange in a training step, read from the program compiled for eight of them."""

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny

from paranet_jax.devices import run_on
from paranet_jax.plan import hlo
from paranet_jax.steps import make_train_step, zero_totals

COUNT, STEPS, SHARE = 8, 2, 2


def collectives(name):
  """Opcode and bytes of every operation over several devices in a network's step, once per execution."""
  model, optimizer = tiny.named(name), optax.sgd(0.1, 0.9)
  state, objective = tiny.state(model, optimizer), tiny.objective(name)
  step = run_on(jax.devices()[:COUNT], lambda axis: make_train_step(model, optimizer, objective, tiny.AUGMENTED, axis))
  images, labels = jnp.asarray(tiny.images(32, model)), jnp.asarray(tiny.labels(32))
  order = jnp.zeros((COUNT, STEPS, SHARE), jnp.int32)
  text = step.lower(state, zero_totals(objective.targets), images, labels, order).compile().as_text()
  found = []
  for _, one, times in hlo.parse(text).executed():
    if one.opcode.startswith(('all-', 'reduce-scatter', 'collective-', 'ragged-', 'send', 'recv')):
      found += [(one.opcode, sum(array.size for array in one.results))] * times
  return state, found


def size(tree):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def statistics_size(params):
  """Bytes of a mean and a mean of squares of every channel that a convolution gives.

  A channel is normalized once, however many layers read it, while every reader has its own running statistics.
  """
  kernels = {
    jax.tree_util.keystr(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if path[-1].key == 'kernel' and not path[0].key.startswith('exit')
  }
  return sum(2 * 4 * leaf.shape[-1] for leaf in kernels.values())


@pytest.mark.skipif(len(jax.devices()) < COUNT, reason=f'needs {COUNT} devices, found {len(jax.devices())}')
def test_the_step_reduces_gradients_and_statistics_and_nothing_else():
  """The bytes of the parameters, twice those of the statistics (sums, and the cotangents of sums) and a few scalars."""
  name = 'PN2-2d'
  state, found = collectives(name)
  assert {opcode for opcode, _ in found} == {'all-reduce'}
  statistics = statistics_size(state.params)
  assert statistics <= size(state.batch_stats)
  scalars = sum(own for _, own in found) - size(state.params) - 2 * statistics
  # What a training line shows; the compiler merges equal ones, such as the loss of the only exit and the whole loss.
  assert scalars % 4 == 0 and 4 <= scalars <= 4 * len(zero_totals(tiny.objective(name).targets))
