"""Calibrates a run: temperatures and thresholds on its held-out images, then how they do on its test images."""

import dataclasses
import datetime
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from paranet_jax.calibrate.choice import Ranked, check_budget, choose, rank
from paranet_jax.calibrate.flags import Request
from paranet_jax.calibrate.latency import LatencyCosts, latency_record
from paranet_jax.calibrate.split_report import exit_rows, summarize
from paranet_jax.calibrate.temperature import fit_temperature
from paranet_jax.data.dataset import Split, max_drawable, stratified_indices
from paranet_jax.description import cpu_name, environment
from paranet_jax.early.checkpoint_id import CheckpointId, fingerprint
from paranet_jax.early.exit_plan import ExitPlan, along, full_network_plan, save_plan, with_thresholds
from paranet_jax.early.logits import Outputs, split_logits
from paranet_jax.early.path_costs import PathCosts, mac_costs
from paranet_jax.early.policies import Choice
from paranet_jax.early.runtime import EarlyExit
from paranet_jax.early.thresholds import visited
from paranet_jax.host.errors import UserError
from paranet_jax.runs.dataset_facts import save_dataset_facts
from paranet_jax.runs.workdir import prepare_folder, restore_config
from paranet_jax.targets import trained_exits
from paranet_jax.task import Task
from paranet_jax.train import restore_checkpoint

FIGURES = 'exits'
"""Folder of a run's figures."""

_HALVES_SEED = 200


@dataclasses.dataclass(frozen=True)
class Subject:
  """What is calibrated: a checkpoint, its K usable exits (1-based numbers), and what a path through them costs."""

  checkpoint: CheckpointId
  task: Task
  variables: Any
  exits: tuple[int, ...]
  macs: PathCosts
  ms: LatencyCosts | None


class Calibrated(NamedTuple):
  """The plan that was written, what it was made from, and what kept risk control from it, if anything did.

  `held_out` are the images that the thresholds were chosen on.
  """

  plan: ExitPlan
  subject: Subject
  held_out: Outputs
  test: Outputs
  problem: str | None


def calibrate(request: Request, command: str) -> Calibrated:
  """Calibrates, writes exits.json, and measures the result on the test images.

  Args:
    request: what is asked for.
    command: the command line, for the record.

  Raises:
    UserError: the run, its data or the target does not fit.
  """
  subject = _restore(request)
  costs = _target_costs(request, subject)
  check_budget(request, costs, subject.exits)  # Before minutes are spent on logits.
  dataset = subject.task.dataset
  print(f'reading {len(dataset.held_out):,} held-out and {len(dataset.test):,} test images', flush=True)
  held_out, test = _outputs(subject, dataset.held_out), _outputs(subject, dataset.test)
  fitted, chosen = _halves(held_out) if request.risk is not None else (held_out, held_out)
  temperatures = np.array([fit_temperature(logits, fitted.labels) for logits in fitted.logits])
  ranked = rank(*chosen, request.score, temperatures)
  choice = choose(request, ranked, costs)
  plan = _plan(request, subject, temperatures, choice, command)
  plan = _with_measurements(plan, request, subject, choice.thresholds, ranked, test)
  save_dataset_facts(request.workdir, dataset)
  save_plan(request.workdir, plan)
  return Calibrated(plan, subject, chosen, test, choice.problem)


def _restore(request: Request) -> Subject:
  config = restore_config(request.workdir)
  prepare_folder(request.workdir)
  if request.curves:
    prepare_folder(request.workdir / FIGURES)
  if not config.data.held_out:
    raise UserError(
      f'expected a run with held-out images, and {request.workdir} was trained on all of its images; '
      'train a new one with --config.data.held_out=N (a tenth of them is usual) and another --workdir'
    )
  if request.risk is not None and config.data.held_out < 2:
    raise UserError(
      'risk control needs 2 held-out images or more, to fit the temperatures on some and to test on others, found 1; '
      'train a new run with a larger --config.data.held_out and another --workdir'
    )
  task, step, variables = restore_checkpoint(config, request.workdir, request.step, jax.local_devices()[:1])
  exits = trained_exits(task.targets)
  batch_size = request.batch_size
  return Subject(
    checkpoint=CheckpointId(config.name, config.data.name, step, fingerprint(variables)),
    task=task,
    variables=variables,
    exits=exits,
    macs=mac_costs(task.model, task.image_shape, exits),
    ms=batch_size and LatencyCosts(task.model, variables, task.image_shape, exits, batch_size, request.score),
  )


