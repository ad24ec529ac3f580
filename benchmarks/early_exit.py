"""Wall-clock of the adaptive runtime against always going to the last exit, by the same runtime, in turn.

With `--workdir`, a run with held-out images, thresholds are chosen on these, and its test images are timed. Without,
weights are random, images are noise, and thresholds hold the budget. Budgets are mean multiply-adds, as a share of the
last exit's alone; `equal accuracy` is the cheapest point that is as accurate as the last exit on the held-out images.

`macs` is the speed-up that multiply-adds promise for the images timed, `latency` the one that the latencies of the
stages promise. `break_even` is the share of images that must leave at the first exit, if all others go through every
stage, for the runtime to be as fast as always going to the last. For `of_program`, all images of a batch of 64 leave at
one exit: it is the speed of the runtime, which visits the exits before it too, divided by that of one program for this
exit.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cli, network, report
from benchmarks.timing import in_turn
from paranet_jax.calibrate.latency import LatencyCosts
from paranet_jax.data.augment import normalize
from paranet_jax.data.dataset import Split
from paranet_jax.early.exit_plan import CheckpointId, ExitPlan, full_network_plan, with_thresholds
from paranet_jax.early.loaded_run import load
from paranet_jax.early.logits import split_logits
from paranet_jax.early.path_costs import PathCosts, mac_costs
from paranet_jax.early.policies.optimal import optimal_curve
from paranet_jax.early.policies.quota import quota_for_budget
from paranet_jax.early.runtime import EarlyExit
from paranet_jax.early.scores import confidences
from paranet_jax.early.thresholds import OperatingPoint, Samples
from paranet_jax.host.arguments import positive
from paranet_jax.host.errors import UserError
from paranet_jax.steps import Preprocessing
from paranet_jax.targets import trained_exits
from paranet_jax.task import build_task

LAST = 'always last exit'
BUDGETS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
NUM_BUDGETS = 40
"""Budgets among which equal accuracy is looked for."""
IMAGES, NOISE_IMAGES = 512, 256
"""At most so many are timed: of a run, and of noise."""
PROGRAM_BATCH = 64
_NOBODY = 2.0
"""A threshold above every confidence."""
NOISE = Preprocessing((0.0,), (1.0,), crop_padding=0, flip=False)


@dataclasses.dataclass(frozen=True)
class Subject:
  """A network, uint8 images [N, H, W, C] to time, and operating points by name; `labels` is None for noise.

  macs: what a path through its exits costs. plan: of always the last exit.
  """

  model: Any
  variables: Any
  plan: ExitPlan
  macs: PathCosts
  image_shape: tuple[int, int, int]
  images: np.ndarray
  labels: np.ndarray | None = None
  preprocessing: Preprocessing = NOISE
  points: dict[str, OperatingPoint] = dataclasses.field(default_factory=dict)

  @classmethod
  def of(
    cls, model: Any, variables: Any, exits: tuple[int, ...], image_shape: tuple[int, int, int], number: int = IMAGES
  ) -> 'Subject':
    """A network, with noise for images."""
    macs = mac_costs(model, image_shape, exits)
    plan = full_network_plan(CheckpointId('', '', 0, ''), exits, [int(cost) for cost in macs.alone()])
    images = np.random.default_rng(1).integers(0, 256, (number, *image_shape), np.uint8)
    return cls(model, variables, plan, macs, image_shape, images)

  def runtime(self) -> EarlyExit:
    """The runtime, always going to the last exit."""
    mean, std = self.preprocessing.mean, self.preprocessing.std
    return EarlyExit(self.model, self.variables, self.plan, self.image_shape, mean, std)

  def logits(self, images: np.ndarray) -> np.ndarray:
    """Of every usable exit: float32 [K, N, classes]."""
    split = Split(images, np.zeros(len(images), np.int32))
    return split_logits(self.model, self.variables, self.plan.exits, self.preprocessing, split, 64)

  def budgets(self) -> dict[str, float]:
    """Mean multiply-adds, by name."""
    alone = self.macs.alone()
    return {f'budget {share:.0%}': max(share * alone[-1], alone[0]) for share in BUDGETS}

  def accuracy(self, labels: np.ndarray) -> float | None:
    """Of these predictions."""
    return None if self.labels is None else float(np.mean(labels == self.labels[: len(labels)]))


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  parser = cli.Parser(__doc__)
  parser.add_rounds(5)
  parser.add_seconds()
  parser.add_argument('--workdir', type=Path, help='a trained run with held-out images (default: random weights)')
  parser.add_argument('--batches', type=_batches, default=(1, 32, 256), help='or none (default: 1,32,256)')
  parser.add_argument(
    '--programs', action=argparse.BooleanOptionalAction, default=True, help='one program for each exit, too'
  )
  return cli.run(parser, measure, argv)


def _batches(text: str) -> tuple[int, ...]:
  return () if text == 'none' else tuple(map(positive, text.split(',')))


def measure(options: argparse.Namespace) -> dict[str, Any]:
  """`ours`, `theirs` and `ratio` in images/s of the first row, `break_even` by batch size, `of_program`, and `rows`."""
  subject = trained(options.workdir) if options.workdir else untrained(options.size, NOISE_IMAGES)
  rows, break_even = [], {}
  for batch in options.batches:
    cli.progress(f'batch {batch} ...')
    latencies = LatencyCosts(subject.model, subject.variables, subject.image_shape, subject.plan.exits, batch)
    rows += compare(subject, batch, latencies, options)
    break_even[str(batch)] = break_even_share(latencies)
  programs = of_program(subject, options) if options.programs else {}
  headline = report.headline(rows) if rows else {'rows': []}
  return headline | {'break_even': break_even, 'of_program': programs}


def of_program(subject: Subject, options: argparse.Namespace) -> dict[str, float]:
  """By exit, how fast the runtime is beside one program for the exit: 1 is as fast."""
  last, images, found = subject.runtime(), subject.images[:PROGRAM_BATCH], {}
  for k, number in enumerate(subject.plan.exits):
    cli.progress(f'exit {number} as one program ...')
    leave_here = np.where(np.arange(len(subject.plan.exits)) < k, _NOBODY, 0.0)
    runtime = last.with_plan(with_thresholds(subject.plan, leave_here, subject.macs))
    program = _program(subject, number)
    seconds = in_turn(
      {'runtime': partial(runtime.predict, images), 'program': partial(program, images)},
      options.rounds,
      options.seconds,
    )
    found[str(number)] = seconds['program'] / seconds['runtime']
  return found


def _program(subject: Subject, number: int) -> Callable[[np.ndarray], np.ndarray]:
  variables = jax.device_put(subject.variables)  # Constants, as in `EarlyExit`.

  @jax.jit
  def logits(images):
    images = normalize(images, subject.preprocessing.mean, subject.preprocessing.std)
    return subject.model.apply(variables, images, exits=(number,))[number - 1]

  return lambda images: np.asarray(logits(images))


def compare(subject: Subject, batch: int, latencies: PathCosts, options: argparse.Namespace) -> list[dict[str, Any]]:
  """A row for each operating point."""
  images = subject.images[: max(batch, min(64 * batch, IMAGES))]
  last, rows = subject.runtime(), []
  for name, point in subject.points.items():
    plan = with_thresholds(subject.plan, point.thresholds, subject.macs)
    runtime = last.with_plan(plan)
    functions = {'ours': partial(run, runtime, images, batch), LAST: partial(run, last, images, batch)}
    seconds = in_turn(functions, options.rounds, options.seconds)
    (row,) = report.compare(name, seconds, unit='images/s', batch=len(images))
    found = runtime.predict(images)
    promised = {
      'macs': plan.macs_alone[-1] / mean_cost(subject.macs, plan, found.exits),
      'latency': latencies.alone()[-1] / mean_cost(latencies, plan, found.exits),
    }
    accuracies = {
      'accuracy': subject.accuracy(found.labels),
      'last_accuracy': subject.accuracy(last.predict(images).labels),
    }
    rows.append(row | {'batch': batch} | promised | accuracies)
  return rows


def run(runtime: EarlyExit, images: np.ndarray, batch: int) -> None:
  """Predicts all images, a batch at a time."""
  if batch == 1:
    for image in images:
      runtime.predict_one(image)
  else:
    for first in range(0, len(images), batch):
      runtime.predict(images[first : first + batch])


def break_even_share(latencies: PathCosts) -> float:
  """The share that must leave at the first exit, all others going on to the last, to be as fast as the last alone."""
  chain = latencies.cumulative(tuple(range(latencies.num_exits)))
  return float(max(chain[-1] - latencies.alone()[-1], 0) / (chain[-1] - chain[0]))


def trained(workdir: Path) -> Subject:
  """A run and its test images; thresholds are chosen on its held-out ones."""
  loaded = load(workdir)
  task = build_task(loaded.config)
  held_out, test = task.dataset.held_out, task.dataset.test
  if held_out is None:
    raise UserError(f'expected a run with held-out images, {workdir} has none; train one with --config.data.held_out=N')
  exits = trained_exits(task.targets)
  if len(exits) == 1:
    raise UserError(f'expected a run with two trained exits or more, {workdir} has one; set --workdir')
  subject = Subject.of(task.model, loaded.variables, exits, task.image_shape)
  subject = dataclasses.replace(
    subject,
    preprocessing=task.preprocessing,
    images=np.asarray(test.images[:IMAGES]),
    labels=np.asarray(test.labels[:IMAGES]),
  )
  logits = subject.logits(held_out.images)
  sure = confidences(logits, 'max_prob', np.ones(len(logits)))
  correct = logits.argmax(-1) == held_out.labels
  samples = Samples(sure, logits.argmax(-1), correct, 'max_prob', subject.macs)
  curve = optimal_curve(samples, np.linspace(*subject.macs.alone()[[0, -1]], NUM_BUDGETS))
  equal = min((point for point in curve if point.accuracy >= correct[-1].mean()), key=lambda point: point.cost)
  points = {name: optimal_curve(samples, [budget])[0] for name, budget in subject.budgets().items()}
  return dataclasses.replace(subject, points={'equal accuracy': equal} | points)


def untrained(size: network.Size, number: int = IMAGES) -> Subject:
  """The benchmarks' network with random weights, on so many images of noise, which leave as the budget asks."""
  model = network.our_network(size)
  exits = tuple(range(1, model.num_exits + 1))
  subject = Subject.of(model, network.random_variables(size), exits, size.image_shape, number)
  logits = subject.logits(subject.images)
  sure = confidences(logits, 'max_prob', np.ones(len(logits)))
  samples = Samples(sure, logits.argmax(-1), np.zeros(sure.shape, bool), 'max_prob', subject.macs)
  points = {name: quota_for_budget(samples, budget) for name, budget in subject.budgets().items()}
  return dataclasses.replace(subject, points=points)


def mean_cost(costs: PathCosts, plan: ExitPlan, exits: np.ndarray) -> float:
  """Mean cost of an image, given the exit numbers at which images leave."""
  path = tuple(plan.exits.index(number) for number in plan.visited)
  by_exit = dict(zip(plan.visited, costs.cumulative(path), strict=True))
  return float(np.mean([by_exit[number] for number in exits]))


if __name__ == '__main__':
  sys.exit(main())
