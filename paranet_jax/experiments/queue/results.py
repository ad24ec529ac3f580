"""results.json and results.md of a queue: what has been measured so far, with what is reduced or partial in the row.

Accuracies are percentages on the test images. Standard deviations are over seeds, with n - 1; None for a single seed.
"""

import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from paranet_jax.config import PATHS, differences
from paranet_jax.costs import describe
from paranet_jax.display.tables import ABSENT
from paranet_jax.experiments.markdown import commands_block, from_paper, published, table, with_std
from paranet_jax.experiments.protocols import NO_REDUCTION, reductions
from paranet_jax.experiments.published import TABLES, Row
from paranet_jax.experiments.queue.file import Comparison, QueuedRun, QueueFile
from paranet_jax.experiments.queue.loop import check_same
from paranet_jax.experiments.queue.record import RunRecord
from paranet_jax.experiments.queue.state import RUNS, RunState, run_state
from paranet_jax.host.arguments import from_here
from paranet_jax.host.errors import UserError, say
from paranet_jax.host.files import check_regular, read_object, write_json, write_text
from paranet_jax.host.machine import today
from paranet_jax.models.registry import BFLOAT16
from paranet_jax.runs.workdir import restore_config

RESULTS = 'results.json'
MARKDOWN = 'results.md'

_ROWS = (
  'run',
  'exit',
  'paper (%)',
  'ours (%)',
  'seeds',
  'epochs',
  'multiply-adds',
  'parameters',
  'differs from the paper',
)
_COMPARED = ('difference', 'exit', 'mean', 'each seed', 'partial')
_RUNS = ('run', 'epoch', 'finished', 'code', 'commit', 'processor', 'cores', 'wall time (h)')

States = Mapping[str, RunState]


def write_results(queue: QueueFile, workdir: Path, records: Mapping[str, RunRecord]) -> dict[str, Any]:
  """Writes both files and returns the content of results.json.

  Args:
    workdir: absolute.
  """
  found = results(queue, workdir, records)
  write_json(workdir / RESULTS, found)
  write_text(workdir / MARKDOWN, markdown(found))
  return found


def check_results(queue: QueueFile, workdir: Path) -> None:
  """Raises a `UserError` if a folder has results.json of something else than a queue: it would be replaced.

  Those of another queue are, and a line says so.
  """
  fix = 'move it away, or set --workdir'
  check_regular(workdir / MARKDOWN, fix)
  found = read_object(workdir / RESULTS, fix)
  if found is not None and 'queue' not in found:
    raise UserError(
      f'expected no {RESULTS} in {workdir} or that of a queue, found that of another command; set --workdir, or '
      'workdir in the queue file'
    )
  if found and found['queue'] != queue.path.name:
    say(
      f'{workdir} has the results of {found["queue"]}, and those of {queue.path.name} take their place; `run` '
      f'{found["queue"]} with --write writes them again'
    )


def results(queue: QueueFile, workdir: Path, records: Mapping[str, RunRecord]) -> dict[str, Any]:
  """The numbers.

  Returns:
    `queue`, `date`, `rows`, `comparisons`, `runs`, and why runs that are damaged or other ones are `left_out`.
  """
  states, first, left_out = {}, {}, []
  for run in queue.runs:
    try:
      state = run_state(workdir, run.name)
      check_same(run, state, records.get(run.name))
      config = _own_config(run, state)
      _check_alike(run, config, *first.get(run.row, (run, config)))
    except UserError as error:
      left_out.append(f'{run.name}: {error}')
      continue
    if state.finished and not state.measured_at_end:
      left_out.append(f'{run.name}: it is finished, but metrics.jsonl lacks its last accuracies; restore that file')
    elif state.measured and not any(state.measured.values()):
      left_out.append(f'{run.name}: it has no accuracies, as its images have no labels')
    elif state.measured:
      states[run.name] = state
      first.setdefault(run.row, (run, config))
  runs = [run for run in queue.runs if run.name in states]
  rows = []
  for name in dict.fromkeys(run.row for run in runs):
    try:
      rows += _rows(name, runs, states, first[name][1])
    except UserError as error:  # Its dataset.json is gone, and with it the number of classes.
      left_out.append(f'{name}: {error}')
  return {
    'queue': queue.path.name,
    'date': today(),
    'rows': rows,
    'comparisons': [
      _comparison(compared, name, runs, states) for compared in queue.comparisons for name in compared.treated
    ],
    'runs': [_run(run, states[run.name], records.get(run.name), workdir) for run in runs],
    'left_out': left_out,
  }


