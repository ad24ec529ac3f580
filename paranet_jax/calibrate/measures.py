"""Temperature scaling, and how well calibrated and how accurate the exits are on one split.

K counts the usable exits, N the samples (1 or more), C the classes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import brentq
from scipy.special import log_softmax, softmax

from paranet_jax.early.exit_plan import ExitPlan
from paranet_jax.early.logits import Outputs
from paranet_jax.early.path_costs import PathCosts
from paranet_jax.early.policies.risk import losses_of
from paranet_jax.early.scores import confidence, confidences, to_score
from paranet_jax.early.thresholds import Samples, exits_taken

_HALVES_SEED = 200
_WIDTH = float(np.log(1e4))  # T is searched within this factor of the scale of the logits, in both directions.

Logits = Float[np.ndarray, 'N C']
Labels = Int[np.ndarray, ' N']
PerExit = Float[np.ndarray, ' K']


def rank(
  logits: Float[np.ndarray, 'K N C'], labels: Labels, score: str, temperatures: PerExit, costs: PathCosts
) -> Samples:
  """Ranks the samples of a split at every exit by a score, one of `scores.SCORES`."""
  predictions = logits.argmax(-1)
  return Samples(confidences(logits, score, temperatures), predictions, predictions == labels, score, costs, labels)


def fit_temperature(logits: Logits, labels: Labels) -> float:
  """Finds the T > 0 that minimizes the mean NLL of softmax(logits / T) (Guo et al. 2017, section 4.2).

  The loss is convex in b = 1 / T, so its derivative mean(E[z] - z_label) increases with b and has one root, which is
  searched over log b. The loss is never above that at T = 1.

  Without a minimum: if every prediction is correct, the loss decreases towards T = 0; the samples do not say how far to
  go, and T stays 1. If the logits are no better than chance, it decreases towards infinity, and T is 10,000 times their
  scale (mean of the largest logit minus the mean logit): near uniform. Logits that are all equal keep T = 1.

  Returns:
    T, to a relative 1e-9; finite.
  """
  z = np.asarray(logits, np.float64)
  z = z - z.max(axis=-1, keepdims=True)
  of_label = z[np.arange(len(z)), labels]
  scale = -z.mean()
  if scale == 0:
    return 1.0

  def slope(log_b: float) -> float:
    weights = np.exp(np.exp(log_b) / scale * z)
    return float(np.mean(np.sum(weights * z, axis=-1) / np.sum(weights, axis=-1) - of_label))

  if slope(_WIDTH) <= 0:
    return 1.0
  log_b: Any = -_WIDTH if slope(-_WIDTH) >= 0 else brentq(slope, -_WIDTH, _WIDTH, xtol=1e-10)
  temperature = float(scale / np.exp(log_b))
  return temperature if nll(logits, labels, temperature) < nll(logits, labels, 1.0) else 1.0


def fit_ece_temperature(logits: Logits, labels: Labels) -> float:
  """Finds the T > 0 that minimizes `ece`, which the T of `fit_temperature` can raise.

  ECE is piecewise in T, with jumps where a sample changes its bin, so a grid is searched: from a tenth of the smaller
  to ten times the larger of 1 and the T of `fit_temperature`, then around the best. Of equally good T, the nearest to
  that of `fit_temperature` is taken. ECE is never above that at either of the two. If every prediction is correct, ECE
  decreases towards T = 0, and T stays 1.

  """
  correct = logits.argmax(-1) == labels
  if correct.all():
    return 1.0
  start = np.log(fit_temperature(logits, labels))
  tried: dict[float, float] = {}

  def best(candidates: np.ndarray) -> float:
    for log_t in candidates[np.argsort(np.abs(candidates - start), kind='stable')].tolist():
      # Rounded, so that the order of a sum does not decide.
      tried.setdefault(log_t, round(ece(top_probability(logits, np.exp(log_t)), correct), 12))
    return min(tried, key=lambda log_t: tried[log_t])

  width = np.log(10) + abs(start) / 2
  found = best(np.array([start, 0.0, *np.linspace(start / 2 - width, start / 2 + width, 121)]))
  for step in (width / 60, width / 1200):
    found = best(found + np.linspace(-step, step, 41))
  return float(np.exp(found))


def reliability(
  probabilities: Float[np.ndarray, ' N'], correct: Bool[np.ndarray, ' N'], bins: int = 15
) -> tuple[Int[np.ndarray, ' bins'], Float[np.ndarray, ' bins'], Float[np.ndarray, ' bins']]:
  """The reliability diagram with equal bins ((b - 1) / bins, b / bins] (Guo et al. 2017, section 2).

  Args:
    probabilities: of the predicted class.

  Returns:
    Counts, mean probability and accuracy, both 0 where the count is 0.
  """
  bin_of = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], probabilities)
  counts = np.bincount(bin_of, minlength=bins)
  divisor = np.maximum(counts, 1)
  mean_probability = np.bincount(bin_of, probabilities, minlength=bins) / divisor
  return counts, mean_probability, np.bincount(bin_of, correct, minlength=bins) / divisor


def ece(probabilities: Float[np.ndarray, ' N'], correct: Bool[np.ndarray, ' N'], bins: int = 15) -> float:
  """Expected calibration error, 0..1: |accuracy - probability| of each bin of `reliability`, weighted by its count."""
  counts, mean_probability, accuracy = reliability(probabilities, correct, bins)
  return float(np.average(np.abs(accuracy - mean_probability), weights=counts))


def nll(logits: Logits, labels: Labels, temperature: float = 1.0) -> float:
  """Mean negative log-likelihood of the labels under softmax(logits / temperature), in nats."""
  log_probabilities = log_softmax(np.asarray(logits, np.float64) / temperature, axis=-1)
  return -float(np.mean(log_probabilities[np.arange(len(labels)), labels]))


def brier(probabilities: Float[np.ndarray, 'N C'], labels: Labels) -> float:
  """Mean over samples of the sum over classes of (p - onehot)^2, 0..2."""
  of_label = probabilities[np.arange(len(labels)), labels]
  return float(np.mean(np.sum(probabilities**2, axis=-1) - 2 * of_label + 1))


def auroc(confidence: Float[np.ndarray, ' N'], correct: Bool[np.ndarray, ' N']) -> float | None:
  """Probability that a correct prediction has higher confidence than a wrong one, ties counting half.

  None unless there are predictions of both kinds.
  """
  right = int(correct.sum())
  wrong = len(correct) - right
  if not right or not wrong:
    return None
  # Equal values share the mean of their ranks; `scipy.stats` ranks too, and takes a second to import.
  _, place, counts = np.unique(confidence, return_inverse=True, return_counts=True)
  ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
  return float((ranks[correct].sum() - right * (right + 1) / 2) / (right * wrong))


def top_probability(logits: Logits, temperature: float) -> Float[np.ndarray, ' N']:
  """The largest probability of each sample."""
  return to_score(confidence(logits, 'max_prob', temperature), 'max_prob')


def summarize(
  samples: Samples, thresholds: PerExit, macs: PerExit, ms: PerExit | None, joules: PerExit | None = None
) -> dict[str, Any]:
  """The plan's operating point on a split.

  Args:
    thresholds: on the confidence scale.
    macs, ms, joules: multiply-adds, milliseconds and joules spent up to each exit along the visited path; NaN where not
      visited.

  Returns:
    `images`; `cost_macs`, `cost_ms` (means; None: not measured), `cost_joules` if they were measured; `accuracy`;
    `shares` [K]; `exit_accuracy` [K] on all images; `gap` and `disagreement`, the risks against the last exit.
  """
  taken = exits_taken(samples.confidences, thresholds)
  here = taken, np.arange(len(taken))
  correct, predictions = samples.correct[here], samples.predictions[here]
  return {
    'images': len(taken),
    'cost_macs': float(macs[taken].mean()),
    'cost_ms': None if ms is None else float(ms[taken].mean()),
    **({} if joules is None else {'cost_joules': float(joules[taken].mean())}),
    'accuracy': float(correct.mean()),
    'shares': (np.bincount(taken, minlength=len(thresholds)) / len(taken)).tolist(),
    'exit_accuracy': samples.correct.mean(axis=1).tolist(),
    'gap': float((samples.correct[-1] & ~correct).mean()),
    'disagreement': float((predictions != samples.predictions[-1]).mean()),
  }


def risks_by_group(samples: Samples, thresholds: PerExit, kind: str, loss: str) -> list[float | None]:
  """The risks that `--risk-of` promises, measured.

  Args:
    thresholds: on the confidence scale.
    kind: 'selective' or 'class', see `policies.risk`.
    loss: 'gap' or 'disagreement'.

  Returns:
    The risk among the samples that leave at each early exit, or of each class from 0 to the largest label; None where
    there are no samples.
  """
  taken = exits_taken(samples.confidences, thresholds)
  lost = losses_of(samples, loss)[taken, np.arange(len(taken))]
  groups, count = taken, len(thresholds) - 1
  if kind == 'class' and samples.labels is not None:
    groups, count = samples.labels, int(samples.labels.max()) + 1
  return [float(lost[groups == group].mean()) if (groups == group).any() else None for group in range(count)]


def without_labels(measured: dict[str, Any]) -> dict[str, Any]:
  """The same where labels were the answers of the last exit: accuracies are agreements with it, and named so.

  Args:
    measured: of `summarize`, with the `exits` of `exit_rows`.

  Returns:
    `accuracy`, `exit_accuracy` and `gap` are None, also in `exits`; `agreement` and `exit_agreement` are in their
    place.
  """
  rows = [row | {'accuracy': None, 'agreement': row['accuracy']} for row in measured['exits']]
  agreements = {'agreement': measured['accuracy'], 'exit_agreement': measured['exit_accuracy']}
  return measured | {'accuracy': None, 'exit_accuracy': None, 'gap': None, 'exits': rows} | agreements


def exit_rows(
  samples: Samples, logits: Float[np.ndarray, 'K N C'], labels: Labels, thresholds: PerExit, temperatures: PerExit
) -> list[dict[str, Any]]:
  """Which samples exit where, and how well calibrated each exit is.

  Returns:
    For each exit: the number of `images` that exit there, their `accuracy` and mean calibrated `confidence`, and the
    `calibration` on `all` images and on those `leaving`; None where no image exits.
  """
  taken = exits_taken(samples.confidences, thresholds)
  rows = []
  for k, temperature in enumerate(temperatures):
    exiting = taken == k
    row: dict[str, Any] = {'images': int(exiting.sum()), 'accuracy': None, 'confidence': None}
    calibration = {'all': _calibration(logits[k], samples.confidences[k], labels, temperature), 'leaving': None}
    if exiting.any():
      row['accuracy'] = float(samples.correct[k, exiting].mean())
      row['confidence'] = float(top_probability(logits[k], temperature)[exiting].mean())
      there = logits[k, exiting], samples.confidences[k, exiting], labels[exiting]
      calibration['leaving'] = _calibration(*there, temperature)
    rows.append(row | {'calibration': calibration})
  return rows


def raised(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
  """The exits, by number, at which the temperature raises `ece` and those at which it raises `nll`, over all images.

  Args:
    rows: of `exit_rows`, each with its `exit`.
  """
  return {
    measure: [
      row['exit'] for row in rows if row['calibration']['all'][measure][1] > row['calibration']['all'][measure][0]
    ]
    for measure in ('ece', 'nll')
  }


def _calibration(
  logits: Logits, confidences: Float[np.ndarray, ' N'], labels: Labels, temperature: float
) -> dict[str, Any]:
  """`ece`, `nll` and `brier` as [before, after] temperature scaling, and the `auroc` of the score."""
  correct = logits.argmax(-1) == labels
  both = (1.0, temperature)
  return {
    'ece': [ece(top_probability(logits, each), correct) for each in both],
    'nll': [nll(logits, labels, each) for each in both],
    'brier': [brier(softmax(logits.astype(np.float64) / each, axis=-1), labels) for each in both],
    'auroc': auroc(confidences, correct),
  }


def measured(plan: ExitPlan, samples: Samples, outputs: Outputs, thresholds: PerExit) -> dict[str, Any]:
  """What a plan comes to on a split, besides its promises.

  Args:
    samples: of `rank`, from the outputs.
    thresholds: those of the plan, on the confidence scale.

  Returns:
    That of `summarize`. `exits`: which samples exit where and how well calibrated; `raised`: what the temperatures make
    worse there. `risks`, if the target is one of each exit or class: see `risks_by_group`.
  """
  # None becomes NaN.
  macs, others = np.array(plan.macs, np.float64), (plan.ms, plan.joules)
  costs = macs, *(None if each is None else np.array(each, np.float64) for each in others)
  rows = exit_rows(samples, *outputs, thresholds, np.array(plan.temperatures))
  rows = [{'exit': number, **row} for number, row in zip(plan.exits, rows, strict=True)]
  found = summarize(samples, thresholds, *costs) | {'exits': rows, 'raised': raised(rows)}
  if (kind := plan.target.get('of', 'marginal')) != 'marginal':
    found['risks'] = risks_by_group(samples, thresholds, kind, plan.target['loss'])
  return found


class Fitted(NamedTuple):
  """What thresholds are chosen on.

  Attributes:
    temperatures: one for each exit.
    reference: what they were fitted on.
    chosen: what the thresholds are to be chosen on.
    samples: the same, ranked; for the risk at each exit, with the reference.
  """

  temperatures: PerExit
  reference: Outputs
  chosen: Outputs
  samples: Samples


def fit(outputs: Outputs, target: Mapping[str, Any], score: str, minimized: str, costs: PathCosts) -> Fitted:
  """Fits the temperatures, on images of their own if `needs_halves`, and ranks the others.

  Args:
    minimized: one of `flags.TEMPERATURES`.
    costs: in the unit of the budget.
  """
  reference, chosen = halves(outputs) if needs_halves(target, minimized) else (outputs, outputs)
  temperatures = fit_temperatures(minimized, reference)
  samples = rank(*chosen, score, temperatures, costs)
  if target.get('of') == 'selective':
    samples = samples._replace(reference=rank(*reference, score, temperatures, costs))
  return Fitted(temperatures, reference, chosen, samples)


def needs_halves(target: Mapping[str, Any], minimized: str) -> bool:
  """Whether temperatures (or the order of the tests) and thresholds need images of their own: to control a risk."""
  return 'risk' in target and (minimized != 'none' or target.get('of') == 'selective')


def fit_temperatures(minimized: str, outputs: Outputs) -> PerExit:
  """The temperature of each exit, by one of `flags.TEMPERATURES`."""
  if minimized == 'none':
    return np.ones(len(outputs.logits))
  fit = fit_temperature if minimized == 'nll' else fit_ece_temperature
  return np.array([fit(logits, outputs.labels) for logits in outputs.logits])


def halves(outputs: Outputs) -> tuple[Outputs, Outputs]:
  """Two disjoint halves, of which the second is for tests: drawn uniformly, whatever the images and their classes are.

  Promises need tested images that are exchangeable with later ones, and so every image must have the same chance to be
  tested. A split in proportion to classes breaks that: of a class with a single image, one half never sees any, and
  where many classes are rare, their risk is not tested. What is drawn here depends on the number of images alone, so if
  the images are independent draws of a population, the tested ones are too: the binomial tails are exact, given the
  labels as well, and conformal ranks are uniform. Drawing pairs of a class by coins would keep the chances equal, but
  the tested images would depend on each other, and the tails would hold approximately.
  """
  # RandomState, not default_rng: only its stream is guaranteed to be the same in every NumPy version.
  order = np.random.RandomState(_HALVES_SEED).permutation(len(outputs.labels))
  tested, reference = np.split(order, [len(order) // 2])
  return outputs.take(np.sort(reference)), outputs.take(np.sort(tested))
