"""The results: the numbers of the tables and the figure, from the summaries of runs, and the files that show them.

Accuracies are percentages. Standard deviations are over seeds, with n - 1; None for a single seed.
"""

import functools
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paranet_jax.display.pictures import drawn
from paranet_jax.experiments.markdown import table_markdown
from paranet_jax.experiments.planned_runs import PlannedRun, networks
from paranet_jax.experiments.protocols import Protocol, reductions
from paranet_jax.experiments.published import (
  CURVES,
  EXPERIMENTS,
  FIGURE,
  FIGURE_MACS,
  FIGURE_NETWORK,
  TABLES,
  Row,
  Table,
)
from paranet_jax.experiments.queue.record import FILE as QUEUE
from paranet_jax.host.errors import UserError
from paranet_jax.host.files import read_object, write_json, write_text
from paranet_jax.runs.workdir import FILES as RUN_FILES
from paranet_jax.runs.workdir import FOLDERS as RUN_FOLDERS

RESULTS = 'results.json'
FILES = {name: f'{name}.png' if name == FIGURE else f'{name}.md' for name in EXPERIMENTS}

Finished = list[tuple[PlannedRun, dict[str, Any]]]


def section(experiment: str, finished: Finished) -> dict[str, Any]:
  """The section of results.json for one experiment.

  Args:
    finished: runs and their summaries, with all seeds of every network that the experiment compares.

  Returns:
    `title`, `dataset`, `reduced` (a list of `field: the paper's -> here`), `seeds`, `rows`, `effects` (tables only),
    `paper` and `published` (figure only), and `runs`, each with `run`, `command`, `steps`, `wall_time_s`, `device`,
    `versions`, `processor`, `cores` and `finished` (the last three are None for runs of version 0.1.0).
  """
  ours = [(run, summary) for run, summary in finished if run.name in networks(experiment)]
  config = ours[0][0].config
  numbers = _figure(ours) if experiment == FIGURE else _table(TABLES[experiment], ours)
  return {
    'title': 'Figure 2: anytime inference' if experiment == FIGURE else TABLES[experiment].title,
    'dataset': config.data.name,
    'reduced': reductions(config),
    'seeds': sorted({run.seed for run, _ in ours}),
    **numbers,
    'runs': [_run(run, summary) for run, summary in ours],
  }


def _table(table: Table, finished: Finished) -> dict[str, Any]:
  rows = [_row(row, finished) for row in table.rows]
  by_exit = {(row['network'], row['exit']): row for row in rows}
  effects = [
    _effect(by_exit[table.treated, row.exit], by_exit[table.control, row.exit])
    for row in table.rows
    if row.network == table.treated
  ]
  return {'question': table.question, 'rows': rows, 'effects': effects}


def _figure(finished: Finished) -> dict[str, Any]:
  paper = [row for row in TABLES['table1'].rows if row.network == FIGURE_NETWORK]
  return {
    'rows': [_row(row, finished) for row in paper],
    'paper': [
      {'exit': row.exit, 'accuracy': row.accuracy, 'macs': macs} for row, macs in zip(paper, FIGURE_MACS, strict=True)
    ],
    'published': [curve._asdict() for curve in CURVES],
  }


def _row(row: Row, finished: Finished) -> dict[str, Any]:
  exits = [summary['exits'][row.exit - 1] for run, summary in finished if run.name == row.network]
  ours = [100 * found['accuracy'] for found in exits]
  mean = statistics.mean(ours)
  return {
    'network': row.network,
    'exit': row.exit,
    'paper': row.accuracy,
    'paper_std': row.std,
    'ours': mean,
    'std': _std(ours),
    'difference': mean - row.accuracy,
    'each_seed': ours,
    'macs': exits[0]['macs'],
    'params': exits[0]['params'],
  }


def _effect(treated: dict[str, Any], control: dict[str, Any]) -> dict[str, Any]:
  """The difference seed by seed: with equal seeds, two networks see the same images in the same order."""
  each = [a - b for a, b in zip(treated['each_seed'], control['each_seed'], strict=True)]
  return {
    'what': f'{treated["network"]} - {control["network"]}',
    'exit': treated['exit'],
    'paper': treated['paper'] - control['paper'],
    'ours': statistics.mean(each),
    'std': _std(each),
    'each_seed': each,
  }


def _std(values: Sequence[float]) -> float | None:
  return statistics.stdev(values) if len(values) > 1 else None


def _run(run: PlannedRun, summary: dict[str, Any]) -> dict[str, Any]:
  kept = {key: summary[key] for key in ('steps', 'wall_time_s', 'device', 'versions')}
  kept |= {key: summary.get(key) for key in ('processor', 'cores', 'finished')}
  return {'run': str(run), 'command': run.command} | kept


def load_results(workdir: Path, protocol: Protocol) -> dict[str, Any]:
  """Reads results.json; without one, returns its initial content.

  Args:
    workdir: absolute.

  Raises:
    UserError: the folder holds results of another protocol or of a queue, or files of another program, or results.json
      is damaged.
  """
  path, fix = workdir / RESULTS, 'restore it, or set --workdir'
  results = read_object(path, fix)
  if results is None:
    names = *FILES.values(), *RUN_FILES, *RUN_FOLDERS, QUEUE  # A queue writes its results when a run has ended.
    if foreign := [name for name in names if os.path.lexists(workdir / name)]:
      raise UserError(f'{workdir} holds {foreign[0]} but no {RESULTS}, so this command did not write it; set --workdir')
    return {'protocol': protocol.name, 'overrides': protocol.overrides, 'experiments': {}}
  if 'queue' in results:
    raise UserError(f'{workdir} holds results of a queue, found {_describe(protocol)}; set --workdir to another folder')
  try:
    found = Protocol(results['protocol'], results['overrides'])
    results['experiments'].items()
    found.overrides.items()
  except (KeyError, AttributeError) as error:
    raise UserError(f'{path} is damaged ({error!r:.60}); {fix}') from error
  if found != protocol:
    raise UserError(
      f'{workdir} holds results of {_describe(found)}, found {_describe(protocol)}; set --workdir to another folder'
    )
  return results


def _describe(protocol: Protocol) -> str:
  changed = ''.join(f' --set={field}={value}' for field, value in sorted(protocol.overrides.items()))
  return f'--protocol={protocol.name}{changed}'


def write_results(workdir: Path, results: dict[str, Any], experiments: Sequence[str], finished: Finished) -> str:
  """Writes the file of each experiment, then results.json; returns the text to print.

  Args:
    results: as `load_results` returns them; sections of other experiments are kept.
    finished: the runs and their summaries.
  """
  sections = {name: section(name, finished) for name in experiments}
  lines = []
  for name, found in sections.items():
    path: Path | str = workdir / FILES[name]
    if name == FIGURE:
      path = drawn(functools.partial(_draw, found, results['protocol'], path))
    else:
      text = table_markdown(found, results['protocol'])
      write_text(path, text)
      lines.append(text)
    lines.append(f'written: {path}' if isinstance(path, Path) else f'{FILES[name]}: {path}')
  write_json(workdir / RESULTS, results | {'experiments': results['experiments'] | sections})
  return '\n'.join(lines)


def _draw(found: dict[str, Any], protocol: str, path: Path) -> Path:
  from paranet_jax.display.plots import save_figure
  from paranet_jax.experiments.figure import anytime_figure

  save_figure(anytime_figure(found, protocol), path)
  return path
