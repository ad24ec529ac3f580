"""Finished runs as one anytime network: exit m averages the probabilities of the first m runs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from paranet_jax import config as config_lib
from paranet_jax.costs import exit_costs
from paranet_jax.data.identity import together
from paranet_jax.data.scaling import scaling_of
from paranet_jax.early.loaded_run import LoadedRun, load
from paranet_jax.evaluation import Evaluator
from paranet_jax.host.errors import UserError
from paranet_jax.models.ensemble import Ensemble, ensemble_variables
from paranet_jax.runs.learned import restore_learned
from paranet_jax.targets import LABELS, trained_exits
from paranet_jax.task import build_task


class LoadedEnsemble(NamedTuple):
  """A model with the multi-exit interface, its `params` and `batch_stats`, and its members."""

  model: Ensemble
  variables: Any
  runs: tuple[LoadedRun, ...]


def load_ensemble(workdirs: Sequence[str | Path]) -> LoadedEnsemble:
  """Combines the last exits of several finished runs into one network.

  Args:
    workdirs: in the order of the exits; the data set, classes and images must agree, the networks may differ.

  Raises:
    UserError: a run cannot be read, or does not match the first.
  """
  runs = tuple(map(load, workdirs))
  first = _inputs(runs[0])
  for workdir, run in zip(workdirs, runs, strict=True):
    for what, found in _inputs(run).items():
      if found != first[what]:
        raise UserError(
          f'expected runs with the same {what}, and {workdir} has {found!s:.60} where {workdirs[0]} has '
          f'{first[what]!s:.60}; leave it out'
        )
    if run.model.num_exits not in trained_exits(config_lib.targets(run.config)):
      raise UserError(f'expected runs with a trained last exit, and that of {workdir} is not; leave it out')
  variables = ensemble_variables([run.variables for run in runs])
  return LoadedEnsemble(Ensemble([run.model for run in runs]), variables, runs)


def _inputs(run: LoadedRun) -> dict[str, Any]:
  """What must be the same in every member."""
  dataset, scaling = run.dataset, scaling_of(run.config.data)
  return {
    'data set': dataset.name,
    'classes': dataset.class_names,
    'number of outputs (model.num_classes)': run.model.num_classes,
    'images [H, W, C]': run.image_shape,
    'scaling of images': scaling._replace(short_side=scaling.short_side or run.image_shape[0]),
    'normalization': (dataset.mean, dataset.std),
  }


def evaluate_ensemble(
  ensemble: LoadedEnsemble, data_dir: Path | None = None, accept_data_changes: bool = False
) -> list[dict[str, Any]]:
  """Evaluates every exit on the test images that no member was trained on.

  Args:
    data_dir: folder of the data set; None: as the first run says.
    accept_data_changes: the data may have other classes or labels than the runs learned.

  Returns:
    One row per member: `exit`, `name`, `seed`, `params` and `macs` (totals up to this member), `accuracy`,
    `balanced_accuracy`, `top5` (fractions), `nll` (nats).

  Raises:
    UserError: the data set cannot be read.
  """
  model, variables, runs = ensemble
  config = config_lib.with_data_dir(runs[0].config, data_dir)
  learned = [
    restore_learned(run.workdir, config.model.channels, accept_data_changes) for run in runs if run.workdir is not None
  ]
  task = build_task(config, learned=together(learned))
  if not task.dataset.labeled:
    raise UserError('expected runs on images with labels, to measure the ensemble by, found none; name other runs')
  config = task.config.copy_and_resolve_references()
  config.train.regime = 'joint'  # The first run's frozen backbone, if it has one, is not that of the ensemble.
  task = dataclasses.replace(
    task,
    config=config,
    model=model,
    targets=(LABELS,) * model.num_exits,
    dataset=dataclasses.replace(task.dataset, held_out=None),
  )
  measured = Evaluator(task, jax.local_devices()[:1]).evaluate(**variables)['test']
  return [
    {
      'exit': number,
      'name': run.config.name,
      'seed': run.config.seed,
      **{key: cost[key] for key in ('params', 'macs')},
      **{key: row[key] for key in ('accuracy', 'balanced_accuracy', 'top5', 'nll')},
    }
    for number, (run, cost, row) in enumerate(
      zip(runs, exit_costs(model, runs[0].image_shape), measured, strict=True), 1
    )
  ]
