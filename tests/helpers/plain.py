"""Layers in NumPy and float64, applied to one place each of a model's variables: what plain reference networks are made
of, and how a model is compared with one."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import reference
import tiny

from paranet_jax.costs import abstract_variables

STEP = 2e-9  # Of differences: so short that hardly any ReLU changes on the way.


class Plain:
  """Layers by their path in `variables`; `statistics` holds the running statistics, updated if training."""

  def __init__(self, variables, train):
    self.train = train
    self.params, self.statistics = (
      jax.tree.map(np.float64, variables.get(kind, {})) for kind in ('params', 'batch_stats')
    )

  def conv(self, x, *path, stride=1):
    """Without bias, zero-padded by half the kernel."""
    return reference.convolve(x, at(self.params, path)['kernel'])[:, ::stride, ::stride]

  def norm(self, x, *path):
    """Batch normalization with DenseNet's momentum."""
    params, statistics = at(self.params, path), at(self.statistics, path)
    mean, var = statistics['mean'], statistics['var']
    if self.train:
      mean, var = np.mean(x, axis=(0, 1, 2)), np.var(x, axis=(0, 1, 2))
      statistics.update(mean=0.9 * statistics['mean'] + 0.1 * mean, var=0.9 * statistics['var'] + 0.1 * var)
    return (x - mean) / np.sqrt(var + 1e-5) * params['scale'] + params['bias']

  def norm_relu(self, x, *path):
    """Batch normalization and ReLU."""
    return relu(self.norm(x, *path))

  def pool_linear(self, x, *path):
    """Global average pool and a linear layer."""
    params = at(self.params, path)
    return np.mean(x, axis=(1, 2)) @ params['kernel'] + params['bias']


def relu(x):
  return np.maximum(x, 0)


def variables_of(model):
  """Kernels as they are drawn for training, so that deep networks keep their scale; all else random."""
  drawn = model.initial_variables(abstract_variables(model, (model.image_side, model.image_side, model.channels)), 0)

  def choose(path, drawn, random):
    return drawn if path[-1].key == 'kernel' else random

  return jax.tree_util.tree_map_with_path(choose, drawn, tiny.variables(model))


def at(tree, path):
  """The subtree at a path of keys."""
  for key in path:
    tree = tree[key]
  return tree


def assert_alike(model, network):
  """Compares a model with a function (variables, images, train) -> (logits of every exit, batch_stats) in NumPy.

  Compared are the logits of inference, and in training the logits, the updated statistics and the gradient of the
  exits' summed cross-entropy.
  """
  variables, labels = variables_of(model), tiny.labels(8)
  images = np.random.default_rng(1).normal(size=(8, tiny.SIDE, tiny.SIDE, 3)).astype(np.float32)

  @jax.jit
  def found(params):
    def loss(params):
      logits, updated = model.apply(variables | {'params': params}, images, True, mutable=['batch_stats'])
      return -sum(jnp.mean(jax.nn.log_softmax(own)[np.arange(8), labels]) for own in logits), (logits, updated)

    return model.apply(variables | {'params': params}, images), jax.grad(loss, has_aux=True)(params)

  inference, (gradient, (logits, updated)) = found(variables['params'])
  chex.assert_trees_all_close(inference, single(network(variables, images, False)[0]), rtol=1e-5, atol=1e-5)
  wanted = single(network(variables, images, True))
  chex.assert_trees_all_close((logits, updated['batch_stats']), wanted, rtol=1e-5, atol=1e-5)
  assert_gradient(gradient, functools.partial(_loss, network, variables, images, labels), variables['params'])


def _loss(network, variables, images, labels, params):
  logits, _ = network(variables | {'params': params}, images, True)
  return sum(np.mean(np.log(np.sum(np.exp(own), -1)) - own[np.arange(len(labels)), labels]) for own in logits)


def single(tree):
  """In float32, as models compute."""
  return jax.tree.map(np.float32, tree)


def assert_gradient(gradient, function, params):
  """Compares a gradient with the differences of a function in float64 along random directions.

  A direction is as long in each array as that array's gradient is short, so that each counts as much.
  """
  rng, params = np.random.default_rng(2), jax.tree.map(np.float64, params)
  gradient = jax.tree.map(np.float64, gradient)
  chex.assert_trees_all_equal_shapes(gradient, params)
  for _ in range(3):
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) / np.linalg.norm(leaf), gradient)
    there, back = (
      function(jax.tree.map(lambda leaf, way, step=step: leaf + step * way, params, direction))
      for step in (STEP, -STEP)
    )
    slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction)))
    np.testing.assert_allclose(slope, (there - back) / (2 * STEP), rtol=0, atol=1e-3)
