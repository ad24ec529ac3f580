"""Learning rate schedules, optimizers and conflict-averse gradients from configuration values."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float

Schedule = Callable[[Any], Any]


def make_schedule(
  kind: str,
  learning_rate: float,
  *,
  epochs: float,
  updates_per_epoch: float,
  drop_epochs: Sequence[float] = (),
  drop_factor: float = 0.1,
  warmup_epochs: float = 0.0,
) -> Schedule:
  """Learning rate as a function of the number of completed updates, usable inside jit.

  Args:
    kind: 'step' (times `drop_factor` at each of `drop_epochs`), 'cosine' (to 0), 'one_cycle' (from 1/25 up for 30% of
      the run, then down to 1/250,000; Smith and Topin 2018) or 'constant'.
    learning_rate: the peak value.
    epochs: length of the run.
    warmup_epochs: epochs of linear warmup to the schedule's value; 'one_cycle' has its own warmup.
  """
  updates = max(round(epochs * updates_per_epoch), 1)
  warmup = 0 if kind == 'one_cycle' else round(warmup_epochs * updates_per_epoch)
  drops = Counter(round(drop * updates_per_epoch) for drop in drop_epochs)
  cosine = optax.cosine_decay_schedule(1.0, 1)
  factor = {
    'step': optax.piecewise_constant_schedule(1.0, {drop: drop_factor**times for drop, times in drops.items()}),
    'cosine': lambda count: cosine(count / updates),
    'one_cycle': lambda count: _one_cycle(count / updates),
    'constant': optax.constant_schedule(1.0),
  }[kind]

  def schedule(count):
    count = jnp.asarray(count, jnp.float32)
    return learning_rate * factor(count) * jnp.minimum(1.0, (count + 1) / max(warmup, 1))

  return schedule


def _one_cycle(part: jax.Array) -> jax.Array:
  """Like `optax.cosine_onecycle_schedule`, which however rounds the peak to a whole update and takes a scalar count."""

  def cosine(start, end, part):
    return end + (start - end) * (1 + jnp.cos(jnp.pi * jnp.clip(part, 0.0, 1.0))) / 2

  return jnp.where(part < 0.3, cosine(1 / 25, 1.0, part / 0.3), cosine(1.0, 1 / 250_000, (part - 0.3) / 0.7))


def make_optimizer(
  kind: str,
  schedule: Schedule,
  *,
  momentum: float = 0.9,
  nesterov: bool = True,
  weight_decay: float = 1e-4,
  decay_mask: Any = None,
  decoupled_decay: bool = False,
  norm_bias_factor: float = 1.0,
  clip_norm: float = 0.0,
  accumulate_steps: int = 1,
) -> optax.GradientTransformation:
  """Builds an optimizer.

  Args:
    kind: 'sgd' (weight decay added to the gradient, as in DenseNet's code), 'adamw' (decoupled weight decay) or 'muon'
      (Jordan et al. 2024: orthogonalized momentum with decoupled weight decay for kernels, 'sgd' for the rest).
    schedule: learning rate by number of completed updates.
    momentum: momentum of 'sgd' and 'muon', or b1 of 'adamw'.
    nesterov: applies to all kinds.
    decay_mask: tree of bool, or a function from the parameters to it, which parameters decay; None: all.
    decoupled_decay: 'sgd' subtracts learning rate * weight decay * parameter from a parameter, apart from gradient and
      momentum (Loshchilov and Hutter 2019).
    norm_bias_factor: times the learning rate of the biases of normalization layers.
    clip_norm: maximum global gradient norm; 0: no clipping.
    accumulate_steps: steps whose gradients are averaged into one update.
  """
  parts: list[optax.GradientTransformation]
  sgd = [optax.add_decayed_weights(weight_decay, decay_mask), optax.sgd(schedule, momentum, nesterov)]
  if decoupled_decay:
    decay = optax.add_decayed_weights(weight_decay, decay_mask)
    sgd = [optax.trace(momentum, nesterov), decay, optax.scale_by_learning_rate(schedule)]
  if kind == 'sgd':
    parts = sgd
  elif kind == 'muon':
    muon = optax.contrib.muon(
      schedule,
      beta=momentum,
      nesterov=nesterov,
      weight_decay=weight_decay,
      weight_decay_mask=decay_mask,
      muon_weight_dimension_numbers=_matrices,
    )
    parts = [optax.partition({'kernel': muon, 'rest': optax.chain(*sgd)}, _kernel_or_rest)]
  else:
    parts = [optax.adamw(schedule, b1=momentum, nesterov=nesterov, weight_decay=weight_decay, mask=decay_mask)]
  if norm_bias_factor != 1:
    parts.append(optax.masked(optax.scale(norm_bias_factor), norm_biases))
  if clip_norm:
    parts.insert(0, optax.clip_by_global_norm(clip_norm))
  optimizer = optax.chain(*parts)
  if accumulate_steps > 1:
    optimizer = optax.MultiSteps(optimizer, accumulate_steps).gradient_transformation()
  return optimizer


def _is_kernel(name: str, leaf: Any) -> bool:
  """Whether a parameter is a kernel, by its name: that of attention's projections is `weight`, as in PyTorch.

  PyTorch calls slopes and scales `weight`, too; they have one axis.
  """
  return _own_name(name) == 'kernel' or (name.endswith('weight') and leaf.ndim >= 2)


def _own_name(name: str) -> str:
  """The name of a parameter in its module, which in an `NNXStage` stands behind the module's path and a dot."""
  return name.rpartition('.')[2]


def _kernel_or_rest(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: 'kernel' if _is_kernel(path[-1].key, leaf) and leaf.ndim >= 2 else 'rest', params
  )


def _matrices(params: Any) -> Any:
  """Kernels as matrices: from everything that an output channel reads, to the output channels."""

  def axes(path, leaf):
    *inputs, outputs = range(leaf.ndim)
    if _own_name(path[-1].key) != 'kernel':  # PyTorch has the output channels first.
      outputs, *inputs = range(leaf.ndim)
    return optax.contrib.MuonDimensionNumbers(tuple(inputs), outputs)

  return jax.tree_util.tree_map_with_path(axes, params)


def norm_biases(params: Any) -> Any:
  """Tree of bool: which parameters are biases of normalization layers, which unlike others have a scale beside them."""
  paths = {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}

  def is_one(path, _):
    *module, name = (key.key for key in path)
    return _own_name(name) == 'bias' and (*module, name.removesuffix('bias') + 'scale') in paths

  return jax.tree_util.tree_map_with_path(is_one, params)


def decay_mask(params: Any, reached: set[tuple[str, ...]], which: str) -> Any:
  """Tree of bool: which parameters decay. Those that no loss reaches do not: decay would only shrink them.

  Args:
    reached: paths of the parameters that the trained exits use.
    which: 'all' of these, or only the 'kernels'.
  """

  def decays(path, leaf):
    keys = tuple(key.key for key in path)
    return keys in reached and (which == 'all' or _is_kernel(keys[-1], leaf))

  return jax.tree_util.tree_map_with_path(decays, params)


_DUAL_STEPS = 200
"""Of projected gradient, for ten exits; the test compares with another solver."""


def conflict_averse(gradients: Sequence[Any], shared: Any, radius: float) -> Any:
  """The sum of the exits' gradients, turned for shared parameters toward the exit that gains least: CAGrad.

  Liu et al. 2021, "Conflict-Averse Gradient Descent for Multi-task Learning", Algorithm 1: with the mean g_0 of the K
  gradients, d = g_0 + c |g_0| / |g_w| g_w, where g_w = sum_k w_k g_k and the weights w, not negative and of sum 1,
  minimize g_w . g_0 + c |g_0| |g_w|. d maximizes the least gain min_k g_k . d within c |g_0| of g_0. Meta-GF (Sun et
  al. 2022) compares itself with it on multi-exit networks.

  The result is K d, so that its length is that of the sum, which it is for c = 0, and other parameters get the sum: the
  paper's mean, with K times the learning rate.

  Args:
    gradients: one tree per exit, of its weighted loss.
    shared: tree of bool: which parameters several exits use.
    radius: c, from 0 to less than 1; 0.4 and 0.5 in the paper's experiments.
  """
  leaves = [jax.tree.leaves(own) for own in gradients]
  chosen = [index for index, common in enumerate(jax.tree.leaves(shared)) if common]
  products = [
    [sum((jnp.vdot(one[index], other[index]) for index in chosen), jnp.float32(0)) for other in leaves]
    for one in leaves
  ]
  gram = jnp.asarray(products)
  weights = least_gain_weights(gram, radius)
  # Of opposite gradients, rounding may make both negative.
  length, turned = (jnp.sqrt(jnp.maximum(square, 0)) for square in (jnp.mean(gram), weights @ gram @ weights))
  # An exit whose gradient vanishes, as that of a saturated one does, gains the same wherever the others turn.
  share = jnp.where(turned > 0, len(gradients) * radius * length / jnp.where(turned > 0, turned, 1), 0)

  def combine(common: bool, *each: jax.Array) -> jax.Array:
    total = sum(each[1:], each[0])
    return total + share * sum(weight * own for weight, own in zip(weights, each, strict=True)) if common else total

  return jax.tree.map(combine, shared, *gradients)


def least_gain_weights(gram: Float[Array, 'K K'], radius: float) -> Float[Array, ' K']:
  """The weights w of `conflict_averse`.

  A step minimizes a quadratic upper bound of the objective, whose square root is concave, over the simplex; steps have
  Nesterov's momentum, restarted when it would raise the objective (O'Donoghue and Candes 2015).

  Args:
    gram: inner products of the exits' gradients.
  """
  smallest = 1e-12
  gram = gram / jnp.maximum(jnp.max(jnp.diag(gram)), jnp.finfo(jnp.float32).tiny)
  linear, root = jnp.mean(gram, axis=1), radius * jnp.sqrt(jnp.maximum(jnp.mean(gram), 0))
  largest = jnp.max(jnp.sum(jnp.abs(gram), axis=1))  # At least the largest eigenvalue.

  def step(_, state):
    weights, ahead, time = state
    length = jnp.sqrt(jnp.maximum(ahead @ gram @ ahead, smallest))
    slope = linear + root * (gram @ ahead) / length
    rate = length / jnp.maximum(root * largest, smallest)
    with jax.numpy_dtype_promotion('standard'):  # Of integers, in optax.
      new = optax.projections.projection_simplex(ahead - rate * slope)
    time = jnp.where((ahead - new) @ (new - weights) > 0, 1.0, time)
    later = (1 + jnp.sqrt(1 + 4 * time**2)) / 2
    return new, new + (time - 1) / later * (new - weights), later

  even = jnp.full(len(gram), 1 / len(gram), jnp.float32)
  return jax.lax.fori_loop(0, _DUAL_STEPS, step, (even, even, jnp.float32(1)))[0]
