"""What the folder of a run tells: how far it is, what it has measured, and whether it trains at this moment."""

import dataclasses
import re
import statistics
from functools import cached_property
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from paranet_jax.display.metrics import read_metrics
from paranet_jax.host.files import read_object
from paranet_jax.host.lock import lock_holder
from paranet_jax.runs.checkpoints import step_folders
from paranet_jax.runs.dataset_facts import DATASET
from paranet_jax.runs.status import finished_summary
from paranet_jax.runs.workdir import CONFIG

RUNS = 'runs'

_LATEST = 50  # Lines of training whose median is the speed.


@dataclasses.dataclass(frozen=True)
class RunState:
  """How far a run is.

  Attributes:
    begun: its configuration is saved.
    checkpoint: step of the latest one; -1: there is none.
    summary: contents of summary.json; None: it is not finished.
    holder: the process that trains it; '': none.
    metrics: the lines of metrics.jsonl that a run has written.
    num_classes: of its data set; None: not yet known.
  """

  folder: Path
  begun: bool
  checkpoint: int
  summary: dict[str, Any] | None
  holder: str
  metrics: list[dict[str, Any]]
  num_classes: int | None

  @property
  def finished(self) -> bool:
    """Whether it has reached its end."""
    return self.summary is not None

  @property
  def saved_step(self) -> int:
    """The step from which it goes on."""
    return max(self.checkpoint, 0)

  @property
  def epoch(self) -> float:
    """Epochs trained, up to the latest line."""
    return max((line['epoch'] for line in self.metrics), default=0.0)

  @property
  def steps_per_epoch(self) -> float | None:
    """Steps of an epoch; None: not yet known."""
    line = self.metrics[-1] if self.metrics else None
    return line['step'] / line['epoch'] if line and line['epoch'] else None

  def epochs(self, config: ConfigDict) -> float:
    """Epochs that a run of this configuration trains in all; `train.max_steps` counts once its steps are known."""
    steps, most = self.steps_per_epoch, config.train.max_steps
    return min(config.train.epochs, most / steps) if most and steps else config.train.epochs

  def seconds_per_epoch(self, batch_size: int) -> float | None:
    """Seconds that an epoch takes: of a finished run all that it took; otherwise of its latest steps alone."""
    steps = self.steps_per_epoch
    if not steps:
      return None
    if self.summary:
      return self.summary['wall_time_s'] / (self.summary['steps'] / steps)
    speeds = [line.get('images_per_second') for line in self.metrics if line['split'] == 'train'][-_LATEST:]
    speeds = [speed for speed in speeds if speed]
    return steps * batch_size / statistics.median(speeds) if speeds else None

  @cached_property
  def measured(self) -> dict[float, dict[int, float]]:
    """Of every evaluation on the test images so far, by its epoch: the accuracy (a fraction) of each trained exit."""
    return self._measured('test')

  @cached_property
  def held_out(self) -> dict[float, dict[int, float]]:
    """As `measured`, on the held-out images; empty without any."""
    return self._measured('held_out')

  def _measured(self, split: str) -> dict[float, dict[int, float]]:
    return {line['epoch']: _accuracies(line) for line in self.metrics if line['split'] == split}

  @property
  def measured_at_end(self) -> bool:
    """Whether there is an evaluation on the test images after the last step of a finished run."""
    last = self.summary['steps'] if self.summary else None
    return any(line['step'] == last for line in self.metrics if line['split'] == 'test')

  def accuracies(self) -> str:
    """The latest accuracies on the test images, as in `1: 50.12, 2: 65.34`, in percent."""
    latest = self.measured[max(self.measured)] if self.measured else {}
    return ', '.join(f'{number}: {100 * value:.2f}' for number, value in latest.items())


def _accuracies(line: dict[str, Any]) -> dict[int, float]:
  names = {key: re.fullmatch(r'exit_(\d+)/accuracy', key) for key in line}
  return {int(match[1]): line[key] for key, match in names.items() if match and line[key] is not None}


def run_state(workdir: Path, name: str) -> RunState:
  """Reads the state of a run of a queue.

  Raises:
    UserError: a file of it is damaged.
  """
  folder = workdir / RUNS / name
  facts = read_object(folder / DATASET, 'restore it')
  checkpoint = max(step_folders(folder), default=-1)
  return RunState(
    folder,
    begun=(folder / CONFIG).exists(),
    checkpoint=checkpoint,
    summary=finished_summary(folder, checkpoint),
    holder=lock_holder(folder),
    metrics=[line for line in read_metrics(folder) if line.keys() >= {'epoch', 'split'}],
    num_classes=len(facts['class_names']) if facts and isinstance(facts.get('class_names'), list) else None,
  )
