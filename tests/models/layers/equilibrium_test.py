"""Tests of gradient equilibrium: a parameter's gradient is the mean over the exits that use it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from paranet_jax.base_config import base_config
from paranet_jax.steps import zero_totals
from paranet_jax.task import build_task


def gradients(equilibrium):
  """A function from the exits' weights to the gradient of a step, by path."""
  config = base_config('PN3-ddx')
  config.model.update(layers_per_block=1, growth_rate=2, bn_size=2, image_side=8)
  config.data.update(name='digits', held_out=300)
  config.train.update(batch_size=4, learning_rate=1.0, schedule='constant')
  # So the update equals the negative gradient.
  config.train.update(momentum=0.0, nesterov=False, weight_decay=0.0)
  config.loss.gradient_equilibrium = equilibrium
  task = build_task(config)
  state, order = tiny.state(task.model, task.optimizer), jnp.arange(4, dtype=jnp.int32)[None]
  images, labels = jnp.asarray(task.dataset.train.images[:4]), jnp.asarray(task.dataset.train.labels[:4])

  @jax.jit
  def gradient(weights):
    weighted = dataclasses.replace(task, objective=task.objective._replace(exit_weights=weights))
    after, _ = weighted.train_step()(state, zero_totals(task.targets), images, labels, order)
    return jax.tree.map(jnp.subtract, state.params, after.params)

  def by_path(*weights):
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(gradient(jnp.float32(weights))))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}

  return by_path


def test_a_gradient_is_the_mean_over_the_exits_that_reach_it():
  alone = gradients(False)
  each = [alone(1, 0, 0), alone(0, 1, 0)]
  found = set()
  for path, value in gradients(True)(1, 1, 1).items():
    reaching = [own[path] for own in each if own[path].any()]
    found.add(len(reaching))
    np.testing.assert_allclose(value, sum(reaching) / max(len(reaching), 1), rtol=1e-3, atol=2e-6, err_msg=path)
  assert found == {0, 1, 2}
