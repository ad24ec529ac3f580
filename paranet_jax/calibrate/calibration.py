"""Calibrates a run: temperatures and thresholds from its held-out images, then measurements on its test images.

Images without labels have the answers of the last exit as their labels: what is fitted, chosen and measured is then how
often, and how surely, an early exit agrees with it. No result is called an accuracy.
"""

import dataclasses
import datetime
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from paranet_jax.calibrate.audit import audit
from paranet_jax.calibrate.flags import Request
from paranet_jax.calibrate.latency import EnergyCosts, LatencyCosts, latency_record
from paranet_jax.calibrate.measures import fit, halves, measured, needs_halves, rank, without_labels
from paranet_jax.calibrate.promises import measured_promises, what_was_seen, with_promises
from paranet_jax.calibrate.summary_text import too_few_text
from paranet_jax.config import with_data_dir
from paranet_jax.data.dataset import Images, Split, StoredImages
from paranet_jax.early.exit_plan import (
  EXITS,
  CheckpointId,
  ExitPlan,
  along,
  fingerprint,
  full_network_plan,
  save_plan,
  with_thresholds,
)
from paranet_jax.early.logits import Outputs, split_logits
from paranet_jax.early.path_costs import PathCosts, mac_costs
from paranet_jax.early.policies.cap import choose_within
from paranet_jax.early.runtime import EarlyExit
from paranet_jax.early.thresholds import visited
from paranet_jax.host.energy import Energy, find_energy
from paranet_jax.host.errors import UserError, say
from paranet_jax.host.machine import cpu_name, environment
from paranet_jax.runs.checkpoints import Checkpoints
from paranet_jax.runs.learned import repair_dataset_facts
from paranet_jax.runs.retention import Retention
from paranet_jax.runs.trained import read_task
from paranet_jax.runs.workdir import prepare_folder, restore_config
from paranet_jax.targets import trained_exits
from paranet_jax.task import Task

FIGURES = 'exits'
"""Folder of a run's figures."""


@dataclasses.dataclass(frozen=True)
class Subject:
  """What is calibrated: a checkpoint, its K usable exits (1-based numbers), and the costs of the paths through them."""

  checkpoint: CheckpointId
  task: Task
  variables: Any
  exits: tuple[int, ...]
  macs: PathCosts
  ms: LatencyCosts | None
  joules: EnergyCosts | None = None


class Calibrated(NamedTuple):
  """What `calibrate` did.

  Attributes:
    plan: as written to exits.json, unless there is a problem and there was one.
    held_out: outputs for the images that the thresholds were chosen on.
    problem: why the target cannot be met; then the plan runs the full network.
  """

  plan: ExitPlan
  subject: Subject
  held_out: Outputs
  test: Outputs
  problem: str | None


