"""flax's own layers applied to one place each of a model's variables: what the plain reference networks are made of."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tiny

from paranet_jax.costs import abstract_variables


class Plain:
  """Layers by their path in `variables`; `statistics` holds the running statistics, updated if training."""

  def __init__(self, variables, train):
    self.params, self.train = variables['params'], train
    self.statistics = jax.tree.map(lambda leaf: leaf, variables['batch_stats'])

  def conv(self, x, *path, stride=1):
    """nn.Conv without bias, zero-padded by half the kernel."""
    params = at(self.params, path)
    size, _, _, features = params['kernel'].shape
    layer = nn.Conv(features, (size, size), stride, padding=size // 2, use_bias=False)
    return layer.apply({'params': params}, x)

  def norm(self, x, *path):
    """nn.BatchNorm with DenseNet's momentum."""
    statistics = at(self.statistics, path)
    layer = nn.BatchNorm(use_running_average=not self.train, momentum=0.9, epsilon=1e-5)
    variables = {'params': at(self.params, path), 'batch_stats': statistics}
    x, updated = layer.apply(variables, x, mutable=['batch_stats'])
    statistics.update(updated['batch_stats'])
    return x

  def norm_relu(self, x, *path):
    """nn.BatchNorm and ReLU."""
    return nn.relu(self.norm(x, *path))

  def pool_linear(self, x, *path):
    """Global average pool and nn.Dense."""
    params = at(self.params, path)
    return nn.Dense(params['bias'].size).apply({'params': params}, jnp.mean(x, axis=(1, 2)))


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


def outcome(network, variables, images, labels):
  """Of a function (variables, images, train) -> (logits of every exit, batch_stats): all that a test compares.

  Returns:
    The logits of inference, and in training the logits, the updated statistics and the gradient of the exits' summed
    cross-entropy.
  """

  def loss(params):
    logits, statistics = network(variables | {'params': params}, images, True)
    rows = jnp.arange(len(labels))
    return -sum(jnp.mean(jax.nn.log_softmax(own)[rows, labels]) for own in logits), (logits, statistics)

  def everything(params):
    return network(variables | {'params': params}, images, False)[0], jax.grad(loss, has_aux=True)(params)

  return jax.jit(everything)(variables['params'])


def of_model(model):
  """A model as such a function."""

  def network(variables, images, train):
    logits, updated = model.apply(variables, images, train, mutable=['batch_stats'])
    return logits, updated['batch_stats']

  return network


def outcomes(model, reference):
  """Of a model and of such a function that stands for it, on the same variables and images."""
  variables, labels = variables_of(model), tiny.labels(8)
  images = np.random.default_rng(1).normal(size=(8, tiny.SIDE, tiny.SIDE, 3)).astype(np.float32)
  return tuple(outcome(network, variables, images, labels) for network in (of_model(model), reference))
