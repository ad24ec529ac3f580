"""A run: build or restore, train, evaluate, log, save, and stop cleanly."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from paranet_jax import devices as devices_lib
from paranet_jax.config import build_model, image_shape
from paranet_jax.costs import describe
from paranet_jax.data.batches import jitted_order
from paranet_jax.devices import Layout
from paranet_jax.display.pictures import drawn
from paranet_jax.display.progress import Clock, Progress, human_duration
from paranet_jax.display.tables import describe_table, evaluation_table
from paranet_jax.evaluation import MOST_CLASSES, Evaluator
from paranet_jax.feed import Feed, images_axis, open_feed
from paranet_jax.host.errors import UserError, say
from paranet_jax.host.kept_programs import Kept
from paranet_jax.host.machine import environment
from paranet_jax.host.processes import Coordinator
from paranet_jax.host.signals import Stopped, StopRequest
from paranet_jax.models.numerics import check_training, prepare_kernels
from paranet_jax.runs.dataset_facts import output_names
from paranet_jax.runs.dtype import with_dtype
from paranet_jax.runs.init_from import check_backbone
from paranet_jax.runs.learned import restore_learned
from paranet_jax.runs.packed import save_average
from paranet_jax.runs.record import RunRecord, open_record
from paranet_jax.runs.status import run_status
from paranet_jax.runs.teacher import check_teacher
from paranet_jax.runs.trained import read_task
from paranet_jax.runs.workdir import AVERAGE, NOTHING, SUMMARY, Accepted, check_evaluated, check_saved, prepare_workdir
from paranet_jax.steps import Beside, TrainState, zero_totals
from paranet_jax.targets import Phase, trained_exits
from paranet_jax.task import agreed_task


def train_and_evaluate(
  config: ConfigDict, workdir: Path, accepted: Accepted = NOTHING, begun: Callable[[], None] = lambda: None
) -> dict | None:
  """Trains, or resumes training, and evaluates every exit.

  In a multi-process run, only process 0 reads and writes the workdir.

  Args:
    workdir: absolute.
    accepted: what may differ from what the run saved.
    begun: is called once nothing has been refused and the configuration is saved, before the first step.

  Returns:
    The contents of summary.json, or None if a signal stopped the run before its end.

  Raises:
    UserError: the configuration, the data or the workdir does not fit, or the loss is no longer finite.
  """
  processes = Coordinator()
  devices = devices_lib.pick_devices(config.train.devices)
  devices_lib.check_fits(config, devices)
  # Before the data is read, which follows from the configuration.
  processes.once(check_saved, workdir, config, accepted.config, accepted.place)
  config = with_dtype(config, devices, workdir)
  processes.once(check_backbone, config, workdir)
  processes.once(check_teacher, config, workdir)
  share = config.train.batch_size // len(devices)
  background = ThreadPoolExecutor(1)  # For what takes another core seconds at the first start on a machine.
  network = build_model(config, config.model.num_classes or 2)
  background.submit(prepare_kernels, network, image_shape(config), share)
  learned = processes.once(restore_learned, workdir, config.model.channels, accepted.data)
  task = agreed_task(config, processes, learned)
  processes.once(prepare_workdir, workdir, config, accepted.config, accepted.place)
  checked = background.submit(check_training, task.model, task.image_shape, share)
  background.shutdown(wait=False)
  description = describe(config, len(task.dataset.class_names))
  say(f'{describe_table(description)}\n{task.facts_line(devices, processes.count)}\nworkdir: {workdir}')
  with StopRequest() as stop, open_record(task, workdir, processes) as record:
    state = record.restore(devices)
    record.save_facts()
    begun()
    evaluator = Evaluator(task, devices)
    state, evaluations = train_loop([record], state, Layout(devices), evaluator, stop, checked.result)
    if evaluations is None and record.saved_step != task.total_steps:
      say(f'stopped by {stop.received} after step {record.saved_step}, saved; the same command resumes')
      return None
    trained_before = evaluations is None
    if trained_before:
      # The run is finished, or stopped between its last checkpoint and its summary: the metrics are already written.
      evaluations = [evaluate_state(evaluator, state, True)]
      say(evaluation_table(evaluations[0]))
    summary = record.summarize(description, evaluations[0], environment(devices), trained_before)
    if isinstance(state.opt_state, Beside) and state.opt_state.average:
      folder = processes.once(save_average, workdir, config, state.opt_state.average, summary)
      say(f'averaged weights: {folder}')
    record.finish(summary)
    curves = processes.once(draw_curves, workdir)
    confusion = processes.once(draw_confusion, workdir, evaluations[0]['test'], summary, task.dataset.labeled)
    say(f'finished in {human_duration(summary["wall_time_s"])}{record.best()}')
    say(f'curves: {curves}\nconfusion: {confusion}\nsummary: {workdir / SUMMARY}')
  return summary


def draw_curves(workdir: Path) -> Path | str:
  """Draws the learning curves; returns their file, or why matplotlib fails."""

  def draw() -> Path:
    from paranet_jax.display import curves

    return curves.draw_curves(workdir)

  return drawn(draw)


def draw_confusion(workdir: Path, exits: list[dict], summary: dict[str, Any], labeled: bool = True) -> Path | str:
  """Draws the confusion matrices of the exits on one split; returns their file, or why there is none."""
  matrices = {row['exit']: row['confusion'] for row in exits if row['confusion'] is not None}
  if not labeled:
    return 'not drawn: the images have no labels'
  if not matrices:
    return f'not drawn: more than {MOST_CLASSES:,} classes'

  def draw() -> Path:
    from paranet_jax.display import confusion

    return confusion.draw_confusion(workdir, matrices, summary['class_names'], summary['name'], summary['dataset'])

  return drawn(draw)


def train_missing(
  config: ConfigDict,
  workdir: Path,
  title: str,
  accepted: Accepted = NOTHING,
  begun: Callable[[], None] = lambda: None,
) -> dict[str, Any] | None:
  """Returns the summary of a finished run; trains one that is not, after printing the title.

  Returns:
    None if a signal stopped the run.

  Raises:
    UserError: as `train_and_evaluate`.
  """
  summary = run_status(workdir, config, accepted.place).summary
  if summary is None:
    say(title)
    summary = train_and_evaluate(config, workdir, accepted, begun)
  return summary


def evaluate_checkpoint(
  config: ConfigDict, workdir: Path, step: int | None = None, accept_data_changes: bool = False
) -> dict[str, Any]:
  """Evaluates a checkpoint on every split.

  Args:
    workdir: absolute.
    step: the checkpoint's; None: the latest.
    accept_data_changes: the data may have other classes or labels than the run learned.

  Returns:
    `name`, `dataset`, `seed`, `step`, `class_names`, and `splits` as returned by `Evaluator.evaluate`, with confusion
    matrices.

  Raises:
    UserError: as `read_task`; or the run has a network or a measure of loss that the configuration does not have.
  """
  Coordinator().once(check_evaluated, workdir, config)
  devices = devices_lib.pick_devices(config.train.devices)
  task, step, variables = read_task(config, workdir, step, devices, accept_data_changes)
  return {
    'name': config.name,
    'dataset': config.data.name,
    'seed': config.seed,
    'step': step,
    'class_names': list(output_names(task.dataset.class_names, task.model.num_classes)),
    'splits': Evaluator(task, devices).evaluate(**variables, confusion=True),
  }


def train_loop(
  records: Sequence[RunRecord],
  state: TrainState,
  layout: Layout,
  evaluator: Evaluator,
  stop: StopRequest,
  ready: Callable[[], None] = lambda: None,
) -> tuple[TrainState, list[dict] | None]:
  """Trains one run, or several side by side, from a state to their end or to a stop, and saves a checkpoint there.

  Args:
    records: one per run; the runs differ only in their seed.
    state: laid out as `layout` does.
    ready: is called before anything is computed, but after the first step is compiled; may raise.

  Returns:
    The state, and the last evaluation of each run; None if a signal came first, or if no step was left.

  Raises:
    UserError: a loss is no longer finite, or a checkpoint could not be written.
  """
  task = records[0].task
  first_step = int(next(iter(layout.split(state.step))))

  sizes = len(task.dataset.train), task.config.train.batch_size
  shuffle = Kept('epoch_order', lambda: jitted_order(*sizes), lambda: sizes)

  def order(epoch: int) -> jax.Array:
    return layout.order([shuffle(np.int32(record.task.config.seed), np.int32(epoch)) for record in records])

  with contextlib.ExitStack() as stack:
    progress = stack.enter_context(
      contextlib.closing(Progress(task.total_steps, task.steps_per_epoch, task.config.train.batch_size))
    )
    for record in records:
      stack.enter_context(record.metrics(first_step))
    own = next(iter(layout.split(state)))
    variables = {'params': own.params, 'batch_stats': own.batch_stats}
    feed = stack.enter_context(open_feed(task, layout.devices, order, first_step, variables, stop.check))
    loop, step, evaluations = _Loop(records, layout, evaluator, stop, progress, ready), first_step, None
    with contextlib.suppress(Stopped):  # While the features of the first step were computed: none was made.
      state, step, evaluations = loop.run(state, first_step, feed)
  loop.save(step, state)
  for record in records:
    record.wait()
  return state, evaluations


def evaluate_state(
  evaluator: Evaluator, state: TrainState, confusion: bool, look: Callable[[], None] = lambda: None
) -> dict[str, list[dict]]:
  """Evaluates a state on every split, and its averaged weights, if any, as splits such as `test_average`.

  Args:
    look: as of `Evaluator.evaluate`.
  """
  found = evaluator.evaluate(state.params, state.batch_stats, confusion, look)
  if isinstance(state.opt_state, Beside) and state.opt_state.average:
    averaged = evaluator.evaluate(**state.opt_state.average, confusion=confusion, look=look)
    found |= {f'{split}_{AVERAGE}': exits for split, exits in averaged.items()}
  return found


class _Loop:
  """The training loop. It waits for the device only to log, to evaluate and to save."""

  def __init__(
    self,
    records: Sequence[RunRecord],
    layout: Layout,
    evaluator: Evaluator,
    stop: StopRequest,
    progress: Progress,
    ready: Callable[[], None],
  ):
    self._records = records
    self._task = records[0].task
    self._layout = layout
    self._evaluator = evaluator
    self._stop = stop
    self._progress = progress
    self._ready = ready

  def run(self, state: TrainState, step: int, feed: Feed) -> tuple[TrainState, int, list[dict] | None]:
    task, config = self._task, self._task.config
    phase, train_step = self._enter_phase(step)
    clock, evaluation_steps = Clock(config.train.batch_size), task.evaluation_steps
    totals, logged, evaluations = self._zeros(phase), step, None
    due = step and (step == task.total_steps or step % evaluation_steps == 0)
    if due and not self._records[0].evaluated(step):
      self._ready()
      evaluations = self._evaluate(step, state)  # The images could not be read when it was due.
    while step < task.total_steps and not self._stop.requested(step):
      try:
        batch = feed(step)
      except UserError as error:
        raise self._saved(step, state, error) from error
      if not clock.running:
        if isinstance(train_step, Kept):
          train_step.prepare(state, totals, *batch)
        self._ready()
      state, totals = train_step(state, totals, *batch)
      step += 1
      if not clock.running:
        jax.block_until_ready(totals)  # The first step compiles: wait for it once, and count from there.
      clock.step()
      last = step == task.total_steps
      if last or step == phase.end or step % config.log.every_steps == 0:
        self._log(step, totals, step - logged, clock, phase)
        totals, logged = self._zeros(phase), step
      if last or step % evaluation_steps == 0:
        evaluations = self._evaluate(step, state)
        clock.restart()
      if last or self._records[0].saves_after(step):
        self.save(step, state)
        clock.restart()
      if step == phase.end and not last:
        phase, train_step = self._enter_phase(step)
        totals, clock = self._zeros(phase), Clock(config.train.batch_size)
    return state, step, evaluations if step == task.total_steps else None

  def _enter_phase(self, step: int) -> tuple[Phase, Callable]:
    """The phase of a step, and its training step."""
    phase = self._task.phase(step)
    make_step = functools.partial(self._task.train_step, phase=phase)
    train_step = self._layout.compiled(make_step, images_axis(self._task), self._task.determines_step(phase))
    return phase, train_step

  def _zeros(self, phase: Phase) -> dict[str, jax.Array]:
    """Totals of 0. A step is given their buffers, so each interval has its own."""
    return self._layout.join([zero_totals(phase.targets, self._task.labeled)] * len(self._records))

  def _log(self, step: int, totals: dict[str, jax.Array], steps: int, clock: Clock, phase: Phase) -> None:
    jax.block_until_ready(totals)  # Steps that are still computed took no time by the clock.
    speed = clock.images_per_second()
    rates = {'learning_rate': self._task.learning_rate(step - 1), 'images_per_second': speed}
    for record, own in zip(self._records, self._layout.split(totals), strict=True):
      means = {name: float(total) / steps for name, total in jax.device_get(own).items()}
      losses = {number: means[f'exit_{number}/loss'] for number in trained_exits(phase.targets)}
      record.log(step, losses, means | rates)
      self._progress.update(step, losses, speed)

  def _evaluate(self, step: int, state: TrainState) -> list[dict[str, list[dict]]]:
    def look() -> None:
      # An evaluation may take longer than what sent a signal waits before it kills. Whether one is missing is found by
      # the lines of the first run.
      if self._stop.received is not None and len(self._records) == 1:
        self.save(step, state)

    evaluations = []
    for record, own in zip(self._records, self._layout.split(state), strict=True):
      if len(self._records) > 1:
        self._progress.message(f'seed {record.task.config.seed}')
      try:
        measured = evaluate_state(self._evaluator, own, step == self._task.total_steps, look)
      except UserError as error:
        raise self._saved(step, state, error) from error
      evaluations.append(measured)
      record.log_evaluation(step, evaluations[-1])
      self._progress.message(f'after step {step}:\n{evaluation_table(evaluations[-1])}')
    return evaluations

  def _saved(self, step: int, state: TrainState, error: UserError) -> UserError:
    """Saves a run whose images can no longer be read; returns the error to raise."""
    if not step:
      return error
    self.save(step, state)
    for record in self._records:
      record.wait()
    return error.saying(f'{error}; saved after step {step}, and the same command resumes')

  def save(self, step: int, state: TrainState) -> None:
    """Saves the checkpoint of every run, unless it has been saved."""
    if step != self._records[0].saved_step:
      for record, own in zip(self._records, self._layout.split(state), strict=True):
        record.save(step, own)
