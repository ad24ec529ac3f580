"""A run: build or restore, train, evaluate, log, save, stop cleanly."""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from paranet_jax import devices as devices_lib
from paranet_jax.agreement import check_agreement
from paranet_jax.config import check_devices
from paranet_jax.costs import abstract_variables
from paranet_jax.data.batches import epoch_order
from paranet_jax.description import describe, environment
from paranet_jax.evaluation import Evaluator, as_metrics
from paranet_jax.feed import Feed, open_feed
from paranet_jax.host import processes
from paranet_jax.host.errors import UserError, no_room_is_told
from paranet_jax.host.files import write_json
from paranet_jax.host.lock import workdir_lock
from paranet_jax.host.signals import StopRequest
from paranet_jax.regimes import Phase
from paranet_jax.report.curves import draw_curves
from paranet_jax.report.metrics import MetricsWriter
from paranet_jax.report.progress import Progress, human_duration
from paranet_jax.report.tables import describe_table, evaluation_table
from paranet_jax.runs.checkpoints import Checkpoints, SavedElsewhere
from paranet_jax.runs.dataset_facts import save_dataset_facts
from paranet_jax.runs.finite import not_finite
from paranet_jax.runs.init_from import take_body
from paranet_jax.runs.retention import Retention
from paranet_jax.runs.workdir import SUMMARY, prepare_workdir, save_config
from paranet_jax.steps import TrainState, zero_totals
from paranet_jax.targets import trained_exits
from paranet_jax.task import Task, build_task


def train_and_evaluate(config: ConfigDict, workdir: Path, accept_config_changes: bool = False) -> dict | None:
  """Trains, or goes on training, and evaluates every exit.

  Of several processes the first alone reads and writes in the workdir.

  Args:
    workdir: absolute.
    accept_config_changes: go on with this configuration where the run's saved one differs.

  Returns:
    What summary.json holds, or None if a signal stopped the run before its end, or where another process writes it.

  Raises:
    UserError: the configuration, the data or the workdir does not fit, or the loss is no longer finite.
  """
  devices = devices_lib.pick_devices(config.train.devices)
  check_devices(config, len(devices))
  task = _build_alike(config)
  processes.once(prepare_workdir, workdir, config, accept_config_changes)
  description = processes.once(describe, config, len(task.dataset.class_names))
  processes.once(lambda: print(describe_table(description)))
  print(_facts(task, devices, workdir), flush=True)
  with no_room_is_told(workdir), processes.once_within(workdir_lock, workdir), StopRequest() as stop:
    with Checkpoints(workdir, config.checkpoint.keep) if processes.is_first() else SavedElsewhere() as checkpoints:
      run = Run(task, devices, workdir, checkpoints, stop)
      state = run.restore()
      # Not before: a checkpoint that does not fit leaves the saved one as it is.
      processes.once(save_config, workdir, config)
      processes.once(save_dataset_facts, workdir, task.dataset)
      evaluations = run.train(state)
    if evaluations is None:
      print(f'stopped by {stop.received} after step {run.saved_step}, saved; the same command goes on', flush=True)
      return None
    if not processes.is_first():
      return None
    summary = _summary(description, task, evaluations, run.wall_time(), devices)
    write_json(workdir / SUMMARY, summary)
    print(f'finished in {human_duration(summary["wall_time_s"])}{run.best()}')
    print(f'curves: {draw_curves(workdir)}\nsummary: {workdir / SUMMARY}', flush=True)
  return summary


def _build_alike(config: ConfigDict) -> Task:
  task = processes.first_then_others(lambda: build_task(config))
  check_agreement(task)
  return task


def evaluate_checkpoint(config: ConfigDict, workdir: Path, step: int | None = None) -> dict[str, Any]:
  """Evaluates a checkpoint on every split.

  Args:
    workdir: absolute.
    step: of the checkpoint; None: the latest.

  Returns:
    `name`, `dataset`, `seed`, `step`, and `splits` as `Evaluator.evaluate` gives them.
  """
  devices = devices_lib.pick_devices(config.train.devices)
  restored = restore_checkpoint(config, workdir, step, devices)
  evaluations = Evaluator(restored.task, devices).evaluate(**restored.variables)
  return {
    'name': config.name,
    'dataset': config.data.name,
    'seed': config.seed,
    'step': restored.step,
    'splits': evaluations,
  }


class Restored(NamedTuple):
  """What a checkpoint belongs to, its step, and its `params` and `batch_stats`."""

  task: Task
  step: int
  variables: dict[str, Any]


def restore_checkpoint(config: ConfigDict, workdir: Path, step: int | None, devices: list[jax.Device]) -> Restored:
  """Restores what a checkpoint has learned, and builds the task it was trained on.

  Args:
    workdir: absolute.
    step: of the checkpoint; None: the latest.
    devices: where the variables go, whole on each.

  Raises:
    UserError: there is no such checkpoint, it does not fit the configuration, or the data does not.
  """
  with processes.once_within(Checkpoints, workdir) as checkpoints:
    step = processes.from_first(processes.once(lambda: checkpoints.choose(step)))
    task = _build_alike(config)
    like = abstract_variables(task.model, task.image_shape)
    variables = processes.once(lambda: checkpoints.restore_variables(step, like))
  variables = processes.arrays_from_first(variables or like)
  return Restored(task, step, jax.device_put(variables, devices_lib.replicated(devices)))