def _own_config(run: QueuedRun, state: RunState) -> ConfigDict:
  """The configuration that a run trains with; where only its results were kept, that of the file."""
  return restore_config(state.folder) if state.begun else run.config


def _check_alike(run: QueuedRun, config: ConfigDict, first: QueuedRun, expected: ConfigDict) -> None:
  """Raises UserError if a seed ran with other fields than the first of its row, whose `config` may have been edited."""
  ignored = (*NO_REDUCTION, *(f'{field}:' for field in PATHS))
  if run.config.model.dtype == BFLOAT16:  # Each run has measured at its start which dtype is the faster one.
    ignored += ('model.dtype:',)
  changes = differences(expected.to_dict(), config.to_dict())
  if different := [change for change in changes if not change.startswith(ignored)]:
    raise UserError(
      f'it has other fields than {first.name}: {"; ".join(different)}; give them different names in the file'
    )


def _rows(name: str, runs: Sequence[QueuedRun], states: States, config: ConfigDict) -> list[dict[str, Any]]:
  """One row for each exit over the finished seeds, and one for each exit of every seed that is not finished."""
  own = [run for run in runs if run.row == name]
  finished = [run for run in own if states[run.name].finished]
  groups = [finished] * bool(finished) + [[run] for run in own if run not in finished]
  costs = {row['exit']: row for row in describe(config, states[own[0].name].num_classes)['exits']}
  here = re.compile(rf'(?<!\S){re.escape(str(Path.cwd()))}/')  # Paths are absolute in a configuration.
  reduced = [here.sub('', change) for change in reductions(config)]
  rows = []
  for group in groups:
    latest = [_latest(states[run.name]) for run in group]
    for number in latest[0][1]:
      each = [100 * accuracies[number] for _, accuracies in latest]
      both = zip(group, latest, strict=True)
      every = [states[run.name].held_out.get(epoch, {}).get(number) for run, (epoch, _) in both]
      held_out = [100 * accuracy for accuracy in every if accuracy is not None]
      paper = _published(own[0], number)
      rows.append(
        {
          'run': name,
          'network': config.name,
          'exit': number,
          'seeds': [run.seed for run in group],
          'ours': statistics.mean(each),
          'std': _std(each),
          'each_seed': each,
          'held_out': statistics.mean(held_out) if len(held_out) == len(group) else None,
          'paper': paper and paper.accuracy,
          'paper_std': paper and paper.std,
          'epoch': latest[0][0],
          'epochs': states[own[0].name].epochs(config),
          'partial': group is not finished,
          'macs': costs[number]['macs'],
          'params': costs[number]['params'],
          'reduced': reduced,
        }
      )
  return rows


def _latest(state: RunState) -> tuple[float, dict[int, float]]:
  epoch = max(state.measured)
  return epoch, state.measured[epoch]


def _published(run: QueuedRun, number: int) -> Row | None:
  rows = [row for found in TABLES.values() for row in found.rows if run.config.data.name.startswith('cifar100')]
  return next((row for row in rows if (row.network, row.exit) == (run.paper, number)), None)


def _std(values: Sequence[float]) -> float | None:
  return statistics.stdev(values) if len(values) > 1 else None


def _comparison(compared: Comparison, treated: str, runs: Sequence[QueuedRun], states: States) -> dict[str, Any]:
  """Differences seed by seed: with equal seeds, two runs see the same images in the same order."""

  def seeds(row: str) -> dict[int, RunState]:
    return {run.seed: states[run.name] for run in runs if run.row == row}

  ours, control = seeds(treated), seeds(compared.control)
  each, partial = {}, []
  for seed in ours.keys() & control.keys():
    pair = ours[seed], control[seed]
    shared = [epoch for epoch in pair[0].measured if epoch in pair[1].measured]
    if not shared or not all(compared.exit in state.measured[max(shared)] for state in pair):
      continue
    values = [state.measured[max(shared)][compared.exit] for state in pair]
    difference = 100 * (values[0] - values[1])
    if all(state.finished and max(state.measured) == max(shared) for state in pair):
      each[seed] = difference
    else:
      partial.append({'seed': seed, 'epoch': max(shared), 'difference': difference})
  values = [each[seed] for seed in sorted(each)]
  return {
    'question': compared.question,
    'what': f'{treated} - {compared.control}',
    'exit': compared.exit,
    'seeds': sorted(each),
    'mean': statistics.mean(values) if values else None,
    'std': _std(values),
    'each_seed': values,
    'partial': sorted(partial, key=lambda own: own['seed']),
  }


