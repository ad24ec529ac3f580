"""How far a run has got, from the contents of its folder; nothing is changed."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from paranet_jax.config import total_steps
from paranet_jax.costs import describe
from paranet_jax.display.metrics import read_metrics
from paranet_jax.host.errors import UserError
from paranet_jax.host.files import read_object
from paranet_jax.runs.checkpoints import Checkpoints
from paranet_jax.runs.workdir import CONFIG, SUMMARY, changes


@dataclasses.dataclass(frozen=True)
class RunStatus:
  """How far a run has got.

  Attributes:
    changed: the fields that differ from the requested configuration; if there are any, nothing else is reported.
    step: the latest checkpoint's; None: there is none.
    summary: the contents of summary.json, once the run has finished.
  """

  changed: list[str]
  step: int | None
  summary: dict[str, Any] | None

  def __str__(self) -> str:
    if self.summary:
      return 'finished'
    return 'missing' if self.step is None else f'stopped at step {self.step:,}'


def run_status(workdir: Path, config: ConfigDict, moved: bool = False) -> RunStatus:
  """Inspects a run's folder.

  Args:
    workdir: absolute.
    moved: the place of the data may differ.

  Raises:
    UserError: its configuration or summary is damaged.
  """
  changed = changes(workdir, config, moved) if os.path.lexists(workdir / CONFIG) else kept_changes(workdir, config)
  if changed:
    return RunStatus(changed, None, None)
  with Checkpoints(workdir) as checkpoints:
    step = checkpoints.latest_step()
  return RunStatus([], step, finished_summary(workdir, step))


def kept_changes(workdir: Path, config: ConfigDict) -> list[str]:
  """In what a run of which only the results were kept differs from this configuration, as `what: kept -> now`.

  Only what its summary tells is compared: network, data set, seed, what each exit learns from and costs, and steps.

  Raises:
    UserError: the summary is damaged.
  """
  summary = read_summary(workdir)
  if summary is None:
    return []
  now = describe(config, summary.get('num_classes'))
  pairs = {key: (summary.get(key, now[key]), now[key]) for key in ('name', 'dataset', 'seed')}
  pairs['exits'] = len(summary['exits']), len(now['exits'])
  for kept, cost in zip(summary['exits'], now['exits'], strict=False):
    for key in ('learns_from', 'macs', 'params'):
      pairs[f'{key} of exit {cost["exit"]}'] = kept.get(key, cost[key]), cost[key]
  lines = [line for line in read_metrics(workdir) if line.get('epoch')]
  if lines:
    pairs['steps'] = summary['steps'], total_steps(config, round(lines[-1]['step'] / lines[-1]['epoch']))
  return [f'{what}: {kept} -> {here}' for what, (kept, here) in pairs.items() if kept != here]


def finished_summary(workdir: Path, step: int | None) -> dict[str, Any] | None:
  """Reads summary.json of a run that is finished; None: it is not, such as one that was resumed with more epochs.

  Args:
    step: of the latest checkpoint, if any.

  Raises:
    UserError: as `read_summary`.
  """
  summary = read_summary(workdir)
  return None if summary is None or (step is not None and step > summary['steps']) else summary


def read_summary(workdir: Path) -> dict[str, Any] | None:
  """Reads summary.json of a run; None: there is none.

  Raises:
    UserError: it is damaged.
  """
  path, fix = workdir / SUMMARY, 'delete it, and it is written again'
  summary = read_object(path, fix)
  if summary is not None and not _fits(summary):
    raise UserError(f'{path} is not the summary of a run (it holds {summary!r:.40}); {fix}')
  return summary


def _fits(summary: dict[str, Any]) -> bool:
  exits = summary.get('exits')
  return (
    type(summary.get('steps')) is int
    and summary.keys() >= {'wall_time_s', 'device', 'versions'}
    and isinstance(exits, list)
    and all(isinstance(row, dict) and row.keys() >= {'accuracy', 'macs', 'params'} for row in exits)
  )
