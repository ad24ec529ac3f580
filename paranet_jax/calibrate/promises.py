"""`--reject` and `--coverage`: calibrates what a plan promises about its answers, and measures it."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from paranet_jax.calibrate.flags import BundleRequest, Request
from paranet_jax.early.exit_plan import ExitPlan
from paranet_jax.early.logits import Outputs
from paranet_jax.early.policies.risk import images_needed_ltt
from paranet_jax.early.promises import Labeled, Leaving, choose_rejection, choose_sets, images_needed
from paranet_jax.early.scores import confidences, to_score
from paranet_jax.early.thresholds import exits_taken
from paranet_jax.host.errors import UserError
from paranet_jax.portable.run import set_scores, softmax


def with_promises(
  plan: ExitPlan,
  request: Request | BundleRequest,
  rest: Outputs,
  promised: Outputs,
  thresholds: Float[np.ndarray, ' K'],
) -> ExitPlan:
  """The plan with its `reject` and its `sets`, see `early.promises`.

  Args:
    rest: on which temperatures and thresholds were chosen.
    promised: other images.
    thresholds: on the confidence scale.

  Raises:
    UserError: too few images, or too many errors at early exits.
  """
  count, (kept, share, more) = len(promised.labels), _remedy(request)
  if request.reject is not None:
    reference, tested = (_leaving(plan, outputs, thresholds) for outputs in (rest, promised))
    at = choose_rejection(reference, tested, request.reject, request.delta)
    if at is None:
      raise UserError(_unpromised(request, plan, tested))
    known = math.isfinite(at)
    reject = {'risk': request.reject, 'delta': request.delta, 'confidence_threshold': at if known else None}
    reject['threshold'] = float(to_score(at, plan.score)) if known else None
    plan = dataclasses.replace(plan, reject=reject)
  if request.coverage is not None:
    if count < (needed := images_needed(request.coverage)):
      raise UserError(
        f'a coverage of {request.coverage:g} needs {needed:,} held-out images of its own, {share} of all, found '
        f'{count:,}; {kept}; lower --coverage, or {more}'
      )
    reference, tested = (_labeled(plan, outputs, thresholds) for outputs in (rest, promised))
    sets = choose_sets(reference, tested, request.coverage)
    plan = dataclasses.replace(plan, sets=sets)
  return plan


def measured_promises(plan: ExitPlan, outputs: Outputs, thresholds: Float[np.ndarray, ' K']) -> dict[str, Any]:
  """What the promises of a plan come to on a split.

  Returns:
    With `reject`: `answered`, the share of the images, and `answered_error`, that of errors among them (None: none is
    answered). With `sets`: `covered`, the share of the sets that hold the right class, `exit_covered` [K], the same
    among those that leave at each exit (None: none does), and `set_size`, the mean number of classes.
  """
  found: dict[str, Any] = {}
  if plan.reject:
    answered, wrong = _answered(plan, outputs, thresholds)
    found['answered'] = float(answered.mean())
    found['answered_error'] = float(wrong[answered].mean()) if answered.any() else None
  if plan.sets:
    images = _labeled(plan, outputs, thresholds)
    rows = np.arange(len(images.labels))
    scores = set_scores(images.probabilities[images.taken, rows], plan.sets['penalty'], plan.sets['free'])
    limits = np.array([math.inf if limit is None else limit for limit in plan.sets['limits']])
    sets = scores <= limits[images.taken][:, None]
    covered, at_exit = sets[rows, images.labels], [images.taken == k for k in range(len(plan.exits))]
    found['covered'], found['set_size'] = float(covered.mean()), float(sets.sum(-1).mean())
    found['exit_covered'] = [float(covered[here].mean()) if here.any() else None for here in at_exit]
  return found


def what_was_seen(
  plan: ExitPlan, binned: Outputs, counted: Outputs, thresholds: Float[np.ndarray, ' K'], labeled: bool
) -> dict[str, Any]:
  """`seen` of exits.json.

  Args:
    binned: images that decide the bins, so that the counts of others are exchangeable with those of later images.
    counted: images on which nothing was chosen.
    thresholds: on the confidence scale.
    labeled: whether labels are right classes.
  """
  edges = []
  taken, tops, _ = _answers(plan, binned, thresholds)
  for k in range(len(plan.exits)):
    here = tops[taken == k]
    bins = min(_BINS, len(here) // _LEAST_IN_BIN)
    edges.append(np.unique(np.quantile(here, np.arange(1, bins) / bins).round(6)).tolist() if bins > 1 else [])
  taken, tops, labels = _answers(plan, counted, thresholds)
  places = [np.searchsorted(each, tops[taken == k], side='right') for k, each in enumerate(edges)]
  wrong, more = labels != counted.labels, {}
  if plan.reject:  # `Watch.record` leaves unknown images out, too.
    answered, _ = _answered(plan, counted, thresholds)
    wrong, more = wrong[answered], {'answered': int(answered.sum())}
  return {
    'images': len(labels),
    'edges': edges,
    'counts': [np.bincount(here, minlength=len(each) + 1).tolist() for here, each in zip(places, edges, strict=True)],
    'classes': np.bincount(labels, minlength=counted.logits.shape[-1]).tolist(),
    'wrong': int(wrong.sum()) if labeled else None,
    **more,
  }


_BINS, _LEAST_IN_BIN = 10, 10


def _answers(plan: ExitPlan, outputs: Outputs, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The exit that each image takes, 0-based, the largest probability there, and its class."""
  taken = exits_taken(confidences(outputs.logits, plan.score, plan.temperatures), thresholds)
  logits = outputs.logits[taken, np.arange(len(taken))]
  tops = np.empty(len(taken))
  for k, temperature in enumerate(plan.temperatures):
    tops[taken == k] = softmax(logits[taken == k], temperature).max(-1) if (taken == k).any() else 0
  return taken, tops, logits.argmax(-1)


