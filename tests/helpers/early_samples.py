"""Costs and samples for the tests that choose thresholds."""

from types import SimpleNamespace

import numpy as np


def path_costs(num_exits, cut):
  """Exit k alone costs 10 (k + 1). After others it costs 10 k + 10 again if cut, else the difference and 1 a head."""

  def cumulative(path):
    alone = 10.0 * (np.array(path) + 1)
    return np.cumsum(alone) if cut else alone + np.arange(len(path))

  return SimpleNamespace(num_exits=num_exits, cumulative=cumulative)


def samples(num_exits, n, seed, levels=None):
  """Confidences, rounded to so many levels, and whether right, which surer samples at later exits are more often."""
  rng = np.random.default_rng(seed)
  skill = rng.normal(size=n) + np.linspace(0, 1, num_exits)[:, None]
  correct = rng.random((num_exits, n)) < 1 / (1 + np.exp(-skill))
  confidences = np.exp(skill + 0.5 * rng.normal(size=skill.shape))
  return (np.ceil(confidences * levels / 10) if levels else confidences), correct
