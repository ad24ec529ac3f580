"""Costs, samples and a plain walk through the exits, for the tests of thresholds and runtimes."""

import itertools

import numpy as np

from paranet_jax.early.path_costs import PathCosts
from paranet_jax.early.thresholds import Samples


def path_costs(num_exits, cut):
  """Exit k alone costs 10 (k + 1). After others it costs that again if cut, else the difference and 1 for its head."""

  def step_cost(before, index):
    return 10 * (index + 1) if cut or not before else 10 * (index - before[-1]) + 1

  return PathCosts(num_exits, step_cost)


def samples(num_exits, n, seed, cut=False, levels=None):
  """Samples that are right more often the more confident they are and the later they exit.

  Args:
    cut: of `path_costs`.
    levels: confidences are rounded to this many values.
  """
  rng = np.random.default_rng(seed)
  skill = rng.normal(size=n) + np.linspace(0, 1, num_exits)[:, None]
  correct = rng.random((num_exits, n)) < 1 / (1 + np.exp(-skill))
  confidences = np.exp(skill + 0.5 * rng.normal(size=skill.shape))
  confidences = np.ceil(confidences * levels / 10) if levels else confidences
  return samples_of(confidences, correct, path_costs(num_exits, cut))


def samples_of(confidences, correct, costs, score='max_prob'):
  """Samples of class 1, so that an exit predicts 1 where it is right."""
  correct = np.asarray(correct, bool)
  return Samples(np.asarray(confidences, float), correct.astype(int), correct, score, costs)


def softmax(logits, temperature):
  """The calibrated probabilities of one sample."""
  powers = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
  return powers / powers.sum()


def confidence_of(logits, score, temperature):
  """The confidence of one sample by definition: -log(1 - score)."""
  p = np.sort(softmax(logits, temperature))[::-1]
  value = {'max_prob': p[0], 'entropy': 1 + (p * np.log(p)).sum() / np.log(len(p)), 'margin': p[0] - p[1]}[score]
  return -np.log1p(-value)


def exit_taken(logits, thresholds, score, temperatures, path):
  """The index of the exit that one sample takes, from its logits [K, C] and the thresholds on the confidence scale."""
  labels = []
  for k in path[:-1]:
    labels.append(logits[k].argmax())
    streak = next(len(list(same)) for _, same in itertools.groupby(labels[::-1]))
    confidence = streak if score == 'patience' else confidence_of(logits[k], score, temperatures[k])
    if thresholds[k] is not None and confidence >= thresholds[k]:
      return k
  return path[-1]