def _run(run: QueuedRun, state: RunState, record: RunRecord | None, workdir: Path) -> dict[str, Any]:
  summary = state.summary or {}
  folder = from_here(workdir / RUNS / run.name)
  return {
    'run': run.name,
    'command': shlex.join(['python', '-m', 'paranet_jax.main', *run.arguments, f'--workdir={folder}']),
    'epoch': state.epoch,
    'finished': (record.finished if record else '') or summary.get('finished', ''),
    'code': record.code if record else '',
    'commit': record.commit if record else None,
    'starts': record.starts if record else [],
    'processor': summary.get('processor'),
    'cores': summary.get('cores'),
    'wall_time_s': summary.get('wall_time_s'),
    'device': summary.get('device'),
    'versions': summary.get('versions'),
  }


def markdown(found: dict[str, Any]) -> str:
  """The tables of `results`."""
  lines = [
    f'# Results of {found["queue"]}',  # Without the date: pages link to this heading.
    f'Written on {found["date"]}. Accuracy on the test images after the last step: mean +- standard deviation (n - 1) '
    'over the seeds. A row marked **partial** shows the epoch that it names. Multiply-adds (per image) and parameters '
    'include the earlier exits.',
    _rows_table(found['rows']) if found['rows'] else 'Nothing has been measured yet.',
  ]
  for question in dict.fromkeys(own['question'] for own in found['comparisons']):
    own = [entry for entry in found['comparisons'] if entry['question'] == question]
    lines += [question, table(_COMPARED, [_compared(entry) for entry in own])]
  if found['left_out']:
    lines.append('Left out: ' + '; '.join(found['left_out']))
  if found['runs']:
    lines += [table(_RUNS, [_run_row(run) for run in found['runs']])]
    lines += [commands_block([run['command'] for run in found['runs']])]
  return '\n\n'.join(filter(None, lines)) + '\n'


def _rows_table(rows: Sequence[dict[str, Any]]) -> str:
  """The table of the rows, with a column for held-out images where there are any: what is chosen is chosen by them."""
  held_out = [row.get('held_out') for row in rows]  # Older results have none.
  cells = [_row(row) for row in rows]
  if set(held_out) == {None}:
    return table(_ROWS, cells)
  shown = [ABSENT if value is None else f'{value:.2f}' for value in held_out]
  return table(
    (*_ROWS[:4], 'held out (%)', *_ROWS[4:]),
    [(*cell[:4], value, *cell[4:]) for cell, value in zip(cells, shown, strict=True)],
  )


def _row(row: dict[str, Any]) -> tuple[str, ...]:
  paper = ABSENT if row['paper'] is None else published(row)
  epochs = f'**partial: {row["epoch"]:g} of {row["epochs"]:g}**' if row['partial'] else f'{row["epochs"]:g}'
  seeds = ', '.join(map(str, row['seeds']))
  ours, counts = with_std(f'{row["ours"]:.2f}', row['std']), (f'{row["macs"]:,}', f'{row["params"]:,}')
  return row['run'], str(row['exit']), paper, ours, seeds, epochs, *counts, from_paper(row)


def _compared(entry: dict[str, Any]) -> tuple[str, ...]:
  mean = ABSENT if entry['mean'] is None else with_std(f'{entry["mean"]:+.2f}', entry['std'])
  each = ', '.join(f'{value:+.2f}' for value in entry['each_seed']) or ABSENT
  partial = [f'seed {own["seed"]} at epoch {own["epoch"]:g}: {own["difference"]:+.2f}' for own in entry['partial']]
  return entry['what'], str(entry['exit']), mean, each, ', '.join(partial) or ABSENT


def _run_row(run: dict[str, Any]) -> tuple[str, ...]:
  last = run['starts'][-1] if run['starts'] else run  # Another command may have trained it.
  hours = ABSENT if run['wall_time_s'] is None else f'{run["wall_time_s"] / 3600:.2f}'
  return (
    run['run'],
    f'{run["epoch"]:g}',
    run['finished'] or ABSENT,
    run['code'] or ABSENT,
    run['commit'] or ABSENT,
    last.get('processor') or ABSENT,
    str(last.get('cores') or ABSENT),
    hours,
  )