def _outputs(subject: Subject, split: Split) -> Outputs:
  task = subject.task
  batch_size = task.config.eval.batch_size
  logits = split_logits(task.model, subject.variables, subject.exits, task.preprocessing, split, batch_size)
  finite = np.isfinite(logits).all(axis=(1, 2))
  if not finite.all():
    raise UserError(
      f'expected finite logits, and those of exits {np.array(subject.exits)[~finite].tolist()} are not at step '
      f'{subject.checkpoint.step}; set --step to an earlier checkpoint, or train a new run'
    )
  return Outputs(logits, np.asarray(split.labels))


def _halves(outputs: Outputs) -> tuple[Outputs, Outputs]:
  """Two disjoint halves, each class in both where it can be: the one that fits temperatures, the one that tests."""
  count = len(outputs.labels) // 2
  classes = outputs.labels if count <= max_drawable(outputs.labels) else np.zeros_like(outputs.labels)
  kept, drawn = stratified_indices(classes, count, _HALVES_SEED)
  return outputs.take(kept), outputs.take(drawn)


def _target_costs(request: Request, subject: Subject) -> PathCosts:
  return subject.ms if request.budget and request.budget.unit == 'ms' else subject.macs


def _plan(request: Request, subject: Subject, temperatures: np.ndarray, choice: Choice, command: str) -> ExitPlan:
  plan = dataclasses.replace(
    full_network_plan(subject.checkpoint, subject.exits, tuple(map(int, subject.macs.alone()))),
    score=request.score,
    policy=request.policy.name,
    target=request.target,
    temperatures=tuple(temperatures.tolist()),
    latency=None if subject.ms is None else latency_record([subject.ms]),
    provenance={
      'command': command,
      **environment(jax.local_devices()),
      'cpu': cpu_name(),
      'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    },
  )
  plan = with_thresholds(plan, choice.thresholds, subject.macs)
  # Patience sets a number at every exit, so that each is on the path.
  return plan if subject.ms is None else dataclasses.replace(plan, ms=along(subject.ms, visited(choice.thresholds)))


def _with_measurements(
  plan: ExitPlan, request: Request, subject: Subject, thresholds: np.ndarray, ranked: Ranked, test: Outputs
) -> ExitPlan:
  temperatures = np.array(plan.temperatures)
  macs = np.array(plan.macs, np.float64)  # None becomes NaN.
  ms = None if plan.ms is None else np.array(plan.ms, np.float64)
  expected = summarize(ranked, thresholds, macs, ms)
  expected['single_best'] = _single_best(plan, expected, _target_costs(request, subject))
  if request.budget and request.budget.unit == 'ms':
    expected['measured_ms'] = _measured_ms(plan, subject, request.batch_size)
  test_ranked = rank(*test, plan.score, temperatures)
  tested = summarize(test_ranked, thresholds, macs, ms)
  rows = exit_rows(test_ranked, *test, thresholds, temperatures)
  tested['exits'] = [{'exit': number, **row} for number, row in zip(plan.exits, rows, strict=True)]
  held_out = len(subject.task.dataset.held_out)
  fitted = held_out - expected['images'] if request.risk is not None else held_out
  splits = {'temperature': fitted, 'thresholds': expected['images'], 'test': tested['images']}
  return dataclasses.replace(plan, expected=expected, test=tested, splits=splits)


def _single_best(plan: ExitPlan, expected: dict[str, Any], costs: PathCosts) -> int | None:
  """The number of the cheapest exit that, alone, is as accurate as the plan."""
  accurate = [k for k, accuracy in enumerate(expected['exit_accuracy']) if accuracy >= expected['accuracy']]
  return plan.exits[min(accurate, key=lambda k: costs.alone()[k])] if accurate else None


def _measured_ms(plan: ExitPlan, subject: Subject, batch_size: int) -> float:
  """Mean milliseconds an image of the runtime on the held-out images."""
  data, task = subject.task.dataset, subject.task
  runtime = EarlyExit(task.model, subject.variables, plan, task.image_shape, data.mean, data.std)
  runtime.warm_up(batches=batch_size > 1)
  images = data.held_out.images
  batches = [images[first : first + batch_size] for first in range(0, len(images), batch_size)]

  def predict(batch):
    return runtime.predict(batch) if batch_size > 1 else runtime.predict_one(batch[0])

  predict(batches[0])
  started = time.perf_counter()
  for batch in batches:
    predict(batch)
  return 1e3 * (time.perf_counter() - started) / len(images)
