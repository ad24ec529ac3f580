"""Learning rate schedules and optimizers from configuration values."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

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


def _kernel_or_rest(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: 'kernel' if path[-1].key == 'kernel' and leaf.ndim >= 2 else 'rest', params
  )


def _matrices(params: Any) -> Any:
  """Kernels as matrices: from everything that an output channel reads, to the output channels."""
  return jax.tree.map(
    lambda leaf: optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1), params
  )


def norm_biases(params: Any) -> Any:
  """Tree of bool: which parameters are biases of normalization layers, which unlike others have a scale beside them."""
  paths = {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}

  def is_one(path, _):
    keys = tuple(key.key for key in path)
    return keys[-1] == 'bias' and (*keys[:-1], 'scale') in paths

  return jax.tree_util.tree_map_with_path(is_one, params)


def decay_mask(params: Any, reached: set[tuple[str, ...]], which: str) -> Any:
  """Tree of bool: which parameters decay. Those that no loss reaches do not: decay would only shrink them.

  Args:
    reached: paths of the parameters that the trained exits use.
    which: 'all' of these, or only the 'kernels'.
  """

  def decays(path, _):
    keys = tuple(key.key for key in path)
    return keys in reached and (which == 'all' or keys[-1] == 'kernel')

  return jax.tree_util.tree_map_with_path(decays, params)