def calibrate(request: Request, command: str) -> Calibrated:
  """Calibrates a run, measures the result on the test images and writes exits.json.

  A target that cannot be met replaces no earlier exits.json.

  Args:
    command: the command line, for the record.

  Raises:
    UserError: the run or its data cannot be calibrated, or the target is out of range.
  """
  energy = _energy(request)
  subject = _restore(request, energy if isinstance(energy, Energy) else None)
  request = dataclasses.replace(request, target=_target(request, subject))
  costs = _costs(subject, request.target.get('unit', 'macs'))
  check_budget(request, costs, subject.exits)  # Before minutes are spent on logits.
  if request.most:
    _check_most(*request.most, _costs(subject, request.most[1]), subject.exits)
  dataset = subject.task.dataset
  assert dataset.held_out is not None  # As the configuration says.
  if isinstance(energy, str):
    say(f'no joules are measured: {energy}')
  say(f'reading {len(dataset.held_out):,} held-out and {len(dataset.test):,} test images')
  held_out, test = _outputs(subject, dataset.held_out), _outputs(subject, dataset.test)
  if line := _chosen_by(request, subject):
    say(line)
  # Promises about answers need images on which nothing else was chosen.
  rest, promised = halves(held_out) if request.promises else (held_out, None)
  target = request.target
  temperatures, reference, chosen, samples = fit(rest, target, request.score, request.temperature, costs)
  if target.get('of') == 'class':
    known = [held_out.labels, test.labels, *([dataset.train.labels] if dataset.labeled else [])]
    samples = samples._replace(classes=np.unique(np.concatenate(known)))
  if 'budget' in target:  # One that was measured may be below the cost of the first exit by rounding.
    target = target | {'budget': max(target['budget'], costs.alone()[0])}
  if request.most:
    choice = choose_within(request.policy, samples, target, request.most[0], _costs(subject, request.most[1]))
  else:
    choice = request.policy.choose(samples, target)
  if choice.facts:
    request = dataclasses.replace(request, target=request.target | dict(choice.facts))
  if choice.facts.get('too_few'):
    say(too_few_text(choice.facts, dataset.class_names))
  plan = _plan(request, subject, temperatures, choice.thresholds, command)
  if promised:
    plan = with_promises(plan, request, rest, promised, choice.thresholds)
  expected = measured(plan, samples, chosen, choice.thresholds)
  expected |= {'single_best': _single_best(plan, expected, costs), 'temperature': request.temperature}
  if (unit := request.measured_unit) and request.batch_size:
    assert dataset.held_out is not None
    meter = energy if unit == 'joules' and isinstance(energy, Energy) else None
    found = _measured_in_runtime(plan, subject, dataset.held_out.images, request.batch_size, meter)
    expected[f'measured_{unit}'] = found
  tested = measured(plan, rank(*test, request.score, temperatures, costs), test, choice.thresholds)
  if promised:
    expected |= measured_promises(plan, promised, choice.thresholds)
    tested |= measured_promises(plan, test, choice.thresholds)
  of_temperature = 0 if request.temperature == 'none' else len(reference.labels)
  splits = {'temperature': of_temperature, 'thresholds': len(chosen.labels), 'test': len(test.labels)}
  splits |= {'promises': len(promised.labels)} if promised else {}
  if not dataset.labeled:
    expected, tested = without_labels(expected), without_labels(tested)
  seen = what_was_seen(plan, chosen, test, choice.thresholds, dataset.labeled)
  plan = dataclasses.replace(plan, expected=expected, test=tested, splits=splits, seen=seen)
  if request.audit and not choice.problem:
    task, kind = subject.task, 'accuracy' if dataset.labeled else 'agreement'
    arguments = task.model, subject.variables, task.preprocessing, dataset.test, test.labels, kind, say
    plan = dataclasses.replace(plan, audit=audit(plan, *arguments))
  problem = choice.problem
  if problem and (request.workdir / EXITS).exists():  # What was promised before still holds.
    problem = problem.replace('exits.json keeps the full network', 'exits.json is unchanged')
  else:
    repair_dataset_facts(request.workdir, dataset)
    save_plan(request.workdir, plan)
  return Calibrated(plan, subject, chosen, test, problem)


def _target(request: Request, subject: Subject) -> dict[str, Any]:
  """The target; without labels, the risk is that an exit disagrees with the last one.

  Raises:
    UserError: another risk was asked for, or what needs labels.
  """
  if request.promises and not subject.task.dataset.labeled:
    flag = 'coverage' if request.reject is None else 'reject'
    raise UserError(f'--{flag} needs labels, and the images of the run in {request.workdir} have none; leave it out')
  if subject.task.dataset.labeled or request.target.get('loss', 'disagreement') == 'disagreement':
    return request.target
  if 'loss' in request.explicit:
    raise UserError(
      f'--risk-loss={request.target["loss"]} needs labels, and the images of the run in {request.workdir} have none; '
      'set --risk-loss=disagreement'
    )
  return request.target | {'loss': 'disagreement'}


