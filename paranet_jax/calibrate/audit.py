"""`calibrate --audit`: how far hard images, or an adversary, raise the mean cost of a calibrated run.

A budget bounds the mean cost of images like the held-out ones. Other images may be harder, and leave later. The worst
that can happen is known, every image at the most expensive exit; this measures how near to it images can be brought.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from paranet_jax.data.augment import normalize
from paranet_jax.data.corruptions import CORRUPTIONS
from paranet_jax.data.dataset import Split, max_drawable, stratified_indices
from paranet_jax.early.exit_plan import ExitPlan
from paranet_jax.early.scores import confidences
from paranet_jax.early.thresholds import exits_taken
from paranet_jax.steps import Preprocessing

IMAGES = 1000
"""Most test images that are audited: the attack computes each gradient `STEPS` times."""
WITHIN = 8
"""The largest change of a pixel value by the attack, of 255: what people do not notice."""
STEPS = 20
_BATCH, _PIXELS = 100, 2**19
"""Most images at once, and most pixels of them: gradients keep what all layers compute."""
_SEED = 300
_TINY = 1e-30


class Attacked:
  """A network with its thresholds, as the attack sees them. V exits are visited.

  Args:
    plan: with the exits that are visited.
    model: with the multi-exit interface.
    variables: its parameters and statistics.
    preprocessing: that of evaluation.
  """

  def __init__(self, plan: ExitPlan, model: Any, variables: Any, preprocessing: Preprocessing):
    places = [plan.exits.index(number) for number in plan.visited]
    self.places = np.array(places)
    self._score, self._temperatures = plan.score, [plan.temperatures[k] for k in places]
    self._thresholds = np.array([*plan.confidence_floors[places[:-1]], -np.inf])
    self.macs = np.array([plan.macs[k] for k in places], np.float64)

    def forward(pixels: Any) -> Float[Array, 'V N C']:
      images = normalize(pixels, preprocessing.mean, preprocessing.std)  # Of floats, so that they have a gradient.
      logits = model.apply(variables, images, exits=plan.visited)
      return jnp.stack([logits[number - 1] for number in plan.visited]).astype(jnp.float32)

    def slowness(pixels: Float[Array, 'N H W C']) -> tuple[Float[Array, ''], Any]:
      logits = forward(pixels)
      cost = self._smooth_cost(logits)
      return cost.sum(), (cost, logits)

    self._forward, self._gradient = jax.jit(forward), jax.jit(jax.grad(slowness, has_aux=True))

  def outcome(self, logits: Float[np.ndarray, 'V N C']) -> tuple[Int[np.ndarray, ' N'], Int[np.ndarray, ' N']]:
    """The exit that each image takes, as an index of the visited ones, and the label that it gets there."""
    taken = exits_taken(confidences(logits, self._score, self._temperatures), self._thresholds)
    return taken, logits[taken, np.arange(len(taken))].argmax(-1)

  def logits(self, images: UInt8[np.ndarray, 'N H W C']) -> Float[np.ndarray, 'V N C']:
    """The logits of the visited exits."""
    return np.asarray(self._forward(images))

  def slowed(
    self, images: UInt8[np.ndarray, 'N H W C'], within: int = WITHIN, steps: int = STEPS
  ) -> UInt8[np.ndarray, 'N H W C']:
    """Images that differ from these by at most `within` in every pixel value and leave as late as was found.

    Projected gradient ascent on the expected cost of an image, where it leaves at an exit with the probability
    sigmoid(confidence - threshold) if it has not left before. This is the attack of Hong, Kaya, Modoranu and Dumitras,
    "A Panda? No, It's a Sloth: Slowdown Attacks on Adaptive Multi-Exit Neural Network Inference" (DeepSloth), 2021.
    Theirs makes the probabilities of all exits uniform; this one knows the thresholds. Steps are whole pixel values, so
    every iterate is an image, and the one that really costs most is kept. No image gets cheaper.
    """
    stride = max(round(2.5 * within / steps), 1)
    low, high = (np.clip(images.astype(np.int16) + side, 0, 255) for side in (-within, within))
    current, best = images.astype(np.int16), images.copy()
    reached = np.full(len(images), -np.inf), np.full(len(images), -np.inf)
    for step in range(steps + 1):
      gradient, (smooth, logits) = self._gradient(current.astype(np.float32))
      cost, smooth = self.macs[self.outcome(np.asarray(logits))[0]], np.asarray(smooth)
      better = (cost > reached[0]) | ((cost == reached[0]) & (smooth > reached[1]))
      best[better] = current[better].astype(np.uint8)
      reached = np.where(better, cost, reached[0]), np.where(better, smooth, reached[1])
      if step < steps:
        signs = np.sign(np.nan_to_num(np.asarray(gradient))).astype(np.int16)
        current = np.clip(current + stride * signs, low, high)
    return best

  def _smooth_cost(self, logits: Float[Array, 'V N C']) -> Float[Array, ' N']:
    """The expected cost, in units of the most expensive exit."""
    costs, stays, total = self.macs / self.macs.max(), jnp.ones(logits.shape[1]), jnp.zeros(logits.shape[1])
    probabilities = [jax.nn.softmax(each / t) for each, t in zip(logits, self._temperatures, strict=True)]
    for k in range(len(costs) - 1):
      if self._thresholds[k] <= 0:
        leaves = 1.0
      elif self._score == 'patience':
        leaves = _equal_in_a_row(probabilities[: k + 1], self._thresholds[k])
      else:
        sure = smooth_confidence(logits[k] / self._temperatures[k], self._score)
        leaves = jax.nn.sigmoid(sure - self._thresholds[k]) if np.isfinite(self._thresholds[k]) else 0.0
      total, stays = total + stays * leaves * costs[k], stays * (1 - leaves)
    return total + stays * costs[-1]


def smooth_confidence(logits: Float[Array, 'N C'], score: str) -> Float[Array, ' N']:
  """`run.confidence` in float32, with a gradient.

  Args:
    logits: divided by the temperature.
    score: 'max_prob', 'entropy' or 'margin'.
  """
  total = jax.nn.logsumexp(logits, axis=-1)
  if score == 'entropy':
    logs = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(logs) * logs, axis=-1)
    return jnp.log(jnp.log(logits.shape[-1])) - jnp.log(entropy + _TINY)
  others = jnp.where(jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=bool), -jnp.inf, logits)
  unsure = jax.nn.logsumexp(others, axis=-1)
  if score == 'margin':
    unsure = jnp.logaddexp(unsure, others.max(-1))
  return total - unsure


def _equal_in_a_row(probabilities: list[Array], needed: float) -> Any:
  """The probability that as many exits in a row, up to the last of these, would draw the same class in pairs."""
  pairs = int(np.ceil(needed)) - 1 if np.isfinite(needed) else len(probabilities)
  if pairs >= len(probabilities):
    return 0.0
  last = probabilities[len(probabilities) - 1 - pairs :]
  agree: Any = 1.0
  for before, after in zip(last, last[1:], strict=False):
    agree = agree * jnp.sum(before * after, axis=-1)
  return agree


def audit(
  plan: ExitPlan,
  model: Any,
  variables: Any,
  preprocessing: Preprocessing,
  test: Split,
  labels: Int[np.ndarray, ' N'],
  kind: str = 'accuracy',
  say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Measures a plan on test images as they are, corrupted in every way of `CORRUPTIONS`, and attacked.

  What is found is a lower bound of what is possible: other corruptions or a better attack may cost more, but never more
  than `most_macs`.

  Args:
    plan: with thresholds.
    test: of which at most `IMAGES` are drawn.
    labels: of all of them; the last exit's answers where there are none.
    kind: what being right is called, 'accuracy' or 'agreement'.
    say: takes a line on what is being done.

  Returns:
    `images`, `within`, `steps`; `most_macs`, of the most expensive exit. `clean`, `corruptions` (a list, each with its
    `name`), the `hardest` of them, which costs most, and `attack`. Each of these has the `shares` [K] of images that
    leave at each exit, `cost_macs` and, where they were measured, `cost_ms` and `cost_joules` (means of an image), and
    `accuracy` or `agreement`.
  """
  drawn = np.arange(len(test))
  if len(test) > IMAGES:
    classes = labels if max_drawable(labels) >= IMAGES else np.zeros_like(labels)
    drawn = stratified_indices(classes, IMAGES, _SEED)[1]
  split, attacked = test.take(drawn), Attacked(plan, model, variables, preprocessing)
  say(f'auditing {len(drawn):,} test images in {len(CORRUPTIONS)} corruptions and under a slowdown attack')
  taken: dict[str, list[Any]] = {name: [] for name in ('clean', *CORRUPTIONS, 'attack')}
  height, width = split.images.shape[1:3]
  batch = max(min(_BATCH, _PIXELS // (height * width)), 1)
  for first in range(0, len(drawn), batch):
    images = np.asarray(split.images[np.arange(first, min(first + batch, len(drawn)))])
    changed = {'clean': images, 'attack': attacked.slowed(images)}
    changed |= {name: make(images, np.random.default_rng((_SEED, first))) for name, make in CORRUPTIONS.items()}
    for name, each in changed.items():
      taken[name].append(attacked.outcome(attacked.logits(each)))
  right = labels[drawn]

  def measured(name: str) -> dict[str, Any]:
    exits, answers = (np.concatenate(parts) for parts in zip(*taken[name], strict=True))
    shares = np.bincount(attacked.places[exits], minlength=len(plan.exits)) / len(exits)
    found: dict[str, Any] = {'shares': shares.tolist()}
    for unit, costs in (('macs', plan.macs), ('ms', plan.ms), ('joules', plan.joules)):
      if costs is not None:
        each = np.array([0.0 if cost is None else cost for cost in costs])
        found[f'cost_{unit}'] = float(shares @ each)
    return found | {kind: float((answers == right).mean())}

  corruptions = [{'name': name, **measured(name)} for name in CORRUPTIONS]
  return {
    'images': len(drawn),
    'within': WITHIN,
    'steps': STEPS,
    'most_macs': plan.most_macs,
    'clean': measured('clean'),
    'corruptions': corruptions,
    'hardest': max(corruptions, key=lambda row: row['cost_macs']),
    'attack': measured('attack'),
  }
