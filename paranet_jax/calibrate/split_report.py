"""How a plan does on one split, as plain numbers: what exits.json keeps and the report prints."""

from typing import Any

import numpy as np
from scipy.special import softmax

from paranet_jax.calibrate.choice import Ranked
from paranet_jax.calibrate.measures import auroc, brier, ece, nll
from paranet_jax.early.scores import confidence, to_score
from paranet_jax.early.thresholds import exits_taken


def summarize(ranked: Ranked, thresholds: np.ndarray, macs: np.ndarray, ms: np.ndarray | None) -> dict[str, Any]:
  """The plan's operating point on a split.

  Args:
    ranked: N images at K exits.
    thresholds: [K], on the confidence scale.
    macs: [K], of leaving at each exit along the visited path; NaN where not visited.
    ms: the same in milliseconds, or None.

  Returns:
    `images`; `cost_macs`, `cost_ms` (means; None if not measured); `accuracy`; `shares` [K]; `exit_accuracy` [K], of
    each exit on all images; `gap` and `disagreement`, the risks against the last exit.
  """
  taken = exits_taken(ranked.confidences, thresholds)
  everyone = np.arange(len(taken))
  correct, predictions = ranked.correct[taken, everyone], ranked.predictions[taken, everyone]
  return {
    'images': len(taken),
    'cost_macs': float(macs[taken].mean()),
    'cost_ms': None if ms is None else float(ms[taken].mean()),
    'accuracy': float(correct.mean()),
    'shares': (np.bincount(taken, minlength=len(thresholds)) / len(taken)).tolist(),
    'exit_accuracy': ranked.correct.mean(axis=1).tolist(),
    'gap': float((ranked.correct[-1] & ~correct).mean()),
    'disagreement': float((predictions != ranked.predictions[-1]).mean()),
  }


def exit_rows(
  ranked: Ranked, logits: np.ndarray, labels: np.ndarray, thresholds: np.ndarray, temperatures: np.ndarray
) -> list[dict[str, Any]]:
  """What leaves at each exit, and how well calibrated the exit is.

  Args:
    ranked: of these logits.
    logits: [K, N, C].
    labels: int [N].
    thresholds: [K], on the confidence scale.
    temperatures: [K].

  Returns:
    For each exit: `images` that leave there, their `accuracy` and mean calibrated `confidence` (None if none leave),
    and the `calibration` of `all` images and of those `leaving` (None if none leave).
  """
  taken = exits_taken(ranked.confidences, thresholds)
  rows = []
  for index, temperature in enumerate(temperatures):
    leaving = taken == index
    exit_logits, correct, confidences = logits[index], ranked.correct[index], ranked.confidences[index]
    sure = top_probability(exit_logits, temperature)
    rows.append(
      {
        'images': int(leaving.sum()),
        'accuracy': float(correct[leaving].mean()) if leaving.any() else None,
        'confidence': float(sure[leaving].mean()) if leaving.any() else None,
        'calibration': {
          'all': _calibration(exit_logits, labels, temperature, confidences, correct),
          'leaving': _calibration(
            exit_logits[leaving], labels[leaving], temperature, confidences[leaving], correct[leaving]
          ),
        },
      }
    )
  return rows


def top_probability(logits: np.ndarray, temperature: float) -> np.ndarray:
  """The largest probability of each row: float64 [N]."""
  return to_score(confidence(logits, 'max_prob', temperature), 'max_prob')


def _calibration(
  logits: np.ndarray, labels: np.ndarray, temperature: float, confidences: np.ndarray, correct: np.ndarray
) -> dict[str, Any] | None:
  """`ece`, `nll` (nats) and `brier` as [before, after] temperature scaling, and the `auroc` of the score."""
  if not len(labels):
    return None
  measured = {'ece': [], 'nll': [], 'brier': []}
  for divisor in (1.0, temperature):
    measured['ece'].append(ece(top_probability(logits, divisor), correct))
    measured['nll'].append(nll(logits, labels, divisor))
    measured['brier'].append(brier(softmax(logits.astype(np.float64) / divisor, axis=-1), labels))
  return measured | {'auroc': auroc(confidences, correct)}