def _chosen_by(request: Request, subject: Subject) -> str | None:
  """Says that the held-out images, which test what is promised, chose the checkpoint; None: they did not.

  The latest checkpoint, which is taken unless a step is named, is the latest whatever they are.
  """
  if request.step is None or not (request.promises or 'risk' in request.target):
    return None
  measure = subject.task.config.checkpoint.keep_best
  if measure == 'none':
    return None
  with Checkpoints(request.workdir) as checkpoints:
    best = Retention(subject.task, request.workdir).best(checkpoints.steps())
  if best != subject.checkpoint.step:
    return None
  return (
    f'step {best} was the best on the held-out images, by checkpoint.keep_best={measure}, and they also test what is '
    'promised: it may be broken a little more often; leave out --step for a checkpoint that they did not choose'
  )


def check_budget(request: Request, costs: PathCosts, exits: tuple[int, ...]) -> None:
  """Rejects a budget that no thresholds can spend.

  Args:
    costs: in the unit of the budget.
    exits: numbers of the usable exits, 1-based.

  Raises:
    UserError: the budget is below the cost of the first exit or above that of the last, or the first costs more.
  """
  if 'budget' not in request.target:
    return
  value, unit = request.target['budget'], request.target['unit']
  low, high = costs.alone()[[0, -1]]
  if low > high:
    raise UserError(
      f'no budget is within reach: exit {exits[0]} alone takes {_in_unit(low, unit)}, more than exit {exits[-1]} alone '
      f'with {_in_unit(high, unit)}; set --batch-size, or a --budget of multiply-adds'
    )
  # Messages round what was measured, and a value from a message must be accepted.
  slack = 0 if unit == 'macs' else 1e-3
  if not low * (1 - slack) <= value <= high * (1 + slack):
    raise UserError(
      f'budget must be from {_in_unit(low, unit)} (exit {exits[0]} alone) to {_in_unit(high, unit)} '
      f'(exit {exits[-1]} alone), found {_in_unit(value, unit)}; set --budget'
    )


def _costs(subject: Subject, unit: str) -> PathCosts:
  measured = {'ms': subject.ms, 'joules': subject.joules}.get(unit)
  return measured or subject.macs


def _check_most(value: float, unit: str, costs: PathCosts, exits: tuple[int, ...]) -> None:
  """Rejects a limit on each image that the first exit exceeds."""
  if value < (least := costs.alone()[0]):
    raise UserError(
      f'expected a limit of {_in_unit(least, unit)} or more, as exit {exits[0]} alone takes, found '
      f'{_in_unit(value, unit)}; set --max-{unit}'
    )


def _energy(request: Request) -> Energy | str | None:
  """What tells the energy, or why nothing does; None: nothing is measured.

  Raises:
    UserError: nothing does, and the budget is in joules.
  """
  if not request.batch_size:
    return None
  found = find_energy(gpu=jax.local_devices()[0].platform == 'gpu')
  if isinstance(found, str) and request.measured_unit == 'joules':
    raise UserError(f'{found}; set --budget to multiply-adds or milliseconds')
  return found


def _restore(request: Request, energy: Energy | None = None) -> Subject:
  config = restore_config(request.workdir)
  prepare_folder(request.workdir)
  if request.curves:
    prepare_folder(request.workdir / FIGURES)
  if not config.data.held_out:
    raise UserError(
      f'expected a run with held-out images, and {request.workdir} was trained on all of its images; '
      'train a new one with --config.data.held_out=N (a tenth of them is usual) and another --workdir'
    )
  if request.promises and config.data.held_out < 4:
    raise UserError(
      '--reject and --coverage need 4 held-out images or more, half of them for what they promise, found '
      f'{config.data.held_out}; train a new run with a larger --config.data.held_out and another --workdir'
    )
  if needs_halves(request.target, request.temperature) and config.data.held_out < 2:
    raise UserError(
      'risk control needs 2 held-out images or more, some for the temperatures and some for the thresholds, found 1; '
      'train a new run with a larger --config.data.held_out and another --workdir, or set --temperature=none'
    )
  config = with_data_dir(config, request.data_dir)
  task, step, variables = read_task(
    config, request.workdir, request.step, jax.local_devices()[:1], request.accept_data_changes, request.dtype
  )
  if task.dataset.lost:
    raise UserError(
      f'expected images of class {task.dataset.lost[0]!r} that the run in {request.workdir} was not trained on, found '
      'none: their content or class changed; restore them, or train a new run with another --workdir'
    )
  exits = trained_exits(task.targets)
  ms = joules = None
  if request.batch_size:
    measured = task.model, variables, task.image_shape, exits, request.batch_size, request.score
    ms, joules = LatencyCosts(*measured), energy and EnergyCosts(energy, *measured)
  return Subject(
    checkpoint=CheckpointId(config.name, config.data.name, step, fingerprint(variables)),
    task=task,
    variables=variables,
    exits=exits,
    macs=mac_costs(task.model, task.image_shape, exits),
    ms=ms,
    joules=joules,
  )