class Run:
  """The training loop and its state. Nothing waits for the device but a log line, an evaluation or a checkpoint.

  Attributes:
    evaluator: of the exits, for runs that differ only in their seed the same.
    saved_step: of the latest checkpoint; None: there is none.
  """

  def __init__(
    self,
    task: Task,
    devices: list,
    workdir: Path,
    checkpoints: Checkpoints,
    stop: StopRequest,
    evaluator: Evaluator | None = None,
  ):
    self._task = task
    self._devices = devices
    self._workdir = workdir
    self._checkpoints = checkpoints
    self._stop = stop
    self.evaluator = evaluator or Evaluator(task, devices)
    self._started = time.monotonic()
    self._earlier_wall_time = 0.0
    self._retention = Retention(task, processes.once(lambda: workdir))
    checkpoints.also_keep = self._retention.kept
    self.saved_step = checkpoints.latest_step()

  def wall_time(self) -> float:
    """Seconds spent on this run, earlier starts that reached a checkpoint included."""
    return self._earlier_wall_time + time.monotonic() - self._started

  def restore(self) -> TrainState:
    """The state of the latest checkpoint, or a fresh one.

    Raises:
      UserError: the checkpoint is of another architecture or optimizer, or of a step after the end of this run; or a
        fresh state was to have the body of a run that does not fit.
    """
    state = self._restored_or_fresh() if processes.is_first() else _like(self._task, self._devices)
    self.saved_step, self._earlier_wall_time = processes.from_first([self.saved_step, self._earlier_wall_time])
    state = jax.device_put(processes.arrays_from_first(state), devices_lib.replicated(self._devices))
    # With accepted changes the seed may be another one; the order of the images follows the configuration's too.
    return state.replace(seed=jax.device_put(np.int32(self._task.config.seed), devices_lib.replicated(self._devices)))

  def _restored_or_fresh(self) -> TrainState:
    step, total = self._checkpoints.latest_step(), self._task.total_steps
    if step is None:
      state, source = self._task.init_state(), self._task.config.init_from
      return take_body(state, Path(source)) if source else state
    if step > total:
      raise UserError(
        f'the run is at step {step} and this configuration ends at step {total}; '
        'raise --config.train.epochs or --config.train.max_steps, or set --workdir for a new run'
      )
    step, state, meta = self._checkpoints.restore_latest(_like(self._task, self._devices))
    self.saved_step = step
    self._earlier_wall_time = meta['wall_time_s']
    print(f'going on from the checkpoint of step {step} of {total}', flush=True)
    return state

  def best(self) -> str:
    """Says which checkpoint is kept for being the best, or nothing."""
    step = self._retention.best(self._checkpoints.steps())
    return '' if step is None else f'; best by {self._task.config.checkpoint.keep_best}: step {step}'

  def train(self, state: TrainState) -> dict | None:
    """Trains from this state to the end; returns the last evaluation, or None if a signal came first."""
    task = self._task
    first_step = int(state.step)
    batch_size = task.config.train.batch_size
    with processes.once_within(MetricsWriter, self._workdir, first_step) as writer:
      progress = Progress(task.total_steps, task.steps_per_epoch, batch_size)
      self._writer, self._progress = writer, progress
      try:
        with open_feed(task, self._devices, self._order, first_step) as feed:
          state, evaluations = self._loop(state, first_step, feed)
      finally:
        progress.close()
    step = int(state.step)
    if evaluations is None and step == task.total_steps:
      # Stopped after its last checkpoint and before its summary: the lines of this evaluation are written already.
      evaluations = self.evaluator.evaluate(state.params, state.batch_stats)
      print(evaluation_table(evaluations))
    if evaluations is None:
      self._save(step, state)
    self._checkpoints.wait()
    return evaluations

  def _loop(self, state: TrainState, step: int, feed: Feed) -> tuple[TrainState, dict | None]:
    task, config = self._task, self._task.config
    phase, train_step, zeros = self._enter_phase(step)
    clock, eval_every = _Clock(config.train.batch_size), task.evaluation_steps
    totals, logged, evaluations = _copy(zeros), step, None
    while step < task.total_steps and not self._stop.requested(step):
      state, totals = train_step(state, totals, *feed(step))
      step += 1
      clock.stepped(totals)
      last = step == task.total_steps
      if last or step == phase.end or step % config.log.every_steps == 0:
        self._log(step, totals, step - logged, clock, phase)
        totals, logged = _copy(zeros), step
      if last or step % eval_every == 0:
        evaluations = self._evaluate(step, state)
        clock.restart()
      if last or self._retention.saves_after(step):
        self._save(step, state)
        clock.restart()
      if step == phase.end and not last:
        phase, train_step, zeros = self._enter_phase(step)
        totals, clock = _copy(zeros), _Clock(config.train.batch_size)
    return state, evaluations if step == task.total_steps else None

  def _enter_phase(self, step: int) -> tuple[Phase, Callable, dict[str, jax.Array]]:
    """The phase that a step is in, its training step, and totals of 0."""
    phase = self._task.phase(step)
    axes = {'images_axis': 0} if self._task.dataset.train.streamed else {}
    train_step = devices_lib.run_on(self._devices, functools.partial(self._task.train_step, phase=phase), **axes)
    zeros = jax.device_put(zero_totals(phase.targets), devices_lib.replicated(self._devices))
    return phase, train_step, zeros

  def _order(self, epoch: int) -> jax.Array:
    config = self._task.config
    order = epoch_order(config.seed, epoch, len(self._task.dataset.train), config.train.batch_size)
    return devices_lib.place_order(order, self._devices)

  def _log(self, step: int, totals: dict[str, jax.Array], steps: int, clock: '_Clock', phase: Phase) -> None:
    trained = trained_exits(phase.targets)
    means = {name: float(total) / steps for name, total in jax.device_get(totals).items()}
    if not math.isfinite(means['loss']):
      bad = [number for number in trained if not math.isfinite(means[f'exit_{number}/loss'])]
      self._checkpoints.wait()
      raise processes.told_once(not_finite(f'the loss (exits {bad or "together"})', step, self.saved_step))
    self._checkpoints.check()
    speed = clock.images_per_second()
    means |= {'learning_rate': self._task.learning_rate(step - 1), 'images_per_second': speed}
    self._write(step, 'train', means)
    losses = {number: means[f'exit_{number}/loss'] for number in trained}
    self._progress.update(step, losses, speed)

  def _evaluate(self, step: int, state: TrainState) -> dict[str, list[dict]]:
    evaluations = self.evaluator.evaluate(state.params, state.batch_stats)
    for split, exits in evaluations.items():
      self._write(step, split, as_metrics(exits))
    if 'held_out' in evaluations:
      self._retention.note(step, as_metrics(evaluations['held_out']))
    self._progress.message(f'after step {step}:\n{evaluation_table(evaluations)}')
    return evaluations

  def _write(self, step: int, split: str, values: dict[str, float]) -> None:
    processes.once(lambda: self._writer.write(step, step / self._task.steps_per_epoch, split, values))

  def _save(self, step: int, state: TrainState) -> None:
    if step == self.saved_step:
      return
    self._checkpoints.save(step, state, {'seed': self._task.config.seed, 'wall_time_s': self.wall_time()})
    self.saved_step = step


