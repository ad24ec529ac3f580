"""The runs behind the tables: their list, their state, and training the missing ones."""

import dataclasses
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from paranet_jax.config import with_data_dir
from paranet_jax.experiments.protocols import Protocol, run_command, run_config
from paranet_jax.experiments.published import FIGURE_NETWORK, TABLES
from paranet_jax.host.arguments import absolute
from paranet_jax.host.errors import UserError
from paranet_jax.runs.status import RunStatus, run_status
from paranet_jax.runs.workdir import Accepted
from paranet_jax.train import train_missing

RUNS = 'runs'


@dataclasses.dataclass(frozen=True)
class PlannedRun:
  """One training run.

  Attributes:
    workdir: absolute.
    command: trains this run alone.
    moved: the data may be elsewhere than an earlier start found them.
  """

  name: str
  seed: int
  config: ConfigDict
  workdir: Path
  command: str
  moved: bool = False

  def __str__(self) -> str:
    return f'{self.name}-s{self.seed}'


def plan_runs(
  experiments: Iterable[str], protocol: Protocol, seeds: int, workdir: Path, data_dir: Path | None = None
) -> list[PlannedRun]:
  """The runs that some experiments need, each once: every network with seed 0, then with seed 1, and so on.

  Args:
    experiments: names from `published.EXPERIMENTS`.
    seeds: how many; seeds are 0 to seeds - 1.
    workdir: as the user wrote it.
    data_dir: absolute, of the data set; None: as the protocol says.

  Raises:
    UserError: an override is invalid.
  """
  names = dict.fromkeys(name for experiment in experiments for name in networks(experiment))
  return [_plan(name, seed, protocol, workdir, data_dir) for seed in range(seeds) for name in names]


def networks(experiment: str) -> tuple[str, ...]:
  """The networks that an experiment compares."""
  return TABLES[experiment].networks if experiment in TABLES else (FIGURE_NETWORK,)


def _plan(name: str, seed: int, protocol: Protocol, workdir: Path, data_dir: Path | None) -> PlannedRun:
  folder = workdir / RUNS / f'{name}-s{seed}'
  config = with_data_dir(run_config(protocol, name, seed), data_dir)
  command = run_command(protocol, name, seed, folder)
  if data_dir:
    command += f' {shlex.quote(f"--data_dir={data_dir}")}'
  return PlannedRun(name, seed, config, absolute(folder), command, moved=data_dir is not None)


def status(run: PlannedRun) -> RunStatus:
  """How far a run is.

  Raises:
    UserError: its folder holds a run of another configuration, or is damaged.
  """
  found = run_status(run.workdir, run.config, run.moved)
  if found.changed:
    raise UserError(
      f'{run.workdir} holds a run with a different configuration: {"; ".join(found.changed)} (saved -> now); '
      'set --workdir'
    )
  return found


def run_missing(runs: Sequence[PlannedRun], accept_data_changes: bool = False) -> list[dict[str, Any]] | None:
  """Trains what is not finished, one run after another.

  Args:
    accept_data_changes: the data may have other classes or labels than a run learned before it was stopped.

  Returns:
    The summaries of all runs; None if a signal stopped one.

  Raises:
    UserError: a run's folder, data or loss is not what it must be.
  """
  for run in runs:
    status(run)  # Before hours of training.
  summaries = []
  for number, run in enumerate(runs, 1):
    try:
      flag = ' --accept_data_changes' if accept_data_changes else ''
      title = f'run {number} of {len(runs)}: {run}\n{run.command}{flag}'
      summary = train_missing(run.config, run.workdir, title, Accepted(data=accept_data_changes, place=run.moved))
    except UserError as error:
      raise UserError(f'run {run}: {error}') from error
    if summary is None:
      return None
    summaries.append(summary)
  return summaries
