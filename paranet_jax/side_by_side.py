"""Seeds trained at the same time: one a device where there are several, vmapped where they share one."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from paranet_jax import devices as devices_lib
from paranet_jax.data.batches import epoch_order
from paranet_jax.feed import open_feed
from paranet_jax.host.errors import no_room_is_told
from paranet_jax.host.lock import workdir_lock
from paranet_jax.host.signals import StopRequest
from paranet_jax.regimes import Phase
from paranet_jax.report.metrics import MetricsWriter
from paranet_jax.report.progress import Progress
from paranet_jax.runs.checkpoints import Checkpoints
from paranet_jax.runs.dataset_facts import save_dataset_facts
from paranet_jax.runs.workdir import prepare_workdir, save_config
from paranet_jax.steps import TrainState, zero_totals
from paranet_jax.task import build_task
from paranet_jax.train import Run


def train_side_by_side(
  configs: Sequence[ConfigDict], workdirs: Sequence[Path], devices: list[jax.Device], accept_config_changes: bool
) -> bool:
  """Trains runs that differ only in their seed, in step, to the checkpoint of their last step.

  Each is what it would be by itself on one device, to rounding. Runs whose checkpoints are of different steps, or whose
  images are streamed, are left as they are.

  Args:
    workdirs: of each run, absolute.
    devices: one, or one a run.

  Returns:
    Whether no signal stopped them.

  Raises:
    UserError: as `train.train_and_evaluate`.
  """
  tasks = [build_task(config) for config in configs]
  if tasks[0].dataset.train.streamed:
    return True  # Each seed has its own order, and images are read for one at a time.
  for config, workdir in zip(configs, workdirs, strict=True):
    prepare_workdir(workdir, config, accept_config_changes)
  with contextlib.ExitStack() as stack:
    for workdir in workdirs:
      stack.enter_context(no_room_is_told(workdir))
      stack.enter_context(workdir_lock(workdir))
    stop = stack.enter_context(StopRequest())
    kept = [stack.enter_context(Checkpoints(workdir, configs[0].checkpoint.keep)) for workdir in workdirs]
    if len({checkpoints.latest_step() for checkpoints in kept}) > 1:
      return True
    runs = []
    for task, workdir, checkpoints in zip(tasks, workdirs, kept, strict=True):
      # They share the programs of the first one's evaluation.
      runs.append(Run(task, devices[:1], workdir, checkpoints, stop, runs[0].evaluator if runs else None))
    group = _SideBySide(runs, devices, stop)
    state = group.restore()
    if len(set(np.asarray(state.step).tolist())) > 1:  # The latest checkpoint of one was damaged.
      return True
    for task, workdir in zip(tasks, workdirs, strict=True):
      save_config(workdir, task.config)
      save_dataset_facts(workdir, task.dataset)
    group.train(state)
  if stop.received:
    print(f'stopped by {stop.received} after step {runs[0].saved_step}, saved; the same command goes on', flush=True)
  return not stop.received


class _SideBySide(Run):
  """One loop for several runs: every array of the state, the totals and the order has a first axis, a run each."""

  def __init__(self, runs: list[Run], devices: list[jax.Device], stop: StopRequest):
    self._runs = runs
    self._task = runs[0]._task
    self._devices = devices
    self._stop = stop
    self._retention = runs[0]._retention  # They save at the same steps.

  def restore(self) -> TrainState:
    return self._stacked([run.restore() for run in self._runs])

  def train(self, state: TrainState) -> None:
    task = self._task
    first_step = int(state.step[0])
    progress = Progress(task.total_steps, task.steps_per_epoch, task.config.train.batch_size)
    with contextlib.ExitStack() as stack:
      stack.callback(progress.close)
      for run in self._runs:
        run._progress = progress
        run._writer = stack.enter_context(MetricsWriter(run._workdir, resume_step=first_step))
      feed = stack.enter_context(open_feed(task, self._devices, self._order, first_step))
      state, _ = self._loop(state, first_step, feed)
    self._save(int(state.step[0]), state)
    for run in self._runs:
      run._checkpoints.wait()

  def _stacked(self, trees: list) -> Any:
    spread = devices_lib.replicated if len(self._devices) == 1 else devices_lib.shared
    host = jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(trees))
    return jax.device_put(host, spread(self._devices))

  def _each(self, tree: Any) -> list[tuple[Run, Any]]:
    host = jax.device_get(tree)
    return [(run, jax.tree.map(lambda leaf, i=i: leaf[i], host)) for i, run in enumerate(self._runs)]

  def _enter_phase(self, step: int) -> tuple[Phase, Callable, dict[str, jax.Array]]:
    phase = self._task.phase(step)
    body, in_axes = self._task.train_step(phase=phase), (0, 0, None, None, 0)
    if len(self._devices) == 1:
      train_step = jax.jit(jax.vmap(body, in_axes), donate_argnums=(0, 1))
    else:
      train_step = jax.pmap(body, in_axes=in_axes, devices=self._devices, donate_argnums=(0, 1))
    return phase, train_step, self._stacked([zero_totals(phase.targets)] * len(self._runs))

  def _order(self, epoch: int) -> jax.Array:
    size, batch_size = len(self._task.dataset.train), self._task.config.train.batch_size
    return self._stacked([epoch_order(run._task.config.seed, epoch, size, batch_size) for run in self._runs])

  def _log(self, step: int, totals: dict[str, jax.Array], *rest: Any) -> None:
    for run, own in self._each(totals):
      run._log(step, own, *rest)

  def _evaluate(self, step: int, state: TrainState) -> list[dict]:
    evaluations = []
    for run, own in self._each(state):
      run._progress.message(f'seed {run._task.config.seed}')
      evaluations.append(run._evaluate(step, jax.device_put(own, self._devices[0])))
    return evaluations

  def _save(self, step: int, state: TrainState) -> None:
    for run, own in self._each(state):
      run._save(step, own)
