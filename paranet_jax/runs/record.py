"""What a run writes to its folder while it trains: metrics, checkpoints, and at its end the summary."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paranet_jax import devices as devices_lib
from paranet_jax.data.cache import write_arrays
from paranet_jax.display.metrics import MetricsWriter, read_metrics
from paranet_jax.evaluation import INLINE_CLASSES, as_json, as_metrics
from paranet_jax.host.errors import UserError, report_no_room, say
from paranet_jax.host.files import write_json
from paranet_jax.host.lock import workdir_lock
from paranet_jax.host.machine import Device, cpu_name, today, usable_cores
from paranet_jax.host.processes import Coordinator, reported_once
from paranet_jax.runs.checkpoints import Checkpoints, not_finite
from paranet_jax.runs.dataset_facts import output_names
from paranet_jax.runs.init_from import check_classes, check_kept_classes, say_shared, take_backbone
from paranet_jax.runs.learned import save_learned
from paranet_jax.runs.retention import Retention
from paranet_jax.runs.status import read_summary
from paranet_jax.runs.teacher import check_normalization, take_teacher
from paranet_jax.runs.workdir import AVERAGE, CONFUSION, SUMMARY, save_config
from paranet_jax.steps import TrainState
from paranet_jax.task import Task


@contextlib.contextmanager
def open_record(task: Task, workdir: Path, processes: Coordinator, together: int = 1) -> Iterator['RunRecord']:
  """Locks a run's folder and opens its record.

  Args:
    workdir: absolute, of an existing folder.
    together: runs that train in lockstep; each has its share of their time.

  Raises:
    UserError: another process trains there, or the disk is full.
  """
  keep = task.config.checkpoint.keep
  with (
    report_no_room(workdir),
    processes.once_within(workdir_lock, workdir),
    processes.once_within(Checkpoints, workdir, keep) as checkpoints,
  ):
    yield RunRecord(task, workdir, checkpoints, processes, together)


class RunRecord:
  """The record of a run. Only process 0 reads and writes the folder; the others keep count of the steps saved.

  Attributes:
    task: of the run.
    saved_step: the latest checkpoint's; None: there is none.
  """

  def __init__(
    self, task: Task, workdir: Path, checkpoints: Checkpoints | None, processes: Coordinator, together: int = 1
  ):
    self.task = task
    self._together = together
    self.saved_step: int | None = None
    self._workdir = workdir
    self._checkpoints = checkpoints
    self._processes = processes
    self._writer: MetricsWriter | None = None
    self._started = time.monotonic()
    self._earlier_wall_time = 0.0
    self._retention = Retention(task, workdir if checkpoints else None)
    if checkpoints:
      checkpoints.also_keep = self._retention.kept
      self.saved_step = checkpoints.latest_step()

  def restore(self, devices: list[Device]) -> TrainState:
    """Restores the latest checkpoint, or makes a fresh state, and replicates it on the devices.

    Raises:
      UserError: the checkpoint has a different architecture or optimizer, or a step after the end of this run; or the
        backbone named by `init_from` or the teacher does not fit.
    """
    whole = devices_lib.replicated(devices)
    like = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), jax.eval_shape(self.task.init_state)
    )
    state = self._restored_or_fresh(self._checkpoints, like) if self._checkpoints else like
    self.saved_step, self._earlier_wall_time = self._processes.from_first([self.saved_step, self._earlier_wall_time])
    state = jax.device_put(self._processes.arrays_from_first(state), whole)
    # The seed may be among the changes that were accepted; the order of the images follows the configuration's as well.
    return dataclasses.replace(state, seed=jax.device_put(np.int32(self.task.config.seed), whole))

  def _restored_or_fresh(self, checkpoints: Checkpoints, like: Any) -> TrainState:
    total = self.task.total_steps
    if self.saved_step is None:
      return self._fresh()
    if self.saved_step > total:
      raise UserError(
        f'the run is at step {self.saved_step} and this configuration ends at step {total}; '
        'raise --config.train.epochs or --config.train.max_steps, or set --workdir for a new run'
      )
    self.saved_step, state, meta = checkpoints.restore_latest(like)
    self._earlier_wall_time = meta['wall_time_s']
    say(f'resuming from the checkpoint at step {self.saved_step} of {total}')
    return state

  def _fresh(self) -> TrainState:
    """The state at step 0, with what is taken from other runs."""
    state, config, dataset = self.task.init_state(), self.task.config, self.task.dataset
    if config.loss.teacher == 'run':
      teacher = Path(config.loss.teacher_run)
      check_classes('loss.teacher_run', teacher, dataset)
      check_normalization(teacher, dataset)
      say_shared(teacher, dataset)
      state = take_teacher(state, teacher)
    if config.init_from:
      source = Path(config.init_from)
      check_kept_classes(config, source, dataset)
      say_shared(source, dataset)
      state = take_backbone(state, source, config)
    return state

  def save_facts(self) -> None:
    """Writes the configuration and what the run learns from; not before `restore`, which refuses what does not fit."""
    if self.saved_step != self.task.total_steps:  # An earlier, shorter run's: this one would count as finished.
      self._processes.once((self._workdir / SUMMARY).unlink, True)
    self._processes.once(save_learned, self._workdir, self.task.dataset)
    self._processes.once(save_config, self._workdir, self.task.config)

  @contextlib.contextmanager
  def metrics(self, first_step: int) -> Iterator[None]:
    """Opens the metrics of a run that starts or resumes at this step."""
    with self._processes.once_within(MetricsWriter, self._workdir, first_step) as self._writer:
      yield

  def log(self, step: int, losses: dict[int, float], means: dict[str, float]) -> None:
    """Writes a training line.

    Args:
      losses: of each trained exit.
      means: `loss` and other values, averaged over the steps since the last line.

    Raises:
      UserError: a loss is no longer finite, or the save in the background failed.
    """
    if not math.isfinite(means['loss']):
      bad = [number for number, loss in losses.items() if not math.isfinite(loss)]
      self.wait()
      raise reported_once(not_finite(f'the loss (exits {bad or "together"})', step, self.saved_step))
    if self._checkpoints:
      self._checkpoints.check()
    self._write(step, 'train', means)

  def log_evaluation(self, step: int, evaluations: dict[str, list[dict]]) -> None:
    """Writes a line for every split."""
    for split, exits in evaluations.items():
      self._write(step, split, as_metrics(exits))
    if 'held_out' in evaluations:
      self._retention.note(step, as_metrics(evaluations['held_out']))

  def evaluated(self, step: int) -> bool:
    """Whether the evaluation after this step was written."""
    lines = self._processes.once(read_metrics, self._workdir)
    return self._processes.from_first(any((line['step'], line.get('split')) == (step, 'test') for line in lines or ()))

  def _write(self, step: int, split: str, values: dict[str, float]) -> None:
    if self._writer:
      self._writer.write(step, step / self.task.steps_per_epoch, split, values)

  def saves_after(self, step: int) -> bool:
    """Whether a checkpoint is due after this step."""
    return self._retention.saves_after(step)

  def save(self, step: int, state: TrainState) -> None:
    """Saves a checkpoint in the background."""
    if self._checkpoints:
      self._checkpoints.save(step, state, {'seed': self.task.config.seed, 'wall_time_s': self._wall_time()})
    self.saved_step = step

  def wait(self) -> None:
    """Waits for the save in the background.

    Raises:
      UserError: it failed.
    """
    if self._checkpoints:
      self._checkpoints.wait()

  def _wall_time(self) -> float:
    """Seconds spent on this run, including earlier starts up to their last checkpoint."""
    return self._earlier_wall_time + (time.monotonic() - self._started) / self._together

  def summarize(
    self,
    description: dict[str, Any],
    evaluations: dict[str, list[dict]],
    environment: dict[str, Any],
    trained_before: bool = False,
  ) -> dict[str, Any]:
    """The contents of summary.json; writes the confusion matrices if they are too large for it.

    Args:
      description: of `costs.describe`.
      evaluations: of `Evaluator.evaluate`, with confusion matrices.
      environment: of `machine.environment`.
      trained_before: no step was trained in this start. Where, when and in what time the run was trained, and by which
        versions, is then told by the summary that is there, if any; a damaged one is written anew.
    """
    splits, data = as_json(evaluations), self.task.dataset
    exits = [cost | measured for cost, measured in zip(description['exits'], splits['test'], strict=True)]
    summary = description | {'steps': self.task.total_steps, 'exits': exits}
    if 'held_out' in splits:
      summary['held_out'] = splits['held_out']
    if f'test_{AVERAGE}' in splits:
      summary[AVERAGE] = {split: splits[f'{split}_{AVERAGE}'] for split in ('held_out', 'test') if split in splits}
    summary['class_names'] = list(output_names(data.class_names, description['num_classes']))
    if self.task.class_weights:
      summary['class_weights'] = self.task.class_weights
    large = {
      f'{split}.exit_{row["exit"]}': row['confusion'].astype(np.int32)
      for split, exits in evaluations.items()
      for row in exits
      if row.get('confusion') is not None and len(row['confusion']) > INLINE_CLASSES
    }
    if large:
      summary['confusion_file'] = CONFUSION
      self._processes.once(write_arrays, self._workdir / CONFUSION, large, True)
    where = environment | {'processor': cpu_name(), 'cores': usable_cores(), 'finished': today()}
    where['wall_time_s'] = round(self._wall_time(), 1)
    earlier = None
    if trained_before:
      with contextlib.suppress(UserError):
        earlier = self._processes.once(read_summary, self._workdir)
    if earlier and earlier['steps'] == self.task.total_steps:  # Version 0.1.0 told neither processor nor date.
      where = {key: earlier[key] for key in where if key in earlier}
    return summary | where

  def finish(self, summary: dict[str, Any]) -> None:
    """Writes summary.json. The run is finished with it, so everything else that others read is written before."""
    self._processes.once(write_json, self._workdir / SUMMARY, summary)

  def best(self) -> str:
    """Says which checkpoint is kept as the best, if any."""
    step = self._retention.best(self._checkpoints.steps()) if self._checkpoints else None
    return '' if step is None else f'; best by {self.task.config.checkpoint.keep_best}: step {step}'
