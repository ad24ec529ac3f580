"""Several seeds of one configuration: a folder each, and the mean and spread of every measure."""

import contextlib
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from paranet_jax import config as config_lib
from paranet_jax import devices as devices_lib
from paranet_jax.devices import SideBySide
from paranet_jax.display.tables import ABSENT, align
from paranet_jax.evaluation import AGREEMENT, MEASURES, Evaluator
from paranet_jax.host.errors import UserError, say
from paranet_jax.host.files import write_json
from paranet_jax.host.lock import workdir_lock
from paranet_jax.host.machine import Device
from paranet_jax.host.processes import Coordinator
from paranet_jax.host.signals import StopRequest
from paranet_jax.models.numerics import check_training
from paranet_jax.runs.checkpoints import has_checkpoint
from paranet_jax.runs.dtype import with_dtype
from paranet_jax.runs.init_from import check_backbone
from paranet_jax.runs.learned import restore_learned
from paranet_jax.runs.record import open_record
from paranet_jax.runs.status import run_status
from paranet_jax.runs.teacher import check_teacher
from paranet_jax.runs.workdir import (
  AVERAGE,
  FOLDERS,
  NOTHING,
  SUMMARY,
  Accepted,
  check_saved,
  prepare_workdir,
  save_config,
)
from paranet_jax.task import agreed_task
from paranet_jax.train import train_loop, train_missing

_SPLITS = (('held_out', 'held_out'), ('test', 'exits'))
"""Names of the splits, and their keys in summary.json."""


def train_seeds(
  config: ConfigDict, workdir: Path, accepted: Accepted = NOTHING, at_once: bool | None = None
) -> dict[str, Any] | None:
  """Trains the seeds `seed` to `seed + seeds - 1`, each a complete run in `workdir/seed_<seed>`.

  Args:
    workdir: absolute.
    accepted: what may differ from what a run saved.
    at_once: train side by side, one run per device, or all vmapped on a single device; False: one after another, which
      reproduces each run bit for bit. None: side by side unless the devices are CPUs.

  Returns:
    The contents of summary.json (see `summarize`), or None if a signal stopped a run before its end.

  Raises:
    UserError: the configuration, the data or the workdir does not fit, or a loss is no longer finite.
  """
  processes = Coordinator().count
  if processes > 1:
    raise UserError(
      f'several seeds are trained in one process, found {processes} processes; set --config.seeds=1, or '
      'start one process'
    )
  config_lib.validate(seed_configs(config)[-1])
  if (workdir / FOLDERS[0]).exists():
    raise UserError(f'workdir {workdir} holds a single run, found {config.seeds} seeds; set --workdir for new runs')
  devices = devices_lib.pick_devices(config.train.devices)
  devices_lib.check_fits(config, devices)
  check_saved(workdir, config, accepted.config, accepted.place)
  config = with_dtype(config, devices, workdir)
  configs = seed_configs(config)
  # Of the first run that has none of it yet: they differ in their seeds alone.
  fresh = next((own for own in configs if not has_checkpoint(workdir / f'seed_{own.seed}')), configs[0])
  for check in (check_backbone, check_teacher):
    check(fresh, workdir / f'seed_{fresh.seed}')
  prepare_workdir(workdir, config, accepted.config, accepted.place)
  with workdir_lock(workdir):
    return _train(config, configs, workdir, devices, accepted, at_once)


def _train(
  config: ConfigDict,
  configs: list[ConfigDict],
  workdir: Path,
  devices: list[Device],
  accepted: Accepted,
  at_once: bool | None,
) -> dict[str, Any] | None:
  def begun() -> None:
    """Says what the folder holds; not before a seed has begun, as a command that is refused leaves nothing."""
    save_config(workdir, config)
    (workdir / SUMMARY).unlink(missing_ok=True)  # An earlier, shorter one's.

  # Measured on one core of a CPU: a vmapped step of 4 small networks takes 16.1 ms, their 4 steps in turn 13.9 ms.
  at_once = devices[0].platform != 'cpu' if at_once is None else at_once
  summaries = []
  for group in _groups(configs, len(devices) if at_once else 0):
    folders = [workdir / f'seed_{own.seed}' for own in group]
    if len(group) > 1 and not _train_group(group, folders, devices, accepted, begun):
      return None
    for own, folder in zip(group, folders, strict=True):
      summary = train_missing(own, folder, f'seed {own.seed}', accepted, begun)
      if summary is None:
        return None
      summaries.append(summary)
  result = summarize(summaries)
  save_config(workdir, config)
  write_json(workdir / SUMMARY, result)
  say(seeds_table(result))
  say(f'summary: {workdir / SUMMARY}')
  return result


def seed_configs(config: ConfigDict) -> list[ConfigDict]:
  """The configuration of each seed's own run."""
  configs = [config.copy_and_resolve_references() for _ in range(config.seeds)]
  for seed, own in enumerate(configs, config.seed):
    own.seed, own.seeds = seed, 1
  return configs


def _groups(configs: list[ConfigDict], num_devices: int) -> list[list[ConfigDict]]:
  """The seeds to train at once: all on one device, one per device, or (0 devices) each alone."""
  size = len(configs) if num_devices == 1 else max(num_devices, 1)
  return [configs[first : first + size] for first in range(0, len(configs), size)]