class _Clock:
  """Images a second since the last restart; compilation, evaluation and saving are left out."""

  def __init__(self, batch_size: int):
    self._batch_size = batch_size
    self._started: float | None = None
    self._steps = 0

  def stepped(self, result: Any) -> None:
    if self._started is None:
      # The first step compiles: wait for it once, and count from there.
      jax.block_until_ready(result)
      self.restart()
    else:
      self._steps += 1

  def restart(self) -> None:
    self._started, self._steps = time.monotonic(), 0

  def images_per_second(self) -> float:
    elapsed = time.monotonic() - self._started
    return self._steps * self._batch_size / elapsed if self._steps else math.nan


def _copy(totals: dict[str, jax.Array]) -> dict[str, jax.Array]:
  # The step is given its totals' buffers, so the zeros themselves are kept apart.
  return jax.tree.map(lambda leaf: leaf.copy(), totals)


def _like(task: Task, devices: list) -> TrainState:
  """What a restored state is to be like: its shapes, whole on each device."""
  whole = devices_lib.replicated(devices)
  shapes = jax.eval_shape(task.init_state)
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes)


def _facts(task: Task, devices: list, workdir: Path) -> str:
  data = task.dataset
  held_out = f' {len(data.held_out):,} held out,' if data.held_out is not None else ''
  skipped = f' ({data.skipped:,} corrupt files skipped)' if data.skipped else ''
  where = f'{len(devices)} x {devices[0].device_kind}'
  where += f' in {processes.count()} processes' if processes.count() > 1 else ''
  return (
    f'images: {len(data.train):,} train,{held_out} {len(data.test):,} test{skipped}; '
    f'{task.total_steps:,} steps of {task.config.train.batch_size} on {where}\n'
    f'workdir: {workdir}'
  )


def _summary(description: dict, task: Task, evaluations: dict, wall_time: float, devices: list) -> dict[str, Any]:
  exits = [cost | measured for cost, measured in zip(description['exits'], evaluations['test'], strict=True)]
  summary = description | {'steps': task.total_steps, 'exits': exits}
  if 'held_out' in evaluations:
    summary['held_out'] = evaluations['held_out']
  return summary | environment(devices) | {'wall_time_s': round(wall_time, 1)}
