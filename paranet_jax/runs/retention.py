"""When a run saves checkpoints, and which it keeps in addition to the latest."""

import math
from collections.abc import Iterable
from pathlib import Path

from paranet_jax.display.metrics import read_metrics
from paranet_jax.targets import trained_exits
from paranet_jax.task import Task

HIGHER_IS_BETTER = {'accuracy': True, 'balanced_accuracy': True, 'top5': True, 'loss': False, 'nll': False}
"""Measures by which the best checkpoint can be kept: of the last exit that trains to the run's end, on the held-out
split."""


class Retention:
  """Which checkpoints stay: the best by `checkpoint.keep_best`, and one every `checkpoint.keep_every_epochs`.

  Steps before all exits of the last phase train are no candidates for the best: its exits are not comparable yet.

  Args:
    workdir: its metrics.jsonl has the measures of existing checkpoints; None: another process keeps them.
  """

  def __init__(self, task: Task, workdir: Path | None):
    config = task.config.checkpoint
    self._evaluation_steps = task.evaluation_steps
    self._every_steps = config.every_steps
    every = config.keep_every_epochs  # 0: none. Less than a step keeps every step.
    self._kept_steps = max(round(every * task.steps_per_epoch), 1) if every else 0
    self._measure = None if config.keep_best == 'none' else config.keep_best
    learning = trained_exits(task.phases[-1].targets)
    self._key = f'exit_{learning[-1]}/{self._measure}'
    self._begun = max((phase.end for phase in task.phases if trained_exits(phase.targets) != learning), default=0)
    self._measured: dict[int, float] = {}
    for line in read_metrics(workdir) if self._measure and workdir else ():
      if line.get('split') == 'held_out':
        self.note(line['step'], line)

  def note(self, step: int, held_out: dict[str, float]) -> None:
    """Records an evaluation on the held-out split, given as its line of metrics.jsonl."""
    value = held_out.get(self._key)
    if self._measure is not None and step > self._begun and value is not None and math.isfinite(value):
      self._measured[step] = value if HIGHER_IS_BETTER[self._measure] else -value

  def saves_after(self, step: int) -> bool:
    """Whether a checkpoint is due after this step; if the best is kept, one is due after every evaluation."""
    return (
      step % self._every_steps == 0
      or self._is_kept(step)
      or (self._measure is not None and step > self._begun and step % self._evaluation_steps == 0)
    )

  def kept(self, steps: Iterable[int]) -> set[int]:
    """The steps among these whose checkpoints stay, however old; the latest of equally good ones."""
    kept = {step for step in steps if self._is_kept(step)}
    best = self.best(steps)
    return kept if best is None else kept | {best}

  def best(self, steps: Iterable[int]) -> int | None:
    """The step of the best of these checkpoints; None: none is kept as the best, or none has been evaluated."""
    measured = {step: self._measured[step] for step in steps if step in self._measured}
    return max(measured, key=lambda step: (measured[step], step), default=None)

  def _is_kept(self, step: int) -> bool:
    return self._kept_steps > 0 and step % self._kept_steps == 0
