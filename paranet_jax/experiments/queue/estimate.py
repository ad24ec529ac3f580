"""The table of a queue: what is done, what trains and what is left, with estimated hours."""

import heapq
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from paranet_jax.costs import describe
from paranet_jax.display.progress import human_duration
from paranet_jax.display.tables import ABSENT, align
from paranet_jax.experiments.queue.file import QueuedRun, QueueFile
from paranet_jax.experiments.queue.loop import check_same
from paranet_jax.experiments.queue.record import RunRecord
from paranet_jax.experiments.queue.state import RunState, run_state
from paranet_jax.host.errors import UserError

_HEADER = ('run', 'priority', 'state', 'epoch', 'test accuracy (%)', 'left')


def status_table(queue: QueueFile, workdir: Path, records: Mapping[str, RunRecord], at_once: int = 1) -> str:
  """One line for each run in the order of training, and the time that is left in all.

  Args:
    workdir: absolute.
    at_once: runs that train at the same time.
  """
  states, refused, failed = {}, set(), {name: record.failed for name, record in records.items() if record.failed}
  for run in queue.runs:
    try:
      state = states[run.name] = run_state(workdir, run.name)
      if not state.holder:  # A run that trains goes on, whatever the file says by now.
        check_same(run, state, records.get(run.name))
    except UserError as error:
      refused.add(run.name)
      failed[run.name] = str(error)
  left = seconds_left([run for run in queue.runs if run.name in states], states)
  left = {name: None if name in refused else seconds for name, seconds in left.items()}
  rows = []
  for run in queue.runs:
    if run.name not in states:
      rows.append((run.name, str(run.priority), 'damaged', ABSENT, ABSENT, ABSENT))
      continue
    state, record = states[run.name], records.get(run.name)
    seconds = left[run.name]
    rows.append(
      (
        run.name,
        str(run.priority),
        'refused' if run.name in refused else _describe(state, record),
        f'{state.epoch:.1f} of {state.epochs(run.config):g}',
        state.accuracies() or ABSENT,
        ABSENT if seconds is None or state.finished else human_duration(seconds),
      )
    )
  known = [seconds for seconds in left.values() if seconds is not None]
  unknown = len(left.keys() - refused) - len(known)
  total = human_duration(_until_last(known, at_once))
  more = f', and {unknown} run{"s" * (unknown > 1)} of which no speed is known yet' if unknown else ''
  apart = f', {at_once} at once' if at_once > 1 else ''
  lines = align(_HEADER, rows, left=(0, 2, 4))
  lines += [f'{run.name} failed: {failed[run.name]}' for run in queue.runs if run.name in failed]
  return '\n'.join([*lines, f'left: {total}{apart}{more} (estimated from what has been trained)'])


def _until_last(seconds: Sequence[float], at_once: int) -> float:
  """Until the last of some runs ends, of which the next one begins when another one has ended."""
  ends = [0.0] * min(at_once, len(seconds))
  for own in seconds:
    heapq.heapreplace(ends, ends[0] + own)
  return max(ends, default=0.0)


def _describe(state: RunState, record: RunRecord | None) -> str:
  if state.finished:
    return 'finished'
  if state.holder:
    return f'running ({state.holder.split(" on ")[0]})'
  if record and record.failed:
    return 'failed'
  return f'stopped at step {state.saved_step:,}' if state.begun else 'waiting'


def seconds_left(runs: Sequence[QueuedRun], states: Mapping[str, RunState]) -> dict[str, float | None]:
  """Estimated seconds that each run still trains; None: nothing like it has been trained.

  A run that has begun tells its own speed. For others it is that of a run with the same name or, scaled by the
  multiply-adds of the exits that train, of any run on the same data.
  """
  measured = {}
  for run in runs:
    seconds = states[run.name].seconds_per_epoch(run.config.train.batch_size)
    if seconds:
      measured[run.name] = seconds
  rows: dict[str, float | None] = {run.row: measured[run.name] for run in runs if run.name in measured}
  left: dict[str, float | None] = {}
  for run in runs:
    state = states[run.name]
    if state.finished:
      left[run.name] = 0.0
      continue
    if run.row not in rows:  # Scaling traces two networks, so it is done once for all seeds.
      rows[run.row] = _scaled(run, runs, states, measured)
    seconds = measured.get(run.name, rows[run.row])
    epochs = max(state.epochs(run.config) - state.epoch, 0.0)
    left[run.name] = None if seconds is None else seconds * epochs
  return left


def _scaled(
  run: QueuedRun, runs: Sequence[QueuedRun], states: Mapping[str, RunState], measured: Mapping[str, float]
) -> float | None:
  def data(config: ConfigDict) -> tuple[Any, ...]:
    return config.data.name, config.data.held_out, config.model.image_side, config.model.family

  like = [other for other in runs if other.name in measured and data(other.config) == data(run.config)]
  if not like:
    return None
  classes = states[like[0].name].num_classes
  try:
    return measured[like[0].name] * training_macs(run.config, classes) / training_macs(like[0].config, classes)
  except UserError:  # The dataset.json of that run is gone, and with it the number of classes.
    return None


def training_macs(config: ConfigDict, num_classes: int | None) -> int:
  """Multiply-adds of the exits that train, for an image in inference."""
  trained = [row for row in describe(config, num_classes)['exits'] if row['trained']]
  return trained[0]['macs_alone'] if len(trained) == 1 else trained[-1]['macs']