def _answered(
  plan: ExitPlan, outputs: Outputs, thresholds: np.ndarray
) -> tuple[Bool[np.ndarray, ' N'], Bool[np.ndarray, ' N']]:
  """Which images are not unknown, and of which the most probable class is wrong."""
  assert plan.reject is not None
  images, at = _leaving(plan, outputs, thresholds), plan.reject['confidence_threshold']
  return images.early | (images.confidence >= (math.inf if at is None else at)), images.wrong


def _leaving(plan: ExitPlan, outputs: Outputs, thresholds: np.ndarray) -> Leaving:
  ranks = confidences(outputs.logits, plan.score, plan.temperatures)
  taken = exits_taken(ranks, thresholds)
  predictions = outputs.logits[taken, np.arange(len(taken))].argmax(-1)
  return Leaving(taken < len(plan.exits) - 1, ranks[-1], predictions != outputs.labels)


def _labeled(plan: ExitPlan, outputs: Outputs, thresholds: np.ndarray) -> Labeled:
  probabilities = [softmax(logits, each) for logits, each in zip(outputs.logits, plan.temperatures, strict=True)]
  taken = exits_taken(confidences(outputs.logits, plan.score, plan.temperatures), thresholds)
  return Labeled(np.stack(probabilities), outputs.labels, taken)


def _remedy(request: Request | BundleRequest) -> tuple[str, str, str]:
  """What became of the files, the share of the images that make promises, and how to get more."""
  if isinstance(request, BundleRequest):
    return 'no bundle was written', 'a quarter', 'set --images to more of them'
  return 'exits.json is unchanged', 'half', 'hold out more images in a new run'


def _unpromised(request: Request | BundleRequest, plan: ExitPlan, tested: Leaving) -> str:
  assert request.reject is not None
  kept, share, more = _remedy(request)
  count, needed = len(tested.early), images_needed_ltt(request.reject, request.delta)
  if count < needed:
    why = f'it would need {needed:,} of its own, {share} of all'
  elif (early := tested.early).any() and (error := tested.wrong[early].mean()) > request.reject:
    why = f'of those that leave before exit {plan.exits[-1]}, {100 * error:.1f} % are wrong'
  else:
    why = 'the surest answers are wrong too often'
  return (
    f'an error of {request.reject:g} among the answers cannot be promised from {count:,} held-out images: {why}; '
    f'{kept}; raise --reject, let fewer images leave early, or {more}'
  )
