"""A queue of runs that train nothing: each start of a process writes what a real one would have written by then."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from paranet_jax.experiments.queue.file import QueueFile, read_queue
from paranet_jax.experiments.queue.loop import Queue
from paranet_jax.host.files import write_json
from paranet_jax.runs.workdir import save_config

TWO = """
[[runs]]
name = 'late'
config = 'paranet_jax:paranet:PN1-d'
set = { train.epochs = 4, data.name = 'digits' }
seeds = [0, 1]

[[runs]]
name = 'early'
config = 'paranet_jax:paranet:PN1-d'
set = { train.epochs = 4, data.name = 'digits' }
priority = 1
"""

STEPS = 10
"""Steps of an epoch."""


class Ends(NamedTuple):
  """How a process ends: its exit code, the epoch by then, and the line that it prints."""

  code: int = 0
  epoch: int = 4
  prints: str = ''


FINISHED = Ends()
UNTIL_STOPPED = None


def accuracy(seed: int, epoch: float) -> float:
  """Of exit 1 after an epoch."""
  return (10 + seed + epoch) / 100


class FakeQueue:
  """A queue in a folder, with a package of one file and processes that `ends` describes.

  Args:
    ends: by name of the run, how each of its processes ends; FINISHED if there are no more.
    looks: times that a process is looked at before it has ended.
    saves: the same once it is stopped.
    on_look: called with the names of the processes that run.
  """

  def __init__(
    self, folder: Path, text: str = TWO, ends: Any = None, looks: int = 1, on_look: Any = None, saves: int = 0
  ):
    self.path, self.workdir, self.package = folder / 'queue.toml', folder / 'work', folder / 'source' / 'paranet_jax'
    self.workdir.mkdir(exist_ok=True)
    self.package.mkdir(parents=True, exist_ok=True)
    if not self.path.exists():
      self.path.write_text(text)
    if not (self.package / 'main.py').exists():
      (self.package / 'main.py').write_text('first')
    self.ends, self.looks, self.on_look = {name: list(own) for name, own in (ends or {}).items()}, looks, on_look
    self.starts: list[tuple[str, list[str], str, tuple[int, ...]]] = []
    self.running: list[str] = []
    self.stopped: list[str] = []
    self.most, self.pauses, self.saves = 0, 0, saves
    self.queue: Queue | None = None
    self._read: QueueFile | None = None
    self.stop = SimpleNamespace(received=None)

  def work(self, **options: Any) -> dict[str, str]:
    """Works through the queue."""
    self.queue = Queue(read_queue(self.path), self.workdir, **self.fakes() | options)
    return self.queue.work(self.stop)

  def fakes(self) -> dict[str, Any]:
    """What a `Queue` is given in place of processes, a disk and a clock."""
    return {'start': self.start, 'free': lambda path: 10**12, 'pause': self.pause, 'package': self.package}

  def pause(self, seconds: float) -> None:
    """Takes no time."""
    self.pauses += 1
    if self.on_look:
      self.on_look(self)

  def start(self, arguments: list[str], code: Path, log: Path, cores: tuple[int, ...]) -> 'FakeProcess':
    """Stands for `RunProcess`."""
    name = log.stem
    self.starts.append((name, arguments, (code / 'paranet_jax' / 'main.py').read_text(), cores))
    self.running.append(name)
    self.most = max(self.most, len(self.running))
    waiting = self.ends.get(name)
    return FakeProcess(self, name, waiting.pop(0) if waiting else FINISHED)

  def names(self) -> list[str]:
    """The runs whose processes were started, in order."""
    return [name for name, *_ in self.starts]

  def record(self, name: str) -> dict[str, Any]:
    """What queue.json has of a run."""
    return json.loads((self.workdir / 'queue.json').read_text())['runs'][name]

  def write(self, name: str, epoch: float) -> None:
    """Writes a run's files as of an epoch."""
    if self._read is None and self.queue is None:
      self._read = read_queue(self.path)
    queue = self.queue.queue if self.queue else self._read
    run = next(run for run in queue.runs if run.name == name)
    write_run(self.workdir / 'runs' / name, run.config, epoch)


class FakeProcess:
  """Ends after some looks, or at once if it is stopped."""

  def __init__(self, queue: FakeQueue, name: str, ends: Ends | None):
    self._queue, self._name, self._ends, self._looks = queue, name, ends, queue.looks

  def ended(self) -> int | None:
    """As of `RunProcess`."""
    if self._name not in self._queue.running:
      return self._ends.code if self._ends else 0
    self._looks -= 1
    if self._ends is UNTIL_STOPPED or self._looks >= 0:
      return None
    self._end(self._ends.epoch)
    return self._ends.code

  def stop(self) -> None:
    """As of `RunProcess`."""
    self._queue.stopped.append(self._name)
    self._ends, self._looks = Ends(0, 2), self._queue.saves
    if not self._looks:
      self._end(2)

  def reason(self) -> str:
    """As of `RunProcess`."""
    return self._ends.prints if self._ends else ''

  def _end(self, epoch: int) -> None:
    self._queue.running.remove(self._name)
    if epoch:
      self._queue.write(self._name, epoch)


def write_run(folder: Path, config: Any, epoch: float, speed: float = 20.0, wall_time: float = 80.0) -> None:
  """Writes a run's files as of an epoch of STEPS steps.

  Args:
    speed: images/s of its training lines.
    wall_time: seconds, once it is finished.
  """
  (folder / 'checkpoints' / str(round(epoch * STEPS))).mkdir(parents=True, exist_ok=True)
  save_config(folder, config)
  lines = []
  for done in range(1, int(epoch) + 1):
    place = {'step': done * STEPS, 'epoch': float(done)}
    lines += [
      place | {'split': 'train', 'images_per_second': speed},
      place | {'split': 'test', 'exit_1/accuracy': accuracy(config.seed, done)},
    ]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  if epoch >= config.train.epochs:
    exits = [{'exit': 1, 'accuracy': accuracy(config.seed, epoch), 'macs': 1, 'params': 1}]
    facts = {'wall_time_s': wall_time, 'device': {'kind': 'cpu', 'count': 1}, 'versions': {}}
    write_json(folder / 'summary.json', {'steps': int(epoch * STEPS), 'exits': exits, **facts})