def _outputs(subject: Subject, split: Split) -> Outputs:
  task = subject.task
  batch_size = task.config.eval.batch_size
  logits = split_logits(task.model, subject.variables, subject.exits, task.preprocessing, split, batch_size)
  finite = np.isfinite(logits).all(axis=(1, 2))
  if not finite.all():
    raise UserError(
      f'expected finite logits, found others at exits {np.array(subject.exits)[~finite].tolist()} at step '
      f'{subject.checkpoint.step}; set --step to an earlier checkpoint, or train a new run'
    )
  return Outputs.of(logits, split.labels if task.dataset.labeled else None)


def _plan(
  request: Request, subject: Subject, temperatures: np.ndarray, thresholds: np.ndarray, command: str
) -> ExitPlan:
  plan = dataclasses.replace(
    full_network_plan(subject.checkpoint, subject.exits, tuple(map(int, subject.macs.alone()))),
    score=request.score,
    policy=request.policy.name,
    target=request.target,
    dtype=request.dtype,
    temperatures=tuple(temperatures.tolist()),
    latency=None if subject.ms is None else latency_record(subject.ms, subject.joules),
    provenance={
      'command': command,
      **environment(jax.local_devices()),
      'cpu': cpu_name(),
      'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    },
  )
  plan = with_thresholds(plan, thresholds, subject.macs)
  # Patience sets a threshold at every exit, so each is on the path.
  path = visited(thresholds)
  ms, joules = (None if costs is None else along(costs, path) for costs in (subject.ms, subject.joules))
  return dataclasses.replace(plan, ms=ms, joules=joules)


def _single_best(plan: ExitPlan, expected: dict[str, Any], costs: PathCosts) -> int | None:
  """The number of the cheapest exit that, alone, is as accurate as the plan."""
  accurate = [k for k, accuracy in enumerate(expected['exit_accuracy']) if accuracy >= expected['accuracy']]
  return plan.exits[min(accurate, key=lambda k: costs.alone()[k])] if accurate else None


def _measured_in_runtime(
  plan: ExitPlan, subject: Subject, images: Images | StoredImages, batch_size: int, energy: Energy | None
) -> float:
  """Mean joules per image in the runtime, by what tells them; None: milliseconds."""
  data, task = subject.task.dataset, subject.task
  runtime = EarlyExit(task.model, subject.variables, plan, task.image_shape, data.mean, data.std)
  runtime.warm_up(batches=batch_size > 1)
  batches = [images[first : first + batch_size] for first in range(0, len(images), batch_size)]

  def predict(batch):
    return runtime.predict(batch) if batch_size > 1 else runtime.predict_one(batch[0])

  predict(batches[0])
  before, started = energy.joules() if energy else 0.0, time.perf_counter()
  for batch in batches:
    predict(batch)
  used = energy.joules() - before if energy else 1e3 * (time.perf_counter() - started)
  return used / len(images)


def _in_unit(cost: float, unit: str) -> str:
  """A readable cost, precise enough to be set as a budget: `3.413088M` multiply-adds, `1.234ms` or `0.01234J`."""
  return f'{round(cost) / 1e6:.10g}M' if unit == 'macs' else f'{cost:.4g}{"ms" if unit == "ms" else "J"}'