def _train_group(
  group: list[ConfigDict],
  folders: list[Path],
  devices: list[Device],
  accepted: Accepted,
  begun: Callable[[], None],
) -> bool:
  """Trains runs that differ only in their seed, in lockstep, to the checkpoint of their last step.

  Each becomes what it would become alone on one device, to rounding. Finished runs, and runs whose checkpoints have
  different steps, are left as they are.

  Args:
    folders: one per run, absolute.
    devices: one, or at least one per run.

  Returns:
    Whether no signal stopped them.

  Raises:
    UserError: as `train.train_and_evaluate`.
  """
  if all(run_status(folder, own, accepted.place).summary for own, folder in zip(group, folders, strict=True)):
    return True
  say(f'seeds {", ".join(str(own.seed) for own in group)} at once')
  tasks = []
  for own, folder in zip(group, folders, strict=True):
    check_saved(folder, own, accepted.config, accepted.place)
    learned = restore_learned(folder, own.model.channels, accepted.data)
    tasks.append(agreed_task(own, Coordinator(), learned))
  if tasks[0].streams:
    return True  # Each seed has its own order, and images are read for one run at a time.
  for own, folder in zip(group, folders, strict=True):
    prepare_workdir(folder, own, accepted.config, accepted.place)
  check_training(tasks[0].model, tasks[0].image_shape, group[0].train.batch_size)
  layout = SideBySide(devices[: len(group)])
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(StopRequest())
    both = zip(tasks, folders, strict=True)
    opened = (open_record(task, folder, Coordinator(), len(group)) for task, folder in both)
    records = [stack.enter_context(record) for record in opened]
    if len({record.saved_step for record in records}) > 1:
      return True
    states = [record.restore(devices[:1]) for record in records]
    if len({int(state.step) for state in states}) > 1:  # The latest checkpoint of one was damaged.
      return True
    for record in records:
      record.save_facts()
    begun()
    train_loop(records, layout.join(states), layout, Evaluator(tasks[0], devices[:1]), stop)
  if stop.received:
    say(f'stopped by {stop.received} after step {records[0].saved_step}, saved; the same command resumes')
  return not stop.received


def summarize(summaries: list[dict[str, Any]]) -> dict[str, Any]:
  """One summary of several that differ in their seed.

  Returns:
    What they share; `seeds`; for every exit of `exits` and `held_out`, each measure as {`mean`, `std` (of the sample,
    n - 1), `each`}, None if the exit is not trained or a run of version 0.1.0 has no such measure; `wall_time_s`, the
    total; `finished`, the last date. Accuracies by class and confusion matrices are in the summary of each seed.
  """
  first = summaries[0]
  own = ('seed', 'confusion_file')
  result = {
    key: value
    for key, value in first.items()
    if key not in own and all(summary.get(key) == value for summary in summaries)
  }
  if all(summary.get('finished') for summary in summaries):
    result['finished'] = max(summary['finished'] for summary in summaries)
  result['seeds'] = [summary['seed'] for summary in summaries]
  for split in ('exits', 'held_out'):
    if split in first:
      columns = zip(*(summary[split] for summary in summaries), strict=True)
      result[split] = [_spreads(rows) for rows in columns]
  if AVERAGE in first:
    result[AVERAGE] = {
      split: [_spreads(rows) for rows in zip(*(summary[AVERAGE][split] for summary in summaries), strict=True)]
      for split in first[AVERAGE]
    }
  return result | {'wall_time_s': round(sum(summary['wall_time_s'] for summary in summaries), 1)}


def _spreads(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  shared = {name: value for name, value in rows[0].items() if name not in ('class_accuracy', 'confusion')}
  names = (*MEASURES, AGREEMENT) if AGREEMENT in shared else MEASURES
  return shared | {name: _spread([row.get(name) for row in rows]) for name in names}


def _spread(values: list[float | None]) -> dict[str, Any] | None:
  numbers = [value for value in values if value is not None]
  if len(numbers) < len(values):
    return None
  return {'mean': statistics.mean(numbers), 'std': statistics.stdev(numbers), 'each': numbers}


def seeds_table(summary: dict[str, Any]) -> str:
  """Mean and standard deviation of every exit as plain text: accuracies in percent, NLL in nats."""
  splits = [(name, row) for name, split in _SPLITS for row in summary.get(split, ())]
  columns = {'accuracy (%)': ('accuracy', 100, 2), 'top-5 (%)': ('top5', 100, 2), 'nll': ('nll', 1, 4)}
  if any(AGREEMENT in row for _, row in splits):
    columns = {'same answer as the last exit (%)': (AGREEMENT, 100, 2)}
  rows = [
    (name, str(row['exit']), *(_cell(row[key], scale, digits) for key, scale, digits in columns.values()))
    for name, row in splits
  ]
  title = f'{summary["name"]}, seeds {", ".join(map(str, summary["seeds"]))}: mean +- standard deviation'
  return '\n'.join([title, *align(('split', 'exit', *columns), rows, left=(0,))])


def _cell(spread: dict[str, Any] | None, scale: float, digits: int) -> str:
  if spread is None:
    return ABSENT
  return f'{scale * spread["mean"]:.{digits}f} +- {scale * spread["std"]:.{digits}f}'
